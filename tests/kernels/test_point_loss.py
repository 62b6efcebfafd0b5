import pytest
import torch
import torch.nn.functional as F

from ldmseg_fast.kernels import point_loss
from ldmseg_fast.kernels.point_loss import host, reference
from ldmseg_fast.kernels.point_loss.custom_ops import (
    point_logits_op,
    point_margin_op,
    sample_ce_backward_op,
    sample_ce_op,
    sample_losses_backward_op,
    sample_losses_op,
    slot_logits_op,
)

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (B, Q, h, w), (H, W), points, rows
SHAPES = [((2, 6, 5, 7), (10, 14), 100, 5), ((1, 130, 9, 8), (31, 33), 63, 4), ((2, 128, 16, 16), (64, 64), 50, 3)]


def make_inputs(shape, ids_size, count, rows, dtype, memory_format, device):
    """Logits, ids, points of images, and image index, slot (one of them void) and points of rows"""
    batch, slots = shape[:2]
    logits = (3 * torch.randn(shape, device=device)).to(dtype).contiguous(memory_format=memory_format)
    ids = torch.randint(0, slots, (batch, *ids_size), dtype=torch.uint8, device=device)
    points = torch.rand(batch, count, 2, device=device)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0], [0.0, 1.0]], device=device)
    image_index = torch.randint(0, batch, (rows,), device=device)
    chosen = torch.randint(1, slots, (rows,), device=device)
    chosen[0] = 0
    return logits, ids, points, image_index, chosen, torch.rand(rows, count, 2, device=device)


@pytest.mark.parametrize(("shape", "ids_size", "count", "rows"), SHAPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_reference(shape, ids_size, count, rows, memory_format, dtype, device, poison, close):
    args = make_inputs(shape, ids_size, count, rows, dtype, memory_format, device)
    logits, ids, points, image_index, slots, row_points = args
    exact, exact_points, exact_rows = logits.double(), points.double(), row_points.double()
    close(host.point_logits(logits, points), reference.point_logits(exact, exact_points))
    close(host.point_margin(logits, points), reference.point_margin(exact, exact_points))
    rows_args = (image_index, slots, row_points)
    close(host.slot_logits(logits, *rows_args), reference.slot_logits(exact, image_index, slots, exact_rows))

    leaf = exact.clone().requires_grad_()
    loss, count_exact = reference.sample_ce(leaf, ids, exact_points)
    (grad_exact,) = torch.autograd.grad(1.5 * loss, leaf)
    ce, valid, logsumexp = host.sample_ce_forward(logits, ids, points)
    close(ce, loss.detach())
    assert valid.item() == count_exact.item()
    grad = host.sample_ce_backward(torch.tensor(1.5, device=device), logits, ids, points, logsumexp)
    close(grad, grad_exact)
    assert grad.stride() == logits.stride()

    loss, _, bce, dice = reference.sample_losses(leaf, ids, exact_points, image_index, slots, exact_rows)
    (grad_exact,) = torch.autograd.grad(0.5 * loss + 1.5 * bce - 2 * dice, leaf)
    ours = host.sample_bce_dice_forward(logits, ids, image_index, slots, row_points)
    close(ours[0], bce.detach())
    close(ours[1], dice.detach())
    weights = torch.tensor([0.5, 1.5, -2.0], device=device).unbind()
    rows = (image_index, slots, row_points, ours[2])
    grad = host.sample_losses_backward(*weights, logits, ids, points, logsumexp, *rows)
    close(grad, grad_exact)
    assert grad.stride() == logits.stride()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_categories_than_a_byte_holds(memory_format, weighted, device, poison, close):
    """Cross-entropy over categories is that over slots, of int16 maps; categories may have weights."""
    logits = (3 * torch.randn(1, 301, 5, 6, device=device)).contiguous(memory_format=memory_format)
    ids = torch.randint(0, 301, (1, 9, 11), dtype=torch.int16, device=device)
    points = torch.rand(1, 40, 2, device=device)
    weights = torch.rand(301, device=device) if weighted else None
    leaf = logits.double().requires_grad_()
    loss, count = reference.sample_ce(leaf, ids, points.double(), weights)
    (expected,) = torch.autograd.grad(loss, leaf)
    ours, valid, logsumexp = host.sample_ce_forward(logits, ids, points, weights)
    close(ours, loss.detach())
    assert valid.item() == count.item()
    one = torch.ones((), device=device)
    close(host.sample_ce_backward(one, logits, ids, points, logsumexp, weights), expected)
    close(reference.sample_ce_backward(one, logits, ids, points, logsumexp, weights), expected)


def test_reference_samples_as_grid_sample_does(device):
    """Logits and binary masks, bilinear with zeros outside, also at and beyond the border."""
    logits, ids, _, image_index, slots, points = make_inputs(
        (2, 6, 5, 7), (10, 14), 200, 5, torch.float64, torch.contiguous_format, device
    )
    points = points.double() * 1.2 - 0.1
    grid = 2 * points[:, :, None] - 1
    expected = F.grid_sample(logits[image_index, slots][:, None], grid, align_corners=False)[:, 0, :, 0]
    torch.testing.assert_close(reference.slot_logits(logits, image_index, slots, points), expected)
    masks = (ids[image_index] == slots[:, None, None]).double()[:, None]
    expected = F.grid_sample(masks, grid, align_corners=False)[:, 0, :, 0]
    torch.testing.assert_close(reference.slot_targets(ids, image_index, slots, points), expected)


def test_ids_are_those_of_the_pixel_that_holds_the_point():
    ids = torch.arange(12).view(1, 3, 4)
    centres = torch.stack(torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(3) + 0.5) / 3, indexing="xy"), -1)
    assert torch.equal(reference.point_ids(ids, centres.view(1, 12, 2), 12), torch.arange(12)[None])
    assert reference.point_ids(ids, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), 12).tolist() == [[11, 0]]


