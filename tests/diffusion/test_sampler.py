"""DDIM against a loop written from the formula, and noise that belongs to an image."""

import math

import pytest
import torch

from ldmseg_fast.config import SchedulerConfig
from ldmseg_fast.diffusion.sampler import ddim, image_noise, seed_of, unet_input
from ldmseg_fast.diffusion.scheduler import Scheduler


class Network(torch.nn.Module):
    """Any function of the whole input and the time."""

    def __init__(self, channels):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(channels, 4, 3, padding=1)
        self.times = []

    def forward(self, x, timesteps):
        assert timesteps.shape == (len(x),)
        self.times.append(timesteps[0].item())
        return torch.tanh(self.conv(x)) + (timesteps.float() / 1000).sin().view(-1, 1, 1, 1)


def plain_ddim(network, noise, image_latents, config, steps, self_condition):
    """Song et al. 2021, equation 12 with sigma 0, in doubles from the betas on."""
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    ratio, x, condition = 1000 // steps, noise.double(), torch.zeros_like(noise)
    for i in reversed(range(steps)):
        time = ratio * i + ratio - 1
        parts = [x.float(), image_latents] + ([condition.float()] if self_condition else [])
        output = network(torch.cat(parts, 1), torch.full((len(x),), time)).double()
        alpha = alphas[time].item()
        if config.prediction_type == "epsilon":
            estimate = (x - math.sqrt(1 - alpha) * output) / math.sqrt(alpha)
        elif config.prediction_type == "sample":
            estimate = output
        else:
            estimate = math.sqrt(alpha) * x - math.sqrt(1 - alpha) * output
        epsilon = (x - math.sqrt(alpha) * estimate) / math.sqrt(1 - alpha)
        condition = estimate
        if i == 0:
            return estimate
        before = alphas[time - ratio].item()
        x = math.sqrt(before) * estimate + math.sqrt(1 - before) * epsilon


@pytest.mark.parametrize("self_condition", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 3, 7, 20])
@torch.no_grad()
def test_sampler_is_the_formula(steps, prediction, self_condition):
    config = SchedulerConfig(prediction_type=prediction)
    network = Network(12 if self_condition else 8)
    noise, image_latents = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    expected = plain_ddim(network, noise, image_latents, config, steps, self_condition)
    actual = ddim(network, noise, image_latents, Scheduler(config), steps, self_condition)
    assert actual.dtype == torch.float32
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=1e-4, atol=1e-5)
    assert network.times[:steps] == network.times[steps:]


@torch.no_grad()
def test_callback_and_dtype():
    network, seen = Network(12), []
    noise, image_latents = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4).bfloat16()
    network.conv.bfloat16()
    result = ddim(
        lambda x, timesteps: network.conv(x),
        noise,
        image_latents,
        Scheduler(SchedulerConfig()),
        3,
        callback=lambda step, time, latents, estimate: seen.append((step, time, latents.clone(), estimate.clone())),
    )
    assert [(step, time) for step, time, *_ in seen] == [(0, 998), (1, 665), (2, 332)]
    assert torch.equal(result, seen[-1][2])
    torch.testing.assert_close(result, seen[-1][3])
    assert result.dtype == torch.float32


def test_noise_belongs_to_the_image():
    shape = (4, 8, 8)
    together = image_noise(3, ["a", "b", 17], shape)
    assert together.shape == (3, *shape)
    assert torch.equal(together[1:2], image_noise(3, ["b"], shape))
    assert torch.equal(together[[2, 0]], image_noise(3, [17, "a"], shape))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, image_noise(4, ["a", "b", 17], shape))
    assert image_noise(3, [], shape).shape == (0, *shape)
    many = image_noise(0, range(64), shape)
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_seeds_are_the_same_everywhere():
    assert seed_of(0, 1) == seed_of("0", "1") == 2754921267890689017
    assert len({seed_of(seed, image) for seed in range(50) for image in range(50)}) == 2500
    assert all(0 <= seed_of(seed) < 2**63 for seed in range(100))


def test_input_order():
    noisy, image, condition = (torch.full((1, channels, 2, 2), float(channels)) for channels in (4, 3, 2))
    assert unet_input(noisy, image, condition)[0, :, 0, 0].tolist() == [4.0] * 4 + [3.0] * 3 + [2.0] * 2
    assert unet_input(noisy, image.half(), None).dtype == torch.float16
