"""Holds panoptic maps: their files, shapes of segments, post-processing and results."""
