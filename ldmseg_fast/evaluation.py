"""`ldmseg evaluate`: a model on a split -> panoptic quality, results files, timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.agreement import TorchAgreement, format_agreement
from ldmseg_fast.checkpoint import load_component, load_index
from ldmseg_fast.config import PostprocessConfig, from_dict
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.metrics.baselines import BASELINES, segments_of
from ldmseg_fast.metrics.pq import PQStat
from ldmseg_fast.panoptic import postprocess
from ldmseg_fast.panoptic_format import read_panoptic_png
from ldmseg_fast.pipeline import LDMSegPipeline
from ldmseg_fast.results import PanopticResult, ResultsWriter

OBJECT = [{"id": 1, "name": "object", "supercategory": "object", "isthing": 1}]
Predict = Callable[[list[int]], list[PanopticResult]]


@dataclass(frozen=True)
class EvaluationOptions:
    """What `ldmseg evaluate` takes; None means the model's own setting."""

    split: str = "val2017"
    steps: int | None = None
    mask_threshold: float | None = None
    count_threshold: int | None = None
    overlap_threshold: float | None = None
    seed: int = 0
    limit: int = 0
    batch_size: int = 16
    id_assignment: str | None = None  # of an auto-encoder's reconstruction
    image_size: int | None = None  # likewise: it is convolutional and reconstructs maps of any size
    backend: str = "torch"
    engine_dir: str | None = None
    agreement_images: int = 64  # of a backend other than torch, compared with torch; per rank
    baselines: bool = True
    out: str | None = None  # folder for the COCO results files


def resolve_thresholds(model_dir: str | Path, options: EvaluationOptions) -> PostprocessConfig:
    """The model's own thresholds, with those of the command line put in."""
    own = from_dict(PostprocessConfig, load_index(model_dir).get("postprocess", {}), "postprocess.")
    names = ("mask_threshold", "count_threshold", "overlap_threshold")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(own, **given)


