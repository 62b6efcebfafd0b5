"""A model folder -> a folder of graphs with its manifest and parity report."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.base import BackendError, ModelInfo, read_model_info
from ldmseg_fast.backends.graphs import build_graph
from ldmseg_fast.backends.manifest import (
    FILE_NAME,
    PRECISION_DTYPES,
    Manifest,
    describe_model,
    model_hash,
    read_manifest,
    with_image_size,
)
from ldmseg_fast.backends.specs import DTYPES, GraphOptions, graph_specs, size_multiple
from ldmseg_fast.checkpoint import (
    DTYPE_NAMES,
    WEIGHTS,
    CheckpointError,
    check_state,
    inside,
    load_component,
    load_component_config,
    write_json,
)
from ldmseg_fast.config import to_dict
from ldmseg_fast.data.coco_panoptic import collate
from ldmseg_fast.export.graph_export import OPSETS, ExportError, export_graph
from ldmseg_fast.export.parity import ParityReport, comparison_data, measure_parity
from ldmseg_fast.export.quantize import export_quantized, quantize_unet
from ldmseg_fast.models.unet import UNet

QUANTISED = ("fp8", "int8")
CALIBRATION_IMAGES = 16
DEFAULT_OPSET, BF16_OPSET = 21, 22
PACKAGES = ("ldmseg_fast", "torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportSettings:
    """As the command line of `to_onnx.py` has them."""

    precision: str = "fp32"
    opset: int | None = None
    batch: str = "dynamic"
    size: str = "model"
    head: str = "panoptic"
    sampler_steps: str = ""
    parity: bool = True
    parity_images: int = 8
    data: str | None = None
    split: str = "val2017"
    command: str = ""


def export_model(model_dir: str | Path, out: Path, settings: ExportSettings) -> ParityReport | None:
    """Write `out`, complete or not at all.

    Returns:
        The parity report, or None where it was not asked for. `out` is not written where the report is not ok.

    Raises:
        CheckpointError: a folder that is no model.
        ExportError, ValueError: settings or a model that cannot be exported.
    """
    info = read_model_info(model_dir)
    options = resolve_options(info, settings)
    info = with_image_size(info, options.image_size)
    if settings.data is not None:
        with comparison_data(info, settings.data, settings.split, 1):
            pass  # a wrong folder is refused before minutes of work
    with new_folder(out) as folder:
        write_graphs(info, folder.path, options, settings)
        return check_parity(info, folder, settings)


def check_parity(info: ModelInfo, folder: NewFolder, settings: ExportSettings) -> ParityReport | None:
    """The report, also written into the folder, which is discarded where a tolerance is missed."""
    if not settings.parity:
        return None
    manifest = read_manifest(folder.path)
    report = measure_parity(info, folder.path, manifest, settings.data, settings.split, settings.parity_images)
    write_json(folder.path / "parity.json", report.to_dict())
    folder.keep = report.ok
    return report


def resolve_options(info: ModelInfo, settings: ExportSettings) -> GraphOptions:
    """Raises ExportError or ValueError naming the setting."""
    if info.conditioning != "none":
        raise ExportError(
            f"{info.folder}: unet.conditioning={info.conditioning}; the graphs take no context, use backend=torch"
        )
    opset = resolve_opset(settings)
    if opset not in OPSETS:
        raise ExportError(f"--opset {opset}: {OPSETS[0]} to {OPSETS[-1]}; 21 is what every runtime here takes")
    if settings.precision == "bf16" and opset < BF16_OPSET:
        raise ExportError(f"--opset {opset}: ONNX has convolutions in bfloat16 from {BF16_OPSET} on")
    multiple = size_multiple(info)
    image_size = _whole("--size", settings.size, {"model": info.image_size, "dynamic": 0})
    if image_size % multiple:
        raise ExportError(
            f"--size {image_size}: this model needs a multiple of {multiple} pixels; pictures are resized to it"
        )
    steps = tuple(_whole("--sampler-steps", part, {}) for part in settings.sampler_steps.split(",") if part.strip())
    return GraphOptions(
        dtype=PRECISION_DTYPES[settings.precision],
        batch=_whole("--batch", settings.batch, {"dynamic": 0}),
        image_size=image_size,
        head=settings.head,
        sampler_steps=steps,
    )


def resolve_opset(settings: ExportSettings) -> int:
    return settings.opset or (BF16_OPSET if settings.precision == "bf16" else DEFAULT_OPSET)


def _whole(name: str, text: str, words: dict[str, int]) -> int:
    if text in words:
        return words[text]
    if not text.strip().isdigit() or int(text) < 1:
        raise ExportError(f"{name} {text}: a number from 1 on expected" + "".join(f", or {word}" for word in words))
    return int(text)


def write_graphs(
    info: ModelInfo,
    folder: Path,
    options: GraphOptions,
    settings: ExportSettings,
    networks: dict[str, Any] | None = None,
) -> Manifest:
    """Every graph and `export.json`. One network is in memory at a time, unless `networks` hands them in."""
    if settings.precision in QUANTISED and networks is None:
        pictures = calibration_pictures(info, settings)
        networks = {"unet": quantize_unet(info, settings.precision, pictures)}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    digest = model_hash(info.folder)
    configs = {name: to_dict(load_component_config(info.folder, name)[0]) for name in info.index["components"]}
    metadata = {"model_hash": digest, "precision": settings.precision, "config": json.dumps(configs)}
    metadata |= {"opset": str(resolve_opset(settings))} | versions
    files, loaded = {}, dict(networks or {})
    for name, spec in graph_specs(info, options).items():
        needed = {"image_encoder": "image_vae", "mask_decoder": "mask_vae"}.get(name, "unet")
        if needed not in loaded and needed in (networks or {}):
            loaded = dict(networks or {})
        elif needed not in loaded:
            dtype = options.decoder_dtype if needed == "mask_vae" else options.dtype
            loaded = {needed: load_network(info, needed, DTYPES[dtype])}
        module = build_graph(spec, info, loaded, options.head)
        if needed == "unet" and settings.precision in QUANTISED:
            files[name] = export_quantized(spec, module, info, folder, metadata)
        else:
            files[name] = export_graph(spec, module, info, folder, resolve_opset(settings), metadata)
    manifest = Manifest(
        model_hash=digest,
        precision=settings.precision,
        opset=resolve_opset(settings),
        image_size=options.image_size,
        downsampling=info.mask_vae.downsampling,
        size_multiple=size_multiple(info),
        options=options,
        graphs=files,
        versions=versions,
        command=settings.command,
        model=dict(describe_model(info)),
        scheduler=to_dict(info.scheduler),
    )
    manifest.write(folder)
    return manifest


def calibration_pictures(info: ModelInfo, settings: ExportSettings) -> Tensor:
    """uint8 [B, 3, S, S] of the data set's split, or of generated scenes."""
    with comparison_data(info, settings.data, settings.split, CALIBRATION_IMAGES) as dataset:
        return collate([dataset[index] for index in range(len(dataset))])["image"]


