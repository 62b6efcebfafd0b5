"""Models by name, and how a run becomes one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ldmseg_fast import LDMSegPipeline, cli
from ldmseg_fast.checkpoints import shipped as pretrained
from ldmseg_fast.checkpoints.model_folder import load_component, load_index
from ldmseg_fast.checkpoints.tensors import load_weights
from ldmseg_fast.commands import ship
from ldmseg_fast.config import load_config, to_dict
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.training.loop import train
from tests.conftest import NARROW


@pytest.fixture
def weights(tmp_path, model_dir, monkeypatch):
    """A package's folder of weights with one model in it, "small"."""
    folder = tmp_path / "weights"
    ship.ship(model_dir, folder / "small")
    monkeypatch.setattr(pretrained, "SHIPPED", folder)
    return folder


def test_a_word_is_a_name_and_everything_else_a_path(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrained.resolve_model_dir("small") == weights / "small"
    assert (
        pretrained.resolve_model_dir("./small").name == "small" and not pretrained.resolve_model_dir("./small").exists()
    )
    (tmp_path / "small").mkdir()
    assert pretrained.resolve_model_dir("small").resolve() == tmp_path / "small"  # what exists is meant
    with pytest.raises(CheckpointError, match=r"large: no such model folder.*\(shipped: small\).*model_index.json"):
        pretrained.resolve_model_dir("large")


def test_releases_of_a_checkout_go_by_name(weights, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "RELEASES", tmp_path / "releases")
    message = rf"photographs: this release is no part of the package, and {tmp_path}/releases/photographs is not there"
    with pytest.raises(CheckpointError, match=message):
        pretrained.resolve_model_dir("photographs")
    shutil.copytree(model_dir, tmp_path / "releases" / "photographs")
    assert pretrained.resolve_model_dir("photographs") == tmp_path / "releases" / "photographs"
    assert "photographs" not in pretrained.shipped_models()


def test_half_weights_load_into_float32_and_predict_alike(weights, model_dir, scenes):
    halves = load_weights(weights / "small" / "unet" / "model.safetensors")
    assert {value.dtype for value in halves.values()} == {torch.float16}
    unet = load_component(weights / "small", "unet")
    for name, value in load_component(model_dir, "unet").state_dict().items():
        own = unet.state_dict()[name]
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, value, rtol=1e-3, atol=1e-6)
    images = [CocoPanoptic(scenes, "val2017", 64).load_image(index) for index in range(2)]
    logits = [LDMSegPipeline.from_pretrained(name)(images, 2, output_type="logits") for name in ("small", model_dir)]
    torch.testing.assert_close(*logits, rtol=0.02, atol=0.02)


def test_int8_weights_are_a_quarter_as_large_and_predict_alike(model_dir, scenes, tmp_path):
    folder = ship.ship(model_dir, tmp_path / "int8", dtype="int8")
    path = "unet/model.safetensors"
    stored, exact, back = load_file(folder / path), load_weights(model_dir / path), load_weights(folder / path)
    small = [name for name, value in exact.items() if stored[name].dtype == torch.float16]
    assert 0 < len(small) < len(exact) and back.keys() == exact.keys()
    for name in exact.keys() - set(small):
        assert stored[name].dtype == torch.int8
        scale = stored[name + ".int8_scale"].float().view(-1, *[1] * (exact[name].ndim - 1))
        assert ((back[name] - exact[name]).abs() <= 0.5 * scale * 1.001 + 0.5e-3 * exact[name].abs()).all()
    assert (folder / path).stat().st_size < 0.35 * (model_dir / path).stat().st_size
    encoder = load_file(folder / "image_vae/model.safetensors").values()
    assert {value.dtype for value in encoder} == {torch.float16}  # where rounding costs most
    images = [CocoPanoptic(scenes, "val2017", 64).load_image(index) for index in range(2)]
    logits = [LDMSegPipeline.from_pretrained(name)(images, 2, output_type="logits") for name in (folder, model_dir)]
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * logits[1].std()


