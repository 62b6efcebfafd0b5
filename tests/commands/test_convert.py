"""Checkpoints of the original code: every size is found, nothing in them runs, and errors leave nothing behind."""

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config, load_index
from ldmseg_fast.checkpoints.original_sizes import unet_config
from ldmseg_fast.checkpoints.tensors import load_weights
from ldmseg_fast.commands import convert
from ldmseg_fast.commands.convert import convert_checkpoint
from ldmseg_fast.config import ImageEncoderConfig, MaskVAEConfig, SchedulerConfig, UNetConfig
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.models.image_vae import KLEncoder
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.models.unet import UNet

MASK = MaskVAEConfig(num_bits=5, num_slots=20, widths=(8, 16, 32), decoder_width=16, num_upscalers=1, norm_groups=8)
UNET = UNetConfig(
    in_channels=12,
    block_out_channels=(16, 32),
    attention=(True, False),
    layers_per_block=1,
    num_heads=(2, 4),
    norm_groups=8,
    image_channels=4,
)
VAE = {"block_out_channels": [8, 16, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
BASE_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
P = {
    "vae_model_kwargs": {"norm_num_groups": 8, "scaling_factor": 0.3, "parametrization": "gaussian"},
    "noise_scheduler_kwargs": {"prediction_type": "sample", "beta_end": 0.02, "steps_offset": 1, "weight": "fixed"},
    "train_kwargs": {"self_condition": True, "encoding_mode": "bits"},
    "model_kwargs": {"in_channels": 8},
    "image_scaling_factor": 0.5,
}


def image_vae_state():
    encoder = KLEncoder(ImageEncoderConfig(downsampling=4), VAE).state_dict()
    return encoder | {f"post_quant_conv.{key}": value for key, value in nn.Conv2d(4, 4, 1).state_dict().items()}


def original_model(mask=MASK, unet=UNET, **entries):
    """What the original code saves after a step of training, with random weights."""
    torch.manual_seed(0)
    state = UNet(unet).state_dict()
    state |= {"new_conv.weight": state["conv_in.weight"], "new_conv.bias": state["conv_in.bias"]}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    values = {"step": 7, "epoch": 1, "unet": state, "vae_semseg": MaskVAE(mask).state_dict()}
    values |= {"vae_image": image_vae_state(), "p": P, "opt": optimizer, "ema": None, "scaler": {"scale": 65536.0}}
    return values | entries


@pytest.fixture
def files(tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps(BASE_UNET))
    (tmp_path / "vae.json").write_text(json.dumps(VAE))
    return tmp_path


def write(path: Path, values) -> Path:
    torch.save(values, path)
    return path


def run(files, values, **arguments):
    arguments = {"unet_config": files / "unet.json", "image_vae": files / "vae.json"} | arguments
    return convert_checkpoint(write(files / "model.pt", values), files / "out", **arguments)


def assert_nothing_written(folder):
    assert not [path.name for path in folder.iterdir() if "out" in path.name]


def assert_same_tensors(folder, name, state):
    saved = load_weights(folder / name / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


# ---- sizes


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MaskVAEConfig(norm_groups=8),
        MaskVAEConfig(num_bits=8, num_slots=200, widths=(8, 16, 24, 40), num_upscalers=3, norm_groups=8),
        MaskVAEConfig(num_mid_blocks=1, widths=(8, 16, 32, 32), decoder_width=24, norm_groups=8),
        MaskVAEConfig(num_mid_blocks=3, widths=(8, 16, 32, 32), middle_width=48, num_upscalers=1, norm_groups=8),
        MaskVAEConfig(decoder_width=24, upscale_width=40, latent_channels=6, widths=(8, 16, 8), norm_groups=8),
        MaskVAEConfig(parametrization="auto", widths=(8, 16), num_upscalers=0, decoder_width=8, norm_groups=8),
    ],
)
def test_auto_encoders_of_every_size(mask, files):
    vae = MaskVAE(mask).eval()
    p = P | {"vae_model_kwargs": P["vae_model_kwargs"] | {"parametrization": mask.parametrization}}
    folder = run(files, {"vae": vae.state_dict(), "p": p, "step": 3})
    loaded = load_component(folder, "mask_vae")
    bits = torch.randn(1, mask.num_bits, 32, 32)
    with torch.no_grad():
        latents = vae.encode(bits).mean
        # the weights are the same, where they lie in memory is not: sums may be taken in another order
        torch.testing.assert_close(loaded.encode(bits).mean, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded.decode(latents), vae.decode(latents), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.config.scaling_factor == 0.3
    assert load_index(folder)["components"] == ["mask_vae"]


@pytest.mark.parametrize(
    ("unet", "change"),
    [
        (UNET, {}),
        (UNetConfig(**{**vars(UNET), "in_channels": 8}), {}),
        (UNetConfig(**{**vars(UNET), "linear_projection": True}), {"use_linear_projection": True}),
        (UNetConfig(**{**vars(UNET), "layers_per_block": 2}), {"layers_per_block": 2}),
        (UNetConfig(**{**vars(UNET), "transformer_layers": 2}), {"transformer_layers_per_block": 2}),
        (
            UNetConfig(**{**vars(UNET), "num_heads": (8, 8), "norm_eps": 1e-6}),
            {"attention_head_dim": 8, "norm_eps": 1e-6},
        ),
    ],
)
def test_models_of_every_size(unet, change, files):
    (files / "unet.json").write_text(json.dumps(BASE_UNET | change))
    values = original_model(unet=unet)
    folder = run(files, values)
    index = load_index(folder)
    assert index["self_condition"] == (unet.in_channels == 12)
    assert index["image_size"] == 8 * 4
    assert index["postprocess"] == {"mask_threshold": 0.5, "count_threshold": 512, "overlap_threshold": 0.5}
    found = load_component_config(folder, "unet")[0]
    assert found == UNetConfig(**{**vars(unet), "sample_size": 8})
    own = UNet(unet)
    own.load_state_dict({key: value for key, value in values["unet"].items() if not key.startswith("new_conv")})
    sample, timesteps = torch.randn(1, unet.in_channels, 8, 8), torch.tensor([500])
    with torch.no_grad():
        result, expected = load_component(folder, "unet")(sample, timesteps), own(sample, timesteps)
    # the same weights at other addresses: vector code may add in another order
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_settings_come_from_p(files):
    folder = run(files, original_model())
    scheduler = load_component_config(folder, "scheduler")[0]
    assert scheduler == SchedulerConfig(prediction_type="sample", beta_end=0.02, loss_weighting="fixed")
    assert load_component_config(folder, "mask_vae")[0].scaling_factor == 0.3
    assert load_component_config(folder, "image_vae")[0].scaling_factor == 0.5
    assert "model.pt" in (folder / "README.md").read_text()


def test_defaults_without_p(files):
    unet = UNetConfig(**{**vars(UNET), "block_out_channels": (32, 64), "norm_groups": 32})
    mask = MaskVAEConfig(widths=(8, 16, 32), num_upscalers=1, decoder_width=32)
    (files / "unet.json").write_text(json.dumps(BASE_UNET | {"block_out_channels": [32, 64], "norm_num_groups": None}))
    folder = run(files, original_model(mask, unet, p=None))
    assert load_component_config(folder, "scheduler")[0] == SchedulerConfig()
    assert load_component_config(folder, "mask_vae")[0].norm_groups == 32
    assert load_component_config(folder, "unet")[0].norm_groups == 32
    assert load_component_config(folder, "image_vae")[0].scaling_factor == 0.18215


def test_p_can_stand_for_the_unet_configuration(files):
    p = P | {
        "model_kwargs": {"attention_head_dim": [2, 4], "norm_num_groups": 8},
        "transformation_kwargs": {"size": 64},
    }
    folder = run(files, original_model(p=p), unet_config=None)
    assert load_component_config(folder, "unet")[0] == UNetConfig(**{**vars(UNET), "sample_size": 16})
    assert load_index(folder)["image_size"] == 64


def test_stable_diffusion_widths_need_no_configuration():
    with torch.device("meta"):
        state = UNet(UNetConfig()).state_dict()
    config, kept = unet_config(state, None, {}, "checkpoint")
    assert config == UNetConfig()
    assert sum(value.numel() for value in kept.values()) == 815_556_484


def test_image_vae_without_configuration(files):
    wide = VAE | {"block_out_channels": [32, 32, 64], "norm_num_groups": 32}
    state = KLEncoder(ImageEncoderConfig(downsampling=4), wide).state_dict()
    state |= {f"post_quant_conv.{key}": value for key, value in nn.Conv2d(4, 4, 1).state_dict().items()}
    folder = run(files, original_model(vae_image=state), image_vae=None)
    assert load_component_config(folder, "image_vae")[1]["_vae_config"]["block_out_channels"] == [32, 32, 64]
    load_component(folder, "image_vae")


def test_prefixes_and_the_one_input_convolution(files):
    values = original_model()
    plain = {key: value for key, value in values["unet"].items() if not key.startswith("new_conv.")}
    renamed = {
        ("new_conv" + key.removeprefix("conv_in") if key.startswith("conv_in.") else key): plain[key] for key in plain
    }
    for name in ("vae_semseg", "vae_image"):
        values[name] = {f"module.{key}": value for key, value in values[name].items()}
    values["unet"] = {f"module.{key}": value for key, value in renamed.items()}
    assert_same_tensors(run(files, values), "unet", plain)


def test_whole_image_vae_and_old_names_of_its_attention(files):
    from diffusers import AutoencoderKL

    whole = AutoencoderKL.from_config(VAE).state_dict()
    encoder = {key: value for key, value in whole.items() if key.startswith(("encoder.", "quant_conv."))}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in whole.items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        renamed[key] = value
    assert_same_tensors(run(files, original_model(vae_image=renamed)), "image_vae", encoder)


def test_image_vae_weights_from_a_folder(files):
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    vae = AutoencoderKL.from_config(VAE)
    vae.save_pretrained(files / "sd" / "vae")
    values = original_model()
    del values["vae_image"]
    folder = run(files, values, image_vae=files / "sd")
    encoder = {key: value for key, value in vae.state_dict().items() if key.startswith(("encoder.", "quant_conv."))}
    assert_same_tensors(folder, "image_vae", encoder)


# ---- nothing runs


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class State:
    """Pickles as an object with a state."""

    def __setstate__(self, state):
        raise AssertionError("ran")

    def __getstate__(self):
        return {"x": 1}


def malicious(marker: Path):
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"__import__('os').system('touch {marker}')"),
        "exec": Call(exec, code),
        "getattr": Call(getattr, marker, "touch"),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "import": Call(__import__, "antigravity"),
        "nested": {"unet": {"conv_in.weight": Call(Path.touch, marker)}},
        "in p": {"vae": {"a": torch.zeros(1)}, "p": {"lr": Call(eval, code)}},
        "in opt": {"vae": {"a": torch.zeros(1)}, "opt": [Call(exec, code)]},
        "torch.load": Call(torch.load, str(marker)),
        "object": {"vae": State()},
        "bytearray": {"vae": {"a": Call(bytearray, 10**12)}},
        "tensor": {"vae": {"a": Call(torch.Tensor, 10**6, 10**6)}},
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", malicious(Path("marker")))
def test_a_malicious_pickle_is_refused_and_nothing_runs(name, protocol, tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save(malicious(marker)[name], path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="refused, nothing was run"):
        convert_checkpoint(path, tmp_path / "out")
    path.write_bytes(pickle.dumps(malicious(marker)[name], protocol))
    with pytest.raises(CheckpointError, match=r"no checkpoint of torch\.save"):
        convert_checkpoint(path, tmp_path / "out")
    torch.save(malicious(marker)[name], path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"no checkpoint of torch\.save"):
        convert_checkpoint(path, tmp_path / "out")
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


def test_bombs_are_refused(files):
    values = {"vae": {"encoder.0.weight": torch.zeros(1).expand(10**6, 10**6)}}
    with pytest.raises(CheckpointError, match="more than is stored"):
        run(files, values)
    packed = files / "packed.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"vae": "x" * 10**7}, 2))
    with pytest.raises(CheckpointError, match="compressed entries"):
        convert_checkpoint(packed, files / "out")
    shared: list = []
    for _ in range(60):
        shared = [shared, shared]
    with pytest.raises(CheckpointError):
        run(files, {"vae": shared, "p": shared})
    assert_nothing_written(files)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_of_compile_and_data_parallelism_do_not_matter(prefix, files):
    def named(values, out):
        return convert_checkpoint(write(files / "m.pt", values), files / out, files / "unet.json", files / "vae.json")

    plain = named(original_model(), "plain")
    values = original_model()
    for name in ("unet", "vae_semseg", "vae_image"):
        values[name] = {prefix + key: value for key, value in values[name].items()}
    # blocks that were compiled one by one have it in the middle of their names
    values["unet"] = {key.replace("down_blocks.0.", "down_blocks.0._orig_mod."): v for key, v in values["unet"].items()}
    wrapped = named(values, "wrapped")
    for name in ("unet", "mask_vae", "image_vae"):
        weights = f"{name}/model.safetensors"
        assert (plain / weights).read_bytes() == (wrapped / weights).read_bytes()
    both = original_model()
    both["unet"] |= {f"module.{key}": value for key, value in both["unet"].items()}
    with pytest.raises(CheckpointError, match="is there twice"):
        run(files, both)


# ---- bad input


def test_damaged_and_foreign_files(files):
    whole = write(files / "model.pt", original_model()).read_bytes()
    cut = files / "cut.pt"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            convert_checkpoint(cut, files / "out")
    damaged = bytearray(whole)
    start = whole.index(b"conv_in.weight")
    damaged[start - 200 : start + 200] = os.urandom(400)
    cut.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        convert_checkpoint(cut, files / "out")
    empty_zip = io.BytesIO()
    zipfile.ZipFile(empty_zip, "w").close()
    for content in (b"\xff\xd8\xff\xe0 no model", b"{}", empty_zip.getvalue()):
        cut.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            convert_checkpoint(cut, files / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        convert_checkpoint(files / "nothing.pt", files / "out")
    assert_nothing_written(files)


def edited(name, key, value):
    """`original_model` with one tensor of one network replaced, or dropped where `value` is None."""
    values = original_model()
    state = dict(values[name])
    if value is None:
        del state[key]
    else:
        state[key] = value
    return values | {name: state}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [1, 2], "holds a list"),
        (lambda: {"model": {}, "epoch": 3}, "it holds epoch, model"),
        (lambda: {}, "it holds nothing"),
        (lambda: {"vae": {}}, "dictionary of tensors expected"),
        (lambda: {"vae": [torch.zeros(1)]}, "dictionary of tensors expected, not list"),
        (lambda: {"vae": {"encoder.0.weight": torch.zeros(3)}}, "no mask auto-encoder"),
        (lambda: {"vae": original_model()["unet"]}, "no mask auto-encoder"),
        (lambda: {"unet": original_model()["unet"]}, "'unet' without 'vae_semseg' and 'vae_image'"),
        (lambda: original_model() | {"unet": MaskVAE(MASK).state_dict()}, "no UNet"),
        (lambda: original_model(vae_image={"a": torch.zeros(1)}), "no AutoencoderKL"),
        (lambda: original_model(p=P | {"train_kwargs": {"encoding_mode": "color"}}), "encoded as 'color'"),
        (lambda: original_model(p=P | {"image_scaling_factor": "big"}), "image_scaling_factor='big'"),
        (lambda: original_model(p=P | {"noise_scheduler_kwargs": {"beta_schedule": "odd"}}), "beta_schedule='odd'"),
        (lambda: original_model(p=P | {"noise_scheduler_kwargs": {"clip_sample": True}}), "clip_sample"),
        (lambda: original_model(p=P | {"transformation_kwargs": {"size": 33}}), "multiple of 8 pixels"),
        (lambda: original_model(p=P | {"vae_model_kwargs": {"norm_num_groups": 7}}), "norm groups 7"),
        (lambda: original_model(p=P | {"vae_model_kwargs": {"parametrization": "discrete"}}), "discrete"),
        (lambda: edited("unet", "conv_in.bias", torch.zeros(16)), "differ, though they are one tensor"),
        (lambda: edited("unet", "conv_norm_out.weight", None), "1 missing: conv_norm_out.weight"),
        (lambda: edited("unet", "extra.weight", torch.zeros(1)), "1 unexpected: extra.weight"),
        (lambda: edited("unet", "time_embedding.linear_1.weight", torch.zeros(3, 4)), r"linear_1.weight \(3, 4\)"),
        (
            lambda: edited("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight", torch.zeros(1)),
            "attn2",
        ),
        (lambda: edited("unet", "conv_out.weight", "text"), "conv_out.weight is a str"),
        (lambda: edited("vae_semseg", "decoder.0.bias", None), "1 missing: decoder.0.bias"),
        (lambda: edited("vae_semseg", "quantize.weight", torch.zeros(1)), "1 unexpected: quantize.weight"),
        (lambda: edited("vae_image", "quant_conv.bias", None), "1 missing: quant_conv.bias"),
        (lambda: edited("vae_image", "post_quant_conv.bias", None), "1 missing: post_quant_conv.bias"),
        (lambda: edited("vae_image", "extra.bias", torch.zeros(1)), "1 unexpected: extra.bias"),
        (lambda: edited("vae_image", "decoder.conv_in.bias", torch.zeros(16)), "missing: decoder"),
        (
            lambda: original_model(mask=MaskVAEConfig(widths=(8, 16), num_upscalers=1, norm_groups=8)),
            "do not fit each other",
        ),
        (lambda: original_model(unet=UNetConfig(**{**vars(UNET), "in_channels": 9})), "conv_in takes 9"),
    ],
)
def test_errors_say_what_is_wrong(make, message, files):
    with pytest.raises(CheckpointError, match=message):
        run(files, make())
    assert_nothing_written(files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [16, 64]}, r"block_out_channels \(16, 32\) in the tensors, \(16, 64\)"),
        ({"layers_per_block": 2}, "layers_per_block 1 in the tensors, 2"),
        ({"use_linear_projection": True}, "linear_projection"),
        ({"attention_head_dim": 3}, "3 heads do not divide 16"),
        ({"attention_head_dim": [2]}, "head counts"),
        ({"norm_num_groups": 5}, "5 norm groups do not divide"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"mid_block_type": None, "class_embed_type": "timestep"}, "class_embed_type"),
        ({"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}, "attention"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "mirror"),
        ({"sample_size": "x"}, "image size"),
    ],
)
def test_a_configuration_that_does_not_fit(change, message, files):
    (files / "unet.json").write_text(json.dumps(BASE_UNET | change))
    with pytest.raises(CheckpointError, match=message):
        run(files, original_model())
    assert_nothing_written(files)


