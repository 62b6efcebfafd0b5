"""AdamW whose moments of large parameters take a byte a number (Dettmers et al. 2021, arXiv 2110.02861).

A moment lies in blocks of 256 numbers. Each block has a float32 scale, its number of largest magnitude, and each number
is one of 256 levels of it, which lie closer together near zero (the paper's dynamic tree). Steps are computed in
float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers that share a scale
LEAST = 4096  # numbers of a parameter that is worth it
BYTES = 2 * (1 + 4 / BLOCK)  # of both moments, a number
DECADES = 7
MOMENTS = ("exp_avg", "exp_avg_sq")
HASH = 0x1E3779B1  # odd: every bit of a number moves the ones above it


@cache
def levels(signed: bool) -> Tensor:
    """Returns the levels, float32 [256] and rising: 0, 1, and in each decade twice as many as in the one below."""
    positive = []
    for decade in range(DECADES):
        bounds = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        positive.append((bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (decade + 1 - DECADES))
    found = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([found, -found, ends] if signed else [found, ends]).sort().values.float()


class Scale:
    """Tells between which of rising marks numbers lie, by two look-ups for a search of eight.

    The upper half of a float32 names a range that is narrower than any two marks are apart, so holds one at most.

    Args:
        marks: float32 [M], rising.
    """

    def __init__(self, marks: Tensor) -> None:
        halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).roll(2**15) << 16  # of 0, 1, ... -2, -1 [65536]
        least = torch.where(halves < 0, halves | 0xFFFF, halves).view(torch.float32)
        self.table = torch.searchsorted(marks, least, right=True, out_int32=True)
        self.marks = torch.cat([marks, torch.full((1,), torch.inf)])

    def to(self, device: torch.device) -> Scale:
        """Moves it."""
        self.table, self.marks = self.table.to(device), self.marks.to(device)
        return self

    def below(self, numbers: Tensor) -> Tensor:
        """Counts the marks that are not above numbers, float32 of any shape: int32 of the same shape."""
        found = self.table[numbers.view(torch.int32) >> 16]
        return found + (numbers >= self.marks[found])


@cache
def marks(signed: bool, device: torch.device) -> Scale:
    """Returns what numbers are told apart by: the middles between levels where `signed`, the levels where not."""
    found = levels(signed)
    return Scale((found[1:] + found[:-1]) / 2 if signed else found).to(device)


class Moment:
    """Holds a moment of one parameter in 8 bits.

    Args:
        parameter: float, any shape. The moment is zero.
        signed: whether it may be negative.
    """

    def __init__(self, parameter: Tensor, signed: bool) -> None:
        self.shape, self.signed, self.size = parameter.shape, signed, parameter.numel()
        rows, device = -(-self.size // BLOCK), parameter.device
        self.levels = levels(signed).to(device)
        self.marks = marks(signed, device)
        self.scales = torch.zeros(rows, 1, device=device)
        zero = int((levels(signed) == 0).nonzero())
        self.codes = torch.full((rows, BLOCK), zero, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Counts the bytes that it takes, as a tensor's own does."""
        return self.codes.nbytes + self.scales.nbytes

    def float(self) -> Tensor:
        """Returns the numbers, float32 of any shape, the parameter's."""
        return (self.levels[self.codes.int()] * self.scales).flatten()[: self.size].view(self.shape)

    def copy_(self, values: Tensor) -> None:
        """Takes numbers, float of any shape, the parameter's; those that came from `float` stay what they are.

        Signed ones are rounded to the nearest level. Of others a step changes a thousandth, which that would lose: they
        are rounded up or down by chance, in the mean to what they are. Chance is what the last bits of a number say,
        the same in a run that is resumed. None of them becomes zero: updates divide by their root.
        """
        numbers, left = values.float().flatten(), self.codes.numel() - self.size
        rows = (F.pad(numbers, (0, left)) if left else numbers).view(-1, BLOCK)
        torch.gather(rows, 1, rows.abs().argmax(1, keepdim=True), out=self.scales)
        shares = rows / torch.where(self.scales == 0, 1.0, self.scales)
        if self.signed:
            codes = self.marks.below(shares)
        else:
            below = (self.marks.below(shares) - 1).clamp(0, 254)
            low, high = self.levels[below], self.levels[below + 1]
            chance = ((rows.view(torch.int32) * HASH) >> 8 & 0xFFFF) / 65536.0
            codes = below + (chance < (shares - low) / (high - low))
            codes = torch.where(rows > 0, codes.clamp(min=1), 0)
        self.codes.copy_(codes)


class EightBitAdamW(torch.optim.AdamW):
    """Steps as AdamW; moments of parameters of 4096 numbers on lie in 8 bits.

    `grad_scale` and `found_inf` mean what they mean to fused AdamW. Parameters must be whole: no ZeRO stage above 0.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See `torch.optim.AdamW.step`; gradients of large parameters are gone after it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and isinstance(adam_state(self, parameter)["exp_avg"], Moment):
                    self._step_one(parameter, group)
                    parameter.grad = None
        super().step()
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        gradient = gradient.float()
        if (scale := getattr(self, "grad_scale", None)) is not None:
            gradient = gradient / scale
        taken: Tensor | float = 1.0 if (skipped := getattr(self, "found_inf", None)) is None else 1.0 - skipped
        if isinstance(taken, Tensor):
            gradient = torch.where(taken > 0, gradient, 0.0)
        first, second = group["betas"]
        state["step"] += taken
        mean, square = state["exp_avg"].float(), state["exp_avg_sq"].float()
        mean += (gradient - mean) * ((1 - first) * taken)
        square += (gradient.square() - square) * ((1 - second) * taken)
        steps = state["step"].clamp(min=1)
        rate = group["lr"] * taken
        root = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(mean.div(root) * (rate / (1 - first**steps)))
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)


def adam_state(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Any]:
    """Gives AdamW's state of a parameter of any shape: "step" and the moments, float32 or in 8 bits.

    It is made as the optimizer itself would make it where no step was taken yet.
    """
    state = optimizer.state[parameter]
    if not state:
        fused = bool(optimizer.defaults.get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
        in_bytes = isinstance(optimizer, EightBitAdamW) and parameter.numel() >= LEAST
        for key in MOMENTS:
            if in_bytes:
                state[key] = Moment(parameter, signed=key == "exp_avg")
            else:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
