"""Joins several samples of one image: the sample that agrees best with the others, and how far they agree.

Samples differ in their noise, and where it is asked for in what the model sees: the picture or its mirror image, at
several sizes (test-time augmentation, Krizhevsky et al. 2012, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.pictures import Picture
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.averaging import ViewLogits, average
from ldmseg_fast.inference.edges import MAX_RADIUS
from ldmseg_fast.inference.inputs import check_count
from ldmseg_fast.inference.sampling import MaskSampler, Sampling
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes


@dataclass(frozen=True)
class EnsembleResult(PanopticResult):
    """Holds the medoid of k samples, or with votes the medoid's segments as all samples see them.

    Entries of `segments_info` have "agreement" too: the mean IoU with the segment's matches in the other samples, 0 for
    those that have none.

    Attributes:
        agreement: float32 [H, W] in [0, 1], the share of samples, this one included, whose match of the pixel's segment
            covers the pixel; where this sample is void, the share of samples that are.
        reference: which of the samples it is; of a mean, the one whose segments the others' were matched to.
    """

    agreement: np.ndarray
    reference: int


FUSIONS = ("medoid", "vote", "mean")
MAX_SCALES = 16


@dataclass(frozen=True)
class Views:
    """Says what the samples of an ensemble see, and how they are joined.

    Attributes:
        flip: the mirror image too.
        scales: sides of what the networks see, in shares of the model's own, rounded to what they divide by.
        fusion: "medoid": the sample that agrees best with the others, as it is. "vote": its segments, each pixel to
            the one whose matches cover it in most samples. "mean": the probabilities of slots and categories are
            averaged over the samples before a map is made of them; it decodes in PyTorch whatever the backend. None:
            a mean where edges are followed, else the medoid.
        edges: of a mean: edges of segments follow edges of the picture, by windows of this radius in cells of the
            decoder's grid; see `inference.edges`. 0: they do not.

    Raises:
        ArgumentError: values that are none of these.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    fusion: str | None = None
    edges: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise ArgumentError(f"flip={self.flip!r}: True or False expected")
        check_count("edges", self.edges, 0, MAX_RADIUS)
        if not 1 <= len(self.scales) <= MAX_SCALES or not all(
            isinstance(scale, (int, float)) and 0.25 <= scale <= 4 for scale in self.scales
        ):
            raise ArgumentError(f"scales={self.scales!r}: 1 to {MAX_SCALES} numbers from 0.25 to 4 expected")
        if self.fusion is None:
            object.__setattr__(self, "fusion", "mean" if self.edges else "medoid")
        if self.fusion not in FUSIONS:
            raise ArgumentError(f"fusion={self.fusion!r}: one of {', '.join(FUSIONS)} expected")
        if self.edges and self.fusion != "mean":
            raise ArgumentError(f"edges are followed by the mean of views, not by fusion={self.fusion}: take mean")

    @property
    def count(self) -> int:
        """How many views there are of each noise."""
        return len(self.scales) * (2 if self.flip else 1)

    @property
    def largest(self) -> float:
        """The largest of the scales, at least 1."""
        return max(1.0, *self.scales)


def as_scales(scales: Any) -> tuple[float, ...]:
    """Returns the numbers of a sequence or an array, NumPy's as Python's.

    Raises:
        ArgumentError: neither.
    """
    if not isinstance(scales, (Sequence, np.ndarray)):
        raise ArgumentError(f"scales={scales!r}: a list of numbers expected, such as (0.75, 1)")
    return tuple(float(scale) if isinstance(scale, np.floating) else scale for scale in scales)


