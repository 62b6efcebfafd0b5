"""A data set, settings and an auto-encoder that are small on every axis."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmseg_fast.config import Config, load_config
from ldmseg_fast.data.scenes import write_scenes
from tests.training.helpers import ROOT, TINY, Job


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation scenes of 32x32."""
    return write_scenes(tmp_path_factory.mktemp("training") / "scenes", 24, 32, 0, workers=1, version=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(scenes: Path, tmp_path: Path) -> Callable[..., Config]:
    """`settings("name", "train.steps=3")`: the tiny configuration, writing into tmp_path/name."""

    def make(name: str, *overrides: str) -> Config:
        fixed = [f"data.root={scenes}", f"output_dir={tmp_path / name}", "train.threads=1"]
        return load_config(str(TINY), [*fixed, *overrides])

    return make


@pytest.fixture(scope="session")
def autoencoder(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a barely trained auto-encoder."""
    from ldmseg_fast.training.loop import train

    folder = tmp_path_factory.mktemp("training") / "autoencoder"
    overrides = [
        f"data.root={scenes}",
        f"output_dir={folder}",
        "train.threads=1",
        "train.steps=4",
        "train.save_every=4",
    ]
    return train("autoencoder", load_config(str(TINY), [*overrides, "train.validate_every=1000", "data.val_limit=2"]))


@pytest.fixture(scope="session")
def diffusion(scenes: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a barely trained diffusion model."""
    from ldmseg_fast.training.loop import train

    folder = tmp_path_factory.mktemp("training") / "diffusion"
    fixed = [f"data.root={scenes}", f"output_dir={folder}", f"model.mask_vae={autoencoder}", "train.threads=1"]
    overrides = ["train.steps=2", "train.save_every=2", "train.validate_every=1000", "data.val_limit=2"]
    return train("diffusion", load_config(str(TINY), [*fixed, *overrides]))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """`start(command)` in a session of its own; whatever of it is left when the test ends is killed."""
    jobs: list[Job] = []

    def launch(command: list[Any], **environment: str) -> Job:
        log = tmp_path / f"job-{len(jobs)}.txt"
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        variables = {name: value for name, value in os.environ.items() if name not in launchers}
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LDMSEG_TEST_JOB": str(log)} | environment
        with log.open("w") as output:
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=variables, stdout=output, stderr=output, start_new_session=True
            )
        jobs.append(Job(process, log))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.end()
