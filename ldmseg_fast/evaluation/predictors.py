"""What turns images of a split into panoptic maps: a diffusion model, or a mask auto-encoder that sees the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ldmseg_fast.checkpoints.model_folder import load_component, load_index
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.transforms import resize_ids
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.evaluation.options import EvaluationOptions
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.metrics.inpainting import keep_given
from ldmseg_fast.panoptic.format import MAX_ID
from ldmseg_fast.panoptic.postprocess import postprocess
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes
from ldmseg_fast.pipeline import LDMSegPipeline


class Predictor(Protocol):
    """dataset: the split. facts: what the report says about the model. reconstructs: whether it sees the truth.

    `segment` gives one result per index. `inpaint` also gets the maps int32 [H, W] (0 void) and their dropped pixels
    bool [H, W]; what was neither dropped nor void has its own id in the result, new segments have others.
    """

    dataset: CocoPanoptic
    facts: dict[str, Any]
    reconstructs: bool

    def segment(self, indices: Sequence[int], seed: int) -> list[PanopticResult]: ...

    def inpaint(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray], seed: int
    ) -> list[PanopticResult]: ...


def load_predictor(
    model_dir: str | Path, data: str | Path, options: EvaluationOptions, thresholds: PostprocessConfig
) -> Predictor:
    """A folder with a mask auto-encoder alone reconstructs; any other samples. Raises CheckpointError, DataError."""
    kind = Autoencoder if is_autoencoder(model_dir) else DiffusionModel
    return kind(model_dir, data, options, thresholds)


def is_autoencoder(model_dir: str | Path) -> bool:
    return load_index(model_dir).get("components") == ["mask_vae"]


class DiffusionModel:
    """Samples a map for each picture."""

    reconstructs = False

    def __init__(
        self, model_dir: str | Path, data: str | Path, options: EvaluationOptions, thresholds: PostprocessConfig
    ) -> None:
        self.pipe = LDMSegPipeline.from_pretrained(
            model_dir,
            options.backend,
            options.engine_dir,
            image_size=options.image_size,
            cuda_graph=options.cuda_graph,
        )
        info = self.pipe.info
        self.dataset = CocoPanoptic(
            data, options.split, info.image_size, num_slots=info.mask_vae.num_slots, limit=options.limit
        )
        steps = info.num_inference_steps if options.steps is None else options.steps
        self.pipe.scheduler.timesteps(steps)  # refuses a number of steps that cannot be
        self.thresholds = thresholds
        self.sampling = {"num_inference_steps": steps, "solver": options.solver, "eta": options.eta}
        self.facts = {"backend": options.backend, **self.sampling, "image_size": info.image_size, "seed": options.seed}

    def segment(self, indices: Sequence[int], seed: int) -> list[PanopticResult]:
        images = [self.dataset.load_image(index) for index in indices]
        return list(self.pipe(images, **self._settings(indices, seed)))

    def inpaint(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray], seed: int
    ) -> list[PanopticResult]:
        images = [self.dataset.load_image(index) for index in indices]
        known = [~lost & (ids != 0) for ids, lost in zip(maps, dropped)]
        return list(self.pipe.inpaint(images, list(maps), known, **self._settings(indices, seed)))

    def _settings(self, indices: Sequence[int], seed: int) -> dict[str, Any]:
        ids = [self.dataset.image_id(index) for index in indices]
        own = {"seed": seed, "image_ids": ids, "thresholds": self.thresholds, "batch_size": len(indices)}
        return {**self.sampling, **own}


class Autoencoder:
    """Encodes and decodes the split's own maps; the results have the maps' ids wherever a segment is recognised."""

    reconstructs = True

    def __init__(
        self, model_dir: str | Path, data: str | Path, options: EvaluationOptions, thresholds: PostprocessConfig
    ) -> None:
        index = load_index(model_dir)
        self.vae: Any = load_component(model_dir, "mask_vae")
        scheme = options.id_assignment or index.get("id_assignment", "random")
        self.size = options.image_size or int(index.get("image_size", 512))
        if self.size % self.vae.config.downsampling:
            reduction = self.vae.config.downsampling
            raise ArgumentError(f"--size {self.size}: not a multiple of {reduction}, the auto-encoder's reduction")
        self.dataset = CocoPanoptic(
            data,
            options.split,
            self.size,
            num_slots=self.vae.config.num_slots,
            id_assignment=scheme,
            seed=options.seed,
            limit=options.limit,
        )
        self.thresholds = thresholds
        self.facts = {"backend": "torch", "id_assignment": scheme, "image_size": self.size, "seed": options.seed}

    def segment(self, indices: Sequence[int], seed: int) -> list[PanopticResult]:
        maps = [self.dataset.ground_truth(index)[0] for index in indices]
        return self._reconstruct(indices, maps, None, seed)

    def inpaint(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray], seed: int
    ) -> list[PanopticResult]:
        results = self._reconstruct(indices, maps, dropped, seed)
        return [
            _described(keep_given(result.segmentation, ids, lost), result)
            for result, ids, lost in zip(results, maps, dropped)
        ]

    @torch.inference_mode()
    def _reconstruct(
        self, indices: Sequence[int], maps: Sequence[np.ndarray], dropped: Sequence[np.ndarray] | None, seed: int
    ) -> list[PanopticResult]:
        """Dropped pixels are void to the encoder."""
        self.dataset.seed = seed
        items = [self.dataset[index] for index in indices]
        ids_of_slots = [_ids_of_slots(item, resize_ids(ids, self.size)) for item, ids in zip(items, maps)]
        for item, lost in zip(items, dropped or ()):
            item["segment_ids"][torch.from_numpy(resize_ids(lost.astype(np.uint8), self.size) > 0)] = 0
        batch = collate(items)
        bits = encode_mask_bits(batch["segment_ids"], self.vae.config.num_bits, batch["table"])
        mask_logits = self.vae.decode(self.vae.encode(bits).mode())
        results = postprocess(mask_logits, (self.size, self.size), batch["original_size"], self.thresholds)
        return [_with_ids(result, names, ids) for result, names, ids in zip(results, ids_of_slots, maps)]


def _ids_of_slots(item: dict[str, Any], ids: np.ndarray) -> dict[int, int]:
    """Result id (slot + 1) -> the map's own id, from an item and its map [S, S]."""
    dense = item["segment_ids"].numpy()
    pairs = np.unique(dense.astype(np.int64) << 24 | ids).tolist()
    table = item["table"].tolist()
    return {table[pair >> 24] + 1: pair & MAX_ID for pair in pairs if pair >> 24 and pair & MAX_ID}


