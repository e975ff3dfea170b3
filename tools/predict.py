#!/usr/bin/env python
"""Detects objects in photographs, draws them, and lists them in a JSON file.

Examples:
    python tools/predict.py photo.jpg
    python tools/predict.py photo.jpg --config output/my_data/config.yaml
    python tools/predict.py photos/ --config output/my_data/config.yaml --output output/found --min-score 0.5
    python tools/predict.py photos/ --config configs/photos/mask_rcnn_lite0_FPN_BN.yaml \\
        --opts MODEL.WEIGHTS output/BN/model_final.pth

Without a config the released detector finds persons. A config.yaml in the folder of a run stands for
the last checkpoint of this run. Any other config needs MODEL.WEIGHTS. Each picture is OUTPUT/<name of
the photo>.png. Of boxes that overlap by more than 0.4, or 0.7 if their classes differ, only the best
is drawn. All detections, drawn or not, are in OUTPUT/detections.json.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import tqdm
from PIL import Image

from kn_detectron.checkpoint import KNCheckpointer
from kn_detectron.data import read_rgb, register_named_folders
from kn_detectron.engine import trained_weights
from kn_detectron.engine.command_line import run
from kn_detectron.engine.config_file import read_config
from kn_detectron.engine.output_dir import make_writable
from kn_detectron.engine.pictures import BrightVisualizer
from kn_detectron.engine.prediction import class_names, coco_results, shown
from kn_detectron.errors import InputError, one_line
from kn_detectron.files import atomic_write, explained_write_errors
from kn_detectron.model_zoo import get_checkpoint_file, get_config_file

# Behind kn_detectron, which makes old versions of detectron2 importable.
from detectron2.data import DatasetMapper  # isort: skip
from detectron2.data.catalog import Metadata  # isort: skip
from detectron2.modeling import build_model  # isort: skip

_RELEASED = "photos/mask_rcnn_lite0_FPN_KN.yaml"
_ADVICE = "make room, or give another folder as --output."
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def find_photos(paths):
    """The images that are named, and the images in the folders that are named.

    The images of a folder are sorted by name.

    Args:
        paths (list[str]): of images and folders.

    Returns:
        list[Path]

    Raises:
        InputError: there is no such file, or a folder has no images.
    """
    photos = []
    for path in map(Path, paths):
        if os.path.isdir(path):  # Path's own methods raise errors for names that are too long
            entries = list(path.iterdir())
            inside = sorted(p for p in entries if p.suffix.lower() in _SUFFIXES)
            if not inside:
                raise InputError(
                    f"Folder {path} has no images: give one with {', '.join(sorted(_SUFFIXES))}."
                )
            photos += inside
            if len(entries) > len(inside):
                more = len(entries) - len(inside)
                print(f"{path} has {more} more files or folders, which are left out.")
        elif os.path.isfile(path):
            photos.append(path)
        else:
            raise InputError(f"{path} does not exist: give the path of a photo or of a folder.")
    return photos


def load_model(args):
    """The config and the trained model that the arguments name.

    Args:
        args (argparse.Namespace): with config_file and opts.

    Returns:
        (CfgNode, nn.Module): the model is in evaluation mode.

    Raises:
        InputError: the config cannot be used, or there are no weights.
    """
    if not args.config_file:
        args.config_file = get_config_file(_RELEASED)
        args.opts = ["MODEL.WEIGHTS", get_checkpoint_file(_RELEASED), *args.opts]
    cfg = read_config(args)
    weights = trained_weights(args.config_file, args.opts)
    if not weights:
        path = Path(args.config_file)
        raise InputError(
            f"{path.parent} has no checkpoint: give the config.yaml of a run that has written one, "
            "or --opts MODEL.WEIGHTS FILE."
            if path.name == "config.yaml"
            else f"{path} says what a model starts from, not what it has learned: give --opts "
            "MODEL.WEIGHTS FILE, or the config.yaml in the folder of a run."
        )
    cfg.MODEL.WEIGHTS = weights
    _check_kind(cfg)
    model = build_model(cfg)
    KNCheckpointer(model).load_for_evaluation(cfg.MODEL.WEIGHTS)
    register_named_folders(cfg)  # for the names of the classes
    return cfg, model.eval()


def _check_kind(cfg):
    """Refuses models that find no objects in an image alone."""
    reason = None
    if cfg.MODEL.LOAD_PROPOSALS:
        reason = "MODEL.LOAD_PROPOSALS True, and needs proposals beside the photos"
    elif cfg.MODEL.META_ARCHITECTURE in ("ProposalNetwork", "SemanticSegmentor"):
        reason = f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}, and finds no objects"
    if reason:
        raise InputError(f"The model has {reason}: give the config of a detector.")


def _mapper(cfg):
    """What reads the photos as in an evaluation."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.KEYPOINT_ON = False  # or it asks the training set how to flip keypoints
    return DatasetMapper(cfg, is_train=False)