def test_void_counts_for_nothing(device):
    logits = torch.randn(1, 4, 6, 6, device=device)
    ids = torch.zeros(1, 8, 8, dtype=torch.int64, device=device)
    points = torch.rand(1, 20, 2, device=device)
    loss, count, logsumexp = host.sample_ce_forward(logits, ids, points)
    assert (loss.item(), count.item()) == (0.0, 0.0)
    assert not host.sample_ce_backward(torch.ones((), device=device), logits, ids, points, logsumexp).any()
    index = torch.zeros(1, dtype=torch.int64, device=device)
    bce, dice, sums = host.sample_bce_dice_forward(logits, ids, index, index, points)
    assert (bce.item(), dice.item()) == (0.0, 0.0)
    one, rows = torch.ones((), device=device), (index, index, points, sums)
    assert not host.sample_losses_backward(one, one, one, logits, ids, points, logsumexp, *rows).any()


def test_padding_rows_change_nothing(device):
    args = make_inputs((2, 6, 5, 7), (10, 14), 50, 4, torch.float32, torch.contiguous_format, device)
    logits, ids, _, image_index, slots, points = args
    padded = (torch.cat([image_index, image_index]), torch.cat([slots, 0 * slots]), torch.cat([points, points]))
    for function in (reference.sample_bce_dice, lambda *a: host.sample_bce_dice_forward(*a)[:2]):
        for one, other in zip(function(logits, ids, image_index, slots, points), function(logits, ids, *padded)):
            torch.testing.assert_close(one, other)


