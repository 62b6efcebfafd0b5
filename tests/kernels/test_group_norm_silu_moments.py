"""Group normalisation in two halves: the moments come from what made the features."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from ldmseg_fast.kernels.group_norm_silu import host, moments, reference
from ldmseg_fast.kernels.launch import record

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (B, C of x, C of the other, groups, H, W): groups that lie in both, a part of a chunk, one pixel
SHAPES = [(2, 24, 16, 8, 5, 7), (1, 40, 80, 4, 9, 15), (1, 32, 32, 16, 1, 1), (1, 64, 320, 32, 8, 8)]


def make_inputs(shape, dtype, device, join, mean=0.0):
    batch, channels, others, groups, height, width = shape
    sizes = (channels, others if join else channels)
    x, other = (
        (torch.randn(batch, n, height, width, device=device) + mean)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for n in sizes
    )
    return (
        x,
        other,
        join,
        groups,
        torch.randn(1, channels + others if join else channels, device=device).expand(batch, -1),
    )


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_gathered_is_normalised(shape, dtype, join, device, poison, close):
    x, other, join, groups, added = make_inputs(shape, dtype, device, join)
    for vector in (None, added):
        gathered, made = host.gather_moments(x, other, join, groups, vector)
        wide = torch.cat([x, other], 1).double() if join else x.double() + other.double()
        close(gathered, wide if vector is None else wide + vector.double()[:, :, None, None])
        assert gathered.is_contiguous(memory_format=torch.channels_last)
        close(made, reference.find_moments(gathered.double(), groups), torch.float32)
        weight, bias = (torch.randn(gathered.shape[1], device=device) for _ in range(2))
        for silu in (False, True):
            y = host.normalise(gathered, made, weight, bias, 1e-5, silu)
            args = (gathered.double(), weight.double(), bias.double(), groups, 1e-5)
            close(y, reference.group_norm_silu(*args, silu=silu))
            close(
                reference.normalise(gathered, made, weight, bias, 1e-5, silu),
                reference.group_norm_silu(*args, silu=silu),
            )


@pytest.mark.parametrize("join", [False, True])
def test_a_large_mean_costs_few_digits(join, device, poison):
    x, other, *rest = make_inputs((1, 40, 80, 4, 9, 15), torch.float32, device, join, mean=1000.0)
    gathered, made = host.gather_moments(x, other, *rest)
    ones, zeros = torch.ones(gathered.shape[1], device=device), torch.zeros(gathered.shape[1], device=device)
    y = host.normalise(gathered, made, ones, zeros, 1e-5, False)
    best = torch.group_norm(gathered.double(), rest[1], ones.double(), zeros.double(), 1e-5)
    assert (y.double() - best).abs().max() < 2e-3
    torch.testing.assert_close(made.double(), reference.find_moments(gathered.double(), rest[1]), rtol=1e-5, atol=0.0)


@pytest.mark.skipif(CUDA, reason="the interpreter tells how long blocks are")
def test_chunks_of_large_maps_are_merged_in_blocks(device, poison, monkeypatch):
    """More than 64 at once would not fit into registers; a large mean costs few digits from block to block too."""
    lengths = set()
    plain = InterpreterBuilder.create_make_range

    def note(self, kind, start, stop):
        lengths.add(stop - start)
        return plain(self, kind, start, stop)

    monkeypatch.setattr(InterpreterBuilder, "create_make_range", note)
    x = (torch.randn(1, 4, 65, 67, device=device) + 1000).contiguous(memory_format=torch.channels_last)
    made, ones = reference.find_moments(x, 2), torch.ones(4, device=device)
    y = host.normalise(x, made, ones, ones, 1e-5, False)
    assert made.shape[2] == 69 and 64 in lengths and 128 not in lengths
    best = torch.group_norm(x.double(), 2, ones.double(), ones.double(), 1e-5)
    assert (y.double() - best).abs().max() < 2e-3


def test_each_half_is_one_launch():
    x = torch.empty(2, 320, 64, 64, device="meta", dtype=torch.float16)
    weight = torch.empty(640, device="meta")
    with record() as launches:
        gathered, made = host.gather_moments(x, x, True, 32)
        host.normalise(gathered, made, weight, weight, 1e-5, True)
    assert [each.kernel.__name__ for each in launches] == ["forward_moments_kernel", "forward_apply_kernel"]
    assert gathered.shape == (2, 640, 64, 64) and made.shape == (2, 2, 64, 32)


def test_the_plain_form_takes_all_chunks_at_once(device):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **kwargs or {})

    x = torch.randn(2, 8, 9, 71, device=device, dtype=torch.float64)
    with Count() as count:
        made = reference.find_moments(x, 4)
    assert count.calls < 25
    chunks = x.reshape(2, 4, 2, -1).split(64, 3)
    expected = [(each.mean((2, 3)), ((each - each.mean((2, 3), keepdim=True)) ** 2).sum((2, 3))) for each in chunks]
    torch.testing.assert_close(made, torch.stack([torch.stack(each, 1) for each in expected], 2))


def test_ops(device, check_op):
    for join in (False, True):
        inputs = make_inputs((2, 24, 16, 8, 9, 9), torch.float32, device, join)
        check_op(moments.gather_moments_op, inputs)
        gathered, made = moments.gather_moments(*inputs)
        vector = torch.randn(gathered.shape[1], device=device)
        check_op(moments.normalise_op, (gathered, made, vector, vector, 1e-5, True))
        y = moments.normalise(gathered, made, vector, vector, 1e-5)
        torch.testing.assert_close(
            y, reference.group_norm_silu(gathered, vector, vector, 8, 1e-5), rtol=1e-4, atol=1e-5, check_stride=False
        )


def test_nothing_to_do(device):
    for batch, height in ((0, 3), (2, 0)):
        x = torch.zeros(batch, 4, height, 5, device=device)
        gathered, made = host.gather_moments(x, x, False, 2)
        expected = reference.gather_moments(x, x, False, 2)
        assert [gathered.shape, made.shape] == [each.shape for each in expected] and not made.any()
        assert host.normalise(x, made, x.new_ones(4), x.new_ones(4), 1e-5, True).shape == x.shape


def test_bad_input(device, refuses):
    x, vector = torch.zeros(2, 8, 4, 4, device=device), torch.zeros(8, device=device)
    made = reference.find_moments(x, 2)
    good = {"x": x, "other": x, "join": False, "num_groups": 2, "added": None}
    for name, value in (
        *(("x", x[0]), ("x", x.long()), ("other", x[:, :3]), ("other", x.double()), ("num_groups", 3)),
        ("added", vector[None]),
    ):
        refuses(name, moments.gather_moments, moments.gather_moments_op, tuple({**good, name: value}.values()))
    good = {"x": x, "moments": made, "weight": vector, "bias": vector, "eps": 1e-5, "silu": True}
    for name, value in (
        *(("x", x[0]), ("moments", made[0]), ("moments", made[:, :, :0]), ("moments", made[:1])),
        *(("moments", made.half()), ("weight", vector[:3])),
    ):
        refuses(name, moments.normalise, moments.normalise_op, tuple({**good, name: value}.values()))
    for name, value in (("moments", made), ("weight", vector)):
        with pytest.raises(ValueError, match=f"{name}: a gradient is wanted"):
            moments.normalise(**good | {name: value.clone().requires_grad_()})
