"""tools/train_net.py: what it takes, what it refuses, and what it prints."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils import comm
from PIL import Image

from kn_detectron import InputError
from kn_detectron.checkpoint import fold_weights
from kn_detectron.data import CATEGORIES, register_named_folders
from kn_detectron.engine import command_line, load_run
from kn_detectron.engine.command_line import argument_parser, load_config, run

from . import tiny
from .tiny import assert_one_sentence

_TWELVE = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}


@pytest.mark.parametrize("flag", ["--config", "--config-file"])
def test_config_and_overrides(tmp_path, datasets, flag):
    config = tiny.write_config(tmp_path / "tiny.yaml")
    options = ["OUTPUT_DIR", str(tmp_path / "run"), "MODEL.KN.GAIN", "0.3"]
    cfg = load_config(argument_parser().parse_args([flag, str(config), *options]))
    assert cfg.MODEL.KN.GAIN == 0.3
    assert cfg.SOLVER.MAX_ITER == 6
    assert (tmp_path / "run").is_dir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
@pytest.mark.parametrize(
    "flags", ["--num-gpus 2", "--num-machines 2", "--num-gpus 2 --num-machines 3"]
)
def test_ranks_are_refused_by_name_and_before_the_datasets(command, tmp_path, monkeypatch, flags):
    monkeypatch.delattr(comm, "create_local_process_group", raising=False)  # as in detectron2 0.4
    options = ["OUTPUT_DIR", tmp_path / "run", "DATASETS.TRAIN", "('nowhere',)"]
    assert_one_sentence(command(*flags.split(), *options), f"^error: {flags} needs GPUs with this")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, patterns",
    [
        (["MODEL.KN.GIAN", "0.1"], ["MODEL.KN.GIAN 0.1 .* \\(is MODEL.KN.GAIN meant\\?"]),
        (["SOLVRE.BASE_LR", "0.1"], ["SOLVRE.BASE_LR .* \\(is SOLVER.BASE_LR meant\\?"]),
        (["SOLVER.BASE_LR.X", "0.1"], ["SOLVER.BASE_LR.X 0.1 cannot be set"]),
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_backbone"],
            [
                "no priors .*'KN' .*live BatchNorm: give MODEL.BACKBONE.NAME build_kn_resnet_backbone"
            ],
        ),
        (
            ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"],
            ["no priors .*: give MODEL.ROI_HEADS.NAME KNRes5ROIHeads, or another norm"],
        ),
        (["MODEL.KN.GAIN", "1.5"], ["MODEL.KN.GAIN is 1.5"]),
        (["MODEL.KN.GAIN", "0"], ["MODEL.KN.GAIN 0 cannot be set", "as in 0.0 for 0"]),
        (["MODEL.KN.GAIN", "2"], ["MODEL.KN.GAIN 2 cannot be set", "as in 2.0 for 2"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER many"]),
        (["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "half a pair"]),
        (["SOLVER.MAX_ITER", "3", "--eval-only"], ["--eval-only", "before"]),
        (["DATASETS.TRAIN", "('shape_train',)"], ["'shape_train'", "shapes_train"]),
        (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is empty"]),
        (["MODEL.WEIGHTS", "/nowhere/model.pth"], ["MODEL.WEIGHTS /nowhere/model.pth", '""']),
        (["OUTPUT_DIR", "/dev/null/run"], ["OUTPUT_DIR /dev/null/run"]),
        (["MODEL.ROI_HEADS.NAME", "KNRes5ROIHead"], ["MODEL.ROI_HEADS.NAME", "KNRes5ROIHeads"]),
        (
            ["MODEL.ROI_BOX_HEAD.NAME", "KNFastRCNNConvFcHead"],
            ["MODEL.ROI_BOX_HEAD.NAME is", "KNFastRCNNConvFCHead"],
        ),
        (["INPUT.FORMAT", "rgb"], ["INPUT.FORMAT is 'rgb', but must be 'BGR', 'RGB' or another"]),
        (["MODEL.BACKBONE.NAME", "nothing"], ["'nothing', which is not registered: correct it"]),
        (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE is 'gpu', but must be a device"]),
        (["INPUT.MASK_FORMAT", "bitmap"], ["INPUT.MASK_FORMAT is 'bitmap', but must be 'polygon'"]),
        (["DATALOADER.NUM_WORKERS", "-1"], ["DATALOADER.NUM_WORKERS is -1, but must be 0 or more"]),
        (["SOLVER.MAX_ITER", "0"], ["SOLVER.MAX_ITER is 0, but must be 1 or more"]),
        (
            ["SOLVER.STEPS", "(4, 2)"],
            ["SOLVER.STEPS is \\(4, 2\\), but must be numbers in ascending order"],
        ),
        (["SOLVER.MOMENTUM", "-1.0"], ["SOLVER.MOMENTUM is -1.0, but must be 0 or more"]),
        (["SOLVER.WEIGHT_DECAY", "-1.0"], ["SOLVER.WEIGHT_DECAY is -1.0, but must be 0 or more"]),
        (
            ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "mean"],
            ["CLIP_TYPE is 'mean', but must be 'value' or 'norm'"],
        ),
        (["INPUT.MAX_SIZE_TRAIN", "0"], ["INPUT.MAX_SIZE_TRAIN is 0, but must be a size"]),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "all"],
            ["MIN_SIZE_TRAIN_SAMPLING is 'all', but must be 'choice' or 'range'"],
        ),
        (["INPUT.CROP.TYPE", "round"], ["TYPE is 'round', but must be .* or 'absolute_range'"]),
        (["MODEL.RPN.BATCH_SIZE_PER_IMAGE", "0"], ["RPN.BATCH_SIZE_PER_IMAGE is 0, but must be 1"]),
        (
            ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "0"],
            ["ROI_HEADS.BATCH_SIZE_PER_IMAGE is 0, but must be 1 or more"],
        ),
        (["SOLVER.BASE_LR", "-0.1"], ["SOLVER.BASE_LR is -0.1, but must be 0 or more"]),
        (
            ["SOLVER.WARMUP_METHOD", "slow"],
            ["SOLVER.WARMUP_METHOD is 'slow', but must be 'linear'"],
        ),
        (["INPUT.MIN_SIZE_TRAIN", "()"], ["INPUT.MIN_SIZE_TRAIN is \\(\\), but must be one size"]),
        (
            ["INPUT.RANDOM_FLIP", "diagonal"],
            ["INPUT.RANDOM_FLIP is 'diagonal', but must be 'horiz"],
        ),
        (["INPUT.MIN_SIZE_TEST", "-5"], ["INPUT.MIN_SIZE_TEST is -5, but must be a size"]),
        (["MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"], ["MODEL.PIXEL_STD is .*, but must be positive"]),
        (["MODEL.PIXEL_MEAN", "[1.0]"], ["MODEL.PIXEL_MEAN is \\[1.0\\] and MODEL.PIXEL_STD is"]),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[]"], ["SIZES is \\[\\], but must be one list"]),
        (
            ["MODEL.RESNETS.OUT_FEATURES", "['res7']"],
            ["OUT_FEATURES is \\['res7'\\], but must be some of stem, res2"],
        ),
        (["MODEL.RESNETS.OUT_FEATURES", "[]"], ["OUT_FEATURES is \\[\\], but must be some of"]),
        (
            ["MODEL.RPN.IN_FEATURES", "['p2']"],
            [
                "MODEL.RPN.IN_FEATURES is \\['p2'\\], but .*'build_kn_resnet_backbone' has res4: take"
            ],
        ),
        (
            ["MODEL.BACKBONE.NAME", "build_kn_resnet_fpn_backbone"],
            ["MODEL.FPN.IN_FEATURES is \\[\\], but must be some of .*, which has res4"],
        ),
        (
            "MODEL.BACKBONE.NAME build_kn_resnet_fpn_backbone MODEL.FPN.IN_FEATURES ['res2']".split(),
            ["MODEL.FPN.IN_FEATURES is \\['res2'\\], but must be some of .*, which has res4"],
        ),
        (
            [
                *("MODEL.BACKBONE.NAME", "build_kn_retinanet_resnet_fpn_backbone"),
                *("MODEL.FPN.IN_FEATURES", "['res4']"),
            ],
            ["OUT_FEATURES is \\['res4'\\], but .* makes P6 of res5: add res5"],
        ),
        (
            ["MODEL.ROI_HEADS.NAME", "KNStandardROIHeads"],
            ["ROI_BOX_HEAD.NAME is empty, but .* 'KNStandardROIHeads' needs a box head"],
        ),
        (["MODEL.ANCHOR_GENERATOR.NAME", "Default"], ["'Default', which is not registered"]),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RPNN"], ["'RPNN', .* \\(is RPN or RRPN meant\\?"]),
        (
            ["MODEL.KN.GAIN_ANNEAL", "0.6"],
            ["GAIN_ANNEAL 0.6 cannot be set", 'as in "\\[0.6, 0.9\\]"'],
        ),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"],
            ["is 'WarmupCosine', which detectron2 does not have"],
        ),
        (["DATASETS.TRAIN", "my_data"], ["as in \"\\('my_data',\\)\" with both kinds of quotes"]),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", "8"],
            ["SOLVER.REFERENCE_WORLD_SIZE is 8, but must", "SOLVER.IMS_PER_BATCH 2"],
        ),
    ],
)
def test_bad_options(command, tmp_path, arguments, patterns):
    if "OUTPUT_DIR" not in arguments:
        arguments = ["OUTPUT_DIR", tmp_path / "run", *arguments]
    assert_one_sentence(command(*arguments), *patterns)


def test_a_file_that_may_not_be_read_is_a_sentence(capsys):
    def refused():
        raise PermissionError(13, "Permission denied", "annotations/instances_train.json")

    result = (run(refused), *capsys.readouterr())
    assert_one_sentence(
        result, r"instances_train.json cannot be used \(Permission denied\): change"
    )

    def about_no_file():
        raise PermissionError("no file is named")

    with pytest.raises(PermissionError):
        run(about_no_file)


def test_an_interrupt_ends_a_command_as_shells_expect(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run(interrupted) == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_broken_dataset_is_found_before_the_model_is_built(command, tmp_path, datasets):
    shutil.copytree(datasets, tmp_path / "datasets")
    with tiny.shapes(tmp_path / "datasets"):
        annotations = tmp_path / "datasets/shapes/annotations/instances_val.json"
        annotations.write_text(annotations.read_text()[:100])
        result = command("OUTPUT_DIR", tmp_path / "run")
    assert_one_sentence(result, re.escape(str(annotations)))
    assert "GeneralizedRCNN" not in result[1]


def test_evaluation_gives_twelve_numbers_each(command, plain, tmp_path):
    weights = plain[0] / "model_final.pth"
    status, out, err = command(
        "--eval-only", "OUTPUT_DIR", tmp_path / "run", "MODEL.WEIGHTS", weights
    )
    assert status == 0, err
    for task in ("bbox", "segm"):
        assert f"Evaluate annotation type *{task}*" in out
    assert out.count("Average Precision") == out.count("Average Recall") == 12
    results = json.loads((tmp_path / "run/inference/results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    for numbers in results.values():
        assert _TWELVE <= set(numbers)
        assert all(0 <= numbers[name] <= 100 for name in ("AP", "AR100", "ARs"))
    assert (tmp_path / "run/inference/shapes_val/coco_instances_results.json").exists()
    # The weights were those of the run, whose own evaluation found the same.
    assert results == json.loads((plain[0] / "inference/results.json").read_text())


def test_augmentation_at_test_time(command, plain, tmp_path):
    run = tmp_path / "run"
    detections = "shapes_val/coco_instances_results.json"
    options = ["OUTPUT_DIR", run, "MODEL.WEIGHTS", plain[0] / "model_final.pth"]
    augmented = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 80)"]
    status, _, err = command("--eval-only", *options, *augmented)
    assert status == 0, err
    results = json.loads((run / "inference/results.json").read_text())
    assert set(results) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    plainly = json.loads((plain[0] / "inference/results.json").read_text())
    assert {task: results[task] for task in plainly} == plainly
    found, former = (
        {tuple(f["bbox"]) for f in json.loads((run / folder / detections).read_text())}
        for folder in ("inference_TTA", "inference")
    )
    assert found and former and not found & former


def test_augmentation_ends_a_training(datasets, tmp_path):
    options = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.EVAL_PERIOD", 1]
    trainer, _ = tiny.trainer(tiny.config(tmp_path, *options, "SOLVER.MAX_ITER", 2))
    assert set(trainer.train()) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert (tmp_path / "metrics.json").read_text().count("bbox_TTA/AP50") == 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.KEYPOINT_ON", True),
        ("MODEL.LOAD_PROPOSALS", True),
    ],
)
def test_augmentation_that_detectron2_cannot_do_is_refused(datasets, tmp_path, key, value):
    cfg = tiny.config(tmp_path, "TEST.AUG.ENABLED", True, key, value)
    with pytest.raises(InputError, match=f"TEST.AUG.ENABLED is True, .* with {key} {value}"):
        tiny.Trainer(cfg)
    with pytest.raises(InputError, match="TEST.AUG.ENABLED is True"):
        tiny.Trainer.test(cfg, None)


def test_evaluation_of_a_model_that_finds_nothing(command, plain, tmp_path):
    weights = plain[0] / "model_final.pth"
    options = ["OUTPUT_DIR", tmp_path / "run", "MODEL.WEIGHTS", weights]
    status, out, _ = command("--eval-only", *options, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    assert status == 0
    results = json.loads((tmp_path / "run/inference/results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    for numbers in results.values():
        none = {"APm", "APl", "ARm", "ARl"}  # the images are so small that all objects are
        assert {key: numbers[key] for key in _TWELVE} == {
            key: None if key in none else 0.0 for key in _TWELVE
        }


def test_images_to_evaluate_on_are_opened_before_the_training(command, own_data, tmp_path):
    path = sorted((own_data / "val").iterdir())[-1]
    with Image.open(path) as image:
        image.resize((image.width, image.height + 1)).save(path)
    result = command("--dataset", own_data, "OUTPUT_DIR", tmp_path / "run")
    assert_one_sentence(result, f"Image {path} .* but its annotation says")
    assert "GeneralizedRCNN" not in result[1]


def test_evaluation_names_a_broken_image(command, plain, datasets, tmp_path):
    shutil.copytree(datasets, tmp_path / "datasets")
    options = ["OUTPUT_DIR", tmp_path / "run", "MODEL.WEIGHTS", plain[0] / "model_final.pth"]
    with tiny.shapes(tmp_path / "datasets"):
        image = sorted((tmp_path / "datasets/shapes/val").iterdir())[0]
        image.write_bytes(image.read_bytes()[:50])
        result = command("--eval-only", *options, "DATALOADER.NUM_WORKERS", "1")
    assert_one_sentence(result, re.escape(str(image)))


def test_training_names_a_broken_image(command, datasets, tmp_path):
    shutil.copytree(datasets, tmp_path / "datasets")
    with tiny.shapes(tmp_path / "datasets"):
        images = list((tmp_path / "datasets/shapes/train").iterdir())
        for image in images:
            image.write_bytes(image.read_bytes()[:50])
        result = command("OUTPUT_DIR", tmp_path / "run", "DATALOADER.NUM_WORKERS", "1")
    assert_one_sentence(result, re.escape(str(images[0].parent)))


def test_divergence(command, tmp_path):
    options = ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0"]
    result = command("OUTPUT_DIR", tmp_path / "run", *options)
    assert_one_sentence(result, "diverged in iteration", "lower SOLVER.BASE_LR")


def test_a_run_without_evaluation(command, tmp_path):
    options = ["OUTPUT_DIR", tmp_path / "run", "DATASETS.TEST", "()"]
    status, out, err = command(*options, "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()")
    assert status == 0, err
    assert (tmp_path / "run/model_final.pth").is_file()
    assert_one_sentence(command("--eval-only", *options), "DATASETS.TEST is empty")


def test_the_config_of_a_run_has_the_names_of_its_classes(plain):
    """Whoever predicts with it may not have its dataset."""
    written = yaml.safe_load((plain[0] / "config.yaml").read_text())
    assert written["DATASETS"]["CLASS_NAMES"] == list(CATEGORIES)


def test_evaluation_needs_weights_that_match(command, plain, tmp_path):
    run = ["OUTPUT_DIR", tmp_path / "run"]
    assert_one_sentence(command("--eval-only", *run), "no weights to evaluate")
    weights = plain[0] / "model_final.pth"
    other = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    result = command("--eval-only", *run, "MODEL.WEIGHTS", weights, *other)
    assert_one_sentence(result, "is not a checkpoint of this model", "roi_heads.box_predictor")


def test_training_writes_progress_curves_and_gains(plain):
    lines = [json.loads(line) for line in (plain[0] / "metrics.json").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {"total_loss", "loss_mask", "lr", "eta_seconds", "kn/gain", "bbox/AP"} <= names
    assert "kn/innovation_mean/roi_heads.res5.2.conv3.norm" in names
    assert list(plain[0].glob("events.out.tfevents.*"))


def _forget(folder):
    """Takes the datasets of a folder out of detectron2's catalogs, as for another process."""
    for name in list(DatasetCatalog.list()):
        if name.startswith(str(folder)):
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)


