"""Weights in Python packages: this one's as ``kn://<file>``, others' as ``package://<name>/<file>``."""

import importlib.util
from pathlib import Path

from detectron2.utils.file_io import PathHandler, PathManager

from ..errors import InputError

__all__ = ["released_weights"]

_WEIGHTS = Path(__file__).parent / "weights"


def released_weights():
    """The released files, sorted: what can follow ``kn://``.

    Returns:
        list[str]
    """
    return sorted(path.name for path in _WEIGHTS.glob("*.pth"))


class _InPackage(PathHandler):
    """Finds files in a Python package, for detectron2's PathManager, which can read them only."""

    PREFIX = ""

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _exists(self, path, **kwargs):
        return self._isfile(path)

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        if "r" not in mode:
            raise InputError(f"{path} is part of a Python package and cannot be written to.")
        return open(self._get_local_path(path), mode, buffering, **kwargs)


class _ReleasedWeightsHandler(_InPackage):
    """Finds ``kn://<file>`` in this package."""

    PREFIX = "kn://"

    def _get_local_path(self, path, force=False, **kwargs):
        name = path[len(self.PREFIX) :]
        if name not in released_weights():
            raise InputError(
                f"{path} is not one of the released weights: there are "
                f"{', '.join(self.PREFIX + name for name in released_weights())}."
            )
        return str(_WEIGHTS / name)

    def _isfile(self, path, **kwargs):
        return path[len(self.PREFIX) :] in released_weights()


class _PackageHandler(_InPackage):
    """Finds ``package://<name>/<file>`` in an installed Python package, without importing it."""

    PREFIX = "package://"

    def _get_local_path(self, path, force=False, **kwargs):
        package, folders, name = self._parts(path)
        if not folders:
            raise InputError(
                f"{path} is in the Python package {package}, which is not installed: install it with "
                f"pip install {package.replace('_', '-')}."
            )
        if not name:
            raise InputError(
                f"{path} names no file of the Python package {package}: give {self.PREFIX}{package}/FILE."
            )
        for folder in folders:
            if (folder / name).is_file():
                return str(folder / name)
        raise InputError(
            f"{path} is not there: the Python package {package} has no file {name}; name another."
        )

    def _isfile(self, path, **kwargs):
        _, folders, name = self._parts(path)
        return any((folder / name).is_file() for folder in folders)

    def _parts(self, path):
        """The package, the folders that it has, and the file in one of them."""
        package, _, name = path[len(self.PREFIX) :].partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        folders = (spec and spec.submodule_search_locations) or ()
        return package, [Path(folder) for folder in folders], name


for _handler in (_ReleasedWeightsHandler(), _PackageHandler()):
    PathManager.register_handler(_handler, allow_override=True)
