"""Lets detectron2's older sources import and run on a current Python stack.

detectron2 is seldom released. Its sources of 2021 and later meet a NumPy, a Pillow, a setuptools
and a torch that have moved on, often without detectron2's compiled extension. Each repair below is
made only where it is needed: where the detectron2 at hand uses a name that is really gone. A
detectron2 that needs nothing is neither changed nor imported.
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

__all__ = ["NOTICES", "prepare_detectron2", "without_notices"]

# Names that NumPy 1.24 and Pillow 10 removed, what they stood for, and where detectron2 uses them:
# in the same files in all its releases, 0.1 to 0.6. The others are not read at every import.
_NUMPY_ALIASES = {
    "bool": (
        bool,
        (
            "evaluation/pascal_voc_evaluation.py",
            "structures/masks.py",
            "utils/video_visualizer.py",
            "utils/visualizer.py",
        ),
    ),
    "float": (float, ("evaluation/sem_seg_evaluation.py",)),
    "int": (int, ("data/build.py", "evaluation/sem_seg_evaluation.py")),
    "str": (str, ("data/datasets/pascal_voc.py",)),
}
_PILLOW_ALIASES = {"LINEAR": ("BILINEAR", ("data/transforms/transform.py",))}

# The layers that use the compiled extension. Newer versions of them can be imported without it.
_COMPILED_LAYERS = tuple(
    f"layers/{name}.py" for name in ("deform_conv", "nms", "roi_align_rotated", "rotated_boxes")
)

# Operators of the extension that layers take from torch.
_ROI_ALIGN = "float spatial_scale, int height, int width, int sampling_ratio"
_OPERATORS = {
    "nms_rotated": "Tensor boxes, Tensor scores, float iou_threshold",
    "box_iou_rotated": "Tensor boxes1, Tensor boxes2",
    "roi_align_rotated_forward": f"Tensor input, Tensor rois, {_ROI_ALIGN}",
}

# Warnings of torch about code of detectron2 and fvcore. Nobody who uses kn_detectron can change
# that code. Each entry has the beginning of the warning and the module that it names, as regular
# expressions.
NOTICES = (
    (r"`torch\.jit\.script` is ", r"torch\.jit\."),
    (r"torch\.meshgrid", r"torch\.functional"),
    (r"Creating a tensor from a list of numpy\.ndarrays", r"detectron2\.structures\.boxes"),
    (r"The given NumPy array is not writable", r"detectron2\.data\.detection_utils"),
    (r"`broadcast_buffers` is deprecated", r"detectron2\.engine\.defaults"),
    (r"`torch\.cuda\.amp\.", r"detectron2\.engine\.train_loop"),
)

# torch forgets an operator when the Library that defined it is gone, so this one is kept.
_operators = None


def prepare_detectron2():
    """Makes the detectron2 at hand importable. Call it before any part of detectron2 is imported.

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
    _restore_aliases(root)

    stand_ins = {}
    if not _has_extension(spec):
        _define_operators(root)
        # Newer layers import the extension inside a try.
        if _uses(root, _COMPILED_LAYERS, r"^from detectron2 import _C$"):
            stand_ins.update(_extension_stand_ins())
    if find_spec("pkg_resources") is None and _uses(
        root, ["model_zoo/model_zoo.py"], "^import pkg_resources$"
    ):
        stand_ins["pkg_resources"] = _module("pkg_resources", resource_filename=_resource_filename)

    # The importing modules keep their stand-ins. Nobody else finds them, so that code that asks
    # whether the real module is there, as detectron2's environment report does, gets the truth.
    with _importable(stand_ins), without_notices():
        if "detectron2._C" in stand_ins:
            importlib.import_module("detectron2.layers")
            importlib.import_module("detectron2.evaluation")
        if "pkg_resources" in stand_ins:
            importlib.import_module("detectron2.model_zoo")


@contextlib.contextmanager
def without_notices():
    """Keeps back :data:`NOTICES` within the context, and nothing else."""
    with warnings.catch_warnings():
        for message, module in NOTICES:
            warnings.filterwarnings("ignore", message, module=module)
        yield


def _uses(root, files, pattern):
    """Whether a line of any of these files of detectron2 matches; there need not be all of them."""
    paths = [root / file for file in files]
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
    return re.search(pattern, source, re.MULTILINE) is not None


def _has_extension(spec):
    """Whether detectron2._C is there. It is not imported: an extension that was built for another
    torch would crash here, far from where detectron2 itself would report it."""
    if "detectron2._C" in sys.modules:
        return True
    return PathFinder.find_spec("detectron2._C", spec.submodule_search_locations) is not None


def _restore_aliases(root):
    """Gives NumPy and Pillow back the removed names that the detectron2 in this folder uses."""
    import numpy
    from PIL import Image

    with warnings.catch_warnings():
        # The versions between deprecation and removal warn at every look.
        warnings.simplefilter("ignore")
        for name, (value, files) in _NUMPY_ALIASES.items():
            if not hasattr(numpy, name) and _uses(root, files, rf"\bnp\.{name}\b"):
                setattr(numpy, name, value)
        for name, (new_name, files) in _PILLOW_ALIASES.items():
            if not hasattr(Image, name) and _uses(root, files, rf"\bImage\.{name}\b"):
                setattr(Image, name, getattr(Image, new_name))


def _extension_stand_ins():
    """Stand-ins for the compiled extension: an error when it is used, and pycocotools' COCOeval for
    the C++ one, which gives the same numbers in more time."""
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


def _define_operators(root):
    """Registers the operators that the detectron2 in this folder uses, where the extension would.

    Old layers look one of them up when they are imported.
    """
    global _operators
    import torch

    for name, signature in _OPERATORS.items():
        used = _uses(root, _COMPILED_LAYERS, rf"\btorch\.ops\.detectron2\.{name}\b")
        if used and not hasattr(torch.ops.detectron2, name):
            if _operators is None:
                _operators = torch.library.Library("detectron2", "FRAGMENT")
            _operators.define(f"{name}({signature}) -> Tensor")
            _operators.impl(name, _refused(name), "CompositeImplicitAutograd")


def _refused(name):
    def refuse(*args):
        raise _extension_error(name)

    return refuse


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
