"""The experiments that docs/evidence.md reports."""
