"""Shared fixtures. The Triton interpreter is chosen before triton is imported anywhere."""

import os
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden values and real images beside the checkout; the test is skipped where it is not."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no ../shared folder with golden values and real images beside this checkout")
    return SHARED
