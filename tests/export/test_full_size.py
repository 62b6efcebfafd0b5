"""The released model's size: minutes and gigabytes, so with `make soak` only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
def test_export_and_build_keep_to_time_and_memory(tmp_path):
    script = ROOT / "benchmarks" / "bench_export.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True)
    rows = json.loads(next(tmp_path.glob("export-*.json")).read_text())["results"]
    values = {row["name"]: row["value"] for row in rows if "value" in row}
    assert values["full-size UNet to ONNX"] <= 4.0
    assert values["full-size UNet to ONNX, peak memory of its own"] <= 4.0
    assert values["full-size UNet, engine"] > 1.0  # GiB: TensorRT-RTX built it
    for name in ("to_onnx.py", "to_trt.py"):  # parity report and build included
        assert values[f"{name}, peak memory of its own"] <= 6.0
    assert values["to_onnx.py"] <= 20.0
