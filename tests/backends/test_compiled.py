"""What `torch.compile` is asked for, what its first calls say, and which settings last no longer than our calls."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldmseg_fast.backends import compiled
from ldmseg_fast.backends.compiled import FirstCalls, cache_folder, compile_network
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.packages import Packages
from ldmseg_fast.backends.precision import choose_precision
from ldmseg_fast.backends.process_settings import CACHE_VARIABLE, gpu_settings
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.kernels.configs import architecture

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch._inductor.runtime.cache_dir_utils", raising=False)
    yield tmp_path
    os.environ.pop(CACHE_VARIABLE, None)  # inductor sets it when imported


def test_a_gpu_gets_the_tuned_form_and_a_kept_cache(monkeypatch, home):
    asked, folders = {}, []

    def absolute(x):
        folders.append(os.environ.get(CACHE_VARIABLE))
        return abs(x)

    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.update(options) or network)
    network = compile_network(absolute, "unet", CUDA)
    for _ in range(2):  # a call that compiles, and one that does not
        assert network(torch.tensor(-1.0)) == 1
    assert folders == [str(home / "ldmseg_fast" / "inductor"), None] and CACHE_VARIABLE not in os.environ
    assert asked["dynamic"] is False and asked["options"]["max_autotune"] and asked["options"]["conv_1x1_as_mm"]
    from torch._inductor import list_options

    assert asked["options"].keys() <= set(list_options())


def test_a_cpu_gets_packages_and_functions_are_compiled(monkeypatch, home):
    monkeypatch.setattr(compiled, "compile_frozen", lambda network: network)
    assert compile_network(abs, "unet", CPU)(torch.tensor(-1.0)) == 1
    module = torch.nn.Linear(2, 3)
    packages = compile_network(module, "unet", CPU).compiled
    assert isinstance(packages, Packages) and packages.folder == home / "ldmseg_fast" / "packages"
    monkeypatch.setattr("ldmseg_fast.backends.packages.LARGEST", 9 * 4)
    assert compile_network(module, "unet", CPU).compiled is module
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
    assert cache_folder() is None and os.environ[CACHE_VARIABLE] == "/there"
    itself = SimpleNamespace(default_cache_dir=lambda: "/there")  # where inductor has named its own folder
    monkeypatch.setitem(sys.modules, "torch._inductor.runtime.cache_dir_utils", itself)
    assert cache_folder() == str(home / "ldmseg_fast" / "inductor")
    monkeypatch.delenv(CACHE_VARIABLE)
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert cache_folder() is None and Path(home / "file").is_file()


def settings() -> tuple:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return cudnn.benchmark, matmul.fp32_precision, cudnn.allow_tf32, cudnn.conv.fp32_precision


def test_settings_hold_within_our_calls_only():
    before = settings()
    with pytest.raises(ValueError, match="stop"), gpu_settings(CUDA):
        assert settings() == (True, *before[1:])
        raise ValueError("stop")
    with pytest.raises(ValueError, match="stop"), gpu_settings(CUDA, tf32=True):
        assert settings() == (True, "tf32", True, "tf32") and torch.get_float32_matmul_precision() == "high"
        raise ValueError("stop")
    with gpu_settings(CPU, tf32=True):
        assert settings() == before
    assert settings() == before and torch.get_float32_matmul_precision() == "highest"


def test_a_process_that_uses_the_newer_setting_of_products_may_go_on_with_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for chosen in ("tf32", "ieee"):
            matmul.fp32_precision = chosen
            with gpu_settings(CUDA, tf32=True):
                assert matmul.fp32_precision == "tf32"
            assert matmul.fp32_precision == chosen
    finally:
        matmul.fp32_precision = before


def test_threads_that_overlap_put_back_what_was_there_before_the_first():
    before = settings()
    inside, leave = threading.Barrier(2), threading.Event()

    def call():
        with gpu_settings(CUDA, tf32=True):
            inside.wait(10)
            leave.wait(10)

    thread = threading.Thread(target=call)
    with gpu_settings(CUDA):
        thread.start()
        inside.wait(10)
    assert settings() == (True, "tf32", True, "tf32")  # the other call is still under way
    leave.set()
    thread.join()
    assert settings() == before


def test_tf32_is_a_precision_of_our_calls(model_dir, monkeypatch):
    assert choose_precision("tf32", None, CUDA) == (torch.float32, False, True)
    assert choose_precision("fp32", None, CUDA) == (torch.float32, False, False)
    with pytest.warns(
        UserWarning, match="^precision=tf32: it needs a GPU of sm_80 or newer, not cpu; fp32 is computed"
    ):
        backend = TorchBackend(read_model_info(model_dir), "cpu", precision="tf32")
    with (
        architecture(75),
        pytest.warns(UserWarning, match=r"needs a GPU of sm_80 or newer, not sm_75; fp32 is computed"),
    ):
        choose_precision("tf32", None, CUDA)
    asked = []
    monkeypatch.setattr(
        "ldmseg_fast.backends.torch_backend.gpu_settings", lambda *args: asked.append(args) or gpu_settings(*args)
    )
    backend.decode_mask(torch.zeros(1, 4, 16, 16), (8, 8))
    assert asked == [(CPU, True)]
