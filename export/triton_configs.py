"""Describes the models of a Triton repository as config.pbtxt has them.

The fields are those of `model_config.proto`
(https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldmseg_fast.backends.graphs.graph_backend import MAX_HEAD_BYTES
from ldmseg_fast.backends.graphs.manifest import Manifest
from ldmseg_fast.backends.graphs.specs import GraphSpec, TensorSpec

TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
ENSEMBLE = "ldmseg"
PYTHON_MODELS = {"ldmseg_preprocess": "Preprocess", "ldmseg_sampler": "Sampler", "ldmseg_head": "Head"}
SIZE_FILE = "size"  # the one input of a warm-up that must not be zero


class Word(str):
    """Marks a value that is written without quotes: an enumeration's name."""


@dataclass(frozen=True)
class Serving:
    """Holds what the models of one repository have in common.

    Attributes:
        manifest: of the graphs.
        steps: of the sampling loop.
        batch: the largest batch.
        queue_delay: microseconds that a request waits for others.
        instances: of every model.
        on_gpu: whether graphs and engines run on GPUs.
        cuda_graphs: whether the server captures the engines as CUDA graphs.
        max_pixels: of a picture that is decoded.
        profiles: of engines, by name, the number of optimisation profiles; empty for ONNX graphs.
        head_side: the largest side of a map that the mask decoder's engine makes; 0: any.
        tensorrt: the version that the engines need, as "11.4.0.1"; empty: none.
        version_compatible: whether later versions of the same major load them too.
    """

    manifest: Manifest
    steps: int
    batch: int
    queue_delay: int
    instances: int
    on_gpu: bool
    cuda_graphs: bool
    max_pixels: int
    profiles: Mapping[str, int]
    head_side: int = 0
    tensorrt: str = ""
    version_compatible: bool = False

    @property
    def is_engine(self) -> bool:
        """Tells whether the graphs are TensorRT engines."""
        return bool(self.profiles)

    @property
    def batches(self) -> list[int]:
        """Lists the batches that are warmed up and captured: powers of two, and the largest."""
        return sorted({2**power for power in range(self.batch.bit_length())} | {self.batch})


def model_configs(serving: Serving) -> dict[str, dict[str, Any]]:
    """Returns config.pbtxt of every model as plain values, the ensemble first."""
    specs = {name: graph.spec for name, graph in serving.manifest.graphs.items()}
    latents = specs["mask_decoder"].tensors["latents"]
    images, image_latents = specs["image_encoder"].inputs[0], specs["image_encoder"].outputs[0]
    noise = TensorSpec("noise", "float32", latents.shape)
    size = TensorSpec("size", "int64", ("batch", 2))
    facts = json.dumps(_facts(serving, images, latents, specs["mask_decoder"]))

    def batched(name: str, inputs: Sequence[dict], outputs: Sequence[dict], **rest: Any) -> dict[str, Any]:
        config = {"name": name, **rest, "max_batch_size": serving.batch, "input": list(inputs)}
        config |= {"output": list(outputs)}
        return config | {"dynamic_batching": {"max_queue_delay_microseconds": serving.queue_delay}}

    def python(name: str, inputs: Sequence[dict], outputs: Sequence[dict]) -> dict[str, Any]:
        config = batched(name, inputs, outputs, backend="python")
        # without it the server copies every tensor to the CPU and back on its way through a Python model
        parameters = {"ldmseg": facts, "FORCE_CPU_ONLY_INPUT_TENSORS": "no"}
        entries = [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()]
        group = {"count": serving.instances, "kind": Word("KIND_CPU")}
        return config | {"instance_group": [group], "parameters": entries}

    picture = {"name": "image", "data_type": Word("TYPE_STRING"), "dims": [1]}
    seed = {"name": "seed", "data_type": Word("TYPE_INT64"), "dims": [1], "optional": True}
    result = [
        {"name": "segmentation", "data_type": Word("TYPE_INT32"), "dims": [-1, -1]},
        {"name": "segments_info", "data_type": Word("TYPE_STRING"), "dims": [1]},
    ]
    runtime = {"platform": "tensorrt_plan" if serving.is_engine else "onnxruntime_onnx"}
    mask_latents = TensorSpec("mask_latents", "float32", latents.shape)
    steps_of_ensemble = [
        _step("ldmseg_preprocess", ["image", "seed"], ["images", "noise", "size"]),
        _step("ldmseg_image_encoder", ["images"], ["image_latents"]),
        _step("ldmseg_sampler", ["noise", "image_latents"], ["mask_latents"]),
        _step("ldmseg_head", ["mask_latents", "size"], ["segmentation", "segments_info"]),
    ]
    ensemble = {"name": ENSEMBLE, "platform": "ensemble", "max_batch_size": serving.batch, "input": [picture, seed]}
    ensemble |= {"output": result, "ensemble_scheduling": {"step": steps_of_ensemble}}
    encoder = batched("ldmseg_image_encoder", [_tensor(images)], [_tensor(image_latents)], **runtime)
    return {
        ENSEMBLE: ensemble,
        "ldmseg_preprocess": python("ldmseg_preprocess", [picture, seed], [_tensor(t) for t in (images, noise, size)]),
        "ldmseg_image_encoder": encoder | _running(serving, specs["image_encoder"], whole=False),
        "ldmseg_sampler": python("ldmseg_sampler", [_tensor(noise), _tensor(image_latents)], [_tensor(mask_latents)]),
        "ldmseg_denoiser": _unbatched(serving, specs["denoiser"], runtime),
        "ldmseg_mask_decoder": _unbatched(serving, specs["mask_decoder"], runtime),
        "ldmseg_head": python("ldmseg_head", [_tensor(mask_latents), _tensor(size)], result),
    }


