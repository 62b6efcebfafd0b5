"""Lists the shapes of the kernel that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ldmseg_fast.kernels.case import SLOTS, Case, blob_logits, meta
from ldmseg_fast.kernels.panoptic_head import host, reference


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    sizes = ((512, 512), (480, 640))
    pixels = 480 * 640
    variants = [
        (1, torch.bfloat16, True, SLOTS),
        (16, torch.bfloat16, True, SLOTS),
        (16, torch.float16, False, SLOTS),
        (1, torch.float32, True, SLOTS),
        (1, torch.float32, False, SLOTS),
        (1, torch.float16, True, 2 * SLOTS),
        (1, torch.float16, False, 2 * SLOTS),
    ]
    for batch, dtype, channels_last, slots in variants:

        def make(device, batch=batch, dtype=dtype, last=channels_last, slots=slots):
            return blob_logits(batch, slots, 256, device, dtype, last), *sizes, 0.5, 512, 0.5

        yield Case(
            "panoptic_head",
            f"[{batch}, {slots}, 256, 256]{' channels_last' if channels_last else ''} -> 480x640",
            dtype,
            batch,
            make,
            host.panoptic_head,
            reference.panoptic_head,
            batch * (slots * 256 * 256 * dtype.itemsize + 8 * pixels),
            exponentials=batch * pixels * slots,
            headline=batch == 16 and channels_last,
        )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch each kernel on meta tensors whose sizes are all 1."""
    yield partial(host.panoptic_head, meta(1, 1, 1, 1), (1, 1), (1, 1), 0.5, 512, 0.5)
