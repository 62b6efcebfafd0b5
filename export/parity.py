"""Compares exported graphs, or engines, with PyTorch, on pictures and maps of a data set, at fixed noise.

PyTorch runs in float32 with weights rounded as the export rounds them, quantised ones by the same scales. The graphs
run in float32 too, see `float_twin`: what remains is float32's own error, so that a fault shows in every precision.
Then they run as they are, where a runtime here can.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ldmseg_fast.backends.graphs.manifest import Manifest
from ldmseg_fast.backends.graphs.specs import GraphOptions
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.backends.trt.trt_backend import load_trt_backend
from ldmseg_fast.checkpoints.tensors import WEIGHTS, save_weights
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.evaluation import OBJECT, in_percent
from ldmseg_fast.export.calibration import LayerScales, calibrate
from ldmseg_fast.export.float_twin import float_twin, flow_scales
from ldmseg_fast.export.memory import free_memory
from ldmseg_fast.export.parity_reference import (
    InFloat64,
    Quantised,
    ReferenceBackend,
    Values,
    exact_products,
    make_inputs,
    network_outputs,
    step_time,
    whole_runs,
)
from ldmseg_fast.export.parity_report import ParityReport, Row
from ldmseg_fast.export.parity_rows import exact_rows, loop_rows, native_rows, pq_row, relative_error, scale_row
from ldmseg_fast.metrics.pq import PanopticQuality

QUANTISED = ("fp8", "int8")
CALIBRATION_IMAGES, OF_LARGE = 16, 4  # pictures; int8 cuts off shares of values, and a large model has many
OWN_IMAGES = 2  # that float32's own error is measured on
GENERATED = "generated scenes"
ATTENTION_OPSET = 23  # from where on graphs have the operator Attention, with its scale in float32
LARGE_BYTES = 400 * 2**20  # of a UNet's weights, from where on one evaluation takes seconds on a CPU


@dataclass(frozen=True)
class Work:
    """Says how much is compared.

    Attributes:
        images: of the data set.
        batches: sizes that each graph is run at.
        steps: of whole loops, in rising order.
        rounds: of the timing.
    """

    images: int
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    rounds: int


def plan(info: ModelInfo, manifest: Manifest, images: int | None = None, batches: tuple[int, ...] = ()) -> Work:
    """Scales the work to the model's size; `images` and `batches` that are given stay.

    Args:
        info: of the model.
        manifest: of its graphs; a fixed batch and whole samplers are part of the work.
        images: how many images; None: 8, or 2 of a large model.
        batches: default 1, 2 and 5, or 1 and 2 for a large model.
    """
    large = is_large(info)
    fixed = manifest.options.batch
    steps = {4} if large else {4, 10}
    return Work(
        images=images or (2 if large else 8),
        batches=(fixed,) if fixed else batches or ((1, 2) if large else (1, 2, 5)),
        steps=tuple(sorted({*steps, *manifest.options.sampler_steps})),
        rounds=2 if large else 30,
    )


def is_large(info: ModelInfo) -> bool:
    """Tells whether one evaluation of the model's UNet takes seconds on a CPU."""
    return (info.folder / "unet" / WEIGHTS).stat().st_size > LARGE_BYTES


@dataclass
class _Run:
    """Holds one comparison under way; outputs of PyTorch wait in `scratch`, a file per image."""

    info: ModelInfo
    manifest: Manifest
    work: Work
    dataset: CocoPanoptic
    scratch: Path
    bar: Any
    rows: list[Row] = field(default_factory=list)
    latency: dict[str, float] = field(default_factory=dict)
    pq: dict[str, float] = field(default_factory=dict)
    segments: float = 0.0  # that PyTorch's PQ divides by
    scales: dict[str, LayerScales] = field(default_factory=dict)
    own: dict[str, dict[str, float]] = field(default_factory=dict)

    def reference(self, stage: str = "exact", device: str = "cpu", only: str | None = None) -> ReferenceBackend:
        """Builds PyTorch's side: `exact` as the float twin computes, or `quantised` as the graphs do.

        `only` is the one network that will run, ready for `InFloat64`; None: all.
        """
        options = None if self.manifest.precision == "fp32" else self.manifest.options
        quantised = Quantised(self.manifest.precision, self.scales, stage == "quantised") if self.scales else None
        with torch.inference_mode(False):
            rounds_scale = self.manifest.opset < ATTENTION_OPSET
            return ReferenceBackend(self.info, options, quantised, device, rounds_scale, only)

    def own_errors(self, network: str) -> dict[str, float]:
        """Tells the relative error of float32 itself in a network's outputs, against float64: the larger of two images.

        In float64 PyTorch unfolds what a convolution sees, so that a batch of large pictures would take gigabytes.
        """
        if network not in self.own:
            free_memory()
            reference = self.reference(only=network)
            errors: dict[str, float] = {}
            for index in range(min(OWN_IMAGES, self.work.images)):
                values = self.load("exact", index)
                with InFloat64():
                    exact = network_outputs(reference, values, [network])
                for name, each in exact.items():
                    if each.is_floating_point():
                        errors[name] = max(errors.get(name, 0.0), relative_error(values[name], each))
            self.own[network] = errors
        return self.own[network]

    def save(self, stage: str, index: int, values: Values) -> None:
        save_weights(values, self.scratch / f"{stage}-{index}.safetensors")

    def load(self, stage: str, index: int) -> Values:
        return load_file(self.scratch / f"{stage}-{index}.safetensors")

    def first(self, stage: str, size: int) -> Values:
        """Stacks what is stored of the first `size` images, repeated from the start where there are fewer."""
        values = [self.load(stage, index % self.work.images) for index in range(size)]
        return {name: torch.cat([each[name] for each in values]) for name in values[0]}


