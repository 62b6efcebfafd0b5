"""OpenVINO on a CPU, which reads our graphs as they are: a rival of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def openvino_step(graph: Path, inputs: Mapping[str, Tensor], threads: int) -> Callable[[], Tensor]:
    """Returns a function that runs a denoiser's graph once on fixed inputs, in float32 where it is not quantised.

    Its result is `model_output`, float32 [B, C, h, w].

    Raises:
        ImportError: OpenVINO is not installed.
        RuntimeError: a graph that it does not take.
    """
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(graph), "CPU", settings).create_infer_request()
    for name, value in inputs.items():
        request.set_tensor(name, openvino.Tensor(value.numpy()))

    def run() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_tensor("model_output").data)

    return run
