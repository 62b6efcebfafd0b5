"""Counts what a GPU is asked to do in one step of the full-size UNet.

The meta device stands in for the GPU: it runs no kernel, but every operator passes by. The count follows from how
PyTorch and our kernels launch: a convolution adds its bias in a launch of its own, group normalisation takes one launch
or three, and a view takes none.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmseg_fast.config import UNetConfig
from ldmseg_fast.kernels.attention import op as attention_op
from ldmseg_fast.kernels.group_norm_silu import op as group_norm_op
from ldmseg_fast.models.unet import UNet

VIEWS = {
    "aten::view", "aten::t", "aten::unsqueeze", "aten::permute", "aten::slice.Tensor", "aten::_unsafe_view",
    "aten::unbind.int", "aten::split.Tensor", "aten::transpose.int", "aten::expand",
}  # fmt: skip
WHOLE_GROUP = 16384  # elements of a group, each side padded to a power of two, that one program holds
MOST = 572


class Launches(TorchDispatchMode):
    """Counts kernel launches by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name not in VIEWS:
            self.counts[name] += launches(name, args)
        return function(*args, **(kwargs or {}))


def launches(name: str, args: tuple) -> int:
    if name == "aten::convolution":
        return 1 + (args[2] is not None)
    if name == "ldmseg_fast::group_norm_silu":
        x, num_groups = args[0], args[3]
        sides = x.shape[2] * x.shape[3], x.shape[1] // num_groups
        padded = [1 << (side - 1).bit_length() for side in sides]
        return 1 if padded[0] * padded[1] <= WHOLE_GROUP else 3
    return 1


@pytest.fixture
def unet(monkeypatch) -> UNet:
    for module in (attention_op, group_norm_op):
        monkeypatch.setattr(module, "runs_reference", lambda *_: False)
    with torch.device("meta"):
        unet = UNet(UNetConfig()).to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    unet.fuse_qkv()
    unet.fuse_time()
    return unet


@torch.no_grad()
def test_a_step_of_the_captured_loop(unet):
    shape = (1, unet.config.in_channels, 64, 64)
    sample = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    times = torch.empty(1, dtype=torch.int64, device="meta")
    with Launches() as embedding:
        time = unet.embed_time(times, torch.bfloat16)
    with Launches() as step:
        unet.denoise(sample, time)
    assert sum(step.counts.values()) <= MOST
    assert sum(embedding.counts.values()) > 5  # what each step is spared
    assert "aten::native_group_norm" not in step.counts and step.counts["ldmseg_fast::group_norm_silu"]
