"""Draws pictures beside the segments that a model with categories finds in them, as one picture.

python -m benchmarks.reporting.photographs_picture MODEL FILE [SCENES]

Without SCENES it draws photographs, two rows: the photograph, and what the model finds. With SCENES, a folder of
`ldmseg data scenes`, it draws the first scenes of val2017, three rows: the scene, its true map, and what the model
finds.

The photographs come with scikit-image: the astronaut Eileen Collins (NASA, public domain), a cup of coffee (Rachel
Michetti, public domain), the cat Chelsea (Stefan van der Walt, CC0) and a rocket (SpaceX, CC0). The picture in
`results/` is that of `photographs benchmarks/results/photographs.png`, and that of scenes, which `ldmseg data scenes
scenes --images 400 --size 64 --seed 0` writes, is `tiny benchmarks/results/scenes.png scenes`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import replacing
from ldmseg_fast.pipeline import LDMSegPipeline
from ldmseg_fast.reports.draw import overlay, picture_grid
from ldmseg_fast.reports.labels import named_overlay

NAMES = ("astronaut", "coffee", "chelsea", "rocket")
CELL = 340  # pixels of a picture's longer side
SCENES, SCENE_CELL = 6, 224  # scenes, and pixels of their side


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


def draw_scenes(model: str, root: str) -> Image.Image:
    """Returns rows of held-out scenes, their true maps, and what a model with categories finds.

    Raises:
        ArgumentError: a model without categories.
        DataError: a folder that is none of scenes, or whose categories the model does not have.
    """
    pipe = LDMSegPipeline.from_pretrained(model)
    table = pipe.info.categories
    if table is None:
        raise ArgumentError(f"{model}: a model without categories; there are no names to draw")
    dataset = CocoPanoptic(root, "val2017", pipe.info.image_size)
    numbers = table.numbers_of(dataset.categories, root)
    scenes, truths, maps = [], [], []
    for index in range(min(SCENES, len(dataset))):
        picture = Image.fromarray(dataset.load_image(index))
        scene = np.asarray(picture.resize((SCENE_CELL, SCENE_CELL), Image.NEAREST))
        ids, segments = dataset.ground_truth(index)
        true = [each | {"category_id": table[numbers[each["category_id"]]].id} for each in segments]
        found = pipe(picture)[0]
        scenes.append(scene)
        for row, segmentation, infos in ((truths, ids, true), (maps, found.segmentation, found.segments_info)):
            large = Image.fromarray(segmentation.astype(np.int32)).resize((SCENE_CELL, SCENE_CELL), Image.NEAREST)
            row.append(named_overlay(scene, np.asarray(large), infos, table))
    return picture_grid([scenes, truths, maps], cell=SCENE_CELL * 3 // 2)


def main(argv: Sequence[str]) -> int:
    if len(argv) not in (2, 3):
        print(f"usage: {(__doc__ or '').splitlines()[2]}", file=sys.stderr)
        return 2
    with replacing(Path(argv[1])) as temporary:
        picture = draw(argv[0]) if len(argv) == 2 else draw_scenes(argv[0], argv[2])
        picture.save(temporary, format="PNG", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
