"""Measures the gradient noise scale: up to about which batch a larger one saves as many steps as it costs pictures.

McCandlish et al. 2018, arXiv 1812.06162, section 2.2 and appendix A.1: the squared norm of a gradient over B pictures
is |G|^2 + S / B in expectation. A step has two such norms, that of its micro-batches and that of the whole batch, which
give both constants; the noise scale is S / |G|^2 pictures.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ldmseg_fast.config import TrainConfig
from ldmseg_fast.errors import ConfigError

MICRO, WHOLE = "micro_square", "whole_square"  # names in the window of the log
MEMORY = 100  # steps over which S and |G|^2 are averaged, exponentially; each alone is far too noisy


class NoiseScale:
    """Averages what steps tell about gradients and their noise.

    Args:
        small, big: pictures of a micro-batch, and of a whole step.
    """

    def __init__(self, small: float, big: float) -> None:
        self.small, self.big = small, big
        self._signal = self._noise = 0.0  # |G|^2 and S, both times the same factor

    def update(self, small_square: float, big_square: float, steps: int) -> float | None:
        """Takes mean squared norms over `steps` steps, and returns the noise scale in pictures.

        Numbers that are not finite are left out. None where the average of |G|^2 is not above zero yet.
        """
        if math.isfinite(small_square) and math.isfinite(big_square):
            signal = (self.big * big_square - self.small * small_square) / (self.big - self.small)
            noise = (small_square - big_square) / (1.0 / self.small - 1.0 / self.big)
            kept = (1.0 - 1.0 / MEMORY) ** steps
            self._signal = kept * self._signal + (1.0 - kept) * signal
            self._noise = kept * self._noise + (1.0 - kept) * noise
        return max(self._noise, 0.0) / self._signal if self._signal > 0 else None


class NoiseMeter:
    """Watches the gradients of a run, those of each backward pass as they come, before ranks share them.

    Args:
        stage: what is trained; hooks are put on its parameters.
        train: settings.
        ranks: how many there are.

    Raises:
        ConfigError: a step has one micro-batch, which leaves nothing to compare.
    """

    def __init__(self, stage: nn.Module, train: TrainConfig, ranks: int) -> None:
        self.passes = train.accumulation
        parts = train.accumulation * ranks
        if parts == 1:
            raise ConfigError(
                "train.noise_scale=true compares the gradients of micro-batches, and a step has one; set "
                "train.accumulation=2 or more, start several ranks, or set train.noise_scale=false"
            )
        self.scale = NoiseScale(train.batch_size / parts, train.batch_size)
        self._total: Tensor | None = None
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        square = gradient.detach().float().square().sum()
        self._total = square if self._total is None else self._total + square

    def of_step(self, norm: Tensor, loss_scale: float) -> dict[str, Tensor]:
        """Gives what a step adds to the window of the log: mean squared norms, float32 scalars.

        Args:
            norm: of the whole step's gradient, before clipping, a scalar.
            loss_scale: by which the loss was multiplied.
        """
        total, self._total = self._total, None
        assert total is not None  # there were backward passes
        # each pass has the loss of its micro-batch over their number
        return {MICRO: total * (self.passes / loss_scale**2), WHOLE: norm.square()}

    def of_window(self, values: dict[str, float], steps: int) -> None:
        """Puts noise_scale, in pictures, into the means of a window in the place of the squared norms."""
        found = self.scale.update(values.pop(MICRO), values.pop(WHOLE), steps)
        if found is not None:
            values["noise_scale"] = found
