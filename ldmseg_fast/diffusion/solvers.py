"""Solves the reverse process by several solvers behind one signature; all see the model as an estimate of x_0.

In all of them x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) epsilon, and the last step returns the estimate of x_0 itself. A
schedule whose a_T is zero (Lin et al. 2024) is nothing special.

Sources: DDIM, Song et al. 2021, arXiv 2010.02502; DPM-Solver++, Lu et al. 2022, arXiv 2211.01095; Heun, Karras et al.
2022, arXiv 2206.00364.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldmseg_fast.diffusion.sampler import Callback, Denoise, ddim, unet_input
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import ArgumentError

SOLVERS = ("ddim", "dpmpp_2m", "heun")
Timesteps = Sequence[int] | str | None  # a decreasing list, "trailing" or "leading", or the schedule's own spacing
StepNoise = Callable[[int], Tensor]  # step -> standard normal noise [B, C, h, w]


class Constraint(Protocol):
    """Says what is known of x_0, and puts it in at each evaluation of the network."""

    def condition(self, latents: Tensor) -> Tensor:
        """Returns what takes the place of the last estimate in the first evaluation, float32 [B, C, h, w]."""
        ...

    def latents(self, latents: Tensor, timestep: int) -> Tensor:
        """Returns x_t, float32 [B, C, h, w], as the network is to see it."""
        ...

    def estimate(self, estimate: Tensor) -> Tensor:
        """Returns the estimate of x_0, float32 [B, C, h, w], that the solver goes on with."""
        ...


class Estimator:
    """Turns the network into a function x_t -> x_0: prediction type, self-conditioning and constraint in one place.

    It keeps the last estimate, so each sampling needs one of its own.

    Args:
        denoise: takes the network's whole input and the timesteps.
        image_latents: float [B, C_image, h, w]; their dtype is the network's.
        scheduler: alphas and prediction type.
        self_condition: whether the input ends in the last estimate; before there is one, in zeros.
        constraint: what is known of x_0.
    """

    def __init__(
        self,
        denoise: Denoise,
        image_latents: Tensor,
        scheduler: Scheduler,
        self_condition: bool,
        constraint: Constraint | None = None,
    ) -> None:
        self.denoise = denoise
        self.image_latents = image_latents
        self.scheduler = scheduler
        self.self_condition = self_condition
        self.constraint = constraint
        self.condition: Tensor | None = None

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Estimates x_0, float32 [B, C, h, w], from x_t, float32 [B, C, h, w]."""
        if self.constraint is not None:
            latents = self.constraint.latents(latents, timestep)
        if self.self_condition and self.condition is None:
            known = self.constraint
            self.condition = torch.zeros_like(latents) if known is None else known.condition(latents)
        times = torch.full((len(latents),), timestep, device=latents.device)
        model_output = self.denoise(unet_input(latents, self.image_latents, self.condition), times)
        estimate = self.scheduler.pred_original_sample(model_output.float(), latents, times)
        if self.constraint is not None:
            estimate = self.constraint.estimate(estimate)
        if self.self_condition:
            self.condition = estimate
        return estimate


@torch.no_grad()
def sample(
    denoise: Denoise,
    noise: Tensor,
    image_latents: Tensor,
    scheduler: Scheduler,
    num_inference_steps: int,
    self_condition: bool = True,
    callback: Callback | None = None,
    *,
    solver: str = "ddim",
    eta: float = 0.0,
    timesteps: Timesteps = None,
    step_noise: StepNoise | None = None,
    constraint: Constraint | None = None,
) -> Tensor:
    """Samples x_0 from noise by any solver.

    Args:
        denoise: the network; takes its whole input and the timesteps.
        noise: x_T, float [B, C, h, w].
        image_latents: float [B, C_image, h, w]; their dtype is the network's.
        scheduler: alphas, timesteps and prediction type.
        num_inference_steps: evaluations of the network. A list of `timesteps` decides instead: as many evaluations as
            it is long, with "heun" 2 n - 1.
        self_condition: whether the network's input ends in C condition channels.
        callback: called after each step with (step, timestep, noisy_latents, pred_original_sample).
        solver: "ddim", "dpmpp_2m" or "heun".
        eta: of "ddim": 0 is deterministic, 1 is ancestral sampling.
        timesteps: where the network is evaluated; see `Scheduler.timesteps`.
        step_noise: where eta is above 0: fresh noise for each step.
        constraint: what is known of x_0, for inpainting.

    Returns:
        The last estimate of x_0, float32 [B, C, h, w]: scaled mask latents.

    Raises:
        ArgumentError: what `check_solver` and `Scheduler.timesteps` refuse, and an eta above 0 without `step_noise`.
    """
    check_solver(solver, eta)
    if solver == "ddim" and eta == 0 and constraint is None:
        return ddim(denoise, noise, image_latents, scheduler, num_inference_steps, self_condition, callback, timesteps)
    estimate = Estimator(denoise, image_latents, scheduler, self_condition, constraint)
    times = solver_timesteps(scheduler, solver, num_inference_steps, timesteps)
    alphas = scheduler.alphas_cumprod.tolist()  # all at once: each number read from a GPU would wait for it
    signal = [math.sqrt(alphas[time]) for time in times] + [1.0]
    sigma = [math.sqrt(1.0 - alphas[time]) for time in times] + [0.0]
    steps: Iterator[tuple[Tensor, Tensor]]
    if solver == "ddim":
        steps = _ddim(estimate, noise.float(), times, signal, sigma, eta, step_noise)
    elif solver == "dpmpp_2m":
        steps = _dpmpp_2m(estimate, noise.float(), times, signal, sigma)
    else:
        is_list = not (timesteps is None or isinstance(timesteps, str))
        uncorrected = 0 if is_list else 1 - num_inference_steps % 2
        steps = _heun(estimate, noise.float(), times, signal, sigma, uncorrected)
    latents = noise
    for step, (latents, pred_original_sample) in enumerate(steps):
        if callback is not None:
            callback(step, times[step], latents, pred_original_sample)
    return latents


