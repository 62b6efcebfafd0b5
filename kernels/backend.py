"""Chooses which implementation a public function runs, and refuses arguments in one way."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# the folders of `kernels/`; a new kernel is entered here and nowhere else
KERNELS = (
    *("mask_bits", "attention", "panoptic_head", "group_norm_silu", "added_layer_norm", "geglu"),
    *("linear", "convolution", "ddim_step", "point_loss"),
)
BACKENDS = ("auto", "torch")
LEAST_CAPABILITY = (8, 0)  # of the GPUs that launch configurations are for
_backends = dict.fromkeys(KERNELS, "auto")


def set_backend(kernel: str, backend: str) -> None:
    """Chooses for the whole process: "auto" = Triton on CUDA and torch elsewhere, "torch" = the reference everywhere.

    Raises:
        ValueError: unknown kernel or backend.
    """
    require(kernel in KERNELS, "kernel: {!r} is not one of {}", kernel, ", ".join(KERNELS))
    require(backend in BACKENDS, "backend: {!r} is not one of {}", backend, ", ".join(BACKENDS))
    _backends[kernel] = backend


def turn_off_on_old_gpus(device: torch.device) -> None:
    """Runs `set_backend(kernel, "torch")` for all kernels, with a warning, where `device` is a GPU older than sm_80."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        for kernel in KERNELS:
            set_backend(kernel, "torch")
        text = "kernels: for GPUs of sm_{}{} and newer, this is sm_{}{}; PyTorch's own operations run instead"
        warnings.warn(text.format(*LEAST_CAPABILITY, *capability), stacklevel=4)


def get_backend(kernel: str) -> str:
    """Returns the choice of `set_backend`.

    Raises:
        KeyError: unknown kernel.
    """
    return _backends[kernel]


@contextmanager
def backend(kernel: str, name: str) -> Iterator[None]:
    """Runs `set_backend` for the length of a `with` block.

    Raises:
        ValueError: unknown kernel or backend.
    """
    before = get_backend(kernel)
    set_backend(kernel, name)
    try:
        yield
    finally:
        set_backend(kernel, before)


def runs_reference(kernel: str, tensor: Tensor) -> bool:
    """Says whether the public function composes torch ops itself for a tensor of any shape and dtype.

    On a CPU autograd and inductor do better with them than with an opaque op.
    """
    return exporting() or tensor.device.type != "cuda" or _backends[kernel] == "torch"


def exporting() -> bool:
    """Says whether a graph is being exported: it must hold torch's own ops, because no runtime knows ours."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def require(condition: bool, message: str, *values: object) -> None:
    """Refuses an argument unless `condition` holds; the message starts with the argument's name.

    The values are formatted only on failure: formatting a symbolic size would pin it under torch.compile.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(message.format(*(tuple(v) if isinstance(v, torch.Size) else v for v in values)))


def require_groups(num_groups: int, channels: int) -> None:
    """Raises ValueError where the channels do not make so many groups of one size."""
    require(
        num_groups > 0 and channels % num_groups == 0,
        "num_groups: {} does not divide {} channels",
        num_groups,
        channels,
    )


def require_same_device(first: Tensor, **others: Tensor | None) -> None:
    """Refuses tensors, of any shape and dtype, on another device than `first`; None is no tensor.

    Raises:
        ValueError: one lies elsewhere; the message starts with its name.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}: on {tensor.device}, the other tensors are on {first.device}")


def require_floats(**tensors: Tensor | None) -> None:
    """Refuses tensors, of any shape, that hold integers, bools or complex numbers; None is no tensor.

    Raises:
        ValueError: one does; the message starts with its name.
    """
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.is_floating_point(), "{}: expected a float tensor, got {}", name, tensor.dtype)


def require_no_gradient(**tensors: Tensor | None) -> None:
    """Refuses tensors, of any shape and dtype, by which a gradient is wanted, for operations that have none.

    Raises:
        ValueError: one wants it; the message starts with its name.
    """
    for name, tensor in tensors.items():
        require(
            tensor is None or not (torch.is_grad_enabled() and tensor.requires_grad),
            "{}: a gradient is wanted, and this is for inference; call it under torch.no_grad()",
            name,
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Converts float16 and bfloat16 of any shape to float32; float32 and float64 stay what they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def in_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Copies a tensor of any dtype, [B, C, H, W], into exactly the strides that `torch.empty` gives.

    Sizes of 1 leave several strides that would do, of which a fake tensor promises these.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format).copy_(
        tensor
    )
