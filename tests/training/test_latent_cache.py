"""Latents from disk are the latents of the encoder, and a cache is never trusted further than its manifest."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.tensors import save_weights
from ldmseg_fast.commands import data_cache as cache_command
from ldmseg_fast.commands.data_cache import add_arguments, load_encoder, run
from ldmseg_fast.config import Config, ImageEncoderConfig
from ldmseg_fast.data import latent_cache
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.latent_cache import LatentCache, cache_key, picture_files
from ldmseg_fast.errors import CheckpointError, ConfigError, DataError
from ldmseg_fast.models.image_vae import TaesdEncoder
from ldmseg_fast.training.loop import train
from tests.training.helpers import hang, losses

Settings = Callable[..., Config]
TAESD = ["image_encoder.kind=taesd", "image_encoder.latent_channels=4", "image_encoder.downsampling=8"]
TAESD += ["image_encoder.scaling_factor=1", "unet.in_channels=12", "mask_vae.widths=8,16,16,16", "unet.sample_size=4"]


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained TAESD encoder's file."""
    torch.manual_seed(3)
    encoder = TaesdEncoder(ImageEncoderConfig(kind="taesd"))
    path = tmp_path_factory.mktemp("taesd") / "taesd.safetensors"
    save_weights({key.removeprefix("layers."): value for key, value in encoder.state_dict().items()}, path)
    return path


@pytest.fixture
def root(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "root"))


