"""Checks of the datasets of a run, before any model is built.

Mended annotations are written to a copy of the annotation file in the output folder, and the
dataset is registered anew with this copy. So the loaders, COCO's evaluation and all other readers
of the dataset read the same annotations in every process. The file of the user is left alone.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import os
import socket

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from ..files import atomic_write, explained_write_errors
from .annotations import Uses, check_annotations
from .image_files import check_headers
from .register import prepare_dataset
from .requirements import check_requirements, uses_of

__all__ = ["check_dataset", "check_datasets", "check_datasets_once", "use_checked_datasets"]

_logger = logging.getLogger(__name__)


def check_datasets(cfg, keys=("TRAIN", "TEST")):
    """Checks the datasets of a config, in this process: see :func:`check_dataset`.

    Args:
        cfg (CfgNode): detectron2's config.
        keys (Iterable[str]): of cfg.DATASETS.

    Returns:
        dict[str, dict[str, Truth]]: what the annotations hold, by key and by dataset in COCO's
        format.

    Raises:
        InputError: a dataset cannot be used.
    """
    uses = uses_of(cfg)
    names = dict.fromkeys(name for key in keys for name in cfg.DATASETS[key])
    # Those to evaluate on are read last, and are few; a training begins with its images.
    tested = cfg.DATASETS.TEST if "TEST" in keys else ()
    truths = {
        name: check_dataset(name, cfg.OUTPUT_DIR, uses, open_images=name in tested)
        for name in names
    }
    return {
        key: {name: truths[name] for name in cfg.DATASETS[key] if truths[name] is not None}
        for key in keys
    }


def check_dataset(name, output_dir, uses=Uses(), open_images=False):
    """Checks that a dataset can be used. A generated dataset is written first.

    The annotation file is read once, and the image folder is listed once. For COCO's train2017 most
    of the time goes into its 450 MB of JSON, so one process is enough. A dataset that is not in
    COCO's format is only looked up by name.

    Args:
        name (str): name of the dataset as in DATASETS.TRAIN.
        output_dir (str): where the mended annotations go, in the folder ``annotations``.
        uses (Uses): what the run makes use of.
        open_images (bool): whether each image is opened, though not decoded, to see that it can be
            used and has the annotated size; some 0.1 ms each.

    Returns:
        Truth or None: what the annotations hold; None where they are not in COCO's format.

    Raises:
        InputError: the name is unknown, or the dataset's files are missing or broken.
    """
    _check_name(name)
    prepare_dataset(name)
    if not _is_coco(name):
        return None
    json_file, metadata = _source(name), MetadataCatalog.get(name)
    _check_root(name, json_file)
    stamp = _stamp(json_file, uses)
    content, truth, report = check_annotations(json_file, metadata.image_root, name, uses)
    for line in report.lines():
        _logger.warning(line)
    if open_images:
        check_headers(content["images"], metadata.image_root)
    mended = _path_of_mended(output_dir, name, json_file)
    if report.is_mended:
        _check_loader(name, report)
        with explained_write_errors(mended, "give an OUTPUT_DIR on a disk with room."):
            os.makedirs(os.path.dirname(mended), exist_ok=True)
            with atomic_write(mended) as file:
                # Without other characters than ASCII, whatever the locale of the reader is.
                file.write(json.dumps(content).encode("ascii"))
        _logger.warning("%s is left as it is: %s is used instead.", json_file, mended)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(mended)
    _use(name, mended if report.is_mended else json_file, stamp, truth)
    return truth


def use_checked_datasets(cfg, keys=("TRAIN", "TEST"), truths=None):
    """Makes this process use the annotations that another one has checked for the same config.

    Args:
        cfg, keys: as for :func:`check_datasets`.
        truths (dict or None): what it gave there, if that is known here.
    """
    for key, name in ((key, name) for key in keys for name in cfg.DATASETS[key]):
        if name in DatasetCatalog.list() and _is_coco(name) and PathManager.isfile(_source(name)):
            json_file = _source(name)
            mended = _path_of_mended(cfg.OUTPUT_DIR, name, json_file)
            used = mended if os.path.exists(mended) else json_file
            truth = truths[key].get(name) if truths else None
            _use(name, used, _stamp(json_file, uses_of(cfg)), truth)


def check_datasets_once(cfg, keys=("TRAIN", "TEST")):
    """Checks what no process of the run has checked yet. All ranks have to call it.

    One rank of each machine does it. Names that are not registered are left to the loaders. Whether
    the config fits is looked at each time, since it may be another one.

    Args:
        cfg, keys: as for :func:`check_datasets`.

    Raises:
        InputError: a dataset cannot be used; on all ranks.
    """
    names = [name for key in keys for name in cfg.DATASETS[key]]
    if not all(name in DatasetCatalog.list() for name in names):
        return
    if all(comm.all_gather(all(_is_checked(name, uses_of(cfg)) for name in names))):
        check_requirements(cfg, {key: _known_truths(cfg.DATASETS[key]) for key in keys})
        return
    fault = truths = None
    if comm.all_gather(socket.gethostname()).index(socket.gethostname()) == comm.get_rank():
        try:
            truths = check_datasets(cfg, keys)
            check_requirements(cfg, truths)
        except InputError as error:
            fault = str(error)
    found = comm.all_gather((fault, truths))
    for fault, _ in found:
        if fault is not None:
            raise InputError(fault)
    use_checked_datasets(cfg, keys, next(truths for _, truths in found if truths is not None))


def _known_truths(names):
    found = {name: MetadataCatalog.get(name).get("truth") for name in names}
    return {name: truth for name, truth in found.items() if truth is not None}


def _check_name(name):
    if name in DatasetCatalog.list():
        return
    if os.path.isdir(name):
        raise InputError(
            f"Dataset {name} is a folder, and not registered in detectron2's catalog: give the "
            "folder that holds its annotations with --dataset, in COCO's layout, and leave "
            "DATASETS out."
        )
    close = difflib.get_close_matches(name, DatasetCatalog.list())
    raise InputError(
        f"Dataset {name!r} is not registered in detectron2's catalog: register it at the top of a "
        f"copy of tools/train_net.py, correct the name{' to ' + ' or '.join(close) if close else ''}, "
        "or give a folder in COCO's layout with --dataset."
    )


def _is_coco(name):
    metadata = MetadataCatalog.get(name)
    # LVIS has these files too, but another format in them.
    is_coco = metadata.get("evaluator_type") == "coco"
    return is_coco and bool(metadata.get("json_file") and metadata.get("image_root"))


def _source(name):
    """The user's own file, even if the dataset was registered anew with a mended copy."""
    metadata = MetadataCatalog.get(name)
    return metadata.get("source_json_file") or metadata.json_file


