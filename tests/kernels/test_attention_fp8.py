"""Attention with e4m3 products: the kernel against a reference that rounds in the same places, both against exact
attention. The interpreter's own conversion to e4m3 truncates, so the kernel rounds by integer arithmetic first there.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from ldmseg_fast.kernels import configs, fp8_error
from ldmseg_fast.kernels.attention import attention, host, reference
from ldmseg_fast.kernels.attention.fp8 import to_e4m3
from ldmseg_fast.kernels.attention.op import FP8_ARCHITECTURE, attention_fp8_op
from ldmseg_fast.kernels.backend import backend

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    CUDA and configs.current_architecture() < FP8_ARCHITECTURE, reason="this GPU has no products of e4m3"
)
# (B, N, M, heads, d)
SHAPES = [(2, 63, 63, 2, 40), (1, 100, 33, 2, 80), (1, 65, 130, 1, 160), (1, 16, 64, 2, 8), (1, 70, 70, 1, 64)]
SHAPES += [(1, 40, 257, 1, 40), *([(2, 1023, 1023, 8, 40), (1, 4096, 4096, 8, 80)] if CUDA else [])]
DTYPES = [torch.float16, *([torch.bfloat16] if CUDA else [])]
BOUND = 0.06  # relative error of normal inputs against exact attention; `kernels.fp8_error` prints 0.054 to 0.055


@pytest.fixture(autouse=True)
def an_architecture_that_has_it():
    with configs.architecture(configs.current_architecture() if CUDA else 90):
        yield


def make_inputs(shape, dtype, device):
    batch, tokens, keys, heads, head_size = shape
    q = torch.randn(batch, tokens, heads, head_size, device=device).to(dtype)
    k, v = (torch.randn(batch, keys, heads, head_size, device=device).to(dtype) for _ in range(2))
    return q, k, v


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_equals_reference(shape, dtype, device, poison):
    q, k, v = make_inputs(shape, dtype, device)
    scale = shape[-1] ** -0.5
    out = host.attention_fp8(q, k, v, scale)
    expected = reference.attention_fp8(q, k, v, scale)
    assert out.dtype == dtype and relative(out, expected) < torch.finfo(dtype).eps
    exact, _ = reference.attention_forward(q.double(), k.double(), v.double(), scale)
    assert relative(out, exact) < (BOUND if shape[2] > 32 and shape[-1] > 8 else 2 * BOUND)


@pytest.mark.parametrize("magnitudes", [(1e-4, 1e-4, 1e-2), (300.0, 2e-3, 6e4), (1.0, 0.0, 1.0)], ids=str)
def test_units_fit_any_magnitude(magnitudes, device):
    """Each head of each tensor has its own unit, so small ones keep their bits beside large ones."""
    q, k, v = make_inputs((1, 40, 50, 2, 40), torch.float32, device)
    for tensor, magnitude in zip((q, k, v), magnitudes):
        tensor *= magnitude / tensor.abs().amax((1, 3), keepdim=True)
        tensor[:, :, 1] *= 1 / 64
    q, k, v = (x.half() for x in (q, k, v))
    out = host.attention_fp8(q, k, v, 1.0)
    assert relative(out, reference.attention_fp8(q, k, v, 1.0)) < 1e-3
    for head in range(2):
        exact, _ = reference.attention_forward(q.double(), k.double(), v.double(), 1.0)
        assert relative(out[:, :, head], exact[:, :, head]) < 2 * BOUND


@triton.jit
def convert_kernel(source_ptr, target_ptr, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    offset = tl.arange(0, COUNT)
    tl.store(target_ptr + offset, to_e4m3(tl.load(source_ptr + offset), EMULATE))


def test_numbers_round_as_in_torch(device):
    """Every number of e4m3, halfway points, their neighbours, subnormal numbers."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    grid = codes[codes.abs() <= 256].unique()
    halfway = (grid[1:] + grid[:-1]) / 2
    values = torch.cat([grid, halfway, halfway * (1 + 1e-6), halfway * (1 - 1e-6), torch.randn(2000) * 0.01])
    values = torch.cat([values, torch.randn(4096 - values.numel()) * 40]).clamp(-256, 256).to(device)
    out = torch.empty(4096, dtype=torch.float8_e4m3fn, device=device)
    convert_kernel[(1,)](values, out, COUNT=4096, EMULATE=not CUDA)
    assert torch.equal(out.float(), values.to(torch.float8_e4m3fn).float())