@torch.no_grad()
def detect(mapper, model, path):
    """What a model detects in a photo.

    Args:
        mapper (DatasetMapper): reads images for the model, as in an evaluation.
        model (nn.Module): in evaluation mode.
        path (Path): of the photo.

    Returns:
        (np.ndarray, Instances): the photo in RGB, and the detections on the CPU.

    Raises:
        InputError: the photo cannot be read, or is too narrow to be resized.
    """
    image = read_rgb(str(path))
    height, width = image.shape[:2]
    try:
        inputs = mapper({"file_name": str(path)})
    except ValueError as error:
        raise InputError(
            f"{path}, which is {width} x {height} pixels, cannot be resized ({one_line(error)}): "
            "crop it."
        ) from error
    return image, model([inputs])[0]["instances"].to("cpu")


def _free(output, stem, taken):
    """A path for a picture that is none of ``taken``. It counts as taken from now on.

    These are the photos and the pictures of this run, as absolute paths.
    """
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    paths = ((output / f"{name}.png").resolve() for name in names)
    path = next(path for path in paths if path not in taken)
    taken.add(path)
    return path


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO_OR_FOLDER")
    parser.add_argument(
        "--config",
        "--config-file",
        dest="config_file",
        default="",
        metavar="FILE",
        help="of a detector (the released one of persons)",
    )
    parser.add_argument("--output", default="output/predictions", help="folder (%(default)s)")
    parser.add_argument(
        "--min-score", type=float, default=0.7, help="detections below are not drawn (%(default)s)"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the config"
    )
    args = parser.parse_args()
    if not 0 <= args.min_score <= 1:
        raise InputError(f"--min-score is {args.min_score}: scores are from 0 to 1.")
    photos = find_photos(args.photos)
    output = Path(args.output)
    make_writable(output, "--output")
    cfg, model = load_model(args)
    mapper = _mapper(cfg)
    classes = class_names(cfg)
    if not classes:
        print(
            "The names of the classes are not known, so they are numbers: --opts "
            "DATASETS.CLASS_NAMES \"['cat','dog']\" names them."
        )
    metadata = Metadata(thing_classes=classes or None)
    results, faults, count = [], [], 0
    taken = {path.resolve() for path in photos}
    if output.resolve() in {path.parent for path in taken}:  # its other pictures are the user's
        taken |= {path.resolve() for path in output.glob("*.png")}
    try:
        for path in tqdm.tqdm(photos, unit="photo"):
            try:
                image, found = detect(mapper, model, path)
            except InputError as error:
                faults.append(error)
                continue
            results += coco_results(found, str(path), classes)
            found = shown(found, args.min_score)
            count += len(found)
            picture = BrightVisualizer(image, metadata).draw_instance_predictions(found)
            target = _free(output, path.stem, taken)
            with explained_write_errors(target, _ADVICE), atomic_write(str(target)) as file:
                Image.fromarray(picture.get_image()).save(file, "png")
    finally:  # what was found is not lost, whatever ends the run
        target = output / "detections.json"
        with explained_write_errors(target, _ADVICE), atomic_write(str(target)) as file:
            file.write(json.dumps(results).encode())
    read = len(photos) - len(faults)
    number = f"{read} photo{'' if read == 1 else 's'}"
    print(f"{number} with {count} detections drawn: {output}/*.png")
    if results and not count:
        best = max(result["score"] for result in results)
        print(f"The best score is {best:.2f}: a lower --min-score draws more.")
    print(f"All {len(results)} detections, down to the lowest score: {output}/detections.json")
    if faults:
        for fault in faults[:-1]:
            print(f"error: {fault}", file=sys.stderr)
        raise faults[-1]


if __name__ == "__main__":
    sys.exit(run(main))
