"""What kn_detectron mends of detectron2, each time in a fresh Python."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

import kn_detectron  # noqa: F401  # before detectron2
import detectron2
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer

ROOT = Path(__file__).parents[1]

# Every repair leaves a trace in one of these.
PATCHABLE = """
    import sys, numpy, torch
    from PIL import Image
    def patchable():
        return (
            sorted(vars(numpy)),
            sorted(vars(Image)),
            hasattr(torch.ops.detectron2, "nms_rotated"),
            sorted(name for name in sys.modules if name.startswith("detectron2")),
            "pkg_resources" in sys.modules,
        )
"""

# That a function of the extension says that it is missing.
REFUSED = """
    from kn_detectron.errors import InputError
    def assert_refused(name, use):
        try:
            use()
        except InputError as error:
            assert str(error).startswith(name) and "detectron2._C" in str(error), error
        else:
            raise AssertionError(name)
"""

# An old detectron2 in miniature: each file uses what detectron2 0.4 uses there.
OLD_DETECTRON2 = {
    "__init__.py": "",
    "layers/__init__.py": "from .nms import nms_rotated\nfrom . import rotated_boxes\n",
    "layers/nms.py": """
        import torch

        nms_rotated = torch.ops.detectron2.nms_rotated
    """,
    "layers/rotated_boxes.py": """
        from detectron2 import _C

        def iou(boxes):
            return _C.box_iou_rotated(boxes, boxes)
    """,
    "evaluation/__init__.py": """
        from detectron2.evaluation.fast_eval_api import COCOeval_opt
    """,
    "evaluation/fast_eval_api.py": """
        from detectron2 import _C

        COCOeval_opt = _C.COCOevalAccumulate
    """,
    "data/transforms/transform.py": """
        from PIL import Image

        INTERPOLATION = Image.LINEAR
    """,
    "evaluation/sem_seg_evaluation.py": """
        import numpy as np

        def zeros():
            return [np.zeros(1, dtype=t) for t in (np.int, np.float)]
    """,
    "structures/masks.py": """
        import numpy as np

        def zeros():
            return [np.zeros(1, dtype=np.bool)]
    """,
}

USES_REMOVED_NAMES = (
    "data/transforms/transform.py",
    "evaluation/sem_seg_evaluation.py",
    "structures/masks.py",
)

EXTENSION = """
    import torch

    operators = torch.library.Library("detectron2", "DEF")
    operators.define("nms_rotated(Tensor boxes) -> Tensor")
    COCOevalAccumulate = "compiled"

    def box_iou_rotated(boxes, other_boxes):
        return "compiled"
"""


def write_package(folder, files):
    for name, text in files.items():
        path = folder / "detectron2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def check(code, path, cwd):
    """Runs the code in a new Python that finds modules in these folders before any others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def compat_only(tmp_path):
    """A folder with a kn_detectron of compat.py alone, for a detectron2 that is no real one."""
    package = tmp_path / "only" / "kn_detectron"
    package.mkdir(parents=True)
    for name in ("compat.py", "errors.py"):
        (package / name).write_text((ROOT / "kn_detectron" / name).read_text())
    (package / "__init__.py").write_text("from .compat import prepare_detectron2\n")
    return package.parent


# -S keeps every installed package away, so that detectron2 is missing wherever the tests run.
@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_missing_detectron2_says_in_one_sentence_how_to_install_it(tmp_path, folder_of_that_name):
    if folder_of_that_name:
        (tmp_path / "detectron2").mkdir()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kn_detectron"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, str(ROOT)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: kn_detectron needs detectron2, which is not installed")
    for way in ("pip install", "github.com/facebookresearch/detectron2", "make venv", "INSTALL.md"):
        assert way in message
    assert message.count(". ") == 0 and message.endswith(".")


def test_does_nothing_where_nothing_is_needed(tmp_path, compat_only):
    # What current sources do: no removed name, and layers that survive a missing extension.
    write_package(
        tmp_path,
        {
            "__init__.py": "",
            "layers/deform_conv.py": """
                import numpy as np

                zeros = np.zeros(1, dtype=np.int64)
                try:
                    from detectron2 import _C
                except ImportError:
                    _C = None
            """,
            "evaluation/fast_eval_api.py": "from detectron2 import _C\n",
        },
    )
    code = PATCHABLE + """
    before = patchable()
    from kn_detectron.compat import prepare_detectron2
    prepare_detectron2()
    assert patchable() == before
    """
    check(code, [compat_only, tmp_path], tmp_path)


