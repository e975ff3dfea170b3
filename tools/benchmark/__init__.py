"""The parts of ``tools/benchmark.py``, which measures KN and the other norms side by side."""

import kn_detectron  # noqa: F401  # first, since it makes old versions of detectron2 importable

from .measure import measure_group
from .presets import PRESETS, WHATS, Group, make_groups
from .report import (
    describe_machine,
    draw_bars,
    draw_curves,
    format_group,
    format_summary,
    write_json,
)

__all__ = [
    "Group",
    "PRESETS",
    "WHATS",
    "describe_machine",
    "draw_bars",
    "draw_curves",
    "format_group",
    "format_summary",
    "make_groups",
    "measure_group",
    "write_json",
]