@pytest.fixture
def own_data(datasets, tmp_path):
    """A folder of one's own data: the shapes without stars and rings."""
    folder = tmp_path / "data"
    shutil.copytree(datasets / "shapes", folder)
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"] = content["categories"][:3]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 3]
        path.write_text(json.dumps(content))
    yield folder
    _forget(folder)


def test_fine_tuning_on_a_folder(command, plain, own_data, tmp_path):
    run = tmp_path / "run"
    options = ["OUTPUT_DIR", run, "MODEL.WEIGHTS", plain[0] / "model_final.pth"]
    status, out, err = command("--dataset", own_data, *options, "SOLVER.MAX_ITER", "2")
    assert status == 0, err
    assert "another shape" in out and "cls_score" in out  # of 5 classes before
    results = json.loads((run / "inference/results.json").read_text())
    assert {f"AP-{name}" for name in ("circle", "square", "triangle")} <= set(results["segm"])
    assert "AP-star" not in results["segm"]
    written = (run / "config.yaml").read_text()
    (own_data / "annotations/instances_train.json").unlink()  # an evaluation does without it
    options = ["--eval-only", "OUTPUT_DIR", run, "MODEL.WEIGHTS", run / "model_final.pth"]
    status, out, err = command("--dataset", own_data, *options)
    assert status == 0, err
    assert (run / "config.yaml").read_text() == written
    assert results == json.loads((run / "inference/results.json").read_text())


