import pytest
import torch

from ldmseg_fast.kernels.added_norm import added_group_norm, added_layer_norm, host, reference
from ldmseg_fast.kernels.added_norm.op import added_group_norm_op, added_layer_norm_op
from ldmseg_fast.kernels.launch import record

CUDA = torch.cuda.is_available()
# exp2(-u) of a large -u is infinite on purpose: u / (1 + inf) = 0
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (B, C, groups, H, W): groups of 4, 10, 9 and 2 channels, one pixel, groups that are no block of lanes, odd sizes
SHAPES = [
    (2, 32, 8, 5, 7),
    (1, 40, 4, 9, 63),
    (1, 320, 32, 4, 5),
    (3, 36, 4, 3, 3),
    (1, 8, 4, 1, 1),
    (1, 64, 16, 50, 3),
]


@pytest.fixture(params=["whole", "tiled", "tiled, several tiles a program"])
def path(request, monkeypatch):
    """The kernel for groups that one program holds, and the two ways of the two launches"""
    monkeypatch.setattr(host, "MAX_WHOLE", 16384 if request.param == "whole" else 0)
    if "several" in request.param:
        monkeypatch.setattr(host, "MAX_CHUNKS", 2)
    return request.param


def make_inputs(shape, dtype, device, mean=0.0):
    batch, channels, _, height, width = shape
    x = (torch.randn(batch, channels, height, width, device=device) + mean).to(dtype)
    weight, bias = torch.randn(channels, device=device), torch.randn(channels, device=device)
    added = torch.randn(batch, channels, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), added, weight, bias


def exact_group(x, added, weight, bias, groups, silu):
    wide = x.double() if added is None else x.double() + added.double()[:, :, None, None]
    y = torch.group_norm(wide, groups, weight.double(), bias.double(), 1e-5)
    return torch.nn.functional.silu(y) if silu else y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(shape, dtype, device, path, poison, close):
    x, vector, weight, bias = make_inputs(shape, dtype, device)
    for added, silu in [(vector, True), (None, False)][: 2 if dtype == torch.float32 else 1]:
        y = host.added_group_norm(x, added, weight, bias, shape[2], 1e-5, silu)
        close(y, exact_group(x, added, weight, bias, shape[2], silu))
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype


@pytest.mark.parametrize("mean", [1000.0, -300.0])
def test_a_large_mean_keeps_the_variance(mean, device, path):
    x, added, weight, bias = make_inputs((2, 32, 8, 16, 16), torch.float32, device, mean)
    y = host.added_group_norm(x, added, weight, bias, 8, 1e-5, True)
    exact = exact_group(x, added, weight, bias, 8, True)
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=2e-3)


def test_vectors_of_any_stride_and_other_layouts(device, path, poison):
    """A row of a table that all images share, a slice of it, one that is not dense; planes in the place of rows."""
    x, _, weight, bias = make_inputs((2, 32, 8, 5, 7), torch.float32, device)
    table = torch.randn(3, 100, device=device)
    shared = table[1].expand(2, 100)[:, 7:39]
    sparse = torch.randn(2, 64, device=device)[:, ::2]
    for added in (shared, sparse, table[:2, 50:82]):
        expected = host.added_group_norm(x, added.contiguous(), weight, bias, 8, 1e-5, True)
        assert torch.equal(host.added_group_norm(x, added, weight, bias, 8, 1e-5, True), expected)
    for each in (x.contiguous(), torch.cat([x, x], 3)[..., :7]):
        assert torch.equal(host.added_group_norm(each, added, weight, bias, 8, 1e-5, True), expected)


def test_nothing_and_values_that_are_not_finite(device, path):
    weight = torch.ones(8, device=device)
    assert (
        host.added_group_norm(torch.zeros(0, 8, 4, 4, device=device), None, weight, weight, 4, 1e-5, True).numel() == 0
    )
    x = torch.randn(2, 8, 4, 4, device=device)
    x[1, 5, 2, 2] = float("nan")
    y = host.added_group_norm(x, None, weight, weight, 4, 1e-5, True)
    assert y[1, 4:6].isnan().all() and y[0].isfinite().all() and y[1, :4].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 7, 320), (130, 1), (4, 63), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers(shape, dtype, device, poison, close):
    x, channels = torch.randn(shape, device=device).to(dtype), shape[-1]
    vector, weight, bias = (torch.randn(channels, device=device) for _ in range(3))
    for added in (None, vector):
        y = host.added_layer_norm(x, added, weight, bias, 1e-5)
        wide = x.double() if added is None else x.double() + added.double()
        close(y, torch.layer_norm(wide, (channels,), weight.double(), bias.double(), 1e-5))
        assert y.is_contiguous() and y.dtype == dtype


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
            host.added_group_norm(x, None, vector, vector, 32, 1e-5, True)
        assert len(launches) == count


def test_references_and_ops(device, check_op):
    x, added, weight, bias = make_inputs((2, 8, 4, 5, 3), torch.float32, device)
    args = (x, added, weight, bias, 4, 1e-5, True)
    check_op(added_group_norm_op, args)
    check_op(added_group_norm_op, (x, None, weight, bias, 4, 1e-5, False))
    torch.testing.assert_close(added_group_norm(*args), reference.added_group_norm(*args), rtol=1e-5, atol=1e-5)
    tokens = (torch.randn(3, 8, device=device), added[0], weight, bias, 1e-5)
    check_op(added_layer_norm_op, tokens)
    check_op(added_layer_norm_op, (tokens[0], None, *tokens[2:]))
    torch.testing.assert_close(added_layer_norm(*tokens), reference.added_layer_norm(*tokens), rtol=1e-5, atol=1e-5)


def test_bad_input(device, refuses):
    x = torch.zeros(2, 8, 4, 4, device=device)
    w, s = torch.zeros(8, device=device), torch.zeros(2, 8, device=device)
    good = {"x": x, "added": s, "weight": w, "bias": w, "num_groups": 4, "eps": 1e-5, "silu": True}
    bad = {"x": [x[0], x.long()], "added": [s[:1], s[0]], "weight": [w[:4], w.to("meta")], "num_groups": [3, 0]}
    for name, values in bad.items():
        for value in values:
            fake = not (isinstance(value, torch.Tensor) and value.is_meta)
            refuses(name, added_group_norm, added_group_norm_op, tuple({**good, name: value}.values()), fake=fake)
    good = {"x": x, "added": w[:4], "weight": w[:4], "bias": w[:4], "eps": 1e-5}
    for name, value in (("x", x.long()), ("added", w), ("bias", w)):
        refuses(name, added_layer_norm, added_layer_norm_op, tuple({**good, name: value}.values()))


def test_a_gradient_is_refused(device):
    x, vector = torch.zeros(2, 8, 4, 4, device=device, requires_grad=True), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"x: a gradient is wanted"):
        added_group_norm(x, None, vector, vector, 4, 1e-5, True)
    with pytest.raises(ValueError, match=r"x: a gradient is wanted"):
        added_layer_norm(x[..., :0], None, vector[:0], vector[:0], 1e-5)
    with torch.no_grad():
        assert added_group_norm(x, None, vector, vector, 4, 1e-5, True).shape == x.shape
