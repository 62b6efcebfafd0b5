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
        rank, ranks = _share()
        for start in range(0, len(matrices), ranks):
            self._step_matrices(matrices[start : start + ranks], rank, ranks > 1)
        return super().step(closure)

    def _step_matrices(self, matrices: list[tuple[Tensor, dict[str, Any]]], rank: int, shared: bool) -> None:
        """Steps at most as many matrices as there are ranks; rank i turns matrix i, for all where they are shared."""
        taken = 1.0 if (skipped := getattr(self, "found_inf", None)) is None else 1.0 - skipped
        own = None
        for index, (parameter, _) in enumerate(matrices):
            ahead = self._look_ahead(parameter, taken)
            if index == rank:
                own = orthogonalize(ahead)
        for index, (parameter, group) in enumerate(matrices):
            turned = own if index == rank else None
            if shared:
                turned = _from_rank(index, turned, parameter)
            assert turned is not None
            size = ADAM_SIZE * math.sqrt(max(turned.shape))
            update = turned.view(parameter.shape) * size + parameter * group["weight_decay"]
            parameter.sub_(update * (group["lr"] * taken))

    def _look_ahead(self, parameter: Tensor, taken: Tensor | float) -> Tensor:
        """Moves a matrix's momentum by its gradient, which is gone then; returns Nesterov's, float32 [R, C]."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        parameter.grad, gradient = None, gradient.float()
        if (scale := getattr(self, "grad_scale", None)) is not None:
            gradient = gradient / scale
        if isinstance(taken, Tensor):
            gradient = torch.where(taken > 0, gradient, 0.0)
        momentum = state["exp_avg"]
        momentum.add_((gradient - momentum) * ((1 - MOMENTUM) * taken))
        state["step"] += taken
        return gradient.lerp(momentum, MOMENTUM).flatten(1)


def _share() -> tuple[int, int]:
    """Returns this rank's number and the number of ranks that share the matrices."""
    return distributed.rank(), distributed.world_size()


def _from_rank(source: int, turned: Tensor | None, like: Tensor) -> Tensor:
    """Gets a turned matrix, float32 [R, C], from the rank that has it, for a parameter; in bfloat16 between GPUs.

    One matrix is on its way at a time, so that a step needs no more memory on many ranks.
    """
    kind = torch.bfloat16 if like.device.type == "cuda" else torch.float32
    moved = torch.empty_like(like.flatten(1), dtype=kind) if turned is None else turned.to(kind).contiguous()
    dist.broadcast(moved, source)
    return moved.float()
