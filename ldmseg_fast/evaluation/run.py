"""Runs one evaluation: a model on a split -> panoptic quality, result files, pictures, timings.

`evaluate` alone knows all the options: what it calls gets what it needs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.backends.graphs.manifest import read_manifest
from ldmseg_fast.checkpoints.categories_file import CATEGORIES
from ldmseg_fast.checkpoints.hub_names import shown_name
from ldmseg_fast.checkpoints.model_folder import load_index
from ldmseg_fast.checkpoints.shipped import resolve_engine_dir, resolve_model_dir
from ldmseg_fast.checkpoints.weight_files import states_of
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.evaluation import spread
from ldmseg_fast.evaluation.agreement import TorchAgreement
from ldmseg_fast.evaluation.categories import (
    ModelCategories,
    category_source,
    model_categories,
    without_categories,
)
from ldmseg_fast.evaluation.gallery import Gallery
from ldmseg_fast.evaluation.options import EvaluationOptions, resolve_thresholds
from ldmseg_fast.evaluation.predictors import Autoencoder, DiffusionModel, Predictor, is_autoencoder
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
from ldmseg_fast.evaluation.store import Store
from ldmseg_fast.files import real_path
from ldmseg_fast.metrics.inpainting import drop_blocks
from ldmseg_fast.panoptic.results import PanopticResult, instances_of, write_json_list

Instances = list[tuple[int, list[dict[str, Any]]]]  # index of an image, and its COCO instance results


@dataclass(frozen=True)
class Pass:
    """Describes one pass over the split: its noise seed, what its result files' names end in, and its batches' size."""

    seed: int
    suffix: str
    batch_size: int

    def batches(self, count: int, label: str) -> Iterator[list[int]]:
        """Gives this rank's batches of `count` images, with a progress bar on rank 0."""
        batches = rank_batches(count, self.batch_size)
        label = f"{label}, seed {self.seed}" if self.suffix else label
        total = sum(map(len, batches))
        with tqdm(total=total, desc=label, unit="image", disable=None if distributed.is_main() else True) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))