def test_a_name_stands_for_a_folder_everywhere(weights, scenes):
    report = evaluate("small", scenes, EvaluationOptions(steps=1, limit=2))
    assert report["model"] == "small" and report["images"] == 2
    from ldmseg_fast.training.stages import DiffusionStage, OneStepStage

    assert (
        OneStepStage(
            load_config("tiny", [*NARROW, "model.init_from=small", "few_step.matching=none"])
        ).unet.conv_in.weight.dtype
        == torch.float32
    )
    stage = DiffusionStage(load_config("tiny", [*NARROW, "model.init_from=small", "model.mask_vae=small"]))
    assert all(parameter.dtype == torch.float32 for parameter in stage.parameters())


def test_the_card_tells_every_training(scenes, tmp_path):
    small = [*NARROW, f"data.root={scenes}", "train.steps=1", "data.val_limit=1", "train.warmup=1", "data.limit=4"]
    for stage, more in {
        "autoencoder": [],
        "diffusion": [f"model.mask_vae={tmp_path / 'autoencoder'}", "train.seed=7"],
        "one_step": [f"model.init_from={tmp_path / 'diffusion'}", "few_step.steps=2", "few_step.matching=none"],
    }.items():
        train(stage, load_config("tiny", [*small, f"output_dir={tmp_path / stage}", *more]))
    assert cli.main(["ship", str(tmp_path / "one_step"), str(tmp_path / "out" / "tiny")]) == 0
    card = (tmp_path / "out" / "tiny" / "README.md").read_text()
    assert card.index("## training 1: autoencoder") < card.index("## training 2: diffusion")
    assert card.index("## training 2: diffusion") < card.index("## training 3: one_step")
    assert "python ldmseg_fast/train.py one_step --config tiny" in card and "few_step.steps=2" in card
    assert "seed=7" in card and "cores, PyTorch" in card and "steps=1" in card and "data=scenes" in card
    assert str(tmp_path) not in card
    assert load_index(tmp_path / "out" / "tiny")["num_inference_steps"] == 2


def test_what_is_too_big_or_too_wide_for_half_precision_is_refused(model_dir, tmp_path, monkeypatch, capsys):
    ship.ship(model_dir, tmp_path / "weights" / "one")
    size = ship.folder_size(tmp_path / "weights" / "one")
    monkeypatch.setattr(ship, "LIMIT", int(1.5 * size))
    assert ship.ship(model_dir, tmp_path / "weights" / "one").is_dir()  # replaced, and counted once
    assert cli.main(["ship", str(model_dir), str(tmp_path / "weights" / "two")]) == 2
    assert "with the other models" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["one"]
    with pytest.raises(CheckpointError, match=r"conv not finite in torch.float16; use --dtype bf16"):
        ship.half({"conv": torch.tensor([1e6])}, torch.float16, "x")