def test_few_files_are_read(tmp_path, compat_only):
    # As many as detectron2 has; and what one of the others uses makes no difference.
    others = {f"modeling/part_{i}.py": "import numpy as np\nx = np.int\n" for i in range(200)}
    write_package(tmp_path, {**OLD_DETECTRON2, **others})
    code = """
        import sys
        read = set()
        sys.addaudithook(lambda event, args: event == "open" and read.add(str(args[0])))
        from kn_detectron.compat import prepare_detectron2
        prepare_detectron2()
        read = sorted(path for path in read if "detectron2" in path and path.endswith(".py"))
        assert any(path.endswith("evaluation/sem_seg_evaluation.py") for path in read)
        assert not [path for path in read if "part_" in path]
    """
    check(code, [compat_only, tmp_path], tmp_path)


def test_an_extension_that_is_there_is_used(tmp_path, compat_only):
    files = {name: text for name, text in OLD_DETECTRON2.items() if name not in USES_REMOVED_NAMES}
    write_package(tmp_path, {**files, "_C.py": EXTENSION})
    code = PATCHABLE + """
    before = patchable()
    from kn_detectron.compat import prepare_detectron2
    prepare_detectron2()
    assert patchable() == before
    import detectron2._C
    from detectron2.evaluation import COCOeval_opt
    from detectron2.layers import rotated_boxes
    assert COCOeval_opt == rotated_boxes.iou(None) == "compiled"
    """
    check(code, [compat_only, tmp_path], tmp_path)


def test_old_sources_without_extension(tmp_path, compat_only):
    write_package(tmp_path, OLD_DETECTRON2)
    code = """
        import importlib.util, sys
        import detectron2  # already imported when kn_detectron comes
        from kn_detectron.compat import prepare_detectron2
        for call in range(2):
            prepare_detectron2()

        from detectron2.data.transforms import transform
        from detectron2.evaluation import sem_seg_evaluation
        from detectron2.structures import masks
        from PIL import Image
        assert transform.INTERPOLATION == Image.BILINEAR
        zeros = sem_seg_evaluation.zeros() + masks.zeros()
        assert [str(z.dtype) for z in zeros] == ["int64", "float64", "bool"]

        import torch
        from detectron2.layers import nms_rotated, rotated_boxes
        boxes = torch.zeros(1, 5)
        assert_refused("box_iou_rotated", lambda: rotated_boxes.iou(boxes))
        assert_refused("nms_rotated", lambda: nms_rotated(boxes, torch.zeros(1), 0.5))

        from detectron2.evaluation import COCOeval_opt
        from pycocotools.cocoeval import COCOeval
        assert COCOeval_opt is COCOeval

        # The stand-ins are for detectron2's modules only.
        assert "detectron2._C" not in sys.modules
        assert importlib.util.find_spec("detectron2._C") is None
    """
    check(textwrap.dedent(REFUSED) + textwrap.dedent(code), [compat_only, tmp_path], tmp_path)


