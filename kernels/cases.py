"""The shapes that count, once: what is compiled ahead of time, what the roofline prints and what benchmarks time.

Bytes are what must cross the memory bus at least once, operations those of matrix products, exponentials those of the
method; padding and recomputation are not counted, so a floor is a floor.
"""

from collections.abc import Iterator
from typing import Any

import torch

from ldmseg_fast.kernels.attention import host as attention
from ldmseg_fast.kernels.attention import reference as attention_reference
from ldmseg_fast.kernels.case import SLOTS, Case, blob_logits, normal, random_ids
from ldmseg_fast.kernels.ddim_step import host as ddim_step
from ldmseg_fast.kernels.ddim_step import reference as ddim_step_reference
from ldmseg_fast.kernels.group_norm_silu import host as group_norm_silu
from ldmseg_fast.kernels.group_norm_silu import reference as group_norm_silu_reference
from ldmseg_fast.kernels.mask_bits import host as mask_bits
from ldmseg_fast.kernels.mask_bits import reference as mask_bits_reference
from ldmseg_fast.kernels.panoptic_head import host as panoptic_head
from ldmseg_fast.kernels.panoptic_head import reference as panoptic_head_reference
from ldmseg_fast.kernels.point_loss import host as point_loss
from ldmseg_fast.kernels.point_loss import reference as point_loss_reference

POINTS = 12544
SEGMENTS = 12  # of an image


def all_cases() -> list[Case]:
    """Every kernel and every shipped shape class at least once."""
    makers = (_mask_bits, _attention, _panoptic_head, _group_norm_silu, _ddim_step, _point_loss)
    return [case for maker in makers for case in maker()]


def _mask_bits() -> Iterator[Case]:
    pixels, bits = 512 * 512, 7
    for batch in (1, 16):
        for channels_last in (False, True):
            for remap in (False, True):

                def make_ids(device, batch=batch, remap=remap, last=channels_last):
                    table = torch.randint(0, 128, (batch, 256), device=device, dtype=torch.uint8)
                    return random_ids(batch, 512, device), bits, table if remap else None, torch.bfloat16, last

                yield Case(
                    "mask_bits",
                    f"encode{' remapped' if remap else ''}{' channels_last' if channels_last else ''} 512x512",
                    torch.bfloat16,
                    batch,
                    make_ids,
                    mask_bits.encode_mask_bits,
                    mask_bits_reference.encode_mask_bits,
                    batch * pixels * (1 + 2 * bits),
                    headline=batch == 16 and remap,
                )
    for channels_last in (False, True):

        def make_bits(device, last=channels_last):
            return (normal(16, bits, 512, 512, device=device, dtype=torch.float16, channels_last=last),)

        yield Case(
            "mask_bits",
            f"decode{' channels_last' if channels_last else ''} 512x512",
            torch.float16,
            16,
            make_bits,
            mask_bits.decode_mask_bits,
            mask_bits_reference.decode_mask_bits,
            16 * pixels * (2 * bits + 4),
        )


def _attention() -> Iterator[Case]:
    shapes = [(1, 4096, 40), (4, 4096, 40), (16, 4096, 40), (16, 1024, 80), (16, 256, 160), (4, 4095, 40)]
    shapes += [(4, 1024, 64), (4, 1024, 128)]  # what other models use

    def forward_backward(q, k, v, scale):
        out, logsumexp = attention.attention_forward(q, k, v, scale)
        return out, *attention.attention_backward(torch.ones_like(out), q, k, v, out, logsumexp, scale)

    for batch, tokens, head_size in shapes:
        for dtype in (torch.float16, torch.bfloat16) if (batch, tokens) == (4, 4096) else (torch.bfloat16,):
            heads, scale = 8, head_size**-0.5
            pairs = batch * heads * tokens * tokens
            element = batch * tokens * heads * head_size * 2

            def make(device, shape=(batch, tokens, 3, heads, head_size), dtype=dtype, scale=scale):
                qkv = normal(*shape, device=device, dtype=dtype)  # one fused projection
                return *qkv.unbind(2), scale

            about: dict[str, Any] = {
                "dtype": dtype,
                "batch": batch,
                "make": make,
                "torch": attention_reference.attention,
            }
            about |= {"exponentials": pairs, "headline": batch == 4 and tokens == 4096 and dtype == torch.bfloat16}
            name = f"[{batch}, {tokens}, {heads}, {head_size}]"
            yield Case(
                "attention",
                f"forward {name}",
                triton=lambda *arguments: attention.attention_forward(*arguments)[0],
                bytes_moved=4 * element,
                operations=4 * pairs * head_size,
                **about,
            )
            if dtype == torch.bfloat16 and tokens % 128 == 0 and head_size != 64:
                yield Case(
                    "attention",
                    f"forward fp8 {name}",
                    triton=attention.attention_fp8,
                    bytes_moved=4 * element,  # the e4m3 copies of q, k and v may stay in L2
                    operations=4 * pairs * head_size,
                    fp8=True,
                    **about,
                )
            yield Case(
                "attention",
                f"forward, backward {name}",
                triton=forward_backward,
                bytes_moved=12 * element,
                operations=14 * pairs * head_size,  # two products, then scores again and four
                leaves=(0, 1, 2),
                **about,
            )


def _panoptic_head() -> Iterator[Case]:
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
            panoptic_head.panoptic_head,
            panoptic_head_reference.panoptic_head,
            batch * (slots * 256 * 256 * dtype.itemsize + 8 * pixels),
            exponentials=batch * pixels * slots,
            headline=batch == 16 and channels_last,
        )