def _facts(serving: Serving, images: TensorSpec, latents: TensorSpec, decoder: GraphSpec) -> dict[str, Any]:
    """Collects what the Python models know of the model; see `triton_models`."""
    manifest = serving.manifest
    slots = int(decoder.tensors["sigmoid_area"].shape[1])
    return {
        "image_size": manifest.image_size,
        "picture_size": images.shape[-1],  # of what the image encoder sees
        "latent_shape": list(latents.shape[1:]),
        "steps": serving.steps,
        "scheduler": manifest.scheduler,
        "self_condition": manifest.model["self_condition"],
        "postprocess": manifest.model["postprocess"],
        "categories": manifest.model.get("categories"),
        "limits": {
            "max_pixels": serving.max_pixels,
            "head_pixels": MAX_HEAD_BYTES // (4 * slots),
            "head_side": serving.head_side,
            "logits": "mask_logits" in decoder.tensors,
        },
        "tensorrt": serving.tensorrt,
        "version_compatible": serving.version_compatible,
    }


def _unbatched(serving: Serving, spec: GraphSpec, runtime: Mapping[str, str]) -> dict[str, Any]:
    """Describes a graph that the Python models call with whole tensors: some of its inputs have no batch axis."""
    marks = ({"is_shape_tensor": True} if tensor.is_shape and serving.is_engine else {} for tensor in spec.inputs)
    inputs = [_tensor(tensor, whole=True) | mark for tensor, mark in zip(spec.inputs, marks)]
    outputs = [_tensor(t, whole=True) for t in spec.outputs]
    config = {"name": f"ldmseg_{spec.name}", **runtime, "max_batch_size": 0, "input": inputs, "output": outputs}
    return config | _running(serving, spec, whole=True)


def _running(serving: Serving, spec: GraphSpec, *, whole: bool) -> dict[str, Any]:
    """Says how the server runs a graph: where, by which profiles, captured or not, and what warms it up.

    Args:
        serving: of the repository.
        spec: of the graph.
        whole: whether requests have whole tensors, and the server knows of no batch.
    """
    group: dict[str, Any] = {"count": serving.instances, "kind": Word("KIND_GPU" if serving.on_gpu else "KIND_CPU")}
    if serving.is_engine:  # the server would run the first profile only
        group["profile"] = [str(index) for index in range(serving.profiles[spec.name])]
    config: dict[str, Any] = {"instance_group": [group]}
    is_decoder = spec.name == "mask_decoder"
    batches = [1] if is_decoder else serving.batches
    if serving.cuda_graphs and not is_decoder:  # the server captures no graph that has a shape tensor
        graphs = [_cuda_graph(spec, batch, whole) for batch in batches]
        config["optimization"] = {"cuda": {"graphs": True, "graph_spec": graphs}}
    # Python models that call others are not warmed up: nothing says that those are loaded by then
    return config | {"model_warmup": [_warmup(spec, batch, whole) for batch in batches]}


def _cuda_graph(spec: GraphSpec, batch: int, whole: bool) -> dict[str, Any]:
    shapes = {tensor.name: list(tensor.resolve({"batch": batch})) for tensor in spec.inputs}
    inputs = [{"key": name, "value": {"dim": shape if whole else shape[1:]}} for name, shape in shapes.items()]
    return {"batch_size": 0 if whole else batch, "input": inputs}


def _warmup(spec: GraphSpec, batch: int, whole: bool) -> dict[str, Any]:
    inputs = []
    for tensor in spec.inputs:
        shape = list(tensor.resolve({"batch": batch}))
        value: dict[str, Any] = {"data_type": Word(TYPES[tensor.dtype]), "dims": shape if whole else shape[1:]}
        value |= {"input_data_file": SIZE_FILE} if tensor.is_shape else {"zero_data": True}
        inputs.append({"key": tensor.name, "value": value})
    return {"name": f"batch of {batch}", "batch_size": 1 if whole else batch, "inputs": inputs}


def _tensor(tensor: TensorSpec, whole: bool = False) -> dict[str, Any]:
    dims = [axis if isinstance(axis, int) else -1 for axis in (tensor.shape if whole else tensor.shape[1:])]
    return {"name": tensor.name, "data_type": Word(TYPES[tensor.dtype]), "dims": dims}


def _step(model: str, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, Any]:
    maps = {"input_map": inputs, "output_map": outputs}
    return {"model_name": model, "model_version": -1} | {
        key: [{"key": name, "value": name} for name in names] for key, names in maps.items()
    }


def to_text(values: Mapping[str, Any], indent: str = "") -> str:
    """Formats values in protocol buffers' text format."""
    lines = []
    for key, value in values.items():
        for item in value if isinstance(value, list) and key not in ("dims", "dim") else [value]:
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
