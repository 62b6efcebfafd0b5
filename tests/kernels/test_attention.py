from itertools import product

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ldmseg_fast.kernels import launch
from ldmseg_fast.kernels.attention import attention, host, reference
from ldmseg_fast.kernels.attention.forward import exp2_by_fma
from ldmseg_fast.kernels.attention.op import attention_backward_op, attention_forward_op
from ldmseg_fast.kernels.configs import all_configs, architecture, trace_lookups

CUDA = torch.cuda.is_available()
DTYPES = [torch.float16, *([torch.bfloat16] if CUDA else [])]
# (B, N, M, heads, d)
SHAPES = [(2, 63, 63, 2, 40), (1, 100, 33, 2, 80), (1, 65, 130, 1, 160), (1, 16, 64, 2, 8), (1, 70, 70, 1, 64)]
SHAPES += [(1, 500, 500, 1, 40), *([(2, 1023, 1023, 8, 40), (1, 4096, 4096, 8, 80)] if CUDA else [])]


def make_inputs(shape, dtype, device):
    torch.manual_seed(0)
    batch, tokens, keys, heads, head_size = shape
    q, grad = (torch.randn(batch, tokens, heads, head_size, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, heads, head_size, device=device).to(dtype) for _ in range(2))
    return q, k, v, grad


def torch_attention(q, k, v, grad):
    """Result and gradients of torch's own attention, in the dtype of its inputs"""
    q, k, v = (each.detach().clone().requires_grad_() for each in (q, k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def switch(monkeypatch, **constants):
    """Puts constants into all forward configurations."""
    for name in ("attention_forward", "attention_forward_few"):
        for classes in all_configs()[name].values():
            for config, (constant, value) in product(classes.values(), constants.items()):
                monkeypatch.setitem(config.constants, constant, value)


@pytest.mark.parametrize(
    ("batch", "tokens", "few"), [(1, 4096, False), (1, 1024, True), (16, 256, False), (1, 64, True)]
)
def test_blocks_go_by_tokens_and_batch(batch, tokens, few):
    q = torch.empty(batch, tokens, 8, 40, dtype=torch.float16, device="meta")
    with architecture(90), trace_lookups() as found, launch.record():
        host.attention_forward(q, q, q, 1.0)
    assert found == {("attention_forward_few" if few else "attention_forward", "d48")}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_more_than_twice_the_error_of_torch(shape, dtype, device, poison):
    q, k, v, grad = make_inputs(shape, dtype, device)
    scale = shape[-1] ** -0.5
    out, logsumexp = host.attention_forward(q, k, v, scale)
    names = ["out", "grad_q", "grad_k", "grad_v"]
    actual = [out]
    if shape[1] != 500 or CUDA:  # the interpreter takes its time
        actual += host.attention_backward(grad, q, k, v, out, logsumexp, scale)
    exact = torch_attention(*(each.double() for each in (q, k, v, grad)))
    theirs = torch_attention(q, k, v, grad)
    for name, ours, best, usual in zip(names, actual, exact, theirs):
        error, their_error = (float((each.double() - best).abs().max()) for each in (ours, usual))
        rounding = torch.finfo(dtype).eps * float(best.abs().max())
        assert error <= 2 * max(their_error, rounding / 2), f"{name}: {error:.1e} against torch's {their_error:.1e}"
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * scale
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 63, 70, 2, 40), (1, 65, 33, 1, 160)], ids=str)
def test_blocks_of_many_programs(shape, device, poison, monkeypatch, close):
    monkeypatch.setattr(host, "FEW_PROGRAMS", 0)
    q, k, v, _ = make_inputs(shape, torch.float16, device)
    out, logsumexp = host.attention_forward(q, k, v, 0.1)
    exact, exact_logsumexp = reference.attention_forward(q.double(), k.double(), v.double(), 0.1)
    close(out, exact)
    close(logsumexp, exact_logsumexp)


def test_padded_heads_are_a_tuned_choice(device, poison, monkeypatch, close):
    switch(monkeypatch, PADDED=1)
    q, k, v, _ = make_inputs((2, 63, 70, 2, 40), torch.float16, device)
    out, logsumexp = host.attention_forward(q, k, v, 0.2)
    exact, exact_logsumexp = reference.attention_forward(q.double(), k.double(), v.double(), 0.2)
    close(out, exact)
    close(logsumexp, exact_logsumexp)


