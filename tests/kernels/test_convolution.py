import pytest
import torch

from ldmseg_fast.kernels.configs import switched, trace_lookups
from ldmseg_fast.kernels.convolution import convolution, host, reference
from ldmseg_fast.kernels.convolution.op import convolution_op
from ldmseg_fast.kernels.group_norm_silu.reference import find_moments
from ldmseg_fast.kernels.launch import record

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
E4M3 = torch.float8_e4m3fn
# (B, C, h, w, N), N in 8 groups: a chunk and a part of one, several blocks of channels, odd sizes, a single cell
SHAPES = [(2, 24, 7, 10, 24), (1, 136, 9, 13, 88), (1, 8, 1, 1, 8), (3, 63, 8, 8, 80), (1, 12, 1, 5, 16)]
LAYERS = {
    "product": {},
    "bias": {"bias": True},
    "first of a block": {"added": True, "groups": True},
    "second of a block": {"bias": True, "residual": True, "groups": True},
    "smaller": {"bias": True, "stride": 2, "groups": True},
    "larger": {"bias": True, "upsample": True},
    "everything": {"bias": True, "added": True, "residual": True, "groups": True, "upsample": True, "stride": 2},
}
NAMES = (
    *("x", "weight", "bias", "added", "residual", "scale", "weight_scale", "stride", "upsample", "num_groups"),
    "dtype",
)


def make_arguments(shape, layer, dtype, device, fp8=False):
    """`dtype` is the result's, and with fp8 x and weight are e4m3."""
    batch, channels, height, width, outputs = shape
    kind = {"device": device, "memory_format": torch.channels_last}
    x = torch.randn(batch, channels, height, width).to(dtype=dtype, **kind)
    weight = (torch.randn(outputs, channels, 3, 3) * (9 * channels) ** -0.5).to(dtype=dtype, **kind)
    bias = torch.randn(outputs, device=device) if "bias" in layer else None
    added = torch.randn(batch, 3 * outputs, device=device)[:, outputs : 2 * outputs] if "added" in layer else None
    stride, upsample = layer.get("stride", 1), layer.get("upsample", False)
    residual = None
    if "residual" in layer:
        residual = torch.randn(reference.result_shape(x, weight, stride, upsample)).to(dtype=dtype, **kind)
    scale = weight_scale = None
    if fp8:
        scale, weight_scale = (torch.rand(size, device=device) + 0.01 for size in (batch, outputs))
        x, weight = ((each * gain).to(E4M3) for each, gain in ((x, 100), (weight, 1000)))
        scale, weight_scale = scale / 100, weight_scale / 1000
    groups = 8 if "groups" in layer else 0
    return x, weight, bias, added, residual, scale, weight_scale, stride, upsample, groups, dtype


def exact(args):
    double = [each.double() if isinstance(each, torch.Tensor) else each for each in args[:-1]]
    return reference.convolution(*double[:-1], 0, torch.float64)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_kernel_equals_reference(name, shape, dtype, device, poison, close):
    args = make_arguments(shape, LAYERS[name], dtype, device)
    out, moments = host.convolution(*args)
    close(out, exact(args))
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
    if args[-2]:
        close(moments, find_moments(out.double(), args[-2]), torch.float32)


def test_the_reference_is_a_convolution(device):
    """Of float64 operations that hold nothing of ours."""
    x, weight, bias, added, residual, *_ = make_arguments(SHAPES[0], LAYERS["everything"], torch.float64, device)
    out, moments = convolution(
        *(x, weight, bias), added=added, residual=residual, stride=2, upsample=True, num_groups=8
    )
    padded = torch.nn.functional.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1))
    windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)  # [B, C, h', w', 3, 3]
    expected = torch.einsum("bchwij,ncij->bnhw", windows, weight)
    expected = expected + bias[:, None, None].double() + added[..., None, None] + residual
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(moments, find_moments(expected, 8))


def test_another_layout_is_copied(device, poison, close):
    args = make_arguments(SHAPES[0], LAYERS["second of a block"], DTYPES[-1], device)
    plain = [each.contiguous() if isinstance(each, torch.Tensor) else each for each in args]
    assert all(torch.equal(*pair) for pair in zip(host.convolution(*plain), host.convolution(*args)))
    spread = (*args[:3], torch.ones(1, 24, device=device).expand(2, 24), *args[4:])  # one vector for all images
    close(host.convolution(*spread)[0], exact(spread))


def test_a_large_mean_costs_few_digits(device, poison):
    """Moments of a result whose mean is a thousand times its deviation, against float64."""
    args = make_arguments((1, 72, 9, 13, 64), LAYERS["second of a block"], torch.float32, device)
    far = (*args[:2], torch.full((64,), 1000.0, device=device), *args[3:])
    out, moments = host.convolution(*far)
    assert (out.double() - exact(far)).abs().max() < 1e-3
    best = find_moments(out.double(), 8)
    torch.testing.assert_close(moments.double(), best, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("splits", "channels"), [(2, 136), (4, 24), (16, 8)])  # the last: some have nothing to do
@pytest.mark.parametrize("fp8", [False, True], ids=["half", "fp8"])
@pytest.mark.parametrize("name", LAYERS)
def test_programs_share_a_tile(name, fp8, splits, channels, device, on_gpu, poison, close):
    if fp8 and on_gpu and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 products on this GPU")
    args = make_arguments((2, channels, 7, 10, 24), LAYERS[name], torch.float16, device, fp8)
    with switched({"SPLITS": splits, "BLOCK_K": 32}):
        out, moments = host.convolution(*args)
    close(out, exact(args))
    if args[-2]:
        close(moments, find_moments(out.double(), args[-2]), torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["product", "first of a block", "everything"])
