import pytest
import torch

from ldmseg_fast.kernels.group_norm_silu import group_norm_silu, host, reference
from ldmseg_fast.kernels.group_norm_silu.op import group_norm_silu_backward_op, group_norm_silu_op
from ldmseg_fast.kernels.launch import record

CUDA = torch.cuda.is_available()
# exp(-u) and exp2(-u) of a large -u are infinite on purpose: u / (1 + inf) = 0
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (B, C, groups, H, W): groups of 4, 10, 9 and 32 channels, one pixel, C without a power of two, odd sizes
SHAPES = [
    (2, 32, 8, 5, 7),
    (1, 40, 4, 9, 63),
    (1, 320, 32, 4, 5),
    (3, 36, 4, 3, 3),
    (1, 64, 2, 1, 1),
    (1, 64, 16, 100, 3),
]
EXTRAS = [
    "plain",
    "embedding, residual and vector",
    "shift, no activation",
    "scale and residual, no activation",
    "vector",
]


@pytest.fixture(params=["whole", "tiled", "tiled, several tiles a program"])
def path(request, monkeypatch):
    """The kernels for groups that one program holds, and the two ways of several launches"""
    monkeypatch.setattr(host, "MAX_WHOLE", 16384 if request.param == "whole" else 0)
    if "several" in request.param:
        monkeypatch.setattr(host, "MAX_CHUNKS", 2)
        monkeypatch.setattr(host, "MAX_PARTIALS", 16)


def make_inputs(shape, extras, dtype, device, mean=0.0):
    batch, channels, _, height, width = shape
    x = (torch.randn(batch, channels, height, width, device=device) + mean).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels, device=device), torch.randn(channels, device=device)
    scale = (
        torch.randn(batch, channels, device=device).to(dtype) if "embedding" in extras or "scale" in extras else None
    )
    shift = (
        torch.randn(batch, channels, device=device).to(dtype) if "embedding" in extras or "shift" in extras else None
    )
    residual = torch.randn_like(x) if "residual" in extras else None
    added = torch.randn(batch, channels, device=device).to(dtype) if "vector" in extras else None
    return x, weight, bias, scale, shift, residual, "no activation" not in extras, added


def double(tensor):
    return None if tensor is None else tensor.double()


def exact_forward(inputs, groups, eps):
    *tensors, silu, added = inputs
    args = [double(each) for each in (*tensors, added)]
    leaves = [each.requires_grad_() for each in args if each is not None]
    y = reference.group_norm_silu(*args[:3], groups, eps, *args[3:6], silu, args[6])
    return y, args, leaves


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, device, path, poison, close):
    groups, eps = shape[2], 1e-5
    for extras in EXTRAS if dtype == torch.float32 else EXTRAS[1:2]:
        inputs = make_inputs(shape, extras, dtype, device)
        x, weight, bias, scale, shift, residual, silu, added = inputs
        exact, args, leaves = exact_forward(inputs, groups, eps)
        y, mean, rstd = host.group_norm_silu_forward(x, weight, bias, groups, eps, scale, shift, residual, silu, added)
        close(y, exact.detach())
        assert y.is_contiguous(memory_format=torch.channels_last)

        grad_y = torch.randn_like(x)
        exact_grads = dict(zip(map(id, leaves), torch.autograd.grad(exact, leaves, grad_y.double())))
        grads = host.group_norm_silu_backward(grad_y, x, mean, rstd, weight, bias, scale, shift, silu, added)
        for actual, leaf in zip(grads, args):
            if leaf is not None:
                close(actual, exact_grads[id(leaf)], dtype)


@pytest.mark.parametrize("mean", [1000.0, -300.0])
def test_large_mean_keeps_the_variance(mean, device, path):
    inputs = make_inputs((2, 32, 8, 16, 16), "vector", torch.float32, device, mean)
    x, weight, bias, *_, silu, added = inputs
    y, _, _ = host.group_norm_silu_forward(x, weight, bias, 8, 1e-5, None, None, None, silu, added)
    exact, _, _ = exact_forward(inputs, 8, 1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=2e-3)


