"""Muon: hidden matrices step along the orthogonal matrix that is nearest to their momentum (Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon has the method. Its steps are scaled to AdamW's size (Liu et al. 2025, arXiv
2502.16982, section 2.2), so that learning rate and weight decay mean the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldmseg_fast import distributed
from ldmseg_fast.config.precision import has_units

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # of one iteration: it takes singular values of (0, 1] near 1 in five
ADAM_SIZE = 0.2  # root of the mean square of AdamW's steps
LEAST = 8  # rows and columns of a matrix that is worth it
PREFIX = "unet."
OUTER = ("conv_in", "conv_out")  # which read and write latents: not hidden


def hidden_matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the trained weights of a stage's UNet that Muon is for: float [R, C] or [R, C, k, k], no outer ones."""
    for name, parameter in module.named_parameters():
        is_matrix = parameter.ndim > 1 and min(parameter.shape[0], parameter[0].numel()) >= LEAST
        if (
            parameter.requires_grad
            and is_matrix
            and name.startswith(PREFIX)
            and not any(part in name for part in OUTER)
        ):
            yield parameter


def orthogonalize(matrix: Tensor) -> Tensor:
    """Moves the singular values of a float matrix [R, C] near 1, by Newton-Schulz iterations; float32 [R, C].

    They run in bfloat16 where the device has units for it. A matrix of zeros stays one.
    """
    x = matrix.to(torch.bfloat16 if has_units(matrix.device.type, torch.bfloat16) else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    first, second, third = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=second, alpha=third), x, beta=first)
    return (x.T if is_tall else x).float()


def orthogonalize_shared(matrices: list[Tensor]) -> list[Tensor]:
    """Applies `orthogonalize` to float matrices [R, C], at most as many as there are ranks: rank i to matrix i.

    Every rank has all matrices and gets all results, float32 [R, C].
    """
    if distributed.world_size() == 1:
        return [orthogonalize(matrix) for matrix in matrices]
    first = matrices[0]
    half = has_units(first.device.type, torch.bfloat16)  # then the iterations have rounded to it
    own = first.new_zeros(max(matrix.numel() for matrix in matrices), dtype=torch.bfloat16 if half else torch.float32)
    if (rank := distributed.rank()) < len(matrices):
        own[: matrices[rank].numel()] = orthogonalize(matrices[rank]).flatten()
    everyone = [torch.empty_like(own) for _ in range(distributed.world_size())]
    dist.all_gather(everyone, own)
    return [found[: matrix.numel()].view(matrix.shape).float() for matrix, found in zip(matrices, everyone)]


class Muon(torch.optim.AdamW):
    """Steps the weights of groups with `"orthogonal": True` by Muon, and all others by AdamW.

    The momentum lies where AdamW has its first moment; the second stays zero. `grad_scale` and `found_inf` mean what
    they mean to fused AdamW. Matrices must be whole: no ZeRO stage above 0. All ranks have the same gradients, so each
    turns its share of the matrices and gets the others from their ranks.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See `torch.optim.AdamW.step`; gradients of orthogonal groups are gone after it."""
        matrices = [
            (parameter, group)
            for group in self.param_groups
            for parameter in (group["params"] if group["orthogonal"] else ())
            if parameter.grad is not None
        ]
        matrices.sort(key=lambda found: -found[0].numel())  # those that the ranks turn at a time are alike
        ranks = distributed.world_size()
        for start in range(0, len(matrices), ranks):
            self._step_matrices(matrices[start : start + ranks])
        return super().step(closure)

    def _step_matrices(self, matrices: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Steps as many matrices as there are ranks; each rank turns one."""
        taken = 1.0 if (skipped := getattr(self, "found_inf", None)) is None else 1.0 - skipped
        aheads = [self._look_ahead(parameter, taken) for parameter, _ in matrices]
        for (parameter, group), ahead, turned in zip(matrices, aheads, orthogonalize_shared(aheads)):
            size = ADAM_SIZE * math.sqrt(max(ahead.shape))
            update = turned.view(parameter.shape) * size + parameter * group["weight_decay"]
            parameter.sub_(update * (group["lr"] * taken))
            parameter.grad = None

    def _look_ahead(self, parameter: Tensor, taken: Tensor | float) -> Tensor:
        """Moves a matrix's momentum, and returns Nesterov's, float32 [R, C]."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        gradient = gradient.float()
        if (scale := getattr(self, "grad_scale", None)) is not None:
            gradient = gradient / scale
        if isinstance(taken, Tensor):
            gradient = torch.where(taken > 0, gradient, 0.0)
        momentum = state["exp_avg"]
        momentum.add_((gradient - momentum) * ((1 - MOMENTUM) * taken))
        state["step"] += taken
        return gradient.lerp(momentum, MOMENTUM).flatten(1)
