import pytest
import torch

from ldmseg_fast.kernels.added_layer_norm import added_layer_norm, host, reference
from ldmseg_fast.kernels.added_layer_norm.op import added_layer_norm_op

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 7, 320), (130, 1), (4, 63), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_equals_reference(shape, dtype, device, poison, close):
    x, channels = torch.randn(shape, device=device).to(dtype), shape[-1]
    vector, weight, bias = (torch.randn(channels, device=device) for _ in range(3))
    for added in (None, vector):
        y = host.added_layer_norm(x, added, weight, bias, 1e-5)
        wide = x.double() if added is None else x.double() + added.double()
        close(y, torch.layer_norm(wide, (channels,), weight.double(), bias.double(), 1e-5))
        assert y.is_contiguous() and y.dtype == dtype


def test_reference_and_op(device, check_op):
    added, weight, bias = (torch.randn(8, device=device) for _ in range(3))
    tokens = (torch.randn(3, 8, device=device), added, weight, bias, 1e-5)
    check_op(added_layer_norm_op, tokens)
    check_op(added_layer_norm_op, (tokens[0], None, *tokens[2:]))
    torch.testing.assert_close(added_layer_norm(*tokens), reference.added_layer_norm(*tokens), rtol=1e-5, atol=1e-5)


def test_bad_input(device, refuses):
    x, w = torch.zeros(2, 8, 4, 4, device=device), torch.zeros(8, device=device)
    good = {"x": x, "added": w[:4], "weight": w[:4], "bias": w[:4], "eps": 1e-5}
    for name, value in (
        ("x", x.long()),
        ("added", w),
        ("bias", w),
        ("bias", w[:4].bool()),
        ("added", w[:4].long()),
        ("weight", w[:4].to("meta")),
    ):
        fake = not value.is_meta
        refuses(name, added_layer_norm, added_layer_norm_op, tuple({**good, name: value}.values()), fake=fake)


def test_a_gradient_is_refused(device):
    x, vector = torch.zeros(2, 8, 4, 4, device=device, requires_grad=True), torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"x: a gradient is wanted"):
        added_layer_norm(x, None, vector, vector, 1e-5)
    with torch.no_grad():
        assert added_layer_norm(x, None, vector, vector, 1e-5).shape == x.shape
