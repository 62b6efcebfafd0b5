"""Everything between a picture's pixels and its map, so that a CUDA graph can hold it: one launch for a picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldmseg_fast.backends.finite import all_finite
from ldmseg_fast.backends.graphs.loop import Steps
from ldmseg_fast.kernels.panoptic_head import panoptic_head

Thresholds = tuple[float, int, float]  # mask, count, overlap: see `kernels.panoptic_head`


class WholePicture:
    """Encodes, samples, decodes and labels pictures of one size.

    Args:
        encode: pictures uint8 [B, 3, S, S] -> image latents [B, C_image, h, w].
        make_steps: the sampling loop for such image latents.
        decode: mask latents float32 [B, C, h, w] -> slot logits [B, Q, ...], and category logits where there are any.
        network_size, size: (height, width) to which logits are resized, the one after the other.
        thresholds: of the head.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        make_steps: Callable[[Tensor], Steps],
        decode: Callable[[Tensor], tuple[Tensor, ...]],
        network_size: tuple[int, int],
        size: tuple[int, int],
        thresholds: Thresholds,
    ) -> None:
        self.encode = encode
        self.make_steps = make_steps
        self.decode = decode
        self.network_size = network_size
        self.size = size
        self.thresholds = thresholds
        self._steps: Steps | None = None

    def __call__(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Segments pictures uint8 [B, 3, S, S] from noise float32 [B, C, h, w].

        Returns:
            bool [4], whether image latents, noise, mask latents and logits are finite; the map int32 [B, H, W]; of each
            slot area int32 [B, Q], box int32 [B, Q, 4] and score float32 [B, Q]. Where the model has categories, also
            slot logits and category logits.
        """
        image_latents = self.encode(images)
        if self._steps is None:  # made by the first call, which is never captured
            self._steps = self.make_steps(image_latents)
        self._steps.fill(noise, image_latents)
        self._steps.run()
        logits, *categories = self.decode(self._steps.result)
        decoded = all_finite(logits)
        for each in categories:
            decoded = decoded & all_finite(each)
        finite = [all_finite(each) for each in (image_latents, noise, self._steps.result)]
        segmentation, _, *statistics = panoptic_head(logits, self.network_size, self.size, *self.thresholds)
        needed = (logits, *categories) if categories else ()
        return torch.stack([*finite, decoded]), segmentation, *statistics, *needed
