"""Exports a model folder as a folder of graphs with its manifest and parity report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldmseg_fast.backends.graphs.manifest import (
    FILE_NAME,
    GRAPHS,
    Manifest,
    check_files,
    describe_model,
    model_hash,
    read_manifest,
)
from ldmseg_fast.backends.graphs.modules import build_graph
from ldmseg_fast.backends.graphs.specs import GraphOptions, graph_specs, sampler_name
from ldmseg_fast.backends.model_info import ModelInfo, read_model_info
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.checkpoints.tensors import WEIGHTS, check_finite, load_weights
from ldmseg_fast.config import to_dict
from ldmseg_fast.config.limits import OPTION_RANGES
from ldmseg_fast.config.precision import DTYPES
from ldmseg_fast.errors import BackendError, UserError
from ldmseg_fast.export.calibration import LayerScales
from ldmseg_fast.export.cpu_graph import fuse_for_cpu, rewrite_for_cpu
from ldmseg_fast.export.graph_export import OPSETS, export_graph
from ldmseg_fast.export.memory import free_memory
from ldmseg_fast.export.networks import load_networks, network_of, with_lora
from ldmseg_fast.export.output_folder import ExportError, NewFolder, disk_full_named, new_folder
from ldmseg_fast.export.parity import (
    GENERATED,
    QUANTISED,
    calibrate_graphs,
    calibration_pictures,
    comparison_data,
    measure_parity,
    source_name,
)
from ldmseg_fast.export.parity_report import ParityReport
from ldmseg_fast.export.quantize import quantize_graph
from ldmseg_fast.files import inside, real_path, sha256, write_json

DEFAULT_OPSET, BF16_OPSET = 21, 22
MAX_SAMPLER_STEPS = 8  # every step of a whole sampler is a copy of the network's nodes
PARITY = "parity.json"
GRAPH_FILE = re.compile(rf"({'|'.join(GRAPHS)}|{sampler_name(0)[:-1]}\d+)\.onnx(\.data)?")
CALIBRATION_SPLIT = "train2017"
PACKAGES = ("ldmseg_fast", "torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportSettings:
    """Holds the settings as the command line of `to_onnx.py` has them.

    Attributes:
        runtime: what int8 is for: "onnxruntime", on a CPU beside float32, or "tensorrt", beside float16.
    """

    precision: str = "fp32"
    opset: int | None = None
    batch: str = "dynamic"
    size: str = "model"
    head: str = "panoptic"
    sampler_steps: str = ""
    parity: bool = True
    parity_images: int | None = None
    data: str | None = None
    split: str = "val2017"
    calibration: str | None = None
    runtime: str = "onnxruntime"
    lora: Path | None = None
    lora_scale: float | None = None
    command: str = ""


def export_model(
    model_dir: str | Path, out: Path, settings: ExportSettings, progress: Callable[[str], None] = lambda _: None
) -> ParityReport | None:
    """Writes `out`, complete or not at all. Of two processes that do so at a time one exports, the other one waits.

    Returns:
        The parity report, or None where it was not asked for. `out` is not written where the report is not ok.

    Raises:
        CheckpointError: a folder that is no model.
        BackendError: a folder that cannot be written, a full disk.
        ExportError, ValueError: settings or a model that cannot be exported, or one that changes meanwhile.
    """
    base = read_model_info(model_dir)
    options = resolve_options(base, settings)
    if settings.data is not None:
        with comparison_data(base, settings.data, settings.split, 1):
            pass  # a wrong folder is refused before minutes of work
    if settings.calibration is not None:
        calibration_pictures(base, _calibration(settings), settings.precision, 1)
    scale = 1.0 if settings.lora_scale is None else settings.lora_scale
    digest = model_hash(base.folder)
    with disk_full_named(out), with_lora(base, settings.lora, scale) as source:
        info = read_model_info(source)
        for name in info.index["components"]:
            weights = info.folder / name / WEIGHTS
            if weights.exists():  # the last graph's weights are read after minutes of work
                check_finite(load_weights(inside(info.folder, weights)), str(weights))
        info = info.at_size(options.image_size) if options.image_size else info
        with new_folder(out, exported_files, progress) as folder:
            if folder.waited and is_current(model_dir, out, settings):
                folder.keep = False
                return ParityReport.read(out / PARITY) if settings.parity else None
            write_graphs(info, folder.path, options, settings)
            free_memory()  # the exporter's programs hold each other, and the networks
            report = check_parity(info, folder, settings)
            if model_hash(base.folder) != digest:
                raise ExportError(f"{base.folder}: changed while it was exported; export it again")
            if settings.lora is not None:
                manifest = read_manifest(folder.path)
                replace(manifest, model_hash=digest, lora=_lora(settings)).write(folder.path)
            return report


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the options of a command line that belong together.

    Raises:
        ExportError: names the option that could change nothing.
    """
    if args.lora_scale is not None and args.lora is None:
        raise ExportError("--lora-scale without --lora: it scales nothing; add --lora FILE, or leave it out")
    if args.data is None and getattr(args, "split", None) is not None:
        raise ExportError("--split without --data: generated scenes have one split; add --data ROOT, or leave it out")
    if args.calibration is not None and args.precision not in QUANTISED:
        raise ExportError(
            f"--calibration beside --precision {args.precision or 'fp16'}: only {' and '.join(QUANTISED)} have scales; "
            f"leave it out"
        )
    if not args.no_parity:
        return
    if args.parity_images is not None:
        raise ExportError("--parity-images beside --no-parity: nothing is compared; leave one of them out")
    calibrated_on_it = args.precision in QUANTISED and args.calibration is None
    if args.data is not None and not calibrated_on_it:
        raise ExportError("--data beside --no-parity: nothing is compared; leave one of them out")


