"""Says how a picture is segmented, and holds what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.panoptic.results import PanopticResult

VIEW_SIDE = 2048  # pixels of the longer side of what is shown; maps keep their picture's size
Stop = Callable[[], None]  # is called between sampling steps; ends the work by raising


@dataclass(frozen=True)
class Settings:
    """Says how a picture is segmented. None stands for the model's own value.

    Attributes:
        steps: evaluations of the UNet.
        size: side in pixels of what the networks see.
        seed: of the noise.
        solver: "ddim", "dpmpp_2m" or "heun".
        mask_threshold, overlap_threshold: 0 to 1, see `config.PostprocessConfig`.
        count_threshold: least area of a segment, in pixels of the map.
        backend: one of the worker's; "": its first.
    """

    steps: int | None = None
    size: int | None = None
    seed: int = 0
    solver: str = "ddim"
    mask_threshold: float | None = None
    count_threshold: int | None = None
    overlap_threshold: float | None = None
    backend: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Makes settings of a JSON object; what it leaves out, or has as null, keeps its default.

        Raises:
            ArgumentError: a name that is no setting; it lists those that are. Values are checked when they are used.
        """
        known = [each.name for each in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ArgumentError(f"{unknown[0]!r:.80}: no such setting; there are {', '.join(known)}")
        return cls(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Segmented:
    """Holds what `Worker.segment` and `Worker.complete` give.

    Attributes:
        result: the map, int32 [H, W] of the picture's size as it is shown (turned by its EXIF orientation), and its
            segments.
        view: the picture, uint8 [h, w, 3], scaled down to VIEW_SIDE where it is larger.
        seconds: that the work took, without the time in the queue.
        settings: that were used, every one with its value.
        orientation: EXIF orientation of the file, 1 to 8; 1 where there was none.
    """

    result: PanopticResult
    view: np.ndarray
    seconds: float
    settings: Settings
    orientation: int = 1


@dataclass(frozen=True)
class Comparison:
    """Holds two results of one picture and where they agree.

    Attributes:
        first, second: the results.
        agreement: bool [H, W], whether the pixel's segments match (IoU above 0.5) and both cover it, or both are void.
        share: of the pixels that agree, 0 to 1.
        quality: class-agnostic panoptic quality of one against the other, the same either way, 0 to 1.
    """

    first: Segmented
    second: Segmented
    agreement: np.ndarray
    share: float
    quality: float
