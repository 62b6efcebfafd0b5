"""Times the input pipeline beside a plain one: images a second on one core, and with worker processes.

python benchmarks/bench_data.py [--data ROOT] [--split NAME] [--size 512] [--quick]

Plain: Pillow's decode of picture and PNG, bicubic resize, numpy.unique over the ids, and bit planes, picture and mask
in float32, as a training loop written from the paper's text would have them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import numpy as np
import torch

from benchmarks.harness import RESULTS, Run, measure
from benchmarks.measuring.options import parse_options
from benchmarks.peers.plain_item import plain_item
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.loader import TrainingBatches
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.kernels.mask_bits import encode_mask_bits

NUM_BITS, NUM_SLOTS, TARGET = 7, 128, 4.0
COCO_MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"


def same_content(dataset: CocoPanoptic, index: int) -> bool:
    """Returns whether ours and the plain item hold the same picture and segments, up to which slot is which."""
    ours = dataset[0, index]
    plain = plain_item(dataset, index, np.random.default_rng(0))
    pictures = [plain["image"], plain["image"].flip(-1)]
    wanted = ours["image"].float() / 127.5 - 1.0
    flips = [((picture - wanted).abs() < 2.5 / 127.5).float().mean() > 0.999 for picture in pictures]  # two grey levels
    if not any(flips):
        return False
    flip = not flips[0]
    target = plain["target"].flip(-1) if flip else plain["target"]
    pairs = torch.unique(torch.stack([ours["segment_ids"].long().flatten(), target.flatten()]), dim=1)
    one_to_one = len(pairs[0].unique()) == len(pairs[1].unique()) == pairs.shape[1]
    table = ours["table"][None]
    planes = encode_mask_bits(ours["segment_ids"][None], NUM_BITS, table)
    return one_to_one and planes.shape == plain["bits"][None].shape and bool((planes.abs() <= 1).all())


def workers_per_second(dataset: CocoPanoptic, workers: int, images: int) -> float:
    batches = TrainingBatches(dataset, 8, num_workers=workers)
    for _ in range(max(2, 2 * workers)):
        next(batches)
    start = time.perf_counter()
    for _ in range(images // 8):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return images / seconds


def bench(run: Run, name: str, root: Path, split: str, size: int, images: int, workers: list[int]) -> None:
    datasets = {
        resize: CocoPanoptic(root, split, size, train=True, num_slots=NUM_SLOTS, resize=resize)
        for resize in ("pillow", "torch")
    }
    count = min(images, len(datasets["pillow"]))
    checked = range(0, count, max(count // 8, 1))
    run.check(f"{name}: the same picture and segments", all(same_content(datasets["pillow"], i) for i in checked))
    run.check(
        f"{name}: with torch's resize, within 2 levels almost everywhere",
        all(same_content(datasets["torch"], i) for i in checked),
    )
    rng = np.random.default_rng(0)

    def over(item: Callable[[int], Any]) -> Callable[[], None]:
        def function() -> None:
            for index in range(count):
                item(index)

        return function

    functions = {
        "plain": over(lambda index: plain_item(datasets["pillow"], index, rng)),
        "ours": over(lambda index: datasets["pillow"][0, index]),
        "ours, resize=torch": over(lambda index: datasets["torch"][0, index]),
    }
    timings = measure(functions, warmup=1, rounds=10, max_seconds=90.0)
    case = {"data": name, "size": size}
    run.add("items on one core", timings, baseline="plain", case=case, items=count, target=TARGET)
    ours = datasets["pillow"][0, 0]
    bytes_ours = sum(ours[key].numel() * ours[key].element_size() for key in ("image", "segment_ids", "table"))
    plain = plain_item(datasets["pillow"], 0, rng)
    run.add_value("bytes to the device", bytes_ours, "bytes", case=case)
    run.add_value(
        "bytes to the device",
        sum(t.numel() * t.element_size() for t in plain.values()),
        "bytes",
        case=case,
        variant="plain",
    )
    for number in workers:
        rate = workers_per_second(datasets["pillow"], number, images)
        run.add_value("loader", rate, "images/s", case=case | {"workers": number})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="COCO-panoptic folder; default coco_mini beside the checkout, if any")
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser)
    torch.set_num_threads(1)
    run = Run("data", quick=args.quick, folder=args.out)
    images = 8 if args.quick else 40
    data = args.data or COCO_MINI
    if args.data or data.is_dir():
        bench(run, data.name, data, args.split, args.size, images, [] if args.quick else [0, 1, 2])
    for side in (64, 256):
        with tempfile.TemporaryDirectory() as folder:
            scenes = write_scenes(Path(folder) / "scenes", images, side, 0, version=1)
            bench(run, f"scenes of {side} px", scenes, "train2017", side, images, [] if args.quick else [0, 2])
    run.save(args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
