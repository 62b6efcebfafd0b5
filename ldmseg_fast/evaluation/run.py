"""One evaluation: a model on a split -> panoptic quality, result files, pictures, timings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.model_folder import load_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.evaluation import spread
from ldmseg_fast.evaluation.agreement import TorchAgreement
from ldmseg_fast.evaluation.categories import CategorySource, category_source
from ldmseg_fast.evaluation.gallery import Gallery
from ldmseg_fast.evaluation.options import EvaluationOptions, resolve_thresholds
from ldmseg_fast.evaluation.predictors import Predictor, load_predictor
from ldmseg_fast.evaluation.scores import (
    MODEL,
    NEAREST,
    OBJECT,
    PLAIN,
    VOID,
    InpaintingScores,
    SegmentationScores,
    rank_batches,
    without_crowds,
)
from ldmseg_fast.evaluation.store import Clock, Store, states_of
from ldmseg_fast.metrics.inpainting import drop_blocks
from ldmseg_fast.metrics.pq import PQStat
from ldmseg_fast.panoptic.results import PanopticResult, instances_of, write_json_list


def evaluate(model_dir: str | Path, data: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Panoptic quality of a model, or of a mask auto-encoder's reconstructions, over a split.

    Args:
        model_dir: MODEL_DIR. One with a mask auto-encoder only is evaluated on reconstructing the split's own maps.
        data: a COCO-panoptic folder.
        options: split, steps, thresholds, backend, and what to measure.

    Returns:
        The report: `mode`, `images`, `thresholds`, `seconds_per_image`, and in percent `class_agnostic` (pq, sq, rq,
        pq_crowd_correct, tp, fp, fn), `baselines`, on request `class_aware` (`categories_from`, `upper_bound`, All,
        Things, Stuff, per_category), for an auto-encoder `mean_iou`. With `options.inpainting` instead of these
        `inpainting` (see `InpaintingScores.report`). With several seeds these are means, and `seeds` has `deviation`
        and `values`. For a backend other than torch `agreement`. The same on every rank and for any number of ranks,
        but for the timings and the images that are compared with torch.

    Raises:
        CheckpointError, BackendError, DataError: a folder that is not what it should be.
        ValueError: options that contradict each other or the model.
    """
    model_dir = resolve_model_dir(model_dir)
    thresholds = resolve_thresholds(model_dir, options)
    predictor = load_predictor(model_dir, data, options, thresholds)
    clock = Clock()
    truth = predictor.dataset.folders.annotations
    settings = {
        "model": str(model_dir.resolve()),
        "weights": states_of(model_dir, [f"{name}/*" for name in load_index(model_dir)["components"]]),
        "engine_dir": options.engine_dir and str(Path(options.engine_dir).resolve()),
        "engines": states_of(Path(options.engine_dir), ["*"]) if options.engine_dir else {},
        "data": str(truth.resolve()),
        "annotations": states_of(truth.parent, [truth.name]),
        "thresholds": asdict(thresholds),
        **predictor.facts,
    }
    store = Store(options.out, settings, clock)
    seeds = range(options.seed, options.seed + options.seeds)
    agreement = None
    if options.inpainting:
        qualities = [inpaint_split(predictor, options, store, seed) for seed in seeds]
        mode = "inpainting by reconstruction" if predictor.reconstructs else "inpainting"
    else:
        source = category_source(options.class_aware, predictor.dataset) if options.class_aware else None
        if options.backend != "torch" and not predictor.reconstructs and options.agreement_images > 0:
            agreement = TorchAgreement(
                model_dir,
                predictor.facts["image_size"],
                {key: predictor.facts[key] for key in ("num_inference_steps", "solver", "eta")},
                options.seed,
                thresholds,
                partial(PQStat, OBJECT, class_agnostic=True),
                options.agreement_images,
                options.cuda_graph,
            )
        qualities = [
            segment_split(predictor, options, store, seed, source, agreement if seed == options.seed else None)
            for seed in seeds
        ]
        mode = "reconstruction" if predictor.reconstructs else "class-aware" if source else "class-agnostic"
    store.finish()
    report = {
        "mode": mode,
        "model": Path(model_dir).name,
        "data": Path(data).name,
        "split": options.split,
        "thresholds": asdict(thresholds),
        "images": len(predictor.dataset),
        "seconds_per_image": clock.per_image(),
        **predictor.facts,
        **spread.mean(qualities),
    }
    if options.seeds > 1:
        report["seeds"] = {
            "seeds": list(seeds),
            "deviation": spread.deviation(qualities),
            "values": spread.each(qualities),
        }
    if agreement is not None:
        report["agreement"] = agreement.report()
    return report


