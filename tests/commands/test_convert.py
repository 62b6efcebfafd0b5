"""Checkpoints of the original code: every size is found, and OUT appears whole or not at all."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config, load_index
from ldmseg_fast.checkpoints.original_sizes import unet_config
from ldmseg_fast.commands import convert
from ldmseg_fast.commands.convert import convert_checkpoint
from ldmseg_fast.config import ImageEncoderConfig, MaskVAEConfig, SchedulerConfig, UNetConfig
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.models.image_vae import KLEncoder
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.models.unet import UNet
from tests.commands.original_files import (
    BASE_UNET,
    MASK,
    UNET,
    VAE,
    P,
    assert_same_tensors,
    original_model,
    run,
    write,
)


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
