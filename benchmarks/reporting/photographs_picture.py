"""Draws photographs beside the segments that a model finds in them, as one picture.

python -m benchmarks.reporting.photographs_picture MODEL FILE

The photographs come with scikit-image: the astronaut Eileen Collins (NASA, public domain), a cup of coffee (Rachel
Michetti, public domain), the cat Chelsea (Stefan van der Walt, CC0) and a rocket (SpaceX, CC0). The picture in
`results/` is that of `photographs benchmarks/results/photographs.png`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.files import replacing
from ldmseg_fast.pipeline import LDMSegPipeline
from ldmseg_fast.reports.draw import overlay, picture_grid
from ldmseg_fast.reports.labels import named_overlay

NAMES = ("astronaut", "coffee", "chelsea", "rocket")
CELL = 340  # pixels of a picture's longer side


def draw(model: str) -> Image.Image:
    """Returns a row of photographs above a row of their maps."""
    from skimage import data

    pipe = LDMSegPipeline.from_pretrained(model)
    photographs = [np.asarray(getattr(data, name)())[:400, :, :3] for name in NAMES]  # of about one shape
    maps = []
    for photograph in photographs:
        found = pipe(Image.fromarray(photograph))[0]
        if pipe.info.categories is None:
            maps.append(overlay(photograph, found.segmentation))
        else:
            maps.append(named_overlay(photograph, found.segmentation, found.segments_info, pipe.info.categories))
    return picture_grid([photographs, maps], cell=CELL)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print(f"usage: {(__doc__ or '').splitlines()[2]}", file=sys.stderr)
        return 2
    with replacing(Path(argv[1])) as temporary:
        draw(argv[0]).save(temporary, format="PNG", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
