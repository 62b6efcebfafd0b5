"""Shows the cost model as Markdown: its fit to CPU points, and its predictions for GPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.measuring.cost_model import (
    ACCELERATORS,
    GLOBAL_BATCH,
    ITERATIONS,
    OPTIMIZER_BYTES,
    PER_NODE,
    Accelerator,
    Point,
    fit,
    held_out_errors,
    predict,
)
from benchmarks.reporting.rows import RESULTS, load_rows
from benchmarks.reporting.tables import table
from ldmseg_fast.config.presets import COCO

GIB = 2**30
STEP, PASSES = "denoising step", "forward and backward"
# shares of the bfloat16 peak: what MosaicML published for SD 2 on A100s, and our target
SHARES = (0.28, 0.40)


def cpu_points(folder: Path = RESULTS) -> list[Point]:
    """Returns denoising steps, and passes of training, by batch size, as measured in eager float32 on one thread."""
    points = []
    for row in load_rows("scaling", folder):
        batch, seconds = row["case"]["batch"], row["p50"] / 1e3
        points.append(Point(f"{row['name']}, batch {batch}", 1, row["flops"], seconds, row["name"]))
    for row in [] if points else load_rows("latency", folder):  # fewer points of the same kind
        if row["name"] == "one step" and row["variant"] == "torch float32" and row["case"]["threads"] == 1:
            batch = row["case"]["batch"]
            seconds = batch * row["p50"] / 1e3
            points.append(Point(f"{STEP}, batch {batch}", 1, batch * row["flops"], seconds, STEP))
    return points


def engine_point(folder: Path = RESULTS) -> Point | None:
    """Returns forward and backward of the engine's training step on a CPU, by the training suite; None without it."""
    rows = load_rows("training", folder)
    both = [row["value"] for row in rows if row["name"] in ("engine: forward", "engine: backward")]
    step = next((row for row in rows if row["name"] == "training step" and row["variant"] == "engine"), None)
    if step is None or len(both) != 2 or step["environment"]["gpu"]["name"]:
        return None
    batch = step["case"]["batch"]
    return Point(f"the engine's forward and backward, batch {batch}", 1, step["flops"], sum(both) / 1e3, PASSES)


def data_seconds(folder: Path = RESULTS) -> float | None:
    """Returns the seconds of one core for a COCO image at 512x512, as measured; None where it was not."""
    rows = [r for r in load_rows("data", folder) if r["name"] == "items on one core" and r["variant"] == "ours"]
    values = [row["p50"] / 1e3 for row in rows if row["case"]["size"] == 512]
    return values[0] if values else None


def optimizer_bandwidth(folder: Path = RESULTS) -> float | None:
    """Returns the bytes/s that the optimiser reached on the CPU, as measured."""
    rows = load_rows("training", folder)
    times = [(row["value"] / 1e3, row["case"]["parameters"]) for row in rows if row["name"] == "engine: step"]
    return OPTIMIZER_BYTES * times[0][1] / times[0][0] if times else None


def measured_share(folder: Path = RESULTS) -> float | None:
    """Returns the share of the peak that a measured training step on a GPU reached; None until there is one."""
    rows = [row for row in load_rows("gpu", folder) if row["name"] == "training step" and row["variant"] == "engine"]
    for row in rows:
        gpu = next((a for a in ACCELERATORS.values() if a.name in (row["environment"]["gpu"]["name"] or "")), None)
        if gpu is not None and row["flops"]:
            return row["flops"] / (row["case"]["batch"] * row["p50"] / 1e3) / gpu.peak
    return None


