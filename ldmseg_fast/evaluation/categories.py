"""Gives categories for class-aware evaluation: the model's own, or read from a foreign source.

Foreign sources are the ground truth, semantic PNGs, and panoptic results.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import read_file
from ldmseg_fast.metrics.class_vote import category_map, merge_stuff, vote_categories
from ldmseg_fast.metrics.pq_files import png_folder, why_missing
from ldmseg_fast.panoptic.annotations import MAX_ID, load_panoptic_json
from ldmseg_fast.panoptic.format import read_panoptic_png
from ldmseg_fast.panoptic.near_files import NearFiles, missing_files
from ldmseg_fast.panoptic.results import PanopticResult

GROUND_TRUTH = "GT"
MODEL_ITSELF = "the model"
UNLABELLED = {0, 255, 65535}  # void in a semantic PNG, unless it is the id of a category


@dataclass(frozen=True)
class CategorySource:
    """Gives categories to the segments of results.

    Attributes:
        label: its name in the report.
        upper_bound: whether it is the ground truth.
        dataset: the split.
        read: from an index of the split to category ids int32 [H, W], 0 = void.
        files: from an index to the files beside picture and map that `read` reads.
        listing: the JSON that lists such files; None where there is none.
    """

    label: str
    upper_bound: bool
    dataset: CocoPanoptic
    read: Callable[[int], np.ndarray]
    files: Callable[[int], Sequence[Path]] = lambda index: ()
    listing: Path | None = None

    def vote(self, index: int, result: PanopticResult) -> PanopticResult:
        """Gives each segment the category that most of its pixels have.

        Segments without a vote become void, those of one stuff category become one.

        Raises:
            DataError: categories of another size than the result.
        """
        categories = self.read(index)
        if categories.shape != result.segmentation.shape:
            sizes = " and ".join(f"{w}x{h}" for h, w in (categories.shape, result.segmentation.shape))
            raise DataError(
                f"categories from {self.label}, image {self.dataset.image_id(index)}: they and its map are {sizes}; "
                "sizes must be equal"
            )
        ids, segments = vote_categories(result.segmentation, result.segments_info, categories)
        things = {category["id"]: bool(category.get("isthing", 1)) for category in self.dataset.categories}
        segments = [
            {**s, "label_id": s["category_id"], "isthing": things[s["category_id"]], "iscrowd": 0} for s in segments
        ]
        return PanopticResult(*merge_stuff(ids, segments, {key for key, thing in things.items() if not thing}))


@dataclass(frozen=True)
class ModelCategories(CategorySource):
    """Takes the categories that the model gives, under the data set's ids.

    Attributes:
        ids: the model's category ids, each with the data set's.
    """

    ids: Mapping[int, int] = field(default_factory=dict)

    def vote(self, index: int, result: PanopticResult) -> PanopticResult:
        """Returns a result of `translate` as it is."""
        return result

    def translate(self, result: PanopticResult) -> PanopticResult:
        """Gives the segments the data set's category ids. What the data set has no category for becomes void."""
        kept = [s for s in result.segments_info if s["category_id"] in self.ids]
        named = [s | {"category_id": self.ids[s["category_id"]], "label_id": self.ids[s["category_id"]]} for s in kept]
        if len(kept) == len(result.segments_info):
            return PanopticResult(result.segmentation, named)
        inside = np.isin(result.segmentation, [s["id"] for s in kept])
        return PanopticResult(np.where(inside, result.segmentation, 0), named)


def model_categories(table: CategoryTable, dataset: CocoPanoptic) -> ModelCategories:
    """Matches a model's categories with those of a split, by name.

    Raises:
        DataError: the split has a category that the model lacks; see `CategoryTable.numbers_of`.
    """
    source = str(dataset.folders.annotations)
    try:
        numbers = table.numbers_of(dataset.categories, source)
    except DataError as error:
        raise DataError(f"{error}; or evaluate with --class-agnostic") from None
    ids = {table[number].id: category_id for category_id, number in numbers.items()}
    return ModelCategories(MODEL_ITSELF, False, dataset, lambda index: np.zeros((0, 0), np.int32), ids=ids)


def without_categories(result: PanopticResult) -> PanopticResult:
    """Makes every segment of a result the one category of class-agnostic results."""
    usual = {"category_id": 1, "label_id": 1, "isthing": True}
    return PanopticResult(result.segmentation, [segment | usual for segment in result.segments_info])


