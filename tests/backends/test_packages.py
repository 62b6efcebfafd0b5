"""Packages of compiled networks: the same results, loaded where they fit, made anew where they do not."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from ldmseg_fast.backends import packages
from ldmseg_fast.backends.packages import Packages, can_package


class Network(nn.Module):
    """Has what packages have to carry: a convolution, a product, and an argument that may be None."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.product = nn.Linear(8, 4)

    def forward(self, x, times=None, context=None):
        y = self.product(torch.nn.functional.silu(self.convolution(x.float())).mean((2, 3)))
        return y if context is None else y + context


def pictures(batch=2):
    values = torch.arange(batch * 3 * 64, dtype=torch.int64) * 37 % 256
    return values.to(torch.uint8).reshape(batch, 3, 8, 8)


@pytest.fixture
def counted(monkeypatch):
    """Packages that hold a name instead of machine code; counts how often one is made."""
    made = []

    def compile_nothing(network, args, path):
        made.append(path.name)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("code", b"0" * 1000)

    monkeypatch.setattr(packages, "_compile", compile_nothing)
    monkeypatch.setattr(packages, "_load_package", lambda path: lambda *args: (path.name, len(args)))
    return made


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.inference_mode()
def test_a_later_process_loads_what_the_first_compiled(tmp_path):
    """One that is cut out of something larger is the same input."""
    network, images = Network().eval(), pictures()
    expected = network(images)
    first = Packages(network, tmp_path)
    assert (first(images, None, None) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt2"]
    cut = torch.zeros(2, 3, 9, 16, dtype=torch.uint8)[:, :, 1:, ::2].copy_(images)
    assert (Packages(network, tmp_path)(cut, None, None) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(list(tmp_path.iterdir())) == 1
    program = """
import sys
from pathlib import Path
import torch
from ldmseg_fast.backends import packages
from tests.backends.test_packages import Network, pictures
packages._compile = None
torch.set_num_threads(int(sys.argv[2]))
with torch.inference_mode():
    print(packages.Packages(Network().eval(), Path(sys.argv[1]))(pictures(), None, None).tolist())
"""
    command = [sys.executable, "-c", program, str(tmp_path), str(torch.get_num_threads())]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert found.returncode == 0, found.stderr
    assert torch.allclose(torch.tensor(json.loads(found.stdout)), expected, rtol=1e-5, atol=1e-6)


def test_what_a_package_depends_on_names_it(counted, tmp_path, monkeypatch):
    network = Network()
    run = Packages(network, tmp_path)
    name, given = run(pictures(), None, torch.ones(4))
    assert given == 2 and run(pictures(), None, torch.ones(4)) == (name, 2) and counted == [name]
    others = [
        run(pictures(1), None, torch.ones(4)),
        run(pictures().contiguous(memory_format=torch.channels_last), None, torch.ones(4)),
    ]
    others += [run(pictures(), None, None), run(pictures(), torch.ones(4), None)]
    with torch.no_grad():
        network.product.bias[0] += 1
    others.append(Packages(network, tmp_path)(pictures(), None, torch.ones(4)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.append(Packages(network, tmp_path)(pictures(), None, torch.ones(4)))
    network = Network()
    network.convolution.padding_mode = "reflect"
    others.append(Packages(network, tmp_path)(pictures(), None, torch.ones(4)))
    assert len({name, *(other for other, _ in others)}) == 8 and len(counted) == 8


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_package_is_made_anew(counted, tmp_path, damage):
    (name, _) = Packages(Network(), tmp_path)(pictures())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-40] if damage is None else damage)
    assert Packages(Network(), tmp_path)(pictures())[0] == name
    assert counted == [name, name] and (tmp_path / name).read_bytes()[:40] == whole[:40]


def test_those_not_used_for_longest_go_first(counted, tmp_path, monkeypatch):
    network = Network()
    names = [Packages(network, tmp_path)(pictures(batch))[0] for batch in (1, 2, 3)]
    for age, name in zip((30, 20, 10), names):
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    left, killed = tmp_path / "unfinished-now", tmp_path / "unfinished-old"
    left.mkdir()
    killed.mkdir()
    os.utime(killed, (1e9, 1e9))
    assert Packages(network, tmp_path)(pictures(1))[0] == names[0]  # used again
    size = (tmp_path / names[0]).stat().st_size
    monkeypatch.setattr(packages, "CACHE_BYTES", 3 * size)
    fourth = Packages(network, tmp_path)(pictures(4))[0]
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2], fourth, left.name}


def test_a_full_disk_costs_the_package_only(counted, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packages, "_compile", full)
    monkeypatch.setattr(packages, "compile_frozen", lambda network: network)
    network = Network()
    with pytest.warns(UserWarning, match="No space left on device; compiled for this process alone"):
        found = Packages(network, tmp_path)(pictures(), None, torch.ones(4))
    assert torch.equal(found, network(pictures(), None, torch.ones(4))) and not list(tmp_path.iterdir())


def test_what_is_no_module_or_too_large_has_none(monkeypatch):
    assert can_package(nn.Linear(2, 3)) and not can_package(abs)
    monkeypatch.setattr(packages, "LARGEST", 9 * 4)
    assert not can_package(nn.Linear(2, 3))
