"""What running the commands in this process needs."""

from ..engine.conftest import fresh_logs  # noqa: F401
