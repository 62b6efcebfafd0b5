"""Watches where a run's time goes: what is left of it, what its data takes and what its validations take."""

from __future__ import annotations

from ldmseg_fast.config import Config
from ldmseg_fast.threads import cores

BOTTLENECK = 0.25  # share of the time that waiting for data may take without a warning


class Pace:
    """Judges a run's time by the lines of its log. All times are in seconds of the run, over all its starts.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._slow_lines, self._warned = 0, False
        self._validation_cost = self._validated_at = 0.0

    def left(self, step: int, seconds: float, of_a_step: float) -> float:
        """Estimates the time to the run's end: by the pace of the last steps, or what train.max_minutes leaves."""
        train = self.config.train
        left = max(train.steps - step, 0) * of_a_step
        return min(left, max(60 * train.max_minutes - seconds, 0.0)) if train.max_minutes else left

    def data_warning(self, share: float) -> str:
        """Gives a warning, once, where a run waited for its data in two lines of the log in a row; "" otherwise.

        Args:
            share: of the time of a line that the run waited.
        """
        self._slow_lines = self._slow_lines + 1 if share > BOTTLENECK else 0
        if self._slow_lines != 2 or self._warned:
            return ""
        self._warned = True
        return (
            f"warning: {100 * share:.0f} % of the time goes into waiting for data; raise data.num_workers (now "
            f"{self.config.data.num_workers}; {cores()} cores here), or set data.resize=torch, data.cache or "
            f"data.latent_cache"
        )

    def may_validate(self, seconds: float) -> bool:
        """Tells whether a validation now would stay within `train.validate_share` of the time."""
        share = self.config.train.validate_share
        return share >= 1.0 or seconds - self._validated_at >= self._validation_cost * (1.0 - share) / share

    def validated(self, seconds: float, cost: float) -> None:
        """Takes note of a validation that began at `seconds` and took `cost`; the same on every rank."""
        self._validation_cost, self._validated_at = cost, seconds + cost
