"""Panoptic quality and CPU post-processing, timed beside what people use.

    python benchmarks/bench_evaluation.py [--quick] [--data ROOT] [--images N] [--parts PART ...]

Generated maps of 480x640 (and with --data the maps of a COCO-panoptic folder's train2017, perturbed for predictions)
are written as PNGs by Pillow, then scored in memory and from files: by ldmseg_fast, by the usual numpy joint histogram,
by panopticapi's algorithm (benchmarks/plain_pq.py), and by hotcoco, torchmetrics and panopticapi where they can be
imported. All on one thread, but for the rows that say otherwise. Times from files are the difference of the wall times
at 4N and N images, so that start-up costs drop out.
"""

import argparse
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # hotcoco; read when it is first used

import numpy as np
import torch
from harness import Run, Timing, measure, peak_memory
from PIL import Image
from plain_pq import evaluate_like_panopticapi, match_by_masks, numpy_joint_histogram

from ldmseg_fast.kernels.panoptic_head import reference
from ldmseg_fast.metrics.matching import TRUE_POSITIVE, match_segments, segment_table
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic_format import ids_to_rgb, load_panoptic_json, read_panoptic_png

PARTS = ("memory", "files", "threads", "growth", "post-processing")
HEIGHT, WIDTH = 480, 640
HEAD_ARGUMENTS = ((512, 512), (427, 640), 0.5, 512, 0.5)  # network and image size, thresholds
CATEGORIES = [{"id": i, "name": f"category {i}", "isthing": int(i <= 6)} for i in range(1, 11)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer maps and rounds, growth up to 500 images")
    parser.add_argument("--data", type=Path, help="COCO-panoptic folder whose maps join the generated ones")
    parser.add_argument("--images", type=int, help="maps in all (default: 500, with --quick 40)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="run these only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = args.images or (40 if args.quick else 500)
    run = Run("evaluation", quick=args.quick)
    with tempfile.TemporaryDirectory() as folder:
        if set(args.parts) != {"post-processing"}:
            data = DataSet(Path(folder), images, args.data)
        if "memory" in args.parts:
            in_memory(run, data, rounds=10 if args.quick else 40)
        if "files" in args.parts:
            from_files(run, data, rounds=3 if args.quick else 7)
        if "threads" in args.parts:
            threads(run, data, rounds=5 if args.quick else 11)
        if "growth" in args.parts:
            growth(run, data, sizes=(50, 500) if args.quick else (50, 500, 5000))
    if "post-processing" in args.parts:
        post_processing(run, rounds=5 if args.quick else 15)
    run.save()


class DataSet:
    """Maps on disk: gt/ and pred/ with PNGs, and JSONs over the first n images."""

    def __init__(self, folder: Path, images: int, real: Path | None):
        self.folder, self.size = folder, images
        self.entries: dict[str, list[dict[str, Any]]] = {"gt": [], "pred": []}
        rng = np.random.default_rng(0)
        for kind in self.entries:
            (folder / kind).mkdir()
        real_maps = _real_maps(real) if real else []
        for index in range(images):
            # generated and real maps by turns, so that every part of the set has both
            use_real = real_maps and index % 2
            gt = real_maps[index // 2 % len(real_maps)]() if use_real else None
            gt, pred = _perturbed(rng, gt) if gt is not None else _generated(rng)
            for kind, ids in (("gt", gt), ("pred", pred)):
                self._write(kind, index, ids, crowds=kind == "gt")

    def _write(self, kind: str, index: int, ids: np.ndarray, crowds: bool) -> None:
        name = f"{index:06d}.png"
        Image.fromarray(ids_to_rgb(ids)).save(self.folder / kind / name)  # Pillow's defaults, as most tools write
        segments = [
            {"id": int(i), "category_id": int(i) % 10 + 1, "area": int(area), "iscrowd": int(crowds and i % 17 == 0)}
            for i, area in zip(*np.unique(ids[ids != 0], return_counts=True))
        ]
        self.entries[kind].append({"image_id": index, "file_name": name, "segments_info": segments})

    def json_of(self, count: int) -> tuple[Path, Path]:
        """Ground truth and prediction JSON over `count` images; beyond the maps there are, they come round again."""
        paths = []
        for kind, entries in self.entries.items():
            chosen = [entries[k % self.size] | {"image_id": k} for k in range(count)]
            images = [{"id": k, "file_name": f"{k}.jpg", "height": HEIGHT, "width": WIDTH} for k in range(count)]
            path = self.folder / f"{kind}_{count}.json"
            path.write_text(json.dumps({"images": images, "annotations": chosen, "categories": CATEGORIES}))
            paths.append(path)
        return paths[0], paths[1]

    def loaded(self, index: int) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray, list[dict[str, Any]]]:
        gt, pred = self.entries["gt"][index], self.entries["pred"][index]
        gt_ids, pred_ids = (read_panoptic_png(self.folder / kind / gt["file_name"]) for kind in ("gt", "pred"))
        return gt_ids, gt["segments_info"], pred_ids, pred["segments_info"]


def in_memory(run: Run, data: DataSet, rounds: int) -> None:
    """One pair of maps, averaged over a handful: matching with all rules against a joint histogram alone."""
    images = [data.loaded(index) for index in range(min(20, data.size))]
    tables = [(g, segment_table(gs, False), p, segment_table(ps, False)) for g, gs, p, ps in images]
    for (gt, gt_segments, pred, pred_segments), table in zip(images[:10], tables):
        expected = match_by_masks(gt, gt_segments, pred, pred_segments)
        found = match_segments(*table)
        run.check(
            "matches in memory equal those of boolean masks",
            sum(count[0] for count in expected.values()) == (found["outcome"] == TRUE_POSITIVE).sum()
            and abs(sum(count[3] for count in expected.values()) - found["iou"].sum()) < 1e-9,
        )
    peers: dict[str, Callable[[], Any]] = {
        "ours": lambda: [match_segments(*table) for table in tables],
        "ours + boundary": lambda: [match_segments(*table, boundary=True) for table in tables],
        "numpy joint histogram": lambda: [numpy_joint_histogram(gt, pred) for gt, _, pred, _ in tables],
    }
    timings = measure(peers, rounds=rounds)
    run.add("in memory, per image", timings, baseline="numpy joint histogram", items=len(tables), target=3.0)
    if slow := _torchmetrics(*images[0]):
        timings = measure({"ours": lambda: match_segments(*tables[0]), "torchmetrics": slow}, warmup=1, rounds=3)
        run.add("in memory, one image", timings, baseline="torchmetrics")


def _torchmetrics(gt: np.ndarray, _gt: Any, pred: np.ndarray, _pred: Any) -> Callable[[], Any] | None:
    """Its update on one pair, already as (category, instance) tensors; it knows no crowds, so it is only timed."""
    try:
        from torchmetrics.detection import PanopticQuality
    except ImportError:
        return None
    void = 100
    things = {entry["id"] for entry in CATEGORIES if entry["isthing"]}
    stuff = {entry["id"] for entry in CATEGORIES} - things | {void}
    metric = PanopticQuality(things, stuff, allow_unknown_preds_category=True)
    pair = [torch.from_numpy(np.stack([np.where(ids, ids % 10 + 1, void), ids], -1))[None] for ids in (pred, gt)]
    return lambda: metric.update(*pair)


def from_files(run: Run, data: DataSet, rounds: int) -> None:
    """PNG files -> PQ, one thread each, per image from the difference of 4N and N images."""
    small = max(data.size // 4, 1)
    few, many = data.json_of(small), data.json_of(4 * small)
    scores, slow_scores = _file_scorers(data, boundary=False), _file_scorers(data, boundary=True)
    peers = {**scores, "ours + boundary": slow_scores["ours"]}
    reference_pq = peers["panopticapi's algorithm"](*many)
    for name, score in peers.items():
        run.check(f"{name} equals panopticapi's algorithm", abs(score(*many) - reference_pq) < 1e-9)
    samples: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        for name, score in peers.items():
            if name == "panopticapi's algorithm" and turn >= 3:
                continue
            seconds = _seconds(lambda score=score: score(*many)) - _seconds(lambda score=score: score(*few))
            if seconds > 0:  # else something else ran during the smaller one
                samples[name].append(1e3 * seconds / (3 * small))
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    for baseline, target in (("hotcoco", 1.2), ("panopticapi's algorithm", 20.0), ("panopticapi (all cores)", None)):
        if baseline in timings:
            chosen = {name: timings[name] for name in ("ours", "ours + boundary", baseline)}
            run.add("from files, per image", chosen, baseline=baseline, target=target, case={"images": 4 * small})


def _file_scorers(data: DataSet, boundary: bool) -> dict[str, Callable[[Path, Path], float]]:
    folders = data.folder / "gt", data.folder / "pred"

    def ours(gt: Path, pred: Path) -> float:
        return evaluate_files(gt, pred, *folders, num_threads=1, boundary=boundary, replicates=0)["All"]["pq"]

    def plain(gt: Path, pred: Path) -> float:
        return evaluate_like_panopticapi(gt, pred, *folders)["pq"]

    scorers: dict[str, Callable[[Path, Path], float]] = {"ours": ours, "panopticapi's algorithm": plain}
    for name, module in (("hotcoco", "hotcoco.panoptic"), ("panopticapi (all cores)", "panopticapi.evaluation")):
        try:
            pq_compute = importlib.import_module(module).pq_compute
        except ImportError:
            continue

        def peer(gt: Path, pred: Path, pq_compute: Callable[..., Any] = pq_compute) -> float:
            with redirect_stdout(StringIO()):
                return pq_compute(str(gt), str(pred), *map(str, folders))["All"]["pq"]

        scorers[name] = peer
    return scorers


def threads(run: Run, data: DataSet, rounds: int) -> None:
    """The same files on one and on two threads."""
    if len(os.sched_getaffinity(0)) < 2:
        return
    paths, folders = data.json_of(data.size), (data.folder / "gt", data.folder / "pred")
    timings = measure(
        {
            f"{count} threads": lambda count=count: evaluate_files(*paths, *folders, num_threads=count, replicates=0)
            for count in (1, 2)
        },
        rounds=rounds,
    )
    run.add(
        "threads, per image", timings, baseline="1 threads", items=data.size, target=1.7, case={"images": data.size}
    )


def growth(run: Run, data: DataSet, sizes: tuple[int, ...]) -> None:
    """Time and memory against the number of images."""
    folders = data.folder / "gt", data.folder / "pred"
    for size in sizes:
        paths = data.json_of(size)

        def score(paths: tuple[Path, Path] = paths) -> None:
            evaluate_files(*paths, *folders, num_threads=1, boundary=True)

        def parse(paths: tuple[Path, Path] = paths) -> None:
            kept = [load_panoptic_json(path) for path in paths]
            del kept

        case = {"images": size}
        run.add_value("growth, per image", 1e3 * _seconds(score) / size, "ms", case=case)
        held, parsed = peak_memory(score), peak_memory(parse)
        if held is not None and parsed is not None:
            run.add_value("growth, peak memory", held / 2**20, "MiB", case=case)
            run.add_value("growth, of it the JSON", parsed / 2**20, "MiB", case=case)


def post_processing(run: Run, rounds: int) -> None:
    """128 slots of 64x64 and 256x256 logits -> 512x512 -> 427x640, one thread, against full-size logits in torch."""
    if _C is None:
        return
    for side in (64, 256):
        coarse = torch.randn(1, 128, 16, 16, generator=torch.Generator().manual_seed(0))
        logits = torch.nn.functional.interpolate(8 * coarse - 8, (side, side), mode="bicubic")
        array = logits.numpy()
        segmentation, *_ = _C.panoptic_head(array, *HEAD_ARGUMENTS, 1)
        expected = reference.panoptic_head(logits, *HEAD_ARGUMENTS)[0].numpy()
        run.check("post-processing equals torch in all but 10 pixels", (segmentation != expected).sum() <= 10)
        timings = measure(
            {
                "ours": lambda array=array: _C.panoptic_head(array, *HEAD_ARGUMENTS, 1),
                "plain torch": lambda logits=logits: reference.panoptic_head(logits, *HEAD_ARGUMENTS),
            },
            rounds=rounds,
        )
        run.add("post-processing", timings, baseline="plain torch", target=10.0, case={"logits": f"128x{side}x{side}"})


def _generated(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Curved Voronoi cells; the prediction has moved, missing and split ones."""
    count = int(rng.integers(6, 40))
    seeds = rng.random((count, 2)) * (HEIGHT, WIDTH)
    wobble = np.kron(rng.normal(0, 12, (2, 12, 16)), np.ones((40, 40)))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    y, x = (axis + np.roll(noise, 20) for axis, noise in zip((y, x), wobble))
    ids = np.concatenate([[0], rng.choice(2**24 - 1, count, replace=False) + 1])
    gt = _nearest(y, x, seeds)
    moved = seeds + rng.normal(0, 6, seeds.shape)
    moved[rng.random(count) < 0.15] = -1e6
    pred = _nearest(y, x, moved)
    return ids[np.where(rng.random(count + 1)[gt] < 0.08, 0, gt)], ids[pred]


def _nearest(y: np.ndarray, x: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """1 + the index of the nearest seed, [H, W]."""
    best, nearest = np.full(y.shape, np.inf, np.float32), np.zeros(y.shape, np.int64)
    for index, (seed_y, seed_x) in enumerate(seeds, 1):
        distance = ((y - seed_y) ** 2 + (x - seed_x) ** 2).astype(np.float32)
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], index
    return nearest


def _real_maps(root: Path) -> list[Callable[[], np.ndarray]]:
    content = load_panoptic_json(root / "annotations" / "panoptic_train2017.json")
    folder = root / "panoptic_train2017"
    return [lambda name=entry["file_name"]: read_panoptic_png(folder / name) for entry in content["annotations"]]


def _perturbed(rng: np.random.Generator, gt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A prediction for a real map: everything a few pixels off, some segments missing."""
    pred = np.roll(gt, tuple(rng.integers(-5, 6, 2)), (0, 1))
    missing = rng.random(len(np.unique(pred))) < 0.15
    return gt, np.where(np.isin(pred, np.unique(pred)[missing]), 0, pred)


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