def test_vectors_of_any_stride(device, path, poison):
    """A row of a table that all images share, a slice of it, one that is not dense; forward and backward."""
    x, weight, bias, *_ = make_inputs((2, 32, 8, 5, 7), "plain", torch.float32, device)
    table, rest = torch.randn(3, 100, device=device), (None, None, None, True)
    sparse = torch.randn(2, 64, device=device)[:, ::2]
    for added in (table[1].expand(2, 100)[:, 7:39], sparse, table[:2, 50:82]):
        results = [
            host.group_norm_silu_forward(x, weight, bias, 8, 1e-5, *rest, each) for each in (added, added.contiguous())
        ]
        assert all(torch.equal(*pair) for pair in zip(*results))
        args = (x, x, *results[0][1:], weight, bias, None, None, True)
        grads = [host.group_norm_silu_backward(*args, each)[0] for each in (added, added.contiguous())]
        assert torch.equal(*grads)


def test_values_that_are_not_finite_stay_in_their_group(device, path):
    weight, rest = torch.ones(8, device=device), (None, None, None, True)
    x = torch.randn(2, 8, 4, 4, device=device)
    x[1, 5, 2, 2] = float("nan")
    y, _, _ = host.group_norm_silu_forward(x, weight, weight, 4, 1e-5, *rest)
    assert y[1, 4:6].isnan().all() and y[0].isfinite().all() and y[1, :4].isfinite().all()


