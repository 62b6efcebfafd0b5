"""Writes the files of a Triton model repository: an ensemble of pre-processing, encoder, sampler and head.

The encoder, the denoiser and the mask decoder are the engines themselves. Pre-processing, the loop over the denoiser
and the head's last part are Python models (`triton_models`), so the server's Python needs ldmseg_fast.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmseg_fast.backends.graphs.manifest import GRAPHS, Manifest, check_files, read_manifest
from ldmseg_fast.backends.graphs.specs import GraphSpec, TensorSpec
from ldmseg_fast.backends.trt.passport import engine_file, passport_file, read_passport
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export.output_folder import new_folder

TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
PYTHON_MODELS = {"ldmseg_preprocess": "Preprocess", "ldmseg_sampler": "Sampler", "ldmseg_head": "Head"}


class Word(str):
    """Marks a value that is written without quotes: an enumeration's name."""


@dataclass(frozen=True)
class RepositorySettings:
    """Holds the settings as the command line of `to_triton.py` has them."""

    steps: int | None = None
    max_batch: int = 8
    queue_delay: int = 2000
    instances: int = 1
    device: str = "gpu"


def write_repository(source: Path, out: Path, settings: RepositorySettings) -> list[str]:
    """Writes the repository, complete or not at all; large files are linked where the disk allows it.

    Returns:
        The models' names, the ensemble first.

    Raises:
        BackendError: a folder that holds no graphs, graphs without a head, or settings that do not fit.
    """
    manifest = read_manifest(source)
    if manifest.options.head == "logits":
        raise BackendError(f"{source}: exported with --head logits; the server needs --head panoptic or both")
    if "context" in manifest.graphs["denoiser"].spec.tensors:
        raise BackendError(f"{source}: the server's sampler has no CLIP encoder; serve a model without one")
    if manifest.image_size == 0 or manifest.options.batch:
        raise BackendError(
            f"{source}: the server needs graphs of a fixed picture size and a dynamic batch; export again"
        )
    if settings.max_batch < 1 or settings.instances < 1 or settings.queue_delay < 0:
        raise BackendError("--max-batch and --instances: from 1 on; --queue-delay: from 0 on")
    steps = settings.steps or int(manifest.model["num_inference_steps"])
    is_engine = passport_file(source, "denoiser").is_file()
    if is_engine:
        _check_engines(source, manifest)
    else:
        check_files(source, manifest)
    batch = _max_batch(source, manifest, settings, is_engine)
    configs = model_configs(manifest, settings, steps, batch, is_engine)
    with new_folder(out, lambda _: configs) as folder:
        for name, config in configs.items():
            version = folder.path / name / "1"
            version.mkdir(parents=True)
            (folder.path / name / "config.pbtxt").write_text(to_text(config), encoding="utf-8")
            graph = name.removeprefix("ldmseg_")
            if name in PYTHON_MODELS:
                kind = PYTHON_MODELS[name]
                line = f"from ldmseg_fast.export.triton_models import {kind} as TritonPythonModel  # noqa: F401\n"
                (version / "model.py").write_text(line, encoding="utf-8")
            elif graph in manifest.graphs:
                _place(source, manifest, graph, version, is_engine)
            else:
                (version / ".keep").touch()  # an ensemble has no files, but its version must exist
    return list(configs)


def _check_engines(source: Path, manifest: Manifest) -> None:
    for graph in GRAPHS:
        passport = read_passport(source, graph)
        if passport.flavour != "tensorrt" or passport.stripped:
            kind = "TensorRT-RTX" if passport.flavour == "rtx" else "without weights"
            raise BackendError(f"{engine_file(source, graph)}: {kind}; the server takes whole TensorRT engines")


def _max_batch(source: Path, manifest: Manifest, settings: RepositorySettings, is_engine: bool) -> int:
    if not is_engine:
        return settings.max_batch
    profiles = {graph: read_passport(source, graph).profiles for graph in ("image_encoder", "denoiser")}
    for graph, each in profiles.items():
        if any("batch" not in profile for profile in each):
            raise BackendError(f"{passport_file(source, graph)}: a profile without its batch; build the engine again")
    return min(max(profile["batch"][2] for profile in each) for each in profiles.values())


