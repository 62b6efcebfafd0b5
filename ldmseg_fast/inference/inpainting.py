"""Completes a panoptic map of which some pixels are given: slots for the given ids, sampling around them, one map.

Shapes: H W the picture's own size, S the network's side, h w latent cells, Q slots (slot 0 is void).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.pictures import Picture
from ldmseg_fast.diffusion.inpainting import KnownLatents, whole_cells
from ldmseg_fast.diffusion.sampler import seed_of
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.diffusion.solvers import Constraint, StepNoise
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.given_maps import Given, complete, prepare
from ldmseg_fast.inference.sampling import MaskSampler, Sampling
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.panoptic.postprocess import PanopticResult

LEAST = 1e-9  # probability of a slot in a cell that is given whole to another
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
    edges: int = 0,
) -> list[PanopticResult]:
    """Does `LDMSegPipeline.inpaint` for one batch, whose arguments have been checked.

    Args:
        sampler: of the model.
        pictures: uint8 [S, S, 3], with the sizes (H, W) of their maps.
        maps: integer ids [H, W].
        masks: bool [H, W], True where the map is given.
        image_ids: from which, with the seed, all noise comes.
        sampling: solver, steps, timesteps, seed and callback.
        thresholds, method, draft_steps, edges: as in `LDMSegPipeline.inpaint`.
        numbers: the given ids whose category is known, each with its number; one for each picture.

    Returns:
        A PanopticResult per picture.

    Raises:
        ArgumentError: an unknown method.
        NonFiniteError: see `MaskSampler.denoise`.
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
    sizes = [picture.size for picture in pictures]
    # not fused: what is given says what a slot is
    if edges:
        logits, categories = sampler.logits(mask_latents)
        logits = with_given(logits.float(), [given.slots for given in givens])
        decoded = sampler.maps(logits, categories, sizes, thresholds, edges, pixels, fuse=False)
    else:
        decoded = sampler.decode(mask_latents, sizes, thresholds, fuse=False)
    return [
        complete(result, given, thresholds.count_threshold, info.categories) for result, given in zip(decoded, givens)
    ]


def with_given(logits: Tensor, given: Sequence[np.ndarray]) -> Tensor:
    """Makes slots certain where they are given, so that a filter carries them into what is not.

    In a cell of which a share is given, the other pixels keep the logits' probabilities. How high a cell's logits
    stand, the logarithm of their sum of exponentials, stays.

    Args:
        logits: of slots, float32 [B, Q, h, w].
        given: integer [S, S] of each picture, slots, 0 where none is given; S is a multiple of h and w.

    Returns:
        Logits, float32 [B, Q, h, w].
    """
    mixed = []
    for own, slots in zip(logits, given):
        height, width = own.shape[1:]
        pixels = torch.as_tensor(slots, device=own.device).long()
        rows, columns = (
            torch.arange(size, device=own.device) * cells // size for size, cells in zip(pixels.shape, (height, width))
        )
        places = (pixels * height + rows[:, None]) * width + columns
        shares = torch.bincount(places.flatten(), minlength=own.numel()).view(own.shape).float()
        shares /= pixels.numel() / (height * width)
        probabilities = shares[:1] * own.softmax(0)  # slot 0: not given
        probabilities[1:] += shares[1:]
        mixed.append(probabilities.clamp(min=LEAST).log() + own.logsumexp(0))
    return torch.stack(mixed)


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
    both = mask_vae.decode_latents_both(mask_latents)
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
