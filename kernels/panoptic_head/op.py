"""Runs Triton on CUDA, C++ on the CPU where it is built, and the reference elsewhere.

The method is that of arXiv 2401.10227, section 3.3.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ldmseg_fast.kernels.backend import exporting, get_backend, require
from ldmseg_fast.kernels.panoptic_head import reference
from ldmseg_fast.native import _C

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def panoptic_head(
    mask_logits: Tensor,
    network_size: tuple[int, int],
    target_size: tuple[int, int],
    mask_threshold: float,
    count_threshold: int,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turns mask logits into a class-agnostic panoptic map (Van Gansbeke and De Brabandere, arXiv 2401.10227, 3.3).

    The logits are resized to `network_size`, then to `target_size` (both bilinear, align_corners false, in float32).
    A pixel's label is its argmax slot, the lowest among equals. Pixels whose softmax probability is below
    `mask_threshold` become void; of the rest, slot 0, slots of fewer than `count_threshold` pixels and slots whose
    area is below `overlap_threshold` times the area where sigmoid(logit) >= `mask_threshold` (if there is any).
    Pixels that take over a ten-thousandth from cells with a NaN or an infinity in any slot are void, of probability 0.

    Args:
        mask_logits: [B, Q, h, w] float16, bfloat16 or float32, either memory format.
        network_size, target_size: (height, width) in pixels.

    Returns:
        segmentation int32 [B, H, W] (0 void, else slot + 1), probability float32 [B, H, W] (of the argmax slot, before
        any filter), and per slot, 0 where it was dropped: area int32 [B, Q] in pixels, box int32 [B, Q, 4] as
        (x, y, width, height), score float32 [B, Q] (mean probability).

    Raises:
        ValueError: wrong shape, dtype or size, or a threshold that is NaN.
    """
    thresholds = (mask_threshold, count_threshold, overlap_threshold)
    if exporting():
        return reference.panoptic_head(mask_logits, network_size, target_size, *thresholds)
    args = (mask_logits, list(network_size), list(target_size), *thresholds)
    if mask_logits.device.type == "cpu" and _is_plain(mask_logits):
        return _run(*args)  # the operator's first call on a CPU imports torch._dynamo, for more than a second
    return panoptic_head_op(*args)


def _is_plain(tensor: Tensor) -> bool:
    """Says that no tracer, mode or transform follows what is computed of a tensor of any shape and dtype."""
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    return type(tensor) is Tensor and not followed and not is_functorch_wrapped_tensor(tensor)


def check(mask_logits: Tensor, network_size: list[int], target_size: list[int], *thresholds: float) -> None:
    """Refuses what the op does not take: logits are float [B, Q, h, w], arguments as in `panoptic_head`.

    Raises:
        ValueError: wrong shape, dtype or size, or a threshold that is NaN; the message starts with the argument's name.
    """
    require(mask_logits.ndim == 4, "mask_logits: expected [B, Q, h, w], got shape {}", mask_logits.shape)
    require(mask_logits.dtype in FLOATS, "mask_logits: expected a float tensor, got {}", mask_logits.dtype)
    require(
        mask_logits.shape[1] > 0 and mask_logits.shape[2] > 0 and mask_logits.shape[3] > 0,
        "mask_logits: an empty axis in shape {}",
        mask_logits.shape,
    )
    for name, size in (("network_size", network_size), ("target_size", target_size)):
        require(len(size) == 2 and min(size) > 0, "{}: expected (height, width), got {}", name, size)
    for name, threshold in zip(("mask_threshold", "count_threshold", "overlap_threshold"), thresholds):
        require(threshold == threshold, "{}: a number expected, got {}", name, threshold)


def _run(
    mask_logits: Tensor,
    network_size: list[int],
    target_size: list[int],
    mask_threshold: float,
    count_threshold: int,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs `panoptic_head` on float [B, Q, h, w], with its arguments (sizes as lists) and results; without gradient.

    Raises:
        ValueError: see `check`.
    """
    check(mask_logits, network_size, target_size, mask_threshold, count_threshold, overlap_threshold)
    sizes = (network_size[0], network_size[1]), (target_size[0], target_size[1])
    thresholds = (mask_threshold, count_threshold, overlap_threshold)
    if mask_logits.shape[0] == 0:
        return _empty(mask_logits, target_size)
    if get_backend("panoptic_head") != "torch":
        if mask_logits.is_cuda:
            from ldmseg_fast.kernels.panoptic_head import host  # Triton is imported on CUDA only

            return host.panoptic_head(mask_logits, *sizes, *thresholds)
        if _C is not None and hasattr(_C, "panoptic_head"):
            logits = mask_logits.detach().float().contiguous().numpy()
            segmentation, probability, area, box, score = _C.panoptic_head(
                logits, *sizes, *thresholds, threads=torch.get_num_threads()
            )
            arrays = (segmentation, probability, area, box, score)
            results = [torch.from_numpy(array) for array in arrays]
            return results[0], results[1], results[2], results[3], results[4]
    return reference.panoptic_head(mask_logits.detach(), *sizes, *thresholds)


panoptic_head_op = torch.library.custom_op("ldmseg_fast::panoptic_head", _run, mutates_args=())


@panoptic_head_op.register_fake
def _(
    mask_logits: Tensor,
    network_size: list[int],
    target_size: list[int],
    mask_threshold: float,
    count_threshold: int,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check(mask_logits, network_size, target_size, mask_threshold, count_threshold, overlap_threshold)
    return _empty(mask_logits, target_size)


def _empty(mask_logits: Tensor, target_size: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, slots), device = mask_logits.shape[:2], mask_logits.device
    return (
        torch.empty((batch, *target_size), dtype=torch.int32, device=device),
        torch.empty((batch, *target_size), dtype=torch.float32, device=device),
        torch.empty((batch, slots), dtype=torch.int32, device=device),
        torch.empty((batch, slots, 4), dtype=torch.int32, device=device),
        torch.empty((batch, slots), dtype=torch.float32, device=device),
    )