def test_configuration_files_that_are_none(files):
    values = original_model()
    with pytest.raises(CheckpointError, match="--unet-config"):
        run(files, values, unet_config=None)
    with pytest.raises(CheckpointError, match=r"nothing\.json: no such file"):
        run(files, values, unet_config=files / "nothing.json")
    (files / "vae.json").write_text("no json")
    with pytest.raises(CheckpointError, match=r"vae\.json"):
        run(files, values)
    (files / "vae.json").write_text(json.dumps(VAE | {"block_out_channels": [8, 16, 32]}))
    with pytest.raises(CheckpointError, match="does not fit --image-vae: block_out_channels"):
        run(files, values)
    secret = files / "secret.json"
    secret.write_text(json.dumps(VAE))
    (files / "linked").mkdir()
    (files / "linked" / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        run(files, values, image_vae=files / "linked")
    assert_nothing_written(files)


def test_out_is_written_whole_or_not_at_all(files, monkeypatch):
    values = original_model()
    (files / "out").mkdir()
    run(files, values)  # an empty folder is taken
    with pytest.raises(FileExistsError, match="something already"):
        run(files, values)
    (files / "taken-out").write_text("a file")
    (files / "linked-out").symlink_to(files / "nowhere")
    for name in ("taken-out", "linked-out"):
        with pytest.raises(FileExistsError, match="something already"):
            convert_checkpoint(files / "model.pt", files / name, files / "unet.json", files / "vae.json")

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldmseg_fast.checkpoints.model_folder.save_index", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(files / "model.pt", files / "second", files / "unet.json", files / "vae.json")
    assert not [path.name for path in files.iterdir() if "second" in path.name]


def test_command_line(files, capsys):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    checkpoint = write(files / "model.pt", original_model())
    arguments = [str(checkpoint), "--out", str(files / "out"), "--unet-config", str(files / "unet.json")]
    assert convert.run(parser.parse_args([*arguments, "--image-vae", str(files / "vae.json")])) == 0
    assert str(files / "out") in capsys.readouterr().out


MEASURE = """
import re, sys
from pathlib import Path
from ldmseg_fast.commands.convert import convert_checkpoint
import ldmseg_fast.checkpoints.original, ldmseg_fast.checkpoints.model_card, ldmseg_fast.checkpoints.safe_pickle

def peak():  # bytes; getrusage would count what the parent process used
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
convert_checkpoint(*sys.argv[1:])
print(peak() - before)
"""


def test_memory_is_that_of_the_checkpoint(files):
    unet = UNetConfig(**{**vars(UNET), "block_out_channels": (160, 320), "norm_groups": 8})
    (files / "unet.json").write_text(json.dumps(BASE_UNET | {"block_out_channels": [160, 320]}))
    values = original_model(unet=unet)
    for key, value in values["unet"].items():  # as after training in channels_last
        values["unet"][key] = value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
    values["opt"] = {"state": [torch.zeros(10**7)]}
    checkpoint = write(files / "model.pt", values)
    arguments = [checkpoint, files / "out", files / "unet.json", files / "vae.json"]
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
    assert 0 < int(output) <= 1.2 * checkpoint.stat().st_size