def test_the_config_of_a_run_survives_a_start_that_fails(tmp_path, datasets, monkeypatch):
    cfg = tiny.config(tmp_path)
    args = argument_parser().parse_args([])
    (tmp_path / "config.yaml").write_text("the former one")

    def killed(cfg, args):
        (tmp_path / "config.yaml").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command_line, "default_setup", killed)
    with pytest.raises(OSError):
        command_line.set_up(cfg, args)
    assert (tmp_path / "config.yaml").read_text() == "the former one"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_the_config_that_a_run_wrote_is_enough(command, own_data, tmp_path):
    run, classes = tmp_path / "run", ["circle", "square", "triangle"]
    options = ["OUTPUT_DIR", run, "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"]
    assert command("--dataset", own_data, *options)[0] == 0
    written = yaml.safe_load((run / "config.yaml").read_text())
    results = json.loads((run / "inference/results.json").read_text())

    _forget(own_data)
    status, _, err = command("--eval-only", "--resume", config=run / "config.yaml")
    assert status == 0, err
    assert json.loads((run / "inference/results.json").read_text()) == results
    assert yaml.safe_load((run / "config.yaml").read_text()) == written

    # Wherever the folder is now.
    _forget(own_data)
    first, run = run, shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(first)
    (run / "last_checkpoint").write_text("model_0000000.pth")
    status, out, err = command("--resume", config=run / "config.yaml")
    assert status == 0 and "Starting training from iteration 1" in out, err
    assert json.loads((run / "inference/results.json").read_text()) == results
    assert not first.exists()

    # In another script, from another folder, on a machine without the data.
    _forget(own_data)
    shutil.rmtree(own_data)
    run = run.rename(tmp_path / "moved again")
    cfg = load_run(run)
    assert cfg.OUTPUT_DIR == str(run)
    predictor = DefaultPredictor(cfg)
    assert predictor.metadata.thing_classes == classes
    state = tiny.read(run / "model_final.pth")["model"]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(predictor.model.state_dict()[name], state[name])
    assert fold_weights(cfg, str(tmp_path / "folded"))[0] == str(tmp_path / "folded.pth")
    assert load_run(run, ["MODEL.WEIGHTS", "other.pth"]).MODEL.WEIGHTS == "other.pth"
    with pytest.raises(InputError, match="MODEL.DEVICE is 'gpu', but must be a device"):
        load_run(run, ["MODEL.DEVICE", "gpu"])