def sample_ensemble(
    sampler: MaskSampler,
    pictures: Sequence[Picture],
    image_ids: Sequence[int | str],
    sampling: Sampling,
    *,
    num_samples: int,
    thresholds: PostprocessConfig | None,
    captions: Sequence[str] | None,
    views: Views = Views(),
) -> list[EnsembleResult]:
    """Does `LDMSegPipeline.ensemble` for one batch, whose arguments have been checked; a view is encoded once.

    Args:
        sampler: of the model.
        pictures: uint8 [P, P, 3], with the sizes (H, W) of their maps.
        image_ids: from which, with each sample's seed, all noise comes.
        sampling: of the first sample; those that follow have the seeds after its own.
        num_samples: k.
        thresholds, captions: as in `LDMSegPipeline.__call__`.
        views: what the samples see; each view has `num_samples`.

    Raises:
        ArgumentError: several scales of graphs, which have one size.
    """
    sizes = [picture.size for picture in pictures]
    samples = []
    logits: list[ViewLogits] = []
    for scale in views.scales:
        own = sampler if scale == 1 else sampler.at_scale(scale)
        pixels = own.resize([picture.pixels for picture in pictures])  # uint8 [B, 3, P, P]
        if scale == max(views.scales):
            finest = pixels
        for mirrored in (False, True)[: 2 if views.flip else 1]:
            seen = pixels.flip(-1) if mirrored else pixels
            image_latents = own.backend.encode_image(seen)  # [B, C_image, h, w]
            for each in (replace(sampling, seed=sampling.seed + number) for number in range(num_samples)):
                noise = own.noise(each.seed, image_ids)  # float32 [B, C, h, w]
                network = own.network(seen, each, captions)
                mask_latents = own.denoise(network, noise, image_latents, image_ids, each)  # float32 [B, C, h, w]
                if views.fusion == "mean":
                    slots, categories = own.logits(mask_latents)
                    if mirrored:
                        slots, categories = slots.flip(-1), None if categories is None else categories.flip(-1)
                    logits.append(ViewLogits(slots, categories))
                    continue
                decoded = own.decode(mask_latents, sizes, thresholds)
                samples.append([mirror(result) for result in decoded] if mirrored else decoded)
    if views.fusion == "mean":
        return _mean(sampler, logits, sizes, thresholds, views.edges, finest)
    return [combine(of_one_image, str(views.fusion)) for of_one_image in zip(*samples)]