def test_e4m3_numbers(name, dtype, shape, device, on_gpu, poison, close):
    """The result is that of the very same numbers in float64, times their scales."""
    if on_gpu and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 products on this GPU")
    args = make_arguments(shape, LAYERS[name], dtype, device, fp8=True)
    out, moments = host.convolution(*args)
    assert out.dtype == dtype
    close(out, exact(args))
    close(reference.convolution(*args)[0], exact(args))
    if args[-2]:
        close(moments, find_moments(out.double(), args[-2]), torch.float32)


def test_splits_count_themselves():
    """A split layer is the kernel with more programs; the tables of few tiles are asked where they are few."""
    few, many = (1, 1280, 8, 8, 1280), (1, 320, 64, 64, 320)
    args = make_arguments(few, LAYERS["second of a block"], torch.float16, torch.device("meta"))
    with switched({"SPLITS": 4}), record() as launches:
        host.convolution(*args)
    (split,) = launches
    with record() as launches, trace_lookups() as found:
        host.convolution(*args)
        host.convolution(*make_arguments(many, {}, torch.float16, torch.device("meta")))
        host.convolution(*make_arguments(many, {"groups": True}, torch.float16, torch.device("meta"), fp8=True))
    assert split.grid == (4, *launches[0].grid[1:])
    expected = {("convolution_moments_few", "half"), ("convolution", "half"), ("convolution_moments", "fp8")}
    assert found == expected


def test_it_is_one_launch():
    """Whatever is asked for, for each convolution of a UNet."""
    sides = {"smaller": 32, "larger": 128}
    for name, layer in LAYERS.items():
        for fp8 in (False, True):
            args = make_arguments((1, 320, 64, 64, 320), layer, torch.float16, torch.device("meta"), fp8)
            with record() as launches:
                out, moments = host.convolution(*args)
            side = sides.get(name, 64)
            assert len(launches) == 1 and out.shape == (1, 320, side, side)
            assert moments.shape == ((1, 2, side * side // 64, 8) if args[-2] else (0,))


def test_op(device, check_op):
    dtype = torch.float16 if CUDA else torch.float32
    for name in ("product", "larger", "everything"):
        check_op(convolution_op, make_arguments((2, 9, 4, 5, 8), LAYERS[name], dtype, device))
    x, weight = torch.randn(2, 9, 4, 5, device=device), torch.randn(4, 9, 3, 3, device=device)
    out, moments = convolution(x, weight)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
    assert not moments.numel()


def test_the_function_hands_its_arguments_on(device, close):
    args = make_arguments((2, 16, 4, 5, 8), LAYERS["everything"], torch.float16, device, fp8=True)
    x, weight, bias, added, residual, *scales, stride, upsample, num_groups, dtype = args
    more = {"stride": stride, "upsample": upsample, "num_groups": num_groups, "dtype": dtype}
    out, moments = convolution(x, weight, bias, added=added, residual=residual, scales=tuple(scales), **more)
    close(out, exact(args))
    close(moments, find_moments(out.double(), 8), torch.float32)


def test_nothing_to_do(device):
    for batch, height in ((0, 5), (2, 0)):
        x = torch.zeros(batch, 8, height, 3, device=device).half()
        weight = torch.zeros(4, 8, 3, 3, device=device).half()
        for stride, upsample in ((1, False), (2, False), (1, True)):
            args = (x, weight, None, None, None, None, None, stride, upsample, 2, torch.float16)
            out, moments = host.convolution(*args)
            assert out.shape == reference.result_shape(x, weight, stride, upsample) and not out.numel()
            assert not moments.any()
            assert [each.shape for each in convolution_op(*args)] == [out.shape, moments.shape]


def test_bad_input(device, refuses):
    args = make_arguments((2, 8, 4, 6, 16), LAYERS["second of a block"], torch.float32, device)
    args = (*args[:3], torch.zeros(2, 16, device=device), *args[4:])
    small = make_arguments((2, 8, 4, 6, 16), LAYERS["second of a block"], torch.float16, device, fp8=True)
    for given, name, value in (
        (args, "x", args[0][0]),
        (args, "x", args[0].long()),
        (args, "x", args[0][:, :0]),
        (args, "weight", args[1][:, :5]),
        (args, "weight", args[1][..., :1]),
        (args, "weight", args[1].double()),
        (args, "bias", args[2][:5]),
        (args, "bias", args[2].long()),
        (args, "added", args[3][:1]),
        (args, "added", args[3].long()),
        (args, "residual", args[4][..., :3]),
        (args, "residual", args[4].double()),
        (args, "residual", args[4].to("meta")),
        (args, "scale", torch.ones(2, device=device)),
        (args, "weight_scale", torch.ones(16, device=device)),
        (args, "stride", 3),
        (args, "num_groups", 5),
        (args, "dtype", torch.float16),
        (small, "scale", None),
        (small, "scale", torch.ones((), device=device)),
        (small, "weight_scale", small[6][:5]),
        (small, "weight_scale", small[6].half()),
        (small, "dtype", E4M3),
    ):
        changed = {**dict(zip(NAMES, given)), name: value}
        if name == "dtype":
            changed["residual"] = None
        fake = not (isinstance(value, torch.Tensor) and value.is_meta)
        refuses(name, convolution_op, convolution_op, tuple(changed.values()), fake=fake)
    for index, name in enumerate(NAMES[:7]):
        if name not in ("scale", "weight_scale"):
            wanted = [each if place != index else each.clone().requires_grad_() for place, each in enumerate(args)]
            with pytest.raises(ValueError, match=f"^{name}: a gradient is wanted"):
                convolution(*wanted[:3], added=wanted[3], residual=wanted[4])
