"""Reads and writes COCO-panoptic folders as a format among others."""

from ldmseg_fast.formats.coco_panoptic_reader import read
from ldmseg_fast.formats.coco_panoptic_writer import write

__all__ = ["read", "write"]