def scaling_section(
    folder: Path = RESULTS,
    gpu: Accelerator = ACCELERATORS["H200"],
    zero_stage: int = 1,
    price: float | None = None,
) -> str:
    """Returns the fit with its held-out errors, and the predictions, as Markdown; `price` is that of a GPU hour."""
    points, data, share = cpu_points(folder), data_seconds(folder), measured_share(folder)
    lines = [fit_section(points, folder)]
    shares = (share,) if share else SHARES
    said = f"{share:.0%} of peak, as measured" if share else f"assumed {SHARES[0]:.0%} to {SHARES[1]:.0%} of peak"
    rows = []
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        found = [predict(COCO, gpu, gpus, s, zero_stage=zero_stage, data=data) for s in shares]
        rate = " to ".join(f"{p.images_per_second:.0f}" for p in found)
        days = " to ".join(f"{p.days:.1f}" for p in found)
        hours = " to ".join(f"{p.gpu_hours:.0f}" for p in found)
        memory, sent = f"{found[0].memory_bytes / GIB:.1f}", f"{1e3 * found[0].communication_seconds:.1f}"
        exposed = " to ".join(f"{1e3 * p.exposed_seconds:.1f}" for p in found)
        rows.append([str(gpus), rate, memory, sent, exposed, hours, days])
        if price is not None:
            rows[-1].append(" to ".join(f"{price * p.gpu_hours:.0f}" for p in found))
    header = ["GPUs", "images/s", "GiB a GPU", "communication, ms", "of it exposed, ms", "GPU hours", "days"]
    header += [] if price is None else [f"cost at {price:g} a GPU hour"]
    lines.append(
        f"The paper's run, {ITERATIONS:,} iterations of {GLOBAL_BATCH} images at 512x512 with self-conditioning and "
        f"cached latents, on {gpu.name}s under ZeRO {zero_stage}; {said}. Data-sheet values: {gpu.peak / 1e12:.0f} "
        f"TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s, NVLink {gpu.nvlink / 1e9:.0f} GB/s within {PER_NODE} GPUs, "
        f"{gpu.network / 1e9:.0f} GB/s beyond.\n"
    )
    if share is None:
        lines.append("No GPU point has been measured yet: the table is an estimate that no measurement has tested.\n")
    return "\n".join([*lines, table(header, rows)])


def fit_section(points: Sequence[Point], folder: Path) -> str:
    """Says what was fitted to the CPU points of each kind, and how far each held-out point is off."""
    lines, rows = [], []
    kinds: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        kinds[point.kind].append(point)
    kinds = {kind: group for kind, group in kinds.items() if len(group) > 2}
    for kind, group in kinds.items():
        model, errors = fit(group), held_out_errors(group)
        lines.append(
            f"Fitted to {len(group)} points of `{kind}` on one CPU thread (eager, float32): "
            f"{1e3 * model.overhead:.2f} ms a call and {model.rate / 1e9:.1f} GFLOP/s. Each point under a fit to the "
            f"others is off by {np.median(np.abs(errors)):.0%} in the median, {np.max(np.abs(errors)):.0%} at most.\n"
        )
        rows += [compared(point, point.seconds * (1 + error)) for point, error in zip(group, errors)]
    other = engine_point(folder)
    if other is not None and other.kind in kinds:
        rows.append(compared(other, fit(kinds[other.kind]).seconds(other), "another run, a smaller picture"))
    if rows:
        lines.append(table(["held-out point", "measured", "predicted", "error"], rows))
    else:
        lines.append("Too few CPU points for a fit: run `python benchmarks/bench_scaling.py`.\n")
    facts = []
    if (bandwidth := optimizer_bandwidth(folder)) is not None:
        facts.append(f"the optimiser moved {bandwidth / 1e9:.1f} GB/s")
    if (data := data_seconds(folder)) is not None:
        facts.append(f"an image costs one core {1e3 * data:.1f} ms")
    memory = [row for row in load_rows("training", folder) if row["name"] == "memory per rank" and "expected" in row]
    if memory:
        worst = max(abs(row["value"] / row["expected"] - 1) for row in memory)
        facts.append(f"memory per rank, measured under ZeRO 0-3, is within {worst:.1%} of the formula used here")
    return "\n".join([*lines, f"Also measured: {'; '.join(facts)}.\n"] if facts else lines)


def compared(point: Point, predicted: float, note: str = "") -> list[str]:
    """Returns a row of the table of held-out points."""
    name = f"{point.name} ({note})" if note else point.name
    return [name, f"{1e3 * point.seconds:.1f} ms", f"{1e3 * predicted:.1f} ms", f"{predicted / point.seconds - 1:+.0%}"]