def _group_norm_silu() -> Iterator[Case]:
    shapes = [(1, 320, 64), (16, 320, 64), (16, 640, 32), (16, 1280, 16), (16, 1280, 8), (1, 128, 512)]

    def forward_backward(x, weight, bias, groups, eps, scale, shift, residual, silu):
        y, mean, rstd = group_norm_silu.group_norm_silu_forward(
            x, weight, bias, groups, eps, scale, shift, residual, silu
        )
        grads = group_norm_silu.group_norm_silu_backward(
            torch.ones_like(y), x, mean, rstd, weight, bias, scale, shift, silu
        )
        return y, *grads[:3]

    for batch, channels, size in shapes:
        for dtype in (torch.float16, torch.float32) if (batch, channels) == (16, 320) else (torch.bfloat16,):
            elements = batch * channels * size * size * dtype.itemsize
            name = f"[{batch}, {channels}, {size}, {size}]"

            def make(device, batch=batch, channels=channels, size=size, dtype=dtype):
                x = normal(batch, channels, size, size, device=device, dtype=dtype, channels_last=True)
                weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
                return x, weight, bias, 32, 1e-5, None, None, None, True

            def make_full(device, make=make):
                x, weight, bias, *_ = make(device)
                scale = normal(*x.shape[:2], device=device, dtype=x.dtype)
                return x, weight, bias, 32, 1e-5, scale, scale, torch.randn_like(x), True

            about: dict[str, Any] = {"dtype": dtype, "batch": batch, "torch": group_norm_silu_reference.group_norm_silu}
            headline = dtype == torch.float16
            yield Case(
                "group_norm_silu",
                f"forward {name}",
                make=make,
                triton=lambda *arguments: group_norm_silu.group_norm_silu_forward(*arguments)[0],
                bytes_moved=2 * elements,
                headline=headline,
                **about,
            )
            if headline or size in (16, 8):
                yield Case(
                    "group_norm_silu",
                    f"forward, all {name}",  # time embedding and residual
                    make=make_full,
                    triton=lambda *arguments: group_norm_silu.group_norm_silu_forward(*arguments)[0],
                    bytes_moved=3 * elements,
                    **about,
                )
            yield Case(
                "group_norm_silu",
                f"forward, backward {name}",
                make=make,
                triton=forward_backward,
                bytes_moved=5 * elements,
                leaves=(0, 1, 2),
                headline=headline,
                **about,
            )


def _ddim_step() -> Iterator[Case]:
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
                ddim_step.ddim_step,
                ddim_step_reference.ddim_step,
                cells * (4 * 2 + 4 * 4 + 4 * 2 + 2 * 4 * 4 + 12 * 2),
                headline=batch == 1 and prediction_type == "epsilon",
            )


def _point_loss() -> Iterator[Case]:
    batch, candidates = 16, 3 * POINTS
    rows = batch * SEGMENTS
    kernel, reference = point_loss, point_loss_reference

    def ce_forward_backward(logits, ids, points):
        loss, _, logsumexp = kernel.sample_ce_forward(logits, ids, points)
        return loss, kernel.sample_ce_backward(torch.ones_like(loss), logits, ids, points, logsumexp)

    def dice_forward_backward(logits, ids, image_index, slots, points):
        bce, dice, sums = kernel.sample_bce_dice_forward(logits, ids, image_index, slots, points)
        one = torch.ones_like(bce)
        grad = kernel.sample_bce_dice_backward(one, one, logits, ids, image_index, slots, points, sums)
        return bce + dice, grad

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

        def make_dice(device, logits=logits, segments=segments):
            points = torch.rand((rows, POINTS, 2), device=device)
            return logits(device), random_ids(batch, 512, device), *segments(device), points

        plane = batch * SLOTS * 256 * 256 * dtype.itemsize
        sampled = min(plane, batch * POINTS * SLOTS * corners)  # the points of an image meet most pixels
        sampled_rows = rows * POINTS * (corners + 4 + 8)
        about: dict[str, Any] = {"dtype": dtype, "batch": batch}
        simple = {
            "margin": (make_image_points, kernel.point_margin, reference.point_margin, plane),
            "logits": (
                make_image_points,
                kernel.point_logits,
                reference.point_logits,
                plane + batch * SLOTS * candidates * 4,
            ),
            "slot logits": (make_row_points, kernel.slot_logits, reference.slot_logits, 3 * sampled_rows),
        }
        for name, (make, run, plain, moved) in simple.items():
            yield Case("point_loss", f"{name} {label}", make=make, triton=run, torch=plain, bytes_moved=moved, **about)
        yield Case(
            "point_loss",
            f"ce forward, backward {label}",
            make=make_ce,
            triton=ce_forward_backward,
            torch=lambda *arguments: point_loss_reference.sample_ce(*arguments)[0],
            bytes_moved=2 * sampled + plane,
            exponentials=batch * POINTS * SLOTS,
            leaves=(0,),
            headline=channels_last,
            **about,
        )
        yield Case(
            "point_loss",
            f"bce dice forward, backward {label}",
            make=make_dice,
            triton=dice_forward_backward,
            torch=lambda *arguments: sum(point_loss_reference.sample_bce_dice(*arguments)),
            bytes_moved=2 * sampled_rows + plane,
            leaves=(0,),
            headline=channels_last,
            **about,
        )