def evaluate(model_dir: str | Path, data: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Class-agnostic panoptic quality of a model, or of a mask auto-encoder's reconstructions.

    Args:
        model_dir: MODEL_DIR. One with a mask auto-encoder only is evaluated on reconstructing the split's own maps.
        data: a COCO-panoptic folder.
        options: split, steps, thresholds, backend.

    Returns:
        The report: `class_agnostic` (pq, sq, rq, pq_crowd_correct in percent, tp, fp, fn), `baselines`, `thresholds`,
        `mode`, `images`, `seconds_per_image`, and for a backend other than torch `agreement`. The same on every rank
        and for any number of ranks, but for the timings and the images that are compared with torch.

    Raises:
        CheckpointError, BackendError, DataError: a folder that is not what it should be.
    """
    thresholds = resolve_thresholds(model_dir, options)
    reconstruct = load_index(model_dir).get("components") == ["mask_vae"]
    make = reconstruction_predictor if reconstruct else diffusion_predictor
    dataset, predict, facts = make(model_dir, data, options, thresholds)

    stat = PQStat(OBJECT, class_agnostic=True)
    baselines = {name: PQStat(OBJECT, class_agnostic=True) for name in BASELINES} if options.baselines else {}
    settings = {"model": str(model_dir), "thresholds": asdict(thresholds), **facts}
    writer = ResultsWriter(options.out, "panoptic", OBJECT, settings) if options.out else None
    indices = list(range(distributed.rank(), len(dataset), distributed.world_size()))
    agreement = None
    if options.backend != "torch" and not reconstruct and options.agreement_images > 0:
        agreement = TorchAgreement(
            model_dir,
            facts["num_inference_steps"],
            options.seed,
            thresholds,
            lambda: PQStat(OBJECT, class_agnostic=True),
            options.agreement_images,
        )
    seconds, predicted = 0.0, 0
    for chunk in _chunks(indices, options.batch_size):
        results = {index: read_back(writer, dataset.image_id(index)) for index in chunk} if writer else {}
        missing = [index for index in chunk if results.get(index) is None]
        start = time.perf_counter()
        results.update(zip(missing, predict(missing) if missing else []))
        seconds, predicted = seconds + time.perf_counter() - start, predicted + len(missing)
        for index in chunk:
            result = results[index]
            assert result is not None
            ids, segments = dataset.ground_truth(index)
            stat.add(ids, segments, result.segmentation, result.segments_info, image_id=index)
            for name, baseline in baselines.items():
                guess = BASELINES[name](*ids.shape)
                baseline.add(ids, segments, guess, segments_of(guess), image_id=index)
            if writer is not None and index in missing:
                writer.add(dataset.image_id(index), result)
        if agreement is not None:
            agreement.add(dataset, chunk, [result for index in chunk if (result := results[index]) is not None])
    stat = merge(stat)
    baselines = {name: merge(baseline) for name, baseline in baselines.items()}
    distributed.barrier()
    if writer is not None and distributed.is_main():
        writer.finish()
    return {
        "mode": "reconstruction" if reconstruct else "class-agnostic",
        "model": Path(model_dir).name,
        "data": Path(data).name,
        "split": options.split,
        "class_agnostic": in_percent(stat.result()),
        "baselines": {name: in_percent(baseline.result()) for name, baseline in baselines.items()},
        "thresholds": asdict(thresholds),
        "images": len(dataset),
        "seconds_per_image": seconds / max(predicted, 1),
        **facts,
        **({"agreement": agreement.report()} if agreement is not None else {}),
    }


def diffusion_predictor(
    model_dir: str | Path, data: str | Path, options: EvaluationOptions, thresholds: PostprocessConfig
) -> tuple[CocoPanoptic, Predict, dict[str, Any]]:
    pipe = LDMSegPipeline.from_pretrained(model_dir, options.backend, options.engine_dir)
    dataset = CocoPanoptic(
        data, options.split, pipe.info.image_size, num_slots=pipe.info.mask_vae.num_slots, limit=options.limit
    )
    if options.image_size not in (None, pipe.info.image_size):
        raise ValueError(f"--size {options.image_size}: this model works at {pipe.info.image_size} pixels")
    steps = pipe.info.num_inference_steps if options.steps is None else options.steps
    pipe.scheduler.timesteps(steps)

    def predict(indices: list[int]) -> list[PanopticResult]:
        images = [dataset.load_image(index) for index in indices]
        ids = [dataset.image_id(index) for index in indices]
        results = pipe(images, steps, seed=options.seed, image_ids=ids, thresholds=thresholds, batch_size=len(images))
        return list(results)

    return dataset, predict, {"backend": options.backend, "num_inference_steps": steps, "seed": options.seed}


def reconstruction_predictor(
    model_dir: str | Path, data: str | Path, options: EvaluationOptions, thresholds: PostprocessConfig
) -> tuple[CocoPanoptic, Predict, dict[str, Any]]:
    index = load_index(model_dir)
    vae: Any = load_component(model_dir, "mask_vae")
    scheme = options.id_assignment or index.get("id_assignment", "random")
    size = options.image_size or int(index.get("image_size", 512))
    if size % vae.config.downsampling:
        raise ValueError(f"--size {size}: not a multiple of {vae.config.downsampling}, the auto-encoder's reduction")
    dataset = CocoPanoptic(
        data,
        options.split,
        size,
        num_slots=vae.config.num_slots,
        id_assignment=scheme,
        seed=options.seed,
        limit=options.limit,
    )

    @torch.inference_mode()
    def predict(indices: list[int]) -> list[PanopticResult]:
        batch = collate([dataset[index] for index in indices])
        bits = encode_mask_bits(batch["segment_ids"], vae.config.num_bits, batch["table"])
        mask_logits = vae.decode(vae.encode(bits).mode())
        return postprocess(mask_logits, (size, size), batch["original_size"], thresholds)

    return dataset, predict, {"backend": "torch", "id_assignment": scheme, "image_size": size, "seed": options.seed}


def read_back(writer: ResultsWriter, image_id: int | str) -> PanopticResult | None:
    """What an interrupted evaluation with the same settings wrote for an image; None where it did not get there."""
    if image_id not in writer.written:
        return None
    segmentation = read_panoptic_png(writer.png_path(image_id))
    return PanopticResult(segmentation, segments_of(segmentation))


def in_percent(result: dict[str, Any]) -> dict[str, Any]:
    """pq, sq, rq and pq_crowd_correct in percent, and the counts."""
    values = result["class_agnostic"]
    report = {key: 100.0 * values[key] for key in ("pq", "sq", "rq")}
    report["pq_crowd_correct"] = 100.0 * result["pq_crowd_correct"]
    return report | {key: values[key] for key in ("tp", "fp", "fn")}


def merge(stat: PQStat) -> PQStat:
    """All ranks' parts as one, on every rank."""
    merged, *others = distributed.gather_objects(stat)
    for other in others:
        merged = merged.merge(other)
    return merged


def _chunks(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    bar = tqdm(total=len(indices), desc="evaluate", unit="image", disable=None if distributed.is_main() else True)
    for start in range(0, len(indices), size):
        chunk = list(indices[start : start + size])
        yield chunk
        bar.update(len(chunk))
    bar.close()


def format_report(report: dict[str, Any]) -> str:
    """The table that the command prints."""
    thresholds = report["thresholds"]
    lines = [
        f"{report['mode']} on {report['data']}/{report['split']}, {report['images']} images, thresholds "
        + " / ".join(f"{value:g}" for value in thresholds.values()),
        f"{'':14s} {'PQ':>7s} {'SQ':>7s} {'RQ':>7s} {'TP':>7s} {'FP':>7s} {'FN':>7s}",
    ]
    rows = {"model": report["class_agnostic"]} | report["baselines"]
    for name, row in rows.items():
        numbers = " ".join(f"{row[key]:7.2f}" for key in ("pq", "sq", "rq"))
        lines.append(f"{name:14s} {numbers} " + " ".join(f"{row[key]:7d}" for key in ("tp", "fp", "fn")))
    lines.append(f"PQ, every crowd region counted: {report['class_agnostic']['pq_crowd_correct']:.2f}")
    lines.append(f"{1000 * report['seconds_per_image']:.1f} ms per image ({report['backend']})")
    if "agreement" in report:
        lines.append(format_agreement(report["agreement"], report["seconds_per_image"]))
    return "\n".join(lines)
