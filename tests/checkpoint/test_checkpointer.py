"""Checkpoints are whole or not there, and fit or are refused."""

import collections
import contextlib
import datetime
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from kn_detectron import InputError
from kn_detectron.checkpoint import Conventions, KNCheckpointer
from kn_detectron.layers import KN_STATE, kalman_layers

from ..engine import tiny

_BN = ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.NAME", "build_resnet_backbone")
_BN += ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads")


def _model(*options):
    return build_model(tiny.config("", *options))


@pytest.fixture(scope="module")
def kn_state():
    """The state of a Kalman model."""
    return _model().state_dict()


def _save(folder, state, name="model.pth"):
    path = folder / name
    torch.save({"model": state}, path)
    return str(path)


def _assert_refused(path, *patterns, model=None, checkpointables=(), strict=None):
    """The file is refused in one sentence that names it, and the model is as it was."""
    model = model or _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpointer = KNCheckpointer(model)
    for _ in range(2):  # the second time as the first
        with pytest.raises(InputError) as error:
            checkpointer.load(path, list(checkpointables), strict=strict)
        message = str(error.value)
        assert path in message and "\n" not in message
        for pattern in patterns:
            assert pattern in message
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# Loading what is sound.


def test_round_trip(tmp_path, kn_log):
    one, other = _model(), _model()
    KNCheckpointer(one, str(tmp_path)).save("model", iteration=4)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    rest = KNCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 4
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert rest["kn_detectron"] == Conventions.of_model(one).to_dict()
    assert " loaded, 0 initialised, 0 not used." in kn_log.text


def test_a_new_folder_is_made(tmp_path):
    KNCheckpointer(_model(), str(tmp_path / "new" / "folder")).save("a")
    assert (tmp_path / "new" / "folder" / "a.pth").is_file()


@pytest.mark.parametrize("part", ["", "backbone", "backbone.res3"])
def test_compiled_modules_load_what_they_have_saved(tmp_path, part):
    def compiled():
        model = _model()
        if not part:
            return torch.compile(model)
        parent, _, name = part.rpartition(".")
        setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(part)))
        return model

    model, other = compiled(), compiled()
    KNCheckpointer(model, str(tmp_path)).save("model_final")
    path = str(tmp_path / "model_final.pth")
    assert any("_orig_mod" in name for name in torch.load(path)["model"])
    KNCheckpointer(other).load_for_evaluation(path)
    plain = _model()
    KNCheckpointer(plain).load_for_evaluation(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
        assert torch.equal(value, plain.state_dict()[name.replace("_orig_mod.", "")]), name


def test_a_part_that_is_called_module_is_no_wrapper_beside_one_of_its_names(tmp_path):
    def pair(value):
        linear = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(linear.weight, value)
        return torch.nn.ModuleDict({"fc": linear})

    model, other = pair(1.0), pair(0.0)
    model["module"], other["module"] = pair(2.0), pair(0.0)
    KNCheckpointer(model, str(tmp_path)).save("model")
    KNCheckpointer(other).load_for_evaluation(str(tmp_path / "model.pth"))
    assert (other["fc"].weight == 1).all() and (other["module"]["fc"].weight == 2).all()


def test_evaluation_takes_the_weights_that_are_named_where_there_is_no_run(tmp_path):
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    KNCheckpointer(one, str(tmp_path)).save("named")
    checkpointer = KNCheckpointer(other, str(tmp_path / "run"))
    checkpointer.load_for_evaluation(str(tmp_path / "named.pth"), resume=True)
    assert torch.equal(one.weight, other.weight)


def test_bare_weights_go_into_a_compiled_backbone(tmp_path):
    parts = ("backbone.", "roi_heads.res5.")
    state = _model(*_BN).state_dict()
    bare = {n.partition(".")[2]: v for n, v in state.items() if n.startswith(parts)}
    torch.save({"model": bare, "matching_heuristics": True}, tmp_path / "bare.pth")
    plain, model = _model(), _model()
    model.backbone = torch.compile(model.backbone)
    for m in (plain, model):
        KNCheckpointer(m).load(str(tmp_path / "bare.pth"), [])
    state = {n.replace("_orig_mod.", ""): v for n, v in model.state_dict().items()}
    for name, value in plain.backbone.state_dict().items():
        assert torch.equal(value, state[f"backbone.{name}"]), name


def test_batch_norm_weights_leave_the_gains_as_initialised(tmp_path, kn_log):
    source, model = _model(*_BN), _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    KNCheckpointer(model).load(_save(tmp_path, source.state_dict()), [])
    of_kn = 0
    for name, value in model.state_dict().items():
        if name.rpartition(".")[2] in KN_STATE:
            of_kn += 1
            # The process models are calibrated: see test_calibration.py.
            assert torch.equal(value, before[name]) or "gain" not in name
        else:
            assert torch.equal(value, source.state_dict()[name])
    assert of_kn > 50 * 3
    assert f" loaded, {of_kn} initialised, 0 not used." in kn_log.text


def _as_imagenet_pickle(path, state, **changes):
    """Writes a ResNet's weights as detectron2's model zoo has them, without prefixes."""
    arrays = {"fc1000.weight": torch.zeros(3, 3).numpy()}
    for name, value in state.items():
        for prefix in ("backbone.", "roi_heads."):
            if name.startswith((prefix + "stem", prefix + "res")):
                arrays[name[len(prefix) :]] = value.numpy()
    arrays.update(changes)
    content = {"model": arrays, "__author__": "nobody", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return str(path)


def test_imagenet_pickle_reaches_backbone_and_res5(tmp_path):
    source, model = _model(*_BN), _model()
    KNCheckpointer(model).load(_as_imagenet_pickle(tmp_path / "r50.pkl", source.state_dict()), [])
    for name in ("backbone.stem.conv1.weight", "roi_heads.res5.2.conv3.norm.running_var"):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])


