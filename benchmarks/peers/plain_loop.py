"""A plain training loop: eager modules under autocast, pictures decoded and encoded in every step, AdamW parameter by
parameter, and a wait for the loss in every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.peers.plain_item import plain_item
from ldmseg_fast.config import Config
from ldmseg_fast.training.inputs import training_set
from ldmseg_fast.training.stages import DiffusionStage


class PlainLoop:
    """Trains as a loop does that nobody has tuned."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.device = config, device
        self.stage = DiffusionStage(config).to(device).train()
        self.dataset = training_set(config, config.mask_vae.num_slots)
        self.parameters = [p for p in self.stage.parameters() if p.requires_grad]
        rate, decay = config.train.learning_rate, config.train.weight_decay
        self.adamw = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay, foreach=False, fused=False)
        self.step_number = 0

    def batch(self) -> dict[str, Any]:
        """Decodes in this process; float pictures, float bit planes and long masks travel to the device."""
        rng = np.random.default_rng(self.step_number)
        indices = rng.integers(0, len(self.dataset), self.config.train.batch_size)
        items = [plain_item(self.dataset, int(index), rng) for index in indices]
        batch = {key: torch.stack([item[key] for item in items]).to(self.device) for key in items[0]}
        slots = torch.arange(256, device=self.device).clamp(max=self.dataset.num_slots - 1).to(torch.uint8)
        image = ((batch["image"] + 1) * 127.5).round().to(torch.uint8)
        ids = [self.dataset.image_id(int(index)) for index in indices]
        return {
            "image": image,
            "segment_ids": batch["target"].to(torch.uint8),
            "table": slots.expand(len(items), -1),
            "image_id": ids,
        }

    def step(self) -> float:
        losses = self.stage(self.batch(), self.step_number)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip, foreach=False)
        self.adamw.step()
        self.adamw.zero_grad()
        self.step_number += 1
        return losses["loss"].item()
