"""What the tests of training have too."""

from ..engine.conftest import kn_log  # noqa: F401