def test_detectron2s_idiom_starts_from_weights_of_another_norm(tmp_path):
    """``DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)``, in scripts and tutorials."""
    source, model = _model(*_BN), _model()
    KNCheckpointer(model).load(_save(tmp_path, source.state_dict()))
    name = "roi_heads.res5.2.conv3.norm.running_var"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="optimizer is missing"):
        KNCheckpointer(model, optimizer=optimizer).load(_save(tmp_path, source.state_dict()))


def test_other_classes_are_initialised_with_a_warning(tmp_path, kn_log):
    source, model = _model("MODEL.ROI_HEADS.NUM_CLASSES", 2), _model()
    bias = model.roi_heads.box_predictor.cls_score.bias.clone()
    KNCheckpointer(model).load(_save(tmp_path, source.state_dict()), [])
    assert torch.equal(model.roi_heads.box_predictor.cls_score.bias, bias)
    assert torch.equal(model.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight)
    (warning,) = [
        record.getMessage()
        for record in kn_log.records
        if record.levelname == "WARNING" and record.name.startswith("kn_detectron.")
    ]
    assert "another shape" in warning and "roi_heads.box_predictor.cls_score.bias" in warning


def test_empty_path_is_from_scratch(kn_log):
    assert KNCheckpointer(_model()).load("", []) == {}
    assert "from scratch" in kn_log.text and "gain 0" not in kn_log.text


def test_from_scratch_at_gain_0_is_warned_about(tmp_path, kn_log):
    model = _model("MODEL.KN.GAIN", 0.0, "MODEL.KN.LEARN_GAIN", False)
    KNCheckpointer(model).load("", [])
    assert kn_log.text.count("At gain 0 a deep network does not start from scratch: give") == 1
    # A backbone may have got its weights elsewhere.
    next(layer for layer in kalman_layers(model).values() if not layer.is_head).running_var.mul_(2)
    KNCheckpointer(model).load("", [])
    assert kn_log.text.count("does not start") == 1


