"""Describes what `ldmseg evaluate` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.model_folder import load_index
from ldmseg_fast.config import PostprocessConfig, from_dict
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.ensemble import Views
from ldmseg_fast.metrics.inpainting import PAPER_BLOCK, PAPER_PROBABILITIES


@dataclass(frozen=True)
class EvaluationOptions:
    """Holds what `ldmseg evaluate` takes; None means the model's own setting.

    Raises:
        ArgumentError: a value out of range, or options that contradict each other.
    """

    split: str = "val2017"
    steps: int | None = None
    mask_threshold: float | None = None
    count_threshold: int | None = None
    overlap_threshold: float | None = None
    connected: int = 0  # see `LDMSegPipeline.__call__`
    seed: int = 0
    seeds: int = 1  # how many noise seeds: seed, seed + 1, ...
    samples: int = 1  # of an ensemble per picture; see `LDMSegPipeline.ensemble`
    flip: bool = False  # it and the three below: what the ensemble sees, and how it is joined
    scales: tuple[float, ...] = (1.0,)
    fusion: str | None = None
    edges: int = 0
    limit: int = 0
    batch_size: int = 16
    id_assignment: str | None = None  # of an auto-encoder's reconstruction
    image_size: int | None = None  # side in pixels of what the networks see
    solver: str = "ddim"
    eta: float = 0.0  # of the DDIM solver's noise
    backend: str = "torch"
    engine_dir: str | None = None
    cuda_graph: bool | None = None  # it and the six below: see `LDMSegPipeline.from_pretrained`
    fused: bool = False
    precision: str | None = None
    attention: str = "auto"
    profile: int | None = None
    kernel_specialization: str | None = None
    graph_strategy: str | None = None
    agreement_images: int = 64  # of a backend other than torch, compared with torch; per rank
    baselines: bool = True
    boundary: bool = False  # also count boundary PQ
    class_agnostic: bool = False  # of a model with categories: its maps are scored without
    unfused: bool = False  # the same, and stuff of one category stays apart in them
    class_aware: str | None = None  # "GT", a folder of semantic PNGs, or a COCO panoptic result JSON
    inpainting: bool = False
    blocks: tuple[int, ...] = (PAPER_BLOCK,)  # sides in pixels of the blocks that are dropped
    probabilities: tuple[float, ...] = PAPER_PROBABILITIES
    out: str | None = None  # folder for the COCO results files
    instances: str | None = None  # file for the segments as COCO instance results (run lengths)
    page: str | None = None  # HTML file with the worst and some random images
    worst: int = 8
    random: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "fusion", self.views.fusion)
        checks = [
            (self.seeds >= 1, f"--seeds {self.seeds}: at least 1"),
            (1 <= self.samples <= 1000, f"--samples {self.samples}: from 1 to 1000"),
            (
                not (self.inpainting and (self.samples > 1 or self.flip or self.scales != (1.0,))),
                "--inpainting completes one map per picture: leave --samples, --flip and --scales out",
            ),
            (self.seed >= 0, f"--seed {self.seed}: not negative"),
            (self.batch_size >= 1, f"--batch-size {self.batch_size}: at least 1"),
            (self.limit >= 0, f"--limit {self.limit}: not negative; 0 means all images"),
            (min(self.worst, self.random) >= 0, f"--worst {self.worst} --random {self.random}: not negative"),
            *(
                (value is None or 0 <= value <= 1, f"--{name} {value}: a number from 0 to 1")
                for name, value in (("mask-th", self.mask_threshold), ("overlap-th", self.overlap_threshold))
            ),
            (self.connected >= 0, f"--connected {self.connected}: not negative; 0 means off"),
            (
                not (self.connected and self.inpainting),
                "--inpainting keeps the segments that are given: leave --connected out",
            ),
            ((self.count_threshold or 0) >= 0, f"--count-th {self.count_threshold}: not negative"),
            (
                not self.page or self.worst + self.random > 0,
                "--page: with --worst 0 and --random 0 it would show no image",
            ),
            (
                not self.inpainting or (len(self.blocks) > 0 and all(block >= 1 for block in self.blocks)),
                f"--block {_listed(self.blocks)}: sides of blocks in pixels, at least 1",
            ),
            (
                not self.inpainting
                or (len(self.probabilities) > 0 and all(0 <= share <= 1 for share in self.probabilities)),
                f"--probability {_listed(self.probabilities)}: numbers from 0 to 1",
            ),
            (not (self.class_agnostic and self.class_aware), "--class-agnostic and --class-aware: give one of them"),
            (
                self.class_agnostic or self.inpainting or not self.unfused,
                "--unfused leaves the categories out of the maps: give --class-agnostic or --inpainting with it",
            ),
            (
                not (self.inpainting and self.class_aware),
                "--inpainting is class-agnostic: evaluate without --class-aware",
            ),
            (
                not (self.instances and (self.inpainting or self.seeds > 1)),
                "--instances holds one result per image: leave --inpainting and --seeds out",
            ),
            (not (self.boundary and self.inpainting), "--inpainting has no boundary PQ: leave --boundary out"),
            (not (self.page and self.inpainting), "--page shows one result per image: leave --inpainting out"),
        ]
        for ok, message in checks:
            if not ok:
                raise ArgumentError(message)

    @property
    def is_ensemble(self) -> bool:
        """Whether `LDMSegPipeline.ensemble` makes the maps."""
        return self.samples > 1 or self.flip or self.scales != (1.0,) or self.edges > 0

    @property
    def views(self) -> Views:
        """What an ensemble sees, and how it is joined."""
        return Views(self.flip, self.scales, self.fusion, self.edges)

    @property
    def speed(self) -> dict[str, Any]:
        """How the networks run, as `LDMSegPipeline.from_pretrained` takes it."""
        names = ("fused", "precision", "attention", "cuda_graph", "profile", "kernel_specialization", "graph_strategy")
        return {name: getattr(self, name) for name in names}

    def sparsities(self) -> list[tuple[int, float]]:
        """Lists (block, probability) of an inpainting evaluation, each once, ascending."""
        return sorted({(block, share) for block in self.blocks for share in self.probabilities})


def resolve_thresholds(model_dir: str | Path, options: EvaluationOptions) -> PostprocessConfig:
    """Takes the model's own thresholds, and puts those in that the options give.

    Raises:
        CheckpointError: no model folder.
        ConfigError: a model folder with other thresholds than there are.
    """
    own = from_dict(PostprocessConfig, load_index(model_dir).get("postprocess", {}), "postprocess.")
    names = ("mask_threshold", "count_threshold", "overlap_threshold")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(own, **given)


def _listed(values: tuple[int, ...] | tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values) or "(none)"
