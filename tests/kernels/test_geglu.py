import pytest
import torch

from ldmseg_fast.kernels.geglu import geglu, host, reference
from ldmseg_fast.kernels.geglu.op import geglu_op

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


@pytest.mark.parametrize("shape", [(3, 5, 126), (2, 2, 200), (1, 2), (4, 2560), (3, 0), (0, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(shape, dtype, device, poison, close):
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    value, gate = x.double().chunk(2, dim=-1)
    y = host.geglu(x)
    close(y, value * torch.nn.functional.gelu(gate))
    assert y.is_contiguous() and y.dtype == dtype


def test_slices_are_copied(device, poison):
    x = torch.randn(4, 40, device=device)
    assert torch.equal(host.geglu(x[:, :20]), host.geglu(x[:, :20].contiguous()))


def test_op(device, check_op):
    x = torch.randn(2, 3, 8, device=device)
    check_op(geglu_op, (x,))
    torch.testing.assert_close(geglu(x), reference.geglu(x), rtol=1e-5, atol=1e-5)
    wide = x.double()
    torch.testing.assert_close(geglu(wide), reference.geglu(wide))


def test_bad_input(device, refuses):
    for x in (torch.zeros(2, 7, device=device), torch.zeros(2, 8, device=device).long(), torch.tensor(1.0)):
        refuses("x", geglu, geglu_op, (x,))
    with pytest.raises(ValueError, match=r"x: a gradient is wanted"):
        geglu(torch.zeros(2, 8, device=device, requires_grad=True))