@pytest.mark.parametrize("logit", [None, -math.inf], ids=["present", "older"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_gain_fixed_at_zero_loads(tmp_path, kn_log, strict, logit):
    """Its logit was infinite in older checkpoints."""
    fixed = ("MODEL.KN.GAIN", 0.0, "MODEL.KN.LEARN_GAIN", False)
    source, model = _model(*fixed), _model(*fixed)
    state = source.state_dict()
    gains = [name for name in state if name.endswith("gain_logit")]
    for name in gains if logit is not None else ():
        state[name] = torch.full_like(state[name], logit)
    KNCheckpointer(model).load(_save(tmp_path, state), [], strict=strict)
    name = "backbone.stem.conv1.weight"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert gains and all((model.state_dict()[name].sigmoid() == 0).all() for name in gains)
    assert "not taken from" not in kn_log.text


# Refusing what is not.


def test_missing_file(tmp_path):
    _assert_refused(str(tmp_path / "model.pth"), "MODEL.WEIGHTS", "does not exist", '""')


def test_folder_instead_of_a_file(tmp_path):
    _assert_refused(str(tmp_path), "MODEL.WEIGHTS", "is a folder", '""')


def test_url_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    # The discard port of this machine: refused at once, with and without a network.
    path = "http://127.0.0.1:9/ImageNetPretrained/MSRA/R-50.pkl"
    _assert_refused(path, "MODEL.WEIGHTS", "cannot be downloaded", "local file", '""')


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(tmp_path, kn_state, share):
    path = _save(tmp_path, kn_state)
    size = os.path.getsize(path)
    os.truncate(path, int(size * share))
    _assert_refused(path, "is truncated", "another checkpoint")


def test_damaged_file(tmp_path, kn_state):
    path = _save(tmp_path, kn_state)
    with open(path, "r+b") as file:
        file.write(b"\0" * 200)
    _assert_refused(path)


@pytest.mark.parametrize(
    "name, content, pattern",
    [
        ("model.pth", b"just text", "not a checkpoint"),
        ("model.pkl", b"just text", "not a checkpoint"),
        ("model.pkl", pickle.dumps(["a list"]), "holds a list"),
        ("model.pkl", pickle.dumps({"blobs": {"w": "text"}}), "of type str"),
    ],
)
def test_not_a_checkpoint(tmp_path, name, content, pattern):
    path = tmp_path / name
    path.write_bytes(content)
    _assert_refused(str(path), pattern)


@pytest.mark.parametrize(
    "content, pattern",
    [([1], "holds a list"), ({}, "dict of tensors"), ({"epoch": 3}, "its entry 'epoch'")],
)
def test_not_a_model(tmp_path, content, pattern):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    _assert_refused(str(path), "not a checkpoint", pattern)


def test_weights_that_are_not_finite(tmp_path, kn_state):
    state = dict(kn_state)
    name = "backbone.res2.0.conv1.weight"
    state[name] = state[name].clone()
    state[name][0, 0] = float("nan")
    _assert_refused(_save(tmp_path, state), f"in 1 of {len(state)} tensors", name)


def test_other_widths(tmp_path):
    source = _model("MODEL.RESNETS.RES2_OUT_CHANNELS", 32)
    path = _save(tmp_path, source.state_dict())
    _assert_refused(path, "another architecture", "of another shape", "instead of")


def test_other_widths_in_an_imagenet_pickle(tmp_path):
    source = _model(*_BN, "MODEL.RESNETS.STEM_OUT_CHANNELS", 4)
    path = _as_imagenet_pickle(tmp_path / "r50.pkl", source.state_dict())
    _assert_refused(path, "of another shape", "backbone.stem.conv1.weight with (4, 3, 7, 7)")


def test_incomplete_backbone(tmp_path, kn_state):
    state = dict(kn_state)
    del state["backbone.res3.1.conv2.norm.running_var"]
    path = _save(tmp_path, state)
    _assert_refused(path, "1 missing, the first backbone.res3.1.conv2.norm.running_var")


def test_nothing_in_common(tmp_path):
    path = _save(tmp_path, {"encoder.weight": torch.ones(3)})
    _assert_refused(path, "another architecture", "0 tensors fit")


def test_evaluation_takes_no_other_norm(tmp_path):
    path = _save(tmp_path, _model(*_BN).state_dict())
    _assert_refused(path, "not a checkpoint of this model", "mean_offset", strict=True)
    other = _save(tmp_path, _model().state_dict())
    _assert_refused(other, "that the model lacks", model=_model(*_BN), strict=True)


def test_resuming_takes_no_bare_weights(tmp_path, kn_state):
    path = _save(tmp_path, kn_state)
    (tmp_path / "last_checkpoint").write_text("model.pth")
    checkpointer = KNCheckpointer(_model(), str(tmp_path), trainer=torch.nn.Identity())
    with pytest.raises(InputError, match="no state of a training run") as error:
        checkpointer.resume_or_load("", resume=True)
    assert path in str(error.value)


def test_a_question_mark_in_the_path(tmp_path):
    (tmp_path / "which?").mkdir()
    torch.save({"model": _model().state_dict()}, tmp_path / "which?" / "m.pth")
    checkpointer, path = KNCheckpointer(_model()), str(tmp_path / "which?" / "m.pth")
    if not hasattr(DetectionCheckpointer(_model()), "_parsed_url_during_load"):
        checkpointer.load(path)  # older versions know no queries
        return
    with pytest.raises(InputError, match="which.*/m.pth has a question mark .*: give a copy"):
        checkpointer.load(path)


@pytest.mark.parametrize(
    "named, sentence",
    [
        ("model_0000004.pth", "model_0000004.pth does not exist although .*last_check"),
        ("", "last_checkpoint is empty, but must name the last checkpoint: "),
    ],
)
def test_last_checkpoint_that_is_gone(named, sentence, tmp_path):
    (tmp_path / "last_checkpoint").write_text(named)
    checkpointer = KNCheckpointer(_model(), str(tmp_path))
    with pytest.raises(InputError, match=sentence):
        checkpointer.resume_or_load("", resume=True)


# Writing.

_KILLED_WHILE_WRITING = """
import os, signal, sys
import torch
import torchvision
from kn_detectron.checkpoint import Conventions, KNCheckpointer

class Killer:
    def state_dict(self):
        return {"weights": torch.ones(10_000), "end": self}
    def load_state_dict(self, state):
        pass
    def __reduce__(self):  # the file is open and has its beginning by now
        os.kill(os.getpid(), signal.SIGKILL)

model = torch.nn.Linear(300, 300)
KNCheckpointer(model, sys.argv[1]).save("first", iteration=0)
KNCheckpointer(model, sys.argv[1], killer=Killer()).save("second", iteration=1)
"""


def test_killed_write_leaves_the_checkpoint_before(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", _KILLED_WHILE_WRITING, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == -signal.SIGKILL
    first, last, partial = sorted(os.listdir(tmp_path))
    assert (first, last) == ("first.pth", "last_checkpoint")
    assert re.fullmatch(r"second\.pth\.\w+\.partial", partial)
    checkpointer = KNCheckpointer(torch.nn.Linear(300, 300), str(tmp_path))
    checkpointer.remove_partial_files()
    assert sorted(os.listdir(tmp_path)) == ["first.pth", "last_checkpoint"]
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 0


@contextlib.contextmanager
def _room_for(size):
    """As if the disk had no more room in a file than for some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_checkpoint_before(tmp_path):
    checkpointer = KNCheckpointer(torch.nn.Linear(300, 300), str(tmp_path))
    checkpointer.save("model", iteration=0)
    before = (tmp_path / "model.pth").read_bytes()
    torch.nn.init.zeros_(checkpointer.model.weight)
    with _room_for(100_000):
        with pytest.raises(InputError, match="model.pth cannot be written .*--resume"):
            checkpointer.save("model", iteration=1)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == before


def test_full_disk_leaves_the_name_of_the_checkpoint_before(tmp_path):
    checkpointer = KNCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.tag_last_checkpoint("first.pth")
    with _room_for(0), pytest.raises(OSError):
        checkpointer.tag_last_checkpoint("second.pth")
    assert os.listdir(tmp_path) == ["last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "first.pth"


class _Hook:
    """It has a state of its own."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return {"state": self.state}

    def load_state_dict(self, state):
        self.state = state["state"]


@pytest.mark.skipif(
    not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"), reason="torch before 2.6"
)
@pytest.mark.parametrize("state", [datetime.date(2018, 12, 3), collections.deque([1.0])])
def test_a_checkpoint_that_could_not_be_read_is_not_written(tmp_path, state):
    model = torch.nn.Linear(3, 3)
    KNCheckpointer(model, str(tmp_path)).save("first", iteration=0)
    name = f"{type(state).__module__}.{type(state).__name__}"
    with pytest.raises(InputError, match=f"holds a {name}, .* from its state_dict"):
        KNCheckpointer(model, str(tmp_path), hook=_Hook(state)).save("second", iteration=1)
    assert sorted(os.listdir(tmp_path)) == ["first.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "first.pth"


def test_plain_values_and_arrays_of_a_hook_come_back(tmp_path):
    state = {"mean": np.float64(0.5), "best": {"AP": 3.0, "names": ["a"], "of": (1, None)}}
    hook = _Hook({**state, "array": np.arange(3), "count": torch.tensor(2)})
    KNCheckpointer(torch.nn.Linear(3, 3), str(tmp_path), hook=hook).save("model", iteration=0)
    found = _Hook(None)
    checkpointer = KNCheckpointer(torch.nn.Linear(3, 3), str(tmp_path), hook=found)
    checkpointer.resume_or_load("", resume=True)
    assert {name: found.state[name] for name in state} == state
    assert found.state["array"].tolist() == [0, 1, 2] and found.state["count"] == 2


def test_nothing_is_written_without_a_folder_or_permission(tmp_path):
    KNCheckpointer(torch.nn.Linear(2, 2)).save("model")
    KNCheckpointer(torch.nn.Linear(2, 2), str(tmp_path), save_to_disk=False).save("model")
    assert os.listdir(tmp_path) == []


def test_partial_files_are_removed_by_the_process_that_writes_alone(tmp_path):
    (tmp_path / "model.pth.0123abcd.partial").touch()
    for save_to_disk, left in ((False, 1), (True, 0)):
        model = torch.nn.Linear(2, 2)
        KNCheckpointer(model, str(tmp_path), save_to_disk=save_to_disk).remove_partial_files()
        assert len(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_model_with_torchvisions_names_loads_its_own_checkpoint(tmp_path, prefix):
    model, other = (torchvision.models.resnet18(weights=None) for _ in range(2))
    if prefix:
        state = {prefix + name: value for name, value in model.state_dict().items()}
        torch.save({"model": state}, tmp_path / "own.pth")
    else:
        KNCheckpointer(model, str(tmp_path)).save("own")
    KNCheckpointer(other).load(str(tmp_path / "own.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