def _check_root(name, json_file):
    root = os.getenv("DETECTRON2_DATASETS")
    if root is not None and not os.path.isdir(os.path.expanduser(root)):
        under_root = os.path.abspath(json_file).startswith(
            os.path.abspath(os.path.expanduser(root)) + os.sep
        )
        if under_root:
            raise InputError(
                f"Folder {root}, where dataset {name} is looked for, does not exist: set the "
                "environment variable DETECTRON2_DATASETS to the folder that holds the datasets."
            )
    if not PathManager.isfile(json_file):
        raise InputError(
            f"Annotation file {json_file} of dataset {name} does not exist: put it there, set the "
            "environment variable DETECTRON2_DATASETS to the folder that holds the datasets, or "
            "give a folder of your own with --dataset."
        )


def _check_loader(name, report):
    """Refuses to mend what is loaded by code that would not read the mended file."""
    function = DatasetCatalog[name]
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    keywords = getattr(function, "keywords", {})
    asks_for_more = len(getattr(function, "args", ())) > 3 or "extra_annotation_keys" in keywords
    if module not in (load_coco_json.__module__, prepare_dataset.__module__) or asks_for_more:
        raise InputError(
            f"{report.lines()[0].rstrip('.')}; dataset {name} is loaded by a function of its own, "
            "which cannot be given a mended copy, so correct the file."
        )


def _path_of_mended(output_dir, name, json_file):
    # Names can be paths, and files of different datasets can have the same name.
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    base = os.path.splitext(os.path.basename(json_file))[0]
    return os.path.join(os.path.abspath(output_dir), "annotations", f"{base}-{digest}.json")


def _stamp(json_file, uses):
    """What a check holds for: the file as it is, and what is used of it."""
    found = os.stat(PathManager.get_local_path(json_file))
    return found.st_size, found.st_mtime_ns, uses


def _is_checked(name, uses):
    if not _is_coco(name):
        return True
    metadata = MetadataCatalog.get(name)
    return (
        metadata.get("checked") is not None
        and PathManager.isfile(_source(name))
        and metadata.checked == _stamp(_source(name), uses)
        and PathManager.isfile(metadata.json_file)
    )


def _use(name, json_file, stamp, truth):
    """Registers a dataset anew with a checked file."""
    source, metadata = _source(name), MetadataCatalog.get(name)
    if json_file != metadata.json_file:
        DatasetCatalog.pop(name)
        load = functools.partial(load_coco_json, json_file, metadata.image_root, name)
        DatasetCatalog.register(name, load)
    # Metadata refuses to change a value by its own methods. Others may hold the object.
    known = dict(json_file=json_file, source_json_file=source, checked=stamp, truth=truth)
    vars(metadata).update(known)