def test_rows_of_no_image_and_points_of_no_place_touch_nothing(device):
    """Indices that are wrong: no memory beside the tensors is read or written, and other rows are as they were."""
    args = make_inputs((2, 6, 5, 7), (10, 14), 40, 3, torch.float32, torch.contiguous_format, device)
    logits, ids, at, image_index, slots, points = args
    more = torch.tensor([-1, 2, 2**40, -(2**62)], device=device)
    wide = torch.cat([image_index, more]), torch.cat([slots, more.new_full((4,), 3)])
    wide_points = torch.cat([points, points[:1].expand(4, -1, -1)])
    sums = host.sample_bce_dice_forward(logits, ids, image_index, slots, points)
    wide_sums = host.sample_bce_dice_forward(logits, ids, *wide, wide_points)
    for ours, theirs in zip(wide_sums[:2], sums[:2]):
        torch.testing.assert_close(ours, theirs)
    ones = [torch.ones((), device=device)] * 3
    image_wise = (logits, ids, at, host.sample_ce_forward(logits, ids, at)[2])
    grad = host.sample_losses_backward(*ones, *image_wise, image_index, slots, points, sums[2])
    wide_grad = host.sample_losses_backward(*ones, *image_wise, *wide, wide_points, wide_sums[2])
    torch.testing.assert_close(wide_grad, grad)
    assert not host.slot_logits(logits, *wide, wide_points)[3:].any()
    for strange in (float("nan"), float("inf"), -float("inf"), 1e30):
        points[:, 0] = strange
        for result in (host.slot_logits(logits, image_index, slots, points), host.point_logits(logits, points[:2])):
            assert result.shape[-1] == 40


def test_nothing_to_sample(device):
    args = make_inputs((2, 6, 5, 7), (10, 14), 9, 3, torch.float32, torch.contiguous_format, device)
    logits, ids, points, image_index, slots, row_points = args
    rows = (image_index[:0], slots[:0], row_points[:0])
    bce, dice, sums = host.sample_bce_dice_forward(logits, ids, *rows)
    assert (bce.item(), dice.item(), sums.shape) == (0.0, 0.0, (0, 3))
    one = torch.ones((), device=device)
    loss, count, logsumexp = host.sample_ce_forward(logits[:0], ids[:0], points[:0])
    assert (loss.item(), count.item()) == (0.0, 0.0)
    none = (logits[:0], ids[:0], points[:0], logsumexp, *rows, sums)
    assert host.sample_losses_backward(one, one, one, *none).shape == (0, 6, 5, 7)
    ce, _, public_bce, public_dice = point_loss.sample_losses(logits.requires_grad_(), ids, points, *rows)
    (public_bce + public_dice + 0 * ce).backward()
    assert not logits.grad.any()


@pytest.mark.skipif(CUDA, reason="the CUDA kernels take no float64")
def test_gradients_of_the_ops(device):
    args = make_inputs((2, 6, 4, 5), (8, 9), 11, 3, torch.float64, torch.contiguous_format, device)
    logits, ids, points, image_index, slots, row_points = args
    logits.requires_grad_()
    points, rows = points.double(), (image_index, slots, row_points.double())
    weights = torch.rand(6, device=device)
    assert torch.autograd.gradcheck(lambda x: sample_ce_op(x, ids, points)[0], logits)
    assert torch.autograd.gradcheck(lambda x: sample_ce_op(x, ids, points, weights)[0], logits)
    each = (0, 2, 3)
    assert torch.autograd.gradcheck(lambda x: [sample_losses_op(x, ids, points, *rows)[i] for i in each], logits)
    assert torch.autograd.gradcheck(lambda x: sample_losses_op(x, ids, points, *rows)[2], logits)
    assert torch.autograd.gradcheck(lambda x: point_loss.point_logits(x, points), logits)
    assert torch.autograd.gradcheck(lambda x: point_loss.slot_logits(x, *rows), logits)