def test_a_dataset_by_two_names_is_refused(command, own_data, tmp_path):
    options = ["OUTPUT_DIR", tmp_path / "run", "DATASETS.TEST", "('shapes_val',)"]
    assert_one_sentence(command("--dataset", own_data, *options), "sets DATASETS.TEST, and so does")


def test_a_run_that_is_refused_leaves_the_config_of_the_one_before(command, plain, tmp_path):
    """The checkpoints there are that one's: it is resumed, evaluated and folded with its config."""
    run = tmp_path / "run"
    shutil.copytree(plain[0], run)
    config = run / "config.yaml"
    assert command("OUTPUT_DIR", run, "SOLVER.MAX_ITER", "1")[0] == 0
    written = config.read_text()
    more = ["OUTPUT_DIR", run, "SOLVER.MAX_ITER", "2"]
    result = command("--resume", *more, "MODEL.KN.LEARN_GAIN", "False", config=config)
    assert result[0] == 1 and "MODEL.KN.LEARN_GAIN False (before: True)" in result[2]
    assert command(*more, "MODEL.RESNETS.NORM", "kn", config=config)[0] == 1
    assert config.read_text() == written
    assert command("--resume", *more, config=config)[0] == 0
    assert yaml.safe_load(config.read_text())["SOLVER"]["MAX_ITER"] == 2


