"""Loads a backend by its name; knows all backends and is known by none of them."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from ldmseg_fast.backends.backend import Backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.checkpoints.shipped import resolve_engine_dir
from ldmseg_fast.errors import ArgumentError, BackendError

BACKENDS = ("torch", "compile", "onnxruntime", "tensorrt")


def load_backend(
    model_dir: str | Path,
    name: str = "torch",
    engine_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    attention: str = "auto",
    *,
    cuda_graph: bool | None = None,
    fused: bool | str = False,
    precision: str | None = None,
    lanes: int = 1,
    threads: int | None = None,
    profile: int | None = None,
    kernel_specialization: str | None = None,
    graph_strategy: str | None = None,
) -> Backend:
    """Loads the backend called `name` for a model folder.

    Args:
        model_dir, name: which model, and one of BACKENDS.
        engine_dir: exported graphs or engines, for the last two; ONNX graphs may be the Hub's.
        device, dtype: default the first GPU in bfloat16, or the CPU in float32; graphs have a dtype of their own.
        image_size: side in pixels of what the networks see; default the model's own. Graphs must have been exported
            for it, or for any size.
        attention: of the first two, see `models.attention.attention`; graphs have theirs from the export.
        cuda_graph: run the sampling loop as one CUDA graph. None: on a GPU, but not with onnxruntime. A loop that
            cannot be captured runs without, with a warning.
        fused: of "torch", run the UNet with few launches; see `models.fused_unet`, and for "epilogues" the still fewer
            of `models.epilogue_unet`. A network without such a form runs as it is, with a warning.
        precision: of the first two, in the place of `dtype`; see `backends.precision`.
        lanes: how many threads can be inside the last two at a time.
        threads: of onnxruntime on a CPU; default torch's.
        profile: of tensorrt: the place of the optimisation profile to run; default the narrowest that fits.
        kernel_specialization, graph_strategy: of engines of TensorRT-RTX, see `trt.trt_backend.load_trt_backend`.

    Raises:
        ArgumentError: an unknown `attention` or `precision`, a `dtype` that no network computes in, or both, or a
            `fused` or `cuda_graph` that is none of their values.
        BackendError: an unknown name, a device that is not there, a missing package, an `engine_dir` that is missing or
            not meant for it, a size that the model or its graphs do not take, an `attention` that cannot run on the
            device, cuda_graph=True without a GPU, or `fused` or `precision` for exported graphs.
        CheckpointError: a folder that is no model.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r}: one of {', '.join(BACKENDS)} expected")
    rtx = {"kernel_specialization": kernel_specialization, "graph_strategy": graph_strategy}
    for option, value in rtx.items():
        if value is not None and name != "tensorrt":
            raise BackendError(f"{option}={value}: backend={name} cannot use it; it is for tensorrt; leave it out")
    _check_used(name, lanes, threads, profile)
    if not isinstance(fused, bool) and fused != "epilogues":
        raise ArgumentError(f"fused={fused!r}: True, False or 'epilogues' expected")
    if not isinstance(cuda_graph, bool) and cuda_graph is not None:
        raise ArgumentError(f"cuda_graph={cuda_graph!r}: True or False expected")
    device = _checked_device(device, name)
    info = read_model_info(model_dir)
    if name in ("torch", "compile"):
        if engine_dir is not None:
            raise BackendError(f"engine_dir={engine_dir}: backend={name} runs MODEL_DIR itself; leave engine_dir out")
        from ldmseg_fast.backends.torch_backend import TorchBackend

        info = info if image_size is None else info.at_size(image_size)
        compiles = name == "compile"
        speed: dict[str, Any] = {"cuda_graph": cuda_graph, "fused": fused, "precision": precision}
        return TorchBackend(info, device, dtype, compiles, attention, **speed)
    if fused:
        raise BackendError(
            f"fused={fused}: of backend=torch only; backend={name} runs exported graphs; leave fused out"
        )
    if precision is not None:
        raise BackendError(f"precision={precision}: fixed when the graphs were exported; export again with --precision")
    if attention != "auto":
        raise BackendError(f"attention={attention}: fixed at export; backend={name} takes auto only")
    if engine_dir is None:
        script = "to_onnx.py" if name == "onnxruntime" else "to_trt.py"
        raise BackendError(
            f"backend={name} needs engine_dir; make it with `python export/{script} {model_dir} --out DIR`"
        )
    engine_dir = resolve_engine_dir(engine_dir, name)
    if dtype is not None:
        raise BackendError(f"dtype={dtype}: fixed when the graphs were exported; export again with --precision")
    if name == "onnxruntime":
        from ldmseg_fast.backends.onnx_backend import load_onnx_backend

        return load_onnx_backend(
            info, engine_dir, device, lanes, threads or 0, cuda_graph=cuda_graph, image_size=image_size
        )
    from ldmseg_fast.backends.trt.trt_backend import load_trt_backend

    return load_trt_backend(
        info, engine_dir, device, lanes, cuda_graph=cuda_graph, image_size=image_size, profile=profile, **rtx
    )


def _check_used(name: str, lanes: int, threads: int | None, profile: int | None) -> None:
    """Raises BackendError for an option that this backend would leave unused, or that is out of range."""
    given = {
        "lanes": (lanes != 1 and name not in ("onnxruntime", "tensorrt"), lanes, "onnxruntime and tensorrt"),
        "threads": (threads is not None and name != "onnxruntime", threads, "onnxruntime; torch has set_num_threads"),
        "profile": (profile is not None and name != "tensorrt", profile, "tensorrt"),
    }
    for option, (unused, value, meant) in given.items():
        if unused:
            raise BackendError(f"{option}={value}: backend={name} cannot use it; it is for {meant}; leave it out")
    for option, value, least in (("lanes", lanes, 1), ("threads", threads, 1), ("profile", profile, 0)):
        if value is not None and not (isinstance(value, Integral) and least <= value <= 4096):
            raise BackendError(f"{option}={value!r}: a whole number from {least} to 4096 expected")


def _checked_device(device: Any, name: str) -> torch.device | None:
    """Returns the device that a caller has named; graphs find out for themselves whether it is there."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        if name in ("torch", "compile"):
            torch.empty(1, device=found).cpu()  # "meta" has no numbers to give
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(f"device={device!r}: no such device here ({reason}); give cpu, cuda or cuda:N") from error
    return found