SWITCHES = [{"DELAYED": 1}, {"QUARTERS": 1}, {"QUARTERS": 2, "DELAYED": 1}, {"DESCRIBED": 1}]
SWITCHES += [{"DESCRIBED": 1, "PADDED": 1}, {"DESCRIBED": 1, "DELAYED": 1}]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("keys", [33, 64, 200])
def test_switches_of_the_forward_pass(switches, keys, device, poison, monkeypatch):
    """A block's values a block later, and polynomials in the place of exponentials, are held to torch's own error."""
    switch(monkeypatch, **switches)
    q, k, v, grad = make_inputs((2, 63, keys, 2, 40), DTYPES[-1], device)
    out, logsumexp = host.attention_forward(q, k, v, 40**-0.5)
    best, *_ = torch_attention(*(each.double() for each in (q, k, v, grad)))
    theirs, *_ = torch_attention(q, k, v, grad)
    error, usual = (float((each.double() - best).abs().max()) for each in (out, theirs))
    rounding = torch.finfo(q.dtype).eps * float(best.abs().max())
    assert error <= 2 * max(usual, rounding / 2), f"{error:.1e} against torch's {usual:.1e}"
    _, exact_logsumexp = reference.attention_forward(q.double(), k.double(), v.double(), 40**-0.5)
    torch.testing.assert_close(logsumexp.double(), exact_logsumexp, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(1, 17, 40, 2, 8), (1, 17, 40, 2, 160), (2, 17, 1, 2, 40), (2, 1, 40, 1, 80)], ids=str
)
def test_described_tiles(shape, device, poison, monkeypatch, close):
    """Of narrow and wide heads, of single rows, and of slices of one projection."""
    switch(monkeypatch, DESCRIBED=1)
    q, k, v, _ = make_inputs(shape, torch.float16, device)
    k, v = torch.cat([k, v], 2).tensor_split(2, 2)
    out, logsumexp = host.attention_forward(q, k, v, 0.2)
    exact, exact_logsumexp = reference.attention_forward(q.double(), k.double(), v.double(), 0.2)
    close(out, exact)
    close(logsumexp, exact_logsumexp)


def test_a_single_key_is_not_described(monkeypatch):
    switch(monkeypatch, DESCRIBED=1)
    q = torch.empty(2, 100, 2, 40, dtype=torch.float16, device="meta")
    with launch.record() as launches:
        host.attention_forward(q, q[:, :1], q[:, :1], 1.0)
        host.attention_forward(q, q, q, 1.0)
    assert [each.constants["DESCRIBED"] for each in launches] == [0, 1]


@triton.jit
def polynomial_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(y_ptr + at, exp2_by_fma(tl.load(x_ptr + at)))


def test_exponentials_by_a_polynomial(device):
    """Also of the NaN that a GPU's arithmetic makes, whose bits are all ones."""
    x = -torch.linspace(0, 140, 256, device=device)
    x[3], x[5], x[7] = float("-inf"), float("nan"), torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)
    y = torch.empty_like(x)
    polynomial_kernel[(1,)](x, y, COUNT=256)
    torch.testing.assert_close(y, x.clamp(min=-125).exp2(), rtol=1e-4, atol=0.0, equal_nan=True)


def test_a_nan_is_not_lost_in_a_polynomial(device, monkeypatch):
    switch(monkeypatch, QUARTERS=2)
    q, k, v, _ = make_inputs((1, 63, 70, 1, 40), DTYPES[-1], device)
    k[0, 3] = float("nan")
    assert host.attention_forward(q, k, v, 0.2)[0].isnan().all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value)")  # in rows beyond the last key, which nobody stores
@pytest.mark.parametrize("score", [-30.0, 30.0])
def test_keys_that_fill_a_block_add_nothing(score, device, poison, close):
    """All scores lie far below, or above, the 0 that a key beyond the end would have."""
    q, k, v, grad = make_inputs((2, 63, 70, 2, 40), torch.float16, device)
    q, k = 0.1 * q + 1, 0.1 * k + score / 40
    out, logsumexp = host.attention_forward(q, k, v, 1.0)
    exact = [each.double() for each in (q, k, v)]
    exact_out, exact_logsumexp = reference.attention_forward(*exact, 1.0)
    close(out, exact_out)
    actual = host.attention_backward(grad, q, k, v, out, logsumexp, 1.0)
    for ours, best in zip(actual, reference.attention_backward(grad.double(), *exact, exact_out, exact_logsumexp, 1.0)):
        close(ours, best)


@pytest.mark.parametrize("shape", [(4, 4096, 8, 40), (16, 256, 8, 160)] if CUDA else [(1, 70, 1, 40)], ids=str)
def test_repeats_are_the_same_bit_for_bit(shape, device):
    """A product that reads shared memory before its copy has arrived is rare, and differs from run to run."""
    q, k, v, grad = (torch.randn(shape, device=device).to(DTYPES[-1]) for _ in range(4))
    scale = shape[-1] ** -0.5

    def results():
        out, logsumexp = host.attention_forward(q, k, v, scale)
        return out, logsumexp, *host.attention_backward(grad, q, k, v, out, logsumexp, scale)

    first = results()
    for _ in range(100 if CUDA else 1):
        assert all(torch.equal(one, other) for one, other in zip(first, results()))