def test_new_sources_without_extension(tmp_path, compat_only):
    """Their layers take operators from torch, when these are used."""
    layers = """
        import torch

        def iou(boxes):
            return torch.ops.detectron2.box_iou_rotated(boxes, boxes)

        def align(features, boxes):
            operator = torch.ops.detectron2.roi_align_rotated_forward
            return operator(features, boxes, 1.0, 7, 7, 0)
    """
    files = {"__init__.py": "", "layers/__init__.py": "", "layers/rotated_boxes.py": layers}
    write_package(tmp_path, files)
    code = """
        import torch
        from kn_detectron.compat import prepare_detectron2
        prepare_detectron2()
        from detectron2.layers import rotated_boxes
        boxes = torch.zeros(1, 5)
        features = torch.zeros(1, 1, 2, 2)
        assert_refused("box_iou_rotated", lambda: rotated_boxes.iou(boxes))
        assert_refused("roi_align_rotated_forward", lambda: rotated_boxes.align(features, boxes))
        assert not hasattr(torch.ops.detectron2, "nms_rotated")  # which they do not use
    """
    check(textwrap.dedent(REFUSED) + textwrap.dedent(code), [compat_only, tmp_path], tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_pkg_resources_is_replaced_only_where_it_is_gone(tmp_path, compat_only, there):
    model_zoo = """
        import pkg_resources

        config = pkg_resources.resource_filename("detectron2.model_zoo", "configs/a.yaml")
    """
    write_package(
        tmp_path,
        {
            "__init__.py": "",
            "model_zoo/__init__.py": "from .model_zoo import config\n",
            "model_zoo/model_zoo.py": model_zoo,
        },
    )
    (tmp_path / "pkg_resources.py").write_text("def resource_filename(*_): return 'the real one'\n")
    code = f"""
        import sys
        if not {there}:
            sys.modules["pkg_resources"] = None  # Python's way of saying that there is none
        from kn_detectron.compat import prepare_detectron2
        prepare_detectron2()
        print("pkg_resources" in sys.modules, "detectron2.model_zoo" in sys.modules)
        from detectron2.model_zoo import config
        print(config)
    """
    output = check(code, [compat_only, tmp_path], tmp_path).splitlines()
    if there:
        assert output == ["False False", "the real one"]
    else:
        assert output == ["False True", str(tmp_path / "detectron2/model_zoo/configs/a.yaml")]


# With the detectron2 at hand, whichever it is.


def test_every_removed_name_that_the_installed_detectron2_uses_is_there_again():
    root = Path(detectron2.__file__).parent
    source = "\n".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    for module, pattern in (
        (np, r"\bnp\.(bool|complex|float|int|long|object|str|unicode)\b"),
        (Image, r"\bImage\.([A-Z]+)\b"),
    ):
        for name in set(re.findall(pattern, source)):
            assert hasattr(module, name), name


def test_installed_detectron2_imports_before_and_after(tmp_path):
    modules = (
        "checkpoint config data engine evaluation model_zoo modeling structures utils.testing "
        "utils.visualizer"
    ).split()
    path = [ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for first in ("kn_detectron", "detectron2"):
        code = f"""
            import importlib
            importlib.import_module({first!r})
            import kn_detectron
            for module in {modules}:
                importlib.import_module("detectron2." + module)
        """
        check(code, path, tmp_path)


def test_importing_says_nothing(tmp_path):
    code = """
        import sys, warnings
        import kn_detectron
        import kn_detectron.checkpoint, kn_detectron.engine.command_line, kn_detectron.pretraining
        print("imported", file=sys.stderr)
        notice = "`torch.jit.script` is deprecated", FutureWarning, "script.py", 1
        warnings.warn_explicit(*notice, module="torch.jit._script")  # as for any other use of it
    """
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "")
    imported, notice = result.stderr.splitlines()
    assert imported == "imported" and "`torch.jit.script` is deprecated" in notice


@pytest.fixture
def dataset(tmp_path):
    """Two images; each has an object given as polygon, one as RLE, and a crowd region."""
    name = f"compat_{tmp_path.name}"
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in (1, 2):
        image = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        assert cv2.imwrite(str(tmp_path / f"{image_id}.png"), image)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 64, "width": 96})
        mask = np.zeros((64, 96), dtype=np.uint8, order="F")
        mask[30:60, 50:90] = 1
        rle = mask_util.encode(mask)
        rle["counts"] = rle["counts"].decode()
        for bbox, iscrowd, segmentation in (
            ([10, 10, 30, 40], 0, [[10, 10, 40, 10, 40, 50, 10, 50]]),
            ([50, 30, 40, 30], 0, rle),
            ([0, 5, 1, 20], 1, {"size": [64, 96], "counts": [5, 20, 64 * 96 - 25]}),
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": iscrowd,
                    "segmentation": segmentation,
                }
            )
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "box"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(tmp_path / "instances.json"), str(tmp_path))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def config():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    return cfg


def test_installed_detectron2_reads_trains_and_draws(dataset, config):
    batch = [DatasetMapper(config, is_train=True)(record) for record in DatasetCatalog.get(dataset)]
    assert [len(record["instances"]) for record in batch] == [2, 2]  # the crowd is left out
    torch.manual_seed(0)
    model = build_model(config)
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert {"loss_cls", "loss_box_reg", "loss_mask"} < set(losses)
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())

    model.eval()
    with torch.no_grad():
        predictions = model(batch)[0]["instances"]
    assert predictions.pred_masks.shape[1:] == (64, 96) and len(predictions) > 0
    picture = Visualizer(cv2.imread(batch[0]["file_name"]), MetadataCatalog.get(dataset))
    drawn = picture.draw_instance_predictions(predictions[:3]).get_image()
    assert drawn.shape == (64, 96, 3) and drawn.dtype == np.uint8


# The default is the compiled evaluation, which has to give way where there is none.
@pytest.mark.parametrize("options", [{}, {"use_fast_impl": False}])
def test_installed_detectron2_evaluates(dataset, tmp_path, options):
    evaluator = COCOEvaluator(
        dataset, tasks=("bbox", "segm"), distributed=False, output_dir=str(tmp_path), **options
    )
    evaluator.reset()
    for record in DatasetCatalog.get(dataset):
        truth = annotations_to_instances(
            [a for a in record["annotations"] if not a["iscrowd"]], (64, 96), mask_format="bitmask"
        )
        perfect = Instances((64, 96), pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
        perfect.pred_masks = truth.gt_masks.tensor
        perfect.scores = torch.ones(len(truth))
        evaluator.process([record], [{"instances": perfect}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_installed_detectron2_finds_its_model_zoo():
    with pytest.raises(RuntimeError, match="no_such_config.yaml not available"):
        model_zoo.get_config_file("no_such_config.yaml")