def test_the_limit_is_that_of_the_place(model_dir, tmp_path, monkeypatch, capsys):
    """A release counts alone and has a limit of its own; a folder elsewhere has none."""
    size = ship.folder_size(ship.ship(model_dir, tmp_path / "releases" / "one"))
    monkeypatch.setattr(ship, "LIMIT", 1)
    monkeypatch.setattr(ship, "RELEASE_LIMIT", int(1.5 * size))
    ship.ship(model_dir, tmp_path / "releases" / "two")
    ship.ship(model_dir, tmp_path / "elsewhere" / "two")
    monkeypatch.setattr(ship, "RELEASE_LIMIT", size // 2)
    message = r"MB in fp16; .* are the limit of one release: use --dtype int8, take an OUT outside .*releases, or train"
    with pytest.raises(CheckpointError, match=message):
        ship.ship(model_dir, tmp_path / "releases" / "three")
    assert not (tmp_path / "releases" / "three").exists()
    with pytest.raises(CheckpointError, match=r"in int8; .* one release: take an OUT outside"):
        ship.ship(model_dir, tmp_path / "releases" / "three", "int8")


def test_the_card_names_all_sets(model_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model_dir, run)
    settings = to_dict(load_config("tiny", [f"data.root={tmp_path}/one,{tmp_path}/two:train:val/"]))
    (run / "config.json").write_text(json.dumps({"stage": "diffusion"} | settings))
    card = (ship.ship(run, tmp_path / "shipped") / "README.md").read_text()
    assert "data=one,two:train:val\n" in card and "data.root=one,two:train:val" in card and str(tmp_path) not in card


def test_only_a_shipped_model_is_replaced(model_dir, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(model_dir, run)
    (run / "logs").mkdir()
    data.mkdir()
    (data / "photo.jpg").write_bytes(b"dear to someone")
    for out in (data, run):
        with pytest.raises(CheckpointError, match=f"{out.name}: holds something else"):
            ship.ship(run, out)
    assert (data / "photo.jpg").is_file() and (run / "logs").is_dir()


def test_a_file_is_not_replaced_by_a_model(model_dir, tmp_path):
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.docx: is no folder"):
        ship.ship(model_dir, tmp_path / "thesis.docx")
    assert (tmp_path / "thesis.docx").read_text() == "mine"


def test_a_shipped_model_with_files_of_the_users_stays(model_dir, tmp_path):
    out = ship.ship(model_dir, tmp_path / "weights" / "one")
    (out / "LICENSE").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds something else than a shipped model \(LICENSE\)"):
        ship.ship(model_dir, out)
    (out / "LICENSE").unlink()
    with pytest.raises(ArgumentError, match="would be written among what this command reads"):
        ship.ship(out, out)
    (tmp_path / "link").symlink_to(out)
    ship.ship(model_dir, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (out / "model_index.json").is_file()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["one"]


def test_a_run_without_a_log_of_its_starts(model_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model_dir, run)
    settings = {"stage": "diffusion", "data": {"root": "/somewhere/scenes"}, "train": {"seed": 3}, "model": {}}
    (run / "config.json").write_text(json.dumps(settings))
    ship.ship(run, tmp_path / "out", machine="two cores")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "machine=two cores" in card and "steps=not recorded" in card and "/somewhere" not in card


def test_categories_ship_too(category_model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(category_model, run)
    settings = {"stage": "diffusion", "data": {"root": "scenes"}, "train": {"seed": 3}, "model": {}}
    (run / "config.json").write_text(json.dumps(settings))
    out = ship.ship(run, tmp_path / "models" / "out")
    assert (out / "categories.json").read_bytes() == (run / "categories.json").read_bytes()
    assert "| stuff (" in (out / "README.md").read_text()
    (run / "categories.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"run/categories.json: 0 categories"):
        ship.ship(run, out)
    assert (out / "categories.json").stat().st_size > 2


def test_the_command_of_a_start_without_a_model_names_its_networks():
    encoder = ["image_encoder.kind=efficientnet_lite", "image_encoder.picture_scale=4"]
    changed = [
        "model.mask_vae=runs/ae",
        "mask_vae.num_slots=24",
        "unet.in_channels=72",
        "image_encoder.latent_channels=64",
        *encoder,
    ]
    line = ship.command({"stage": "one_step"} | to_dict(load_config("tiny", changed))).split()
    assert {"model.mask_vae=ae", *changed[1:]} <= set(line)
    line = ship.command(
        {"stage": "one_step"} | to_dict(load_config("tiny", ["model.init_from=tiny", *encoder]))
    ).split()
    assert {"model.init_from=tiny", *encoder} <= set(line)
    line = ship.command({"stage": "one_step"} | to_dict(load_config("tiny", ["model.init_from=tiny"])))
    assert line == "python ldmseg_fast/train.py one_step --config tiny model.init_from=tiny"


def test_what_ships_is_small_runs_and_says_where_it_comes_from(scenes):
    folders = pretrained.shipped_models()
    assert sum(ship.folder_size(folder) for folder in folders.values()) <= ship.LIMIT
    image = CocoPanoptic(scenes, "val2017", 64).load_image(0)
    for name, folder in folders.items():
        card = (folder / "README.md").read_text()
        assert "command=python ldmseg_fast/train.py" in card and "not recorded" not in card
        assert LDMSegPipeline.from_pretrained(name)(image)[0].segmentation.shape == image.shape[:2]
