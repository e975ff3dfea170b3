"""What the figures of docs/evidence.md are measured with."""
