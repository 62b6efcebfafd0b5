"""Which precision a device computes in fast: the one question of training, inference and benchmarks."""

from __future__ import annotations

import functools
import platform
import time
import warnings

import torch
from torch import Tensor

from ldmseg_fast.config.settings import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names that settings use
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@functools.cache
def has_units(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a "cuda" device or the "cpu" computes in `dtype` itself, rather than by way of float32.

    oneDNN says that it supports bfloat16 on every x86 processor with AVX-512; without AVX512_BF16 it converts there and
    back, and float32 is faster. `ONEDNN_MAX_CPU_ISA=AVX2` makes a process answer as an older processor would.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device_type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operator = getattr(torch.ops.mkldnn, f"_is_mkldnn_{NAMES[dtype]}_supported", None)
    if operator is None or not operator():
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return dtype == torch.float16 or not x86 or torch.cpu._is_avx512_bf16_supported()


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a small network takes in `dtype` on this CPU.

    Forward and backward pass of a convolution and a product, the best of three; a tenth of a second where the processor
    emulates `dtype`. A whole training step also does what no dtype changes, so its factor is smaller.
    """

    @torch.inference_mode(False)
    @torch.enable_grad()
    def seconds(kind: torch.dtype) -> float:
        # ones, because random numbers would move the generator that the caller has seeded
        x = torch.ones(2, 64, 8, 8, dtype=kind, requires_grad=True)
        weight = torch.ones(64, 64, 3, 3, dtype=kind, requires_grad=True)

        def step() -> Tensor:
            hidden = torch.nn.functional.conv2d(x, weight, padding=1).flatten(2).transpose(1, 2)  # [2, 64, 64]
            return (hidden @ hidden.transpose(1, 2)).sum()

        times = []
        with torch.autocast("cpu", enabled=False):
            for _ in range(4):
                start = time.perf_counter()
                step().backward()
                times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(dtype) / seconds(torch.float32)


def emulation(device: torch.device, dtype: torch.dtype) -> str:
    """Says that `device` emulates `dtype`, and by how much that is slower than float32; "" where it does not."""
    if has_units(device.type, dtype):
        return ""
    if device.type != "cpu":
        return f"this GPU emulates {NAMES[dtype]}"
    return f"this CPU emulates {NAMES[dtype]}: a small network takes {slowdown(dtype):.2g} times as long as in fp32"


@functools.cache
def resolve_precision(requested: Precision, device: torch.device) -> tuple[Precision, str]:
    """The precision of a training run on `device`, and why.

    Args:
        requested: `train.precision`: "fp32", "bf16", "fp16", or "auto" for bf16 where the device has units for it and
            fp32 elsewhere.

    Returns:
        "fp32", "bf16" or "fp16", and the reason in words.
    """
    if requested == "auto":
        slow = emulation(device, torch.bfloat16)
        return ("fp32", slow) if slow else ("bf16", f"this {'CPU' if device.type == 'cpu' else 'GPU'} has bf16 units")
    slow = emulation(device, DTYPES[requested])
    return requested, f"train.precision={requested}" + (f", but {slow}; train.precision=fp32 is faster" if slow else "")


def warn_if_emulated(device: torch.device, dtype: torch.dtype) -> None:
    """Warns once a call that asks for a precision in which `device` is slower than in float32."""
    slow = emulation(device, dtype)
    if slow:
        warnings.warn(f"dtype={dtype}: {slow}; dtype=torch.float32 is faster here", stacklevel=5)
