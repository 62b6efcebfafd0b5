"""Lists the shapes of the kernel that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ldmseg_fast.kernels.case import SLOTS, Case, meta, normal, random_ids
from ldmseg_fast.kernels.point_loss import host, reference

POINTS = 12544
SEGMENTS = 12  # of an image
CATEGORIES = 300  # more than a byte holds


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    batch, candidates = 16, 3 * POINTS
    rows = batch * SEGMENTS

    def ce_forward_backward(logits, ids, points, weights=None):
        loss, _, logsumexp = host.sample_ce_forward(logits, ids, points, weights)
        return loss, host.sample_ce_backward(torch.ones_like(loss), logits, ids, points, logsumexp, weights)

    def losses_forward_backward(logits, ids, points, image_index, slots, row_points):
        ce, _, logsumexp = host.sample_ce_forward(logits, ids, points)
        bce, dice, sums = host.sample_bce_dice_forward(logits, ids, image_index, slots, row_points)
        rows, one = (image_index, slots, row_points, sums), torch.ones_like(ce)
        grad = host.sample_losses_backward(one, one, one, logits, ids, points, logsumexp, *rows)
        return ce + bce + dice, grad

    def losses(*arguments):
        ce, _, bce, dice = reference.sample_losses(*arguments)
        return ce + bce + dice

    for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, False)):
        corners, label = 4 * dtype.itemsize, "channels_last" if channels_last else "planes"

        def logits(device, dtype=dtype, last=channels_last):
            return normal(batch, SLOTS, 256, 256, device=device, dtype=dtype, channels_last=last)

        def segments(device):
            image_index = torch.arange(batch, device=device).repeat_interleave(SEGMENTS)
            return image_index, torch.randint(1, SLOTS, (rows,), device=device)

        def make_image_points(device, logits=logits):
            return logits(device), torch.rand((batch, candidates, 2), device=device)

        def make_row_points(device, logits=logits, segments=segments):
            return logits(device), *segments(device), torch.rand((rows, candidates, 2), device=device)

        def make_ce(device, logits=logits):
            return logits(device), random_ids(batch, 512, device), torch.rand((batch, POINTS, 2), device=device)

        def make_categories(device, dtype=dtype, last=channels_last):
            scores = normal(batch, CATEGORIES + 1, 256, 256, device=device, dtype=dtype, channels_last=last)
            ids = torch.randint(0, CATEGORIES + 1, (batch, 512, 512), device=device, dtype=torch.int16)
            weights = torch.rand(CATEGORIES + 1, device=device)
            return scores, ids, torch.rand((batch, POINTS, 2), device=device), weights

        def make_losses(device, make_ce=make_ce, segments=segments):
            return *make_ce(device), *segments(device), torch.rand((rows, POINTS, 2), device=device)

        plane = batch * SLOTS * 256 * 256 * dtype.itemsize
        sampled = min(plane, batch * POINTS * SLOTS * corners)  # the points of an image meet most pixels
        sampled_rows = rows * POINTS * (corners + 4 + 8)
        about: dict[str, Any] = {"dtype": dtype, "batch": batch}
        simple = {
            "margin": (make_image_points, host.point_margin, reference.point_margin, plane),
            "logits": (
                make_image_points,
                host.point_logits,
                reference.point_logits,
                plane + batch * SLOTS * candidates * 4,
            ),
            "slot logits": (make_row_points, host.slot_logits, reference.slot_logits, 3 * sampled_rows),
        }
        for name, (make, run, plain, moved) in simple.items():
            yield Case("point_loss", f"{name} {label}", make=make, triton=run, torch=plain, bytes_moved=moved, **about)
        yield Case(
            "point_loss",
            f"ce of categories, forward, backward {label}",
            make=make_categories,
            triton=ce_forward_backward,
            torch=lambda *arguments: reference.sample_ce(*arguments)[0],
            bytes_moved=(2 * sampled + plane) * (CATEGORIES + 1) // SLOTS,
            exponentials=batch * POINTS * (CATEGORIES + 1),
            leaves=(0,),
            **about,
        )
        yield Case(
            "point_loss",
            f"losses forward, backward {label}",
            make=make_losses,
            triton=losses_forward_backward,
            torch=losses,
            bytes_moved=2 * (sampled + sampled_rows) + plane,
            exponentials=batch * POINTS * SLOTS,
            leaves=(0,),
            headline=channels_last,
            **about,
        )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch each kernel on meta tensors whose sizes are all 1."""
    logits, ids = meta(1, 1, 1, 1), meta(1, 1, 1, dtype=torch.uint8)
    one, points = meta(1, dtype=torch.int64), meta(1, 1, 2, dtype=torch.float32)

    def run() -> None:
        host.point_logits(logits, points)
        host.point_margin(logits, points)
        host.slot_logits(logits, one, one, points)
        for weights in (None, meta(1, dtype=torch.float32)):
            loss, _, logsumexp = host.sample_ce_forward(logits, ids, points, weights)
            host.sample_ce_backward(loss, logits, ids, points, logsumexp, weights)
        _, _, sums = host.sample_bce_dice_forward(logits, ids, one, one, points)
        rows = (one, one, points, sums)
        host.sample_losses_backward(loss, loss, loss, logits, ids, points, logsumexp, *rows)

    yield run
