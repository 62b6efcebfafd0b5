"""Panoptic quality and CPU post-processing, timed beside what people use.

    python benchmarks/bench_evaluation.py [--quick] [--data ROOT] [--images N] [--parts PART ...] [--out FOLDER]

Generated maps of 480x640 (and with --data the maps of a COCO-panoptic folder's train2017, perturbed for predictions)
are written as PNGs by Pillow, then scored in memory and from files: by ldmseg_fast, by the usual numpy joint histogram,
by panopticapi's algorithm (benchmarks/peers/plain_pq.py), and by hotcoco, torchmetrics and panopticapi where they can
be imported. All on one thread, but for the rows that say otherwise. Times from files are the difference of the wall
times at 4N and N images, so that start-up costs drop out; the functions compared take turns. The floor beside them is
libdeflate, inflating the same PNGs from memory and doing nothing with the pixels.
"""

import argparse
import importlib
import json
import os
import sys
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
from PIL import Image

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.harness import RESULTS, Run, Timing, measure, peak_memory
from benchmarks.peers.plain_pq import evaluate_like_panopticapi, match_by_masks, numpy_joint_histogram
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.kernels.panoptic_head import reference
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.metrics.matching import TRUE_POSITIVE, match_segments, segment_table
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import ids_to_rgb, load_panoptic_json, read_panoptic_png

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
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
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
            threads(run, data, rounds=3 if args.quick else 11)
        if "growth" in args.parts:
            growth(run, data, sizes=(50, 500) if args.quick else (50, 500, 5000))
    if "post-processing" in args.parts:
        post_processing(run, rounds=5 if args.quick else 15)
    run.save(args.out)


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
    run.add("in memory, time", {"ours": timings["ours"]}, items=len(tables), target=0.5)
    if slow := _torchmetrics(*images[0]):
        timings = measure({"ours": lambda: match_segments(*tables[0]), "torchmetrics": slow}, warmup=1, rounds=3)
        run.add("in memory, one image", timings, baseline="torchmetrics", target=3.0)


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
    calls = {name: (lambda score=score: score(*few), lambda score=score: score(*many)) for name, score in peers.items()}
    timings = _differences(calls, 3 * small, rounds, slow=("panopticapi's algorithm", "panopticapi"))
    floor = _inflate_alone(data, small, rounds)
    for baseline, target in (("hotcoco", 1.2), ("panopticapi's algorithm", 20.0), ("panopticapi", 20.0)):
        if baseline in timings:
            chosen = {name: timings[name] for name in ("ours", "ours + boundary", baseline)}
            run.add("from files, per image", chosen, baseline=baseline, target=target, case={"images": 4 * small})
    run.add("from files, time", {"ours": timings["ours"]}, floor_ms=floor, target=1.5, case={"images": 4 * small})