def segment_split(
    predictor: Predictor,
    options: EvaluationOptions,
    store: Store,
    seed: int,
    source: CategorySource | None,
    agreement: TorchAgreement | None,
) -> dict[str, Any]:
    """One pass over the split with one noise seed."""
    dataset, first = predictor.dataset, seed == options.seed
    scores = SegmentationScores(source, predictor.reconstructs, options.baselines)
    gallery = Gallery(dataset, options.worst, options.random, options.seed) if options.page and first else None
    suffix = f"_seed{seed}" if options.seeds > 1 else ""
    instances: list[tuple[int, list[dict[str, Any]]]] = []
    for batch in _batches(dataset, options, f"seed {seed}" if options.seeds > 1 else "evaluate"):
        predict = partial(predictor.segment, seed=seed)
        results = store.results(f"panoptic{suffix}", {"seed": seed}, dataset, batch, predict)
        for index, result in zip(batch, results):
            truth = dataset.ground_truth(index)
            voted = source.vote(index, result) if source else None
            matches = scores.add(index, truth, result, voted)
            final = voted or result
            if source:
                settings = {"seed": seed, "categories_from": source.label}
                store.write(f"panoptic_classes{suffix}", dataset.categories, settings, dataset, index, final)
            if options.instances:
                instances.append((index, instances_of(dataset.image_id(index), final)))
            if gallery is not None:
                gallery.add(index, final, matches)
        if agreement is not None:
            agreement.add(dataset, batch, results)
    if options.instances:
        gathered = sorted(entry for part in distributed.gather_objects(instances) for entry in part)
        distributed.run_on_main(partial(_write_instances, Path(options.instances), gathered))
    if gallery is not None and options.page:
        title = f"{Path(store.settings['model']).name} on {options.split}"
        gallery.write(Path(options.page), title, class_aware=source is not None)
    return scores.report()


def inpaint_split(predictor: Predictor, options: EvaluationOptions, store: Store, seed: int) -> dict[str, Any]:
    """One pass over the split with one noise seed, every image at every sparsity."""
    dataset = predictor.dataset
    plain_row = options.baselines and not predictor.reconstructs
    names = [MODEL, *((VOID, NEAREST) if options.baselines else ()), *((PLAIN,) if plain_row else ())]
    scores = InpaintingScores(names)
    suffix = f"_seed{seed}" if options.seeds > 1 else ""
    for batch in _batches(dataset, options, f"inpaint, seed {seed}" if options.seeds > 1 else "inpaint"):
        truths = [dataset.ground_truth(index) for index in batch]
        maps = [without_crowds(*truth) for truth in truths]
        plain: list[PanopticResult] = []
        if plain_row:
            predict: Any = partial(predictor.segment, seed=seed)
            plain = store.results(f"panoptic{suffix}", {"seed": seed}, dataset, batch, predict)
        for block, probability in options.sparsities():
            dropped = [
                drop_blocks(ids.shape[0], ids.shape[1], block, probability, seed, dataset.image_id(index))
                for index, ids in zip(batch, maps)
            ]
            predict = partial(predictor.inpaint, maps=maps, dropped=dropped, seed=seed)
            name = f"inpainting_{block}_{probability:g}{suffix}".replace(".", "_")
            settings = {"seed": seed, "block": block, "probability": probability}
            results = store.results(name, settings, dataset, batch, predict)
            for place, index in enumerate(batch):
                rows = {MODEL: results[place]} | ({PLAIN: plain[place]} if plain_row else {})
                scores.add((block, probability), index, truths[place], maps[place], dropped[place], rows)
    return {"inpainting": scores.report()}


def _batches(dataset: Any, options: EvaluationOptions, label: str) -> Iterator[list[int]]:
    """This rank's batches, with a progress bar on rank 0."""
    batches = rank_batches(len(dataset), options.batch_size)
    total = sum(map(len, batches))
    with tqdm(total=total, desc=label, unit="image", disable=None if distributed.is_main() else True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _write_instances(path: Path, instances: list[tuple[int, list[dict[str, Any]]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_list(path, (entry for _, entries in instances for entry in entries))
