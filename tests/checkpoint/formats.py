"""Writes checkpoints as other projects do: their containers and their names of tensors."""

import pickle
import re

import safetensors.torch
import torch

_BRANCHES = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
_DETECTRON2_MSRA = dict(weight="gamma", bias="beta", running_mean="running_mean")
_DETECTRON2_MSRA["running_var"] = "running_var"
_DETECTRON1 = dict(weight="s", bias="b", running_mean="rm", running_var="riv")


def bare(state):
    """The ResNet of a C4 or FPN detector, without prefixes."""
    found = {
        name: re.match(r"(?:backbone\.|bottom_up\.|roi_heads\.)*((?:stem|res\d)\..*)", name)
        for name in state
    }
    return {match[1]: state[name] for name, match in found.items() if match}


def torchvision(state):
    """Names of torchvision and timm for those of a bare ResNet."""
    renamed = {"fc.weight": torch.rand(10, 4), "fc.bias": torch.rand(10)}
    for name, tensor in state.items():
        name = name.replace("stem.", "")
        name = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name)
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        renamed[re.sub(r"conv(\d)\.norm", r"bn\1", name)] = tensor
    return renamed


def caffe2(state, norm="bn", letters=_DETECTRON2_MSRA):
    """Names of Caffe2 for those of a bare ResNet, with arrays instead of tensors."""
    renamed = {"fc1000_w": torch.rand(10, 4).numpy(), "fc1000_b": torch.rand(10).numpy()}
    for name, tensor in state.items():
        *block, conv, last = name.replace(".norm.", f"_{norm}.").split(".")
        if last == "num_batches_tracked":
            continue
        conv, _, is_norm = conv.partition("_")
        place = "conv1" if block == ["stem"] else "_".join([*block, _BRANCHES[conv]])
        if is_norm:
            # The stem's has another name than all others where it is not of GroupNorm.
            place = ("res_" if place == "conv1" and norm == "bn" else "") + f"{place}_{norm}"
            renamed[f"{place}_{letters[last]}"] = tensor.numpy()
        else:
            renamed[f"{place}_w"] = tensor.numpy()
    return renamed


def write(folder, content, name="model.pth"):
    """Writes with torch.save, as a pickle or as safetensors, as the name says; returns the path."""
    path = folder / name
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


def msra(state):
    """detectron2's ImageNetPretrained/MSRA/R-50.pkl."""
    return {"model": caffe2(state), "__author__": "Caffe2", "matching_heuristics": True}


def detectron1(state):
    """An ImageNet model of Caffe2, with its training's state; BatchNorm is folded."""
    folded = {n: t for n, t in state.items() if "running" not in n}
    arrays = caffe2(folded, letters=_DETECTRON1)
    arrays.update({f"{name}_momentum": array for name, array in arrays.items()})
    return {"blobs": arrays}


def group_norm(state):
    """Detectron1's R-50-GN.pkl."""
    return caffe2(without_statistics(state), "gn", _DETECTRON1)


def without_statistics(state):
    """A network of GroupNorm: its norms have weights and biases only."""
    return {n: t for n, t in state.items() if "running" not in n and "num_batches" not in n}


def model_zoo(state, author="Detectron2 Model Zoo", **more):
    """A pickle of detectron2's model zoo, of a detector or, with ``more``, a bare ResNet."""
    arrays = {n: t.numpy() for n, t in state.items() if "num_batches" not in n}
    return {"model": arrays, "__author__": author, **more}
