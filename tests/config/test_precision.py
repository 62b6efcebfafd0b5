"""One question decides the precision: what this device computes in fast. Both kinds of processor are asked here."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

from ldmseg_fast.config import precision
from ldmseg_fast.config.precision import has_units, resolve_precision, slowdown, warn_if_emulated

CPU = torch.device("cpu")
OLD_PROCESSOR = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def emulating(monkeypatch):
    """A processor without bfloat16 units, on which it is 9 times slower."""
    resolve_precision.cache_clear()
    monkeypatch.setattr(precision, "has_units", lambda device_type, dtype: dtype == torch.float32)
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 9.04)
    yield
    resolve_precision.cache_clear()


def on_an_old_processor(code):
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | OLD_PROCESSOR, capture_output=True, text=True, check=True
    )
    return result.stdout + result.stderr


def test_auto_follows_the_units():
    units = has_units("cpu", torch.bfloat16)
    found, reason = resolve_precision("auto", CPU)
    assert found == ("bf16" if units else "fp32")
    assert (
        reason == "this CPU has bf16 units"
        if units
        else reason.startswith("this CPU emulates bf16: a small network takes ")
    )
    assert has_units("cpu", torch.float32) and not has_units("meta", torch.bfloat16)


def test_an_old_processor_takes_float32():
    code = (
        "import torch; from ldmseg_fast.config.precision import *; cpu = torch.device('cpu')\n"
        "print(has_units('cpu', torch.bfloat16), *resolve_precision('auto', cpu))\n"
        "print(*resolve_precision('bf16', cpu))"
    )
    auto, explicit = on_an_old_processor(code).splitlines()
    assert auto.startswith("False fp32 this CPU emulates bf16: a small network takes ") and auto.endswith(
        " times as long as in fp32"
    )
    assert float(re.search("takes (.*) times", auto)[1]) > 1.5
    assert explicit.startswith("bf16 train.precision=bf16, but this CPU emulates bf16: a small network takes ")


def test_onednn_alone_does_not_make_units(monkeypatch):
    """It takes bfloat16 wherever AVX-512 is, also where float32 is twice as fast."""
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not has_units.__wrapped__("cpu", torch.bfloat16)


def test_what_is_asked_for_stays(emulating):
    assert resolve_precision("fp32", CPU) == ("fp32", "train.precision=fp32")
    told = "but this CPU emulates {}: a small network takes 9 times as long as in fp32; train.precision=fp32 is faster"
    for name in ("bf16", "fp16"):
        assert resolve_precision(name, CPU) == (name, f"train.precision={name}, {told.format(name)}")
    assert resolve_precision("auto", CPU) == (
        "fp32",
        "this CPU emulates bf16: a small network takes 9 times as long as in fp32",
    )


def test_measuring_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert slowdown.__wrapped__(torch.bfloat16) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_pipeline_warns_where_its_dtype_is_emulated(emulating, model_dir):
    from ldmseg_fast import LDMSegPipeline

    with pytest.warns(UserWarning, match=r"dtype=torch\.bfloat16: this CPU emulates bf16: a small network") as caught:
        LDMSegPipeline.from_pretrained(model_dir, device="cpu", dtype=torch.bfloat16)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LDMSegPipeline.from_pretrained(model_dir, device="cpu")


def test_no_warning_where_there_are_units(monkeypatch):
    monkeypatch.setattr(precision, "has_units", lambda device_type, dtype: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_emulated(CPU, torch.bfloat16)
