"""Counts images a second from files to files, read ahead and written behind, beside the plain loop.

python benchmarks/bench_throughput.py [--preset tiny|coco | --model MODEL_DIR] [--quick] [--batch 1 4 8]
    [--images N] [--steps N] [--workers 0 1 2] [--variants NAME ...] [--minutes M]
python benchmarks/bench_throughput.py --processes 1 2 4 [--images N] [--steps N] [--batch B]

The plain loop reads, segments and writes one picture after the other. Ours reads and resizes in `workers` threads,
samples in batches, and decodes and writes the batch before in one more thread; 0 workers: everything in turn.
`gain of overlap` is the time without threads over the time with them. Ends within --minutes;
what does not fit is named. With --processes only `ldmseg predict` is measured, in so many processes that share the
cores and a folder of pictures, and how two share uneven pictures beside halves that were dealt before.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import RESULTS, Run, Timing, measure
from benchmarks.measuring.options import parse_options, sides
from benchmarks.measuring.processes import measure_processes
from benchmarks.peers.candidates import OurPipeline, our_candidates, plain_candidates
from benchmarks.random_model import find_model
from ldmseg_fast.allocator import keep_freed_memory
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.config.precision import has_units
from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.panoptic.format import read_panoptic_png

AHEAD = 2  # batches that are read before they are needed
DEFAULT_VARIANTS = {
    "cpu": ("torch bfloat16" if has_units("cpu", torch.bfloat16) else "torch float32", "onnxruntime"),
    "cuda": ("torch bfloat16, graph",),
}
PLAIN_PICTURES = 4
ROUNDS = (3, 11)  # at least and at most; between them the clock decides


def one_by_one(pipeline: Any, files: Sequence[Path], out: Path, steps: int) -> None:
    """Does what a first script does: each picture through every stage before the next one is opened."""
    for index, file in enumerate(files):
        noise = image_noise(0, [index], pipeline.info.latent_shape)
        result = pipeline.whole([pipeline.decode_file(file)], noise, steps)[0]
        pipeline.write(result, out / f"{file.stem}.png")


class Overlapped:
    """Goes from files to files with host and device busy at a time.

    Args:
        pipeline: ours.
        batch: pictures that are sampled together.
        workers: threads that read and resize; 0: no threads at all.
    """

    def __init__(self, pipeline: OurPipeline, batch: int, workers: int) -> None:
        self.pipeline, self.batch, self.workers = pipeline, batch, workers
        self.stream = torch.cuda.Stream() if pipeline.device.type == "cuda" else None

    def __call__(self, files: Sequence[Path], out: Path, steps: int) -> None:
        if not self.workers:
            for start in range(0, len(files), self.batch):
                chunk = files[start : start + self.batch]
                pictures = [self._read(file) for file in chunk]
                self._finish(chunk, pictures, out, self._latents(pictures, start, steps), None)
            return
        with ThreadPoolExecutor(self.workers) as readers, ThreadPoolExecutor(1) as writer:
            written: deque[Future] = deque()
            for start, pictures in self._read_ahead(readers, files):
                chunk = files[start : start + self.batch]
                latents = self._latents(pictures, start, steps)
                sampled = torch.cuda.current_stream().record_event() if self.stream else None
                written.append(writer.submit(self._finish, chunk, pictures, out, latents, sampled))
                while len(written) > AHEAD:
                    written.popleft().result()
            for future in written:
                future.result()

    def _read(self, file: Path) -> tuple[np.ndarray, Tensor]:
        """The picture, and what the network sees of it, uint8 [1, 3, S, S]."""
        picture = self.pipeline.decode_file(file)
        return picture, self.pipeline.preprocess([picture])

    def _read_ahead(
        self, readers: ThreadPoolExecutor, files: Sequence[Path]
    ) -> Iterator[tuple[int, list[tuple[np.ndarray, Tensor]]]]:
        starts = range(0, len(files), self.batch)
        pending: deque[tuple[int, list[Future]]] = deque()
        for start in starts:
            pending.append((start, [readers.submit(self._read, f) for f in files[start : start + self.batch]]))
            if len(pending) > AHEAD:
                first, futures = pending.popleft()
                yield first, [future.result() for future in futures]
        for first, futures in pending:
            yield first, [future.result() for future in futures]

    def _latents(self, pictures: list[tuple[np.ndarray, Tensor]], start: int, steps: int) -> Tensor:
        noise = image_noise(0, range(start, start + len(pictures)), self.pipeline.info.latent_shape)
        inputs = torch.cat([tensor for _, tensor in pictures])
        return self.pipeline.sample(noise, self.pipeline.encode(inputs), steps)

    def _finish(
        self,
        chunk: Sequence[Path],
        pictures: list[tuple[np.ndarray, Tensor]],
        out: Path,
        latents: Tensor,
        sampled: torch.cuda.Event | None,
    ) -> None:
        """Maps and files. On a GPU on a stream of its own, so that the next batch's sampling is not waited for."""
        if self.stream is not None and sampled is not None:
            self.stream.wait_event(sampled)
        with torch.cuda.stream(self.stream) if sampled is not None else nullcontext(), torch.inference_mode():
            results = self.pipeline.finish(latents, [picture.shape[:2] for picture, _ in pictures])
        for file, result in zip(chunk, results):
            self.pipeline.write(result, out / f"{file.stem}.png")