def test_slices_of_a_fused_projection(device, poison):
    q, k, v = torch.randn(2, 50, 3, 2, 40, device=device).half().unbind(2)
    dense = host.attention_fp8(q.contiguous(), k.contiguous(), v.contiguous(), 0.2)
    assert torch.equal(host.attention_fp8(q, k, v, 0.2), dense)


def test_order_of_keys_does_not_matter(device):
    """The running maximum moves by whole powers of two, so that weights are quantised alike in every block."""
    q, k, v = make_inputs((1, 33, 300, 1, 40), torch.float16, device)
    order = torch.randperm(300, device=device)
    out = host.attention_fp8(q, k, v, 0.3)
    assert relative(host.attention_fp8(q, k[:, order], v[:, order], 0.3), out) < 1e-4


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_empty(batch, tokens, device):
    q, k = torch.zeros(batch, tokens, 2, 8, device=device).half(), torch.zeros(batch, 5, 2, 8, device=device).half()
    assert host.attention_fp8(q, k, k, 1.0).shape == q.shape
    assert attention(q, k, k, 1.0, fp8=True).shape == q.shape


@pytest.mark.parametrize("head_size", range(8, 161, 8))
def test_split_of_the_reduction(head_size):
    first, second = host.split_head(head_size, 32)
    paid = first if first >= head_size else first + second
    assert first >= 32 and second >= 32 and head_size <= paid
    assert {40: 64, 80: 96, 160: 160}.get(head_size, paid) == paid


def test_public_function(device):
    q, k, v = make_inputs((2, 33, 20, 2, 40), torch.float16, device)
    out = attention(q, k, v, fp8=True)
    expected = reference.attention_fp8(q, k, v, 40**-0.5)
    assert relative(out, expected) < 1e-3 and out.is_contiguous()
    assert relative(attention(q, k, v), expected) > 1e-2, "off unless asked for"
    with backend("attention", "torch"):
        assert torch.equal(attention(q, k, v, fp8=True), expected)


def test_op(device, check_op):
    check_op(attention_fp8_op, (*make_inputs((2, 9, 5, 3, 8), torch.float16, device), 0.3))


def test_one_graph_under_compile(device):
    q, k, v = make_inputs((2, 9, 5, 3, 8), torch.float16, device)
    compiled = torch.compile(lambda *args: attention(*args, fp8=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, fp8=True))


def test_refused(device, refuses):
    q = torch.zeros(2, 4, 2, 8, device=device)

    def call(q, k, v, scale):
        return attention(q, k, v, scale, fp8=True)

    for dtype in (torch.float32, torch.float64):
        refuses("fp8", call, attention_fp8_op, (q.to(dtype),) * 3 + (1.0,))
    refuses("q", call, attention_fp8_op, (q[..., :5].half(),) * 3 + (1.0,))
    refuses("v", call, attention_fp8_op, (q.half(), q.half(), q[:, :3].half(), 1.0))
    leaf = q.half().requires_grad_()
    with pytest.raises(ValueError, match=r"^fp8: has no gradient; call it under torch\.no_grad"):
        attention(leaf, leaf, leaf, fp8=True)
    with torch.no_grad():
        attention(leaf, leaf, leaf, fp8=True)
    with FakeTensorMode(), configs.architecture(80):
        on_gpu = torch.empty(2, 4, 2, 8, dtype=torch.float16, device="cuda")
        with pytest.raises(ValueError, match=r"^fp8: needs a GPU of sm_89 or newer, this is sm_80$"):
            attention(on_gpu, on_gpu, on_gpu, fp8=True)


def test_not_in_an_exported_graph(device):
    class Module(torch.nn.Module):
        def forward(self, q):
            return attention(q, q, q, fp8=True)

    with pytest.raises(Exception, match="fp8: not in an exported graph"):
        torch.export.export(Module(), (torch.zeros(1, 4, 2, 8, device=device).half(),))


def test_the_error_command(capsys):
    assert fp8_error.main(["--tokens", "64", "--images", "1", "--heads", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == len(fp8_error.INPUTS) * len(fp8_error.HEAD_SIZES)
    for *_, half, scores, whole in rows:
        assert float(half) < float(scores) < float(whole) < 0.15
