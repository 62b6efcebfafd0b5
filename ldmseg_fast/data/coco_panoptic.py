"""Reads any COCO-panoptic folder as a torch data set of uint8 pictures and uint8 ids.

Bit planes are made on the device. An item carries dense ids (1 byte per pixel) and the table that turns them into
slots: `encode_mask_bits(segment_ids, num_bits, table)`.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.folders import find_split, load_picture, read_dense_map, read_image
from ldmseg_fast.data.item_cache import Item, ItemCache, category_type, item_bytes
from ldmseg_fast.data.packed import Packed
from ldmseg_fast.data.transforms import (
    Augmentation,
    color_jitter,
    compact_ids,
    crop_box,
    make_remap_table,
    paste,
    resize_ids,
    resize_image,
)
from ldmseg_fast.errors import ArgumentError, DataError, PanopticFormatError
from ldmseg_fast.panoptic.annotations import load_panoptic_json
from ldmseg_fast.panoptic.format import read_panoptic_png

__all__ = ["CocoPanoptic", "DataError", "collate"]


class CocoPanoptic(Dataset):
    """Gives one item per annotated map: an image annotated three times makes three items.

    `dataset[i]` is a dict:

    - image: uint8 [3, P, P], channels last in memory, resized by Pillow's bicubic without keeping the aspect; P is
      `picture_size`, by default S
    - segment_ids: uint8 [S, S], 0 is void and the segments that are there have the numbers 1..num_segments
    - table: uint8 [256], dense id -> slot in 1..num_slots-1 (see `make_remap_table`), 0 elsewhere
    - category_ids: uint8 [S, S], or int16 above 255 categories, after `use_categories`: what each pixel is, 0 void
    - num_segments: int; image_id: int or str; original_size: (H, W) in pixels

    With `train`, crowds and segments under `min_area` pixels of the original map become void. `augmentation` then crops
    at random before the resize, and after it pastes things of another item of the split, mirrors and changes colours.
    Of more than num_slots - 1 segments the largest stay: slot 0 is void.

    Random numbers are drawn from (seed, epoch, index), so items do not depend on workers or order. The epoch is the one
    of `set_epoch`, or the first of an (epoch, index) pair as `EpochSampler` gives. Without `train` it is always 0.

    `cache` keeps resized pictures and maps in memory: 3 P^2 + S^2 bytes an item, in each process that reads. It works
    best without worker processes, and it excludes random crops and pasting.

    `resize="torch"` is several times faster than Pillow's resize and differs from it by a grey level or two here and
    there.

    Raises:
        ArgumentError: a size, seed, number of slots or id assignment that cannot be, or a cache beside random crops or
            pasting.
        DataError: here, a missing folder, JSON, picture or map, or an empty split; on access, a file that cannot be
            read or does not match its annotation.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        size: int,
        *,
        train: bool = False,
        num_slots: int = 128,
        id_assignment: str = "random",
        min_area: int = 10,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache: bool = False,
        limit: int = 0,
        resize: str = "pillow",
        picture_size: int | None = None,
    ) -> None:
        self.picture_size = size if picture_size is None else picture_size
        if min(size, self.picture_size) < 1 or seed < 0:
            raise ArgumentError(f"size={size} must be positive and seed={seed} not negative")
        make_remap_table(np.zeros((1, 1), np.uint8), 0, num_slots, id_assignment, np.random.default_rng(0))
        self.root, self.split, self.size, self.train = Path(root), split, size, train
        self.num_slots, self.id_assignment, self.min_area, self.seed = num_slots, id_assignment, min_area, seed
        self.resize = resize
        self.augmentation = augmentation if augmentation is not None else Augmentation()
        if cache and train and (self.augmentation.crops or self.augmentation.paste):
            raise ArgumentError(
                "the cache keeps resized pictures, which cannot be cropped, nor things of them pasted: set "
                "cache=false, or scale_min=1, aspect_jitter=0 and paste=0"
            )
        self.folders = find_split(root, split)
        self._images, self._maps = str(self.folders.images), str(self.folders.maps)
        self.epoch = 0
        try:
            content = load_panoptic_json(self.folders.annotations)
        except PanopticFormatError as error:
            raise DataError(str(error)) from error
        self.categories: list[dict] = content["categories"]
        self._things = {category["id"] for category in self.categories if category.get("isthing", 1)}
        self._entries = Packed(self._join(content)[: limit or None])
        self.caches = cache
        self._cache: ItemCache | None = None  # made for the first item
        self._latents: Any = None
        self.name = ""  # among other sets
        self.class_agnostic = False  # its categories are left out: all void in `category_ids`
        self._numbers: dict[int, int] | None = None  # category id -> number
        self._num_categories = 0  # of the model

    def _join(self, content: dict) -> list[dict]:
        """Adds its picture's file name to each annotation.

        Raises:
            DataError: a file that is not there.
        """
        images = {image["id"]: image for image in content["images"]}
        entries = [
            {**annotation, "image_name": images[annotation["image_id"]]["file_name"]}
            for annotation in content["annotations"]
        ]
        self.folders.check_files(*([entry[key] for entry in entries] for key in ("image_name", "file_name")))
        return entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the cache out: a process that is handed the data set fills one of its own."""
        return vars(self) | {"_cache": None}

    def cache_bytes(self, num_categories: int = 0) -> int:
        """Tells how much memory the cache takes in each process that reads, once all items are in it; 0 without one."""
        if not self.caches:
            return 0
        return len(self) * item_bytes(self._cached_side, self.size, num_categories)

    @property
    def _cached_side(self) -> int:
        return self.picture_size if self._latents is None else 0

    def drop_cache(self) -> None:
        """Does without a cache from now on. Items stay the same."""
        self.caches, self._cache = False, None

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of plain integer indices. Call it before worker processes start."""
        self.epoch = epoch

    def image_id(self, index: int) -> int | str:
        """Returns the image id of an item as the JSON has it."""
        return self._entries[index]["image_id"]

    def image_name(self, index: int) -> str:
        """Returns the `file_name` of an item's picture as the JSON has it."""
        return self._entries[index]["image_name"]

    def paths(self, index: int) -> tuple[Path, Path]:
        """Returns the files of an item's picture and of its map."""
        entry = self._entries[index]
        return self.folders.images / entry["image_name"], self.folders.maps / entry["file_name"]

    def describe(self, index: int) -> str:
        """Names an item in messages, by its image id, picture and map."""
        picture, map_path = self.paths(index)
        return f"{self.image_id(index)!r} ({picture}, {map_path})"

    def check_size(self, index: int, picture: np.ndarray, ids: np.ndarray) -> None:
        """Checks that an item's picture, uint8 [H, W, 3], and map, int32 [H, W], are of one size.

        Raises:
            DataError: they are not; names the map.
        """
        self._check_sizes(self._entries[index], ids.shape, picture.shape[:2])  # type: ignore[arg-type]

    def load_image(self, index: int) -> np.ndarray:
        """Reads the picture of an item as it is stored: uint8 RGB [H, W, 3].

        Raises:
            DataError: see `load_picture`.
        """
        return read_image(self.folders.images / self._entries[index]["image_name"])

    def ground_truth(self, index: int) -> tuple[np.ndarray, list[dict]]:
        """Reads the map of an item as it is stored: ids int32 [H, W], 0 void, and its segments_info.

        No rule of training is applied: crowds, small segments and all slots are there.

        Raises:
            DataError: a map that is missing or damaged.
        """
        entry = self._entries[index]
        try:
            return read_panoptic_png(self.folders.maps / entry["file_name"]), entry["segments_info"]
        except (PanopticFormatError, OSError) as error:
            raise DataError(str(error)) from error

    def use_latents(self, latents: Any) -> None:
        """Makes items carry the latents of their picture in the place of the picture.

        `latents.read(file_name, flipped)` gives them. Items then have "image_latents", float16 [C, h, w], and their
        "image" is empty, [3, 0, 0].
        """
        self._latents, self._cache = latents, None

    def use_categories(self, table: CategoryTable) -> None:
        """Makes items carry `category_ids`, by the numbers of a model's categories.

        Raises:
            DataError: the split's categories do not fit the table; see `CategoryTable.numbers_of`.
        """
        if self.class_agnostic:
            self._numbers = {category["id"]: 0 for category in self.categories}
        else:
            self._numbers = table.numbers_of(self.categories, str(self.folders.annotations))
        self._num_categories, self._cache = len(table), None

    def segments_info(self, index: int) -> list[dict]:
        """Returns the `segments_info` of an item as the JSON has it."""
        return self._entries[index]["segments_info"]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")  # IndexError is what ends a plain for loop
        entry = self._entries[index]
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch if self.train else 0, index]))
        if self.caches and self._cache is None:
            self._cache = ItemCache(len(self), self._cached_side, self.size, self._num_categories)
        found = None if self._cache is None else self._cache.get(index)
        if found is None:
            found = self._decoded_item(entry, rng)
            if self._cache is not None:
                self._cache.put(index, found)
        rgb, segment_ids, category_ids, num_segments, original_size = found
        flipped = self.train and rng.random() < self.augmentation.flip
        if flipped:
            segment_ids = np.ascontiguousarray(segment_ids[:, ::-1])
            category_ids = None if category_ids is None else np.ascontiguousarray(category_ids[:, ::-1])
        if self.train and self.augmentation.color_jitter > 0:
            rgb = color_jitter(rgb, self.augmentation.color_jitter, rng)
        table = make_remap_table(segment_ids, num_segments, self.num_slots, self.id_assignment, rng)
        shared = self._cache is not None  # what is in the cache must not be handed out
        item = {
            "image": _picture(rgb, flipped, copied=shared),
            "segment_ids": torch.from_numpy(segment_ids.copy() if shared else segment_ids),
            "table": torch.from_numpy(table),
            "num_segments": num_segments,
            "image_id": entry["image_id"],
            "original_size": original_size,
        }
        if category_ids is not None:
            item["category_ids"] = torch.from_numpy(category_ids.copy() if shared else category_ids)
        if self._latents is not None:
            item["image_latents"] = self._latents.read(entry["image_name"], flipped)
        return item

    def _decoded_item(self, entry: dict, rng: np.random.Generator) -> Item:
        """Decodes an item, voids crowds and crumbs, crops, resizes and pastes."""
        rgb, dense, box = self._decode(entry, rng)
        small, segments = resize_ids(dense, self.size, box), entry["segments_info"]
        if self.train and self.augmentation.paste and rng.random() < self.augmentation.paste:
            rgb, small, segments = self._paste(rgb, small, segments, rng)
        segment_ids, num_segments = compact_ids(small, self.num_slots - 1)
        height, width = dense.shape
        return rgb, segment_ids, self._category_ids(segments, small, segment_ids), num_segments, (height, width)

    def _decode(
        self, entry: dict, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int] | None]:
        """Reads an item: its picture, cropped and resized, uint8 [P, P, 3], its dense map [H, W], and the crop."""
        picture = None
        if self._latents is None:
            picture = load_picture(os.path.join(self._images, entry["image_name"]))  # noqa: PTH118 (as for the map)
        dense = self._dense_map(entry)
        height, width = dense.shape
        if picture is not None:
            found = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
            self._check_sizes(entry, (height, width), found)
        box, augmentation = None, self.augmentation
        if self.train and augmentation.crops:
            box = crop_box(height, width, augmentation.scale_min, rng, augmentation.aspect_jitter)
        if picture is None:
            rgb = np.zeros((0, 0, 3), np.uint8)
        elif self.resize == "torch":
            rgb = _resize_fast(picture, self.picture_size, box)
        else:
            rgb = resize_image(picture, self.picture_size, box)
        return rgb, dense, box

    def _paste(
        self, rgb: np.ndarray, ids: np.ndarray, segments: list[dict], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, list[dict]]:
        """Pastes about half of the things of another item; its segments follow `segments`."""
        entry = self._entries[int(rng.integers(len(self)))]
        other, dense, box = self._decode(entry, rng)
        fine, coarse = resize_ids(dense, self.picture_size, box), resize_ids(dense, self.size, box)
        if rng.random() < self.augmentation.flip:
            other, fine, coarse = (np.ascontiguousarray(array[:, ::-1]) for array in (other, fine, coarse))
        found = entry["segments_info"]
        chosen = rng.random(len(found)) < 0.5
        chosen &= [segment["category_id"] in self._things for segment in found]
        places = np.zeros(len(found) + 1, np.int32)
        places[1:] = np.where(chosen, np.arange(len(found)) + len(segments) + 1, 0)
        return *paste(rgb, ids, other, (fine, coarse), places), [*segments, *found]

    def _category_ids(self, segments: list[dict], dense: np.ndarray, segment_ids: np.ndarray) -> np.ndarray | None:
        """Looks up the categories of a dense map [S, S], void wherever `segment_ids` [S, S] is."""
        if self._numbers is None:
            return None
        numbers = [0, *(self._numbers[segment["category_id"]] for segment in segments)]
        dtype = category_type(self._num_categories)
        return np.where(segment_ids > 0, np.array(numbers, dtype)[dense], 0).astype(dtype)

    def _dense_map(self, entry: dict) -> np.ndarray:
        path = os.path.join(self._maps, entry["file_name"])  # noqa: PTH118 (joining Paths takes as long as decoding)
        segments = entry["segments_info"]
        try:
            return read_dense_map(
                path,
                [segment["id"] for segment in segments],
                crowd=[self.train and bool(segment.get("iscrowd", 0)) for segment in segments],
                min_area=self.min_area if self.train else 0,
            )
        except (PanopticFormatError, OSError) as error:
            raise DataError(str(error)) from error
        except ValueError as error:
            raise DataError(f"{path}: {error}; `ldmseg data check {self.root}` lists all such ids") from error

    def _check_sizes(self, entry: dict, size: tuple[int, int], picture: tuple[int, int]) -> None:
        """Raises DataError where the map's `size` is not its `picture`'s, (height, width) each."""
        if picture == size:
            return
        turned = picture == size[::-1]
        raise DataError(
            f"{self.folders.maps / entry['file_name']}: the map is {size[1]}x{size[0]}, its picture "
            f"{picture[1]}x{picture[0]}"
            + (": was one of them rotated? COCO maps follow the stored pixels, not EXIF" if turned else "")
        )


