"""diffusers' own scheduler loads the `scheduler` folder of a model, and steps as ours does."""

from pathlib import Path

import pytest
import torch

from ldmseg_fast.checkpoints.diffusers_folder import diffusers_scheduler, scheduler_settings
from ldmseg_fast.config import SchedulerConfig, from_dict
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.files import write_json
from ldmseg_fast.training.stages.few_step import ddim_update


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_of_diffusers_steps_as_ours(prediction: str, spacing: str, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    config = from_dict(SchedulerConfig, {"prediction_type": prediction, "timestep_spacing": spacing})
    write_json(tmp_path / "scheduler_config.json", diffusers_scheduler(config))
    theirs, ours = DDIMScheduler.from_pretrained(str(tmp_path)), Scheduler(config)
    torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod)
    theirs.set_timesteps(10)
    times, previous = ours.timesteps(10)
    assert theirs.timesteps.tolist() == times
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for time, next_time in zip(times, previous):
        estimate = ours.pred_original_sample(output, sample, torch.tensor([time]))
        alphas = (ours.alphas_cumprod[max(each, 0)].view(1, 1, 1, 1) for each in (time, next_time))
        found = theirs.step(output, time, sample)
        torch.testing.assert_close(found.pred_original_sample, estimate, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.prev_sample, ddim_update(sample, estimate, *alphas), rtol=1e-4, atol=1e-4)


def test_what_is_written_is_read_as_the_same_schedule() -> None:
    config = SchedulerConfig(beta_end=0.02, prediction_type="v_prediction", rescale_zero_snr=True)
    found = scheduler_settings(diffusers_scheduler(config), "scheduler")
    assert all(getattr(config, key) == value for key, value in found.items())