def _with_ids(result: PanopticResult, names: dict[int, int], ids: np.ndarray) -> PanopticResult:
    """`result` with ids exchanged as `names` says; all others become the lowest ids that the map `ids` lacks."""
    taken = set(np.unique(ids).tolist())
    free = (candidate for candidate in range(1, MAX_ID + 1) if candidate not in taken)
    new_id = {s["id"]: names[s["id"]] if s["id"] in names else next(free) for s in result.segments_info}
    table = np.zeros(int(result.segmentation.max()) + 1, np.int32)
    for old, new in new_id.items():
        table[old] = new
    segments = sorted(({**s, "id": new_id[s["id"]]} for s in result.segments_info), key=lambda s: s["id"])
    return PanopticResult(table[result.segmentation], segments)


def _described(segmentation: np.ndarray, source: PanopticResult) -> PanopticResult:
    """A changed map with areas and boxes of its own; scores are the source's, 1 for segments that it lacks."""
    known = {segment["id"]: segment for segment in source.segments_info}
    default = {"category_id": 1, "label_id": 1, "isthing": True, "iscrowd": 0, "was_fused": False, "score": 1.0}
    return PanopticResult(
        segmentation, [default | known.get(shape["id"], {}) | shape for shape in segment_shapes(segmentation)]
    )
