"""All kernels at the edges: nothing to do, views of every kind, offsets beyond 2^31, ids that are no slot."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ldmseg_fast.kernels import launch
from ldmseg_fast.kernels.attention import host as attention
from ldmseg_fast.kernels.attention import op as attention_ops
from ldmseg_fast.kernels.ddim_step import host as ddim
from ldmseg_fast.kernels.ddim_step import op as ddim_ops
from ldmseg_fast.kernels.group_norm_silu import group_norm_silu
from ldmseg_fast.kernels.group_norm_silu import host as norm
from ldmseg_fast.kernels.group_norm_silu import op as norm_ops
from ldmseg_fast.kernels.mask_bits import host as bits
from ldmseg_fast.kernels.mask_bits import op as bits_ops
from ldmseg_fast.kernels.panoptic_head import host as head
from ldmseg_fast.kernels.panoptic_head import op as head_ops
from ldmseg_fast.kernels.point_loss import custom_ops as points_ops
from ldmseg_fast.kernels.point_loss import host as points
from ldmseg_fast.kernels.point_loss import op as points_functions
from ldmseg_fast.kernels.point_loss import reference as points_reference

FAR = 2**31  # elements between two images
CUDA = torch.cuda.is_available()


def nothing(batch: int, height: int) -> dict[str, tuple]:
    """op -> (op, kernel, arguments); an op with a switch that its kernel lacks comes last"""
    x, ids = torch.zeros(batch, 4, height, 5), torch.zeros(batch, height, 5, dtype=torch.uint8)
    weight, per_image, table = torch.ones(4), torch.zeros(batch, 4), torch.zeros(batch, 256, dtype=torch.uint8)
    statistics, q = torch.zeros(batch, 2), torch.zeros(batch, height, 2, 8).half()
    keys = torch.zeros(batch, 3, 2, 8).half()
    logsumexp = torch.zeros(batch, 2, height)
    return {
        "encode": (bits_ops.encode_op, bits.encode_mask_bits, (ids, 3, table, torch.float16, True)),
        "decode": (bits_ops.decode_op, bits.decode_mask_bits, (x,)),
        "ddim": (
            ddim_ops.ddim_step_op,
            ddim.ddim_step,
            (x, x, x, torch.tensor(0), torch.ones(3, 4), "epsilon", True, torch.float16),
        ),
        "norm": (
            norm_ops.group_norm_silu_op,
            norm.group_norm_silu_forward,
            (x, weight, weight, 2, 1e-5, per_image, per_image, x, True),
        ),
        "norm backward": (
            norm_ops.group_norm_silu_backward_op,
            norm.group_norm_silu_backward,
            (x, x, statistics, statistics, weight, weight, per_image, None, True),
        ),
        "attention": (attention_ops.attention_forward_op, attention.attention_forward, (q, keys, keys, 1.0)),
        "attention backward": (
            attention_ops.attention_backward_op,
            attention.attention_backward,
            (q, q, keys, keys, q, logsumexp, 1.0),
        ),
    }


def no_points(batch: int, rows: int, count: int) -> dict[str, tuple]:
    logits, ids = torch.zeros(batch, 4, 6, 5), torch.zeros(batch, 7, 7, dtype=torch.uint8)
    per_image, per_row = torch.zeros(batch, count, 2), torch.zeros(rows, count, 2)
    index, one = torch.zeros(rows, dtype=torch.int64), torch.tensor(1.0)
    ops, own = points_ops, points
    return {
        "logits": (ops.point_logits_op, own.point_logits, (logits, per_image)),
        "margin": (ops.point_margin_op, own.point_margin, (logits, per_image)),
        "slot logits": (ops.slot_logits_op, own.slot_logits, (logits, index, index, per_row)),
        "ce": (ops.sample_ce_op, own.sample_ce_forward, (logits, ids, per_image)),
        "ce backward": (
            ops.sample_ce_backward_op,
            own.sample_ce_backward,
            (one, logits, ids, per_image, torch.zeros(batch, count)),
        ),
        "losses backward": (
            ops.sample_losses_backward_op,
            own.sample_losses_backward,
            (
                *[one] * 3,
                logits,
                ids,
                per_image,
                torch.zeros(batch, count),
                index,
                index,
                per_row,
                torch.zeros(rows, 3),
            ),
        ),
    }


def shapes(result) -> list[tuple]:
    return [(each.shape, each.dtype) for each in ((result,) if isinstance(result, Tensor) else result)]


CASES = [
    *[(f"{name}, {batch} images", case) for batch in (0,) for name, case in nothing(batch, 4).items()],
    *[(f"{name}, no rows", case) for name, case in nothing(2, 0).items()],
    *[(f"{name}, no images", case) for name, case in no_points(0, 0, 3).items()],
    *[(f"{name}, no segments, no points", case) for name, case in no_points(2, 0, 0).items()],
]


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # the mean over no points
@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_nothing_to_do(case, device):
    op, kernel, args = case
    args = [each.to(device) if isinstance(each, Tensor) else each for each in args]
    switches = (True,) if op is bits_ops.encode_op else ()
    expected = shapes(op(*args, *switches))
    assert shapes(kernel(*args)) == expected
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in args]
        assert shapes(op(*fake, *switches)) == expected


@pytest.mark.parametrize(("batch", "height"), [(0, 4), (2, 0)])
def test_norm_of_nothing_has_a_gradient(batch, height, device):
    x = torch.zeros(batch, 4, height, 5, device=device, requires_grad=True)
    weight = torch.ones(4, device=device)
    group_norm_silu(x, weight, weight, 2, 1e-5, residual=x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_logits_and_maps_without_pixels_are_refused(device, refuses):
    logits, ids = torch.zeros(2, 4, 6, 5, device=device), torch.zeros(2, 7, 7, dtype=torch.uint8, device=device)
    at = torch.zeros(2, 3, 2, device=device)
    refuses("mask_logits", points_functions.sample_ce, points_ops.sample_ce_op, (logits[:, :, :0], ids, at))
    refuses("mask_logits", points_functions.point_margin, points_ops.point_margin_op, (logits[..., :0], at))
    refuses("segment_ids", points_functions.sample_ce, points_ops.sample_ce_op, (logits, ids[:, :0], at))
    sizes = ((8, 8), (9, 7), 0.5, 1, 0.5)
    refuses("mask_logits", head_ops.panoptic_head, head_ops.panoptic_head_op, (logits[:, :, :0], *sizes))
    refuses("target_size", head_ops.panoptic_head, head_ops.panoptic_head_op, (logits, (8, 8), (0, 7), *sizes[2:]))


VIEWS = {
    "flipped": lambda x: x.flip(-1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "expanded": lambda x: x[:1].expand_as(x),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view, device):
    """What a kernel makes of a view is what it makes of a copy."""
    look = VIEWS[view]
    x = look(torch.randn(2, 4, 6, 8, device=device))
    ids = look(torch.randint(0, 4, (2, 6, 8), device=device))
    x_copy, ids_copy = (each.contiguous().clone() for each in (x, ids))
    at, weight = torch.rand(2, 9, 2, device=device), torch.randn(4, device=device)
    step, table = torch.tensor(0, device=device), torch.full((3, 4), 0.5, device=device)
    one = torch.tensor(1.0, device=device)

    def results(x: Tensor, ids: Tensor) -> list[Tensor]:
        loss, count, logsumexp = points.sample_ce_forward(x, ids, at)
        return [
            bits.encode_mask_bits(ids, 3, None, torch.float32, False),
            bits.decode_mask_bits(x),
            *norm.group_norm_silu_forward(x, weight, weight, 2, 1e-5, None, None, x, True),
            *ddim.ddim_step(x, x, x, step, table, "epsilon", True, torch.float32),
            *head.panoptic_head(x, (12, 16), (9, 7), 0.3, 1, 0.2),
            *(loss, count, logsumexp, points.sample_ce_backward(one, x, ids, at, logsumexp)),
        ]

    for i, (one_result, other) in enumerate(zip(results(x, ids), results(x_copy, ids_copy))):
        torch.testing.assert_close(one_result, other, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"result {i}: {m}")


def strides(result) -> list[list[int]]:
    """Of the axes that have more than one member: the others' mean nothing"""
    results = (result,) if isinstance(result, Tensor) else result
    return [[step for step, size in zip(each.stride(), each.shape) if size > 1] for each in results]


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_results_are_those_that_are_promised(view, device):
    for name, (op, _, args) in (nothing(2, 4) | no_points(2, 3, 5)).items():
        args = [each.to(device) if isinstance(each, Tensor) else each for each in args]
        args = [VIEWS[view](each) if isinstance(each, Tensor) and each.ndim > 2 else each for each in args]
        args += [True] if op is bits_ops.encode_op else []
        with FakeTensorMode() as mode:
            promised = op(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in args))
        assert strides(op(*args)) == strides(promised), name
        if op is bits_ops.encode_op:
            planes = op(args[0], 3, None, torch.float32, False, False)
            assert planes.is_contiguous()


