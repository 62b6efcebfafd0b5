"""Measures panoptic quality, mIoU and inpainting, and segments without a model for comparison."""
