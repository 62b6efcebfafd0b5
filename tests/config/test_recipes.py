"""Recipes: each stage of a preset has its own, the command line wins, a run keeps what it began with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ldmseg_fast.config import PRESETS, load_config, to_dict
from ldmseg_fast.config.recipes import RECIPES, STAGE_NAMES, describe_recipe
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.train import main, parse
from ldmseg_fast.training.stages import STAGES


def test_every_preset_has_a_recipe_for_every_stage():
    assert set(RECIPES) == set(PRESETS) and set(STAGE_NAMES) == set(STAGES)
    for preset, recipes in RECIPES.items():
        assert set(recipes) == set(STAGE_NAMES)
        for stage, recipe in recipes.items():
            assert recipe.source
            load_config(preset, stage=stage)


def test_the_papers_two_trainings():
    train = load_config("coco", stage="autoencoder").train
    assert (train.steps, train.batch_size, train.clip, train.warmup) == (90_000, 16, 3.0, 200)
    assert (train.learning_rate, train.weight_decay, train.no_decay) == (1e-4, 0.05, ("norm",))
    found = load_config("coco", stage="diffusion")
    assert replace(found, train=replace(found.train, validate_share=1.0)) == PRESETS["coco"]


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"coco"}))
def test_small_presets_train_as_they_did(preset, stage):
    assert load_config(preset, stage=stage) == PRESETS[preset]


def test_the_command_line_wins():
    config = load_config("coco", ["train.steps=7"], stage="autoencoder")
    assert (config.train.steps, config.train.batch_size) == (7, 16)
    (line,) = describe_recipe("coco", "autoencoder", config)
    assert "train.steps=7 (recipe: 90000)" in line and "arXiv 2401.10227" in line
    assert "(recipe: 16)" not in line and "(recipe: 0.0001)" not in line


def test_a_run_goes_on_as_it_began(tmp_path: Path):
    """A run of before there were recipes has the preset's settings in its record."""
    old = replace(PRESETS["coco"], output_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"stage": "autoencoder"} | to_dict(old)))
    _, config = parse(["autoencoder", "--config", "coco", "--resume", f"output_dir={tmp_path}"])
    assert config == old
    _, config = parse(["autoencoder", "--config", "coco", "--resume", f"output_dir={tmp_path}", "train.steps=9"])
    assert config.train.steps == 9 and config.train.batch_size == old.train.batch_size


def test_a_file_for_another_stage(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"stage": "autoencoder"} | to_dict(PRESETS["tiny"])))
    assert load_config(str(file), stage="autoencoder") == load_config(str(file)) == PRESETS["tiny"]
    with pytest.raises(ConfigError, match=r"config\.json: stage=autoencoder: settings of another stage than diffusion"):
        load_config(str(file), stage="diffusion")
    assert main(["diffusion", "--config", str(file), "--dry-run"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_dry_run_prints_the_recipe_first(capsys: pytest.CaptureFixture):
    assert main(["autoencoder", "--config", "coco", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("recipe: coco, autoencoder (arXiv 2401.10227")
