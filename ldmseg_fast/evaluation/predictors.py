"""Turns images of a split into panoptic maps, by a diffusion model or by a mask auto-encoder that sees the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ldmseg_fast.backends.finite import all_finite
from ldmseg_fast.checkpoints.categories_file import load_categories
from ldmseg_fast.checkpoints.model_folder import load_component, load_index
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.transforms import resize_ids
from ldmseg_fast.errors import ArgumentError, NonFiniteError, memory_at
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.metrics.inpainting import keep_given
from ldmseg_fast.panoptic.format import MAX_ID
from ldmseg_fast.panoptic.postprocess import postprocess
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes
from ldmseg_fast.pipeline import LDMSegPipeline


class Predictor(Protocol):
    """Predicts maps of a split's images.

    Attributes:
        dataset: the split.
        facts: what the report says about the model.
        reconstructs: whether it sees the truth.
        categories: of models with categories.
    """

    dataset: CocoPanoptic
    facts: dict[str, Any]
    reconstructs: bool
    categories: CategoryTable | None

    def segment(self, indices: Sequence[int], seed: int) -> list[PanopticResult]:
        """Predicts a map of each image at `indices`."""
        ...

    def inpaint(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray], seed: int
    ) -> list[PanopticResult]:
        """Completes a map of each image at `indices`.

        What was neither dropped nor void has its own id in the result; new segments have others.

        Args:
            indices: places in the split.
            maps: int32 [H, W], 0 = void.
            dropped: bool [H, W].
            seed: of the noise.
        """
        ...


def is_autoencoder(model_dir: str | Path) -> bool:
    """Tells whether a model folder holds a mask auto-encoder alone. Raises CheckpointError for no model folder."""
    return load_index(model_dir)["components"] == ["mask_vae"]


class DiffusionModel:
    """Samples a map for each picture.

    Args:
        model_dir: MODEL_DIR.
        data: a COCO-panoptic folder.
        split: of it.
        thresholds: of the post-processing.
        limit: how many images of the split; 0: all.
        seed: the first noise seed, for the report.
        image_size: side in pixels of what the networks see; None: the model's own.
        steps: of sampling; None: the model's own.
        solver, eta, backend, engine_dir: as `LDMSegPipeline` has them.
        speed: as `EvaluationOptions.speed`, for `LDMSegPipeline.from_pretrained`.
        ensemble: `num_samples` and what `Views` has, of `LDMSegPipeline.ensemble`; None: one sample a picture. Maps
            are completed with its edges alone.
        connected: as `LDMSegPipeline` has it.
        class_agnostic: whether categories of the model are left out.

    Raises:
        CheckpointError, BackendError, DataError: a folder that is not what it should be.
        ArgumentError: a size or a number of steps that the model cannot have.
    """

    reconstructs = False

    def __init__(
        self,
        model_dir: str | Path,
        data: str | Path,
        split: str,
        thresholds: PostprocessConfig,
        *,
        limit: int,
        seed: int,
        image_size: int | None,
        steps: int | None,
        solver: str,
        eta: float,
        backend: str,
        engine_dir: str | None,
        speed: Mapping[str, Any],
        ensemble: dict[str, Any] | None = None,
        connected: int = 0,
        class_agnostic: bool = False,
    ) -> None:
        self.ensemble = ensemble
        self.pipe = LDMSegPipeline.from_pretrained(
            model_dir, backend, engine_dir, image_size=image_size, class_agnostic=class_agnostic, **speed
        )
        info = self.pipe.info
        slots, pictures = info.mask_vae.num_slots, info.picture_size
        self.dataset = CocoPanoptic(data, split, info.image_size, num_slots=slots, limit=limit, picture_size=pictures)
        self.categories = info.categories
        steps = info.num_inference_steps if steps is None else steps
        self.pipe.scheduler.timesteps(steps)  # refuses a number of steps that cannot be
        self.thresholds = thresholds
        self.sampling: dict[str, Any] = {"num_inference_steps": steps, "solver": solver, "eta": eta}
        self.sampling |= {"connected": connected} if connected else {}
        self.facts = {"backend": backend, **self.sampling, "image_size": info.image_size, "seed": seed}
        usual = {"precision": None, "attention": "auto", "fused": False}  # what results depend on, within rounding
        self.facts |= {name: speed[name] for name, value in usual.items() if speed[name] != value}
        self.facts |= {"categories": "left out"} if class_agnostic and info.mask_vae.num_categories else {}
        if ensemble is not None:
            self.facts["ensemble"] = ensemble | {"scales": list(ensemble["scales"])}

    def segment(self, indices: Sequence[int], seed: int) -> list[PanopticResult]:
        """See `Predictor.segment`."""
        images = [self.dataset.load_image(index) for index in indices]
        if self.ensemble is not None:
            return list(self.pipe.ensemble(images, **self.ensemble, **self._settings(indices, seed)))
        return list(self.pipe(images, **self._settings(indices, seed)))

    def inpaint(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray], seed: int
    ) -> list[PanopticResult]:
        """See `Predictor.inpaint`."""
        images = [self.dataset.load_image(index) for index in indices]
        for index, image, ids in zip(indices, images, maps):
            self.dataset.check_size(index, image, ids)
        known = [~lost & (ids != 0) for ids, lost in zip(maps, dropped)]
        edges = self.ensemble["edges"] if self.ensemble else 0
        return list(self.pipe.inpaint(images, list(maps), known, edges=edges, **self._settings(indices, seed)))

    def _settings(self, indices: Sequence[int], seed: int) -> dict[str, Any]:
        ids = [self.dataset.image_id(index) for index in indices]
        own = {"seed": seed, "image_ids": ids, "thresholds": self.thresholds, "batch_size": len(indices)}
        return {**self.sampling, **own}


class Autoencoder:
    """Encodes and decodes the split's own maps; the results have the maps' ids wherever a segment is recognised.

    Args:
        model_dir, data, split, thresholds, limit, image_size: as `DiffusionModel` has them.
        seed: the first seed of the assignment of slots, for the report.
        id_assignment: how segments get slots; None: as in the model's training.
        class_agnostic: whether categories that it decodes are left out.

    Raises:
        CheckpointError, DataError: a folder that is not what it should be.
        ArgumentError: a size that the model cannot have.
    """

    reconstructs = True

    def __init__(
        self,
        model_dir: str | Path,
        data: str | Path,
        split: str,
        thresholds: PostprocessConfig,
        *,
        limit: int,
        seed: int,
        image_size: int | None,
        id_assignment: str | None,
        class_agnostic: bool = False,
    ) -> None:
        index = load_index(model_dir)
        self.folder = model_dir
        self.vae: Any = load_component(model_dir, "mask_vae")
        self.categories = load_categories(model_dir, self.vae.config)
        scheme = id_assignment or index.get("id_assignment", "random")
        self.size = image_size or int(index.get("image_size", 512))
        if self.size % self.vae.config.downsampling:
            reduction = self.vae.config.downsampling
            raise ArgumentError(f"--size {self.size}: not a multiple of {reduction}, the auto-encoder's reduction")
        self.dataset = CocoPanoptic(
            data,
            split,
            self.size,
            num_slots=self.vae.config.num_slots,
            id_assignment=scheme,
            seed=seed,
            limit=limit,
        )
        if self.categories is not None:
            self.dataset.use_categories(self.categories)
        self.categories = None if class_agnostic else self.categories
        self.thresholds = thresholds
        self.facts = {"backend": "torch", "id_assignment": scheme, "image_size": self.size, "seed": seed}
        self.facts |= {"categories": "left out"} if class_agnostic and self.vae.config.num_categories else {}

    def segment(self, indices: Sequence[int], seed: int) -> list[PanopticResult]:
        """See `Predictor.segment`."""
        maps = [self.dataset.ground_truth(index)[0] for index in indices]
        with memory_at(self.size, self.folder):
            return self._reconstruct(indices, maps, None, seed)

    def inpaint(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray], seed: int
    ) -> list[PanopticResult]:
        """See `Predictor.inpaint`."""
        with memory_at(self.size, self.folder):
            results = self._reconstruct(indices, maps, dropped, seed)
        return [
            _described(keep_given(result.segmentation, ids, lost), result)
            for result, ids, lost in zip(results, maps, dropped)
        ]

    @torch.inference_mode()
    def _reconstruct(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray] | None, seed: int
    ) -> list[PanopticResult]:
        """Reconstructs maps; dropped pixels are void to the encoder. Arguments as `inpaint`'s."""
        self.dataset.seed = seed
        items = [self.dataset[index] for index in indices]
        ids_of_slots = [_ids_of_slots(item, resize_ids(ids, self.size)) for item, ids in zip(items, maps)]
        for item, lost in zip(items, dropped or ()):
            hidden = torch.from_numpy(resize_ids(lost.astype(np.uint8), self.size) > 0)
            for key in {"segment_ids", "category_ids"} & item.keys():
                item[key][hidden] = 0
        batch, config = collate(items), self.vae.config
        bits = encode_mask_bits(
            batch["segment_ids"],
            config.num_bits,
            batch["table"],
            category_ids=batch.get("category_ids"),
            category_bits=config.category_bits,
        )
        logits, category_logits = self.vae.decode_both(self.vae.encode(bits).mode())
        if not all_finite(logits) or (category_logits is not None and not all_finite(category_logits)):
            raise NonFiniteError(f"{self.folder}: mask_vae: slot logits are not finite (NaN or infinity)")
        sizes = (self.size, self.size), batch["original_size"]
        results = postprocess(logits, *sizes, self.thresholds, category_logits, self.categories)
        return [_with_ids(result, names, ids) for result, names, ids in zip(results, ids_of_slots, maps)]