@pytest.mark.parametrize("flag", ["--eval-only", "--resume"])
def test_a_folder_with_the_classes_in_another_order_is_refused(own_data, tmp_path, flag):
    arguments = ["--config", str(tiny.write_config(tmp_path / "tiny.yaml")), flag]
    arguments += ["OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.CLASS_NAMES"]

    def load(*names):
        args = argument_parser().parse_args([*arguments, str(list(names))])
        args.dataset = str(own_data)
        return load_config(args)

    with pytest.raises(InputError, match="classes square, circle, triangle, and the folder .* has"):
        load("square", "circle", "triangle")
    for names in ((), ("circle", "square", "triangle")):
        assert load(*names).DATASETS.CLASS_NAMES == ["circle", "square", "triangle"]


def test_what_the_annotations_of_a_folder_decide(own_data, tmp_path):
    """A training may begin with the config of a run that had other classes."""

    def encode(content):
        first = content["annotations"][0]
        (image,) = (i for i in content["images"] if i["id"] == first["image_id"])
        size = [image["height"], image["width"]]
        first["segmentation"] = {"size": size, "counts": [0, size[0] * size[1]]}

    _change(own_data, encode, ("train",))
    arguments = ["--config", str(tiny.write_config(tmp_path / "tiny.yaml"))]
    arguments += ["OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.CLASS_NAMES", "['cat']"]
    args = argument_parser().parse_args([*arguments, "INPUT.MASK_FORMAT", "polygon"])
    args.dataset = str(own_data)
    cfg = load_config(args)
    assert cfg.DATASETS.CLASS_NAMES == ["circle", "square", "triangle"]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert cfg.INPUT.MASK_FORMAT == "bitmask"


