"""The comparison of a training in eight bits with one in bfloat16, on a CPU that emulates the products."""

import argparse

import pytest
import torch

from benchmarks.bench_training import bench_fp8, parts_of
from benchmarks.harness import Run
from ldmseg_fast.training import machine


def test_losses_and_times_stand_side_by_side(tmp_path, monkeypatch):
    pytest.importorskip("torchao", reason="no torchao; pip install 'ldmseg_fast[fp8]'")
    monkeypatch.setattr(machine, "check_fp8", lambda device, precision: None)
    record = Run("training", quick=True, folder=tmp_path)
    args = argparse.Namespace(
        config="tiny", batch=2, precision="bf16", compile="none", workers=0, quick=True, minutes=0.02
    )
    bench_fp8(record, args, tmp_path)
    losses = {row["variant"]: row for row in record.results if row["name"].startswith("mean loss")}
    assert losses.keys() == {"bf16", "fp8"} and len(losses["fp8"]["curve"]) == 10
    assert losses["fp8"]["value"] == pytest.approx(losses["bf16"]["value"], rel=0.1)
    assert {row["variant"] for row in record.results if row["name"] == "training step in eight bits"} == {"bf16", "fp8"}


def test_a_cpu_leaves_it_out():
    assert "fp8" not in parts_of(torch.device("cpu"))
