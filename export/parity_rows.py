"""Turns outputs of two runtimes into the rows of a parity report, with the limits that healthy exports keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldmseg_fast.export.calibration import LayerScales, Scale
from ldmseg_fast.export.parity_reference import Values
from ldmseg_fast.export.parity_report import Row

NETWORKS = {"image_latents": "image_encoder", "model_output": "denoiser"}
ENDS = ("inputs", "outputs", "softmax")  # of `LayerScales`
REST = "mask_decoder"  # makes the other outputs
# Both sides in float32 with equal weights. Healthy exports stay a tenth below.
EXACT_ERROR, EXACT_MAX, EXACT_LOOP, EXACT_SAME = 1e-5, 1e-4, 1e-4, 0.999
OWN_ERRORS = 3  # both sides err, each in its own order of sums
SCALES = 1e-3  # half's own rounding
# As the runtime computes them, in their own precision.
COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.998, "fp8": 0.99, "int8": 0.98}
LOOP_ERROR = {"exact": EXACT_LOOP, "fp32": 0.02, "fp16": 0.05, "bf16": 0.1, "fp8": 0.3, "int8": 0.3}
SAME_PIXELS = {"exact": EXACT_SAME, "fp32": 0.98, "fp16": 0.97, "bf16": 0.9, "fp8": 0.7, "int8": 0.7}
# Points of PQ between the graphs and plain float32, and how many of the images' segments may change: rounding decides
# of a doubtful segment, and one of 20 is worth 5 points. Other rows hold the graphs to PyTorch that rounds as they do.
PQ_DIFFERENCE = {"fp32": 0.5, "fp16": 3.0, "bf16": 5.0, "fp8": 10.0, "int8": 10.0}
CHANGED_SEGMENTS = {"fp32": 0, "fp16": 1, "bf16": 2, "fp8": 2, "int8": 2}


def exact_rows(size: int, ours: Values, theirs: Values, own_errors: Callable[[str], Mapping[str, float]]) -> list[Row]:
    """Compares every output of the three networks at one batch: float32 and integers, [B, ...].

    A deep network errs by more than the limit in float32 itself. Where an output misses it, `own_errors` of its network
    tells by how much each does, and `OWN_ERRORS` times that is the limit; the largest difference may grow with it.
    """
    rows: list[Row] = []
    own: dict[str, float] = {}
    for name, value in ours.items():
        network = NETWORKS.get(name, REST)
        what = f"{network}, batch {size}" + ("" if name in NETWORKS else f", {name}")
        expected = theirs[name]
        if value.is_floating_point():
            error, limit = relative_error(value, expected), EXACT_ERROR
            if error > limit:
                own |= {} if name in own else own_errors(network)
                limit = max(limit, OWN_ERRORS * own[name])
            rows.append(Row(f"{what}: relative error", error, limit))
            largest = (value - expected).abs().max().item() / max(1.0, expected.abs().max().item())
            rows.append(Row(f"{what}: max abs", largest, EXACT_MAX * limit / EXACT_ERROR))
        elif name == "sigmoid_area":
            changed = (value - expected).abs().sum().item() / max(1, expected.sum().item())
            rows.append(Row(f"{what}: share that differs", changed, 1 - EXACT_SAME))
        else:
            same = (value == expected).double().mean().item()
            rows.append(Row(f"{what}: share that agrees", same, EXACT_SAME, at_least=True))
    return rows


def native_rows(stage: str, precision: str, pairs: Sequence[tuple[Values, Values]]) -> list[Row]:
    """Compares float outputs image by image, as the runtime computes them: the smallest cosine of each."""
    rows: list[Row] = []
    for name in ("image_latents", "model_output", "mask_logits"):
        if name in pairs[0][0]:
            cosine = min(_cosine(ours[name], theirs[name]) for ours, theirs in pairs)
            what = f"{stage} in {precision}, {NETWORKS.get(name, REST)}: cosine"
            rows.append(Row(what, cosine, COSINE[precision], at_least=True))
    return rows


def loop_rows(
    stage: str, limits: str, pairs: Sequence[tuple[Values, Values]], steps: Sequence[int], categories: bool
) -> list[Row]:
    """Compares latents after whole loops, and the maps made of the last ones, over all images.

    Args:
        stage: names the rows.
        limits: "exact", or a precision.
        pairs: (ours, PyTorch's) per image.
        steps: of the loops.
        categories: whether segments have them.
    """
    before = "" if limits == "exact" else f"{stage} in {limits}, "
    rows: list[Row] = []
    for count in steps:
        ours, theirs = (torch.cat([pair[side][f"latents_{count}"] for pair in pairs]) for side in range(2))
        error = relative_error(ours, theirs)
        rows.append(Row(f"{before}latents after {count} steps: relative error", error, LOOP_ERROR[limits]))
    same = sum((ours["map"] == theirs["map"]).double().mean().item() for ours, theirs in pairs) / len(pairs)
    rows.append(Row(f"{before}maps: pixel agreement", same, SAME_PIXELS[limits], at_least=True))
    if categories:
        share = _same_categories(pairs)
        rows.append(Row(f"{before}maps: segments of the same category", share, SAME_PIXELS[limits], at_least=True))
    return rows


def _same_categories(pairs: Sequence[tuple[Values, Values]]) -> float:
    named = []
    for pair in pairs:
        ours, theirs = (
            {each["id"]: each["category_id"] for each in json.loads(bytes(values["segments"].tolist()))}
            for values in pair
        )
        named += [theirs.get(key, category) == category for key, category in ours.items()]
    return sum(named) / max(len(named), 1)


def scale_row(found: Mapping[str, Scale], layers: Mapping[str, LayerScales]) -> Row:
    """Compares the scales that a graph quantises by, of `float_twin.flow_scales`, with the calibrated ones."""
    scales = {f"{name}/{end}": getattr(layer, end) for name, layer in layers.items() for end in ENDS}
    expected = {name: scale for name, scale in scales.items() if scale is not None}
    differences = [abs(found[name].step / scale.step - 1) for name, scale in expected.items() if name in found]
    alike = found.keys() == expected.keys() and all(
        (ours.zero, ours.unsigned) == (expected[name].zero, expected[name].unsigned) for name, ours in found.items()
    )
    what = "denoiser, scales of what flows: largest relative difference"
    return Row(what, max(differences, default=0.0) if alike else float("inf"), SCALES)


def pq_row(precision: str, pq: dict[str, float], segments: int) -> Row:
    """Compares the PQ in percent of maps from graphs or an engine with PyTorch's, in plain float32.

    segments: how many the true maps have.
    """
    (ours,) = (value for name, value in pq.items() if name != "torch")
    limit = max(PQ_DIFFERENCE[precision], CHANGED_SEGMENTS[precision] * 100.0 / max(segments, 1))
    return Row("maps: PQ difference", abs(ours - pq["torch"]), limit)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Computes |ours - theirs| / |theirs| of float tensors of one shape, [B, ...]."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)).item()


def _cosine(ours: Tensor, theirs: Tensor) -> float:
    return torch.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0).item()