def test_only_what_goes_on_with_a_run_uses_its_folder(datasets, tmp_path):
    """A new run with its config, which has been copied or moved, must not replace it."""
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    (run / "last_checkpoint").write_text("model_final.pth")
    (run / "config.yaml").write_text(tiny.config(other).dump())

    def output_dir(*flags):
        args = argument_parser().parse_args(["--config", str(run / "config.yaml"), *flags])
        return load_config(args).OUTPUT_DIR

    assert output_dir() == str(other)
    assert output_dir("--resume") == output_dir("--eval-only") == str(run)


def test_names_of_classes_are_for_unregistered_folders_only(own_data, tmp_path):
    cfg = tiny.config(tmp_path)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (str(own_data / "val"), "shapes_val")
    cfg.DATASETS.CLASS_NAMES = ["a", "b", "c"]
    shapes = list(MetadataCatalog.get("shapes_val").thing_classes)
    register_named_folders(cfg)
    assert MetadataCatalog.get(str(own_data / "val")).thing_classes == ["a", "b", "c"]
    assert MetadataCatalog.get("shapes_val").thing_classes == shapes


def _change(folder, change, splits=("train", "val")):
    for split in splits:
        path = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def _as_a_tool_writes_it(content):
    """What cost a run before: at its end, in silence, or at its start."""
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
        annotation["id"] = "all the same"
        del annotation["iscrowd"], annotation["area"]
    content["annotations"][0]["ignore"] = 1
    content["annotations"][1]["image_id"] = "nowhere"
    for image in content["images"]:
        image["width"] = float(image["width"])


