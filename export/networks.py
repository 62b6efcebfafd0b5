"""Loads a model folder's networks in the type that they are exported in, one at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldmseg_fast.backends.graphs.specs import GraphOptions, GraphSpec
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.checkpoints.lora import fold_lora
from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config, save_component
from ldmseg_fast.checkpoints.tensors import (
    INT8_SCALE,
    WEIGHTS,
    at_most,
    check_finite,
    check_state,
    check_weights_file,
    expand_int8,
    plain_names,
)
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import inside, real_path
from ldmseg_fast.models.pyramids import fold_norms
from ldmseg_fast.models.unet import UNet


@contextmanager
def with_lora(info: ModelInfo, lora: Path | None, scale: float) -> Iterator[Path]:
    """Yields a copy of a model folder whose UNet has a LoRA folded in; the folder itself where `lora` is None.

    Raises:
        CheckpointError: a LoRA that is damaged or does not fit, see `checkpoints.lora.fold_lora`.
    """
    if lora is None:
        yield info.folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / real_path(info.folder).name
        for name in info.index["components"]:
            if name != "unet":
                shutil.copytree(inside(info.folder, info.folder / name), copy / name)
        for path in info.folder.glob("*.json"):
            shutil.copyfile(inside(info.folder, path), copy / path.name)
        state = fold_lora(load_component(info.folder, "unet").state_dict(), lora, scale)
        config, extra = load_component_config(info.folder, "unet")
        save_component(copy, "unet", config, state, extra)
        del state
        yield copy


def network_of(graph: str) -> str:
    """Returns the component whose weights a graph holds."""
    return {"image_encoder": "image_vae", "mask_decoder": "mask_vae"}.get(graph, "unet")


def load_networks(info: ModelInfo, spec: GraphSpec, options: GraphOptions) -> dict[str, Any]:
    """Loads what `backends.graphs.modules.build_graph` needs for a graph, by component. Raises as `load_network`."""
    needed = network_of(spec.name)
    dtype: torch.dtype = getattr(torch, options.decoder_dtype if needed == "mask_vae" else options.dtype)
    found = {needed: load_network(info, needed, dtype)}
    return found | load_queries(info, dtype) if needed == "unet" else found


def load_queries(info: ModelInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Loads the conditioning component where it is trained queries, which become part of the graph."""
    if info.conditioning != "learned":
        return {}
    return {"conditioning": load_component(info.folder, "conditioning").to(dtype)}


def load_network(info: ModelInfo, name: str, dtype: torch.dtype) -> Any:
    """Loads a component in `dtype`; a UNet with its q, k and v projections fused, for inference.

    Raises:
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    if name != "unet":
        network: Any = load_component(info.folder, name)
        if dtype != torch.float32:  # loading has looked at the values in that range
            check_finite(network.state_dict(), str(info.folder / name / WEIGHTS), dtype)
        return fold_norms(network).to(dtype)
    path = inside(info.folder, info.folder / "unet" / WEIGHTS)
    converted = expand_int8(plain_names(read_converted(path, dtype), str(path)), str(path))
    state = {name: value.to(dtype) for name, value in converted.items()}
    with torch.device("meta"), at_most(state, str(path)):
        unet = UNet(load_component_config(info.folder, "unet")[0])
    check_state(unet.state_dict(), state, str(path))
    unet.load_state_dict(state, assign=True)
    unet.eval().requires_grad_(False).fuse_qkv()
    return unet


def read_converted(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Reads a safetensors file and converts its floats, any shape, to `dtype`.

    It copies tensor by tensor, from a file that is mapped anew for each: a full-size model is never in memory twice,
    and not beside its file's pages. Integers and int8 scales stay.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    check_weights_file(path)
    try:
        state = {}
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
            keep = name.endswith(INT8_SCALE) or not tensor.is_floating_point()
            state[name] = tensor.to(tensor.dtype if keep else dtype, copy=True)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); copy or save it again") from None
    return state