def _one_at_a_time(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Lets one evaluation at a time write into `options.out`."""

    @wraps(function)
    def alone(model_dir: str | Path, data: str | Path, options: EvaluationOptions) -> dict[str, Any]:
        if options.out is None:
            return function(model_dir, data, options)
        with distributed.only_writer_on_main(options.out, "an evaluation", "or choose another folder"):
            return function(model_dir, data, options)

    return alone


@_one_at_a_time
def evaluate(model_dir: str | Path, data: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Measures the panoptic quality of a model, or of a mask auto-encoder's reconstructions, over a split.

    Args:
        model_dir: MODEL_DIR. One with a mask auto-encoder only is evaluated on reconstructing the split's own maps.
        data: a COCO-panoptic folder.
        options: split, steps, thresholds, backend, and what to measure.

    Returns:
        The report: `mode`, `images`, `thresholds`, `seconds_per_image`, and in percent `class_agnostic` (pq, sq, rq,
        pq_crowd_correct, tp, fp, fn), `baselines`, of models with categories or on request `class_aware`
        (`categories_from`, `upper_bound`, All, Things, Stuff, per_category, and where the categories are the model's
        `miou`), for an auto-encoder `mean_iou`. With `options.inpainting` instead of these `inpainting` (see
        `InpaintingScores.report`). With several seeds these are means, and `seeds` has `deviation` and `values`. For a
        backend other than torch `agreement`. The same on every rank and for any number of ranks, but for the timings
        and the images that are compared with torch.

    Raises:
        CheckpointError, BackendError, DataError: a folder that is not what it should be.
        ArgumentError: options that contradict the model, or the results that `options.out` holds already.
        InUseError: another evaluation writes into `options.out`.
    """
    model_dir = resolve_model_dir(model_dir)
    thresholds = resolve_thresholds(model_dir, options)
    predictor = load_predictor(model_dir, data, options, thresholds)
    dataset, baselines = predictor.dataset, options.baselines
    store = Store(options.out, dataset, _what_results_depend_on(model_dir, predictor, options.engine_dir, thresholds))
    seeds = range(options.seed, options.seed + options.seeds)
    passes = [Pass(seed, f"_seed{seed}" if options.seeds > 1 else "", options.batch_size) for seed in seeds]
    agreement = None
    if options.inpainting:
        mode = "inpainting by reconstruction" if predictor.reconstructs else "inpainting"
        names = [MODEL, *((VOID, NEAREST) if baselines else ())]
        names += [PLAIN] if baselines and not predictor.reconstructs else []
        qualities = [inpaint_split(predictor, store, one, names, options.sparsities()) for one in passes]
    else:
        own = None
        if predictor.categories is not None and not options.class_agnostic:
            own = model_categories(predictor.categories, dataset)
        source = category_source(options.class_aware, dataset) if options.class_aware else own
        mode = "reconstruction" if predictor.reconstructs else "class-aware" if source else "class-agnostic"
        comparable = options.backend != "torch" and not predictor.reconstructs and options.agreement_images > 0
        # torch is given one sample, whose ids are slots
        comparable = comparable and not options.is_ensemble and not options.connected
        if comparable and not _has_lora(options):
            sampling = {key: predictor.facts[key] for key in ("num_inference_steps", "solver", "eta")}
            agreement = TorchAgreement(
                model_dir,
                predictor.facts["image_size"],
                sampling,
                options.seed,
                thresholds,
                options.agreement_images,
                options.cuda_graph,
                options.unfused,
            )
        gallery = Gallery(dataset, options.worst, options.random, options.seed) if options.page else None
        instances: Instances | None = [] if options.instances else None
        qualities = []
        for one in passes:
            scores = SegmentationScores(source, predictor.reconstructs, baselines, options.boundary)
            shown, compared = (gallery, agreement) if one is passes[0] else (None, None)
            qualities.append(
                segment_split(
                    predictor, store, one, scores, own=own, instances=instances, gallery=shown, agreement=compared
                )
            )
        if instances is not None and options.instances:
            _write_instances(Path(options.instances), instances)
        if gallery is not None and options.page:
            title = f"{shown_name(real_path(model_dir))} on {options.split}"
            gallery.write(Path(options.page), title, class_aware=source is not None)
    store.finish()
    report = {
        "mode": mode,
        "model": shown_name(model_dir),
        "data": Path(data).name,
        "split": options.split,
        "thresholds": asdict(thresholds),
        "images": len(dataset),
        "seconds_per_image": store.clock.per_image(),
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


def _has_lora(options: EvaluationOptions) -> bool:
    """Tells whether a LoRA is part of exported graphs: then PyTorch's model is another one, and not to be compared."""
    if options.engine_dir is None:
        return False
    return bool(read_manifest(resolve_engine_dir(options.engine_dir, options.backend)).lora)


def load_predictor(
    model_dir: Path, data: str | Path, options: EvaluationOptions, thresholds: PostprocessConfig
) -> Predictor:
    """Loads what predicts: a folder with a mask auto-encoder alone reconstructs, any other samples.

    Raises:
        CheckpointError, BackendError, DataError: a folder that is not what it should be.
        ArgumentError: a size or a number of steps that the model cannot have.
    """
    if is_autoencoder(model_dir):
        if options.connected:
            raise ArgumentError(
                "--connected is of models that sample: a mask auto-encoder returns maps that it is given"
            )
        if options.is_ensemble:
            raise ArgumentError(
                "--samples, --flip, --scales and --edges are of models that sample: a mask auto-encoder has no noise"
            )
        return Autoencoder(
            model_dir,
            data,
            options.split,
            thresholds,
            limit=options.limit,
            seed=options.seed,
            image_size=options.image_size,
            id_assignment=options.id_assignment,
            class_agnostic=options.unfused,
        )
    return DiffusionModel(
        model_dir,
        data,
        options.split,
        thresholds,
        limit=options.limit,
        seed=options.seed,
        image_size=options.image_size,
        steps=options.steps,
        solver=options.solver,
        eta=options.eta,
        backend=options.backend,
        engine_dir=options.engine_dir,
        speed=options.speed,
        ensemble={"num_samples": options.samples, **asdict(options.views)} if options.is_ensemble else None,
        connected=options.connected,
        class_agnostic=options.unfused,
    )


def _what_results_depend_on(
    model_dir: Path, predictor: Predictor, engine_dir: str | None, thresholds: PostprocessConfig
) -> dict[str, Any]:
    truth = predictor.dataset.folders.annotations
    return {
        "model": str(real_path(model_dir)),
        "weights": states_of(model_dir, [f"{name}/*" for name in load_index(model_dir)["components"]] + [CATEGORIES]),
        "engine_dir": engine_dir and str(real_path(engine_dir)),
        "engines": states_of(Path(engine_dir), ["*"]) if engine_dir else {},
        "data": str(real_path(truth)),
        "annotations": states_of(truth.parent, [truth.name]),
        "thresholds": asdict(thresholds),
        **predictor.facts,
    }


def segment_split(
    predictor: Predictor,
    store: Store,
    one: Pass,
    scores: SegmentationScores,
    own: ModelCategories | None = None,
    instances: Instances | None = None,
    gallery: Gallery | None = None,
    agreement: TorchAgreement | None = None,
) -> dict[str, Any]:
    """Makes one pass over the split, and gives the report of `scores`.

    Args:
        predictor: makes the maps.
        store: keeps them, and gives those back that are there already.
        one: noise seed, and size of the batches.
        scores: counts them.
        own: the categories that the model gives; None: its results are class-agnostic.
        instances: takes their segments as COCO instance results, image after image.
        gallery: takes the images that are to be shown.
        agreement: compares them with the torch backend's.
    """
    dataset, source = predictor.dataset, scores.categories
    settings: dict[str, Any] = {"seed": one.seed}
    if source is not None and source is not own:
        settings["categories_from"] = source.label
        if source.listing is not None:
            state = source.listing.stat()
            settings["listing"] = [state.st_size, state.st_mtime_ns]
    convert = without_categories if own is None else own.translate
    for batch in one.batches(len(dataset), "evaluate"):
        results = store.results(
            f"panoptic{one.suffix}",
            {"seed": one.seed} | ({} if own is None else {"categories_from": own.label}),
            batch,
            lambda indices: [convert(result) for result in predictor.segment(indices, seed=one.seed)],
            OBJECT if own is None else dataset.categories,
        )
        for index, result in zip(batch, results):
            final, matches = scores.add(index, dataset.describe(index), dataset.ground_truth(index), result)
            if source is not None and source is not own:
                name = f"panoptic_classes{one.suffix}"
                store.write(name, dataset.categories, settings, index, final, source.files(index))
            if instances is not None:
                instances.append((index, instances_of(dataset.image_id(index), final)))
            if gallery is not None:
                gallery.add(index, final, matches)
        if agreement is not None:
            agreement.add(dataset, batch, results)
    return scores.report()


def inpaint_split(
    predictor: Predictor, store: Store, one: Pass, names: Sequence[str], sparsities: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """Makes one pass over the split, in which every image is completed at every sparsity.

    Args:
        predictor: completes the maps.
        store: keeps them, and gives those back that are there already.
        one: noise seed, and size of the batches.
        names: rows of the report, of MODEL, VOID, NEAREST and PLAIN.
        sparsities: side in pixels of the blocks that are dropped, and the probability of each to be.
    """
    dataset, scores = predictor.dataset, InpaintingScores(names)
    for batch in one.batches(len(dataset), "inpaint"):
        truths = [dataset.ground_truth(index) for index in batch]
        maps = [without_crowds(*truth) for truth in truths]
        plain: list[PanopticResult] = []
        if PLAIN in names:
            predict: Any = _agnostic(partial(predictor.segment, seed=one.seed))
            plain = store.results(f"panoptic{one.suffix}", {"seed": one.seed}, batch, predict)
        for block, probability in sparsities:
            dropped = [
                drop_blocks(ids.shape[0], ids.shape[1], block, probability, one.seed, dataset.image_id(index))
                for index, ids in zip(batch, maps)
            ]
            predict = _agnostic(partial(predictor.inpaint, maps=maps, dropped=dropped, seed=one.seed))
            name = f"inpainting_{block}_{probability:g}{one.suffix}".replace(".", "_")
            settings = {"seed": one.seed, "block": block, "probability": probability}
            results = store.results(name, settings, batch, predict)
            for place, index in enumerate(batch):
                rows = {MODEL: results[place]} | ({PLAIN: plain[place]} if plain else {})
                known = truths[place], maps[place], dropped[place]
                scores.add((block, probability), dataset.describe(index), *known, rows)
    return {"inpainting": scores.report()}


def _agnostic(predict: Callable[..., list[PanopticResult]]) -> Callable[..., list[PanopticResult]]:
    """Makes the results of `predict` class-agnostic."""
    return lambda indices: [without_categories(result) for result in predict(indices)]


def _write_instances(path: Path, instances: Instances) -> None:
    """Writes all ranks' instance results as one file, in the order of the split."""
    gathered = sorted(entry for part in distributed.gather_objects(instances) for entry in part)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_list(path, (entry for _, entries in gathered for entry in entries))

    distributed.run_on_main(write)
