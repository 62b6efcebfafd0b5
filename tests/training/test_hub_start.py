"""A run that starts from models of the Hub stays with the commits that it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ldmseg_fast.config import Config
from ldmseg_fast.errors import HubError
from ldmseg_fast.training.inputs import pin_hub_names
from ldmseg_fast.training.loop import train
from tests.checkpoints.conftest import cache, hub  # noqa: F401  (fixtures)
from tests.checkpoints.hub_server import HubServer, Repository
from tests.checkpoints.test_hub import content_of

pytestmark = pytest.mark.serial  # servers


@pytest.fixture
def repository(hub: HubServer, autoencoder: Path) -> Repository:  # noqa: F811
    """me/ae, an auto-encoder."""
    made = hub.repositories["me/ae"] = Repository()
    made.commit(content_of(autoencoder))
    return made


def test_a_run_names_the_commit_and_a_resumed_one_stays_with_it(
    repository: Repository, settings: Callable[..., Config], autoencoder: Path
) -> None:
    old = repository.branches["main"]
    config = settings("run", "model.mask_vae=me/ae", "train.steps=1", "train.validate_every=9")
    folder = train("diffusion", config)
    recorded = json.loads((folder / "config.json").read_text())["model"]["mask_vae"]
    assert recorded == f"hf://me/ae@{old}"
    assert str(Path.cwd().parent / "cache") not in (folder / "README.md").read_text()
    repository.commit(content_of(autoencoder) | {"README.md": b"moved"})
    assert pin_hub_names(config, folder).model.mask_vae == recorded
    assert pin_hub_names(config, None).model.mask_vae == f"hf://me/ae@{repository.branches['main']}"
    assert (
        pin_hub_names(replace(config, model=replace(config.model, mask_vae=recorded)), None).model.mask_vae == recorded
    )
    train("diffusion", replace(config, train=replace(config.train, steps=2)), resume=True)
    assert json.loads((folder / "config.json").read_text())["model"]["mask_vae"] == recorded


def test_a_wrong_name_ends_a_run_before_it_writes(
    repository: Repository, settings: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(HubError, match=r"me/aee: .* has no model of this name"):
        train("diffusion", settings("run", "model.mask_vae=me/aee"))
    assert not (tmp_path / "run").exists()