def measure_parity(
    info: ModelInfo,
    folder: Path,
    manifest: Manifest,
    data: str | None = None,
    split: str = "val2017",
    images: int | None = None,
    batches: tuple[int, ...] = (),
    engines: bool = False,
) -> ParityReport:
    """Compares a folder of exported graphs, or of engines, with the model.

    PyTorch's outputs are computed first and wait on disk, so that one runtime is in memory at a time. Everything runs
    image by image, on the GPU where the runtime has one.

    Args:
        info: of the model.
        folder: of the graphs, or of engines.
        manifest: of `folder`.
        data: a COCO-panoptic folder; default generated scenes.
        split: of it.
        images: how many of its images; default see `plan`.
        batches: sizes that the graphs are run at, as far as their batch is dynamic; default see `plan`.
        engines: run the folder's engines as they are, and no graph.

    Raises:
        BackendError: graphs or engines that do not run here, or whose calibration pictures are gone.
        DataError: a damaged data set.
    """
    info = info.at_size(manifest.image_size) if manifest.image_size else info
    work = plan(info, manifest, images, batches)
    precision = manifest.precision
    source = source_name(data, split)
    with (
        tempfile.TemporaryDirectory() as scratch,
        comparison_data(info, data, split, work.images) as dataset,
        exact_products(),
        torch.inference_mode(),
        tqdm(total=_evaluations(work, precision), desc="parity", unit="step", disable=None) as bar,
    ):
        run = _Run(info, manifest, work, dataset, Path(scratch), bar)
        _run_torch(run)
        if engines:
            _run_graphs(run, folder, "engine")
        else:
            exact = folder
            if precision != "fp32":
                exact = run.scratch / "twin"
                exact.mkdir()
                free_memory()
                float_twin(folder, manifest, exact)
            _run_graphs(run, exact, "exact")
            if run.scales:
                found = flow_scales(folder / manifest.graphs["denoiser"].file)
                run.rows.append(scale_row(found, run.scales))
            if precision not in ("fp32", "bf16"):  # bfloat16 is what ONNX Runtime does not run
                _run_graphs(run, folder, "graphs")
    run.rows += [Row(f"maps: PQ of {name}", value) for name, value in run.pq.items()]
    run.rows.append(pq_row(precision, run.pq, run.segments))
    return ParityReport(precision, work.images, source, run.rows, run.latency)


def _evaluations(work: Work, precision: str) -> int:
    """Counts the denoiser's evaluations, in which the progress is shown: about the same for graphs and engines."""
    single = work.images * (1 + sum(work.steps))
    passes = {"fp32": 2, "bf16": 3, "fp16": 4}.get(precision, 5)
    return passes * single


def _run_torch(run: _Run) -> None:
    """Computes and stores what comes from PyTorch: plain, rounded as the graphs are, and quantised as they are."""
    info, manifest, device = run.info, run.manifest, "cuda" if torch.cuda.is_available() else "cpu"
    plain = ReferenceBackend(info, device=device)
    run.pq["torch"], run.segments = _pq(
        run, plain, "plain", (run.work.steps[-1],) if manifest.precision != "fp32" else run.work.steps
    )
    run.latency["torch"] = step_time(plain, run.load("plain", 0), run.work.rounds)
    if manifest.precision == "fp32":
        for index in range(run.work.images):
            run.save("exact", index, run.load("plain", index))
        return
    del plain
    if manifest.precision in QUANTISED:
        pictures = calibration_pictures(info, manifest.calibration, manifest.precision)
        with torch.inference_mode(False):
            run.scales = calibrate_graphs(info, manifest.precision, manifest.options, manifest.opset, pictures)
    for stage in ("exact", "quantised") if run.scales else ("exact",):
        free_memory()
        _store(run, run.reference(stage, device), stage, run.work.steps)


def _store(run: _Run, backend: Any, stage: str, steps: tuple[int, ...]) -> None:
    for index in range(run.work.images):
        inputs = make_inputs(backend, run.dataset, index)
        found = inputs | network_outputs(backend, inputs)
        run.bar.update()
        run.save(stage, index, found | whole_runs(backend, inputs, steps, run.bar.update))


def _run_graphs(run: _Run, folder: Path, stage: str) -> None:
    """Runs graphs or engines and adds their rows: `exact` ones at every batch, within float32's own error."""
    free_memory()
    if stage == "engine":
        backend = load_trt_backend(run.info, folder)
    else:
        backend = load_onnx_backend(run.info, folder, exact=True)
    precision, reference = run.manifest.precision, "quantised" if run.scales and stage != "exact" else "exact"
    try:
        if stage == "exact":
            for size in run.work.batches:
                free_memory()
                run.save("batch", size, network_outputs(backend, run.first(reference, size)))
        for index in range(run.work.images):
            inputs = run.load(reference, index)
            found = whole_runs(backend, inputs, run.work.steps, run.bar.update)
            run.save(f"{stage} graphs", index, found | network_outputs(backend, inputs))
            run.bar.update()
        pairs = [(run.load(f"{stage} graphs", index), run.load(reference, index)) for index in range(run.work.images)]
        limits = "exact" if stage == "exact" else precision
        run.rows += [] if stage == "exact" else native_rows(stage, precision, pairs)
        run.rows += loop_rows(stage, limits, pairs, run.work.steps, run.info.categories is not None)
        if stage != "exact" or precision in ("fp32", "bf16"):
            run.pq["engine" if stage == "engine" else "graphs"], _ = _pq(run, backend, f"{stage} graphs", ())
            runtime = "tensorrt" if stage == "engine" else "onnxruntime"
            if backend.specs["denoiser"].inputs[0].shape[0] in (1, "batch"):  # a larger fixed batch is no single image
                run.latency[runtime] = step_time(backend, run.load(reference, 0), run.work.rounds)
                run.latency["ratio"] = run.latency["torch"] / run.latency[runtime]
    finally:
        backend.close()
    del backend  # PyTorch may come back into memory for float32's own errors
    for size in run.work.batches if stage == "exact" else ():
        run.rows += exact_rows(size, run.load("batch", size), run.first(reference, size), run.own_errors)


def _pq(run: _Run, backend: Any, stage: str, steps: tuple[int, ...]) -> tuple[float, float]:
    """Measures class-agnostic PQ in percent of maps at the images' own sizes, with the model's thresholds.

    What is not stored under `stage` yet is computed with loops of `steps`. With it comes what it divides by.
    """
    if steps:
        _store(run, backend, stage, steps)
    stat = PanopticQuality(OBJECT, class_agnostic=True)
    for index in range(run.work.images):
        ids, segments = run.dataset.ground_truth(index)
        latents = run.load(stage, index)[f"latents_{run.work.steps[-1]}"]
        (result,) = backend.decode_mask(latents.to(backend.device), ids.shape)
        stat.add(ids, segments, result.segmentation, result.segments_info, image_id=index)
    values = in_percent(stat.compute())
    return values["pq"], values["tp"] + (values["fp"] + values["fn"]) / 2


def calibrate_graphs(
    info: ModelInfo, precision: str, options: GraphOptions, opset: int, pictures: Tensor
) -> dict[str, LayerScales]:
    """Calibrates with `pictures`, uint8 [B, 3, S, S], see `calibrate`, for graphs of these options and this opset."""
    shows_products = opset < ATTENTION_OPSET and options.image_size > 0
    return calibrate(info, precision, getattr(torch, options.dtype), pictures, shows_products)


def source_name(data: str | None, split: str) -> str:
    """Names the pictures of a comparison in its report."""
    return GENERATED if data is None else f"{Path(data).name}/{split}"


@contextmanager
def comparison_data(info: ModelInfo, data: str | None, split: str, images: int) -> Iterator[CocoPanoptic]:
    """Yields the first images of a data set's split, or of generated scenes where `data` is None."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            side = max(info.image_size, 32)
            data = str(write_scenes(Path(scratch) / "scenes", 1, side, 0, 1, val_images=images, version=1))
            split = "val2017"
        slots = info.mask_vae.num_slots
        yield CocoPanoptic(data, split, info.image_size, num_slots=slots, limit=images, picture_size=info.picture_size)


def calibration_pictures(info: ModelInfo, source: str, precision: str, images: int | None = None) -> Tensor:
    """Reads pictures, uint8 [B, 3, S, S], of a `source` that is GENERATED or ROOT/SPLIT of a COCO-panoptic folder.

    images: how many; None: 16, or 4 for a large model in int8. Scales of fp8 are those of the largest values.
    """
    images = images or (OF_LARGE if precision == "int8" and is_large(info) else CALIBRATION_IMAGES)
    data, _, split = source.rpartition("/")
    with comparison_data(info, None if source == GENERATED else data, split, images) as dataset:
        return collate([dataset[index] for index in range(len(dataset))])["image"]
