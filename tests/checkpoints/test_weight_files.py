"""The weights of strangers' folders: shards, variants, indices, pointers; and UNets that see something else."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.checkpoints.tensors import at_most
from ldmseg_fast.checkpoints.weight_files import read_weights
from ldmseg_fast.errors import CheckpointError, ConfigError
from tests.checkpoints.hostile_folders import LFS
from tests.checkpoints.test_init_from import SD14, autoencoder, make_stage, write_stable_diffusion  # noqa: F401


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd14", SD14)


STATE = {f"layer.{number}.weight": torch.full((3,), float(number)) for number in range(6)}


def write_shards(folder, pattern, count=3, index=None, dtype=torch.float32):
    """Cuts STATE into `count` files called by `pattern`, with an index of the name `index`."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number in range(count):
        name = pattern.format(f"-{number + 1:05d}-of-{count:05d}")
        part = {key: value.to(dtype) for key, value in list(STATE.items())[number::count]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        ("diffusion_pytorch_model{}.safetensors", None),
        ("diffusion_pytorch_model{}.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        ("diffusion_pytorch_model.fp16{}.safetensors", None),
        ("diffusion_pytorch_model.fp16{}.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ("model{}.fp16.safetensors", "model.safetensors.index.fp16.json"),
        ("model.fp16{}.safetensors", "model.fp16.safetensors.index.json"),
        ("model{}.safetensors", "model.safetensors.index.json"),
        ("diffusion_pytorch_model.non_ema{}.safetensors", None),
    ],
)
def test_shards(pattern, index, tmp_path):
    folder = write_shards(tmp_path / "unet", pattern, index=index)
    found = read_weights(folder)
    assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)
    second = pattern.format("-00002-of-00003")
    (folder / second).unlink()
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing") as error:
        read_weights(folder)
    assert second in str(error.value) and ("index" if index else "names") in str(error.value)
    (folder / second).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*a pointer of Git LFS.*`git lfs pull`"):
        read_weights(folder)