def category_source(name: str, dataset: CocoPanoptic) -> CategorySource:
    """Opens a source: "GT", a folder of semantic PNGs, or the JSON of COCO panoptic results.

    Every file has to be there.

    Raises:
        DataError: a data set without categories or with ids that a map cannot hold, no such folder, or pictures
            without a file in it, named.
        PanopticFormatError: a JSON that is none.
    """
    if len(dataset.categories) < 2:
        found = ", ".join(str(category.get("name", category["id"])) for category in dataset.categories) or "none"
        raise DataError(
            f"{dataset.folders.annotations}: --class-aware needs categories, and it lists {found}; "
            "evaluate without it, or a split whose JSON has them"
        )
    _check_category_ids(dataset)
    if name == GROUND_TRUTH:
        label = "the ground truth (upper bound)"
        return CategorySource(label, True, dataset, lambda index: category_map(*dataset.ground_truth(index)))
    path = Path(name)
    if path.is_dir():
        return _semantic_source(path, dataset)
    if path.is_file():
        return _panoptic_source(path, dataset)
    raise DataError(f"--class-aware {name}: give GT, a folder of semantic PNGs, or the JSON of panoptic results")


def _check_category_ids(dataset: CocoPanoptic) -> None:
    """Raises DataError for segments of a category that a map of categories cannot hold, in which 0 is void."""
    outside = {category["id"] for category in dataset.categories if not 1 <= category["id"] <= MAX_ID}
    for index in range(len(dataset)) if outside else ():
        if wrong := outside & {segment["category_id"] for segment in dataset.segments_info(index)}:
            raise DataError(
                f"{dataset.folders.annotations}: image {dataset.image_id(index)!r} has the category {min(wrong)}, and "
                f"--class-aware needs ids in 1..{MAX_ID}; number the categories otherwise, or evaluate without it"
            )


def _semantic_source(folder: Path, dataset: CocoPanoptic) -> CategorySource:
    present = {path.name for path in folder.iterdir()}
    files, lost = [], []
    for index in range(len(dataset)):
        picture, truth = dataset.paths(index)
        found = [name for name in (f"{picture.stem}.png", f"{truth.stem}.png") if name in present]
        files += found[:1]
        lost += [] if found else [f"{picture.stem}.png"]
    if lost:
        raise DataError(
            f"{folder}: {len(lost)} of {len(dataset)} pictures have no semantic PNG there, "
            f"{NearFiles(folder).explain(lost)}; each is named after its picture"
        )
    known = np.array(sorted({category["id"] for category in dataset.categories}))
    return CategorySource(
        str(folder),
        False,
        dataset,
        lambda index: read_semantic_png(folder / files[index], known),
        lambda index: [folder / files[index]],
    )


def read_semantic_png(path: Path, category_ids: np.ndarray) -> np.ndarray:
    """Reads the category ids of an 8- or 16-bit grey (or palette) PNG, int32 [H, W].

    0 is void, and so are 255 and 65535 unless they are among `category_ids`, integer [N].

    Raises:
        DataError: another kind of file, or a value that is no category.
    """
    try:
        with Image.open(io.BytesIO(read_file(path, DataError, "PNG"))) as image:
            if image.mode not in ("L", "P", "I", "I;16", "I;16B"):
                raise DataError(f"{path}: {image.mode} picture; category ids are 8- or 16-bit grey values")
            values = np.asarray(image).astype(np.int32)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable PNG ({error})") from error
    present = set(np.unique(values).tolist())
    listed = set(category_ids.tolist())
    if unknown := sorted(present - listed - UNLABELLED):
        raise DataError(f"{path}: values {unknown[:10]} are not among the data set's category ids")
    void = list(UNLABELLED - listed)
    return np.where(np.isin(values, void), 0, values) if void else values


def _panoptic_source(path: Path, dataset: CocoPanoptic) -> CategorySource:
    entries = {entry["image_id"]: entry for entry in load_panoptic_json(path, predictions=True)["annotations"]}
    ids = [dataset.image_id(index) for index in range(len(dataset))]
    if lost := [image_id for image_id in ids if image_id not in entries]:
        reason = why_missing(ids, lost, list(entries)) or "predict them"
        raise DataError(f"{path}: no result for {len(lost)} of {len(ids)} images, first {lost[0]}; {reason}")
    known = {category["id"] for category in dataset.categories}
    used = {segment["category_id"] for image_id in ids for segment in entries[image_id]["segments_info"]}
    if unknown := sorted(used - known):
        raise DataError(f"{path}: categories {unknown[:10]} are not among the data set's")
    folder = png_folder(path)
    names = [entries[image_id]["file_name"] for image_id in ids]
    if lost_files := missing_files(folder, names):
        near = NearFiles(folder).explain(lost_files)
        raise DataError(f"{path}: {len(lost_files)} of {len(names)} maps are not in {folder}, {near}")

    def read(index: int) -> np.ndarray:
        entry = entries[ids[index]]
        return category_map(read_panoptic_png(folder / entry["file_name"]), entry["segments_info"])

    return CategorySource(str(path), False, dataset, read, lambda index: [folder / names[index]], path)
