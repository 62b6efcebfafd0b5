"""Noise schedule, timesteps, the three predictions, loss weights."""

import math

import numpy as np
import pytest
import torch

from ldmseg_fast.config import SchedulerConfig
from ldmseg_fast.diffusion.scheduler import Scheduler, make_betas, rescale_zero_snr

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_diffusers(schedule):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)
    ours = Scheduler(SchedulerConfig(beta_schedule=schedule))
    torch.testing.assert_close(make_betas(ours.config), theirs.betas, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert ours.alphas_cumprod.dtype == torch.float32
    assert (ours.alphas_cumprod.diff() < 0).all()


def test_the_methods_table_in_closed_form():
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    product = math.prod(1 - beta for beta in betas)
    scheduler = Scheduler(SchedulerConfig())
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, rel=1e-6)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(product, rel=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_zero_signal_at_the_end(schedule):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = make_betas(SchedulerConfig(beta_schedule=schedule))
    torch.testing.assert_close(rescale_zero_snr(betas), rescale_zero_terminal_snr(betas))
    config = SchedulerConfig(beta_schedule=schedule, rescale_zero_snr=True, prediction_type="v_prediction")
    scheduler = Scheduler(config)
    assert scheduler.alphas_cumprod[-1].abs() < 1e-6
    assert torch.isfinite(scheduler.loss_weights).all()
    with pytest.raises(ValueError, match="needs v_prediction"):
        Scheduler(SchedulerConfig(rescale_zero_snr=True))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_target_leads_back_to_the_sample(prediction):
    scheduler = Scheduler(SchedulerConfig(prediction_type=prediction))
    generator = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 1, 250, 500, 800, 999])
    noisy = scheduler.add_noise(sample, noise, timesteps)
    target = scheduler.target(sample, noise, timesteps)
    estimate = scheduler.pred_original_sample(target, noisy, timesteps)
    torch.testing.assert_close(estimate, sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_are_diffusers(prediction):
    from diffusers import DDIMScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = DDIMScheduler(**betas, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(10)
    ours = Scheduler(SchedulerConfig(prediction_type=prediction))
    output, noisy = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    for time in (901, 1):
        expected = theirs.step(output, time, noisy).pred_original_sample
        torch.testing.assert_close(
            ours.pred_original_sample(output, noisy, torch.tensor([time])), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [(1, 999, 999), (3, 998, 332), (4, 999, 249), (7, 993, 141), (30, 989, 32), (50, 999, 19), (1000, 999, 0)],
)
def test_timesteps(steps, first, last):
    times, previous = Scheduler(SchedulerConfig()).timesteps(steps)
    assert (len(times), times[0], times[-1], previous[-1]) == (steps, first, last, -1)
    assert previous[:-1] == times[1:]
    ratio = 1000 // steps
    assert times == [ratio * i + ratio - 1 for i in range(steps - 1, -1, -1)]


def test_leading_timesteps_and_wrong_numbers():
    scheduler = Scheduler(SchedulerConfig(timestep_spacing="leading"))
    assert scheduler.timesteps(4)[0] == [750, 500, 250, 0]
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps={steps}: from 1 to 1000"):
            scheduler.timesteps(steps)


def test_loss_weights():
    scheduler = Scheduler(SchedulerConfig())
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    torch.testing.assert_close(scheduler.loss_weights, torch.minimum(snr, torch.tensor(2.0)) / snr)
    assert (Scheduler(SchedulerConfig(loss_weighting="none")).loss_weights == 1).all()
    assert (Scheduler(SchedulerConfig(loss_weighting="constant", fixed_weight=0.3)).loss_weights == 0.3).all()
    linear = Scheduler(SchedulerConfig(loss_weighting="linear")).loss_weights
    assert linear[[0, 499, 999]].tolist() == pytest.approx([0.001, 0.5, 1.0])
    assert (Scheduler(SchedulerConfig(loss_weighting="inverse_log1p_snr")).loss_weights <= 1).all()


def test_loss_weights_of_the_originals_names():
    """By their definition, in float64: 0.1 in the first quarter and the SNR; the log of the inverse, at least 1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    snr = alphas / (1 - alphas)
    fixed = Scheduler(SchedulerConfig(loss_weighting="fixed")).loss_weights.numpy()
    assert fixed[:250] == pytest.approx(np.full(250, 0.1)) and fixed[250:] == pytest.approx(snr[250:], rel=1e-4)
    expected = np.maximum(np.log(1 / snr), 1)
    inverse = Scheduler(SchedulerConfig(loss_weighting="inverse_log_snr")).loss_weights.numpy()
    assert inverse == pytest.approx(expected / expected[-1], rel=1e-4)
    zero = SchedulerConfig(loss_weighting="inverse_log_snr", rescale_zero_snr=True, prediction_type="v_prediction")
    assert torch.isfinite(Scheduler(zero).loss_weights).all()


def test_one_error_weighs_the_same_in_every_prediction():
    """An error d in x_0 costs min(snr, c) d^2, whatever the network predicts."""
    generator = torch.Generator().manual_seed(0)
    sample, noise, error = (torch.randn(1, 4, 3, 3, generator=generator) for _ in range(3))
    for time in (100, 500, 900):
        timesteps, costs = torch.tensor([time]), []
        for prediction in PREDICTIONS:
            scheduler = Scheduler(SchedulerConfig(prediction_type=prediction))
            noisy = scheduler.add_noise(sample, noise, timesteps)
            alpha = scheduler.alphas_cumprod[time]
            wrong_noise = (noisy - alpha.sqrt() * (sample + error)) / (1 - alpha).sqrt()
            difference = scheduler.target(sample + error, wrong_noise, timesteps) - scheduler.target(
                sample, noise, timesteps
            )
            costs.append(scheduler.loss_weights[time] * difference.square().mean())
        torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(costs[0], costs[2], rtol=1e-3, atol=1e-6)
