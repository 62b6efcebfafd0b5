"""Accumulates panoptic quality in memory: update with images, merge ranks, compute.

Source: Kirillov et al., "Panoptic Segmentation", CVPR 2019, https://arxiv.org/abs/1801.00868.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeGuard

import numpy as np

from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.metrics.forms import FormReader, Picture
from ldmseg_fast.metrics.matching import FALSE_POSITIVE_ONE_CROWD, TRUE_POSITIVE, match_segments, segment_table
from ldmseg_fast.metrics.qualities import OBJECT_CATEGORY, Qualities, total

SIZE_BINS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # COCO's areas, in pixels


# What is kept of a row of MATCH_DTYPE; the whole set of images is held at once.
_KEPT = {"image": "i4", "category_id": "i4", "area": "i4", "outcome": "i1", "iou": "f8", "boundary_iou": "f8"}
KEPT_DTYPE = np.dtype(list(_KEPT.items()))
_LARGEST_AREA = int(np.iinfo(np.int32).max)


class PanopticQuality:
    """Accumulates matches of images; the result does not depend on the order of images or on how ranks shared them.

    A segment that counts takes 29 bytes.

    Args:
        categories: COCO entries with `id` and `isthing`.
        class_agnostic: makes every segment one category ("object") and ignores `categories`; `compute()` then also
            holds the crowd-correct numbers.
        boundary: also computes boundary PQ.
        void: category numbers of the (category, instance) form that mean void where no category has them.

    Raises:
        PanopticFormatError: what is no list of categories, categories without an `id` that is a whole number, or with
            one id twice, or whose `isthing` is not 0 or 1; `void` with something else than whole numbers.
    """

    def __init__(
        self,
        categories: Iterable[Mapping[str, Any]] = (),
        class_agnostic: bool = False,
        boundary: bool = False,
        void: Iterable[int] = (-1, 0),
    ) -> None:
        self.class_agnostic = class_agnostic
        self.boundary = boundary
        if isinstance(void, str) or not isinstance(void, Iterable):
            raise PanopticFormatError(f"void={void!r:.80}: a list of category numbers expected")
        self.void = tuple(void)
        if not all(map(_is_int, self.void)):
            raise PanopticFormatError(f"void={self.void!r:.80}: category numbers expected")
        self.categories: dict[int, dict[str, Any]] = {}
        if isinstance(categories, str | Mapping) or not isinstance(categories, Iterable):
            raise PanopticFormatError(
                f"categories: expected a list of COCO entries with `id` and `isthing`, got {categories!r:.80}"
            )
        for place, category in enumerate([OBJECT_CATEGORY] if class_agnostic else categories):
            category_id = category.get("id") if isinstance(category, Mapping) else None
            if not _is_int(category_id) or int(category_id) in self.categories:
                raise PanopticFormatError(
                    f"categories[{place}]: expected an object whose `id` is a number of its own, got {category!r:.80}"
                )
            isthing = category.get("isthing", 1)
            if isthing not in (0, 1):
                raise PanopticFormatError(f"categories[{place}]: `isthing` must be 0 or 1, got {isthing!r:.80}")
            self.categories[int(category_id)] = dict(category)
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.image_ids: list[int | str] = []
        self._numbered: set[int] = set()  # places in `image_ids` of images whose id nobody gave
        self._given: set[int | str] = set()  # the other images' ids
        self._rows, self._count = np.empty(0, KEPT_DTYPE), 0  # with room for more

    def update(self, preds: Any, target: Any, image_ids: Iterable[int | str] | None = None) -> None:
        """Counts an image, a batch or a data set; the two sides may be of different forms.

        Args:
            preds, target: predictions and ground truth, in the order of torchmetrics. See `metrics.forms` for what is
                understood: maps with `segments_info`, (category, instance) arrays, RLE and polygon annotations, rows
                of a Hugging Face data set.
            image_ids: one for each image; by default the `image_id` of a row of `target`, then a running number.

        Raises:
            PanopticFormatError: names the image and the side: an unseen category, maps and segments that disagree. The
                images before it are counted.
            ArgumentError: sides with different numbers of images, an image id that was counted before.
        """
        reader = FormReader(self.categories, self.class_agnostic, self.void)
        if image_ids is not None and (isinstance(image_ids, str) or not isinstance(image_ids, Iterable)):
            raise ArgumentError(f"`image_ids` must be a list with one id for each image, got {image_ids!r:.80}")
        ids, end = None if image_ids is None else iter(image_ids), object()
        sides = (reader.pictures(target, "ground truth"), reader.pictures(preds, "prediction"))
        for truth, predicted in zip_longest(*sides, fillvalue=end):
            if truth is end or predicted is end:
                more, fewer = ("predictions", "ground truth") if truth is end else ("ground truth", "predictions")
                raise ArgumentError(f"the {more} have more images than the {fewer}: give both sides the same images")
            assert isinstance(truth, Picture) and isinstance(predicted, Picture)
            given = truth.image_id if ids is None else next(ids, end)
            if given is end:
                raise ArgumentError("there are more images than `image_ids`: give one for each")
            self._update_one(truth, predicted, _plain_id(given))
        if ids is not None and next(ids, end) is not end:
            raise ArgumentError("there are more `image_ids` than images: give one for each")

    def _update_one(self, truth: Picture, predicted: Picture, image_id: Any) -> None:
        named = len(self.image_ids) if image_id is None else image_id
        try:
            gt_ids, gt_segments = truth.read(predicted.size)
            pred_ids, pred_segments = predicted.read(gt_ids.shape)
        except PanopticFormatError as error:
            raise PanopticFormatError(f"image {named}: {error}") from None
        self.add(gt_ids, gt_segments, pred_ids, pred_segments, image_id)

    def add(
        self,
        gt_ids: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_ids: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str | None = None,
        use_gt_area: bool = False,
    ) -> np.ndarray:
        """Matches one image: two maps, integer [H, W] with 0 void, and their `segments_info`.

        Args:
            image_id: by default the number of images so far.
            use_gt_area: takes the ground truth's areas from `gt_segments`, as panopticapi does, instead of counting
                pixels.

        Returns:
            The image's rows of `MATCH_DTYPE`, [M].

        Raises:
            PanopticFormatError: maps and `segments_info` that disagree; the message names the image.
            ArgumentError: an image id that was counted before.
        """
        named = len(self.image_ids) if image_id is None else image_id
        self._check_new(image_id)
        try:
            gt_table = segment_table(gt_segments, self.class_agnostic, use_gt_area)
            pred_table = segment_table(pred_segments, self.class_agnostic)
            self.check_categories(gt_table, "ground truth")
            self.check_categories(pred_table, "prediction")
            matches = match_segments(gt_ids, gt_table, pred_ids, pred_table, self.boundary)
        except PanopticFormatError as error:
            raise PanopticFormatError(f"image {named}: {error}") from None
        self.add_matches(image_id, matches)
        return matches

    def check_categories(self, table: np.ndarray, name: str) -> None:
        """Checks the categories of a segment table, int64 [S, 4].

        Raises:
            PanopticFormatError: a category that is not among the categories; `name` says which table.
        """
        if unknown := set(table[:, 1].tolist()) - self.categories.keys():
            raise PanopticFormatError(f"{name}: category ids {sorted(unknown)} are not among the categories")

    def add_matches(self, image_id: int | str | None, matches: np.ndarray) -> None:
        """Adds the rows of one image, `MATCH_DTYPE` [M], that `match_segments` returned.

        Raises:
            ArgumentError: an image id that was counted before.
        """
        self._check_new(image_id)
        kept = self._more(len(matches))
        kept["image"] = len(self.image_ids)
        kept["area"] = np.minimum(matches["area"], _LARGEST_AREA)
        for name in ("category_id", "outcome", "iou", "boundary_iou"):
            kept[name] = matches[name]
        if image_id is None:
            image_id = len(self.image_ids)
            self._numbered.add(image_id)
        else:
            self._given.add(image_id)
        self.image_ids.append(image_id)

    def _check_new(self, image_id: int | str | None) -> None:
        if image_id in self._given:
            raise ArgumentError(f"image {image_id!r} was counted before: give each image once, or `reset()` first")

    def merge(self, other: "PanopticQuality") -> "PanopticQuality":
        """Adds the images of `other` (another rank's part) to this one and returns this one.

        Images whose ids nobody gave are numbered anew.

        Raises:
            ArgumentError: no statistics, other categories, or an image that both have counted.
        """
        if not isinstance(other, PanopticQuality):
            raise ArgumentError(f"other: a PanopticQuality expected, got {type(other).__name__}")
        if self.categories != other.categories or self.class_agnostic != other.class_agnostic:
            raise ArgumentError("statistics over different categories cannot be merged")
        if self.boundary != other.boundary:
            raise ArgumentError("statistics with and without boundary PQ cannot be merged")
        if both := self._given & other._given:
            raise ArgumentError(f"images counted twice, give each rank its own: {sorted(both, key=str)[:20]}")
        rows = other.matches()  # before `_more`, as `other` may be this one
        theirs = self._more(len(rows))
        theirs[:] = rows
        first = len(self.image_ids)
        theirs["image"] += first
        self.image_ids += [
            first + place if place in other._numbered else image_id for place, image_id in enumerate(other.image_ids)
        ]
        self._numbered |= {first + place for place in other._numbered}
        self._given |= other._given
        return self

    def part(self, places: Sequence[int]) -> "PanopticQuality":
        """Returns the statistic of some images alone, by their places in `image_ids`."""
        chosen = type(self)(
            () if self.class_agnostic else self.categories.values(), self.class_agnostic, self.boundary, self.void
        )
        numbers = np.full(len(self.image_ids), -1)
        numbers[list(places)] = np.arange(len(places))
        rows = self.matches()[numbers[self.matches()["image"]] >= 0]
        chosen._more(len(rows))[:] = rows
        chosen.matches()["image"] = numbers[rows["image"]]
        chosen.image_ids = [self.image_ids[place] for place in places]
        chosen._given = set(chosen.image_ids)
        return chosen

    def state(self) -> dict[str, Any]:
        """Returns all that was counted as plain lists and numpy arrays, to be saved, sent or pickled."""
        return {
            "categories": list(self.categories.values()),
            "class_agnostic": self.class_agnostic,
            "boundary": self.boundary,
            "void": list(self.void),
            "image_ids": list(self.image_ids),
            "numbered": sorted(self._numbered),
            "matches": {name: self.matches()[name].copy() for name in _KEPT},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "PanopticQuality":
        """Makes the statistic of a state; arrays may have become lists, as JSON makes them.

        Raises:
            ArgumentError: what is no state of `state()`.
        """
        try:
            stat = cls(
                [] if state["class_agnostic"] else state["categories"],
                bool(state["class_agnostic"]),
                bool(state["boundary"]),
                state["void"],
            )
            columns = {name: np.asarray(state["matches"][name]) for name in _KEPT}
            if any(column.shape != columns["image"].shape or column.ndim != 1 for column in columns.values()):
                raise ValueError("columns of `matches` of different lengths")
            if unknown := set(columns["category_id"].tolist()) - stat.categories.keys():
                raise ValueError(f"matches of categories {sorted(unknown)[:20]}, which `categories` does not list")
            rows = stat._more(len(columns["image"]))
            for name, column in columns.items():
                rows[name] = column
            stat.image_ids = list(state["image_ids"])
            stat._numbered = {int(place) for place in state["numbered"]}
            given = [image_id for place, image_id in enumerate(stat.image_ids) if place not in stat._numbered]
            stat._given = set(given)
            if len(given) > len(stat._given):
                raise ValueError("`image_ids` lists an image twice")
            matched = rows[rows["outcome"] == TRUE_POSITIVE]
            ious = ("iou", "boundary_iou") if stat.boundary else ("iou",)
            if not all(np.all((matched[name] >= 0) & (matched[name] <= 1)) for name in ious):
                raise ValueError("an IoU in `matches` that is no number from 0 to 1")
            if len(rows) and not 0 <= rows["image"].min() <= rows["image"].max() < len(stat.image_ids):
                raise ValueError("matches of images that `image_ids` does not list")
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"this is no state of PanopticQuality.state(): {error!r}") from None
        return stat

    def _more(self, count: int) -> np.ndarray:
        """Makes room for `count` rows and returns them to be filled in."""
        if self._count + count > len(self._rows):
            rows = np.empty((self._count + count) * 3 // 2, KEPT_DTYPE)
            rows[: self._count] = self.matches()
            self._rows = rows
        self._count += count
        return self._rows[self._count - count : self._count]

    def compute(self) -> dict[str, Any]:
        """Returns panopticapi's fractions: `All`, `Things`, `Stuff` -> pq, sq, rq, n.

        `per_category`, keyed by str(id), has tp, fp, fn, iou, pq, sq, rq of the categories that occur. `sizes` has the
        averages over small, medium and large segments. There a match or a miss counts at the ground truth's area, a
        false positive at its own.

        `lrp` has the errors of LRP in the same groups and by category: lrp, and what it is made of, lrp_loc (mean of
        1 - IoU over matches), lrp_fp and lrp_fn (shares of false positives and of misses). A part that a category lacks
        is None there, and left out of the average.

        With `boundary`, each also has `boundary_pq`: a match needs min(IoU, boundary IoU) > 0.5 and adds that minimum.

        Class-agnostic results add `class_agnostic` (with tp, fp, fn, iou), and `crowd_correct` and `pq_crowd_correct`.
        These excuse false positives on every crowd region instead of panopticapi's last one per category.
        """
        matches = self.matches()
        qualities = Qualities(self.categories, self.boundary)
        per_category = qualities.per_category(matches)
        result = qualities.averages(per_category)
        result["per_category"] = {
            str(key): entry
            | {"name": self.categories[key].get("name", str(key)), "isthing": self.categories[key].get("isthing", 1)}
            for key, entry in per_category.items()
        }
        result["lrp"] = qualities.lrp(per_category)
        result["images"] = len(self.image_ids)
        result["sizes"] = {
            name: qualities.of_all(matches[(matches["area"] >= low) & (matches["area"] < high)])
            for name, (low, high) in SIZE_BINS.items()
        }
        if self.class_agnostic:
            correct = qualities.per_category(matches[matches["outcome"] != FALSE_POSITIVE_ONE_CROWD])
            result["class_agnostic"] = total(per_category)
            result["crowd_correct"] = total(correct)
            result["pq_crowd_correct"] = result["All"]["pq_crowd_correct"] = result["crowd_correct"]["pq"]
        return result

    def matches(self) -> np.ndarray:
        """Returns all rows so far, `KEPT_DTYPE` [M]: a view that must not be written to.

        `image` is the place in `image_ids`.
        """
        return self._rows[: self._count]


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _plain_id(image_id: Any) -> int | str | None:
    """Turns an element of an array or tensor of image ids into a number that compares and pickles as one."""
    plain = image_id.item() if hasattr(image_id, "item") and getattr(image_id, "ndim", 1) == 0 else image_id
    if plain is None or isinstance(plain, str) or _is_int(plain):
        return plain
    raise ArgumentError(f"an image id must be a whole number or a text, got {image_id!r:.80}")
