"""Counts what a GPU is asked to do in one step of the full-size UNet.

The meta device stands in for the GPU: it runs no kernel, but every operator passes by. The count follows from how
PyTorch and our kernels launch: a convolution adds its bias in a launch of its own, a product of rows takes one with its
bias or in place, a view takes none. Our kernels' own launches are recorded.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmseg_fast.config import UNetConfig
from ldmseg_fast.kernels.added_layer_norm import host as layer_norm
from ldmseg_fast.kernels.added_layer_norm import op as layer_norm_op
from ldmseg_fast.kernels.attention import host as attention
from ldmseg_fast.kernels.attention import op as attention_op
from ldmseg_fast.kernels.convolution import host as convolution
from ldmseg_fast.kernels.convolution import op as convolution_op
from ldmseg_fast.kernels.geglu import host as geglu
from ldmseg_fast.kernels.geglu import op as geglu_op
from ldmseg_fast.kernels.group_norm_silu import host as group_norm
from ldmseg_fast.kernels.group_norm_silu import moments as moments_op
from ldmseg_fast.kernels.group_norm_silu import op as group_norm_op
from ldmseg_fast.kernels.launch import record
from ldmseg_fast.kernels.linear import host as linear
from ldmseg_fast.kernels.linear import op as linear_op
from ldmseg_fast.models.epilogue_unet import EpilogueUNet
from ldmseg_fast.models.fused_unet import FusedUNet
from ldmseg_fast.models.unet import UNet

VIEWS = {
    "aten::view", "aten::t", "aten::unsqueeze", "aten::permute", "aten::slice.Tensor", "aten::_unsafe_view",
    "aten::unbind.int", "aten::split.Tensor", "aten::transpose.int", "aten::expand",
}  # fmt: skip
OURS = {
    "ldmseg_fast::group_norm_silu": group_norm.group_norm_silu_forward,
    "ldmseg_fast::attention_forward": attention.attention_forward,
    "ldmseg_fast::added_layer_norm": layer_norm.added_layer_norm,
    "ldmseg_fast::geglu": geglu.geglu,
    "ldmseg_fast::linear": linear.linear,
    "ldmseg_fast::convolution": convolution.convolution,
    "ldmseg_fast::gather_moments": group_norm.gather_moments,
    "ldmseg_fast::normalise": group_norm.normalise,
}
MOST, MOST_FUSED, MOST_WITH_EPILOGUES = 518, 350, 219


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
    if name in OURS:
        with record() as recorded:
            OURS[name](*args)
        return len(recorded)
    return 1


@pytest.fixture
def unet(monkeypatch) -> UNet:
    for module in (attention_op, group_norm_op, layer_norm_op, geglu_op, linear_op, convolution_op, moments_op):
        monkeypatch.setattr(module, "runs_reference", lambda *_: False)
    with torch.device("meta"):
        unet = UNet(UNetConfig()).to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    unet.fuse_qkv()
    unet.fuse_time()
    return unet


def count(unet, times) -> tuple[Counter[str], Counter[str]]:
    """The launches of the table of times, and of a step."""
    shape = (1, 12, 64, 64)
    sample = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    with Launches() as embedding:
        time = unet.embed_time(times, torch.bfloat16)
    with Launches() as step:
        unet.denoise(sample, time)
    return embedding.counts, step.counts


@torch.no_grad()
def test_a_step_of_the_captured_loop(unet):
    embedding, step = count(unet, torch.empty(1, dtype=torch.int64, device="meta"))
    assert sum(step.values()) <= MOST
    assert sum(embedding.values()) > 5  # what each step is spared
    assert "aten::native_group_norm" not in step and step["ldmseg_fast::group_norm_silu"]


@torch.no_grad()
def test_a_step_of_the_fused_unet(unet):
    _, step = count(FusedUNet(unet), torch.empty(1, dtype=torch.int64, device="meta"))
    assert sum(step.values()) <= MOST_FUSED
    copies = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous"}
    assert not copies & step.keys() and step["aten::addmm_"] == 62


@torch.no_grad()
def test_a_step_whose_statistics_come_from_epilogues(unet):
    _, step = count(EpilogueUNet(unet), torch.empty(1, dtype=torch.int64, device="meta"))
    assert sum(step.values()) <= MOST_WITH_EPILOGUES
    # a norm is one launch, or none where a product follows; features are added up by what makes them
    assert step["ldmseg_fast::linear"] == 94 and step["ldmseg_fast::normalise"] == 45
    assert step["ldmseg_fast::convolution"] == 52 and step["ldmseg_fast::gather_moments"] == 12
    assert "ldmseg_fast::group_norm_silu" not in step and not any(name.startswith("aten::") for name in step)
