"""Comparisons of trainings in eight bits with others, on a CPU that emulates the products."""

import argparse

import pytest
import torch

from benchmarks.bench_training import VARIANTS, bench_variants, parts_of
from benchmarks.harness import Run
from ldmseg_fast.training import machine


@pytest.mark.parametrize("part", VARIANTS)
def test_losses_memory_and_times_stand_side_by_side(part, tmp_path, monkeypatch):
    if part == "fp8":
        pytest.importorskip("torchao", reason="no torchao; pip install 'ldmseg_fast[fp8]'")
        monkeypatch.setattr(machine, "check_fp8", lambda device, precision: None)
    record = Run("training", quick=True, folder=tmp_path)
    args = argparse.Namespace(
        config="tiny", batch=2, precision="bf16", compile="none", workers=0, quick=True, minutes=0.02
    )
    what, variants = VARIANTS[part]
    bench_variants(record, args, tmp_path, what, variants)
    plain, eight = variants
    losses = {row["variant"]: row for row in record.results if row["name"].startswith("mean loss")}
    assert losses.keys() == variants.keys() and len(losses[eight]["curve"]) == 10
    assert losses[eight]["value"] == pytest.approx(losses[plain]["value"], rel=0.1)
    moments = {row["variant"]: row["value"] for row in record.results if row["name"] == "moments"}
    assert (moments[eight] < 0.3 * moments[plain]) == (part == "moments")
    assert {row["variant"] for row in record.results if row["name"] == f"training step, {what}"} == variants.keys()


def test_a_cpu_leaves_it_out():
    assert "fp8" not in parts_of(torch.device("cpu"))
