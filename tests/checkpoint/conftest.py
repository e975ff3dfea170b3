"""What the tests of training have too."""

from ..engine.conftest import fresh_logs, kn_log  # noqa: F401
