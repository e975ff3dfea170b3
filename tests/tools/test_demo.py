import os

import pytest
from PIL import Image

from kn_detectron.data import ShapesSpec, generate_shapes

PICTURES = ("predictions.png", "curves.png", "gains.png")


@pytest.mark.parametrize("shapes", [False, True])
def test_demo_trains_evaluates_draws_and_does_nothing_twice(tmp_path, process, command, shapes):
    if shapes:
        # A dataset that is there is used: a smaller one than the demo would make.
        generate_shapes(tmp_path / "shapes", ShapesSpec(num_train=4, num_val=2, size=64))
    options = (
        *(["--shapes"] if shapes else []),
        "--output",
        tmp_path,
        "SOLVER.MAX_ITER",
        "2",
        "SOLVER.STEPS",
        "(1,)",
        "DATALOADER.NUM_WORKERS",
        "0",
        *(["MODEL.MASK_ON", "False"] if shapes else ["INPUT.MIN_SIZE_TEST", "96"]),
    )
    status, out, err = process("demo", *options)
    assert status == 0, err
    assert "Warning" not in err
    *_, last = out.strip().splitlines()
    assert last.startswith("box AP ") and (", mask AP " in last) != shapes
    for name in PICTURES if shapes else ("released.png", *PICTURES):
        assert name in out
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
    trained = (tmp_path / "model_final.pth").stat().st_mtime_ns

    status, out, err = command("demo", *options)
    assert status == 0, err
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == trained
    assert "Starting training" not in out
    assert out.strip().splitlines()[-1] == last
    if not shapes:  # from here on it is the same
        return

    # An evaluation that was made on the way, before the last checkpoint, is not shown for it.
    results = tmp_path / "inference" / "results.json"
    results.write_text(results.read_text().replace('"AP":', '"AP": 77.7, "not AP":'))
    os.utime(results, ns=(trained - 10**9, trained - 10**9))
    status, out, err = command("demo", *options)
    assert status == 0, err
    assert out.strip().splitlines()[-1] == last and "Starting training" not in out
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == trained

    longer = ["3" if option == "2" else option for option in options]
    status, out, err = command("demo", *longer)
    assert status == 0, err
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns > trained


def test_demo_says_what_is_wrong_in_a_sentence(tmp_path, command):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "holiday.jpg").touch()
    status, out, err = command("demo", "--shapes", "--output", tmp_path)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1
