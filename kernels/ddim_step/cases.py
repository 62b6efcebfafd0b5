"""Lists the shapes of the kernel that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ldmseg_fast.kernels.case import Case, meta, normal
from ldmseg_fast.kernels.ddim_step import host, reference


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    for batch in (1, 16):
        for prediction_type in ("epsilon", "v_prediction"):
            cells = batch * 64 * 64

            def make(device, batch=batch, prediction_type=prediction_type):
                output = normal(batch, 4, 64, 64, device=device, dtype=torch.float16, channels_last=True)
                noisy = normal(batch, 4, 64, 64, device=device, dtype=torch.float32)
                image = normal(batch, 4, 64, 64, device=device, dtype=torch.float16)
                step = torch.zeros((), dtype=torch.int64, device=device)
                table = torch.full((50, 4), 0.5, device=device)
                return output, noisy, image, step, table, prediction_type, True, torch.float16

            yield Case(
                "ddim_step",
                f"{prediction_type} [{batch}, 4, 64, 64]",
                torch.float16,
                batch,
                make,
                host.ddim_step,
                reference.ddim_step,
                cells * (4 * 2 + 4 * 4 + 4 * 2 + 2 * 4 * 4 + 12 * 2),
                headline=batch == 1 and prediction_type == "epsilon",
            )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch each kernel on meta tensors whose sizes are all 1."""
    half, single, step = meta(1, 1, 1, 1), meta(1, 1, 1, 1, dtype=torch.float32), meta(1, dtype=torch.int64)
    table = meta(1, 4, dtype=torch.float32)
    yield partial(host.ddim_step, half, single, half, step, table, "epsilon", True, torch.float16)