def test_annotations_are_mended_for_training_and_evaluation(command, own_data, tmp_path):
    run = tmp_path / "run"
    _change(own_data, _as_a_tool_writes_it)
    written = {p: p.read_bytes() for p in (own_data / "annotations").iterdir()}
    status, out, err = command("--dataset", own_data, "OUTPUT_DIR", run, "SOLVER.MAX_ITER", "2")
    assert status == 0, err
    log = (run / "log.txt").read_text()
    for split in ("train", "val"):
        (mended,) = (run / "annotations").glob(f"instances_{split}-*.json")
        found = json.loads(mended.read_text())["annotations"]
        assert all(annotation["area"] > 0 for annotation in found)
        assert log.count(f"{mended} is used instead") == 1
    results = json.loads((run / "inference/results.json").read_text())
    assert all(results[task]["AP"] is not None for task in ("bbox", "segm"))
    assert written == {p: p.read_bytes() for p in (own_data / "annotations").iterdir()}
    # What is mended by hand is no longer mended.
    for path in (own_data / "annotations").iterdir():
        path.write_bytes(next((run / "annotations").glob(path.stem + "-*")).read_bytes())
    weights = run / "model_final.pth"
    result = command(
        "--dataset", own_data, "--eval-only", "OUTPUT_DIR", run, "MODEL.WEIGHTS", weights
    )
    assert result[0] == 0, result[2]
    assert [p.name[:15] for p in (run / "annotations").iterdir()] == ["instances_train"]
    assert results == json.loads((run / "inference/results.json").read_text())


def test_names_that_the_locale_cannot_write(own_data, datasets, tmp_path, monkeypatch):
    """In a process of its own, for Python asks for the locale when it starts."""

    def change(content):
        content["categories"][0]["name"] = "Kr\u00e4henf\u00fc\u00dfe"

    _change(own_data, change)
    for path in (own_data / "annotations").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False), "utf-8")
    for key, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    config, run = tiny.write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    flags = ["--config", config, "--dataset", own_data]
    options = ["OUTPUT_DIR", run, "SOLVER.MAX_ITER", 1]
    process = tiny.start_train_net(*flags, *options, datasets=datasets)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Logging error" not in output and "Traceback" not in output
    for log in (output, (run / "log.txt").read_text("ascii")):
        assert r"Kr\xe4henf\xfc\xdfe" in log
    results = json.loads((run / "inference/results.json").read_text())
    assert "AP-Kr\u00e4henf\u00fc\u00dfe" in results["bbox"]


@pytest.mark.parametrize("num_classes", ["4", "6"])
@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_number_of_classes_is_that_of_the_annotations(command, tmp_path, num_classes, flags):
    result = command(
        *flags, "OUTPUT_DIR", tmp_path / "run", "MODEL.ROI_HEADS.NUM_CLASSES", num_classes
    )
    assert_one_sentence(result, f"NUM_CLASSES is {num_classes}", "has 5 categories")
    assert "GeneralizedRCNN" not in result[1]


@pytest.mark.parametrize(
    "change, splits, patterns",
    [
        (
            lambda content: [a.update(bbox=[5, 5, 0, 0]) for a in content["annotations"]],
            ("train",),
            ["instances_train.json", "no object to learn from"],
        ),
        (
            lambda content: content["annotations"][0].update(bbox=[float("nan")] * 4),
            ("val",),
            ["instances_val.json", "entry 0 of annotations"],
        ),
        (
            lambda content: content["categories"].reverse()
            or [c.update(id=i) for i, c in enumerate(content["categories"])],
            ("val",),
            ["categories of .*instances_train.json and .*instances_val.json differ"],
        ),
    ],
)
def test_faults_are_found_before_the_first_step(
    command, own_data, tmp_path, change, splits, patterns
):
    def without_masks(content):
        for annotation in content["annotations"]:
            annotation.pop("segmentation")
            annotation["category_id"] = min(annotation["category_id"], 2)

    _change(own_data, without_masks)
    _change(own_data, change, splits)
    result = command(
        "--dataset", own_data, "OUTPUT_DIR", tmp_path / "run", "MODEL.MASK_ON", "False"
    )
    assert_one_sentence(result, *patterns)
    assert "GeneralizedRCNN" not in result[1]


def test_a_folder_without_masks(command, own_data, tmp_path):
    def change(content):
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    _change(own_data, change, ("train",))
    result = command("--dataset", own_data, "OUTPUT_DIR", tmp_path / "run")
    assert_one_sentence(result, re.escape(str(own_data)), "MODEL.MASK_ON False")
