"""Reads the forms in which people hold panoptic maps in memory, image by image and batch by batch.

A side of `PanopticQuality.update` may be:

- {"segmentation": map, "segments_info": [...]}: what transformers' `post_process_panoptic_segmentation` returns. Ids of
  -1 are void; where a segment has the id 0, it is one. A segment's category is `category_id` or `label_id`.
- the same with a batch: maps [B, H, W] and a list of lists.
- (map, segments_info), a tuple.
- an array [..., H, W, 2] of (category, instance): torchmetrics' form. All pixels of one stuff category are one segment.
- a list of COCO annotations with `category_id` and `segmentation` (RLE or polygons), or {"annotations": [...]} with
  `height` and `width`, for which no PNG is needed. `metrics.mask_maps` has the rule of overlaps.
- an array [H, W] or [B, H, W] of ids alone, where categories do not count.
- a list, generator or data set of images in these forms. A row of a Hugging Face data set is one: its map may stand in
  the column `segmentation`, `panoptic_map`, `panoptic`, `label`, `mask` or `annotation`.

A map is a numpy array, a tensor, a PIL picture or the path of a PNG: ids [H, W], or RGB [H, W, 3] uint8 with
R + 256 G + 65536 B. Tensors and pictures are known by what they can do; neither library is imported.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.mask_maps import paint_masks, size_of_masks
from ldmseg_fast.panoptic.format import check_ids, read_panoptic_png, rgb_to_ids

MAP_KEYS = ("segmentation", "panoptic_map", "panoptic", "label", "mask", "annotation")

Segments = list[dict[str, Any]]
Size = tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    """Holds one image of one side.

    Attributes:
        size: (H, W); None where polygons do not tell it.
        read: makes ids int32 [H, W] and segments; it is given the other side's size.
        image_id: of the row, None where it has none.
    """

    size: Size | None
    read: Callable[[Size | None], tuple[np.ndarray, Segments]]
    image_id: int | str | None = None


class FormReader:
    """Reads all forms.

    Args:
        categories: COCO entries by id.
        class_agnostic: segments need no category.
        void: category numbers that mean void where no category has them.
    """

    def __init__(
        self, categories: Mapping[int, Mapping[str, Any]], class_agnostic: bool = False, void: Collection[int] = (-1, 0)
    ) -> None:
        self.categories, self.class_agnostic = categories, class_agnostic
        self.void = [number for number in void if class_agnostic or number not in categories]

    def pictures(self, value: Any, side: str) -> Iterator[Picture]:
        """Yields the images of a value.

        Raises:
            PanopticFormatError: a form that is none of these; it names the side.
        """
        if isinstance(value, tuple) and len(value) == 2 and _is_map(value[0]) and not _is_map(value[1]):
            value = {"segmentation": value[0], "segments_info": value[1]}
        if isinstance(value, Mapping):
            yield from self._of_mapping(value, side)
        elif _is_map(value):
            yield from self._of_array(_array(value, side), side)
        elif _is_annotations(value):
            yield self._of_annotations(value, None, None, side)
        elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
            for image in value:
                if isinstance(image, list | tuple) and len(image) == 0:  # of a batch: an image without annotations
                    yield self._of_annotations([], None, None, side)
                else:
                    yield from self.pictures(image, side)
        else:
            raise PanopticFormatError(
                f"{side}: a {type(value).__name__} is no panoptic map; give a map with `segments_info`, an array of "
                "(category, instance), or COCO annotations"
            )

    def _of_mapping(self, row: Mapping[str, Any], side: str) -> Iterator[Picture]:
        image_id = row.get("image_id")
        image_id = int(image_id) if isinstance(image_id, np.integer) else image_id
        image_id = image_id if isinstance(image_id, int | str) else None
        if "annotations" in row:
            size = None
            if row.get("height") is not None and row.get("width") is not None:
                size = (row["height"], row["width"])
                if not all(_is_whole(side_length) and 1 <= side_length <= 65536 for side_length in size):
                    raise PanopticFormatError(
                        f"{side}: `height` and `width` must be whole numbers from 1 to 65536, got {size!r:.80}"
                    )
            yield self._of_annotations(row["annotations"], size, image_id, side)
            return
        key = next((key for key in MAP_KEYS if key in row and _is_map(row[key])), None)
        if key is None:
            if "segmentation" in row and "category_id" in row:
                raise PanopticFormatError(
                    f"{side}: one annotation is no image; give the list of an image's annotations"
                )
            raise PanopticFormatError(
                f"{side}: no map among the keys {', '.join(map(str, row))[:200]}; call it one of {', '.join(MAP_KEYS)}"
            )
        array, segments = _array(row[key], side), row.get("segments_info")
        if segments is None:
            pictures = list(self._of_array(array, side))
            if len(pictures) == 1 and image_id is not None:
                pictures = [Picture(pictures[0].size, pictures[0].read, image_id)]
            yield from pictures
        elif array.ndim == 3 and not _is_rgb(array):
            if len(array) != len(segments) or not all(isinstance(each, Sequence) for each in segments):
                raise PanopticFormatError(
                    f"{side}: {len(array)} maps need as many lists of segments, got {len(segments)} entries"
                )
            for ids, listed in zip(array, segments):
                yield self._of_map(ids, listed, None, side)
        else:
            yield self._of_map(rgb_to_ids(array) if _is_rgb(array) else array, segments, image_id, side)

    def _of_array(self, array: np.ndarray, side: str) -> Iterator[Picture]:
        if array.ndim >= 3 and array.shape[-1] == 2:
            for channels in array.reshape(-1, *array.shape[-3:]):
                yield self._of_channels(channels, side)
        elif self.class_agnostic and array.ndim in (2, 3) and array.dtype != object:
            maps = rgb_to_ids(array)[None] if _is_rgb(array) else array.reshape(-1, *array.shape[-2:])
            for ids in maps:
                listed = [{"id": number} for number in np.unique(ids).tolist() if number > 0]
                yield self._of_map(ids, listed, None, side)
        else:
            raise PanopticFormatError(
                f"{side}: an array {list(array.shape)} {array.dtype} has no categories; give its `segments_info`, or "
                "[..., H, W, 2] of (category, instance)"
            )

    def _of_map(self, ids: np.ndarray, segments: Any, image_id: int | str | None, side: str) -> Picture:
        def read(_: Size | None) -> tuple[np.ndarray, Segments]:
            if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
                raise PanopticFormatError(f"{side}: expected integer ids [H, W], got {list(ids.shape)} {ids.dtype}")
            listed = [self._segment(segment, place, side) for place, segment in enumerate(_listed(segments, side))]
            wide = ids
            if any(segment["id"] == 0 for segment in listed):  # counted from 0, and void is -1
                wide = ids.astype(np.int64) + 1
                listed = [segment | {"id": segment["id"] + 1} for segment in listed]
            elif ids.min() == -1:
                wide = np.where(ids == -1, 0, ids)
            try:
                return check_ids(wide).astype(np.int32), listed
            except PanopticFormatError as error:
                raise PanopticFormatError(f"{side}: {error}") from None

        return Picture(ids.shape, read, image_id)

    def _segment(self, segment: Any, place: int, side: str) -> dict[str, Any]:
        number = segment.get("id") if isinstance(segment, Mapping) else None
        if number is None or not _is_whole(number):
            raise PanopticFormatError(f"{side}: segments_info[{place}] has no usable `id`, got {segment!r:.80}")
        category = 1 if self.class_agnostic else segment.get("category_id", segment.get("label_id"))
        if not _is_whole(category):
            raise PanopticFormatError(
                f"{side}: segment {number} has no usable `category_id` or `label_id`, got {category!r:.80}"
            )
        return {
            "id": int(number),
            "category_id": int(category),
            "iscrowd": _crowd(segment, f"{side}: segment {number}"),
        }

    def _of_channels(self, channels: np.ndarray, side: str) -> Picture:
        def read(_: Size | None) -> tuple[np.ndarray, Segments]:
            if channels.dtype.kind not in "iu" or channels.size == 0:
                raise PanopticFormatError(
                    f"{side}: expected integers (category, instance), got {list(channels.shape)} {channels.dtype}"
                )
            wide = channels.astype(np.int64)
            category, instance = wide[..., 0], wide[..., 1]
            stuff = [number for number, entry in self.categories.items() if entry.get("isthing", 1) != 1]
            if not self.class_agnostic and stuff:
                instance = np.where(np.isin(category, stuff), 0, instance)
            pairs, ids = np.unique(np.stack([category.ravel(), instance.ravel()]), axis=1, return_inverse=True)
            numbers = np.zeros(pairs.shape[1], np.int32)
            kept = ~np.isin(pairs[0], self.void)
            numbers[kept] = np.arange(1, kept.sum() + 1)
            segments = [
                {"id": place, "category_id": 1 if self.class_agnostic else number, "iscrowd": 0}
                for place, number in enumerate(pairs[0][kept].tolist(), 1)
            ]
            if not self.class_agnostic and (unseen := {s["category_id"] for s in segments} - self.categories.keys()):
                raise PanopticFormatError(
                    f"{side}: category ids {sorted(unseen)} are not among the categories, nor void "
                    f"({', '.join(map(str, self.void)) or 'none'})"
                )
            return numbers[ids.ravel()].reshape(category.shape), segments

        return Picture(channels.shape[:2], read)

    def _of_annotations(self, annotations: Any, size: Size | None, image_id: int | str | None, side: str) -> Picture:
        def where(place: int) -> str:
            return f"{side}: annotation {place}"

        listed = _listed(annotations, side)
        for place, annotation in enumerate(listed):
            if not isinstance(annotation, Mapping) or "segmentation" not in annotation:
                raise PanopticFormatError(f"{where(place)} has no `segmentation`, got {annotation!r:.80}")
        masks = [annotation["segmentation"] for annotation in listed]
        known = size_of_masks(masks, where) if size is None else size

        def read(other: Size | None) -> tuple[np.ndarray, Segments]:
            final = known or other
            if final is None:
                raise PanopticFormatError(f"{side}: polygons do not tell the image's size; give `height` and `width`")
            segments = [
                self._segment({"id": place + 1} | dict(annotation) | {"id": place + 1}, place, side)
                for place, annotation in enumerate(listed)
            ]
            things = [
                not segment["iscrowd"] and self.categories.get(segment["category_id"], {}).get("isthing", 1) == 1
                for segment in segments
            ]
            painted = paint_masks(masks, things, (final[0], final[1]), where)
            return painted.ids(), [segment for place, segment in enumerate(segments) if place not in set(painted.gone)]

        return Picture(known, read, image_id)


def _is_map(value: Any) -> bool:
    """Tells whether a value is an array, a tensor, a PIL picture or a path."""
    if isinstance(value, str | os.PathLike):
        return str(os.fspath(value)).lower().endswith(".png")
    return isinstance(value, np.ndarray) or (
        (hasattr(value, "detach") or hasattr(value, "getbands") or hasattr(value, "__array__"))
        and not isinstance(value, Mapping)
    )


def _is_annotations(value: Any) -> bool:
    """Tells whether a value is the annotations of one image."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(each, Mapping) and "segmentation" in each and "segments_info" not in each for each in value)
        and all(isinstance(each["segmentation"], Mapping | list | tuple) for each in value)
    )


