"""The COCO-panoptic folder of the data tests for `data check` and `data merge`, and configurations for `convert`."""

import json
from pathlib import Path

import pytest

from tests.commands.original_files import BASE_UNET, VAE
from tests.data.conftest import folder, quarters

__all__ = ["folder", "quarters"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with the UNet's and the image VAE's configuration in diffusers' form."""
    (tmp_path / "unet.json").write_text(json.dumps(BASE_UNET))
    (tmp_path / "vae.json").write_text(json.dumps(VAE))
    return tmp_path
