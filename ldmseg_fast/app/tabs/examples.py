"""Draws the scenes that the page offers as examples, with their true maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.panoptic.format import write_panoptic_png

SEEDS = (3, 11, 20, 34)  # of the scenes' indices: held out, neither crowded nor empty


@dataclass(frozen=True)
class Example:
    """Holds the files of one scene: the picture, and its true map as a panoptic PNG."""

    picture: str
    truth: str


def write_examples(folder: Path, size: int = 64) -> list[Example]:
    """Draws the examples into a folder; `size` is the side of each in pixels."""
    examples = []
    for number, index in enumerate(SEEDS, start=1):
        rgb, ids, _ = generate_scene(size, 0, index, "val2017", version=1)
        picture, truth = folder / f"scene-{number}.png", folder / f"scene-{number}-truth.png"
        Image.fromarray(rgb).save(picture)
        write_panoptic_png(truth, ids)
        examples.append(Example(str(picture), str(truth)))
    return examples