def make(root: Path, taesd: Path, *arguments: str) -> Path:
    """The cache's own folder."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    fixed = [str(root), "--image-vae", str(taesd), "--size", "32", "--workers", "0"]
    assert run(parser.parse_args([*fixed, *arguments])) == 0
    return next((root / "latents").iterdir())


def opened(root: Path, taesd: Path, scaling_factor: float = 1.0) -> tuple[LatentCache, list[Path], torch.nn.Module]:
    encoder, settings = load_encoder(taesd, 32)
    files = picture_files(CocoPanoptic(root, "train2017", 32, train=True))
    key = cache_key(encoder, settings, 32, files)
    return LatentCache.open(root / "latents", key, files, scaling_factor), files, encoder


def test_latents_and_their_mirrors(root: Path, taesd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "PER_SHARD", 10)
    make(root, taesd)
    cache, files, encoder = opened(root, taesd)
    assert len(cache.shards) == 3 and cache.seconds_per_image > 0
    dataset = CocoPanoptic(root, "train2017", 32)
    for index in (0, 9, 10, 23):
        picture = dataset[index]["image"][None]
        for flipped in (False, True):
            wanted = encoder(picture.flip(-1) if flipped else picture)[0]
            assert torch.allclose(cache.read(files[index].name, flipped).float(), wanted, atol=2e-3, rtol=2e-3)
    doubled, _, _ = opened(root, taesd, scaling_factor=2.0)
    assert torch.equal(doubled.read(files[0].name, False), cache.read(files[0].name, False) * 2)


def test_training_takes_them(root: Path, taesd: Path, settings: Settings, capfd: pytest.CaptureFixture) -> None:
    """The loss curve is that of encoding in every step, up to half precision."""
    first = train("autoencoder", settings("first", *TAESD, "train.steps=2", "data.val_limit=1"))
    common = [*TAESD, f"data.root={root}", f"image_encoder.path={taesd}", f"model.mask_vae={first}", "train.steps=6"]
    plain = train("diffusion", settings("plain", *common))
    make(root, taesd)
    capfd.readouterr()
    cached = train("diffusion", settings("cached", *common, "data.latent_cache=auto", "data.num_workers=1"))
    assert "saves" in capfd.readouterr().err
    assert losses(cached) == pytest.approx(losses(plain), rel=5e-3)
    assert losses(cached) != losses(plain)
    train(
        "diffusion", settings("jitter", *common, "data.latent_cache=auto", "data.color_jitter=0.1", "data.cache=false")
    )
    assert "latent cache not used: data.color_jitter=0.1" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "unfinished"])
def test_what_is_incomplete_is_completed(
    damage: str, root: Path, taesd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(latent_cache, "PER_SHARD", 10)
    path = make(root, taesd)
    shard = path / "latents-00001.safetensors"
    content, times = shard.read_bytes(), {file.name: file.stat().st_mtime_ns for file in path.glob("*.safetensors")}
    if damage in ("missing", "unfinished"):
        shard.rename(path / ".latents-00001.safetensors.new") if damage == "unfinished" else shard.unlink()
    elif damage == "short":
        shard.write_bytes(content[:-1])
    else:
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if damage != "flipped":  # reading all of a cache takes minutes: the command does, a run does not
        with pytest.raises(
            CheckpointError, match="1 of 3 shards are missing or damaged; make it with `ldmseg data cache`"
        ):
            opened(root, taesd)
    capsys.readouterr()
    make(root, taesd)
    assert "2 of 3 shards are there" in capsys.readouterr().out
    assert shard.read_bytes() == content
    kept = {name for name, at in times.items() if (path / name).stat().st_mtime_ns == at}
    assert kept == times.keys() - {shard.name}
    opened(root, taesd)


def test_a_flipped_bit_ends_a_training(root: Path, taesd: Path, settings: Settings) -> None:
    path = make(root, taesd)
    cache, _, _ = opened(root, taesd)
    check = latent_cache.ShardCheck(cache)
    check.thread.join()
    check.raise_if_damaged()
    shard = path / "latents-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    first = train("autoencoder", settings("first", *TAESD, "train.steps=1", "data.val_limit=1"))
    common = [*TAESD, f"data.root={root}", f"image_encoder.path={taesd}", f"model.mask_vae={first}"]
    with pytest.raises(CheckpointError, match=r"latents-00000.*damaged.*`ldmseg data cache` makes it again"):
        train("diffusion", settings("run", *common, "data.latent_cache=auto", "train.steps=100000"))


def test_another_encoder_or_picture_is_another_cache(root: Path, taesd: Path, tmp_path: Path) -> None:
    make(root, taesd)
    encoder, _ = load_encoder(taesd, 32)
    state = {key.removeprefix("layers."): value.clone() for key, value in encoder.state_dict().items()}
    state["0.bias"] += 1e-3
    save_weights(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another encoder, size or list of pictures"):
        opened(root, tmp_path / "other.safetensors")
    picture = next((root / "train2017").iterdir())
    picture.write_bytes(picture.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="another encoder, size or list of pictures"):
        opened(root, taesd)


def test_pictures_that_are_newer_than_their_latents_are_told(root: Path, taesd: Path, settings: Settings) -> None:
    make(root, taesd)
    config = settings("run", *TAESD, f"data.root={root}", f"image_encoder.path={taesd}", "data.latent_cache=auto")
    encoder, _ = load_encoder(taesd, 32)
    said: list[str] = []
    for newer in (False, True):
        dataset = CocoPanoptic(root, "train2017", 32, train=True)
        if newer:
            os.utime(dataset.paths(0)[0])
        assert latent_cache.attach_cache(dataset, config, encoder, said.append) is not None
        assert any("1 pictures, first" in line and "are newer" in line for line in said) == newer


def test_latents_of_equal_names_in_sub_folders_stay_apart(root: Path, taesd: Path, settings: Settings) -> None:
    annotations = root / "annotations" / "panoptic_train2017.json"
    content = json.loads(annotations.read_text())
    for place, image in enumerate(content["images"]):
        name = f"city_{place}/same{Path(image['file_name']).suffix}"
        (root / "train2017" / f"city_{place}").mkdir()
        (root / "train2017" / image["file_name"]).rename(root / "train2017" / name)
        image["file_name"] = name
    annotations.write_text(json.dumps(content))
    make(root, taesd)
    config = settings("run", *TAESD, f"data.root={root}", f"image_encoder.path={taesd}", "data.latent_cache=auto")
    encoder, _ = load_encoder(taesd, 32)
    dataset = CocoPanoptic(root, "train2017", 32)
    pictures = [dataset[index]["image"][None] for index in (0, 1)]
    assert latent_cache.attach_cache(dataset, config, encoder, print) is not None
    for index, picture in enumerate(pictures):
        wanted = encoder(picture)[0]
        assert torch.allclose(dataset[index]["image_latents"].float(), wanted, atol=2e-3, rtol=2e-3)


def test_a_named_cache_must_be_there(root: Path, taesd: Path, settings: Settings, tmp_path: Path) -> None:
    first = train("autoencoder", settings("first", *TAESD, "train.steps=1", "data.val_limit=1"))
    common = [
        *TAESD,
        f"image_encoder.path={taesd}",
        f"model.mask_vae={first}",
        f"data.latent_cache={tmp_path / 'none'}",
    ]
    with pytest.raises(CheckpointError, match="no latent cache for this run; make it"):
        train("diffusion", settings("second", *common))


def test_encoders_that_cannot_be_cached(autoencoder: Path, root: Path, taesd: Path, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError)):
        load_encoder(tmp_path / "nowhere", 32)
    with pytest.raises(ConfigError, match="a multiple of 8"):
        load_encoder(taesd, 33)
    (tmp_path / "model" / "image_vae").mkdir(parents=True)
    config = {"kind": "conv", "widths": [8, 8, 16], "blocks": [0, 1, 1], "norm_groups": 4, "downsampling": 4}
    config |= {"latent_channels": 4, "scaling_factor": 0.18215}
    (tmp_path / "model" / "image_vae" / "config.json").write_text(json.dumps(config))
    from ldmseg_fast.models.image_vae import ConvEncoder

    encoder = ConvEncoder(
        ImageEncoderConfig(kind="conv", widths=(8, 8, 16), blocks=(0, 1, 1), norm_groups=4, downsampling=4)
    )
    save_weights(dict(encoder.state_dict()), tmp_path / "model" / "image_vae" / "model.safetensors")
    with pytest.raises(ConfigError, match="trained with the UNet"):
        load_encoder(tmp_path / "model", 32)


def test_a_full_disk_leaves_what_is_whole(
    root: Path, taesd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(latent_cache, "PER_SHARD", 10)
    save, written = cache_command.save_weights, []

    def full(state: dict, path: Path) -> None:
        save(state, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_command, "save_weights", full)
    with pytest.raises(CheckpointError, match=r"latents-00001.*No space left.*MiB free; free some space.*goes on"):
        make(root, taesd)
    folder = next((root / "latents").iterdir())
    assert sorted(file.name for file in folder.iterdir()) == ["latents-00000.safetensors", "manifest.json"]
    monkeypatch.setattr(cache_command, "save_weights", save)
    capsys.readouterr()
    make(root, taesd)
    assert "1 of 3 shards are there" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_is_named_in_one_line(workers: str, root: Path, taesd: Path) -> None:
    picture = sorted((root / "train2017").iterdir())[5]
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{picture.name}: not a readable picture") as caught:
        make(root, taesd, "--workers", workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_hangs_is_named(workers: str, root: Path, taesd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of its batch, so that the error names it alone."""
    picture = sorted((root / "train2017").iterdir())[8]
    key = cache_command.cache_key

    def then_hangs(*arguments: Any) -> str:  # the key looks at the sizes of files
        found = key(*arguments)
        hang(picture, monkeypatch)
        return found

    monkeypatch.setattr(cache_command, "cache_key", then_hangs)
    with pytest.raises(
        DataError, match=rf"no batch for 4 s: reading .*{picture.name} or one of the 7 after.*--timeout"
    ):
        make(root, taesd, "--workers", workers, "--timeout", "4")


