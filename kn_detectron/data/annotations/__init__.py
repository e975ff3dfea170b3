"""Annotation files in COCO's format: checked in one pass, mended where the meaning is clear."""

from .check import Truth, Uses, check_annotations

__all__ = ["Truth", "Uses", "check_annotations"]