def check_solver(solver: str, eta: float = 0.0) -> None:
    """Checks that a solver exists and takes this eta.

    Raises:
        ArgumentError: an unknown solver, an eta outside 0..1, or an eta of a solver that has none.
    """
    if solver not in SOLVERS:
        raise ArgumentError(f"solver={solver!r:.80}: one of {', '.join(SOLVERS)} expected")
    if not 0.0 <= eta <= 1.0:
        raise ArgumentError(f"eta={eta}: from 0 (deterministic) to 1 (ancestral sampling)")
    if eta and solver != "ddim":
        raise ArgumentError(f"eta={eta}: {solver} is deterministic; use solver=ddim, or leave eta at 0")


def solver_timesteps(
    scheduler: Scheduler, solver: str, num_inference_steps: int, timesteps: Timesteps = None
) -> list[int]:
    """Lists the times of a solver's steps.

    Heun's steps take two evaluations each but for the last. So N evaluations make (N + 1) // 2 steps, or, N being even,
    one more of which the first goes without its correction.

    Raises:
        ArgumentError: what `Scheduler.timesteps` refuses.
    """
    if solver != "heun" or not (timesteps is None or isinstance(timesteps, str)):
        return scheduler.timesteps(num_inference_steps, timesteps)[0]
    scheduler.timesteps(num_inference_steps, timesteps)  # refuses what cannot be, naming the number that was given
    return scheduler.timesteps(num_inference_steps // 2 + 1, timesteps)[0]


def _ddim(
    estimate: Estimator,
    latents: Tensor,
    times: Sequence[int],
    signal: Sequence[float],
    sigma: Sequence[float],
    eta: float,
    step_noise: StepNoise | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps by DDIM: Song et al. 2021, equation 12, with the standard deviation of equation 16."""
    for step, time in enumerate(times):
        x0 = estimate(latents, time)
        if step == len(times) - 1:
            yield x0, x0
            return
        epsilon = (latents - signal[step] * x0) / sigma[step]
        remaining = 1.0 - (signal[step] / signal[step + 1]) ** 2
        deviation = eta * sigma[step + 1] / sigma[step] * math.sqrt(remaining)
        latents = signal[step + 1] * x0 + math.sqrt(sigma[step + 1] ** 2 - deviation**2) * epsilon
        if deviation:
            if step_noise is None:
                raise ArgumentError(f"eta={eta}: give step_noise, which draws the noise of each step")
            latents = latents + deviation * step_noise(step).to(latents)
        yield latents, x0


def _dpmpp_2m(
    estimate: Estimator, latents: Tensor, times: Sequence[int], signal: Sequence[float], sigma: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps by DPM-Solver++(2M), data prediction (Lu et al. 2022b, algorithm 2).

    The first and the last step are of first order.
    """
    before: Tensor | None = None
    last_width = 0.0
    for step, time in enumerate(times):
        x0 = estimate(latents, time)
        if step == len(times) - 1:
            yield x0, x0
            return
        # with lambda = log(signal / sigma) and h its step, exp(-h) is the ratio of signal / sigma here and there
        shrink = signal[step] * sigma[step + 1] / (sigma[step] * signal[step + 1])
        width = -math.log(shrink) if shrink else math.inf
        extrapolated = x0
        if before is not None:
            weight = width / (2.0 * last_width)  # 1 / (2 r); zero after a step from a_T = 0, which is infinitely wide
            extrapolated = (1.0 + weight) * x0 - weight * before
        latents = sigma[step + 1] / sigma[step] * latents + signal[step + 1] * (1.0 - shrink) * extrapolated
        before, last_width = x0, width
        yield latents, x0


def _heun(
    estimate: Estimator,
    latents: Tensor,
    times: Sequence[int],
    signal: Sequence[float],
    sigma: Sequence[float],
    uncorrected: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps by Heun's method (Karras et al. 2022, algorithm 1) without the churn; the first `uncorrected` are Euler's.

    The ODE is theirs with u = signal / sigma in the place of 1 / u: d(x / sigma) / du = x_0(x). It is finite at a_T =
    0, and Euler's step of it is DDIM's, as Euler's step of theirs is.
    """
    for step, time in enumerate(times):
        x0 = estimate(latents, time)
        if step == len(times) - 1:
            yield x0, x0
            return
        here, there = signal[step] / sigma[step], signal[step + 1] / sigma[step + 1]
        start = latents / sigma[step]
        latents = sigma[step + 1] * (start + (there - here) * x0)
        if step >= uncorrected:
            x0 = 0.5 * (x0 + estimate(latents, times[step + 1]))
            latents = sigma[step + 1] * (start + (there - here) * x0)
        yield latents, x0
