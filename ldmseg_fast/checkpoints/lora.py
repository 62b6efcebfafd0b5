"""Reads a LoRA of a UNet and folds it into the weights that it changes.

A LoRA (Hu et al., arXiv 2106.09685) adds `scale * alpha / rank * up @ down` to the weight of a layer. Layers are named
as diffusers (https://huggingface.co/docs/diffusers) and PEFT save them: `unet.LAYER.lora_A.weight` and `lora_B`,
`unet.LAYER.lora.down.weight` and `up`, `unet.ATTENTION.processor.to_q_lora.down.weight`, or
`lora_unet_LAYER.lora_down.weight` with underscores in LAYER. `alpha` is a tensor beside them, or in the file's
metadata; without either it is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.checkpoints.tensors import check_finite, opened_weights
from ldmseg_fast.errors import CheckpointError

METADATA = "lora_adapter_metadata"  # diffusers' entry: PEFT's settings as JSON, their names with the network's before
FACTOR = re.compile(r"(?P<layer>.+?)[._]lora(?:[._](?P<old>up|down)|_(?P<new>[AB])(?:\.[^.]+)?)\.weight")
ALPHA = re.compile(r"(?P<layer>.+?)(?:[._]lora)?\.alpha")
SLOW = re.compile(r"\)[*+?{]")  # a repeated group: a search may take exponential time
QUANTIFIER = re.compile(r"[*+?{]")  # each is a power of the name's length
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBERS = (*FLOATS, torch.int32, torch.int64)  # an alpha may be a whole number
TEXT_ENCODER = ("text_encoder", "lora_te", "text_model")


@dataclass
class Change:
    """Holds what a LoRA says of one layer: `down` [R, I, ...], `up` [O, R, ...], and `alpha`, None where unsaid."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


