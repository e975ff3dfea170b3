import json

from evidence.hold_out import hold_out


def test_every_fifth_photo_is_held_out(tmp_path):
    folder, output = tmp_path / "all", tmp_path / "split"
    (folder / "annotations").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "train" / "0.jpg").write_bytes(b"photo")
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(11)],
        "annotations": [{"id": i, "image_id": 10 + i // 2} for i in range(22)],
        "categories": [{"id": 1}],
    }
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    hold_out(folder, output)
    parts = [
        json.loads((output / "annotations" / f"instances_{split}.json").read_text())
        for split in ("train", "val")
    ]
    assert [i["id"] for i in parts[1]["images"]] == [10, 15, 20]
    for key in ("images", "annotations"):
        both = [entry["id"] for part in parts for entry in part[key]]
        assert sorted(both) == [entry["id"] for entry in content[key]]
    for part in parts:
        assert part["categories"] == content["categories"]
        there = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} == there
    assert (output / "val" / "0.jpg").read_bytes() == b"photo"