def load_network(info: ModelInfo, name: str, dtype: torch.dtype) -> Any:
    if name != "unet":
        network: Any = load_component(info.folder, name)
        return network.to(dtype)
    with torch.device("meta"):
        unet = UNet(load_component_config(info.folder, "unet")[0])
    path = inside(info.folder, info.folder / "unet" / WEIGHTS)
    state = read_converted(path, dtype)
    check_state(unet.state_dict(), state, str(path))
    unet.load_state_dict(state, assign=True)
    unet.eval().requires_grad_(False).fuse_qkv()
    return unet


def read_converted(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A safetensors file in `dtype`, converted tensor by tensor: a full-size model is never in memory twice.

    Raises:
        CheckpointError: a damaged file.
    """
    kinds = {name: kind for kind, name in DTYPE_NAMES.items()}
    state = {}
    try:
        with path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little") + 8
            header = json.loads(file.read(start - 8))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                first, end = entry["data_offsets"]
                file.seek(start + first)
                content = bytearray(file.read(end - first))
                tensor = torch.frombuffer(content, dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
                state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    except (ValueError, KeyError, RuntimeError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); copy or save it again") from None
    return state


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass
class NewFolder:
    """A folder in the making; `keep` False drops it."""

    path: Path
    keep: bool = True


@contextmanager
def new_folder(out: Path, marker: str = FILE_NAME) -> Iterator[NewFolder]:
    """A folder beside `out` that takes its place once the block is through. An older export there is replaced.

    Raises:
        BackendError: `out` holds something else, or the disk is full.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / marker).is_file())):
        raise ExportError(f"{out}: holds something that is no export; choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = NewFolder(Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent)))
    unfinished.path.chmod(0o755)  # mkdtemp makes it private
    try:
        with disk_full_named(out):
            yield unfinished
        if unfinished.keep:
            shutil.rmtree(out, ignore_errors=True)
            unfinished.path.rename(out)
    finally:
        shutil.rmtree(unfinished.path, ignore_errors=True)


@contextmanager
def disk_full_named(out: Path) -> Iterator[None]:
    """ENOSPC as one clear BackendError."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise BackendError(f"{out}: the disk is full; free some space and try again, nothing was written") from None
