"""Times panoptic quality and CPU post-processing beside what people use.

    python benchmarks/bench_evaluation.py [--quick] [--data ROOT] [--images N] [--parts PART ...] [--out FOLDER]

Generated maps of 480x640 (and with --data the maps of a COCO-panoptic folder's train2017, perturbed for predictions)
are written as PNGs by Pillow, then scored in memory and from files: by ldmseg_fast, by the usual numpy joint histogram,
by panopticapi's algorithm (benchmarks/peers/plain_pq.py), and by hotcoco, torchmetrics and panopticapi where they can
be imported. All run on one thread, except where a row says otherwise. A time from files is the difference of
the wall times at 4N and N images, so that start-up costs drop out; the functions compared take turns. The floor is
libdeflate: it inflates the same PNGs from memory and does nothing with the pixels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import numpy as np
import torch

from benchmarks.harness import RESULTS, Run, measure, peak_memory
from benchmarks.measuring.options import parse_options
from benchmarks.measuring.panoptic_maps import CATEGORIES, PanopticMaps
from benchmarks.measuring.timing import seconds_of, time_differences
from benchmarks.peers.plain_pq import match_by_masks, numpy_joint_histogram
from benchmarks.peers.pq_tools import file_scorers, inflate_alone, mask_scorers, torchmetrics_update
from ldmseg_fast.config import MaskVAEConfig
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.config.presets import TINY
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.kernels.panoptic_head import reference
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.metrics.matching import TRUE_POSITIVE, match_segments, segment_table
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.postprocess import postprocess

PARTS = ("memory", "files", "masks", "threads", "growth", "entries", "start", "post-processing", "categories")
COCO_TRAIN = 118_287  # its images; of segments there are 11 an image
HEAD_ARGUMENTS = ((512, 512), (427, 640), 0.5, 512, 0.5)  # network and image size, thresholds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer maps and rounds, growth up to 500 images")
    parser.add_argument("--data", type=Path, help="COCO-panoptic folder whose maps join the generated ones")
    parser.add_argument("--images", type=int, help="maps in all (default: 500, with --quick 40)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="run these only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser)
    torch.set_num_threads(1)
    images = args.images or (40 if args.quick else 500)
    run = Run("evaluation", quick=args.quick, folder=args.out)
    with tempfile.TemporaryDirectory() as folder:
        if set(args.parts) - {"post-processing", "start", "entries", "categories"}:
            data = PanopticMaps(Path(folder), images, args.data)
        if "memory" in args.parts:
            in_memory(run, data, rounds=10 if args.quick else 40)
        if "files" in args.parts:
            from_files(run, data, rounds=3 if args.quick else 7)
        if "masks" in args.parts:
            from_masks(run, data, rounds=3 if args.quick else 11)
        if "entries" in args.parts:
            entries(run, Path(folder), 5000 if args.quick else COCO_TRAIN)
        if "threads" in args.parts:
            threads(run, data, rounds=3 if args.quick else 11)
        if "growth" in args.parts:
            growth(run, data, sizes=(50, 500) if args.quick else (50, 500, 5000))
    if "start" in args.parts:
        start(run, rounds=3 if args.quick else 11)
    if "post-processing" in args.parts:
        post_processing(run, rounds=5 if args.quick else 15)
    if "categories" in args.parts:
        with_categories(run, rounds=5 if args.quick else 25)
    run.save(args.out)


def in_memory(run: Run, data: PanopticMaps, rounds: int) -> None:
    """Times matching with all rules, a pair of maps at a time, beside a joint histogram alone."""
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
    if slow := torchmetrics_update(*images[0]):
        timings = measure({"ours": lambda: match_segments(*tables[0]), "torchmetrics": slow}, warmup=1, rounds=3)
        run.add("in memory, one image", timings, baseline="torchmetrics", target=3.0)


def from_files(run: Run, data: PanopticMaps, rounds: int) -> None:
    """Times PNG files -> PQ, one thread each, per image from the difference of 4N and N images."""
    small = max(data.size // 4, 1)
    few, many = data.json_of(small), data.json_of(4 * small)
    scores, slow_scores = file_scorers(data, boundary=False), file_scorers(data, boundary=True)
    peers = {**scores, "ours + boundary": slow_scores["ours"]}
    reference_pq = peers["panopticapi's algorithm"](*many)
    for name, score in peers.items():
        run.check(f"{name} equals panopticapi's algorithm", abs(score(*many) - reference_pq) < 1e-9)
    calls = {name: (lambda score=score: score(*few), lambda score=score: score(*many)) for name, score in peers.items()}
    timings = time_differences(calls, 3 * small, rounds, slow=("panopticapi's algorithm", "panopticapi"))
    floor = inflate_alone(data, small, rounds)
    for baseline, target in (("hotcoco", 3.0), ("panopticapi's algorithm", 20.0), ("panopticapi", 20.0)):
        if baseline in timings:
            chosen = {name: timings[name] for name in ("ours", "ours + boundary", baseline)}
            run.add("from files, per image", chosen, baseline=baseline, target=target, case={"images": 4 * small})
    run.add("from files, time", {"ours": timings["ours"]}, floor_ms=floor, target=1.5, case={"images": 4 * small})


def from_masks(run: Run, data: PanopticMaps, rounds: int) -> None:
    """Times RLE annotations -> PQ without PNGs, one thread each, per image from the difference of 4N and N images."""
    small = max(data.size // 4, 1)
    few, many = data.masks_of(small), data.masks_of(4 * small)
    peers = mask_scorers()
    reference_pq = evaluate_files(
        *data.json_of(4 * small), data.folder / "gt", data.folder / "pred", num_threads=1, replicates=0
    )["All"]["pq"]
    for name, score in peers.items():
        run.check(f"{name} from masks equals PNGs", abs(score(*many) - reference_pq) < 1e-9)
    calls = {name: (lambda score=score: score(*few), lambda score=score: score(*many)) for name, score in peers.items()}
    timings = time_differences(calls, 3 * small, rounds)
    if "hotcoco" in timings:
        run.add("from masks, per image", timings, baseline="hotcoco", target=2.0, case={"images": 4 * small})


def entries(run: Run, folder: Path, images: int) -> None:
    """Measures how long and in how much memory the ground truth of a large split is read and checked."""
    path = folder / "large.json"
    segments = [
        {"id": k, "category_id": k % 10 + 1, "iscrowd": 0, "bbox": [1, 2, 300, 400], "area": 4711} for k in range(1, 12)
    ]
    with path.open("w") as file:
        listed = (
            {"license": 3, "file_name": f"{k:012d}.jpg", "height": 480, "width": 640, "id": k} for k in range(images)
        )
        file.write('{"images": [' + ",".join(map(json.dumps, listed)) + '], "annotations": [')
        for k in range(images):
            entry = {"segments_info": segments, "file_name": f"{k:012d}.png", "image_id": k}
            file.write(("," if k else "") + json.dumps(entry))
        file.write('], "categories": ' + json.dumps(CATEGORIES) + "}")
    case = {"images": images}
    run.check("all entries are read", len(index_annotations(path).image_ids) == images)
    run.add_value(
        "entries, time", min(seconds_of(lambda: index_annotations(path)) for _ in range(3)), "s", case=case, target=6.0
    )
    used = peak_memory(lambda: index_annotations(path))
    if used is not None:
        run.add_value("entries, memory", used / 2**20, "MiB", case=case, target=400.0)


def start(run: Run, rounds: int) -> None:
    """Measures the start of the package, `ldmseg --help`, `ldmseg pq` up to its first file, and bare interpreters."""
    pq = "import ldmseg_fast.cli as c, ldmseg_fast.metrics.pq_files; c.build_parser().parse_args(['pq', 'x', 'y'])"
    bodies = {"pq": pq, "metrics": "from ldmseg_fast.metrics import PanopticQuality", "numpy": "import numpy"}
    text = "import contextlib, io, sys, ldmseg_fast.cli as c\nsys.argv = ['ldmseg', '--help']\n"
    text += "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): c.main()"
    bodies |= {"python": "pass", "import": "import ldmseg_fast", "help": text}
    samples: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(rounds):
        for name, body in bodies.items():
            command = [sys.executable, "-c", body]
            samples[name].append(seconds_of(lambda command=command: subprocess.run(command, check=True)))
    seconds = {name: float(np.median(values)) for name, values in samples.items()}
    run.add_value("start, Python alone", seconds["python"], "s")
    for name, title in (("import", "import ldmseg_fast"), ("help", "ldmseg --help")):
        run.add_value(f"start, {title} above Python", seconds[name] - seconds["python"], "s", target=0.3)
    run.add_value("start, numpy alone", seconds["numpy"], "s")
    run.add_value("start, ldmseg pq above numpy", seconds["pq"] - seconds["numpy"], "s", target=0.25)
    run.add_value("start, ldmseg_fast.metrics above numpy", seconds["metrics"] - seconds["numpy"], "s", target=0.25)


def threads(run: Run, data: PanopticMaps, rounds: int) -> None:
    """Times the same files on one and on two threads, each per image from the difference of 4N and N images."""
    if len(os.sched_getaffinity(0)) < 2:
        return
    size = max(data.size, 200)
    few, many, folders = data.json_of(size), data.json_of(4 * size), (data.folder / "gt", data.folder / "pred")

    def score(paths: tuple[Path, Path], count: int) -> Callable[[], Any]:
        return lambda: evaluate_files(*paths, *folders, num_threads=count, replicates=0)

    calls = {f"{count} threads": (score(few, count), score(many, count)) for count in (1, 2)}
    timings = time_differences(calls, 3 * size, rounds)
    run.add("threads, per image", timings, baseline="1 threads", target=1.7, case={"images": 4 * size})


def growth(run: Run, data: PanopticMaps, sizes: tuple[int, ...]) -> None:
    """Measures time and memory against the number of images; the files are there once and come round again."""
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
        run.add_value("growth, per image", 1e3 * seconds_of(score) / size, "ms", case=case, target=1.5)
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
    """Times 128 slots of logits -> 512x512 -> 427x640 on one thread, beside full-size logits in torch."""
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


def with_categories(run: Run, rounds: int) -> None:
    """Times decoder and head of models with categories beside those without, random weights, latents -> 480x640."""
    for name, config, side in (("tiny", TINY.mask_vae, 16), ("full size", MaskVAEConfig(), 64)):
        latents = torch.randn(1, config.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
        for count in (19, 133):
            variants = {"with categories": _decode(config, count, latents), "without": _decode(config, 0, latents)}
            timings = measure(variants, rounds=rounds if name == "tiny" else max(3, rounds // 4))
            case = {"model": name, "categories": count}
            run.add("decoder and head with categories", timings, baseline="without", target=0.87, case=case)


def _decode(config: MaskVAEConfig, count: int, latents: torch.Tensor) -> Callable[[], Any]:
    model = MaskVAE(replace(config, num_categories=count, scaling_factor=1.0)).to(memory_format=torch.channels_last)
    table = CategoryTable(tuple(Category(n, str(n), n % 2 == 0, (n, 0, 0)) for n in range(count)))
    size = (latents.shape[2] * config.downsampling, latents.shape[3] * config.downsampling)

    def decode() -> Any:
        with torch.inference_mode():
            mask_logits, category_logits = model.decode_latents_both(latents)
            return postprocess(mask_logits, size, [(480, 640)], TINY.postprocess, category_logits, table)

    return decode


if __name__ == "__main__":
    sys.exit(run_command(main))
