import pytest

from kn_detectron.errors import one_line


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("first\n  second."), "first second"),
        (KeyError("a key"), "a key"),
        (KeyError(), "KeyError"),
        (EOFError(), "EOFError"),
    ],
)
def test_one_line(error, text):
    assert one_line(error) == text
