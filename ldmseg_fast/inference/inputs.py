"""Checks what a pipeline is given, and converts it."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.config.values import update
from ldmseg_fast.data.pictures import (
    Picture,
    check_pixels,
    read_picture,
    rgb_of_image,
)
from ldmseg_fast.data.pixel_formats import scale
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.files import require_file
from ldmseg_fast.panoptic.annotations import has_surrogates
from ldmseg_fast.panoptic.format import check_ids

MAX_BATCH = 4096  # images that go through the networks at once
MAX_SEED = 2**63 - 1

_EXPECTED = "give PIL images, paths, or arrays [H, W, 3] of uint8, uint16 or bool"
_RANGES = {"uint8": 255, "uint16": 65535, "bool": 1}  # dtypes with a defined range: the largest value


def as_list(images: Any, name: str = "images") -> list[Any]:
    """Returns a list of images or maps, of one of them or of a sequence; an array [B, H, W, 3] is a sequence.

    Raises:
        ArgumentError: neither one nor a sequence; it is named.
    """
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (Image.Image, Picture, str, os.PathLike)):
        return [images]
    unordered = isinstance(images, (bytes, bytearray, dict, set, frozenset)) or hasattr(images, "read")
    if unordered or not isinstance(images, Iterable):
        raise ArgumentError(f"{name}: {_kind(images)}; give one image or a list of them")
    return list(images)


def check_images(images: Any) -> list[Any]:
    """Returns a list of images after checks that decode nothing.

    Args:
        images: one of PIL images of any mode with a defined range, paths, arrays or tensors [H, W, 3] of uint8, uint16
            or bool; or a sequence of these.

    Returns:
        PIL images, `Picture`s, paths, and arrays [H, W, 3].

    Raises:
        ArgumentError: the first that is none of these, named by its place.
        DataError: a path of something else than a file.
    """
    return [_checked(image, f"images[{index}]") for index, image in enumerate(as_list(images))]


def scaled_picture(image: Any, index: int, size: int, *, exif: bool, max_pixels: int) -> Picture:
    """Decodes an image that `check_images` has passed, and resizes it.

    Args:
        image: of `check_images`.
        index: its place, for errors.
        size: S.
        exif: whether files and PIL images are turned as their EXIF orientation says.
        max_pixels: of a file or PIL image.

    Returns:
        The picture, uint8 [S, S, 3], and the size that its map will have.

    Raises:
        ArgumentError: an image that cannot be decoded, or whose values have no defined range.
        DataError: the same of a file.
    """
    if isinstance(image, (str, os.PathLike)):
        path, image = image, read_picture(image, exif=exif, max_pixels=max_pixels)
        if image.frames:
            warnings.warn(f"{path}: more than one frame; the first is segmented", stacklevel=2)
    elif isinstance(image, Image.Image):
        try:
            rgb = rgb_of_image(image, f"images[{index}]", exif=exif, max_pixels=max_pixels)
        except DataError as error:
            raise ArgumentError(str(error)) from error
        image = Picture(rgb, (rgb.height, rgb.width))
    elif isinstance(image, np.ndarray):
        pixels = image if image.dtype == np.uint8 else scale(image, _RANGES[image.dtype.name])
        image = Picture(pixels, pixels.shape[:2])  # type: ignore[arg-type]
    return Picture(resize_image(image.pixels, size), image.size)


def _checked(image: Any, name: str) -> Any:
    if isinstance(image, (Image.Image, Picture)):
        return image
    if isinstance(image, (str, os.PathLike)):
        _check_path(image, name)
        return image
    if not hasattr(image, "__array__"):
        raise ArgumentError(f"{name}: {_kind(image)}; {_EXPECTED}")
    array = as_array(image, name)
    largest = _RANGES.get(array.dtype.name)  # in either byte order
    if largest is None or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ArgumentError(f"{name}: {array.dtype} of shape {array.shape}; {_cure(array)}")
    try:
        check_pixels(name, array.shape[1], array.shape[0], array.size)
    except DataError as error:
        raise ArgumentError(str(error)) from error
    return array


def as_array(values: Any, name: str) -> np.ndarray:
    """Returns the values [...] of an array or a tensor on any device as a NumPy array of the same dtype.

    Raises:
        ArgumentError: values that NumPy cannot hold; they are named.
    """
    try:
        return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # bfloat16, sparse or meta tensors
        kind = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else _kind(values)
        raise ArgumentError(f"{name}: {kind} has no NumPy array ({error}); {_EXPECTED}") from error


def _check_path(path: Any, name: str) -> None:
    try:
        require_file(path, DataError, "picture")
    except FileNotFoundError:
        raise ArgumentError(f"{name}: {str(path)!r:.200}: no such file; {_EXPECTED}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        if isinstance(error, DataError) and "\0" not in str(path):
            raise
        raise ArgumentError(f"{name}: {str(path)!r:.200}: no file ({error}); {_EXPECTED}") from None


def _cure(array: np.ndarray) -> str:
    if array.dtype.kind == "f":
        scaled = "np.rint(255 * image).astype(np.uint8)"
        return f"floats have no defined range: give {scaled} of values from 0 to 1; {_EXPECTED}"
    if array.ndim == 2:
        return f"give Image.fromarray(image) of a grey picture; {_EXPECTED}"
    if array.ndim == 3 and array.shape[0] == 3:
        return f"move the channels to the end, image.permute(1, 2, 0) of a tensor; {_EXPECTED}"
    return _EXPECTED


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def check_given(count: int, segmentations: Sequence[np.ndarray], known_masks: Sequence[np.ndarray]) -> None:
    """Checks that there are a map and a mask for each of `count` images.

    Args:
        count: of images.
        segmentations: integer ids [H, W].
        known_masks: bool [H, W].

    Raises:
        ArgumentError: the first map or mask that is none, named.
    """
    if not count == len(segmentations) == len(known_masks):
        raise ArgumentError(
            f"{count} images, {len(segmentations)} segmentations, {len(known_masks)} known_masks: give one each"
        )
    for index, (segmentation, known) in enumerate(zip(segmentations, known_masks)):
        try:
            check_ids(segmentation)
        except ValueError as error:
            raise ArgumentError(f"segmentations[{index}]: {error}") from None
        if known.dtype != np.bool_:
            raise ArgumentError(f"known_masks[{index}]: {known.dtype}, expected bool, True where the map is given")
        if segmentation.shape != known.shape:
            raise ArgumentError(
                f"segmentations[{index}] is {list(segmentation.shape)}, its known mask {list(known.shape)}: one size "
                f"expected"
            )


def given_categories(
    segments_info: Sequence[Sequence[Mapping[str, Any]]] | None, count: int, table: CategoryTable | None
) -> list[dict[int, int]]:
    """Reads what given segments are: for each image its ids, each with the number of its category.

    Args:
        segments_info: for each image entries with `id` and `category_id`; None: nothing is known.
        count: of images.
        table: of the model; None: it has no categories.

    Raises:
        ArgumentError: a model without categories, another number of images, or a category that the model does not have.
    """
    if segments_info is None:
        return [{} for _ in range(count)]
    if table is None:
        raise ArgumentError("segments_info: this model has no categories; leave it out")
    if not isinstance(segments_info, Sequence) or not all(isinstance(each, Sequence) for each in segments_info):
        raise ArgumentError("segments_info: a list of entries for each image expected")
    if len(segments_info) != count:
        raise ArgumentError(f"segments_info: of {len(segments_info)} images, {count} are given")
    number_of = {category.id: number for number, category in enumerate(table.categories, 1)}
    found: list[dict[int, int]] = []
    for at, segments in enumerate(segments_info):
        numbers = {}
        for entry in segments:
            known = isinstance(entry, Mapping) and all(type(entry.get(key)) is int for key in ("id", "category_id"))
            if not known or entry["category_id"] not in number_of:
                raise ArgumentError(
                    f"segments_info[{at}]: {entry!r:.120}: an id and a category_id of the model expected, one of "
                    f"{', '.join(f'{c.id} ({c.name})' for c in table.categories[:8])}, ..."
                )
            numbers[entry["id"]] = number_of[entry["category_id"]]
        found.append(numbers)
    return found


def check_sizes(pictures: Sequence[Picture], segmentations: Sequence[np.ndarray], first: int) -> None:
    """Checks maps against the sizes of their pictures.

    Args:
        pictures: of one batch.
        segmentations: integer ids [H, W].
        first: the place of the batch's first picture, for the error.

    Raises:
        ArgumentError: the first map that does not fit its picture, named.
    """
    for index, (picture, segmentation) in enumerate(zip(pictures, segmentations), start=first):
        if segmentation.shape != picture.size:
            raise ArgumentError(
                f"images[{index}] is {list(picture.size)}, its segmentation {list(segmentation.shape)}: one size "
                f"expected"
            )


def image_ids_of(count: int, image_ids: Sequence[int | str] | None) -> list[int | str]:
    """Returns the ids of `count` images, default 0, 1, 2, ...

    Raises:
        ArgumentError: another number of ids, or ids that are neither whole numbers nor text.
    """
    if image_ids is None:
        return [*range(count)]
    if isinstance(image_ids, (str, bytes)) or not isinstance(image_ids, Iterable):
        raise ArgumentError(f"image_ids={image_ids!r}: a list expected, one id an image")
    ids: list[int | str] = list(image_ids)
    if len(ids) != count:
        raise ArgumentError(f"image_ids: {len(ids)} ids for {count} images")
    for place, value in enumerate(ids):
        if not isinstance(value, (int, str, np.integer)) or (isinstance(value, str) and has_surrogates(value)):
            raise ArgumentError(f"image_ids[{place}]={value!r}: a whole number or text in UTF-8 expected")
    return ids


def check_count(name: str, value: Any, least: int, most: int) -> None:
    """Checks a whole number.

    Raises:
        ArgumentError: no whole number, or one outside least..most; it is named.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name}={value!r:.80}: a whole number expected") from None
    if isinstance(value, bool) or not least <= number <= most:
        shown = repr(value) if abs(number) < 10**30 else f"a number of {number.bit_length()} bits"
        raise ArgumentError(f"{name}={shown}: at least {least}, and at most {most}")


def check_thresholds(thresholds: Any) -> PostprocessConfig | None:
    """Checks thresholds of the post-processing, and returns them with 8.0 as 8 where a whole number is expected.

    Raises:
        ArgumentError: no PostprocessConfig.
        ConfigError: a threshold out of range; it is named.
    """
    if thresholds is None:
        return None
    if not isinstance(thresholds, PostprocessConfig):
        raise ArgumentError(f"thresholds: {_kind(thresholds)}; give a PostprocessConfig")
    given = asdict(thresholds)
    for name, value in given.items():
        if isinstance(value, str):  # what a command line gives, and `update` takes
            raise ArgumentError(f"thresholds.{name}={value!r:.80}: a number expected")
    return update(PostprocessConfig(), given, "thresholds.")


def batches_of(count: int, batch_size: int) -> list[slice]:
    """Cuts `count` images into batches; the last may be smaller.

    Raises:
        ArgumentError: a batch_size outside 1..MAX_BATCH.
    """
    check_count("batch_size", batch_size, 1, MAX_BATCH)
    return [slice(start, start + batch_size) for start in range(0, count, batch_size)]