def _array(value: Any, side: str) -> np.ndarray:
    if isinstance(value, str | os.PathLike):
        return read_panoptic_png(os.fspath(value))
    if hasattr(value, "detach"):  # a tensor, wherever it lies
        if value.is_floating_point():  # numpy has no bfloat16
            raise PanopticFormatError(f"{side}: expected integer ids, got {value.dtype}; convert the tensor to int32")
        value = value.detach().cpu().numpy()
    elif hasattr(value, "getbands") and value.mode not in ("RGB", "P", "L", "I", "I;16"):
        raise PanopticFormatError(f"{side}: a picture of mode {value.mode} is no map of ids; RGB, P, L and I are")
    return np.asarray(value)


def _is_rgb(array: np.ndarray) -> bool:
    return array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and -1 <= int(value) < 2**31


def _crowd(segment: Mapping[str, Any], where: str) -> int:
    crowd = segment.get("iscrowd", 0)
    if not isinstance(crowd, int | np.integer | float | None) or crowd not in (None, 0, 1):
        raise PanopticFormatError(f"{where}: `iscrowd` must be 0 or 1, got {crowd!r:.80}")
    return int(crowd or 0)


def _listed(entries: Any, side: str) -> list[Any]:
    """Turns the entries of one image into a list; data sets hold them as an object of lists, too."""
    if isinstance(entries, Mapping):
        if len({len(column) for column in entries.values() if isinstance(column, Sequence)}) != 1:
            raise PanopticFormatError(f"{side}: `segments_info` must be a list, got {entries!r:.80}")
        return [dict(zip(entries, row)) for row in zip(*entries.values())]
    if isinstance(entries, str | bytes) or not isinstance(entries, Iterable):
        raise PanopticFormatError(f"{side}: expected a list of segments, got {entries!r:.80}")
    return list(entries)