def test_slices_of_a_fused_projection(device, poison):
    heads, head_size, scale = 2, 40, 0.2
    qkv = torch.randn(2, 50, 3, heads, head_size, device=device).half()
    q, k, v = qkv.unbind(2)
    assert host.in_units(q).data_ptr() == q.data_ptr(), "the slices are meant to be read where they lie"
    out, logsumexp = host.attention_forward(q, k, v, scale)
    plain, _ = host.attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), scale)
    assert torch.equal(out, plain)
    grad = torch.randn(2, heads, 50, head_size, device=device).half().transpose(1, 2)
    strided = host.attention_backward(grad, q, k, v, out, logsumexp, scale)
    dense = host.attention_backward(
        grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), out, logsumexp, scale
    )
    for one, other in zip(strided, dense):
        assert torch.equal(one, other)


def test_rows_off_sixteen_bytes_are_copied(device):
    wide = torch.randn(1, 9, 2, 44, device=device).half()
    q = wide[..., 1:41]
    out, _ = host.attention_forward(q, q, q, 0.2)
    assert torch.equal(out, host.attention_forward(*(q.contiguous(),) * 3, 0.2)[0])


def test_empty_batch_and_no_queries(device):
    for batch, tokens in ((0, 5), (2, 0)):
        q = torch.zeros(batch, tokens, 2, 8, device=device).half()
        k = torch.zeros(batch, 5, 2, 8, device=device).half()
        out, logsumexp = host.attention_forward(q, k, k, 1.0)
        assert out.shape == q.shape and logsumexp.shape == (batch, 2, tokens)
        grads = host.attention_backward(out, q, k, k, out, logsumexp, 1.0)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
        assert not any(grad.isnan().any() for grad in grads[1:])


@pytest.mark.parametrize("head_size", range(8, 161, 8))
def test_split_covers_the_head(head_size):
    first, second = host.split_head(head_size)
    assert first >= 16 and second >= 16 and first & (first - 1) == 0 and second & (second - 1) == 0
    paid = first if first >= head_size else first + second
    assert head_size <= paid <= 2 * max(head_size, 16)
    assert {40: 48, 80: 80, 160: 160}.get(head_size, paid) == paid


def test_gradients_of_the_op(device):
    q, k, v = (torch.randn(2, n, 2, 8, device=device, dtype=torch.float64, requires_grad=True) for n in (5, 4, 4))
    if not CUDA:
        assert torch.autograd.gradcheck(lambda *args: attention_forward_op(*args, 0.3)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *args: attention(*args, 0.3), (q, k, v))


def test_public_function(device):
    q, k, v, grad = make_inputs((2, 33, 20, 2, 40), torch.float16 if CUDA else torch.float32, device)
    inputs = [each.requires_grad_() for each in (q, k, v)]
    out = attention(*inputs)
    grads = torch.autograd.grad(out, inputs, grad)
    exact = torch_attention(*(each.detach().double() for each in (q, k, v, grad)))
    for actual, expected in zip([out, *grads], exact):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2 if CUDA else 1e-5)


def test_op(device, check_op):
    dtype = torch.float16 if CUDA else torch.float32
    q, k, v, grad = (each.requires_grad_() for each in make_inputs((2, 9, 5, 3, 8), dtype, device))
    check_op(attention_forward_op, (q, k, v, 0.3))
    out, logsumexp = (each.detach() for each in attention_forward_op(q, k, v, 0.3))
    args = (grad.detach(), q.detach(), k.detach(), v.detach(), out, logsumexp, 0.3)
    check_op(attention_backward_op, args)


def test_reference_backward_is_the_gradient_of_its_forward(device):
    q, k, v, grad = (each.double() for each in make_inputs((1, 7, 6, 2, 8), torch.float32, device))
    out, logsumexp = reference.attention_forward(q, k, v, 8**-0.5)
    exact = torch_attention(q, k, v, grad)
    for actual, expected in zip([out, *reference.attention_backward(grad, q, k, v, out, logsumexp, 8**-0.5)], exact):
        torch.testing.assert_close(actual, expected)


def test_bad_input(device, refuses):
    q = torch.zeros(2, 4, 2, 8, device=device)
    op = attention_forward_op
    refuses("q", attention, op, (q[0], q, q, 1.0))
    refuses("q", attention, op, (q.long(), q, q, 1.0))
    refuses("q", attention, op, (q[..., :5],) * 3 + (1.0,))
    refuses("q", attention, op, (torch.zeros(1, 1, 1, 168, device=device),) * 3 + (1.0,))
    refuses("k", attention, op, (q, q[:1], q, 1.0))
    refuses("k", attention, op, (q, q.double(), q, 1.0))
    refuses("k", attention, op, (q, q[:, :0], q[:, :0], 1.0))
    refuses("v", attention, op, (q, q, q[:, :3], 1.0))
    refuses("scale", attention, op, (q, q, q, 0.0))
    refuses("k", attention, op, (q, q.to("meta"), q, 1.0), fake=False)
