"""Panoptic quality, mIoU and the inpainting protocol."""