def test_full_precision_goes_before_half_and_one_file_before_shards(tmp_path):
    folder = write_shards(tmp_path / "unet", "diffusion_pytorch_model.fp16{}.safetensors", dtype=torch.float16)
    assert read_weights(folder)["layer.1.weight"].dtype == torch.float16
    write_shards(folder, "diffusion_pytorch_model{}.safetensors")
    assert read_weights(folder)["layer.1.weight"].dtype == torch.float32
    save_file({"layer.1.weight": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    assert list(read_weights(folder)) == ["layer.1.weight"]


def test_one_file_with_a_variant_and_several_of_them(tmp_path):
    save_file(STATE, tmp_path / "diffusion_pytorch_model.non_ema.safetensors")
    assert read_weights(tmp_path).keys() == STATE.keys()
    save_file(STATE, tmp_path / "diffusion_pytorch_model.special.safetensors")
    with pytest.raises(CheckpointError, match=r"several variants \(non_ema, special\)"):
        read_weights(tmp_path)
    save_file(STATE, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert read_weights(tmp_path).keys() == STATE.keys()


def test_old_folders_with_one_pickle(tmp_path):
    """Read without running anything; full precision first; safetensors files go before it."""
    torch.save({key: value.half() for key, value in STATE.items()}, tmp_path / "diffusion_pytorch_model.fp16.bin")
    assert read_weights(tmp_path)["layer.3.weight"].dtype == torch.float16
    torch.save(STATE, tmp_path / "diffusion_pytorch_model.bin")
    found = read_weights(tmp_path)
    assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)
    torch.save({"layer": os.system}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"refused, nothing was run: .*posix\.system"):
        read_weights(tmp_path)
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    assert read_weights(tmp_path).keys() == STATE.keys()


@pytest.mark.parametrize("index", ["diffusion_pytorch_model.fp16.bin.index.json", None])
def test_old_folders_with_shards(index, tmp_path):
    folder = tmp_path / "unet"
    names = [f"diffusion_pytorch_model.fp16-{number:05d}-of-00002.bin" for number in (1, 2)]
    folder.mkdir()
    parts = [dict(list(STATE.items())[number::2]) for number in range(2)]
    for name, part in zip(names, parts):
        torch.save(part, folder / name)
    if index:
        weight_map = {key: name for name, part in zip(names, parts) for key in part}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    found = read_weights(folder)
    assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)
    torch.save({"layer": os.system}, folder / names[1])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin: refused, nothing was run: .*posix\.system"):
        read_weights(folder)
    (folder / names[1]).unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing"):
        read_weights(folder)


def test_a_model_starts_from_an_old_folder(sd, tmp_path, make_stage):  # noqa: F811
    """The same weights, whichever file they lie in."""
    old = tmp_path / "old"
    shutil.copytree(sd, old)
    for part in ("unet", "vae"):
        file = old / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    first, second = (make_stage(folder).state_dict() for folder in (sd, old))
    parts = ("unet.down_blocks", "unet.mid_block", "image_vae.encoder")
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith(parts))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"diffusion_pytorch_model.bin": b"x"}, "no checkpoint of torch.save, or a truncated one"),
        ({"diffusion_pytorch_model-00001-of-00002.bin": b"x"}, "1 of 2 shards are missing"),
        ({"pytorch_model.bin": b"x"}, "only pickled weights of other names"),
        ({"diffusion_pytorch_model.bin": LFS}, "git lfs pull"),
        ({"diffusion_flax_model.msgpack": b"x"}, r"\.msgpack"),
        ({"unet.safetensors": b"x"}, r"rename unet\.safetensors"),
        ({}, r"no diffusion_pytorch_model\.safetensors"),
        ({"model.safetensors.index.json": b"{}"}, "no weight_map"),
        ({"model.safetensors.index.json": LFS}, "git lfs pull"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}'}, "no name of a safetensors"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": 3}}'}, "no weight_map"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors"}}'}, r"1 of 1 shards.*model\.saf"),
        ({"model-00001-of-99999.safetensors": b"x"}, "call themselves parts of 99999"),
    ],
)
def test_folders_without_weights(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    folder = write_shards(tmp_path / "unet", "model{}.safetensors")
    save_file(STATE, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="is in another shard too"):
        read_weights(folder)


def test_diffusers_own_shards_of_half_precision(make_stage, tmp_path):  # noqa: F811
    from diffusers import UNet2DConditionModel

    write_stable_diffusion(tmp_path, SD14)
    model = UNet2DConditionModel.from_pretrained(tmp_path / "unet").half()
    shutil.rmtree(tmp_path / "unet")
    model.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    stage = make_stage(tmp_path)
    assert torch.equal(stage.unet.conv_out.weight, model.conv_out.weight.float())


# ---- names


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_in_folders(prefix, sd, make_stage, model_dir, tmp_path):  # noqa: F811
    shutil.copytree(sd, tmp_path / "sd")
    for name in ("unet", "vae"):
        path = tmp_path / "sd" / name / "diffusion_pytorch_model.safetensors"
        save_file({prefix + key: value for key, value in load_file(path).items()}, path)
    expected, found = make_stage(sd), make_stage(tmp_path / "sd")
    for name in ("unet", "image_vae"):
        state = getattr(found, name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in getattr(expected, name).state_dict().items())
    shutil.copytree(model_dir, tmp_path / "ours")
    for name in ("unet", "mask_vae", "image_vae"):
        path = tmp_path / "ours" / name / "model.safetensors"
        save_file({prefix + key: value for key, value in load_file(path).items()}, path)
        own = load_component(tmp_path / "ours", name).state_dict()
        assert all(torch.equal(own[key], value) for key, value in load_component(model_dir, name).state_dict().items())


# ---- what a UNet sees


@pytest.mark.parametrize(
    ("channels", "what"), [(3, "pixels"), (5, "depth"), (8, "edit or to measure"), (9, "inpainting")]
)
def test_a_unet_with_another_input_is_refused(channels, what, make_stage, tmp_path):  # noqa: F811
    write_stable_diffusion(tmp_path, SD14 | {"in_channels": channels})
    with pytest.raises(CheckpointError, match=rf"in_channels={channels}, a model for .*{what}.*; expected 4"):
        make_stage(tmp_path)
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 4}))  # the weights know better
    with pytest.raises(CheckpointError, match=rf"conv_in\.weight is \[8, {channels}, 3, 3\], and in_channels=4"):
        make_stage(tmp_path)


@pytest.mark.parametrize("weight", [torch.zeros(8), torch.tensor(1.0), torch.zeros(8, 4)])
def test_an_input_convolution_that_is_none(weight, make_stage, tmp_path):  # noqa: F811
    write_stable_diffusion(tmp_path, SD14)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "conv_in.weight": weight}, path)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight"):
        make_stage(tmp_path)


