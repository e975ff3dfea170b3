"""The config of a command line: a file and KEY VALUE pairs, with a sentence for each fault."""

import difflib
import os
import re
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import add_kn_config, check_config
from ..errors import InputError, one_line
from .detectron2_keys import check_detectron2_keys

__all__ = ["merge_options", "read_config"]


def read_config(args, *extensions):
    """Reads the config that the arguments name, without looking at its datasets.

    Without a GPU, MODEL.DEVICE "cuda", which is detectron2's default, becomes "cpu". A command line
    that asks for "cuda" itself is refused. On the CPU mixed precision is switched off.

    Args:
        args (argparse.Namespace): of :func:`~.command_line.argument_parser`.
        extensions (callable): each adds keys to a config, as :func:`add_kn_config` does.

    Returns:
        CfgNode: not frozen.

    Raises:
        InputError: something in it is wrong.
    """
    cfg = get_cfg()
    for extend in (add_kn_config, *extensions):
        extend(cfg)
    _refuse_flags(args.opts)  # --config may be one
    _merge_file(cfg, args.config_file)
    merge_options(cfg, args.opts)
    check_config(cfg)
    check_detectron2_keys(cfg)
    # Only commands that train have several ranks.
    _choose_device(cfg, args.opts, getattr(args, "num_gpus", 1))
    return cfg


def _merge_file(cfg, path):
    if not path:
        raise InputError(
            "No config is given: give one with --config FILE, and begin with --config "
            "configs/shapes/mask_rcnn_slim_R50_C4_KN.yaml, which trains for minutes on a CPU with "
            "images that it generates (GETTING_STARTED.md goes on from there)."
        )
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise InputError(f"Config file {path} {what}: give the path of a YAML file.")
    if path.endswith(".py"):
        raise InputError(
            f"Config file {path} is Python, as detectron2's LazyConfig: give a YAML file, or train it "
            "with detectron2's lazyconfig_train_net.py (docs/config.md, LazyConfig)."
        )
    if not Path(path).read_bytes().strip():
        raise InputError(f"Config file {path} is empty: give a YAML file with keys of the config.")
    try:
        # That of a run holds plain values only, and comes with weights of others. detectron2's own
        # have Python in them.
        cfg.merge_from_file(path, allow_unsafe=os.path.basename(path) != "config.yaml")
    except yaml.YAMLError as error:
        raise InputError(
            f"Config file {path} is not valid YAML ({one_line(error)}): correct it."
        ) from error
    except RecursionError as error:
        raise InputError(
            f"Config file {path} has a _BASE_ that leads back to itself: name another file."
        ) from error
    except OSError as error:  # of _BASE_
        raise InputError(
            f"Config file {path} has a _BASE_ that cannot be read ({one_line(error)}): give a path "
            "from the folder of the config file, or an absolute one."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"Config file {path} is not text in UTF-8 ({one_line(error)}): save it as that."
        ) from error
    # What detectron2 and yacs raise depends on how the content is wrong.
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        if "Non-existent config key: PRETRAINING" in str(error):
            raise InputError(
                f"Config file {path} is that of a pre-training: give the config of the detector, "
                f"and MODEL.WEIGHTS {os.path.join(os.path.dirname(path), 'backbone.pth')}."
            ) from error
        if re.match(r"'\w+' object has no attribute", str(error)):
            raise InputError(
                f"Config file {path} holds no keys where some are expected ({one_line(error)}): give "
                'a YAML file with lines such as "MODEL:" and "  MASK_ON: True".'
            ) from error
        raise InputError(
            f"Config file {path} cannot be used ({one_line(error)}): correct or remove the entry"
            f"{_form_that_fits(error)}."
        ) from error


def _refuse_flags(options):
    flags = [option for option in options if option.startswith("--")]
    if flags:
        raise InputError(f"{flags[0]} comes after KEY VALUE pairs: put it before them.")


def merge_options(cfg, options):
    """Sets the KEY VALUE pairs of a command line in a config.

    Args:
        cfg (CfgNode): not frozen.
        options (list[str]): KEY, VALUE, ...

    Raises:
        InputError: a key or a value is wrong, or half a pair is missing.
    """
    _refuse_flags(options)
    if len(options) % 2:
        raise InputError(
            f"The last of the KEY VALUE pairs, {options[-1]}, is only half a pair: give a key and "
            "a value, separated by a space."
        )
    for key, value in zip(options[::2], options[1::2]):
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            near = _near_keys(cfg, key)
            hint = f" (is {' or '.join(near)} meant?)" if near else _form_that_fits(error)
            raise InputError(
                f"{key} {value} cannot be set ({one_line(error)}): correct the key or the value{hint}."
            ) from error


def _near_keys(cfg, key):
    """Keys like one that there is not."""
    node, *names = cfg, *key.split(".")
    for i, name in enumerate(names):
        if name not in node:
            return [
                ".".join((*names[:i], near, *names[i + 1 :]))
                for near in difflib.get_close_matches(name, list(node))
            ]
        node = node[name]
        if not isinstance(node, CfgNode):
            break
    return []


def _choose_device(cfg, options, num_gpus):
    if num_gpus > 1 and ":" in cfg.MODEL.DEVICE:
        raise InputError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE} is one GPU and --num-gpus asks for {num_gpus}: give "
            "MODEL.DEVICE cuda."
        )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        if "MODEL.DEVICE" in options[::2]:
            raise InputError(
                f"MODEL.DEVICE {cfg.MODEL.DEVICE} asks for a GPU and torch finds none: check the "
                "driver and torch's CUDA version, or give MODEL.DEVICE cpu."
            )
        cfg.MODEL.DEVICE = "cpu"
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        cfg.SOLVER.AMP.ENABLED = False  # detectron2 has it for GPUs only


def _form_that_fits(error):
    """How to write a value of the type that yacs names in its error about a type."""
    pattern = r"Type mismatch \(<class '(\w+)'> vs. <class '(\w+)'>\) with values \(.* vs. (.*)\)"
    types = re.search(pattern, str(error), re.DOTALL)
    if types is None:
        return ""
    wanted, given, value = types.groups()
    if (wanted, given) == ("float", "int"):
        return f", as in {value}.0 for {value}"
    if wanted in ("tuple", "list"):
        if given == "str":
            return ", as in \"('my_data',)\" with both kinds of quotes"
        return ', as in "(100,)" for a single 100' if wanted == "tuple" else ', as in "[0.6, 0.9]"'
    return ""
