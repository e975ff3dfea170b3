"""Lets detectron2's older sources import and run on a current Python stack.

detectron2 seldom releases, so its sources of 2021 and later meet a NumPy, a Pillow, a setuptools
and a torch that have moved on, often without detectron2's compiled extension. Each repair below is
made only where it is needed: the detectron2 at hand uses a name, and the name is really gone. With
a detectron2 that needs nothing, nothing is changed, and nothing of it is imported.
"""

import contextlib
import importlib
import importlib.resources
import re
import sys
import types
import warnings
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from .errors import InputError

__all__ = ["prepare_detectron2"]

# Names that NumPy 1.24 and Pillow 10 removed, and what they stood for.
_NUMPY_ALIASES = {"bool": bool, "float": float, "int": int, "object": object, "str": str}
_PILLOW_ALIASES = {"LINEAR": "BILINEAR"}

# torch forgets an operator together with the Library that defined it, so this one is kept.
_operators = None


def prepare_detectron2():
    """Makes the detectron2 at hand importable; to be called before any of it is imported.

    Raises:
        ImportError: There is no detectron2. The message says how to install it.
    """
    spec = find_spec("detectron2")
    # A folder that only has the name, like the one a clone of detectron2 lies in, has no origin.
    if spec is None or spec.origin is None:
        raise ImportError(
            "kn_detectron needs detectron2, which is not installed and not on PyPI under that "
            "name: install it with `pip install --no-build-isolation "
            "git+https://github.com/facebookresearch/detectron2.git`, or, where only PyPI can be "
            "reached, run `make venv` in a checkout of kn_detectron, as its INSTALL.md explains.",
            name="detectron2",
        )
    root = Path(spec.origin).parent
    source = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in root.rglob("*.py")
    }
    _restore_aliases("\n".join(source.values()))

    stand_ins = {}
    layers = "\n".join(text for path, text in source.items() if path.startswith("layers/"))
    # Newer layers import the extension inside a try, and do without it by themselves.
    if _has_line(r"^from detectron2 import _C$", layers) and not _has_extension(spec):
        stand_ins.update(_extension_stand_ins())
        if _has_line(r"= torch\.ops\.detectron2\.nms_rotated$", layers):
            _define_nms_rotated()
    uses_resources = _has_line("^import pkg_resources$", source.get("model_zoo/model_zoo.py", ""))
    if uses_resources and find_spec("pkg_resources") is None:
        stand_ins["pkg_resources"] = _module("pkg_resources", resource_filename=_resource_filename)

    # The importing modules keep their stand-ins. Nobody else is to find them: whoever asks
    # whether the real module is there (detectron2's own environment report does) gets the truth.
    with _importable(stand_ins):
        if "detectron2._C" in stand_ins:
            importlib.import_module("detectron2.layers")
            importlib.import_module("detectron2.evaluation")
        if "pkg_resources" in stand_ins:
            importlib.import_module("detectron2.model_zoo")


def _has_line(pattern, text):
    return re.search(pattern, text, re.MULTILINE) is not None


def _has_extension(spec):
    """Whether detectron2._C is there: only a finder is asked, since its import would crash a
    build for another torch here, far from where detectron2 itself would report it."""
    if "detectron2._C" in sys.modules:
        return True
    return PathFinder.find_spec("detectron2._C", spec.submodule_search_locations) is not None


def _restore_aliases(source):
    """Gives NumPy and Pillow back the removed names that this source uses."""
    import numpy
    from PIL import Image

    with warnings.catch_warnings():
        # The versions between deprecation and removal warn at every look.
        warnings.simplefilter("ignore")
        for name, value in _NUMPY_ALIASES.items():
            if _has_line(rf"\bnp\.{name}\b", source) and not hasattr(numpy, name):
                setattr(numpy, name, value)
        for name, new_name in _PILLOW_ALIASES.items():
            if _has_line(rf"\bImage\.{name}\b", source) and not hasattr(Image, name):
                setattr(Image, name, getattr(Image, new_name))


def _extension_stand_ins():
    """What stands in for the compiled extension: an error at its use, and for the C++ COCOeval
    pycocotools' own, which gives the same numbers, only more slowly."""
    from pycocotools.cocoeval import COCOeval

    fast_eval_api = "detectron2.evaluation.fast_eval_api"
    return {
        "detectron2._C": _MissingExtension("detectron2._C"),
        fast_eval_api: _module(fast_eval_api, COCOeval_opt=COCOeval),
    }


class _MissingExtension(types.ModuleType):
    """Stands in for detectron2._C."""

    def __getattr__(self, name):
        # Python itself asks any module for its dunder names.
        if name.startswith("__"):
            raise AttributeError(name)
        raise _extension_error(name)


def _extension_error(name):
    return InputError(
        f"{name} is a function of detectron2's compiled extension detectron2._C, which this "
        "detectron2 lacks, so rotated boxes and deformable convolutions cannot be used: use a "
        "model without them, or build detectron2 from source as INSTALL.md explains."
    )


def _define_nms_rotated():
    """Registers the operator that old layers look up at import, where the extension would."""
    global _operators
    import torch

    def nms_rotated(boxes, scores, iou_threshold):
        raise _extension_error("nms_rotated")

    if not hasattr(torch.ops.detectron2, "nms_rotated"):
        _operators = torch.library.Library("detectron2", "FRAGMENT")
        _operators.define("nms_rotated(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        _operators.impl("nms_rotated", nms_rotated, "CompositeImplicitAutograd")


def _resource_filename(package, path):
    """The one function of pkg_resources, which setuptools 82 removed, that detectron2 calls."""
    return str(importlib.resources.files(package).joinpath(path))


def _module(name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


@contextlib.contextmanager
def _importable(modules):
    """Has the modules importable under their names within the context."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
