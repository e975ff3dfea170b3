"""The config and the weights of a finished run, as other scripts load them."""

import json
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kn_detectron import InputError, data
from kn_detectron.engine import load_run, trained_weights

from kn_detectron.files import fetch
from kn_detectron.model_zoo import get_config

from . import tiny


def test_the_config_of_a_run_stands_for_its_last_checkpoint(command, plain, tmp_path):
    """MODEL.WEIGHTS in it is what the run started from."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(plain[0] / "model_final.pth", run)
    (run / "last_checkpoint").write_text("model_final.pth")
    config = run / "config.yaml"
    config.write_text(tiny.config(run, "MODEL.WEIGHTS", "/nowhere/start.pth").dump())
    status, out, err = command("--eval-only", "OUTPUT_DIR", tmp_path / "found", config=config)
    assert status == 0, err
    found = json.loads((tmp_path / "found/inference/results.json").read_text())
    assert found == json.loads((plain[0] / "inference/results.json").read_text())

    assert trained_weights(str(config), []) == str(run / "model_final.pth")
    assert trained_weights(str(config), ["MODEL.WEIGHTS", "other.pth"]) == "other.pth"
    assert trained_weights(str(tmp_path / "tiny.yaml"), []) is None
    (run / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(InputError, match="model_0000009.pth does not exist although"):
        trained_weights(str(config), [])
    (run / "last_checkpoint").unlink()
    assert trained_weights(str(config), []) is None


def test_a_run_on_a_dataset_that_another_script_registered(plain, tmp_path):
    """A predictor has the names of its classes from the config."""
    cfg = tiny.config(tmp_path, "DATASETS.TEST", "('of_a_script',)")
    cfg.DATASETS.CLASS_NAMES = ["cat", "dog"]
    cfg.MY_KEY = 1
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(InputError, match="MY_KEY"):
        load_run(tmp_path)
    found = load_run(tmp_path, extensions=[lambda cfg: setattr(cfg, "MY_KEY", 0)])
    assert found.MY_KEY == 1
    assert MetadataCatalog.get("of_a_script").thing_classes == ["cat", "dog"]


@pytest.mark.parametrize("name", ["of_runs", "/data/of_runs/val"])
def test_two_runs_on_one_dataset_whose_classes_have_changed(tmp_path, kn_log, name):
    cfg = tiny.config(tmp_path)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    found = []
    for names in (["cat", "dog"], ["car", "bus"], ["car", "bus"]):
        cfg.DATASETS.CLASS_NAMES = names
        (tmp_path / "config.yaml").write_text(cfg.dump())
        load_run(tmp_path)
        found.append(MetadataCatalog.get(name))
        assert found[-1].thing_classes == names
    # That of a predictor of the first run is as it was.
    assert found[0].thing_classes == ["cat", "dog"] and found[1] is found[2]
    assert kn_log.text.count(f"Dataset {name} had the classes cat, dog of another run") == 1


def test_a_dataset_that_a_script_has_registered_keeps_its_classes(tmp_path, kn_log):
    cfg = tiny.config(tmp_path)
    DatasetCatalog.register("of_this_script", list)
    try:
        MetadataCatalog.get("of_this_script").thing_classes = ["cat", "dog"]
        cfg.DATASETS.TEST, cfg.DATASETS.CLASS_NAMES = ("of_this_script",), ["car", "bus"]
        (tmp_path / "config.yaml").write_text(cfg.dump())
        load_run(tmp_path)
        assert MetadataCatalog.get("of_this_script").thing_classes == ["cat", "dog"]
        assert "keeps them, but the run in" in kn_log.text
    finally:
        DatasetCatalog.pop("of_this_script")
        MetadataCatalog.pop("of_this_script")


def test_a_run_is_evaluated_without_the_weights_that_it_started_from(command, tmp_path):
    """As on another machine. The builder of such networks reads them, if nothing else is given."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(fetch("kn://mask_rcnn_lite0_FPN_KN.pth"), run / "model_final.pth")
    (run / "last_checkpoint").write_text("model_final.pth")
    cfg = get_config("photos/mask_rcnn_lite0_FPN_KN.yaml")
    cfg.MODEL.KN.NETWORK_WEIGHTS = "/nowhere/lite0.pth"
    (run / "config.yaml").write_text(cfg.dump())
    photos = Path(data.__file__).parent / "photos"
    options = ("OUTPUT_DIR", tmp_path / "found", "MODEL.DEVICE", "cpu")
    status, _, err = command(
        "--eval-only", "--dataset", photos, *options, config=run / "config.yaml"
    )
    assert status == 0, err
    found = json.loads((tmp_path / "found/inference/results.json").read_text())
    assert found["bbox"]["AP"] > 30
