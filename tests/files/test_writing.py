"""A file that is written is whole, or the one before."""

import contextlib
import errno
import os
import stat

import pytest

from kn_detectron import InputError
from kn_detectron.files import (
    atomic_write,
    explained_write_errors,
    is_full_disk,
    remove_partial_files,
)


def test_it_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "model.pth"
    for content in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with atomic_write(str(path)) as file:
            file.write(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["model.pth"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_file_before(tmp_path, error):
    path = tmp_path / "model.pth"
    path.write_bytes(b"before")
    with pytest.raises(error):
        with atomic_write(str(path)) as file:
            file.write(b"half")
            raise error
    assert os.listdir(tmp_path) == ["model.pth"] and path.read_bytes() == b"before"


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A crash of the machine would else leave an empty file under the name."""
    sync, replace, done = os.fsync, os.replace, []

    def fsync(descriptor):
        sync(descriptor)
        status = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")

    def rename(*paths):
        replace(*paths)
        done.append("name")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    with atomic_write(str(tmp_path / "model.pth")) as file:
        file.write(b"whole")
    assert done == ["5 bytes", "name", "folder"]


@pytest.mark.parametrize("number, refused", [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_systems_that_do_not_sync_folders(tmp_path, monkeypatch, number, refused):
    """The file is complete then. An error of the disk is one."""
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "model.pth"
    with pytest.raises(OSError) if refused else contextlib.nullcontext():
        with atomic_write(str(path)) as file:
            file.write(b"whole")
    assert path.read_bytes() == b"whole"


def test_machines_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "annotations.json"
    with atomic_write(str(path)) as slow:
        slow.write(b"first ")
        with atomic_write(str(path)) as fast:
            fast.write(b"second")
        slow.write(b"half")
    assert os.listdir(tmp_path) == ["annotations.json"] and path.read_bytes() == b"first half"


@pytest.mark.parametrize("name", ["run", "run [1]"])
def test_only_what_killed_writes_left_is_removed(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    kept = ["model.pth", "notes.partial", "last_checkpoint"]
    for name in (*kept, "model.pth.0123abcd.partial", "last_checkpoint.0123abcd.partial"):
        (folder / name).touch()
    remove_partial_files(str(folder))
    assert sorted(os.listdir(folder)) == sorted(kept)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    path = str(tmp_path / "gone/model.pth")
    with pytest.raises(InputError, match="gone/model.pth cannot be written .*: make it."):
        with explained_write_errors(path, "make it."):
            with atomic_write(path):
                pass


def test_another_error_is_not_explained_away():
    with pytest.raises(RuntimeError, match="^a defect$"):
        with explained_write_errors("model.pth", "make room."):
            raise RuntimeError("a defect")


def test_an_error_without_a_number_is_told_too():
    with pytest.raises(InputError, match=r"a.png cannot be written \(no encoder\): make room."):
        with explained_write_errors("a.png", "make room."):
            raise OSError("no encoder")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS"])
def test_what_a_disk_says_that_takes_no_more(name):
    number = getattr(errno, name)
    assert is_full_disk(OSError(number, os.strerror(number)))
    assert not is_full_disk(OSError(errno.EACCES, os.strerror(errno.EACCES)))
