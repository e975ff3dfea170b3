"""Tests on real COCO images: `make test-coco`."""
