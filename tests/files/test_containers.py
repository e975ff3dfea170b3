"""Files of tensors are read whole and without running anything, or refused in a sentence."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kn_detectron import InputError
from kn_detectron.files import read_container


@pytest.fixture
def tensors():
    return {"conv.weight": torch.randn(40, 30, 3, 3), "conv.bias": torch.randn(40)}


def write(folder, tensors, name):
    path = folder / name
    if name.endswith(".pth"):
        torch.save(tensors, path, _use_new_zipfile_serialization=not name.startswith("old"))
    elif name.endswith(".safetensors"):
        save_file(tensors, path)
    else:
        path.write_bytes(pickle.dumps({key: tensor.numpy() for key, tensor in tensors.items()}))
    return path


def assert_holds(path, tensors):
    content = read_container(str(path))
    assert list(content) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(torch.as_tensor(content[name]), tensor)


def assert_refused(path, *parts):
    with pytest.raises(InputError) as refused:
        read_container(str(path))
    assert all(part in str(refused.value) for part in (str(path), *parts)), refused.value


KINDS = ["m.pth", "old.pth", "m.safetensors", "m.pkl"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_is_known_by_its_content(tmp_path, tensors, kind):
    path = write(tmp_path, dict(sorted(tensors.items())), kind)
    for name in ("as_it_is", "other.pth", "other.pkl", "other.safetensors"):
        path = path.rename(tmp_path / name)
        assert_holds(path, dict(sorted(tensors.items())))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["m.pkl", "m.pth", "m.safetensors", "old.pth"])
def test_a_file_that_would_run_code(tmp_path, name):
    content = {"model": {"stem.conv1.weight": Harmful(str(tmp_path / "it_ran"))}}
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(content, path, _use_new_zipfile_serialization=name != "old.pth")
        assert_refused(path, "could run code")
    else:
        path.write_bytes(pickle.dumps(content))
        assert_refused(path, "not a checkpoint", "mkdir")
    assert not (tmp_path / "it_ran").exists()


class Pointers:
    """Makes an array of objects whose addresses are in the file."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")


@pytest.mark.parametrize("name", ["m.pkl", "m.pth"])
def test_a_file_that_would_make_pointers(tmp_path, name):
    path = tmp_path / name
    if name == "m.pth":
        torch.save({"__author__": Pointers()}, path)
    else:
        path.write_bytes(pickle.dumps({"__author__": Pointers()}))
    assert_refused(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file(tmp_path, tensors, kind, share):
    path = write(tmp_path, tensors, kind)
    os.truncate(path, int(os.path.getsize(path) * share))
    assert_refused(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_archives_of_other_kinds_are_not_damaged(tmp_path, tensors):
    script, arrays, folder = (tmp_path / name for name in ("m.pt", "m.npz", "m.zip"))
    torch.jit.script(nn.Linear(2, 2)).save(str(script))
    np.savez(arrays, **{name: tensor.numpy() for name, tensor in tensors.items()})
    with zipfile.ZipFile(folder, "w") as archive:
        archive.writestr("model.pth", b"0")
    assert_refused(script, "is a TorchScript program", "torch.jit.load")
    assert_refused(arrays, "an archive of numpy arrays (.npz)", "pickle.dump")
    assert_refused(folder, "is a zip archive and not one of torch.save", "model.pth")
    # What the sentences advise.
    advised = tmp_path / "advised"
    state = torch.jit.load(script).state_dict()
    torch.save(state, advised)
    assert_holds(advised, state)
    advised.write_bytes(pickle.dumps(dict(np.load(arrays))))
    assert_holds(advised, tensors)


def test_what_is_no_dict(tmp_path):
    path = tmp_path / "m.pth"
    torch.save([torch.ones(1)], path)
    assert_refused(path, "holds a list")


def test_a_damaged_directory(tmp_path, tensors):
    path = write(tmp_path, tensors, "m.pth")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")  # of an entry of the archive's directory
    content[at : at + 4] = b"\0\0\0\0"
    path.write_bytes(content)
    assert_refused(path, "is damaged")


@pytest.mark.parametrize("lack", [MemoryError(), RuntimeError("x: can't allocate memory: 9 bytes")])
def test_lack_of_memory_is_not_called_damage(tmp_path, monkeypatch, lack):
    path = tmp_path / "large.pth"
    torch.save({"w": torch.zeros(3)}, path)

    def load(*args, **kwargs):
        raise lack

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(lack)):
        read_container(str(path))
