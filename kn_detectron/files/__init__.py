"""Files: fetched, read without trusting them, and written so that they are never half there."""

from .containers import read_container, unreadable_type
from .fetching import fetch
from .tensors import check_variances, checked_tensors
from .wrapping import is_numeric, renamed, unwrapped_content, unwrapped_names, without_wrappers
from .writing import (
    atomic_write,
    explained_full_disk,
    explained_write_errors,
    is_full_disk,
    remove_partial_files,
)

__all__ = [
    "atomic_write",
    "check_variances",
    "checked_tensors",
    "explained_full_disk",
    "explained_write_errors",
    "fetch",
    "is_full_disk",
    "is_numeric",
    "read_container",
    "remove_partial_files",
    "renamed",
    "unreadable_type",
    "unwrapped_content",
    "unwrapped_names",
    "without_wrappers",
]
