import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path

import cv2
import numpy as np
import portalocker
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from kn_detectron.data import CATEGORIES, ShapesSpec, draw_image, generate_shapes, shapes_paths
from kn_detectron.data import once
from kn_detectron.data.shapes import detection
from kn_detectron.errors import InputError

from ..conftest import SPEC


def _many(count=150, **changes):
    spec = ShapesSpec(**{"size": 96, **changes})
    return [draw_image(spec, "train", i) for i in range(count)]


def _files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_parameters_give_the_same_bytes(shapes_root, tmp_path):
    generate_shapes(tmp_path / "again", SPEC)
    assert _files(tmp_path / "again") == _files(shapes_root)


def test_pixels_are_the_ones_of_every_machine():
    image, annotations = draw_image(ShapesSpec(), "train", 3)
    digest = hashlib.sha256(image.tobytes() + json.dumps(annotations).encode()).hexdigest()
    assert digest == "fdc4f2a6a070e97f8d3655ba5e2ef53aa9bc9ed77f669a2ed6bee30c1c34c806"


def test_image_does_not_depend_on_how_many_there_are(shapes_root, tmp_path):
    root = tmp_path / "fewer"
    generate_shapes(root, ShapesSpec(num_train=5, num_val=2, size=64, max_shapes=3, seed=5))
    fewer, more = (
        json.loads(Path(shapes_paths(r, "train")[0]).read_text()) for r in (root, shapes_root)
    )
    assert fewer["images"] == more["images"][:5]
    assert fewer["annotations"] == more["annotations"][: len(fewer["annotations"])]
    for record in fewer["images"]:
        name = record["file_name"]
        assert (root / "train" / name).read_bytes() == (shapes_root / "train" / name).read_bytes()


@pytest.mark.parametrize("change", [{"seed": 6}, {"split": "val"}, {"index": 1}])
def test_seed_split_and_index_change_the_image(change):
    def pixels(seed=5, split="train", index=0):
        return draw_image(ShapesSpec(seed=seed), split, index)[0]

    before, after = pixels(), pixels(**change)
    assert before.shape != after.shape or (before != after).any()


def test_annotations_agree_with_pycocotools(shapes_root):
    for split in ("train", "val"):
        json_file, image_root = shapes_paths(shapes_root, split)
        coco = COCO(json_file)
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
        assert min(coco.anns) == 1 and len(coco.imgs) == getattr(SPEC, f"num_{split}")
        for record in coco.imgs.values():
            image = cv2.imread(f"{image_root}/{record['file_name']}")
            assert image.shape == (record["height"], record["width"], 3)
            taken = np.zeros(image.shape[:2], int)
            for annotation in coco.imgToAnns[record["id"]]:
                mask = coco.annToMask(annotation)
                taken += mask
                ys, xs = mask.nonzero()
                box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
                assert annotation["bbox"] == box
                assert annotation["area"] == mask.sum()
            assert taken.max() <= 1, "masks are visible parts, so they do not overlap"


def test_polygons_rasterise_to_the_very_mask():
    rng = np.random.default_rng(0)
    polygons = 0
    for _ in range(300):
        # Blobs with ragged borders, some of which have holes or several parts.
        mask = cv2.GaussianBlur(rng.random((20, 24)), (0, 0), 2.0) > 0.5
        polygon = detection._polygon_of(mask)
        if polygon is not None:
            polygons += 1
            (rle,) = mask_util.frPyObjects([polygon], *mask.shape)
            assert (mask_util.decode(rle) == mask).all()
    assert polygons >= 10


def test_polygon_starts_on_top_and_holes_and_parts_have_none():
    square = np.pad(np.ones((6, 6), bool), 3)
    assert detection._polygon_of(square) == [3, 3, 9, 3, 9, 9, 3, 9]
    hole, parts = square.copy(), square.copy()
    hole[5:7, 5:7] = False
    parts[5:7] = False
    assert detection._polygon_of(hole) is None
    assert detection._polygon_of(parts) is None


