"""Completes a panoptic map of which some pixels are given: slots for the given ids, sampling around them, one map.

Shapes: H W the picture's own size, S the network's side, h w latent cells, Q slots (slot 0 is void).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.pictures import Picture
from ldmseg_fast.data.transforms import TABLE_SIZE, make_remap_table, resize_ids
from ldmseg_fast.diffusion.inpainting import KnownLatents, whole_cells
from ldmseg_fast.diffusion.sampler import seed_of
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.diffusion.solvers import Constraint, StepNoise
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.sampling import MaskSampler, Sampling
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes

METHODS = ("pixels", "estimate", "renoise")


def inpaint(
    sampler: MaskSampler,
    pictures: Sequence[Picture],
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    image_ids: Sequence[int | str],
    sampling: Sampling,
    *,
    thresholds: PostprocessConfig | None,
    method: str | None,
    draft_steps: int,
    numbers: Sequence[Mapping[int, int]] | None = None,
) -> list[PanopticResult]:
    """Does `LDMSegPipeline.inpaint` for one batch, whose arguments have been checked.

    Args:
        sampler: of the model.
        pictures: uint8 [S, S, 3], with the sizes (H, W) of their maps.
        maps: integer ids [H, W].
        masks: bool [H, W], True where the map is given.
        image_ids: from which, with the seed, all noise comes.
        sampling: solver, steps, timesteps, seed and callback.
        thresholds, method, draft_steps: as in `LDMSegPipeline.inpaint`.
        numbers: the given ids whose category is known, each with its number; one for each picture.

    Returns:
        A PanopticResult per picture.

    Raises:
        ArgumentError: an unknown method.
    """
    info, mask_vae = sampler.info, sampler.backend.mask_vae
    trained = bool(info.index.get("inpainting"))
    method = method or ("estimate" if trained else "pixels")
    thresholds = thresholds or info.postprocess
    noise = sampler.noise(sampling.seed, image_ids)  # float32 [B, C, h, w]
    pixels = sampler.resize([picture.pixels for picture in pictures])  # uint8 [B, 3, S, S]
    image_latents = sampler.backend.encode_image(pixels)  # [B, C_image, h, w]

    drafts: Any = [None] * len(pictures)
    draft_categories: Any = [None] * len(pictures)
    if draft_steps > 0:
        steps = min(draft_steps, sampling.num_inference_steps)
        plain = replace(sampling, num_inference_steps=steps, timesteps=None, callback=None)
        network = sampler.network(pixels, plain)
        draft_latents = sampler.denoise(network, noise, image_latents, image_ids, plain)  # float32 [B, C, h, w]
        slots, categories = decode_pixels(mask_vae, draft_latents)  # int64 [B, S, S]
        drafts = slots.cpu().numpy()
        draft_categories = draft_categories if categories is None else categories.cpu().numpy()

    scheme = sampler.id_assignment
    givens = [
        prepare(
            segmentation,
            known,
            size=info.image_size,
            num_slots=info.mask_vae.num_slots,
            scheme=scheme,
            rng=np.random.default_rng(seed_of(sampling.seed, "slots", image_id)),
            name=f"image {image_id}",
            draft=draft,
            known_categories=known_numbers,
            draft_categories=named,
        )
        for image_id, segmentation, known, draft, named, known_numbers in zip(
            image_ids, maps, masks, drafts, draft_categories, numbers or [{}] * len(pictures)
        )
    ]
    step_noise = partial(sampler.step_noise, sampling.seed, image_ids, "known")
    # what was encoded beside void is a little off; models that were not trained with it get cells farther inside
    margin = 0 if trained else 1
    constraint = make_constraint(method, mask_vae, givens, sampler.scheduler, step_noise, margin)
    network = sampler.network(pixels, sampling)
    mask_latents = sampler.denoise(network, noise, image_latents, image_ids, sampling, constraint)  # [B, C, h, w]
    decoded = sampler.decode(mask_latents, [picture.size for picture in pictures], thresholds)
    return [
        complete(result, given, thresholds.count_threshold, info.categories) for result, given in zip(decoded, givens)
    ]


@dataclass(frozen=True)
class Given:
    """Holds what is known of one image's map.

    Attributes:
        segmentation: int32 [H, W], the given ids; 0 where nothing is given, and where void is.
        known: bool [H, W], given pixels, void among them.
        covered: bool [S, S], `known` at the network's size.
        slots: uint8 [S, S] at the network's size, 0 where nothing (or void) is given.
        ids: slot -> given id.
        numbers: given id -> number of its category, where it is known.
        assumed: the same, with what the draft has for the others.
        categories: int16 [S, S], numbers of categories at the network's size, 0 where none is known.
    """

    segmentation: np.ndarray
    known: np.ndarray
    covered: np.ndarray
    slots: np.ndarray
    ids: dict[int, int]
    numbers: dict[int, int] = field(default_factory=dict)
    assumed: dict[int, int] = field(default_factory=dict)
    categories: np.ndarray | None = None


def prepare(
    segmentation: np.ndarray,
    known: np.ndarray,
    size: int,
    num_slots: int,
    scheme: str,
    rng: np.random.Generator,
    name: str = "image",
    draft: np.ndarray | None = None,
    known_categories: Mapping[int, int] | None = None,
    draft_categories: np.ndarray | None = None,
) -> Given:
    """Finds slots for the given segments of one image: those of `draft`, or by the scheme of the model's training.

    Of more than `num_slots` - 1 segments the largest get one; the others stay as they are but cannot grow, which a
    warning says. So do segments that vanish at the network's size.

    Args:
        segmentation: integer ids [H, W], 0..2^24-1.
        known: bool [H, W].
        size: S.
        num_slots: Q.
        scheme: of `data.transforms.ID_SCHEMES`.
        rng: of scheme "random".
        name: of the image, in the warning.
        draft: slots [S, S] that the model predicts from the same noise without knowing the map. The scheme cannot know
            of segments that are hidden; the draft shows what the model would call each one.
        known_categories: given id -> number of its category, where it is known.
        draft_categories: numbers [S, S] that the model predicts with the draft: what it mostly has on a given segment
            of unknown category stands for it while sampling.
    """
    given = np.where(known, segmentation, 0).astype(np.int32)
    small = resize_ids(given, size)
    values, counts = np.unique(small[small > 0], return_counts=True)
    kept = values
    if len(values) >= num_slots:
        kept = np.sort(values[np.argsort(-counts, kind="stable")[: num_slots - 1]])
        warnings.warn(
            f"{name}: {len(values)} given segments, the model has {num_slots - 1} slots; the {len(values) - len(kept)} "
            f"smallest stay as they are given and cannot grow",
            stacklevel=2,
        )
    numbers = np.zeros(len(values) + 1, np.uint8)
    numbers[1 + np.searchsorted(values, kept)] = np.arange(1, len(kept) + 1)
    numbered = numbers[np.searchsorted(values, small, side="right") * (small > 0)]  # 1..n in order of the ids
    table = make_remap_table(numbered, len(kept), num_slots, scheme, rng)
    if draft is not None:
        table = follow_draft(numbered, len(kept), draft, num_slots)
    ids = {int(table[number]): int(value) for number, value in enumerate(kept, start=1)}
    covered = resize_ids(known.astype(np.uint8), size) > 0
    assumed = dict(known_categories or {})
    if draft_categories is not None:
        for value in values.tolist():
            votes = np.bincount(draft_categories[small == value])
            if value not in assumed and votes[1:].any():
                assumed[value] = 1 + int(votes[1:].argmax())
    of_value = np.array([0, *(assumed.get(value, 0) for value in values.tolist())], np.int16)
    categories = of_value[np.searchsorted(values, small, side="right") * (small > 0)]
    categories[table[numbered] == 0] = 0
    return Given(given, known, covered, table[numbered], ids, dict(known_categories or {}), assumed, categories)


def encode_pixels(mask_vae: Any, slots: Tensor, categories: Tensor | None) -> Tensor:
    """Encodes slots, integer [B, S, S], 0 = void, to scaled mask latents float32 [B, C, h, w].

    categories: numbers, integer [B, S, S], 0 = void or unknown; of models with categories.
    """
    config = mask_vae.config
    bits = encode_mask_bits(
        slots,
        config.num_bits,
        dtype=next(mask_vae.parameters()).dtype,
        category_ids=categories if config.num_categories else None,
        category_bits=config.category_bits,
    )
    return mask_vae.encode_latents(bits).float()


def decode_pixels(mask_vae: Any, mask_latents: Tensor) -> tuple[Tensor, Tensor | None]:
    """Decodes scaled mask latents [B, C, h, w] to each pixel's best slot and category at the network's size.

    Returns:
        int64 [B, S, S] each; None in the place of categories of a model without.
    """
    both = mask_vae.decode_latents_both(mask_latents.to(next(mask_vae.parameters()).dtype))
    size = [side * mask_vae.config.downsampling for side in mask_latents.shape[-2:]]
    slots, categories = (
        None if logits is None else F.interpolate(logits.float(), size, mode="bilinear", align_corners=False).argmax(1)
        for logits in both
    )
    assert slots is not None
    return slots, categories


class KnownPixels:
    """Constrains the map itself: each estimate of x_0 is decoded, the given pixels are put in, and it is encoded again.
    Cells without a given pixel keep the estimate. A `diffusion.solvers.Constraint`.

    The encoder sees far across a cell's edge, so that cells cannot be known one by one where little is given; here it
    sees the model's own completion in place of the unknown.

    Args:
        mask_vae: the mask auto-encoder.
        slots: uint8 [B, S, S], 0 where nothing is given.
        categories: int16 [B, S, S], numbers, 0 where none is given; of models with categories.
    """

    def __init__(self, mask_vae: Any, slots: Tensor, categories: Tensor | None = None) -> None:
        self.mask_vae = mask_vae
        self.slots = slots
        self.categories = categories
        cell = mask_vae.config.downsampling
        self.cells = ~whole_cells(slots == 0, cell)  # any pixel given

    def condition(self, latents: Tensor) -> Tensor:
        """Returns zeros, float [B, C, h, w]: nothing is estimated yet."""
        return torch.zeros_like(latents)

    def latents(self, latents: Tensor, timestep: int) -> Tensor:
        """Returns x_t, float [B, C, h, w], as it is."""
        return latents

    def estimate(self, estimate: Tensor) -> Tensor:
        """Returns the estimate of x_0, float [B, C, h, w], with the given pixels put in; what is NaN stays NaN."""
        slots, categories = decode_pixels(self.mask_vae, estimate)
        slots = torch.where(self.slots > 0, self.slots.long(), slots)
        if categories is not None and self.categories is not None:
            categories = torch.where(self.categories > 0, self.categories.long(), categories) * (slots > 0)
        known = encode_pixels(self.mask_vae, slots, categories)
        return torch.where(self.cells & estimate.isfinite(), known, estimate)


def follow_draft(numbered: np.ndarray, count: int, draft: np.ndarray, num_slots: int) -> np.ndarray:
    """Gives each numbered segment the slot that the draft has for it.

    Pairs of segment and predicted slot are taken in falling order of their IoU where the map is given; the segments
    that are left get slots that the draft does not use.

    Args:
        numbered: uint8 [S, S] with 1..count, 0 where nothing is given.
        count: of segments.
        draft: integer [S, S] slots, 0 void.
        num_slots: Q.

    Returns:
        Number -> slot, uint8 [256].
    """
    inside = numbered > 0
    overlap = np.zeros((count + 1, num_slots))
    np.add.at(overlap, (numbered[inside], draft[inside]), 1)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    iou = overlap / np.maximum(union, 1)
    iou[:, 0] = 0  # void is no segment
    table = np.zeros(TABLE_SIZE, np.uint8)
    for _ in range(count):
        number, slot = divmod(int(iou.argmax()), num_slots)
        if iou[number, slot] == 0:
            break
        table[number] = slot
        iou[number], iou[:, slot] = 0, 0
    used = np.zeros(num_slots, bool)
    used[[0, *np.unique(draft)]] = True
    free = [slot for slot in np.argsort(used, kind="stable") if slot and slot not in set(table)]  # unused ones first
    left = 1 + np.flatnonzero(table[1 : count + 1] == 0)
    table[left] = free[: len(left)]
    return table


def make_constraint(
    method: str, mask_vae: Any, givens: Sequence[Given], scheduler: Scheduler, step_noise: StepNoise, margin: int
) -> Constraint:
    """Makes the constraint that a batch's given pixels are.

    Args:
        method: one of METHODS.
        mask_vae: the mask auto-encoder.
        givens: of each picture.
        scheduler: alphas.
        step_noise: of "renoise".
        margin: as in `whole_cells`.

    Raises:
        ArgumentError: an unknown method.
    """
    if method not in METHODS:
        raise ArgumentError(f"method={method!r}: one of {', '.join(METHODS)} expected")
    device = next(mask_vae.parameters()).device
    slots = torch.from_numpy(np.stack([given.slots for given in givens])).to(device)  # [B, S, S]
    categories = None
    if mask_vae.config.num_categories:
        categories = torch.from_numpy(
            np.stack([given.categories for given in givens if given.categories is not None])
        ).to(device)  # [B, S, S]
    if method == "pixels":
        return KnownPixels(mask_vae, slots, categories)
    covered = torch.from_numpy(np.stack([given.covered for given in givens])).to(device)
    cells = whole_cells(covered, mask_vae.config.downsampling, margin)
    latents = encode_pixels(mask_vae, slots, categories)
    return KnownLatents(latents, cells, scheduler, step_noise if method == "renoise" else None)


def complete(
    result: PanopticResult, given: Given, min_area: int, categories: CategoryTable | None = None
) -> PanopticResult:
    """Puts the given pixels back into the predicted map, and every segment under its final id.

    A predicted segment whose slot is a given one's takes that one's id; so does one that lies, where pixels are given,
    mostly on one given segment. The others get the smallest unused ids, and become void where fewer than `min_area`
    of their pixels are left. Predicted stuff of a category that a given segment has takes that one's id.

    Args:
        result: the predicted map, int32 [H, W].
        given: what is known of it.
        min_area: in pixels.
        categories: of models with categories. A given segment of known category keeps it.

    Returns:
        The map, int32 [H, W]. `segments_info` has "given" beside the usual entries: whether the id is one of the map
        that was given. A segment without predicted pixels has score 1.
    """
    predicted = result.segmentation
    final, taken = {}, set(np.unique(given.segmentation).tolist()) | {0}
    for segment in result.segments_info:
        known_ids = given.segmentation[(predicted == segment["id"]) & (given.segmentation > 0)]
        values, counts = np.unique(known_ids, return_counts=True)
        if len(values) and 2 * counts.max() > len(known_ids):
            final[segment["id"]] = int(values[counts.argmax()])
        elif segment["id"] - 1 in given.ids:
            final[segment["id"]] = given.ids[segment["id"] - 1]
    stuff = {} if categories is None else _given_stuff(given, categories)
    for segment in result.segments_info:
        if segment["id"] not in final and segment.get("category_id") in stuff:
            final[segment["id"]] = stuff[segment["category_id"]]
    fresh = (number for number in range(1, 2**24) if number not in taken)
    for segment in result.segments_info:
        if segment["id"] not in final:
            left = int(((predicted == segment["id"]) & ~given.known).sum())
            final[segment["id"]] = next(fresh) if left >= min_area else 0
    table = np.zeros(int(predicted.max(initial=0)) + 1, np.int32)
    for before, after in final.items():
        table[before] = after
    segmentation = np.where(given.known, given.segmentation, table[predicted])

    parts_of: dict[int, list[dict[str, Any]]] = {}
    for segment in result.segments_info:
        parts_of.setdefault(final[segment["id"]], []).append(segment)
    usual = {"category_id": 1, "label_id": 1, "isthing": True, "iscrowd": 0, "was_fused": False}
    info = []
    for shape in segment_shapes(segmentation):
        parts = parts_of.get(shape["id"], [])
        entry = {"id": shape["id"], **usual, **shape, "score": _mean(parts, "score"), "given": shape["id"] in taken}
        if categories is not None:
            entry |= _category(parts, shape["id"], given, categories)
        info.append(entry)
    return PanopticResult(segmentation, info)


def _given_stuff(given: Given, categories: CategoryTable) -> dict[int, int]:
    """The lowest given id of each category of stuff, by the category's id."""
    found: dict[int, int] = {}
    for segment_id in sorted(set(given.numbers) & set(np.unique(given.segmentation).tolist())):
        category = categories[given.numbers[segment_id]]
        if not category.isthing:
            found.setdefault(category.id, segment_id)
    return found


def _category(
    parts: Sequence[Mapping[str, Any]], segment_id: int, given: Given, categories: CategoryTable
) -> dict[str, Any]:
    """Says what a completed segment is: what was given, else what the largest of its predicted parts is.

    A given segment of unknown category of which nothing was predicted is what the draft has there, with a score of 0;
    where there was no draft either it stays without a name, of category 0.
    """
    if segment_id not in given.numbers and parts:
        largest = max(parts, key=lambda part: part["area"])
        named = {key: largest[key] for key in ("category_id", "name", "isthing", "category_score")}
    elif segment_id in given.assumed:
        category, score = categories[given.assumed[segment_id]], float(segment_id in given.numbers)
        named = {"category_id": category.id, "name": category.name, "isthing": category.isthing}
        named["category_score"] = score
    else:
        named = {"category_id": 0, "isthing": True, "category_score": 0.0}
    return named | {"label_id": named["category_id"]}


def _mean(parts: Sequence[Mapping[str, Any]], key: str) -> float:
    """The mean of a value over the pixels of predicted parts; 1 where there are none."""
    return sum(part[key] * part["area"] for part in parts) / sum(part["area"] for part in parts) if parts else 1.0