def _mean(
    sampler: MaskSampler,
    views: Sequence[ViewLogits],
    sizes: Sequence[tuple[int, int]],
    thresholds: PostprocessConfig | None,
    edges: int,
    pictures: Tensor,
) -> list[EnsembleResult]:
    """Makes one result per picture of the views' mean probabilities; a segment's agreement is that of its pixels.

    With `edges`, a radius, those of segments follow those of the pictures, uint8 [B, 3, P, P]. The views' agreement is
    that on the map without.
    """
    slots, categories, agreement = average(views)
    results = sampler.maps(slots, categories, sizes, thresholds, edges, pictures)
    ensembles = []
    for result, size, own in zip(results, sizes, agreement):
        agreeing = F.interpolate(own[None, None], size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
        counts, sums = (np.bincount(result.segmentation.ravel(), weights) for weights in (None, agreeing.ravel()))
        segments = [
            segment | {"agreement": float(sums[segment["id"]] / counts[segment["id"]])}
            for segment in result.segments_info
        ]
        ensembles.append(EnsembleResult(result.segmentation, segments, agreeing, 0))
    return ensembles


def mirror(result: PanopticResult) -> PanopticResult:
    """Mirrors a result, left for right."""
    width = result.segmentation.shape[1]
    segments = [
        segment | {"bbox": [width - segment["bbox"][0] - segment["bbox"][2], *segment["bbox"][1:]]}
        for segment in result.segments_info
    ]
    return PanopticResult(np.ascontiguousarray(result.segmentation[:, ::-1]), segments)


def combine(samples: Sequence[PanopticResult], fusion: str = "medoid") -> EnsembleResult:
    """Makes one result of k >= 1 samples of an image, joined as `Views.fusion` says.

    Segments of two samples match when their IoU is above 0.5, which pairs them uniquely (Kirillov et al., "Panoptic
    Segmentation", CVPR 2019, section 4.1). The sample with the highest mean PQ against all others is the result.

    Raises:
        ArgumentError: no samples, or samples of different sizes.
    """
    maps = [sample.segmentation for sample in samples]
    if not maps or any(each.shape != maps[0].shape for each in maps):
        raise ArgumentError(f"samples of one image expected, not of sizes {[list(each.shape) for each in maps]}")
    compact = [np.unique(each, return_inverse=True) for each in maps]
    ids = [values for values, _ in compact]
    places = [inverse.ravel() for _, inverse in compact]
    count = len(samples)
    ious = {
        (one, other): iou_matrix(ids[one], places[one], ids[other], places[other])
        for one in range(count)
        for other in range(one + 1, count)
    }
    quality = np.zeros((count, count))
    for (one, other), iou in ious.items():
        quality[one, other] = quality[other, one] = mutual_quality(iou, ids[one], ids[other])
    reference = int(np.argmax(quality.sum(1)))

    agreeing = np.ones(maps[0].size, np.float32)
    votes = np.zeros((len(ids[reference]), maps[0].size if fusion == "vote" else 0), np.float32)
    if fusion == "vote":  # its own vote breaks ties
        np.put_along_axis(votes, places[reference][None], 1.5, axis=0)
    scores = np.zeros(len(ids[reference]))
    for other in range(count):
        if other == reference:
            continue
        iou = ious[reference, other] if reference < other else ious[other, reference].T
        match = np.where(iou > 0.5, iou, 0.0)  # at most one entry a row and column
        match[ids[reference] == 0] = ids[other] == 0  # void is void whatever its IoU
        agreeing += match[places[reference], places[other]] > 0
        scores += match.max(axis=1, initial=0.0)
        if fusion == "vote":
            for row, column in zip(*np.nonzero(match)):
                votes[row] += places[other] == column
    scores = scores / (count - 1) if count > 1 else np.ones_like(scores)
    score = dict(zip(ids[reference].tolist(), scores.tolist()))
    chosen = samples[reference]
    if fusion == "vote":
        chosen = _redrawn(chosen, ids[reference][votes.argmax(axis=0)].reshape(maps[0].shape).astype(np.int32))
        agreeing = votes.max(axis=0) - (votes.argmax(axis=0) == places[reference]) * 0.5
    return EnsembleResult(
        chosen.segmentation,
        [{**segment, "agreement": score[segment["id"]]} for segment in chosen.segments_info],
        (agreeing / count).astype(np.float32).reshape(maps[0].shape),
        reference,
    )


def _redrawn(result: PanopticResult, segmentation: np.ndarray) -> PanopticResult:
    """Returns `result` with another map, int32 [H, W], of its segments; those that have no pixel left fall away."""
    shapes = {shape["id"]: shape for shape in segment_shapes(segmentation)}
    segments = [segment | shapes[segment["id"]] for segment in result.segments_info if segment["id"] in shapes]
    return PanopticResult(segmentation, segments)


def iou_matrix(ids: np.ndarray, places: np.ndarray, other_ids: np.ndarray, other_places: np.ndarray) -> np.ndarray:
    """Computes the IoU of the segments of two maps, float64 [n, m], 0 where one is void.

    Args:
        ids, other_ids: integer [n] and [m], each map's ids in rising order.
        places, other_places: integer [pixels], where in its map's ids each pixel's id stands.
    """
    shape = (len(ids), len(other_ids))
    overlap = np.bincount(places * shape[1] + other_places, minlength=shape[0] * shape[1]).reshape(shape)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    return overlap / union * (ids != 0)[:, None] * (other_ids != 0)


def mutual_quality(iou: np.ndarray, ids: np.ndarray, other_ids: np.ndarray) -> float:
    """Computes the class-agnostic PQ of one map against another, in [0, 1], the same either way; 1 where both are void.

    Args:
        iou: float64 [n, m], see `iou_matrix`.
        ids, other_ids: integer [n] and [m], 0 for void.
    """
    segments = np.count_nonzero(ids) + np.count_nonzero(other_ids)
    return 2.0 * float(iou[iou > 0.5].sum()) / segments if segments else 1.0