def test_a_column_of_cells_has_two_strides(device):
    """Transposed, the one axis of a picture of width 1 lies dense, and the stride of its width means nothing."""
    x = torch.randn(2, 4, 1, 5, device=device).transpose(2, 3)
    assert x.is_contiguous() and x.stride(3) == 5
    assert torch.equal(bits.decode_mask_bits(x), bits.decode_mask_bits(x.clone(memory_format=torch.contiguous_format)))
    step, table = torch.tensor(0, device=device), torch.full((3, 4), 0.5, device=device)
    args = (step, table, "epsilon", True, torch.float32)
    dense = x.clone(memory_format=torch.contiguous_format)
    for one, other in zip(ddim.ddim_step(x, dense, x, *args), ddim.ddim_step(dense, dense, dense, *args)):
        assert torch.equal(one, other)


def far_apart(*shape: int, device, dtype=torch.float16) -> tuple[Tensor, Tensor]:
    """Two images that lie more than 2^31 elements apart (memory in between is never touched), and a dense copy"""
    image = torch.randn(2, *shape, device=device).to(dtype)
    stride = (FAR, *image.stride()[1:])
    far = torch.empty(FAR + image[0].numel(), dtype=dtype, device=device).as_strided(image.shape, stride)
    far.copy_(image)
    return far, image


