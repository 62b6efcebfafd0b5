"""Reads and generates COCO-panoptic folders.

Callers import the modules by name, so that those which do without torch do not load it.
"""