def write_pictures(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """Writes generated scenes as JPEGs."""
    folder.mkdir()
    for index in range(count):
        rgb = generate_scene(max(height, width), 0, index, version=1)[0][:height, :width]
        Image.fromarray(np.ascontiguousarray(rgb)).save(folder / f"{index:06d}.jpg", quality=95)
    return sorted(folder.iterdir())


def pixels_alike(first: Path, second: Path) -> float:
    """Returns the share of equal pixels over all maps of two folders."""
    shares = [
        float((read_panoptic_png(path) == read_panoptic_png(second / path.name)).mean())
        for path in sorted(first.glob("*.png"))
    ]
    return float(np.mean(shares))


@dataclass
class Bench:
    """Holds the functions to time, how many pictures a call of each takes, and the clock."""

    deadline: float
    functions: dict[str, Callable[[], None]] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)
    round_seconds: float = 0.0

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, label: str, pictures: int, function: Callable[[], None]) -> None:
        """Takes `function` up, whose first call, made here, is its warm-up."""
        started = time.monotonic()
        function()
        self.round_seconds += time.monotonic() - started
        self.functions[label], self.pictures[label] = function, pictures

    def has_time(self, seconds: float) -> bool:
        """Returns whether a function of so many seconds a call still leaves time for the rounds."""
        return self.seconds_left() > seconds + ROUNDS[0] * (self.round_seconds + seconds)

    def measure(self) -> dict[str, Timing]:
        """Returns milliseconds a picture."""
        left = max(self.seconds_left(), 0.0)
        timings = measure(
            self.functions, warmup=0, min_sample_ms=0, rounds=ROUNDS[1], min_rounds=ROUNDS[0], max_seconds=left,
            memory=False,
        )  # fmt: skip
        return {name: Timing(tuple(ms / self.pictures[name] for ms in t.samples)) for name, t in timings.items()}


def benchmark(args: argparse.Namespace, scratch: Path) -> Run:
    bench = Bench(time.monotonic() + 60 * args.minutes)
    run = Run("throughput", quick=args.quick, folder=args.out)
    folder, model = find_model(args.model, args.preset, scratch)
    info = read_model_info(folder)
    height, width = (int(side) for side in args.size.split("x"))
    files = write_pictures(scratch / "pictures", args.images, height, width)
    outs = {name: scratch / name for name in ("plain", "ours")}
    for out in outs.values():
        out.mkdir()
    baseline, make_plain = next(iter(plain_candidates(info, args.device, slow=False).items()))
    few = files[:PLAIN_PICTURES]  # one at a time, a picture costs the same however many there are
    reference = f"{baseline}, one at a time"
    plain = make_plain()
    bench.add(reference, len(few), lambda: one_by_one(plain, few, outs["plain"], args.steps))
    serial = bench.round_seconds / len(few) * len(files)  # an upper bound of what ours takes
    makers = our_candidates(info, args.device, scratch, slow=False)
    for name in args.variants or DEFAULT_VARIANTS[args.device]:
        if name not in makers:
            print(f"{name}: not measured (cannot run here)")
            continue
        pipeline = makers[name]()
        for batch, workers in itertools.product(args.batch, args.workers):
            label = f"{name}, batch {batch}, {workers} readers"
            if not bench.has_time(serial):
                print(f"{label}: not measured (time budget)")
                continue
            loop = Overlapped(pipeline, batch, workers)
            before = bench.round_seconds
            bench.add(label, len(files), partial(loop, files, outs["ours"], args.steps))
            serial = bench.round_seconds - before
            alike = pixels_alike(outs["plain"], outs["ours"])
            run.check(f"{label}: {alike:.2%} of the pixels alike", alike >= (0.999 if "float32" in name else 0.9))
    timings = bench.measure()
    case = {"model": model, "size": args.size, "steps": args.steps, "threads": torch.get_num_threads()}
    run.add("file to file", timings, baseline=reference, case=case)
    for name, timing in timings.items():
        run.add_value("images per second", 1e3 / timing.median, "images/s", case=case, variant=name)
        alone = timings.get(f"{name.rpartition(', ')[0]}, 0 readers")
        if alone is not None and alone is not timing:
            run.add_value("gain of overlap", alone.median / timing.median, "x", case=case, variant=name)
    return run


def benchmark_processes(args: argparse.Namespace, scratch: Path) -> Run:
    run = Run("throughput", quick=args.quick, folder=args.out)
    folder, model = find_model(args.model, args.preset, scratch)
    case = {"model": model, "steps": args.steps, "batch": args.batch[0]}
    measure_processes(run, folder, case, scratch, args.processes, args.images, 0 if args.quick else args.minutes)
    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL_DIR", help="trained weights; default random ones of --preset")
    parser.add_argument("--preset", choices=["tiny", "coco"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="six pictures, four steps, one backend")
    parser.add_argument("--images", type=int, help="a pass; default 16, with --quick 6")
    parser.add_argument("--steps", type=int, help="default 10, with --quick 4")
    parser.add_argument("--size", type=sides, default="480x640", help="of the pictures, HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", help="backends of ours, by the names of bench_latency")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--processes", type=int, nargs="+", help="measure `ldmseg predict` in so many processes alone")
    parser.add_argument("--minutes", type=float, default=3.0, help="time budget of everything")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser, argv)
    args.images = args.images or (6 if args.quick else 64 if args.processes else 16)
    args.steps = args.steps or (4 if args.quick else 10)
    args.batch = args.batch or ([3] if args.quick else [1, 4, 8])
    if args.quick and not args.variants:
        args.variants = list(DEFAULT_VARIANTS[args.device][:1])
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        (benchmark_processes if args.processes else benchmark)(args, Path(scratch)).save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
