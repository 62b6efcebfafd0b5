"""Checks what a pipeline is given, and converts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.errors import ArgumentError


def as_list(images: Any) -> list[Any]:
    """Returns a list of images or maps, of one of them or of a sequence; an array [B, H, W, 3] is a sequence."""
    if isinstance(images, (Image.Image, np.ndarray)) and not (isinstance(images, np.ndarray) and images.ndim == 4):
        return [images]
    return list(images)


def as_arrays(images: Any) -> list[np.ndarray]:
    """Converts one image, or a sequence of them, to uint8 arrays [H, W, 3].

    Args:
        images: PIL images of any mode, or uint8 arrays [H, W, 3].

    Raises:
        ArgumentError: the first that is neither, named by its place.
    """
    return [_as_array(image, index) for index, image in enumerate(as_list(images))]


def _as_array(image: Any, index: int) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ArgumentError(
            f"images[{index}]: {array.dtype} of shape {array.shape}; give PIL images or uint8 arrays [H, W, 3]"
        )
    return array


def image_ids_of(count: int, image_ids: Sequence[int | str] | None) -> list[int | str]:
    """Returns the ids of `count` images, default 0, 1, 2, ... Raises ArgumentError for another number of ids."""
    ids: list[int | str] = [*range(count)] if image_ids is None else list(image_ids)
    if len(ids) != count:
        raise ArgumentError(f"image_ids: {len(ids)} ids for {count} images")
    return ids


def batches_of(count: int, batch_size: int) -> list[slice]:
    """Cuts `count` images into batches; the last may be smaller. Raises ArgumentError for a batch_size below 1."""
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size}: at least 1")
    return [slice(start, start + batch_size) for start in range(0, count, batch_size)]