def _differences(
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], images: int, rounds: int, slow: tuple[str, ...] = ()
) -> dict[str, Timing]:
    """Milliseconds an image: (a call with more images) - (one with fewer), which differ by `images`, taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, (few, many) in calls.items():
            if name in slow and turn >= 3:
                continue
            seconds = _seconds(many) - _seconds(few)
            if seconds > 0:  # else something else ran during the smaller one
                samples[name].append(1e3 * seconds / images)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _inflate_alone(data: DataSet, images: int, rounds: int) -> float | None:
    """Milliseconds a pair of maps; None without libdeflate."""
    try:
        import deflate
    except ImportError:
        return None
    streams = []
    for kind in ("gt", "pred"):
        for entry in data.entries[kind][:images]:
            content = (data.folder / kind / entry["file_name"]).read_bytes()
            width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
            streams.append((_image_data(content), height * (1 + 3 * width)))

    def inflate() -> None:
        for stream, size in streams:
            deflate.zlib_decompress(stream, size)

    return measure({"": inflate}, rounds=rounds)[""].median / (len(streams) / 2)


def _image_data(png: bytes) -> bytes:
    parts, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            parts.append(png[at + 8 : at + 8 + length])
        at += 12 + length
    return b"".join(parts)


def _file_scorers(data: DataSet, boundary: bool) -> dict[str, Callable[[Path, Path], float]]:
    folders = data.folder / "gt", data.folder / "pred"

    def ours(gt: Path, pred: Path) -> float:
        return evaluate_files(gt, pred, *folders, num_threads=1, boundary=boundary, replicates=0)["All"]["pq"]

    def plain(gt: Path, pred: Path) -> float:
        return evaluate_like_panopticapi(gt, pred, *folders)["pq"]

    scorers: dict[str, Callable[[Path, Path], float]] = {"ours": ours, "panopticapi's algorithm": plain}
    if (hotcoco := _optional("hotcoco.panoptic")) is not None:

        def theirs(gt: Path, pred: Path) -> float:
            with redirect_stdout(StringIO()):
                return hotcoco.pq_compute(str(gt), str(pred), *map(str, folders))["All"]["pq"]

        scorers["hotcoco"] = theirs
    if (panopticapi := _optional("panopticapi.evaluation")) is not None:

        def one_core(gt: Path, pred: Path) -> float:
            gt_file, pred_file = json.loads(gt.read_text()), json.loads(pred.read_text())
            predicted = {entry["image_id"]: entry for entry in pred_file["annotations"]}
            pairs = [(entry, predicted[entry["image_id"]]) for entry in gt_file["annotations"]]
            categories = {entry["id"]: entry for entry in gt_file["categories"]}
            with redirect_stdout(StringIO()):
                stat = panopticapi.pq_compute_single_core(0, pairs, *map(str, folders), categories)
            return stat.pq_average(categories, isthing=None)[0]["pq"]

        scorers["panopticapi"] = one_core
    return scorers


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def threads(run: Run, data: DataSet, rounds: int) -> None:
    """The same files on one and on two threads, each per image from the difference of 4N and N images."""
    if len(os.sched_getaffinity(0)) < 2:
        return
    size = max(data.size, 200)
    few, many, folders = data.json_of(size), data.json_of(4 * size), (data.folder / "gt", data.folder / "pred")

    def score(paths: tuple[Path, Path], count: int) -> Callable[[], Any]:
        return lambda: evaluate_files(*paths, *folders, num_threads=count, replicates=0)

    calls = {f"{count} threads": (score(few, count), score(many, count)) for count in (1, 2)}
    timings = _differences(calls, 3 * size, rounds)
    run.add("threads, per image", timings, baseline="1 threads", target=1.7, case={"images": 4 * size})


def growth(run: Run, data: DataSet, sizes: tuple[int, ...]) -> None:
    """Time and memory against the number of images; the files are there once and come round again."""
    folders = data.folder / "gt", data.folder / "pred"
    peaks = []
    for size in sizes:
        paths = data.json_of(size)

        def score(paths: tuple[Path, Path] = paths) -> None:
            evaluate_files(*paths, *folders, num_threads=1, boundary=True)

        def index(paths: tuple[Path, Path] = paths) -> None:
            kept = [index_annotations(path, predictions=path == paths[1]) for path in paths]
            del kept

        case = {"images": size}
        score()  # buffers that stay
        run.add_value("growth, per image", 1e3 * _seconds(score) / size, "ms", case=case, target=1.5)
        held, indexed = peak_memory(score), peak_memory(index)
        if held is not None and indexed is not None:
            peaks.append(held / 2**20)
            run.add_value("growth, peak memory", peaks[-1], "MiB", case=case, target=16.0)
            run.add_value("growth, of it the index", indexed / 2**20, "MiB", case=case, target=4.0)
            files = sum(path.stat().st_size for path in paths)
            run.add_value("growth, the JSON files", files / 2**20, "MiB", case=case)
    if peaks:
        case = {"images": f"{sizes[0]}..{sizes[-1]}"}
        run.add_value("growth, of peak memory", peaks[-1] - peaks[0], "MiB", case=case, target=16.0)


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
        case = {"logits": f"128x{side}x{side}"}
        run.add("post-processing", timings, baseline="plain torch", target=10.0, case=case)
        if (peak := timings["ours"].peak_memory_bytes) is not None:
            run.add_value("post-processing, memory", peak / 1e6, "MB", case=case, target=20.0)


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
    sys.exit(run_command(main))