def test_ops(device, check_op):
    args = make_inputs((2, 6, 5, 7), (10, 14), 13, 3, torch.float32, torch.channels_last, device)
    logits, ids, points, image_index, slots, row_points = args
    rows = (image_index, slots, row_points)
    check_op(point_logits_op, (logits, points))
    check_op(point_margin_op, (logits, points))
    check_op(slot_logits_op, (logits, *rows))
    one = torch.ones((), device=device)
    check_op(sample_ce_op, (logits.clone().requires_grad_(), ids, points))
    check_op(sample_ce_op, (logits.clone().requires_grad_(), ids, points, torch.rand(6, device=device)))
    check_op(sample_losses_op, (logits.clone().requires_grad_(), ids, points, *rows))
    check_op(sample_ce_backward_op, (one, logits, ids, points, torch.zeros(2, 13, device=device)))
    statistics = torch.zeros(2, 13, device=device), torch.zeros(3, 3, device=device)
    saved = (logits, ids, points, statistics[0], *rows, statistics[1])
    check_op(sample_losses_backward_op, (one, one, one, *saved))


def test_public_functions(device):
    args = make_inputs((2, 6, 5, 7), (10, 14), 13, 3, torch.float32, torch.channels_last, device)
    logits, ids, points, image_index, slots, row_points = args
    rows = (image_index, slots, row_points)
    torch.testing.assert_close(point_loss.point_margin(logits, points), reference.point_margin(logits, points))
    torch.testing.assert_close(point_loss.slot_logits(logits, *rows), reference.slot_logits(logits, *rows))
    logits.requires_grad_()
    ce, count, bce, dice = point_loss.sample_losses(logits, ids, points, *rows)
    torch.testing.assert_close(point_loss.sample_ce(logits, ids, points), (ce, count))
    assert count.dtype == torch.float32 and not count.requires_grad
    (ce / count + bce + dice).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.any()


def test_bad_input(device, refuses):
    args = make_inputs((2, 6, 5, 7), (10, 14), 13, 3, torch.float32, torch.contiguous_format, device)
    logits, ids, points, image_index, slots, row_points = args
    ce, op = point_loss.sample_ce, sample_ce_op
    refuses("mask_logits", ce, op, (logits[0], ids, points))
    refuses("mask_logits", ce, op, (logits.long(), ids, points))
    refuses("points", ce, op, (logits, ids, points[:1]))
    refuses("points", ce, op, (logits, ids, points.double()))
    refuses("segment_ids", ce, op, (logits, ids[:1], points))
    refuses("segment_ids", ce, op, (logits, ids.float(), points))
    refuses("segment_ids", ce, op, (logits, ids.to("meta"), points), fake=False)
    refuses("weights", ce, op, (logits, ids, points, torch.ones(5, device=device)))
    refuses("weights", ce, op, (logits, ids, points, torch.ones(6, device=device).double()))
    refuses("mask_logits", point_loss.point_margin, point_margin_op, (logits[:, :1], points))
    all_, op = point_loss.sample_losses, sample_losses_op
    refuses("points", all_, op, (logits, ids, points[:1], image_index, slots, row_points))
    refuses("image_index", all_, op, (logits, ids, points, image_index.int(), slots, row_points))
    refuses("slots", all_, op, (logits, ids, points, image_index, slots[:1], row_points))
    refuses("slots", all_, op, (logits, ids, points, image_index, slots[None], row_points))
    refuses("row_points", all_, op, (logits, ids, points, image_index, slots, row_points[:2]))
    refuses("row_points", all_, op, (logits, ids, points, image_index, slots, row_points.double()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's values are not looked at")
def test_rows_of_what_is_not_there(refuses):
    args = make_inputs((2, 6, 5, 7), (10, 14), 13, 3, torch.float32, torch.contiguous_format, "cpu")
    logits, ids, points, image_index, slots, row_points = args
    for wrong in (image_index - 2, image_index + 2):
        refuses("image_index", point_loss.slot_logits, slot_logits_op, (logits, wrong, slots, row_points), fake=False)
    for wrong in (slots - 7, slots + 6):
        rows = (image_index, wrong, row_points)
        refuses("slots", point_loss.sample_losses, sample_losses_op, (logits, ids, points, *rows), fake=False)
    none = point_loss.slot_logits(logits, image_index[:0], slots[:0], row_points[:0])
    assert none.shape == (0, row_points.shape[1])
