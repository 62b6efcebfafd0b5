"""Draws held-out pictures of a model: picture, truth, the model's map with its names, the best classical method's map.

python benchmarks/held_out_pictures.py MODEL_DIR --data ROOT[:TRAIN:TEST] [...] --out FILE.png [--pictures 4]

One row a picture, evenly spread over the test split. A line for each tells the class-agnostic PQ of both maps. The
classical method is the one that scores best on the first pictures of the training split. The file holds pictures of the
data sets, so it belongs wherever their licence allows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import numpy as np

from benchmarks.measuring.options import parse_options
from benchmarks.peers.untrained import Tuned
from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.config import DataConfig
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.joined_sets import SetPlace, set_places
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.files import replacing
from ldmseg_fast.metrics import classical
from ldmseg_fast.metrics.baselines import segments_of
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.reports.draw import enlarge, overlay, picture_grid
from ldmseg_fast.reports.labels import named_overlay

OBJECT = [{"id": 1, "name": "object", "isthing": 1}]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="MODEL_DIR, or the name of a shipped model")
    parser.add_argument(
        "--data", required=True, nargs="+", help="sets: ROOT, or ROOT:TRAIN:TEST with splits of its own"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the picture")
    parser.add_argument("--pictures", type=int, default=4, help="of each set")
    parser.add_argument("--tuning-images", type=int, default=40, help="pictures of the training split")
    parser.add_argument("--cell", type=int, default=320, help="pixels of a picture's longer side")
    return parser


def best_classical(place: SetPlace, images: int) -> classical.Classical:
    """Returns the method and setting that score best on the first `images` pictures of the training split."""
    tuned = [Tuned.on(place.root, place.train_split, images, method) for method in classical.METHODS]
    return max(tuned, key=lambda each: each.quality).method


def quality(truth: classical.Truth, guess: np.ndarray, segments: list[dict[str, Any]]) -> float:
    """Scores one map, integer [H, W], class-agnostically: PQ in percent."""
    statistics = PanopticQuality(OBJECT, class_agnostic=True)
    statistics.add(*truth, guess, segments)
    return 100 * statistics.compute()["All"]["pq"]


def rows_of(
    place: SetPlace, pipe: LDMSegPipeline, args: argparse.Namespace
) -> tuple[list[list[np.ndarray]], list[str]]:
    """Makes the cells of a set's pictures, and a line of text for each."""
    method = best_classical(place, args.tuning_images)
    test = CocoPanoptic(place.root, place.val_split, 64)
    rows, lines = [], []
    for index in np.linspace(0, len(test) - 1, min(args.pictures, len(test)), dtype=int).tolist():
        image, truth = test.load_image(index), test.ground_truth(index)
        result = pipe(image)[0]
        other = method(image)
        large = [enlarge(array, args.cell) for array in (image, truth[0], result.segmentation, other)]
        own = overlay(large[0], large[2])
        if pipe.info.categories is not None:
            own = named_overlay(large[0], large[2], result.segments_info, pipe.info.categories)
        rows.append([large[0], overlay(large[0], large[1]), own, overlay(large[0], large[3])])
        scores = quality(truth, result.segmentation, result.segments_info), quality(truth, other, segments_of(other))
        lines.append(f"{place.name} {test.paths(index)[0].name}: PQ {scores[0]:.1f}, {method} {scores[1]:.1f}")
    return rows, lines


def main(argv: list[str] | None = None) -> int:
    args = parse_options(build_parser(), argv)
    classical.require_skimage()
    pipe = LDMSegPipeline.from_pretrained(args.model)
    data = DataConfig(root=",".join(args.data))
    rows: list[list[np.ndarray]] = []
    for place in filter(lambda place: place.val_split, set_places(data)):
        found, lines = rows_of(place, pipe, args)
        rows += found
        print("\n".join(lines))
    titles = ["picture", "truth", str(args.model), "classical"]
    with replacing(args.out) as temporary:
        picture_grid(rows, titles, cell=args.cell).save(temporary, format="PNG")
    print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
