"""Solvers against a problem whose answer is known, and against each other."""

import dataclasses
import itertools
import math

import pytest
import torch

from ldmseg_fast.config import SchedulerConfig
from ldmseg_fast.diffusion.inpainting import KnownLatents, whole_cells
from ldmseg_fast.diffusion.sampler import ddim, image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.diffusion.solvers import SOLVERS, check_solver, sample, solver_timesteps

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
MEAN, SPREAD = 0.7, 0.4  # of the data, one normal distribution


class Gaussian:
    """The exact network for x_0 ~ N(MEAN, SPREAD^2): its estimate of x_0 is the conditional mean. Keeps its inputs."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.inputs, self.times = [], []

    def estimate(self, x, time):
        alpha = self.scheduler.alphas_cumprod[time].double()
        gain = SPREAD**2 * alpha.sqrt() / (alpha * SPREAD**2 + 1 - alpha)
        return MEAN + gain * (x - alpha.sqrt() * MEAN)

    def __call__(self, network_input, timesteps):
        self.inputs.append(network_input.clone())
        self.times.append(timesteps[0].item())
        x, alpha = network_input[:, :1].double(), self.scheduler.alphas_cumprod[timesteps[0]].double()
        estimate = self.estimate(x, timesteps[0])
        if self.scheduler.config.prediction_type == "sample":
            return estimate.float()
        epsilon = (x - alpha.sqrt() * estimate) / (1 - alpha).sqrt()
        if self.scheduler.config.prediction_type == "epsilon":
            return epsilon.float()
        return (alpha.sqrt() * epsilon - (1 - alpha).sqrt() * estimate).float()

    def exact(self, x, start, end):
        """The solution of the ODE that the solvers follow, from `start` to `end`, and the estimate of x_0 there."""
        alphas = self.scheduler.alphas_cumprod.double()
        deviation = [(alphas[time] * SPREAD**2 + 1 - alphas[time]).sqrt() for time in (start, end)]
        at_end = alphas[end].sqrt() * MEAN + deviation[1] / deviation[0] * (x - alphas[start].sqrt() * MEAN)
        return self.estimate(at_end, end)


def smooth_scheduler(prediction="v_prediction", zero_end=False, steps=1025):
    """a_t = cos^2: smooth, so that orders of convergence show, and zero at the end on demand."""
    scheduler = Scheduler(SchedulerConfig(num_train_timesteps=steps, prediction_type=prediction))
    angle = torch.linspace(0.02, math.pi / 2 - (0 if zero_end else 0.02), steps, dtype=torch.float64)
    scheduler.alphas_cumprod = angle.cos().square().float()
    if zero_end:
        scheduler.alphas_cumprod[-1] = 0.0
    return scheduler


def run(network, noise, steps=4, image_channels=2, self_condition=False, **settings):
    image_latents = torch.zeros(len(noise), image_channels, *noise.shape[2:])
    return sample(network, noise, image_latents, network.scheduler, steps, self_condition, **settings)


NOISE = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)


ENDS = [(name, False) for name in PREDICTIONS] + [("sample", True), ("v_prediction", True)]


@pytest.mark.parametrize(("prediction", "zero_end"), ENDS)
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_each_solver_converges_with_its_order(solver, order, prediction, zero_end):
    network = Gaussian(smooth_scheduler(prediction, zero_end))
    start, end = 1024 if zero_end else 960, 256
    errors = []
    for steps in (8, 16, 32):
        times = [round(start + (end - start) * step / steps) for step in range(steps + 1)]
        result = run(network, NOISE, solver=solver, timesteps=times)
        errors.append((result - network.exact(NOISE.double(), start, end)).abs().max().item())
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < (1e-2 if order == 1 else 5e-4)
    assert all(abs(rate - order) < 0.2 for rate in rates), (errors, rates)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("self_condition", [True, False])
def test_predictions_agree(solver, self_condition):
    results = []
    for prediction in PREDICTIONS:
        network = Gaussian(smooth_scheduler(prediction))
        results.append(run(network, NOISE, 7, solver=solver, self_condition=self_condition))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_step_is_the_estimate_itself(prediction):
    network = Gaussian(Scheduler(SchedulerConfig(prediction_type=prediction)))
    expected = network.estimate(NOISE.double(), 999).float()
    for solver, eta in [*((solver, 0.0) for solver in SOLVERS), ("ddim", 1.0)]:
        result = run(network, NOISE, 1, solver=solver, eta=eta)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
        assert network.times.pop() == 999 and not network.times


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", range(1, 12))
def test_steps_are_evaluations_of_the_network(solver, steps):
    network = Gaussian(Scheduler(SchedulerConfig(prediction_type="sample")))
    run(network, NOISE, steps, solver=solver)
    assert len(network.times) == steps


def test_the_unfused_ddim_is_the_fused_one():
    class Nothing:
        """A constraint that knows nothing: takes the way around the fused step."""

        condition = staticmethod(torch.zeros_like)
        latents = staticmethod(lambda latents, timestep: latents)
        estimate = staticmethod(lambda estimate: estimate)

    for prediction in PREDICTIONS:
        network = Gaussian(Scheduler(SchedulerConfig(prediction_type=prediction)))
        plain = run(network, NOISE, 9, self_condition=True)
        around = run(network, NOISE, 9, self_condition=True, constraint=Nothing())
        torch.testing.assert_close(plain, around, rtol=1e-4, atol=1e-5)


def test_ddim_goes_through_the_fused_step_bit_for_bit():
    network = Gaussian(Scheduler(SchedulerConfig(prediction_type="v_prediction")))
    image_latents = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = ddim(network, NOISE, image_latents, network.scheduler, 6)
    assert torch.equal(sample(network, NOISE, image_latents, network.scheduler, 6), expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_terminal_snr(solver):
    """a_T is exactly zero: x_T is noise alone, and nothing divides by it."""
    for prediction in ("sample", "v_prediction"):
        scheduler = Scheduler(SchedulerConfig(prediction_type=prediction, rescale_zero_snr=True))
        assert scheduler.alphas_cumprod[-1] == 0
        network = Gaussian(scheduler)
        fine = run(network, NOISE, timesteps=range(999, 0, -5))
        for steps in (1, 2, 3, 10, 11):
            assert torch.isfinite(run(network, NOISE, steps, solver=solver)).all()
        coarse = run(network, NOISE, solver=solver, timesteps=[*range(999, 4, -35), 4])
        torch.testing.assert_close(coarse, fine, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="noise is no target"):
        Scheduler(SchedulerConfig(prediction_type="epsilon", rescale_zero_snr=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_self_conditioning_sees_the_last_estimate(solver):
    network, estimates = Gaussian(Scheduler(SchedulerConfig(prediction_type="sample"))), []

    def denoise(network_input, timesteps):
        output = network(network_input, timesteps)
        estimates.append(output)
        return output

    sample(denoise, NOISE, torch.zeros(1, 2, 3, 3), network.scheduler, 5, True, solver=solver)
    assert [x.shape[1] for x in network.inputs] == [4] * 5
    assert (network.inputs[0][:, 3:] == 0).all()
    for seen, estimate in zip(network.inputs[1:], estimates):
        assert torch.equal(seen[:, 3:], estimate)


def noise_of(ids, seed=0):
    return lambda step: image_noise(seed * 1000 + step, ids, (1, 3, 3))


def test_eta_is_reproducible_per_image():
    network = Gaussian(Scheduler(SchedulerConfig(prediction_type="sample")))
    ids = ["a", "b", 3]
    settings = {"eta": 0.7, "solver": "ddim"}
    start = image_noise(0, ids, (1, 3, 3))
    together = run(network, start, 6, step_noise=noise_of(ids), **settings)
    assert torch.equal(together, run(network, start, 6, step_noise=noise_of(ids), **settings))
    assert not torch.allclose(together, run(network, start, 6, step_noise=noise_of(ids, seed=1), **settings))
    for row, name in enumerate(ids):
        alone = run(network, start[[row]], 6, step_noise=noise_of([name]), **settings)
        # vectors and what is left over at their end may be rounded differently
        torch.testing.assert_close(together[[row]], alone, rtol=1e-6, atol=1e-6)


def test_ancestral_sampling_gives_the_right_distribution():
    """With eta 1 many samples have the data's mean and nearly its deviation (Song et al. 2021, table 1's DDPM)."""
    network = Gaussian(Scheduler(SchedulerConfig(prediction_type="sample")))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 100, 100, generator=generator)
    step_noise = lambda step: torch.randn(noise.shape, generator=generator)  # noqa: E731
    result = run(network, noise, 100, eta=1.0, step_noise=step_noise)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert result.std().item() == pytest.approx(SPREAD, abs=0.03)


def test_timesteps_of_each_spacing():
    scheduler = Scheduler(SchedulerConfig())
    assert scheduler.timesteps(4, "trailing")[0] == [999, 749, 499, 249]
    assert scheduler.timesteps(4, "leading")[0] == [750, 500, 250, 0]
    assert scheduler.timesteps(1, [999, 500, 20]) == ([999, 500, 20], [500, 20, -1])
    assert solver_timesteps(scheduler, "heun", 5) == scheduler.timesteps(3)[0]
    assert solver_timesteps(scheduler, "heun", 5, [9, 4]) == [9, 4]
    for wrong in ([], [5, 5], [5, 9], [1000], [3, -1]):
        with pytest.raises(ValueError, match="timesteps="):
            scheduler.timesteps(1, wrong)
    with pytest.raises(ValueError, match="timesteps='sideways': trailing, leading"):
        scheduler.timesteps(1, "sideways")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_list_of_timesteps_decides(solver):
    network, seen = Gaussian(Scheduler(SchedulerConfig(prediction_type="sample"))), []
    run(network, NOISE, 77, solver=solver, timesteps=[900, 500, 30], callback=lambda *step: seen.append(step[:2]))
    assert sorted(set(network.times), reverse=True) == [900, 500, 30]
    assert seen == [(0, 900), (1, 500), (2, 30)]


def test_what_is_refused():
    for arguments, message in [
        (("euler",), "solver='euler': one of ddim"),
        (("ddim", 1.5), "eta=1.5"),
        (("ddim", -0.1), "eta=-0.1"),
        (("heun", 0.5), "heun is deterministic"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_solver(*arguments)
    network = Gaussian(Scheduler(SchedulerConfig()))
    with pytest.raises(ValueError, match="step_noise"):
        run(network, NOISE, 3, eta=1.0)


KNOWN = torch.arange(9.0).view(1, 1, 3, 3)
CELLS = torch.tensor([[True, False, False], [True, True, False], [False, False, False]]).view(1, 1, 3, 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_cells_end_as_they_are_known(solver):
    network = Gaussian(Scheduler(SchedulerConfig(prediction_type="v_prediction")))
    constraint = KnownLatents(KNOWN, CELLS, network.scheduler)
    result = run(network, NOISE, 5, solver=solver, self_condition=True, constraint=constraint)
    assert torch.equal(result[CELLS], KNOWN[CELLS])
    free = run(network, NOISE, 5, solver=solver, self_condition=True)
    torch.testing.assert_close(result[~CELLS], free[~CELLS], rtol=1e-3, atol=1e-4)  # cells of this toy know no other
    for seen in network.inputs[:5]:
        assert torch.equal(seen[:, 3:][CELLS], KNOWN[CELLS])  # the condition, from the first evaluation on
    assert (network.inputs[0][:, 3:][~CELLS] == 0).all()


def test_the_network_sees_known_cells_at_its_noise_level():
    """Replacing the estimate keeps DDIM on the line from the noise to what is known; renoising draws a new end."""
    scheduler = Scheduler(dataclasses.replace(SchedulerConfig(), prediction_type="sample"))
    draws = [torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(step)) for step in range(4)]
    for step_noise in (None, lambda step: draws[step]):
        network = Gaussian(scheduler)
        constraint = KnownLatents(KNOWN, CELLS, scheduler, step_noise)
        run(network, NOISE, 4, constraint=constraint)
        for step, (seen, time) in enumerate(zip(network.inputs, network.times)):
            alpha = scheduler.alphas_cumprod[time]
            if step_noise is None:  # x_T = sqrt(a_T) known + sqrt(1 - a_T) epsilon fixes epsilon
                first = scheduler.alphas_cumprod[999]
                noise = (NOISE - first.sqrt() * KNOWN) / (1 - first).sqrt()
            else:
                noise = draws[step]
            expected = alpha.sqrt() * KNOWN + (1 - alpha).sqrt() * noise
            torch.testing.assert_close(seen[:, :1][CELLS], expected[CELLS], rtol=1e-4, atol=1e-4)


def test_whole_cells():
    known = torch.ones(1, 8, 12, dtype=torch.bool)
    known[0, 0, 0] = False
    assert whole_cells(known, 4)[0, 0].tolist() == [[False, True, True], [True, True, True]]
    assert whole_cells(known, 4, margin=1)[0, 0].tolist() == [[False, False, True], [False, False, True]]
