"""The exported head and its last part on the host give what `postprocess` gives."""

import numpy as np
import pytest
import torch

from ldmseg_fast.backends.graphs.head import finish
from ldmseg_fast.backends.graphs.modules import MaskDecoderGraph
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.panoptic.postprocess import postprocess


class Decoded(torch.nn.Module):
    """A mask auto-encoder whose decoder returns given logits."""

    def __init__(self, logits, downsampling=4):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.config = type("Config", (), {"downsampling": downsampling})

    def decode_latents_both(self, latents):
        return self.logits, None


def blobs(batch, slots, side, seed, scale=4.0):
    """Smooth random logits, so that there are segments of every size."""
    coarse = torch.randn(batch, slots, 5, 5, generator=torch.Generator().manual_seed(seed)) * scale
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")


@pytest.mark.parametrize("size", [(64, 64), (37, 81), (480, 13)])
@pytest.mark.parametrize("thresholds", [(0.5, 8, 0.5), (0.0, 0, 0.0), (0.9, 40, 0.9), (0.3, 1, 0.7)])
def test_equal_to_postprocess(size, thresholds):
    config = PostprocessConfig(*thresholds)
    for seed, slots in ((0, 8), (1, 128)):
        logits = blobs(2, slots, 32, seed)
        graph = MaskDecoderGraph(Decoded(logits), "panoptic")
        with torch.inference_mode():
            outputs = graph(torch.zeros(2, 4, 16, 16), torch.tensor(size), torch.tensor([config.mask_threshold]))
        found = finish(*(output.numpy() for output in outputs), config)
        for one, other in zip(found, postprocess(logits, (64, 64), [size, size], config)):
            np.testing.assert_array_equal(one.segmentation, other.segmentation)
            for ours, theirs in zip(one.segments_info, other.segments_info, strict=True):
                assert {**ours, "score": 0} == {**theirs, "score": 0}
                assert abs(ours["score"] - theirs["score"]) <= 1 / 510 + 1e-6


def test_nothing_confident_is_an_empty_map():
    label = np.zeros((1, 6, 7), np.uint8)
    result = finish(label, label, np.zeros((1, 5), np.int32), PostprocessConfig(0.5, 0, 0.0))[0]
    assert not result.segmentation.any() and result.segments_info == []


def test_logits_and_head_together(model_dir):
    info = read_model_info(model_dir)
    vae = load_component(model_dir, "mask_vae")
    latents = torch.randn(2, *info.latent_shape)
    outputs = MaskDecoderGraph(vae, "both")(latents, torch.tensor([20, 30]), torch.tensor([0.5]))
    assert [tuple(output.shape) for output in outputs] == [(2, 20, 30), (2, 20, 30), (2, 32), (2, 32, 32, 32)]
    (alone,) = MaskDecoderGraph(vae, "logits")(latents)
    torch.testing.assert_close(alone, outputs[3])