def test_a_bug_in_the_building_of_a_network_keeps_its_traceback():
    with pytest.raises(ValueError, match="cannot reshape") as error, at_most({}, "file"):
        np.zeros(3).reshape(2)
    assert not isinstance(error.value, CheckpointError)
    with pytest.raises(ConfigError, match="with its cure"), at_most({}, "file"):
        raise ConfigError("with its cure")
    with pytest.raises(CheckpointError, match="file: no network can be built"), at_most({}, "file"):
        torch.nn.GroupNorm(3, 4)


def test_latents_of_another_kind_are_refused(make_stage, tmp_path):  # noqa: F811
    write_stable_diffusion(tmp_path, SD14 | {"in_channels": 16, "out_channels": 16})
    with pytest.raises(CheckpointError, match=r"in_channels=16 and out_channels=16, but mask_vae\.latent_channels=4"):
        make_stage(tmp_path)


def changed(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "a UNet2DModel; UNet2DConditionModel"),
        ("unet/config.json", {"_class_name": "UNetSpatioTemporalConditionModel"}, "UNetSpatioTemporalConditionModel"),
        ("unet/config.json", {"block_out_channels": "wide"}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": [10**9, 8]}, "block_out_channels=1000000000"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block=1000000000"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "a AutoencoderTiny; AutoencoderKL"),
        ("vae/config.json", {"latent_channels": 16}, "unet.in_channels=12: mask"),
        ("vae/config.json", {"norm_num_groups": 0}, "norm_num_groups=0"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow_prediction"},
            "prediction_type='flow_prediction'",
        ),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_zero_snr"),
    ],
)
def test_other_networks_and_schedules_are_refused(name, values, message, sd, make_stage, tmp_path):  # noqa: F811
    copy = shutil.copytree(sd, tmp_path / "sd")
    changed(copy, name, **values)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        make_stage(copy)


def test_schedules_of_flow_matching_and_none_at_all(sd, make_stage, tmp_path):  # noqa: F811
    copy = shutil.copytree(sd, tmp_path / "sd")
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(CheckpointError, match="a FlowMatchEulerDiscreteScheduler without betas"):
        make_stage(copy)
    path.write_text(json.dumps({"_class_name": "DDPMScheduler", "beta_start": 0.0001}))
    assert make_stage(copy).config.scheduler.beta_schedule == "linear"  # diffusers' own default
    shutil.rmtree(copy / "scheduler")
    with pytest.warns(UserWarning, match=r"no scheduler/scheduler_config\.json in it, so scheduler\.prediction_type"):
        make_stage(copy)
    (copy / "unet").rename(copy / "transformer")
    with pytest.raises(CheckpointError, match="a transformer in the place of a UNet"):
        make_stage(copy)
    save_file(STATE, tmp_path / "v1-5.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.diffusion_model\.\* in it"):
        make_stage(tmp_path / "v1-5.safetensors")


# ---- copies


def test_a_copy_holds_the_model_and_loses_nothing(model_dir, tmp_path):
    source = shutil.copytree(model_dir, tmp_path / "source")
    (source / "checkpoints").mkdir()
    (source / "checkpoints" / "large").write_bytes(b"x")
    (source / "notes.txt").write_text("mine")
    (source / "LICENSE").write_text("mine too")
    (tmp_path / "link").symlink_to(source)
    LDMSegPipeline.from_pretrained(tmp_path / "link", device="cpu").save_pretrained(tmp_path / "copy")
    expected = {"LICENSE", "README.md", "image_vae", "mask_vae", "model_index.json", "scheduler", "unet"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == expected
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    pipe = LDMSegPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"dear")
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    for target in ("mine", "file", "linked", "copy"):
        with pytest.raises(FileExistsError, match="choose another folder"):
            pipe.save_pretrained(tmp_path / target)
    assert (tmp_path / "mine" / "photo.jpg").read_bytes() == (tmp_path / "file").read_bytes() == b"dear"
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to(tmp_path / "empty")
    pipe.save_pretrained(tmp_path / "to-empty")
    assert (tmp_path / "to-empty").is_symlink() and (tmp_path / "empty" / "model_index.json").is_file()


def test_a_copy_that_fails_leaves_no_half_model(model_dir, tmp_path, monkeypatch):
    source = shutil.copytree(model_dir, tmp_path / "source")
    pipe = LDMSegPipeline.from_pretrained(source, device="cpu")
    (tmp_path / "outside").write_bytes(b"secret")
    (source / "unet" / "more.json").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        pipe.save_pretrained(tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []
