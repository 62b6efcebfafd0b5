"""Compares exported graphs with PyTorch in float32, on pictures and maps of a data set, at fixed noise."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.graphs.graph_backend import GraphBackend
from ldmseg_fast.backends.graphs.manifest import Manifest
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.diffusion.sampler import Denoise, ddim, image_noise, unet_input
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.evaluation import OBJECT, in_percent
from ldmseg_fast.evaluation.agreement import same_pixels
from ldmseg_fast.files import read_text
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.models.conditioning import with_context

BATCHES = (1, 2, 5)
STEPS = (4, 10)
# Largest differences, relative to the reference's largest magnitude where that is above 1; smallest cosines.
MAX_ABS = {"image_encoder": 1e-3, "denoiser": 1e-3, "mask_decoder": 1e-4}
LOOP_ERROR, ARGMAX_AGREEMENT = 1e-3, 0.999
# points of PQ; on a few images one segment more or less changes it by a point or two
PQ_DIFFERENCE = {"fp32": 0.5, "fp16": 3.0, "bf16": 5.0, "fp8": 10.0, "int8": 10.0}
COSINE = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.998, "fp8": 0.99, "int8": 0.98}


@dataclass(frozen=True)
class Row:
    """Holds one comparison.

    Attributes:
        what: its name.
        value: what was measured.
        limit: the tolerance; None only reports.
        at_least: the value must reach the limit instead of staying below.
    """

    what: str
    value: float
    limit: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool:
        """Tells whether the value keeps its limit."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class ParityReport:
    """Holds every comparison; `latency` is in milliseconds for one denoising step at batch 1 on this CPU, or empty."""

    precision: str
    images: int
    source: str
    rows: list[Row]
    latency: dict[str, float]

    @property
    def ok(self) -> bool:
        """Tells whether every value keeps its limit."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.rows]
        return {key: value for key, value in vars(self).items() if key != "rows"} | {"ok": self.ok, "rows": rows}

    @classmethod
    def read(cls, path: Path) -> ParityReport:
        """Reads what `to_dict` returned from a JSON file."""
        values = json.loads(read_text(path))
        rows = [Row(*(row[item.name] for item in fields(Row))) for row in values["rows"]]
        return cls(rows=rows, **{key: values[key] for key in ("precision", "images", "source", "latency")})

    def table(self) -> str:
        """Formats the report, one comparison a line."""
        width = max(len(row.what) for row in self.rows)
        lines = [f"parity of {self.precision} with PyTorch float32, {self.images} images of {self.source}"]
        for row in self.rows:
            sign = ">=" if row.at_least else "<="
            limit = "" if row.limit is None else f"  {sign} {row.limit:g}"
            lines.append(f"{'ok ' if row.ok else 'NO '} {row.what:<{width}}  {row.value:11.6g}{limit}")
        if step := self.latency:
            lines.append(
                f"one step at batch 1: torch {step['torch']:.1f} ms, onnxruntime {step['onnxruntime']:.1f} ms, "
                f"ratio {step['ratio']:.2f}"
            )
        return "\n".join(lines)


def measure_parity(
    info: ModelInfo,
    folder: Path,
    manifest: Manifest,
    data: str | None = None,
    split: str = "val2017",
    images: int = 8,
    batches: tuple[int, ...] = BATCHES,
) -> ParityReport:
    """Compares a folder of exported graphs with the model, through ONNX Runtime on the CPU.

    Args:
        data: a COCO-panoptic folder; default generated scenes.
        images: how many of its images.
        batches: sizes that the graphs are run at, as far as their batch is dynamic.
    """
    fixed = manifest.options.batch
    batches = (fixed,) if fixed else batches
    source = "generated scenes" if data is None else f"{Path(data).name}/{split}"
    with comparison_data(info, data, split, images) as dataset:
        batch = collate([dataset[index] for index in range(len(dataset))])
        truth = [dataset.ground_truth(index) for index in range(len(dataset))]
    if manifest.precision == "bf16":
        from ldmseg_fast.export.float_twin import float_twin

        with tempfile.TemporaryDirectory() as scratch:
            twin = float_twin(folder, manifest, Path(scratch))
            graphs = load_onnx_backend(info, twin, "cpu")
            return _compare(info, graphs, "bf16", batch, truth, source, batches)
    graphs = load_onnx_backend(info, folder, "cpu")
    return _compare(info, graphs, manifest.precision, batch, truth, source, batches)


@contextmanager
def comparison_data(info: ModelInfo, data: str | None, split: str, images: int) -> Iterator[CocoPanoptic]:
    """Yields the first images of a data set's split, or of generated scenes where `data` is None."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            side = max(info.image_size, 32)
            data = str(write_scenes(Path(scratch) / "scenes", 10 * images, side, 0, workers=1, version=1))
            split = "val2017"
        slots = info.mask_vae.num_slots
        yield CocoPanoptic(data, split, info.image_size, num_slots=slots, limit=images, picture_size=info.picture_size)


@torch.inference_mode()
def _compare(
    info: ModelInfo,
    graphs: GraphBackend,
    precision: str,
    batch: dict[str, Any],
    truth: list,
    source: str,
    batches: tuple[int, ...],
) -> ParityReport:
    reference = TorchBackend(info.at_size(graphs.info.image_size), "cpu", torch.float32)
    info, exact = graphs.info, precision == "fp32"
    pictures = batch["image"]
    config, ids = info.mask_vae, batch["segment_ids"]
    categories = None
    if config.num_categories:  # which ones does not matter, and the data need not have the model's
        categories = torch.where(ids > 0, (ids.int() - 1) % config.num_categories + 1, 0)
    bits = encode_mask_bits(
        ids, config.num_bits, batch["table"], category_ids=categories, category_bits=config.category_bits
    )
    mask_latents = reference.mask_vae.encode_latents(bits).float()  # [B, C, h, w]
    noise = image_noise(0, list(range(len(pictures))), tuple(mask_latents.shape[1:]))
    rows: list[Row] = []

    def compare(graph: str, size: int, ours: Tensor, theirs: Tensor) -> None:
        error = (ours.float() - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
        rows.append(Row(f"{graph}, batch {size}: max abs", error, MAX_ABS[graph] if exact else None))
        cosine = torch.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0).item()
        rows.append(Row(f"{graph}, batch {size}: cosine", cosine, COSINE[precision], at_least=True))

    # one evaluation of each graph, on real latents
    has_logits = "mask_logits" in graphs.specs["mask_decoder"].tensors
    for size in batches:
        image_latents = reference.encode_image(take(pictures, size))
        compare("image_encoder", size, graphs.encode_image(take(pictures, size)), image_latents)
        inputs, times = denoiser_inputs(info, take(mask_latents, size), take(noise, size), image_latents)
        ours, theirs = (denoiser(backend, take(pictures, size))(inputs, times) for backend in (graphs, reference))
        compare("denoiser", size, ours, theirs)
        if has_logits:
            latents = take(mask_latents, size)
            ours, theirs = decoder_logits(graphs, latents), reference.mask_vae.decode_latents(latents)
            compare("mask_decoder", size, ours, theirs)
            share = (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
            limit = ARGMAX_AGREEMENT if exact else None
            rows.append(Row(f"mask_decoder, batch {size}: argmax agreement", share, limit, at_least=True))

    # whole loops and maps; thresholds at zero keep every pixel, or random weights would leave only void to compare
    open_thresholds = replace(info.postprocess, mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)
    final: dict[str, Tensor] = {}
    whole = [int(spec.tensors["timesteps"].shape[0]) for spec in graphs.specs.values() if spec.kind == "sampler"]
    for steps in sorted({*STEPS, *whole}):
        final = {
            name: _loop(backend, pictures, noise, steps) for name, backend in (("graphs", graphs), ("torch", reference))
        }
        error = ((final["graphs"] - final["torch"]).norm() / final["torch"].norm()).item()
        rows.append(Row(f"latents after {steps} steps: relative error", error, LOOP_ERROR if exact else None))
    maps = {
        name: b.decode_mask(final[name], (info.image_size, info.image_size), "panoptic", open_thresholds)
        for name, b in (("graphs", graphs), ("torch", reference))
    }
    limit = ARGMAX_AGREEMENT if exact else None
    same, total = same_pixels(maps["graphs"], maps["torch"])  # type: ignore[arg-type]
    rows.append(Row("maps: pixel agreement", same / total, limit, at_least=True))
    if info.categories is not None:
        named = [
            {segment["id"]: segment["category_id"] for segment in other.segments_info}.get(
                ours["id"], ours["category_id"]
            )
            == ours["category_id"]
            for one, other in zip(maps["graphs"], maps["torch"])
            for ours in one.segments_info  # type: ignore[union-attr]
        ]
        rows.append(Row("maps: segments of the same category", sum(named) / max(len(named), 1), limit, at_least=True))
    pq = {name: _pq(b, final[name], truth) for name, b in (("graphs", graphs), ("torch", reference))}
    rows += [Row(f"maps: PQ of {name}", value) for name, value in pq.items()]
    rows.append(Row("maps: PQ difference", abs(pq["graphs"] - pq["torch"]), PQ_DIFFERENCE[precision]))
    latency = _latency(info, graphs, reference, mask_latents[:1], noise[:1], pictures[:1])
    return ParityReport(precision, len(pictures), source, rows, latency)


def denoiser_inputs(
    info: ModelInfo, mask_latents: Tensor, noise: Tensor, image_latents: Tensor
) -> tuple[Tensor, Tensor]:
    """Makes the UNet's input for real mask latents, noised to times spread over the schedule.

    Args:
        mask_latents, noise: float32 [B, C, h, w].
        image_latents: float [B, C_image, h, w].

    Returns:
        The input in the dtype of `image_latents`, [B, C_in, h, w], and timesteps, int64 [B].
    """
    scheduler = Scheduler(info.scheduler)
    total = info.scheduler.num_train_timesteps
    times = (torch.arange(1, len(noise) + 1) * total // (len(noise) + 1)).clamp(max=total - 1)
    noisy = scheduler.add_noise(mask_latents, noise, times)
    return unet_input(noisy, image_latents, mask_latents if info.self_condition else None), times


def decoder_logits(graphs: GraphBackend, latents: Tensor) -> Tensor:
    """Decodes mask latents, float [B, C, h, w], into raw logits, float [B, Q, h', w'], in one call of the graph."""
    spec, info = graphs.specs["mask_decoder"], graphs.info
    inputs = {"latents": latents}
    if "size" in spec.tensors:
        inputs["size"] = torch.tensor([info.image_size, info.image_size])
        inputs["mask_threshold"] = torch.tensor([info.postprocess.mask_threshold])
    return graphs.run_graph("mask_decoder", inputs, height=info.image_size, width=info.image_size)["mask_logits"]


def take(values: Tensor, size: int) -> Tensor:
    """Takes the first `size` rows of values [B, ...], any dtype, repeated from the start where there are fewer."""
    return values.repeat(-(-size // len(values)), *[1] * (values.ndim - 1))[:size]


def denoiser(backend: Any, pictures: Tensor) -> Denoise:
    """Returns a backend's network, with the context of `pictures`, uint8 [B, 3, S, S], where it takes one."""
    if backend.info.conditioning == "none":
        return backend.denoise
    return with_context(backend.denoise, backend.conditioning, pictures)


def _loop(backend: Any, pictures: Tensor, noise: Tensor, steps: int) -> Tensor:
    image_latents, scheduler = backend.encode_image(pictures), Scheduler(backend.info.scheduler)
    if backend.info.conditioning == "none":
        return backend.sample(noise, image_latents, scheduler, steps)
    denoise, self_condition = denoiser(backend, pictures), backend.info.self_condition
    return ddim(denoise, noise, image_latents, scheduler, steps, self_condition)


def _pq(backend: Any, latents: Tensor, truth: list) -> float:
    """Measures class-agnostic PQ in percent of maps at the images' own sizes, with the model's thresholds."""
    stat = PanopticQuality(OBJECT, class_agnostic=True)
    for index, (ids, segments) in enumerate(truth):
        (result,) = backend.decode_mask(latents[index : index + 1], ids.shape)
        stat.add(ids, segments, result.segmentation, result.segments_info, image_id=index)
    return in_percent(stat.compute())["pq"]


def _latency(
    info: ModelInfo,
    graphs: GraphBackend,
    reference: TorchBackend,
    mask_latents: Tensor,
    noise: Tensor,
    pictures: Tensor,
) -> dict[str, float]:
    if graphs.specs["denoiser"].inputs[0].shape[0] not in (1, "batch"):
        return {}  # graphs of a larger fixed batch cannot be timed on a single image
    inputs, times = denoiser_inputs(info, mask_latents, noise, reference.encode_image(pictures))
    calls = [denoiser(backend, pictures) for backend in (graphs, reference)]
    ours, theirs = best_times(lambda: calls[0](inputs.to(graphs.dtype), times), lambda: calls[1](inputs, times))
    return {"torch": theirs, "onnxruntime": ours, "ratio": theirs / ours}


def best_times(*calls: Callable[[], Any], rounds: int = 30, seconds: float = 5.0) -> list[float]:
    """Times each call in milliseconds: the best of interleaved rounds, so that a busy machine slows all alike.

    Rounds end early once `seconds` have passed, but not before the second.
    """
    best = [float("inf")] * len(calls)
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > seconds:
            break
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[index] = min(best[index], 1000 * (time.perf_counter() - start))
    return best
