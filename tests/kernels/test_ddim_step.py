from itertools import product

import pytest
import torch

from ldmseg_fast.kernels.ddim_step import ddim_step, host, make_ddim_table, reference
from ldmseg_fast.kernels.ddim_step.op import PREDICTION_TYPES, ddim_step_op


@pytest.fixture
def table(device):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    timesteps = torch.tensor([999, 666, 333])
    return make_ddim_table((1 - betas).cumprod(0).to(device), timesteps, torch.tensor([666, 333, -1]))


def make_inputs(shape, table, prediction_type, *, step=0, image_channels=4, dtype=torch.float32, last=True, out=None):
    output = torch.randn(shape, device=table.device).to(dtype)
    if last:
        output = output.contiguous(memory_format=torch.channels_last)
    image = torch.randn(shape[0], image_channels, *shape[2:], device=table.device).to(dtype)
    noisy = torch.randn(shape, device=table.device)
    index = torch.tensor(step, device=table.device)
    return output, noisy, image, index, table, prediction_type, True, out or dtype


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 63, 9), (3, 1, 1, 100), (2, 5, 7, 3), (0, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_kernel_equals_reference(shape, prediction_type, table, poison):
    for self_condition, last, step, dtype in product(
        (True, False), (True, False), (0, 2), (torch.float32, torch.float16)
    ):
        args = make_inputs(shape, table, prediction_type, step=step, image_channels=3, dtype=dtype, last=last)
        args = (*args[:6], self_condition, dtype)
        actual, expected = host.ddim_step(*args), reference.ddim_step(*args)
        for ours, theirs in zip(actual, expected):
            rtol, atol = (1e-5, 1e-5) if ours.dtype == torch.float32 else (1e-3, 1e-3)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
        assert actual[2].is_contiguous(memory_format=torch.channels_last)


def test_last_step_returns_the_estimate(table):
    for function, prediction_type in product((host.ddim_step, ddim_step), PREDICTION_TYPES):
        prev, x0, next_input = function(*make_inputs((2, 4, 5, 5), table, prediction_type, step=2))
        assert torch.equal(prev, x0)
        assert torch.equal(next_input[:, :4], x0) and torch.equal(next_input[:, 8:], x0)


def test_a_whole_loop_recovers_the_sample(table):
    """With the true noise as prediction, every step's estimate is the clean latents (Song et al., equation 12)."""
    clean, noise = torch.randn(2, 1, 4, 6, 6, device=table.device)
    image = torch.zeros_like(clean)
    latents = table[0, 0] * clean + table[0, 1] * noise
    for step in range(3):
        index = torch.tensor(step, device=table.device)
        latents, x0, _ = host.ddim_step(noise, latents, image, index, table, "epsilon", True, torch.float32)
        torch.testing.assert_close(x0, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("step", "inside"), [(99, 2), (3, 2), (-1, 0)])
def test_step_outside_the_table_is_clamped_by_kernel_and_reference(table, step, inside):
    args = make_inputs((1, 4, 4, 4), table, "epsilon", step=inside)
    beyond = (*args[:3], torch.tensor([step], dtype=torch.int32, device=table.device), *args[4:])
    for function in (host.ddim_step, reference.ddim_step):
        for one, other in zip(function(*args), function(*beyond)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("step", [3, -1])
def test_step_of_a_cpu_outside_the_table_is_refused(step):
    table = torch.full((3, 4), 0.5)
    args = make_inputs((1, 4, 4, 4), table, "epsilon", step=step)
    for function in (ddim_step, ddim_step_op):
        with pytest.raises(ValueError, match=rf"^step_index: expected 0 to 2, got {step}$"):
            function(*args)


def test_table(table):
    assert table.shape == (3, 4) and table.dtype == torch.float32
    torch.testing.assert_close(table[:, 0] ** 2 + table[:, 1] ** 2, torch.ones(3, device=table.device))
    assert torch.equal(table[:-1, 2:], table[1:, :2])
    assert table[-1, 2:].tolist() == [1.0, 0.0]


def test_table_refuses_bad_time_steps(device):
    alphas = torch.linspace(0.9, 0.1, 10, device=device)
    steps = torch.tensor([9, 4])
    with pytest.raises(ValueError, match=r"^timesteps: "):
        make_ddim_table(alphas, steps + 1, steps)
    with pytest.raises(ValueError, match=r"^timesteps: "):
        make_ddim_table(alphas, steps[:0], steps[:0])
    with pytest.raises(ValueError, match=r"^prev_timesteps: "):
        make_ddim_table(alphas, steps, steps[:1])
    with pytest.raises(ValueError, match=r"^alphas_cumprod: "):
        make_ddim_table(alphas[None], steps, steps)
    for dtype in (torch.float32, torch.uint8, torch.bool, torch.complex64):  # two of them would be masks
        with pytest.raises(ValueError, match=r"^timesteps: expected int32 or int64, got "):
            make_ddim_table(alphas, steps.to(dtype), steps)
        with pytest.raises(ValueError, match=r"^prev_timesteps: expected int32 or int64, got "):
            make_ddim_table(alphas, steps, steps.to(dtype))
    with pytest.raises(ValueError, match=r"^alphas_cumprod: "):
        make_ddim_table(alphas.long(), steps, steps)


def test_gradients_reach_the_model_output(table):
    args = make_inputs((1, 4, 4, 4), table, "v_prediction")
    args[0].requires_grad_()
    prev, _, _ = ddim_step(*args)
    prev.sum().backward()
    assert args[0].grad.abs().sum() > 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_op(prediction_type, table, check_op):
    check_op(ddim_step_op, make_inputs((2, 4, 5, 3), table, prediction_type, out=torch.float16))


def test_bad_input(table, refuses):
    names = ["model_output", "noisy_latents", "image_latents", "step_index", "table"]
    names += ["prediction_type", "self_condition", "dtype"]
    good = dict(zip(names, make_inputs((2, 4, 5, 3), table, "epsilon")))
    bad = {
        "model_output": [good["model_output"][0], good["model_output"].long()],
        "noisy_latents": [good["noisy_latents"][:1], good["noisy_latents"].half()],
        "image_latents": [good["image_latents"][:, :, :2], good["image_latents"].long()],
        "step_index": [torch.zeros(2, dtype=torch.int64, device=table.device), torch.zeros((), device=table.device)],
        "table": [table[:, :3], table.double()],
        "prediction_type": ["noise"],
        "dtype": [torch.int32],
    }
    for name, values in bad.items():
        for value in values:
            refuses(name, ddim_step, ddim_step_op, tuple({**good, name: value}.values()))