def _place(source: Path, manifest: Manifest, graph: str, version: Path, is_engine: bool) -> None:
    if is_engine:
        _link(engine_file(source, graph), version / "model.plan")
        return
    files = manifest.graphs[graph]
    _link(source / files.file, version / "model.onnx")
    if files.weights:
        _link(source / files.weights, version / files.weights)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def model_configs(
    manifest: Manifest, settings: RepositorySettings, steps: int, batch: int, is_engine: bool
) -> dict[str, dict[str, Any]]:
    """Returns config.pbtxt of every model as plain values."""
    specs = {name: graph.spec for name, graph in manifest.graphs.items()}
    latents = specs["mask_decoder"].tensors["latents"]
    images, image_latents = specs["image_encoder"].inputs[0], specs["image_encoder"].outputs[0]
    noise = TensorSpec("noise", "float32", latents.shape)
    size = TensorSpec("size", "int64", ("batch", 2))
    post = manifest.model["postprocess"]
    facts = {
        "image_size": manifest.image_size,
        "picture_size": images.shape[-1],  # of what the image encoder sees
        "latent_shape": list(latents.shape[1:]),
        "steps": steps,
        "scheduler": manifest.scheduler,
        "self_condition": manifest.model["self_condition"],
        "postprocess": post,
        "categories": manifest.model.get("categories"),
    }

    def batched(name: str, inputs: Sequence[dict], outputs: Sequence[dict], **rest: Any) -> dict[str, Any]:
        config = {"name": name, **rest, "max_batch_size": batch, "input": list(inputs), "output": list(outputs)}
        delay = {"max_queue_delay_microseconds": settings.queue_delay}
        return config | {"dynamic_batching": delay, "instance_group": [_instances(settings, rest.get("backend"))]}

    def python(name: str, inputs: Sequence[dict], outputs: Sequence[dict]) -> dict[str, Any]:
        config = batched(name, inputs, outputs, backend="python")
        return config | {"parameters": [{"key": "ldmseg", "value": {"string_value": json.dumps(facts)}}]}

    picture = {"name": "image", "data_type": Word("TYPE_STRING"), "dims": [1]}
    seed = {"name": "seed", "data_type": Word("TYPE_INT64"), "dims": [1], "optional": True}
    result = [
        {"name": "segmentation", "data_type": Word("TYPE_INT32"), "dims": [-1, -1]},
        {"name": "segments_info", "data_type": Word("TYPE_STRING"), "dims": [1]},
    ]
    runtime = {"platform": "tensorrt_plan" if is_engine else "onnxruntime_onnx"}
    mask_latents = TensorSpec("mask_latents", "float32", latents.shape)
    steps_of_ensemble = [
        _step("ldmseg_preprocess", ["image", "seed"], ["images", "noise", "size"]),
        _step("ldmseg_image_encoder", ["images"], ["image_latents"]),
        _step("ldmseg_sampler", ["noise", "image_latents"], ["mask_latents"]),
        _step("ldmseg_head", ["mask_latents", "size"], ["segmentation", "segments_info"]),
    ]
    ensemble = {"name": "ldmseg", "platform": "ensemble", "max_batch_size": batch, "input": [picture, seed]}
    ensemble |= {"output": result, "ensemble_scheduling": {"step": steps_of_ensemble}}
    encoder = batched("ldmseg_image_encoder", [_tensor(images)], [_tensor(image_latents)], **runtime)
    return {
        "ldmseg": ensemble,
        "ldmseg_preprocess": python("ldmseg_preprocess", [picture, seed], [_tensor(t) for t in (images, noise, size)]),
        "ldmseg_image_encoder": encoder,
        "ldmseg_sampler": python("ldmseg_sampler", [_tensor(noise), _tensor(image_latents)], [_tensor(mask_latents)]),
        "ldmseg_denoiser": _unbatched("ldmseg_denoiser", specs["denoiser"], settings, runtime),
        "ldmseg_mask_decoder": _unbatched("ldmseg_mask_decoder", specs["mask_decoder"], settings, runtime),
        "ldmseg_head": python("ldmseg_head", [_tensor(mask_latents), _tensor(size)], result),
    }


def _unbatched(name: str, spec: GraphSpec, settings: RepositorySettings, runtime: Mapping[str, str]) -> dict[str, Any]:
    """Describes a graph that the Python models call with whole tensors: some of its inputs have no batch axis."""
    inputs = [_tensor(t, whole=True) | _shape_mark(t, runtime) for t in spec.inputs]
    outputs = [_tensor(t, whole=True) for t in spec.outputs]
    config = {"name": name, **runtime, "max_batch_size": 0, "input": inputs, "output": outputs}
    return config | {"instance_group": [_instances(settings, None)]}


def _shape_mark(tensor: TensorSpec, runtime: Mapping[str, str]) -> dict[str, bool]:
    return {"is_shape_tensor": True} if tensor.is_shape and runtime["platform"] == "tensorrt_plan" else {}


def _tensor(tensor: TensorSpec, whole: bool = False) -> dict[str, Any]:
    dims = [axis if isinstance(axis, int) else -1 for axis in (tensor.shape if whole else tensor.shape[1:])]
    return {"name": tensor.name, "data_type": Word(TYPES[tensor.dtype]), "dims": dims}


def _step(model: str, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, Any]:
    maps = {"input_map": inputs, "output_map": outputs}
    return {"model_name": model, "model_version": -1} | {
        key: [{"key": name, "value": name} for name in names] for key, names in maps.items()
    }


def _instances(settings: RepositorySettings, backend: str | None) -> dict[str, Any]:
    on_gpu = settings.device == "gpu" and backend != "python"
    return {"count": settings.instances, "kind": Word("KIND_GPU" if on_gpu else "KIND_CPU")}


def to_text(values: Mapping[str, Any], indent: str = "") -> str:
    """Formats values in protocol buffers' text format."""
    lines = []
    for key, value in values.items():
        for item in value if isinstance(value, list) and key != "dims" else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{key} {{\n{to_text(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_literal(item)}\n")
    return "".join(lines)


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Word):
        return json.dumps(value)
    return str(value)
