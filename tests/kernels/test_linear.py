import pytest
import torch

from ldmseg_fast.kernels.configs import switched, trace_lookups
from ldmseg_fast.kernels.group_norm_silu.reference import find_moments
from ldmseg_fast.kernels.launch import record
from ldmseg_fast.kernels.linear import host, linear, reference
from ldmseg_fast.kernels.linear.op import linear_op

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (B, P, K, N), N in 8 groups: a chunk and a part of one, several blocks of K, odd sizes
SHAPES = [(2, 70, 40, 24), (1, 130, 136, 88), (1, 1, 8, 8), (3, 64, 63, 80)]
LAYERS = {
    "product": {},
    "bias": {"bias": True},
    "rows": {"norm": 1, "bias": True},
    "groups": {"norm": 2, "bias": True},
    "gate": {"norm": 1, "bias": True, "gated": True},
    "sum": {"bias": True, "residual": True, "groups": True},
    "beside": {"bias": True, "residual": True, "beside": 72, "groups": True},
    "everything": {"norm": 2, "bias": True, "residual": True, "beside": 9, "groups": True},
}


def make_arguments(shape, layer, dtype, device, mean=0.0):
    batch, pixels, inputs, outputs = shape
    x = (torch.randn(batch, pixels, inputs, device=device) + mean).to(dtype)
    more = layer.get("beside", 0)
    rows = outputs * (2 if layer.get("gated") else 1)
    weight = (torch.randn(rows, inputs + more, device=device) * (inputs + more) ** -0.5).to(dtype)
    bias = torch.randn(rows, device=device) if "bias" in layer else None
    gain, offset = (torch.randn(inputs, device=device) if "norm" in layer else None for _ in range(2))
    moments = None
    if layer.get("norm") == 2:
        moments = find_moments(x.transpose(1, 2)[..., None], 8 if inputs % 8 == 0 else 9)
    beside = torch.randn(batch, pixels, more, device=device).to(dtype) if more else None
    residual = torch.randn(batch, pixels, outputs, device=device).to(dtype) if "residual" in layer else None
    groups = 8 if "groups" in layer else 0
    return x, weight, bias, gain, offset, 1e-5, moments, beside, residual, layer.get("gated", False), groups


def exact(args):
    """In float64, with the normalised rows rounded as the kernel rounds them"""
    x, weight, bias, gain, offset, eps, moments, beside, residual, gated, _ = args
    double = [None if each is None else each.double() for each in (weight, bias, moments, beside, residual)]
    rows = x.double()
    if gain is not None:
        rows = (reference._normalise(rows, eps, double[2]) * gain.double() + offset.double()).to(x.dtype).double()
    return reference.linear(rows, *double[:2], beside=double[3], residual=double[4], gated=gated)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_kernel_equals_reference(name, shape, dtype, device, poison, close):
    args = make_arguments(shape, LAYERS[name], dtype, device)
    out, moments = host.linear(*args)
    close(out, exact(args))
    assert out.is_contiguous() and out.dtype == dtype
    if args[-1]:
        stored = out.double().transpose(1, 2)[..., None]
        close(moments, find_moments(stored, args[-1]), torch.float32)


@pytest.mark.parametrize("norm", [1, 2])
def test_a_large_mean_costs_few_digits(norm, device, poison):
    """Rows and groups whose mean is a thousand times their deviation, against float64."""
    args = make_arguments((1, 130, 72, 64), {"norm": norm, "residual": True, "groups": True}, torch.float32, device)
    x = args[0] + 1000
    if norm == 2:
        args = (*args[:6], find_moments(x.transpose(1, 2)[..., None], 8), *args[7:])
    out, _ = host.linear(x, *args[1:])
    wide = (x, *args[1:6], find_moments(x.double().transpose(1, 2)[..., None], 8) if norm == 2 else None, *args[7:])
    assert (out.double() - exact(wide)).abs().max() < 1e-3
    far, _ = host.linear(*args[:2], bias=torch.full((64,), 1000.0, device=device))
    made = host.linear(*args[:2], bias=torch.full((64,), 1000.0, device=device), num_groups=8)[1]
    best = find_moments(far.double().transpose(1, 2)[..., None], 8)
    torch.testing.assert_close(made.double(), best, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("splits", "inputs"), [(2, 136), (3, 40)])  # several blocks of columns each; some have none