def check_parity(info: ModelInfo, folder: NewFolder, settings: ExportSettings) -> ParityReport | None:
    """Measures the report, writes it into the folder, and discards the folder where a tolerance is missed."""
    if not settings.parity:
        return None
    manifest = read_manifest(folder.path)
    report = measure_parity(info, folder.path, manifest, settings.data, settings.split, settings.parity_images)
    write_json(folder.path / PARITY, report.to_dict())
    folder.keep = report.ok
    return report


def resolve_options(info: ModelInfo, settings: ExportSettings) -> GraphOptions:
    """Turns settings into the options of graphs.

    Raises:
        ExportError: names the setting.
    """
    opset = resolve_opset(settings)
    if opset not in OPSETS:
        raise ExportError(f"--opset {opset}: {OPSETS[0]} to {OPSETS[-1]}; 21 is what every runtime here takes")
    if settings.precision == "bf16" and opset < BF16_OPSET:
        raise ExportError(f"--opset {opset}: ONNX has convolutions in bfloat16 from {BF16_OPSET} on")
    if settings.precision in QUANTISED and opset < DEFAULT_OPSET:
        raise ExportError(f"--opset {opset}: {settings.precision} needs {DEFAULT_OPSET}; leave it out")
    if settings.parity_images is not None and settings.parity_images < 1:
        raise ExportError(f"--parity-images {settings.parity_images}: at least 1; --no-parity compares nothing")
    multiple = info.size_multiple
    image_size = _whole("--size", settings.size, {"model": info.image_size, "dynamic": 0}, "size")
    if image_size % multiple:
        raise ExportError(
            f"--size {image_size}: this model needs a multiple of {multiple} pixels; pictures are resized to it"
        )
    parts = [part.strip() for part in settings.sampler_steps.split(",")] if settings.sampler_steps else []
    if parts and not any(parts):
        raise ExportError(f"--sampler-steps {settings.sampler_steps!r}: names no number; 1,2,4 for example")
    steps = tuple(_whole("--sampler-steps", part, {}, "steps") for part in parts)
    if len(set(steps)) < len(steps):
        raise ExportError(f"--sampler-steps {settings.sampler_steps}: a number is there twice; leave one of them out")
    if max(steps, default=0) > MAX_SAMPLER_STEPS:
        raise ExportError(
            f"--sampler-steps {max(steps)}: whole samplers are for {MAX_SAMPLER_STEPS} steps at most, each one repeats "
            f"the network; for more, the denoiser's graph runs in a loop"
        )
    if steps and info.context_shape:
        raise ExportError(
            f"--sampler-steps: unet.conditioning={info.conditioning} is sampled step by step; leave the option out"
        )
    return GraphOptions(
        dtype=_dtype(settings),
        batch=_whole("--batch", settings.batch, {"dynamic": 0}, "batch_size"),
        image_size=image_size,
        head=settings.head,
        sampler_steps=steps,
    )


def _dtype(settings: ExportSettings) -> str:
    """Returns the type of a graph's floats; of a quantised one, of those that stay floats."""
    if settings.precision not in QUANTISED:
        return str(DTYPES[settings.precision]).removeprefix("torch.")
    return "float32" if (settings.precision, settings.runtime) == ("int8", "onnxruntime") else "float16"


def resolve_opset(settings: ExportSettings) -> int:
    """Returns the opset that was asked for, or the precision's own."""
    if settings.opset is not None:
        return settings.opset
    return BF16_OPSET if settings.precision == "bf16" else DEFAULT_OPSET


