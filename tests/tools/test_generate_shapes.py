def test_it_writes_a_folder(tmp_path, process):
    sizes = ("--num-train", "5", "--num-val", "5", "--size", "32")
    status, out, err = process("generate_shapes", tmp_path / "new", *sizes)
    assert status == 0, err
    assert len(list((tmp_path / "new").rglob("*.png"))) == 10


def test_a_fault_is_a_sentence(tmp_path, command):
    status, out, err = command("generate_shapes", tmp_path / "new", "--size", "8")
    assert status == 1
    assert err.startswith("error: size of the single shapes is 8") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_to_is_a_sentence(tmp_path, command):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "new", "/proc/none"):
        status, out, err = command("generate_shapes", place, "--num-train", "5", "--num-val", "5")
        assert status == 1
        assert err.startswith(f"error: {place} cannot be written (") and err.count("\n") == 1
