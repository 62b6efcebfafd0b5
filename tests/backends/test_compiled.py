"""What `torch.compile` is asked for, what its first calls say, and which settings last no longer than our calls."""

import os
from pathlib import Path

import pytest
import torch

from ldmseg_fast.backends import compiled
from ldmseg_fast.backends.compiled import CACHE_VARIABLE, FirstCalls, compile_network, keep_cache, tuned_convolutions

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    os.environ.pop(CACHE_VARIABLE, None)


def test_a_gpu_gets_the_tuned_form_and_a_kept_cache(monkeypatch, home):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.update(options) or network)
    assert compile_network(abs, "unet", CUDA)(torch.tensor(-1.0)) == 1
    assert asked["dynamic"] is False and asked["options"]["max_autotune"] and asked["options"]["conv_1x1_as_mm"]
    from torch._inductor import list_options

    assert asked["options"].keys() <= set(list_options())
    assert os.environ[CACHE_VARIABLE] == str(home / "ldmseg_fast" / "inductor")


def test_a_cpu_keeps_its_cache_to_itself(monkeypatch):
    monkeypatch.setattr(compiled, "compile_frozen", lambda network: network)
    assert compile_network(abs, "unet", CPU)(torch.tensor(-1.0)) == 1
    assert CACHE_VARIABLE not in os.environ


def test_the_first_call_of_each_shape_says_what_it_took(capsys):
    calls = FirstCalls(lambda x, *_: x + 1, "unet")
    for shape in ((2, 3), (2, 3), (1, 3)):
        assert torch.equal(calls(torch.zeros(shape), None), torch.ones(shape))
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == [
        f"backend=compile: unet, input {size}" for size in ("2x3", "1x3")
    ]
    assert all(line.endswith(" s") for line in lines)


def test_a_cache_that_is_named_stays_and_one_that_cannot_be_is_none(monkeypatch, home):
    monkeypatch.setenv(CACHE_VARIABLE, "/there")
    keep_cache()
    assert os.environ.pop(CACHE_VARIABLE) == "/there"
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    keep_cache()
    assert CACHE_VARIABLE not in os.environ and Path(home / "file").is_file()


def test_convolutions_are_tuned_within_our_calls_only():
    before = torch.backends.cudnn.benchmark
    with pytest.raises(ValueError, match="stop"), tuned_convolutions(CUDA):
        assert torch.backends.cudnn.benchmark
        raise ValueError("stop")
    with tuned_convolutions(CPU):
        assert torch.backends.cudnn.benchmark == before
    assert torch.backends.cudnn.benchmark == before
