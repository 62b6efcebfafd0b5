"""EoMT (Kerssies et al., arXiv 2503.19108) from transformers, with random weights: the rival that is not generative."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SIDE = 640  # of the published panoptic models
# ViT-S/16 with 4 register tokens, whose last three blocks see the queries, and COCO's 133 categories
SMALL: dict[str, Any] = {
    "image_size": SIDE, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3,
    "num_labels": 133,
}  # fmt: skip


class Eomt:
    """Holds EoMT-S and its processor.

    Args:
        device, dtype: of the network.
        compiled: torch.compile with mode="max-autotune", as the authors time it; default mode on a CPU.
        changes: of `SMALL`, for tests.
    """

    def __init__(self, device: str, dtype: torch.dtype, compiled: bool = False, **changes: Any) -> None:
        from transformers import EomtConfig, EomtForUniversalSegmentation, EomtImageProcessor

        torch.manual_seed(0)
        config = EomtConfig(**SMALL | changes)
        self.device, self.dtype = torch.device(device), dtype
        model: Any = EomtForUniversalSegmentation(config).eval().requires_grad_(False)
        model = model.to(self.device, dtype)
        mode = "max-autotune" if self.device.type == "cuda" else None
        self.model = torch.compile(model, mode=mode) if compiled else model
        side = config.image_size
        self.processor = EomtImageProcessor(size={"shortest_edge": side, "longest_edge": side}, do_pad=True)

    def preprocess(self, images: list[np.ndarray]) -> Tensor:
        """uint8 [H, W, 3] each -> normalised, [B, 3, S, S] on the device."""
        return self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)

    @torch.inference_mode()
    def forward(self, inputs: Tensor) -> Any:
        return self.model(pixel_values=inputs)

    def whole(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        """From arrays to maps and segments, by transformers' own post-processing."""
        outputs = self.forward(self.preprocess(images))
        sizes = [image.shape[:2] for image in images]
        return self.processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
