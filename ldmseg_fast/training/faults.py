"""Handles what may go wrong in flight: numbers that are not finite, pictures that cannot be read, no memory left."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.config import Config
from ldmseg_fast.errors import DataError, NonFiniteError, OutOfMemory
from ldmseg_fast.training.estimate import advice


class NonFiniteGuard:
    """Counts skipped steps, and writes down which images they had, in LOGS/nonfinite-RANK.jsonl.

    The verdict on a step is read when the next one is under way, so that the CPU does not wait for the device.

    Args:
        path: the file.
        limit: steps in a row after which training ends; 0: never.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.in_a_row = self.total = 0
        self._pending: deque[tuple[int, list[Any], Tensor, Any]] = deque()

    def watch(self, step: int, image_ids: list[Any], loss: Tensor, skipped: Tensor | bool) -> list[bool]:
        """Takes note of a step; returns the verdicts that are in by now: whether each step was skipped.

        Args:
            step: its number.
            image_ids: of this rank.
            loss: a scalar, any float type.
            skipped: a boolean, or a boolean scalar on the loss's device.

        Raises:
            NonFiniteError: too many steps in a row.
        """
        verdict = torch.stack([loss.detach().float(), torch.as_tensor(skipped, device=loss.device).float()])
        self._pending.append((step, image_ids, *_start_copy(verdict)))
        return self._judge(keep=1 if loss.is_cuda else 0)

    def flush(self) -> list[bool]:
        """Returns the verdicts that are left. Raises NonFiniteError as `watch`."""
        return self._judge(keep=0)

    def _judge(self, keep: int) -> list[bool]:
        verdicts = []
        while len(self._pending) > keep:
            step, image_ids, verdict, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, skipped = verdict.tolist()
            verdicts.append(skipped > 0)
            if not verdicts[-1]:
                self.in_a_row = 0
                continue
            self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
            line = {"step": step, "loss": str(loss), "image_ids": image_ids}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.limit and self.in_a_row >= self.limit:
                raise NonFiniteError(
                    f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step {step} (loss "
                    f"{loss}); their images are in {self.path}. The weights are still finite: resume with a "
                    f"lower train.learning_rate or train.clip, or train.precision=bf16 or fp32"
                )
        return verdicts


def _start_copy(values: Tensor) -> tuple[Tensor, Any]:
    """`values` on the CPU, and the event after which they are there; None where they are already."""
    if not values.is_cuda:
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


class BadItems:
    """Keeps the budget of pictures that cannot be read.

    Each is named once and replaced; beyond the budget training ends.

    Args:
        num_items: of the data set.
        share: of them that may be bad.
    """

    def __init__(self, num_items: int, share: float) -> None:
        self.allowed = math.floor(share * num_items)
        self.num_items, self.share = num_items, share
        self.messages: dict[int, str] = {}

    def add(self, failures: list[tuple[int, str]]) -> list[str]:
        """Takes (index, message) of failures, and returns the messages that are new.

        Raises:
            DataError: the budget is spent.
        """
        new = [message for index, message in failures if index not in self.messages]
        self.messages.update(failures)
        self.check(len(self.messages))
        return new

    def check(self, count: int) -> None:
        """Raises DataError where `count` (over all ranks) is over the budget."""
        if count <= self.allowed:
            return
        last = next(reversed(self.messages.values()), "see the other ranks' output")
        raise DataError(
            f"{count} of {self.num_items} items cannot be read, data.bad_items={self.share:g} allows {self.allowed}; "
            f"the last: {last}"
        )


def out_of_memory(stage_name: str, config: Config, world_size: int, reason: str) -> OutOfMemory:
    """Makes the error of a run without memory, with the settings that free most. reason: of `why_out_of_memory`."""
    lines = "\n".join(f"  {line}" for line in advice(stage_name, config, world_size))
    return OutOfMemory(f"out of memory ({reason}). What helps most, then --resume:\n{lines}")
