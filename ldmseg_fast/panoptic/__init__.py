"""Panoptic maps: how they are stored, what their segments are, and how logits become one."""
