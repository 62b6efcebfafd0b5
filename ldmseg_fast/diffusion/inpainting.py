"""Constrains sampling where a part of x_0 is known (see `diffusion.solvers.Constraint`).

Sources: RePaint, Lugmayr et al. 2022, arXiv 2201.09865; mask inpainting, arXiv 2401.10227.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.diffusion.solvers import StepNoise


class KnownLatents:
    """Keeps the known cells of x_0 as they are, in what the network sees and in what it answers.

    They are the condition of the first evaluation, with zeros elsewhere, as the setting `diffusion.inpainting` trains
    it. With `step_noise` the network sees them noised anew at each step (RePaint: Lugmayr et al. 2022, equation 8).
    Without, the estimate of x_0 alone is replaced: DDIM then leads the known cells along the line from their own
    initial noise to the known values, which is equation 8 with the same noise at every step.

    Args:
        known: scaled mask latents, float [B, C, h, w].
        cells: bool [B, 1, h, w], where `known` holds.
        scheduler: alphas.
        step_noise: evaluation -> standard normal noise, float32 [B, C, h, w].
    """

    def __init__(self, known: Tensor, cells: Tensor, scheduler: Scheduler, step_noise: StepNoise | None = None) -> None:
        self.known = known.float()
        self.cells = cells
        self.scheduler = scheduler
        self.step_noise = step_noise
        self.evaluations = 0

    def condition(self, latents: Tensor) -> Tensor:
        """Returns the known cells, zero elsewhere: float32 [B, C, h, w], as large as `latents`."""
        return torch.where(self.cells, self.known, torch.zeros_like(latents))

    def latents(self, latents: Tensor, timestep: int) -> Tensor:
        """Returns x_t, float32 [B, C, h, w], with the known cells at the noise level of `timestep`.

        With `step_noise` each call counts one evaluation more. Without it `latents` is returned itself.
        """
        if self.step_noise is None:
            return latents
        noise = self.step_noise(self.evaluations).to(latents)
        self.evaluations += 1
        times = torch.full((len(latents),), timestep, device=latents.device)
        return torch.where(self.cells, self.scheduler.add_noise(self.known, noise, times), latents)

    def estimate(self, estimate: Tensor) -> Tensor:
        """Returns the estimate of x_0, float32 [B, C, h, w], with the known cells put in."""
        return torch.where(self.cells, self.known, estimate)


def whole_cells(known: Tensor, cell: int, margin: int = 0) -> Tensor:
    """Finds the latent cells, bool [B, 1, h, w], all of whose pixels are known, from known pixels, bool [B, H, W].

    Args:
        cell: side of a cell in pixels; H and W are multiples of it.
        margin: cells beside an unknown one that do not count as known either: the encoder sees across a cell's edge.
    """
    unknown = F.max_pool2d((~known[:, None]).float(), cell)
    if margin:
        unknown = F.max_pool2d(unknown, 2 * margin + 1, stride=1, padding=margin)
    return unknown == 0