def _resize_fast(picture: np.ndarray | Image.Image, size: int, box: tuple[int, int, int, int] | None) -> np.ndarray:
    """Resizes as `resize_image` does, but with torch's integer arithmetic.

    Few pixels of thousands are more than two grey levels apart from it.
    """
    left, top, right, bottom = box or (0, 0, None, None)
    pixels = torch.from_numpy(np.array(picture)[top:bottom, left:right]).permute(2, 0, 1)[None]
    small = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return small[0].permute(1, 2, 0).numpy()


def _picture(rgb: np.ndarray, flipped: bool, copied: bool) -> torch.Tensor:
    """Turns uint8 [P, P, 3] into [3, P, P], channels last in memory, which torch mirrors faster than numpy."""
    picture = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    return (picture.flip(-1) if flipped else picture.clone() if copied else picture)[0]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks items into a batch.

    Returns:
        image uint8 [B, 3, P, P] in channels_last, segment_ids uint8 [B, S, S], table uint8 [B, 256], num_segments
        int64 [B], and where items have them category_ids [B, S, S] and image_latents float16 [B, C, h, w]. image_id and
        original_size stay lists.
    """
    stacked = [key for key in ("segment_ids", "category_ids", "table", "image_latents") if key in items[0]]
    batch: dict[str, Any] = {key: torch.stack([item[key] for item in items]) for key in stacked}
    batch["image"] = torch.stack([item["image"].permute(1, 2, 0) for item in items]).permute(0, 3, 1, 2)
    batch["num_segments"] = torch.tensor([item["num_segments"] for item in items])
    for key in ("image_id", "original_size"):
        batch[key] = [item[key] for item in items]
    return batch
