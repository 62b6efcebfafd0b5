"""Traces that tests share: no network is taken for another one."""

import copy

import pytest
import torch
from torch import nn

from tests.shared_traces import fingerprint


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 40, 3), nn.GroupNorm(1, 40), nn.BatchNorm2d(40))
    module[0].fused = (module[0].weight.detach().clone(), {"names": ["q", "k"]})
    return module


CHANGES = {
    "a weight": lambda module: module[0].weight.data[7, 1, 2, 2].add_(1e-6),
    "its type": lambda module: module[0].half(),
    "a buffer": lambda module: module[2].running_mean.add_(1e-6),
    "an attribute": lambda module: setattr(module[1], "eps", 1e-6),
    "a tensor in an attribute": lambda module: module[0].fused[0][7, 1, 2, 2].add_(1e-6),
    "a word in an attribute": lambda module: module[0].fused[1]["names"].reverse(),
    "a class": lambda module: module.__setitem__(1, nn.InstanceNorm2d(40)),
    "the mode": lambda module: module[2].eval(),
    "a hook": lambda module: module[1].register_forward_hook(lambda *_: None),
    "a module more": lambda module: module.append(nn.Identity()),
}


def test_equal_networks_have_one_fingerprint():
    assert fingerprint(network(), 21) == fingerprint(copy.deepcopy(network()), 21) != fingerprint(network(), 22)


@pytest.mark.parametrize("change", CHANGES)
def test_another_network_has_another_fingerprint(change):
    module = network()
    CHANGES[change](module)
    assert fingerprint(module) != fingerprint(network())