def test_the_key_lists_each_folder_once(
    root: Path, taesd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No question for a single picture, but for one that the listing calls otherwise; the key is that of its sizes."""
    encoder, settings = load_encoder(taesd, 32)
    files = picture_files(CocoPanoptic(root, "train2017", 32, train=True))
    (tmp_path / "more").mkdir()
    files.append(tmp_path / "more" / "linked.jpg")
    files[-1].symlink_to(files[0])
    expected = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    folders, asked = [], []
    scan, stat = os.scandir, Path.stat
    monkeypatch.setattr(os, "scandir", lambda folder: folders.append(folder) or scan(folder))
    monkeypatch.setattr(Path, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
    states = latent_cache.file_states(files)
    key = cache_key(encoder, settings, 32, files)
    assert key == cache_key(encoder, settings, 32, files, states)
    assert len(folders) == 4 and not set(asked) & set(files)
    assert [(state.size, state.changed) for state in states] == expected
    monkeypatch.setattr(os, "scandir", lambda folder: scan(tmp_path / "more"))
    assert latent_cache.file_states(files) == states
    with pytest.raises(FileNotFoundError):
        latent_cache.file_states([root / "train2017" / "none.jpg"])


def test_one_rank_asks_the_disk(root: Path, taesd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(root, taesd)
    _, files, encoder = opened(root, taesd)
    settings = load_encoder(taesd, 32)[1]
    dataset = CocoPanoptic(root, "train2017", 32, train=True)
    data = replace(Config().data, root=str(root), image_size=32, latent_cache="auto")
    config = replace(Config(), data=data, image_encoder=settings)
    told = (cache_key(encoder, settings, 32, files), [0] * len(files))
    monkeypatch.setattr(latent_cache, "file_states", lambda files: pytest.fail("asked"))
    monkeypatch.setattr(distributed, "from_main", lambda function: told)
    assert latent_cache.attach_cache(dataset, config, encoder, print) is not None


@pytest.mark.parametrize("content", ["[]", "{}", '{"shards": []}', '{"shards": {}, "seconds_per_image": null}', "{"])
def test_a_strange_manifest_is_no_cache(content: str, root: Path, taesd: Path) -> None:
    folder = make(root, taesd)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"ldmseg data cache|manifest"):
        opened(root, taesd)
    make(root, taesd)
    opened(root, taesd)
