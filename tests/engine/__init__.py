"""Tests; importing the package first lets an older detectron2 be imported."""

import kn_detectron  # noqa: F401