def _ids_of_slots(item: dict[str, Any], ids: np.ndarray) -> dict[int, int]:
    """Tells the map's own id for a result's (slot + 1), from an item and its map int32 [S, S]."""
    dense = item["segment_ids"].numpy()
    pairs = np.unique(dense.astype(np.int64) << 24 | ids).tolist()
    table = item["table"].tolist()
    return {table[pair >> 24] + 1: pair & MAX_ID for pair in pairs if pair >> 24 and pair & MAX_ID}


def _with_ids(result: PanopticResult, names: dict[int, int], ids: np.ndarray) -> PanopticResult:
    """Exchanges a result's ids as `names` says; all others become the lowest ids that the map `ids` lacks."""
    taken = set(np.unique(ids).tolist())
    free = (candidate for candidate in range(1, MAX_ID + 1) if candidate not in taken)
    new_id = {s["id"]: names[s["id"]] if s["id"] in names else next(free) for s in result.segments_info}
    table = np.zeros(int(result.segmentation.max()) + 1, np.int32)
    for old, new in new_id.items():
        table[old] = new
    segments = sorted(({**s, "id": new_id[s["id"]]} for s in result.segments_info), key=lambda s: s["id"])
    return PanopticResult(table[result.segmentation], segments)


def _described(segmentation: np.ndarray, source: PanopticResult) -> PanopticResult:
    """Describes a changed map by its own areas and boxes; scores are the source's, 1 for segments that it lacks."""
    known = {segment["id"]: segment for segment in source.segments_info}
    default = {"category_id": 1, "label_id": 1, "isthing": True, "iscrowd": 0, "was_fused": False, "score": 1.0}
    return PanopticResult(
        segmentation, [default | known.get(shape["id"], {}) | shape for shape in segment_shapes(segmentation)]
    )
