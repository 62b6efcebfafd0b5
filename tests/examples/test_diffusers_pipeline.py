"""A model folder under diffusers' `DiffusionPipeline`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldmseg_fast import LDMSegPipeline

PIPELINE = Path(__file__).resolve().parents[2] / "examples" / "diffusers_pipeline"


@pytest.mark.filterwarnings("ignore")
def test_it_gives_what_ours_does(model_dir, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained(str(model_dir), custom_pipeline=str(PIPELINE), trust_remote_code=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    found, own = (each(pixels, num_inference_steps=2) for each in (pipe, LDMSegPipeline.from_pretrained(model_dir)))
    np.testing.assert_array_equal(found[0].segmentation, own[0].segmentation)
    moved = pipe.to("cpu")
    assert moved is pipe and torch.equal(*(each(pixels, 1, output_type="logits") for each in (pipe, moved)))
