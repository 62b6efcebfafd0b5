"""Options of the diffusion stage's loss, each held to its definition."""

from dataclasses import replace

import pytest
import torch

from ldmseg_fast.config import load_config
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.training.stages import DiffusionStage
from ldmseg_fast.training.stages.diffusion import area_weights, hardest_cells
from tests.conftest import NARROW


@pytest.fixture(scope="module")
def batch(scenes):
    dataset = CocoPanoptic(scenes, "train2017", 64, num_slots=32, id_assignment="position")
    return collate([dataset[index] for index in range(3)])


@pytest.fixture
def make_stage(model_dir):
    def make(*settings):
        torch.manual_seed(0)
        return DiffusionStage(load_config("tiny", [*NARROW, f"model.mask_vae={model_dir}-autoencoder", *settings]))

    return make


def test_segments_weigh_the_same_whatever_their_area():
    segments = torch.zeros(2, 4, 4, dtype=torch.int64)
    segments[0, :2] = 1
    segments[0, 2:, :1] = 2  # the rest is void, and so is the second picture
    weights = area_weights(segments)
    assert weights.shape == (2, 1, 4, 4)
    sums = [weights[0, 0][segments[0] == segment].sum() for segment in (1, 2)]
    torch.testing.assert_close(sums[0], sums[1])
    labelled = segments[0] > 0
    torch.testing.assert_close(weights[0, 0][labelled].mean(), torch.tensor(1.0))
    assert (weights[0, 0][~labelled] == 0).all() and (weights[1] == 0).all()


@pytest.mark.parametrize(("share", "count"), [(0.25, 3), (0.001, 1), (0.99, 12)])
def test_the_hardest_labelled_cells_count_as_all_would(share, count):
    error, labelled = torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    labelled[:, 0] = False  # whatever their errors, 12 of 16 are labelled
    error[:, :, 0] = 9.0
    weighted = (error * hardest_cells(error, labelled, share)).mean(1).sum((1, 2))
    hardest = error.mean(1)[:, 1:].flatten(1).sort(descending=True).values[:, :count]
    torch.testing.assert_close(weighted, 12 * hardest.mean(1))
    assert (hardest_cells(error, torch.zeros_like(labelled), share) == 0).all()


@pytest.mark.parametrize("option", ["diffusion.area_weights=true", "diffusion.hard_examples=0.25"])
def test_loss_is_weighed(option, make_stage, batch):
    plain, other = make_stage(), make_stage(option)
    losses = [stage(batch, 0)["loss"] for stage in (plain, other)]
    assert torch.isfinite(torch.stack(losses)).all() and losses[0] != losses[1]
    losses[1].backward()
    if "hard" in option:
        assert losses[1] > losses[0]
    assert plain(batch, 0)["error"] == other(batch, 0)["error"]


@torch.no_grad()
def test_what_the_network_is_trained_towards_is_float32_inside_autocast(make_stage, batch):
    stage = make_stage()
    bits = stage.mask_bits(batch, batch["segment_ids"], batch["table"])
    alone = stage.mask_latents(batch)
    with torch.autocast("cpu", torch.bfloat16):
        inside, changed = stage.mask_latents(batch), stage.mask_vae.encode_latents(bits)
    assert alone.dtype == inside.dtype == torch.float32 and torch.equal(alone, inside)
    assert changed.dtype == torch.bfloat16  # what autocast would make of them


OPTIONS = ("diffusion.area_weights=true", "diffusion.hard_examples=0.25", "diffusion.own_estimate=1")


def test_validations_of_all_options_compare(make_stage, batch):
    """Equal weights have equal losses on held-out pictures, whatever the options of training."""
    plain, other = make_stage().eval(), make_stage(*OPTIONS).eval()
    counted = batch | {"num_segments": (batch["segment_ids"].flatten(1).amax(1))}
    assert plain.held_out_loss(counted) == other.held_out_loss(counted)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_step_from_the_own_estimate_aims_at_the_truth(prediction, make_stage, batch):
    """x_t holds the estimate, and what is aimed at leads from there to the true x_0."""
    stage = make_stage("diffusion.own_estimate=1", f"scheduler.prediction_type={prediction}")
    with torch.no_grad():
        inputs = stage.noise_inputs(batch, 0)
        output = stage.unet_output(inputs, stage.condition_of(inputs, batch, 0))
        estimate = stage.scheduler.pred_original_sample(output, inputs.noisy_latents, inputs.timesteps)
    own = stage.from_own_estimate(inputs, batch, 0)
    expected = stage.scheduler.add_noise(estimate, inputs.noise, inputs.timesteps)
    torch.testing.assert_close(own.noisy_latents, expected)
    target = stage.scheduler.target(own.mask_latents, own.noise, own.timesteps)
    reached = stage.scheduler.pred_original_sample(target, own.noisy_latents, own.timesteps)
    torch.testing.assert_close(reached, inputs.mask_latents, atol=1e-3, rtol=1e-3)
    assert not torch.equal(own.noisy_latents, inputs.noisy_latents)
    stage(batch, 0)["loss"].backward()
    assert all(p.grad is not None for p in stage.unet.parameters() if p.requires_grad)
    without = replace(stage.config, diffusion=replace(stage.config.diffusion, own_estimate=0.0))
    with torch.no_grad():
        own_loss = stage(batch, 0)["loss"]
        stage.config = without
        assert own_loss != stage(batch, 0)["loss"]