@pytest.mark.parametrize(
    ("channels", "groups", "lanes"), [(320, 12, 120), (640, 6, 120), (960, 4, 120), (1280, 3, 120), (2560, 3, 240)]
)
def test_programs_take_whole_groups_in_rows_of_16_bytes(channels, groups, lanes):
    assert host.groups_of_a_program(32, channels // 32) == groups and groups * channels // 32 == lanes


@pytest.mark.parametrize(("groups", "per_group"), [(1, 1), (32, 1), (32, 4), (3, 7), (2, 600), (1, 33)])
def test_every_group_has_a_program(groups, per_group):
    assert 1 <= host.groups_of_a_program(groups, per_group) <= min(groups, host.MAX_GROUPS)


def test_two_launches_for_a_large_group_and_one_for_a_small():
    vector = torch.empty(320, device="meta")
    for side, count in ((64, 2), (16, 1)):
        x = torch.empty(2, 320, side, side, dtype=torch.bfloat16, device="meta")
        with record() as launches:
            host.group_norm_silu_forward(x, vector, vector, 32, 1e-5, None, None, None, True)
        assert len(launches) == count


def test_other_memory_formats_and_slices(device, path, poison, close):
    inputs = make_inputs((2, 32, 8, 5, 7), "embedding and residual", torch.float32, device)
    x, weight, bias, scale, shift, residual, silu, _ = inputs
    expected, *statistics = host.group_norm_silu_forward(x, weight, bias, 8, 1e-5, scale, shift, residual, silu)
    wide = torch.cat([x.contiguous(), x.contiguous()], 3)
    sliced = wide[..., :7]
    args = (weight, bias, 8, 1e-5, scale, shift, residual.contiguous(), silu)
    assert torch.equal(host.group_norm_silu_forward(sliced, *args)[0], expected)
    grad_y = torch.randn(1, 1, 1, 1, device=device).expand_as(x)
    args = (*statistics, weight, bias, scale, shift, silu)
    for one, other in zip(
        host.group_norm_silu_backward(grad_y, sliced, *args),
        host.group_norm_silu_backward(grad_y.contiguous(), x, *args),
    ):
        assert torch.equal(one, other)


def test_groups_of_one_number_are_their_bias(device, path):
    x, vector = torch.randn(1, 8, 1, 1, device=device), torch.randn(8, device=device)
    y, _, _ = host.group_norm_silu_forward(x, vector, vector, 8, 1e-5, None, None, None, False)
    torch.testing.assert_close(y.flatten(), vector, rtol=0, atol=2e-4)  # 1 / sqrt(eps) times a rounding error


def test_empty_batch(device):
    x = torch.zeros(0, 8, 4, 4, device=device)
    weight = torch.ones(8, device=device)
    y, mean, rstd = host.group_norm_silu_forward(x, weight, weight, 4, 1e-5, None, None, None, True)
    assert y.shape == x.shape and mean.shape == rstd.shape == (0, 4)
    grads = host.group_norm_silu_backward(y, x, mean, rstd, weight, weight, None, None, True)
    assert grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize("channels", [8, 30, 36, 320, 640, 960, 1280, 2560])
def test_channel_blocks_cover_the_channels(channels):
    block = host._channel_block(channels)
    assert block & (block - 1) == 0 and block <= 256
    assert {320: 64, 640: 128, 960: 64, 1280: 256, 2560: 256}.get(channels, block) == block


@pytest.mark.skipif(CUDA, reason="the CUDA kernel takes no float64")
@pytest.mark.parametrize("extras", EXTRAS)
def test_gradients_of_the_op(extras, device):
    inputs = make_inputs((2, 8, 4, 3, 5), extras, torch.float64, device)
    x, weight, bias, scale, shift, residual, silu, added = inputs
    given = (x, weight, bias, scale, shift, residual, added)
    leaves = [each.double().requires_grad_() for each in given if each is not None]
    present = [each is not None for each in given[3:]]

    def run(op):
        def function(x, weight, bias, *rest):
            rest = iter(rest)
            optional = [next(rest) if there else None for there in present]
            result = op(x, weight, bias, 4, 1e-5, *optional[:3], silu, optional[3])
            return result if isinstance(result, torch.Tensor) else result[0]

        return function

    assert torch.autograd.gradcheck(run(group_norm_silu_op), leaves)
    torch.testing.assert_close(run(group_norm_silu_op)(*leaves), run(group_norm_silu)(*leaves))


def test_parameters_keep_their_dtype(device):
    x = torch.randn(2, 8, 4, 4, device=device).half()
    weight, bias = (torch.randn(8, device=device).requires_grad_() for _ in range(2))
    scale = torch.randn(2, 8, device=device).half().requires_grad_()
    y = group_norm_silu_op(x, weight, bias, 4, 1e-5, scale, None, None, True)[0]
    y.float().sum().backward()
    assert (y.dtype, weight.grad.dtype, scale.grad.dtype) == (torch.float16, torch.float32, torch.float16)


def test_op(device, check_op):
    x, weight, bias, scale, shift, residual, silu, added = make_inputs(
        (2, 8, 4, 5, 3), "embedding, residual and vector", torch.float32, device
    )
    leaves = [each.requires_grad_() for each in (x, weight, bias, scale, shift, residual, added)]
    check_op(group_norm_silu_op, (*leaves[:3], 4, 1e-5, *leaves[3:6], silu, leaves[6]))
    check_op(group_norm_silu_op, (x, weight, bias, 4, 1e-5, None, None, None, False))
    mean, rstd = torch.zeros(2, 4, device=device), torch.ones(2, 4, device=device)
    args = (torch.ones_like(x), x, mean, rstd, weight, bias, scale, shift, True, added)
    check_op(group_norm_silu_backward_op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))


def test_bad_input(device, refuses):
    x = torch.zeros(2, 8, 4, 4, device=device)
    w, s = torch.zeros(8, device=device), torch.zeros(2, 8, device=device)
    good = {
        "x": x,
        "weight": w,
        "bias": w,
        "num_groups": 4,
        "eps": 1e-5,
        "scale": s,
        "shift": s,
        "residual": x,
        "silu": True,
        "added": s,
    }
    bad = {
        "x": [x[0], x.long()],
        "weight": [w[:4], w.bool(), w.to("meta")],
        "bias": [w[:4], w.to(torch.complex64)],
        "num_groups": [3, 0],
        "scale": [s[:1], s[0]],
        "shift": [s[:, :4]],
        "residual": [x[:1], x.double()],
        "added": [s[:1], s[0]],
    }
    for name, values in bad.items():
        for value in values:
            args = tuple({**good, name: value}.values())
            fake = not (isinstance(value, torch.Tensor) and value.is_meta)
            refuses(name, group_norm_silu, group_norm_silu_op, args, fake=fake)
