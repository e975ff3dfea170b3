"""The released weights, which are part of the package, under the names ``kn://<file>``."""

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


class _ReleasedWeightsHandler(PathHandler):
    """Finds ``kn://<file>`` in the package, for detectron2's PathManager."""

    PREFIX = "kn://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

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

    _exists = _isfile

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        if "r" not in mode:
            raise InputError(f"{path} is part of the package and cannot be written to.")
        return open(self._get_local_path(path), mode, buffering, **kwargs)


PathManager.register_handler(_ReleasedWeightsHandler(), allow_override=True)
