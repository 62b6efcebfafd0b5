"""Our pipeline in every form that runs on this machine, stage by stage, beside `PlainPipeline`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.plain_pipeline import HAS_DIFFUSERS, PlainPipeline
from ldmseg_fast.backends.backend import Backend
from ldmseg_fast.backends.graphs.batching import parts
from ldmseg_fast.backends.graphs.manifest import read_manifest
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.trt.passport import passport_file
from ldmseg_fast.config.precision import has_units
from ldmseg_fast.data.folders import read_image
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.attention import why_not_fp8
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.pipeline import LDMSegPipeline

Maker = Callable[[], Any]  # () -> OurPipeline or PlainPipeline


class OurPipeline:
    """The stages of `LDMSegPipeline`, one method each."""

    def __init__(self, backend: Backend) -> None:
        self.pipe = LDMSegPipeline(backend)
        self.info, self.device, self.dtype, self.backend = backend.info, backend.device, backend.dtype, backend

    def decode_file(self, path: Path) -> np.ndarray:
        return read_image(path)

    def preprocess(self, images: list[np.ndarray]) -> Tensor:
        """uint8 [H, W, 3] each -> uint8 [B, 3, S, S] on the device."""
        return self.pipe.sampler.resize(images)

    def encode(self, inputs: Tensor) -> Tensor:
        return self.backend.encode_image(inputs)

    def sample(self, noise: Tensor, image_latents: Tensor, steps: int) -> Tensor:
        """The last estimate of x_0, [B, C, h, w]."""
        return self.backend.sample(noise.to(self.device), image_latents, self.pipe.scheduler, steps)

    def finish(self, latents: Tensor, sizes: list[tuple[int, int]]) -> list[PanopticResult]:
        """Pictures of one size."""
        return self.backend.decode_mask(latents, sizes[0], "panoptic")  # type: ignore[return-value]

    def write(self, result: PanopticResult, path: Path) -> None:
        write_panoptic_png(path, result.segmentation)
        path.with_suffix(".json").write_text(json.dumps(result.segments_info), encoding="utf-8")

    def label(self, batch: int) -> str:
        """Says how graphs take a batch that they do not take as it is: a suffix of the pipeline's name, or nothing."""
        ranges = getattr(self.backend, "batches", {})
        ways = [parts(batch, ranges[graph]) for graph in ("image_encoder", "denoiser") if graph in ranges]
        calls = max(ways, key=lambda way: (len(way), way[-1][1]), default=[(batch, batch)])
        label = f", in parts of {'+'.join(str(rows) for rows, _ in calls)}" if len(calls) > 1 else ""
        rows, size = calls[-1]
        return label + (f", filled up from {rows} to {size}" if size != rows else "")

    def whole(self, images: list[np.ndarray], noise: Tensor, steps: int) -> list[PanopticResult]:
        return self.pipe(images, steps, latents=noise, batch_size=len(images))  # type: ignore[return-value]


def our_candidates(info: ModelInfo, device: str, scratch: Path, slow: bool = True) -> dict[str, Maker]:
    """Our backends that can run here, by name, each as `LDMSegPipeline.from_pretrained` makes it; bfloat16 only where
    the device does not emulate it.

    Args:
        info: of the model.
        device: "cpu" or "cuda".
        scratch: folder for exported graphs.
        slow: whether to include those whose first call takes a minute.
    """
    dtypes = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16)
    dtypes = tuple(dtype for dtype in dtypes if has_units(device, dtype))
    makers: dict[str, Maker] = {}

    def add(name: str, dtype: torch.dtype | None, backend: str = "torch", **options: Any) -> None:
        """Without `options` it is what users get."""
        makers[name] = lambda: OurPipeline(load_backend(info.folder, backend, device=device, dtype=dtype, **options))

    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        add(f"torch {name}", dtype, cuda_graph=False)
        if device == "cuda":
            add(f"torch {name}, graph", dtype)
            add(f"torch {name}, graph, fused", dtype, fused=True)
            add(f"torch {name}, graph, fused epilogues", dtype, fused="epilogues")
            if not why_not_fp8(torch.device(device), dtype):
                add(f"torch {name}, graph, fp8 attention", dtype, attention="fp8")
                if dtype == torch.bfloat16:
                    add(f"torch {name}, graph, fp8", None, precision="fp8")
        if slow:
            add(f"compile {name}", dtype, "compile")
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        makers["onnxruntime"] = lambda: OurPipeline(_onnx(info, device, scratch))
    return makers


def engine_candidates(info: ModelInfo, device: str, folders: Sequence[Path]) -> dict[str, Maker]:
    """Engines and exported graphs in folders, named by runtime and precision, and by their folder where two are alike.

    Args:
        info: of the model that they were made from.
        device: "cpu" or "cuda"; ONNX Runtime's, engines have their own.
        folders: of `to_trt.py` or `to_onnx.py`.

    Raises:
        BackendError: a folder that holds no export.
        ArgumentError: a folder that is named twice.
    """
    if twice := [str(folder) for folder in folders if folders.count(folder) > 1]:
        raise ArgumentError(f"--engine-dir {twice[0]}: named twice")
    makers: dict[str, Maker] = {}
    names = {}
    for folder in folders:
        precision = read_manifest(folder).precision
        backend = "tensorrt" if passport_file(folder, "denoiser").is_file() else "onnxruntime"
        names[folder] = (f"{backend} {precision}", backend)
    for folder, (name, backend) in names.items():
        alike = [each for each, _ in names.values()].count(name) > 1
        where = {} if backend == "tensorrt" else {"device": device}
        makers[f"{name} ({folder})" if alike else name] = partial(_engine, info, backend, folder, where)
    return makers


def _engine(info: ModelInfo, backend: str, folder: Path, where: dict[str, str]) -> OurPipeline:
    return OurPipeline(load_backend(info.folder, backend, folder, **where))  # type: ignore[arg-type]


def _onnx(info: ModelInfo, device: str, scratch: Path) -> Backend:
    from ldmseg_fast.backends.onnx_backend import load_onnx_backend
    from ldmseg_fast.export.model_export import ExportSettings, export_model

    folder = scratch / "graphs"
    if not folder.exists():
        # the head stays outside: on a CPU ours in C++ is faster than a graph with every slot at full size
        precision = "fp16" if device == "cuda" else "fp32"
        export_model(info.folder, folder, ExportSettings(precision=precision, head="logits", parity=False))
    return load_onnx_backend(info, folder, device)


def plain_candidates(info: ModelInfo, device: str, slow: bool = True) -> dict[str, Maker]:
    """The baseline's forms, the first one being what ratios are taken against."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "diffusers" if HAS_DIFFUSERS else "plain torch"
    makers: dict[str, Maker] = {name: lambda: PlainPipeline(info, device, dtype)}
    if device == "cuda" and HAS_DIFFUSERS and importlib.util.find_spec("xformers"):
        makers[f"{name}, xformers"] = lambda: PlainPipeline(info, device, dtype, "xformers")
    if slow:
        makers[f"{name}, compile"] = lambda: PlainPipeline(info, device, dtype, compiled=True)
    if (
        slow
        and device == "cuda"
        and importlib.util.find_spec("torchao")
        and not why_not_fp8(torch.device(device), dtype)
    ):
        makers[f"{name}, compile, float8"] = lambda: PlainPipeline(info, device, dtype, compiled=True, float8=True)
    return makers
