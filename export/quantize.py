"""Quantises the denoiser after training through nvidia-modelopt: calibrated on real sampling, exported with Q/DQ.

The image encoder and the mask decoder stay in half: each runs once per image, the denoiser N times.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast.backends.graphs.manifest import GraphFile, hash_files
from ldmseg_fast.backends.graphs.specs import GraphSpec, sample_inputs
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.diffusion.sampler import ddim, image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export.graph_export import EMBEDDED_BYTES, check_graph, example_sizes, quiet
from ldmseg_fast.models.conditioning import with_context

OPSET = 20  # the newest that the tracing exporter writes; modelopt's nodes need that exporter
# first and last convolution and the time embedding: few FLOPs, and errors there reach every step; norms gain nothing
SENSITIVE = ("*conv_in*", "*conv_out*", "*time_embedding*", "*time_emb_proj*", "*norm*")
CALIBRATION_STEPS = 4
LARGEST = {"fp8": 448.0, "int8": 127.0}  # the values that the largest magnitudes become


def quantize_unet(info: ModelInfo, precision: str, pictures: Tensor) -> nn.Module:
    """Quantises the UNet: half precision, with quantisers around every other convolution and linear layer.

    Args:
        precision: "fp8" (E4M3) or "int8".
        pictures: uint8 [B, 3, S, S]; scales come from sampling their maps.

    Raises:
        BackendError: nvidia-modelopt is not installed.
    """
    mtq = _modelopt()
    backend = TorchBackend(info, "cpu", torch.float32)
    unet: Any = backend.unet
    unet.unfuse()  # modelopt knows linear layers, not bare products
    image_latents = backend.encode_image(pictures)
    noise = image_noise(0, list(range(len(pictures))), info.latent_shape)

    def calibrate(model: nn.Module) -> None:
        denoise = model if backend.conditioning is None else with_context(model, backend.conditioning, pictures)
        ddim(denoise, noise, image_latents, Scheduler(info.scheduler), CALIBRATION_STEPS, info.self_condition)

    config = mtq.FP8_DEFAULT_CFG if precision == "fp8" else mtq.INT8_DEFAULT_CFG
    with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        unet = mtq.quantize(unet, config, calibrate)
        for pattern in SENSITIVE:
            mtq.disable_quantizer(unet, pattern)
    for module in unet.modules():
        if hasattr(module, "trt_high_precision_dtype"):
            module.trt_high_precision_dtype = "Half"  # scales in the type of what they scale
    return unet.half()


@dataclass(frozen=True)
class LayerScales:
    """Holds the scales of one quantised layer, rounded to half as its graph holds them.

    Attributes:
        inputs: of what flows in.
        weight: float32, one for all, or [C, 1, ...], one per output channel.
    """

    inputs: float
    weight: Tensor


def scales_of(unet: nn.Module, precision: str) -> dict[str, LayerScales]:
    """Reads the scales of every quantised layer, by its name, from what `quantize_unet` returned."""
    largest = LARGEST[precision]
    return {
        name: LayerScales(
            _scale(layer.input_quantizer.amax, largest).item(), _scale(layer.weight_quantizer.amax, largest)
        )
        for name, layer in unet.named_modules()
        if hasattr(layer, "weight_quantizer") and layer.weight_quantizer.is_enabled
    }


def _scale(amax: Tensor, largest: float) -> Tensor:
    return (amax.float() / largest).half().float()


def fake_quantize(values: Tensor, scale: Tensor | float, precision: str) -> Tensor:
    """Rounds values, float32 of any shape, as ONNX's QuantizeLinear and DequantizeLinear do."""
    scaled = values / scale
    if precision == "int8":
        return scaled.round().clamp(-128, 127) * scale
    return scaled.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn).float() * scale


def _modelopt() -> Any:
    try:
        with warnings.catch_warnings():  # modelopt warns of every transformers release that it does not know
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise BackendError(
            f"--precision fp8 and int8 need nvidia-modelopt ({error}); pip install 'ldmseg_fast[quantize]'"
        ) from None
    return mtq


def export_quantized(
    spec: GraphSpec, module: nn.Module, info: ModelInfo, folder: Path, metadata: dict[str, str]
) -> GraphFile:
    """Exports a quantised module as `graph_export.export_graph` does, but through the tracing exporter."""
    import onnx

    inputs = sample_inputs(spec, info, example_sizes(spec, info))
    file = f"{spec.name}.onnx"
    axes = {
        tensor.name: {index: axis for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in (*spec.inputs, *spec.outputs)
    }
    there = set(folder.iterdir())
    with quiet("torch.onnx"), torch.no_grad():
        torch.onnx.export(
            module,
            (),
            str(folder / file),
            kwargs=inputs,
            dynamo=False,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_axes=axes,
        )
    model = onnx.load(str(folder / file))
    for stray in set(folder.iterdir()) - there - {folder / file}:  # over 2 GB the exporter writes a file per tensor
        stray.unlink()
    standard_float8(model, onnx)
    del model.graph.value_info[:]  # types from before
    for value, tensor in zip(model.graph.output, spec.outputs):  # the tracer loses sizes behind the quantisers
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape)))
    onnx.helper.set_model_props(model, metadata)
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EMBEDDED_BYTES
    weights = f"{file}.data" if external else None
    onnx.save(model, str(folder / file), save_as_external_data=external, location=weights)
    check_graph(folder / file, spec)
    return GraphFile(spec, file, weights, hash_files(folder, file, weights))


def standard_float8(model: Any, onnx: Any) -> None:
    """Replaces modelopt's own float8 nodes by ONNX's QuantizeLinear and DequantizeLinear, which every runtime reads."""
    zero = "float8_zero"
    used = False
    for node in model.graph.node:
        if node.domain != "trt":
            continue
        node.domain, used = "", True
        if node.op_type == "TRT_FP8QuantizeLinear":
            node.op_type = "QuantizeLinear"
            node.input.append(zero)
        else:
            node.op_type = "DequantizeLinear"
        del node.attribute[:]
    if used:
        empty = onnx.helper.make_tensor(zero, onnx.TensorProto.FLOAT8E4M3FN, [], [0.0])
        model.graph.initializer.append(empty)
    kept = [opset for opset in model.opset_import if opset.domain != "trt"]
    del model.opset_import[:]
    model.opset_import.extend(kept)