def test_has_everything_a_dataset_should_have():
    images = _many()
    objects = [a for _, annotations in images for a in annotations]
    assert {a["category_id"] for a in objects} == set(range(1, len(CATEGORIES) + 1))
    kinds = {(a["iscrowd"], type(a["segmentation"])) for a in objects}
    assert kinds == {(0, list), (0, dict), (1, dict)}
    assert any(not annotations for _, annotations in images)
    assert any(len(annotations) > 1 for _, annotations in images)
    portrait = sum(image.shape[0] > image.shape[1] for image, _ in images)
    assert 0.3 < portrait / len(images) < 0.7
    extents = [max(a["bbox"][2:]) / 96 for a in objects if not a["iscrowd"]]
    assert min(extents) < 0.2 and max(extents) > 0.6 and 0.25 < np.median(extents) < 0.6


def test_objects_are_occluded_but_never_mostly_hidden(monkeypatch):
    seen = []
    visible_objects = detection._visible_objects

    def record(objects, height, width):
        kept = visible_objects(objects, height, width)
        seen.append((objects, kept))
        return kept

    monkeypatch.setattr(detection, "_visible_objects", record)
    _many(60)
    shares = [v.sum() / (alpha >= 0.5).sum() for _, kept in seen for _, _, alpha, v in kept]
    assert min(shares) >= 0.4
    assert sum(share < 0.9 for share in shares) > 10
    assert any(len(kept) < len(drawn) for drawn, kept in seen), "nothing was ever left out"


def test_colour_does_not_tell_the_category():
    means = {}
    for image, annotations in _many(120, max_shapes=1):
        for a in annotations:
            x, y, w, h = a["bbox"]
            means.setdefault(a["category_id"], []).append(image[y : y + h, x : x + w].mean((0, 1)))
    for colours in means.values():
        assert np.std(colours, axis=0).min() > 25
    centers = np.array([np.mean(c, axis=0) for c in means.values()])
    assert np.ptp(centers, axis=0).max() < 60


def test_existing_dataset_is_kept(shapes_root, monkeypatch):
    monkeypatch.setattr(detection, "_write_dataset", None)  # would fail if it were called
    generate_shapes(shapes_root, SPEC)
    generate_shapes(shapes_root)


def test_other_parameters_are_refused(shapes_root):
    with pytest.raises(InputError, match="other parameters .size 64, not 160") as caught:
        generate_shapes(shapes_root, ShapesSpec(num_train=24, num_val=12, max_shapes=3, seed=5))
    assert str(shapes_root) in str(caught.value)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*args):
        raise portalocker.LockException("No locks available")

    monkeypatch.setattr(portalocker.Lock, "acquire", refuse)
    with pytest.raises(InputError, match="is on a file system without locks .* a local disk"):
        generate_shapes(tmp_path / "shapes", SPEC)


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="not a shapes dataset"):
        generate_shapes(tmp_path, SPEC)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_killed_generation_leaves_no_dataset_and_is_redone(shapes_root, tmp_path, monkeypatch):
    root = tmp_path / "shapes"

    class Killed(BaseException):
        pass

    drawn = iter(range(30))

    def draw_some(spec, split, index):
        if next(drawn) == 20:
            raise Killed
        return draw_image(spec, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(detection, "draw_image", draw_some)
        with pytest.raises(Killed):
            generate_shapes(root, SPEC)
    assert not root.exists()
    generate_shapes(root, SPEC)
    assert _files(root) == _files(shapes_root)
    assert not root.with_name("shapes.partial").exists()


def test_empty_folder_is_used(tmp_path):
    root = tmp_path / "shapes"
    root.mkdir()
    generate_shapes(root, ShapesSpec(num_train=1, num_val=1, size=32))
    assert (root / "annotations" / "instances_val.json").is_file()


def test_processes_that_start_together_write_one_dataset(shapes_root, tmp_path):
    root = tmp_path / "shapes"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=generate_shapes, args=(root, SPEC)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert _files(root) == _files(shapes_root)


def test_a_dataset_that_appears_while_it_is_looked_for_is_used(shapes_root, tmp_path, monkeypatch):
    root, look, looked = tmp_path / "shapes", once._identity_in, []

    def look_too_early(folder):
        found = look(folder)
        if not looked:
            shutil.copytree(shapes_root, root)  # by another process
        looked.append(found)
        return found

    monkeypatch.setattr(once, "_identity_in", look_too_early)
    generate_shapes(root, SPEC)
    assert looked[0] is None and looked[-1] is not None
    assert _files(root) == _files(shapes_root)


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"size": 8}, {"seed": -1}, {"size": 99.5}])
def test_impossible_parameters_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        ShapesSpec(**wrong)
