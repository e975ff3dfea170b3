import pytest

from kn_detectron import InputError
from kn_detectron.files import fetch


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("kn://nothing.pth", r"^kn://nothing.pth is not one of the released weights: .*\.$"),
        ("package://no_such/a.pth", "^package://no_such/a.pth .* not installed: install it with"),
        ("none.pth", r"^none.pth does not exist: give the path of a checkpoint\.$"),
        ("unknown://a.pth", r"^unknown://a.pth (cannot be downloaded|does not exist)"),
    ],
)
def test_each_fault_is_one_sentence(path, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence) as error:
        fetch(path)
    assert str(error.value).count(": give") <= 1


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(InputError, match="is a folder: give the path of a checkpoint in it"):
        fetch(str(tmp_path))