def test_offsets_beyond_two_to_the_31(device):
    q, q_dense = far_apart(5, 2, 8, device=device)
    out, logsumexp = attention.attention_forward(q, q, q, 0.3)
    dense = attention.attention_forward(q_dense, q_dense, q_dense, 0.3)
    assert torch.equal(out, dense[0]) and torch.equal(logsumexp, dense[1])
    grads = attention.attention_backward(q, q, q, q, out, logsumexp, 0.3)
    for one, other in zip(grads, attention.attention_backward(q_dense, *(q_dense,) * 3, *dense, 0.3)):
        assert torch.equal(one, other)
    del q
    x, x_dense = far_apart(4, 6, 8, device=device)
    assert torch.equal(bits.decode_mask_bits(x), bits.decode_mask_bits(x_dense))
    for one, other in zip(*(head.panoptic_head(each, (12, 16), (9, 7), 0.3, 1, 0.2) for each in (x, x_dense))):
        assert torch.equal(one, other)
    step, table = torch.tensor(0, device=device), torch.full((3, 4), 0.5, device=device)
    rest = (x_dense.float(), x_dense, step, table, "epsilon", True, torch.float32)
    for one, other in zip(ddim.ddim_step(x, *rest), ddim.ddim_step(x_dense, *rest)):
        assert torch.equal(one, other)
    at, rows = torch.rand(2, 9, 2, device=device), torch.tensor([0, 1], device=device)
    ids = torch.randint(0, 4, (2, 7, 7), device=device)
    assert torch.equal(points.point_logits(x, at), points.point_logits(x_dense, at))
    assert torch.equal(points.slot_logits(x, rows, rows, at), points.slot_logits(x_dense, rows, rows, at))
    for run, args in (
        (points.sample_ce_forward, (ids, at)),
        (points.sample_bce_dice_forward, (ids, rows, rows + 1, at)),
    ):
        for one, other in zip(run(x, *args), run(x_dense, *args)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("run", ["kernel", "reference"])
def test_ids_that_are_no_slot_are_void(run, device):
    own = points if run == "kernel" else points_reference
    ids = torch.tensor([[[2**40, -5], [3, 300]]], device=device)
    void = torch.tensor([[[0, 0], [3, 0]]], device=device)
    logits, at = torch.randn(1, 4, 2, 2, device=device), torch.rand(1, 20, 2, device=device)
    for one, other in zip(own.sample_ce_forward(logits, ids, at), own.sample_ce_forward(logits, void, at)):
        assert torch.equal(one, other)
    loss, _, logsumexp = own.sample_ce_forward(logits, ids, at)
    grads = [own.sample_ce_backward(torch.ones_like(loss), logits, each, at, logsumexp) for each in (ids, void)]
    assert torch.equal(*grads) and bool(grads[0].isfinite().all())

    index, per_row = torch.zeros(3, dtype=torch.int64, device=device), torch.rand(3, 20, 2, device=device)
    slots, present = (torch.tensor(each, device=device) for each in ([2**40, 3, -7], [0, 3, 0]))
    for one, other in zip(
        own.sample_bce_dice_forward(logits, ids, index, slots, per_row)[:2],
        own.sample_bce_dice_forward(logits, void, index, present, per_row)[:2],
    ):
        assert torch.equal(one, other)
    assert bool((own.slot_logits(logits, index, slots, per_row)[0] == 0).all())


def test_rows_that_start_off_sixteen_bytes_are_copied(device):
    flat = torch.randn(2 * 5 * 2 * 8 + 1, device=device).half()
    q = flat[1:].view(2, 5, 2, 8)
    assert q.is_contiguous() and launch.in_units(q).data_ptr() % 16 == 0
    assert torch.equal(launch.in_units(q), q)


def test_too_many_images_for_one_launch(device):
    q = torch.zeros(70000, 1, 1, 8, device=device).half()
    with pytest.raises(ValueError, match="split the batch"):
        attention.attention_forward(q, q, q, 1.0)
