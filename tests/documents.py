"""Reads the documents: their prose, their blocks of code, and the commands in these."""

import re
import shlex
from pathlib import Path
from typing import Iterator, List, NamedTuple

ROOT = Path(__file__).parents[1]
NAMES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "docs/evidence", "kn_detectron/model_zoo/configs")
    for path in (ROOT / folder).glob("*.md")
)

# Names that stand for one of several, and one of them.
_PLACEHOLDERS = {"NORM": "KN", "CONFIG": "R50_C4_KN"}


class Block(NamedTuple):
    """A block of code.

    Attributes:
        language: what stands behind its fence: "python", "yaml", "sh" for commands that run as they
            stand, or nothing.
        line: where it begins.
        code: its text.
    """

    language: str
    line: int
    code: str


def read(name: str) -> str:
    """The text of a document."""
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """The text of a document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL)


def blocks(name: str) -> List[Block]:
    """The blocks of code of a document, in their order."""
    text = read(name)
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], text[: m.start()].count("\n") + 1, m[2]) for m in found]


def commands(code: str) -> Iterator[List[str]]:
    """The calls of python and make in a block, each as its words, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith(("python ", "make ")):
            words = shlex.split(line, comments=True)
            yield [word for w in words for word in _expanded(_filled(w))]


def _filled(word: str) -> str:
    for name, value in _PLACEHOLDERS.items():
        word = re.sub(rf"(?<![A-Z.]){name}(?![A-Z])", value, word)
    return word


def _expanded(word: str) -> List[str]:
    """``a{b,c}d`` as a shell expands it."""
    found = re.fullmatch(r"(.*)\{(\w+(?:,\w+)+)\}(.*)", word)
    if not found:
        return [word]
    return [found[1] + part + found[3] for part in found[2].split(",")]
