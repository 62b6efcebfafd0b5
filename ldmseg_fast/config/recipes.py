"""Says how long and how each stage of a preset is trained, and where these settings come from.

A recipe is laid over its preset; what the command line sets wins. A run that is resumed keeps what it began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ldmseg_fast.config.settings import Config

STAGE_NAMES = ("autoencoder", "diffusion", "one_step", "distillation")


@dataclass(frozen=True)
class Recipe:
    """Holds the training settings of a stage.

    Attributes:
        source: where they come from.
        settings: text by the setting's name, as on the command line; the preset's stay in all others.
    """

    source: str
    settings: Mapping[str, str] = field(default_factory=dict)


_PAPER = "arXiv 2401.10227 and its public training configuration"
_OURS = "this project's, the same for every stage"

RECIPES: dict[str, dict[str, Recipe]] = {
    "tiny": dict.fromkeys(STAGE_NAMES, Recipe(_OURS)),
    "photographs": dict.fromkeys(STAGE_NAMES, Recipe(_OURS)),
    "photographs_256": dict.fromkeys(STAGE_NAMES, Recipe(_OURS)),
    "coco-fast": dict.fromkeys(STAGE_NAMES, Recipe("that of photographs_256; not tried at this size")),
    "coco": {
        "autoencoder": Recipe(
            f"{_PAPER}: 50,000 to 90,000 iterations",
            {
                "train.steps": "90000",
                "train.batch_size": "16",
                "train.learning_rate": "0.0001",
                "train.weight_decay": "0.05",
                "train.no_decay": "norm",
                "train.clip": "3",
                "train.warmup": "200",
            },
        ),
        "diffusion": Recipe(
            f"{_PAPER}: 200,000 iterations, 100,000 in the paper",
            {
                "train.steps": "200000",
                "train.batch_size": "256",
                "train.learning_rate": "0.0001",
                "train.weight_decay": "0.05",
                "train.clip": "1",
                "train.validate_share": "0.1",
            },
        ),
        # one step with the task's loss is what this paper trains, on depth and normals
        "one_step": Recipe(
            "after Martin Garcia et al. 2024, arXiv 2409.11355; not tried at this size",
            {
                "train.steps": "20000",
                "train.batch_size": "32",
                "train.learning_rate": "0.00003",
                "train.warmup": "100",
            },
        ),
        "distillation": Recipe(
            "after Salimans & Ho 2022, arXiv 2202.00512: 50,000 updates for each halving; not tried at this size",
            {"train.steps": "50000", "train.batch_size": "128", "train.warmup": "0"},
        ),
    },
}


def recipe_of(preset: str, stage: str) -> Recipe:
    """Looks up a preset's recipe for a stage; a file of settings has an empty one without a source."""
    return RECIPES[preset][stage] if preset in RECIPES else Recipe("")


def describe_recipe(preset: str, stage: str, config: Config) -> list[str]:
    """Writes one line: the recipe of a run, its source, and which of its settings the run has changed."""
    recipe = recipe_of(preset, stage)
    if not recipe.source:
        return [f"recipe: {stage}, all from {preset}"]
    parts = []
    for key, text in recipe.settings.items():
        now = setting_text(config, key)
        parts.append(f"{key}={now}" + ("" if _same(now, text) else f" (recipe: {text})"))
    settings = "; " + ", ".join(parts) if parts else f"; train.steps={config.train.steps}"
    return [f"recipe: {preset}, {stage} ({recipe.source}){settings}"]


def setting_text(config: Config, key: str) -> str:
    """Writes a setting's value as the command line takes it."""
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other
