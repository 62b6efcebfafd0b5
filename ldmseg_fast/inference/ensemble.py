"""Joins several samples of one image: the sample that agrees best with the others, and how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.pictures import Picture
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.sampling import MaskSampler, Sampling
from ldmseg_fast.panoptic.postprocess import PanopticResult


@dataclass(frozen=True)
class EnsembleResult(PanopticResult):
    """Holds the medoid of k samples.

    Entries of `segments_info` have "agreement" too: the mean IoU with the segment's matches in the other samples, 0 for
    those that have none.

    Attributes:
        agreement: float32 [H, W] in [0, 1], the share of samples, this one included, whose match of the pixel's segment
            covers the pixel; where this sample is void, the share of samples that are.
        reference: which of the samples it is.
    """

    agreement: np.ndarray
    reference: int


def sample_ensemble(
    sampler: MaskSampler,
    pictures: Sequence[Picture],
    image_ids: Sequence[int | str],
    sampling: Sampling,
    *,
    num_samples: int,
    thresholds: PostprocessConfig | None,
    captions: Sequence[str] | None,
) -> list[EnsembleResult]:
    """Does `LDMSegPipeline.ensemble` for one batch, whose arguments have been checked; pictures are encoded once.

    Args:
        sampler: of the model.
        pictures: uint8 [S, S, 3], with the sizes (H, W) of their maps.
        image_ids: from which, with each sample's seed, all noise comes.
        sampling: of the first sample; those that follow have the seeds after its own.
        num_samples: k.
        thresholds, captions: as in `LDMSegPipeline.__call__`.
    """
    pixels = sampler.resize([picture.pixels for picture in pictures])  # uint8 [B, 3, S, S]
    image_latents = sampler.backend.encode_image(pixels)  # [B, C_image, h, w]
    sizes = [picture.size for picture in pictures]
    samples = []
    for each in (replace(sampling, seed=sampling.seed + number) for number in range(num_samples)):
        noise = sampler.noise(each.seed, image_ids)  # float32 [B, C, h, w]
        network = sampler.network(pixels, each, captions)
        mask_latents = sampler.denoise(network, noise, image_latents, image_ids, each)  # float32 [B, C, h, w]
        samples.append(sampler.decode(mask_latents, sizes, thresholds))
    return [combine(of_one_image) for of_one_image in zip(*samples)]


def combine(samples: Sequence[PanopticResult]) -> EnsembleResult:
    """Makes one result of k >= 1 samples of an image.

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
    scores = np.zeros(len(ids[reference]))
    for other in range(count):
        if other == reference:
            continue
        iou = ious[reference, other] if reference < other else ious[other, reference].T
        match = np.where(iou > 0.5, iou, 0.0)  # at most one entry a row and column
        match[ids[reference] == 0] = ids[other] == 0  # void is void whatever its IoU
        agreeing += match[places[reference], places[other]] > 0
        scores += match.max(axis=1, initial=0.0)
    scores = scores / (count - 1) if count > 1 else np.ones_like(scores)
    score = dict(zip(ids[reference].tolist(), scores.tolist()))
    chosen = samples[reference]
    return EnsembleResult(
        chosen.segmentation,
        [{**segment, "agreement": score[segment["id"]]} for segment in chosen.segments_info],
        (agreeing / count).reshape(maps[0].shape),
        reference,
    )


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
