"""Which implementation runs: on a CPU and in an exported graph torch's own ops, on CUDA ours, unless switched back."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmseg_fast.kernels import backend
from ldmseg_fast.kernels.attention import attention
from ldmseg_fast.kernels.ddim_step import ddim_step
from ldmseg_fast.kernels.group_norm_silu import group_norm_silu
from ldmseg_fast.kernels.mask_bits import decode_mask_bits, encode_mask_bits
from ldmseg_fast.kernels.panoptic_head import panoptic_head
from ldmseg_fast.kernels.point_loss import sample_ce, sample_losses

CUDA = torch.cuda.is_available()


class OpNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))

    @property
    def ours(self) -> set[str]:
        return {name for name in self.names if name.startswith("ldmseg_fast::")}


def calls(device) -> dict[str, tuple[str, Callable[..., object], tuple[Tensor, ...]]]:
    """op -> (kernel, a function of tensors only, those tensors)"""
    dtype = torch.float16 if CUDA else torch.float32
    q = torch.randn(2, 9, 2, 8, device=device, dtype=dtype)
    x = torch.randn(2, 8, 4, 4, device=device)
    weight = torch.ones(8, device=device)
    ids = torch.randint(0, 8, (2, 6, 6), device=device, dtype=torch.uint8)
    points = torch.rand(2, 5, 2, device=device)
    rows = torch.tensor([0, 1], device=device)
    step, table = torch.tensor(0, device=device), torch.full((3, 4), 0.5, device=device)
    return {
        "encode_mask_bits": ("mask_bits", lambda ids: encode_mask_bits(ids, 7), (ids,)),
        "decode_mask_bits": ("mask_bits", decode_mask_bits, (x,)),
        "attention_forward": ("attention", attention, (q, q, q)),
        "panoptic_head": ("panoptic_head", lambda x: panoptic_head(x, (8, 8), (9, 7), 0.5, 1, 0.5), (x,)),
        "group_norm_silu": ("group_norm_silu", lambda x, w: group_norm_silu(x, w, w, 4, 1e-5), (x, weight)),
        "ddim_step": ("ddim_step", ddim_step, (x, x, x, step, table)),
        "sample_ce": ("point_loss", sample_ce, (x, ids, points)),
        "sample_losses": ("point_loss", sample_losses, (x, ids, points, rows, rows, points)),
    }


OPS = list(calls("cpu"))
OPAQUE_ON_CPU = {"encode_mask_bits", "panoptic_head"}  # they look at values, and C++ computes the second


@pytest.mark.parametrize("op", OPS)
def test_which_op_runs(op, device):
    kernel, function, args = calls(device)[op]
    expected = {f"ldmseg_fast::{op}"} if CUDA or op in OPAQUE_ON_CPU else set()
    with OpNames() as seen:
        function(*args)
    assert seen.ours == expected
    if op not in OPAQUE_ON_CPU:
        with backend.backend(kernel, "torch"), OpNames() as seen:
            function(*args)
        assert seen.ours == set()


@pytest.mark.parametrize("op", OPS)
def test_one_graph_under_compile(op, device):
    _, function, args = calls(device)[op]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), function(*args))


@pytest.mark.parametrize("op", OPS)
def test_an_exported_graph_holds_no_op_of_ours(op, device):
    _, function, args = calls(device)[op]

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = torch.export.export(Module(), args)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {target for target in targets if target.startswith("ldmseg_fast")}
    torch.testing.assert_close(program.module()(*args), function(*args))


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "torch"), ((8, 0), "auto"), ((12, 0), "auto")])
def test_old_gpus_run_torch(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    before = {kernel: backend.get_backend(kernel) for kernel in backend.KERNELS}
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            backend.turn_off_on_old_gpus(torch.device("cuda"))
        assert {backend.get_backend(kernel) for kernel in backend.KERNELS} == {expected}
        assert ["this is sm_75" in str(each.message) for each in said] == [True] * (expected == "torch")
        backend.turn_off_on_old_gpus(torch.device("cpu"))
    finally:
        for kernel, name in before.items():
            backend.set_backend(kernel, name)


def test_backends_are_checked_and_restored():
    with pytest.raises(ValueError, match=r"^kernel: 'attentoin'"):
        backend.set_backend("attentoin", "torch")
    with pytest.raises(ValueError, match=r"^backend: 'cuda'"):
        backend.set_backend("attention", "cuda")
    with pytest.raises(RuntimeError, match="inside"), backend.backend("attention", "torch"):
        assert backend.get_backend("attention") == "torch"
        raise RuntimeError("inside")
    assert backend.get_backend("attention") == "auto"