def exported_files(folder: Path) -> set[str]:
    """Lists the names in a folder that an export wrote; none where it holds no export."""
    if not (folder / FILE_NAME).is_file():
        return set()
    return {FILE_NAME, PARITY, *(path.name for path in folder.iterdir() if GRAPH_FILE.fullmatch(path.name))}


def is_current(model_dir: str | Path, folder: Path, settings: ExportSettings) -> bool:
    """Tells whether `folder` holds, undamaged, what `export_model` would write there now."""
    info = read_model_info(model_dir)
    options = resolve_options(info, settings)
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, tuple(manifest.graphs))
    except BackendError:
        return False
    wanted = (options, settings.precision, resolve_opset(settings), _calibration(settings), versions())
    there = (manifest.options, manifest.precision, manifest.opset, manifest.calibration, manifest.versions)
    if manifest.is_outdated or manifest.lora != _lora(settings):
        return False
    compared = not settings.parity or _is_compared(folder, settings)
    return there == wanted and compared and manifest.model_hash == model_hash(info.folder)


def _is_compared(folder: Path, settings: ExportSettings) -> bool:
    """Tells whether the folder has a parity report of the pictures that were asked for."""
    try:
        report = ParityReport.read(folder / PARITY)
    except (OSError, UserError, ValueError, KeyError, TypeError, RecursionError):
        return False
    source = settings.data is None or report.source == source_name(settings.data, settings.split)
    return source and settings.parity_images in (None, report.images)


def _calibration(settings: ExportSettings) -> str:
    if settings.precision not in QUANTISED:
        return ""
    if settings.calibration is not None:
        return f"{real_path(settings.calibration)}/{CALIBRATION_SPLIT}"
    return GENERATED if settings.data is None else f"{real_path(settings.data)}/{settings.split}"


def _lora(settings: ExportSettings) -> str:
    if settings.lora is None:
        return ""
    scale = 1.0 if settings.lora_scale is None else settings.lora_scale
    return f"{settings.lora.name} {sha256(settings.lora)[:16]} x {scale:g}"


def versions() -> dict[str, str]:
    """Returns the versions of the packages that make an export."""
    return {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}


def _whole(name: str, text: str, words: dict[str, int], limit: str) -> int:
    """Reads one of `words`, or a number within the row `limit` of OPTION_RANGES."""
    if text in words:
        return words[text]
    allowed = OPTION_RANGES[limit]
    number = int(text) if text.isascii() and text.strip().isdigit() and len(text) < 20 else 0
    if not allowed.admits(number):
        raise ExportError(f"{name} {text}: a number {allowed} expected" + "".join(f", or {word}" for word in words))
    return number


def write_graphs(info: ModelInfo, folder: Path, options: GraphOptions, settings: ExportSettings) -> Manifest:
    """Writes every graph and `export.json`. One network is in memory at a time."""
    digest, packages = model_hash(info.folder), versions()
    opset = resolve_opset(settings)
    configs = {name: to_dict(load_component_config(info.folder, name)[0]) for name in info.index["components"]}
    metadata = {"model_hash": digest, "precision": settings.precision, "config": json.dumps(configs)} | packages
    scales: dict[str, LayerScales] = {}
    if settings.precision in QUANTISED:
        pictures = calibration_pictures(info, _calibration(settings), settings.precision)
        scales = calibrate_graphs(info, settings.precision, options, opset, pictures)
    files, loaded = {}, {}
    for name, spec in graph_specs(info, options).items():
        needed = network_of(name)
        if needed not in loaded:
            loaded.clear()
            loaded = load_networks(info, spec, options)
        module = build_graph(spec, info, loaded, options.head)
        edits = []
        if scales and needed == "unet":
            quantise = _quantiser(module, loaded["unet"], scales, settings.precision)
            edits = [rewrite_for_cpu, quantise, fuse_for_cpu] if options.dtype == "float32" else [quantise]
        files[name] = export_graph(spec, module, info, folder, opset, metadata | {"opset": str(opset)}, edits)
    manifest = Manifest(
        model_hash=digest,
        precision=settings.precision,
        opset=opset,
        image_size=options.image_size,
        downsampling=info.mask_vae.downsampling,
        size_multiple=info.size_multiple,
        options=options,
        graphs=files,
        versions=packages,
        command=settings.command,
        calibration=_calibration(settings),
        model=dict(describe_model(info)),
        scheduler=to_dict(info.scheduler),
    )
    manifest.write(folder)
    return manifest


def _quantiser(module: Any, unet: Any, scales: dict[str, LayerScales], precision: str) -> Callable[[Any], None]:
    return lambda model: quantize_graph(model, module, unet, scales, precision)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
