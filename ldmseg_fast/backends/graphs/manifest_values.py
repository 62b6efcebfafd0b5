"""Checks the values of an `export.json` that somebody may have edited, before anything is computed with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmseg_fast.backends.graphs.specs import HEADS, GraphOptions, GraphSpec, TensorSpec
from ldmseg_fast.config import PostprocessConfig, SchedulerConfig, from_dict
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.errors import UserError

DTYPES = ("float32", "float16", "bfloat16", "uint8", "int32", "int64")
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
AXIS = re.compile(r"[a-z_]+(\*\d{1,9})?")
# the tensors that a graph has whatever was exported, by its kind, each with its number of axes
TENSORS = {
    "image_encoder": {"images": 4, "image_latents": 4},
    "denoiser": {
        "noisy_latents": 4, "image_latents": 4, "timesteps": 1, "coefficients": 1, "model_output": 4,
        "prev_latents": 4, "pred_original_sample": 4,
    },
    "sampler": {"noise": 4, "image_latents": 4, "timesteps": 1, "coefficients": 2, "mask_latents": 4},
    "mask_decoder": {"latents": 4},
}  # fmt: skip
OWN = {"size": 1, "mask_threshold": 1, "condition": 4, "context": 3, "label": 3, "confidence": 3, "sigmoid_area": 2}
OWN |= {"category": 2, "category_score": 2, "mask_logits": 4, "category_logits": 4}


def wrong_values(values: Mapping[str, Any], options: GraphOptions, specs: Mapping[str, GraphSpec]) -> list[str]:
    """Names the fields whose values no export has; a missing one, or a type that allows no comparison, raises.

    Args:
        values: the whole file, as JSON has it.
        options, specs: what was read of it.

    Raises:
        KeyError, TypeError, AttributeError: see above.
    """
    numbers = {
        "opset": (values["opset"], 1, 100),
        "image_size": (values["image_size"], 0, 2**16),
        "downsampling": (values["downsampling"], 1, 2**16),
        "size_multiple": (values["size_multiple"], 1, 2**20),
        "rules": (values["rules"], 1, 100),
        "options.batch": (options.batch, 0, 2**20),
        "options.image_size": (options.image_size, 0, 2**16),
        **{f"options.sampler_steps.{index}": (each, 1, 10**6) for index, each in enumerate(options.sampler_steps)},
    }
    wrong = [
        name for name, (value, least, most) in numbers.items() if type(value) is not int or not least <= value <= most
    ]
    names = ("model_hash", "command", "calibration", "lora")
    texts = {name: values[name] for name in names} | {"options.dtype": options.dtype}
    wrong += [name for name, value in texts.items() if not isinstance(value, str)]
    wrong += [] if values["precision"] in PRECISIONS else ["precision"]
    wrong += [] if options.head in HEADS else ["options.head"]
    wrong += [] if options.dtype in DTYPES[:3] else ["options.dtype"]
    wrong += [] if options.image_size == values["image_size"] else ["image_size and options.image_size"]
    versions = values["versions"]
    if not isinstance(versions, dict) or not all(isinstance(each, str) for each in versions.values()):
        wrong.append("versions")
    for name, spec in specs.items():
        graph = values["graphs"][name]
        files = [graph["file"]] if graph["weights"] is None else [graph["file"], graph["weights"]]
        if any(not isinstance(file, str) or not file or Path(file).name != file for file in files):
            wrong.append(f"{name}: a file in another folder")
        if not isinstance(graph["sha256"], str):
            wrong.append(f"{name}.sha256")
        wrong += _wrong_tensors(name, spec)
    return wrong + list(_wrong_model(values["model"], values["scheduler"]))


def _wrong_tensors(name: str, spec: GraphSpec) -> list[str]:
    kind = "sampler" if name.startswith("sampler_") else name
    if spec.name != name or spec.kind != kind or kind not in TENSORS:
        return [f"{name}.spec"]
    expected, there = TENSORS[kind], [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
    wrong = [f"{name}.{tensor}" for tensor in expected if tensor not in there]
    wrong += [] if len(set(there)) == len(there) else [f"{name}: a tensor that is there twice"]
    wrong += [] if spec.inputs and spec.outputs else [f"{name}.spec"]
    if ("size" in there) != ("mask_threshold" in there) or ("size" in there) != ("label" in there):
        wrong.append(f"{name}: the panoptic head's tensors")
    return wrong + [
        f"{name}.{tensor.name}" for tensor in (*spec.inputs, *spec.outputs) if not _fits(tensor, expected | OWN)
    ]


def _fits(tensor: TensorSpec, ranks: dict[str, int]) -> bool:
    sizes = [axis for axis in tensor.shape if type(axis) is int]
    axes = [axis for axis in tensor.shape if isinstance(axis, str)]
    return (
        len(sizes) + len(axes) == len(tensor.shape) == ranks.get(tensor.name)
        and all(0 < size <= 2**31 for size in sizes)
        and all(AXIS.fullmatch(axis) for axis in axes)
        and tensor.dtype in DTYPES
        and tensor.is_shape is (tensor.name == "size")
    )


def _wrong_model(model: Any, scheduler: Any) -> Iterator[str]:
    """Names what the server reads of the model's index and schedule and could not use."""
    if not isinstance(model, dict) or not isinstance(scheduler, dict):
        yield "model or scheduler"
        return
    if not model:  # of graphs that were exported by themselves
        return
    steps = model.get("num_inference_steps")
    if type(steps) is not int or not 1 <= steps <= 10**6:
        yield "model.num_inference_steps"
    if type(model.get("self_condition")) is not bool:
        yield "model.self_condition"
    listed = model.get("categories")
    parts = {
        "scheduler": lambda: from_dict(SchedulerConfig, scheduler, "scheduler."),
        "model.postprocess": lambda: from_dict(PostprocessConfig, model.get("postprocess", {}), "postprocess."),
        "model.categories": lambda: None if listed is None else CategoryTable.of_data_set(listed, ""),
    }
    for name, read in parts.items():
        try:
            read()
        except (UserError, ValueError, TypeError, KeyError, AttributeError):
            yield name