def fold_lora(state: Mapping[str, Tensor], path: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """Adds a LoRA to a UNet's weights.

    What the file has of a text encoder stays unread.

    Args:
        state: the UNet's tensors, any shape, float32.
        path: the LoRA, a safetensors file.
        scale: of the change; 0 changes nothing.

    Returns:
        The tensors under the same names; those that the LoRA leaves alone are the same ones.

    Raises:
        CheckpointError: a damaged file, one without a UNet's LoRA, names or shapes that do not fit, or values that are
            not finite.
    """
    with opened_weights(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    ours = {name: value for name, value in tensors.items() if not name.startswith(TEXT_ENCODER)}
    if tensors and not ours:
        raise CheckpointError(f"{path}: a LoRA of a text encoder alone, which no graph holds; give one of a UNet")
    layers = {name.removesuffix(".weight") for name in state if name.endswith(".weight") and state[name].ndim > 1}
    changes = _read_changes(ours, layers, path)
    if other := [name for name, value in ours.items() if value.dtype not in (FLOATS if value.numel() > 1 else NUMBERS)]:
        raise CheckpointError(
            f"{path}: tensors of another type: {_listed(f'{name} {ours[name].dtype}' for name in other)}; save the "
            f"LoRA in float32 or float16"
        )
    check_finite(ours, str(path))
    settings = _settings(metadata, path)
    folded = dict(state)
    for layer, change in changes.items():
        weight = state[f"{layer}.weight"]
        up, down = _fitting(change, weight, f"{path}: {layer}")
        rank = down.shape[0]
        alpha = _alpha(change, settings, layer, rank, path)
        delta = (up.flatten(1).float() @ down.flatten(1).float()).view(weight.shape)
        folded[f"{layer}.weight"] = weight + (scale * alpha / rank) * delta
        if not folded[f"{layer}.weight"].isfinite().all():
            raise CheckpointError(
                f"{path}: {layer}: its change at scale {scale:g} and alpha {alpha:g} is beyond float32; take a smaller "
                f"scale, or copy the file again"
            )
    return folded


def _read_changes(tensors: Mapping[str, Tensor], layers: set[str], path: Path) -> dict[str, Change]:
    """Sorts a file's tensors by the layer of ours that they change."""
    underscored = {layer.replace(".", "_"): layer for layer in layers}
    changes: dict[str, Change] = {}
    strange, unknown = [], []
    for name, value in tensors.items():
        found = FACTOR.fullmatch(name) or ALPHA.fullmatch(name)
        if found is None or (found.re is ALPHA and value.numel() != 1):
            strange.append(name)
            continue
        layer = _own_name(found["layer"], underscored)
        if layer not in layers:
            unknown.append(layer)
        elif found.re is ALPHA:
            changes.setdefault(layer, Change()).alpha = value.item()
        else:
            part = found["old"] or {"A": "down", "B": "up"}[found["new"]]
            factors = changes.setdefault(layer, Change()).factors
            if part in factors:
                raise CheckpointError(f"{path}: {layer} has two changes; save one LoRA in a file")
            factors[part] = value
    if strange or not tensors:
        raise CheckpointError(f"{path}: no LoRA of a UNet as diffusers saves it; {_listed(strange) or 'it is empty'}")
    if unknown:
        raise CheckpointError(
            f"{path}: a LoRA of another UNet; this one has no {_listed(sorted(set(unknown)))}; train it on this model"
        )
    if halves := [layer for layer, change in changes.items() if len(change.factors) != 2]:
        raise CheckpointError(f"{path}: damaged, of {_listed(halves)} one of two factors is missing; copy it again")
    return changes


def _own_name(layer: str, underscored: Mapping[str, str]) -> str:
    """Translates a layer's name in a LoRA to the UNet's."""
    if layer.startswith("lora_unet_"):
        return underscored.get(layer.removeprefix("lora_unet_"), layer)
    layer = layer.removeprefix("base_model.model.").removeprefix("unet.").replace(".processor.", ".")
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def _fitting(change: Change, weight: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """Returns a layer's factors `up` and `down`. Raises CheckpointError where they do not fit its weight."""
    up, down = change.factors["up"], change.factors["down"]
    rank = down.shape[0] if down.ndim else 0
    fits = min(up.ndim, down.ndim) >= 2 and rank > 0
    fits = fits and up.numel() == weight.shape[0] * rank and up.shape[:2] == (weight.shape[0], rank)
    fits = fits and down.numel() * weight.shape[0] == weight.numel() * rank and down.shape[1] == weight.shape[1]
    if not fits:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise CheckpointError(
            f"{source}: factors of shape {shapes} do not fit its weight {tuple(weight.shape)}; train it on this model"
        )
    return up, down


def _settings(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Reads what PEFT's settings of the UNet say; none where the file has none."""
    try:
        values = json.loads(metadata.get(METADATA, "{}"))
        return {name.removeprefix("unet."): value for name, value in values.items() if name.startswith("unet.")}
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: damaged, its {METADATA} is no JSON object; copy it again") from None


def _alpha(change: Change, settings: Mapping[str, Any], layer: str, rank: int, path: Path) -> float:
    """Finds a layer's alpha; in PEFT's rank-stabilised form it grows with the root of the rank (arXiv 2312.03732)."""
    if change.alpha is not None:
        return change.alpha
    patterns = settings.get("alpha_pattern") or {}
    try:
        if slow := [name for name in patterns if SLOW.search(name) or len(QUANTIFIER.findall(name)) > 3]:
            raise CheckpointError(
                f"{path}: alpha_pattern {slow[0]!r:.80}: a pattern that may be searched for without end; name layers"
            )
        given = [value for name, value in patterns.items() if re.search(rf"(^|\.){name}$", layer)]
        alpha = float(given[0] if given else settings.get("lora_alpha", rank))
        if not math.isfinite(alpha):
            raise ValueError
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError, OverflowError, re.error):
        raise CheckpointError(
            f"{path}: damaged, its {METADATA} has an alpha that is no number; copy it again"
        ) from None
    return alpha * math.sqrt(rank) if settings.get("use_rslora") and "lora_alpha" in settings else alpha


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