@pytest.mark.parametrize("name", LAYERS)
def test_programs_share_a_tile(name, splits, inputs, device, poison, close):
    args = make_arguments((2, 70, inputs, 24), LAYERS[name], DTYPES[-1], device)
    with switched({"SPLITS": splits, "BLOCK_K": 32}):
        out, moments = host.linear(*args)
    close(out, exact(args))
    if args[-1]:
        close(moments, find_moments(out.double().transpose(1, 2)[..., None], args[-1]), torch.float32)


def test_splits_count_themselves():
    """A split layer is the kernel with more programs; the table of few tiles is asked where they are few."""
    args = make_arguments((1, 64, 1280, 1280), LAYERS["everything"], torch.float16, torch.device("meta"))
    with switched({"SPLITS": 4}), record() as launches:
        host.linear(*args)
    (split,) = launches
    with record() as launches, trace_lookups() as found:
        host.linear(*args)
        host.linear(*make_arguments((1, 4096, 320, 320), {}, torch.float16, torch.device("meta")))
    assert split.grid == (4, *launches[0].grid[1:])
    assert found == {("linear_moments_few", "all"), ("linear", "plain")}


def test_it_is_one_launch():
    """Whatever is asked for, for each layer of a transformer."""
    for layer in LAYERS.values():
        args = make_arguments((1, 4096, 320, 320), layer, torch.float16, torch.device("meta"))
        with record() as launches:
            out, moments = host.linear(*args)
        assert len(launches) == 1 and out.shape == (1, 4096, 320)
        assert moments.shape == ((1, 2, 64, 8) if args[-1] else (0,))


def test_op(device, check_op):
    dtype = torch.float16 if CUDA else torch.float32
    for name in ("product", "gate", "everything"):
        check_op(linear_op, make_arguments((2, 7, 9, 8), LAYERS[name], dtype, device))
    x, weight = torch.randn(2, 7, 9, device=device), torch.randn(4, 9, device=device)
    out, moments = linear(x, weight)
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-5)
    assert not moments.numel()


def test_nothing_to_do(device):
    for batch, pixels in ((0, 5), (2, 0)):
        x, weight = torch.zeros(batch, pixels, 8, device=device).half(), torch.zeros(4, 8, device=device).half()
        out, moments = host.linear(x, weight, num_groups=2)
        assert out.shape == (batch, pixels, 4) and not moments.any()
        assert [each.shape for each in reference.linear(x, weight, num_groups=2)] == [out.shape, moments.shape]


def test_bad_input(device, refuses):
    args = make_arguments((2, 7, 8, 16), LAYERS["everything"], torch.float32, device)
    gated = make_arguments((2, 7, 8, 16), LAYERS["gate"], torch.float32, device)
    names = ("x", "weight", "bias", "gain", "offset", "eps", "moments", "beside", "residual", "gated", "num_groups")
    for name, value in (
        ("x", args[0][0]),
        ("x", args[0].long()),
        ("weight", args[1][:, :5]),
        ("weight", args[1].double()),
        ("bias", args[2][:5]),
        ("bias", args[2].long()),
        ("gain", args[3][:5]),
        ("offset", None),
        ("moments", args[6][:, :1]),
        ("moments", args[6][:1]),
        ("moments", args[6].double()),
        ("beside", args[7][:, :3]),
        ("residual", args[8][..., :3]),
        ("num_groups", 5),
        ("residual", args[8].to("meta")),
    ):
        fake = not (isinstance(value, torch.Tensor) and value.is_meta)
        refuses(name, linear_op, linear_op, tuple({**dict(zip(names, args)), name: value}.values()), fake=fake)
    refuses("beside", linear_op, linear_op, (*gated[:7], args[7], *gated[8:]))
    refuses("weight", linear_op, linear_op, (gated[0], gated[1][:5], None, *gated[3:]))
    wanted = {name: value.clone().requires_grad_() for name, value in zip(names, args) if torch.is_tensor(value)}
    for name in wanted:
        given = {**dict(zip(names, args)), name: wanted[name]}
        norm = tuple(given.pop(part) for part in ("gain", "offset", "eps"))
        with pytest.raises(ValueError, match=f"^{name}: a gradient is wanted"):
            linear(**given, norm=norm)
