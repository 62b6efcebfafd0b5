"""Shared fixtures. The Triton interpreter is chosen before triton is imported anywhere."""

import gc
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests are small; threads that wait for each other cost more than they give
if isa := os.environ.get("ONEDNN_MAX_CPU_ISA"):
    # compiled code holds weights as oneDNN packed them, and inductor's cache does not ask for which instruction set
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor-{isa}"))

import pytest
import torch

from tests.shared_traces import share_traces

# pytest listens to loggers that do not propagate, and torch would write all that it traces into every report
logging.getLogger("torch.__trace").propagate = True

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# differs from process to process: pytest-xdist runs nothing where two processes name a test differently
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses a test whose name has an address in it."""
    for item in items:
        if ADDRESS.search(item.nodeid):
            raise pytest.UsageError(f"{item.nodeid}: the name differs from process to process; give `ids`")


def pytest_collection_finish() -> None:
    """Takes what was imported and collected out of the garbage collector's rounds, of which exports ask for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal networks are traced for ONNX once a run, see `tests.shared_traces`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    with share_traces(folder):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden values and real images beside the checkout; the test is skipped where it is not."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no ../shared folder with golden values and real images beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation scenes of 64x64 pixels."""
    from ldmseg_fast.data.scenes import write_scenes

    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", 24, 64, 0, version=1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with random weights, narrow, for 64x64 pictures."""
    return make_model(tmp_path_factory.mktemp("models") / "diffusion")


@pytest.fixture(scope="session")
def category_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation scenes of version 2, of 64x64 pixels."""
    from ldmseg_fast.data.scenes import write_scenes

    return write_scenes(tmp_path_factory.mktemp("data") / "category_scenes", 24, 64, 0, workers=1)


@pytest.fixture(scope="session")
def category_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with the categories of scenes of version 2 and random weights, as `model_dir`."""
    from ldmseg_fast.config.categories import CategoryTable
    from ldmseg_fast.data.scenes import CATEGORIES

    table = CategoryTable.of_data_set(CATEGORIES[2], "scenes")
    folder = tmp_path_factory.mktemp("models") / "categories"
    return make_model(folder, (f"mask_vae.num_categories={len(table)}",), table)


NARROW = [
    "mask_vae.widths=8,16,32",
    "mask_vae.decoder_width=16",
    "image_encoder.widths=8,16,16",
    "image_encoder.latent_channels=8",
    "unet.block_out_channels=16,32",
    "unet.attention=false,true",
    "unet.num_heads=2,4",
    "loss.num_points=128",
    "train.batch_size=4",
    "train.precision=fp32",
    "train.threads=1",
]


def make_model(folder: Path, settings: tuple[str, ...] = (), categories: Any = None) -> Path:
    """Both stages with random weights saved into `folder`; the auto-encoder alone into `folder`-autoencoder."""
    from ldmseg_fast.config import load_config
    from ldmseg_fast.training.stages import AutoencoderStage, DiffusionStage

    torch.manual_seed(0)
    autoencoder = folder.with_name(folder.name + "-autoencoder")
    stage = AutoencoderStage(load_config("tiny", [*NARROW, *settings]))
    stage.categories = categories
    stage.save(autoencoder)
    DiffusionStage(load_config("tiny", [*NARROW, *settings, f"model.mask_vae={autoencoder}"])).save(folder)
    return folder
