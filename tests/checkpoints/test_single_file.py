"""Training starts from Stable Diffusion in one safetensors file, under the names of CompVis and A1111."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmseg_fast.checkpoints.single_file import unet_state, vae_state
from ldmseg_fast.commands.data_cache import load_encoder
from ldmseg_fast.errors import CheckpointError, ConfigError
from tests.checkpoints.test_init_from import autoencoder, make_stage  # noqa: F401

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # of CompVis' v1-inference.yaml
UNET = "model.diffusion_model."


def make_networks(layers=2, **unet):
    """Random networks by diffusers with the norm groups and heads of Stable Diffusion."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 12,
    }
    denoiser = UNet2DConditionModel(**{"block_out_channels": (32, 64), "layers_per_block": layers} | blocks | unet)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    return denoiser, vae


def compvis_unet(state, layers):
    """The tensors of diffusers' UNet under CompVis' names (openaimodel.py of CompVis/stable-diffusion)."""
    period = layers + 1
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("down_blocks."))
    with_attention = {key.split(".attentions.")[0] for key in state if ".attentions.0." in key}
    renamed = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in ends:
            renamed[f"{ends[module]}.{kind}"] = value
            continue
        match = re.match(r"(down_blocks\.(\d+)|up_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", key)
        part, down, up, kind, index, rest = match.groups()
        head, _, tail = rest.partition(".")
        if kind == "resnets":
            rest = f"{resnet[head]}.{tail}"
        if part == "mid_block":
            renamed[f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"] = value
        elif kind == "downsamplers":
            renamed[f"input_blocks.{period * (int(down) + 1)}.0.op.{tail}"] = value
        elif kind == "upsamplers":
            place = 2 if part in with_attention else 1
            renamed[f"output_blocks.{period * int(up) + layers}.{place}.conv.{tail}"] = value
        else:
            place = (
                f"input_blocks.{1 + period * int(down) + int(index)}"
                if down
                else f"output_blocks.{period * int(up) + int(index)}"
            )
            renamed[f"{place}.{int(kind == 'attentions')}.{rest}"] = value
    assert len(renamed) == len(state) and levels > 0
    return renamed


def compvis_vae(state):
    """The tensors of diffusers' AutoencoderKL under CompVis' names; its decoder counts levels from the other end."""
    renamed = {}
    for key, value in state.items():
        name = key
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name)
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{3 - int(m[1])}.block.", name)
        name = re.sub(
            r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up.{3 - int(m[1])}.upsample.", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        for theirs, old in {
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
        }.items():
            name = name.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{old}.")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            value = value[:, :, None, None]  # CompVis has convolutions there
        renamed[name] = value
    return renamed


def one_file(unet, vae, layers=2):
    """A whole model as CompVis saves it: with a text encoder, averages and the noise schedule."""
    return {
        **{UNET + key: value for key, value in compvis_unet(unet, layers).items()},
        **{f"first_stage_model.{key}": value for key, value in compvis_vae(vae).items()},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(1),
        "model_ema.decay": torch.tensor(0.99),
        "betas": BETAS.float(),
        "alphas_cumprod": torch.cumprod(1 - BETAS, 0).float(),
    }


def write(folder, networks, schedule=None, layers=2, metadata=None, dtype=torch.float32):
    """The same weights as a folder of diffusers, `folder`/diffusers, and as one file, `folder`/model.safetensors."""
    from diffusers import PNDMScheduler

    for network, part in zip(networks, ("unet", "vae")):
        network.to(dtype).save_pretrained(folder / "diffusers" / part)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    PNDMScheduler(**betas | (schedule or {})).save_pretrained(folder / "diffusers" / "scheduler")
    unet, vae = (network.state_dict() for network in networks)
    save_file(one_file(unet, vae, layers), folder / "model.safetensors", metadata)
    return folder


SD15 = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
SD21 = {"block_out_channels": (64, 128), "attention_head_dim": (1, 2), "use_linear_projection": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("file"), make_networks())


@pytest.mark.parametrize(
    ("unet", "layers", "dtype"),
    [({}, 2, torch.float32), (SD15, 1, torch.float32), (SD21, 2, torch.float16), ({}, 3, torch.bfloat16)],
    ids=["1.4", "1.5", "2.1-fp16", "three-layers-bf16"],
)
def test_one_file_and_a_folder_start_the_same_model(unet, layers, dtype, make_stage, tmp_path):  # noqa: F811
    """Bit for bit, in every tensor, and in every setting of the networks."""
    prediction = "v_prediction" if unet is SD21 else "epsilon"
    metadata = {"modelspec.prediction_type": "v"} if unet is SD21 else None
    networks = make_networks(layers, **unet)
    write(tmp_path, networks, {"prediction_type": prediction}, layers, metadata, dtype)
    folder, file = make_stage(tmp_path / "diffusers"), make_stage(tmp_path / "model.safetensors")
    assert folder.config.unet == file.config.unet and folder.config.scheduler == file.config.scheduler
    assert folder.config.image_encoder == file.config.image_encoder
    expected, found = folder.state_dict(), file.state_dict()
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    pictures = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(folder.encode_images(pictures), file.encode_images(pictures))


def test_names_are_what_diffusers_makes_of_them(model):
    """diffusers' own converters as the reference."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    unet, vae = (json.loads((model / "diffusers" / part / "config.json").read_text()) for part in ("unet", "vae"))
    path = model / "model.safetensors"
    theirs = convert_ldm_unet_checkpoint(load_file(path), unet)
    ours = unet_state(path)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    theirs = convert_ldm_vae_checkpoint(load_file(path), vae)
    theirs = {key: value for key, value in theirs.items() if key.startswith(("encoder.", "quant_conv."))}
    ours = vae_state(path)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_saved_model_no_longer_needs_the_file(model, make_stage, tmp_path):  # noqa: F811
    from ldmseg_fast import LDMSegPipeline

    file = shutil.copy(model / "model.safetensors", tmp_path / "sd.safetensors")
    make_stage(file).save(tmp_path / "run")
    (tmp_path / "sd.safetensors").unlink()
    pipe = LDMSegPipeline.from_pretrained(tmp_path / "run", device="cpu")
    pipe([torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()], 2)


def test_the_image_vae_alone(model, make_stage, tmp_path):  # noqa: F811
    """From the whole model's file, from a VAE's own file without a prefix, and for a UNet's file without a VAE."""
    state = load_file(model / "model.safetensors")
    vae = {key.removeprefix("first_stage_model."): value for key, value in state.items() if "first_stage" in key}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file({key: value for key, value in state.items() if key.startswith(UNET)}, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: no image VAE .* image_encoder\.path=FOLDER or FILE"):
        make_stage(tmp_path / "unet.safetensors")
    expected = make_stage(model / "diffusers").state_dict()
    for source in (tmp_path / "vae.safetensors", model / "model.safetensors", model / "diffusers" / "vae"):
        found = make_stage(tmp_path / "unet.safetensors", f"image_encoder.path={source}").state_dict()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    for source in (tmp_path / "vae.safetensors", model / "model.safetensors", model / "diffusers"):
        encoder, settings = load_encoder(source, 64)
        assert settings.kind == "autoencoder_kl"
        assert torch.equal(encoder.encoder.conv_in.weight, expected["image_vae.encoder.conv_in.weight"])
    with pytest.raises(CheckpointError, match=r"an image VAE alone, which image_encoder\.path takes"):
        make_stage(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_noise_schedule_is_the_files(dtype, model, make_stage, tmp_path):  # noqa: F811
    state = load_file(model / "model.safetensors")
    save_file(state | {"betas": torch.linspace(0.0001, 0.02, 500).to(dtype)}, tmp_path / "linear.safetensors")
    found = make_stage(tmp_path / "linear.safetensors").config.scheduler
    assert (found.beta_schedule, found.beta_start, found.beta_end) == ("linear", 0.0001, 0.02)
    assert found.num_train_timesteps == 500
    for betas in (torch.rand(1000), torch.zeros(3, 3), torch.full((9,), -1.0)):
        save_file(state | {"betas": betas.to(dtype)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"other\.safetensors: .*betas"):
            make_stage(tmp_path / "other.safetensors")


def test_what_a_2x_model_predicts_is_asked_for(make_stage, tmp_path):  # noqa: F811
    write(tmp_path, make_networks(**SD21))
    with pytest.warns(UserWarning, match=r"scheduler\.prediction_type=epsilon is taken"):
        make_stage(tmp_path / "model.safetensors")


def test_heads_and_groups_that_are_not_stable_diffusions(make_stage, tmp_path):  # noqa: F811
    networks = make_networks(block_out_channels=(20, 40), attention_head_dim=(2, 4), norm_num_groups=4)
    write(tmp_path, networks)
    file = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"and \[8, 8\] do not divide its widths \[20, 40\]; .*=N,N"):
        make_stage(file)
    levels = ["unet.block_out_channels=20,40", "unet.attention=true,false", "unet.num_heads=2,4"]
    expected = make_stage(tmp_path / "diffusers").config.unet
    assert make_stage(file, *levels, "unet.norm_groups=4").config.unet == expected
    with pytest.raises(ConfigError, match=r"unet\.layers_per_block is 1 and 2 there"):
        make_stage(file, *levels, "unet.norm_groups=4", "unet.layers_per_block=1")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a ControlNet"),
        (["emb_params"], "an embedding of words"),
        ([f"{UNET}label_emb.0.0.weight", f"{UNET}input_blocks.0.0.weight"], "Stable Diffusion XL"),
        (["conditioner.embedders.0.x"], "Stable Diffusion XL"),
        ([f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"], "a transformer"),
        (["double_blocks.0.img_attn.qkv.weight"], "a transformer"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a network of diffusers outside its folder"),
        (["encoder.down.0.block.0.conv1.weight"], "an image VAE alone"),
        (["model.layers.0.weight"], r"no model\.diffusion_model\.\* in it, its tensors are model\.layers\.0\.weight"),
        ([], r"its tensors are none"),
        ([f"{UNET}something.weight"], "no UNet"),
        ([f"{UNET}input_blocks.0.0.weight", f"{UNET}input_blocks.x.0.weight"], "no UNet"),
    ],
)
def test_files_of_other_networks(names, what, make_stage, tmp_path):  # noqa: F811
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"other\.safetensors: .*{what}.*; give a Stable Diffusion 1\.x"
    ) as error:
        make_stage(tmp_path / "other.safetensors")
    assert "\n" not in str(error.value)


def test_a_unet_for_inpainting(make_stage, tmp_path):  # noqa: F811
    write(tmp_path, make_networks(in_channels=9))
    with pytest.raises(CheckpointError, match=r"in_channels=9, a model for inpainting; expected 4"):
        make_stage(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["v1-5-pruned.ckpt", "model.pt", "notes.txt", "empty.safetensors", "cut.safetensors"])
def test_files_that_are_not_read(name, model, make_stage, tmp_path):  # noqa: F811
    whole = (model / "model.safetensors").read_bytes()
    contents = {"empty.safetensors": b"", "cut.safetensors": whole[: len(whole) // 2]}
    messages = {
        "notes.txt": "neither a model's folder nor a .safetensors file",
        "empty.safetensors": "it is empty",
        "cut.safetensors": "damaged safetensors file",
    }
    (tmp_path / name).write_bytes(contents.get(name, b"PK\x03\x04"))
    message = messages.get(name, "a pickle, which can run code when it is read, so it is not opened; take the same")
    with pytest.raises(CheckpointError, match=message):
        make_stage(tmp_path / name)


def test_a_folder_with_one_file_in_it(model, make_stage, tmp_path):  # noqa: F811
    shutil.copy(model / "model.safetensors", tmp_path / "v1-5.safetensors")
    with pytest.raises(CheckpointError, match=r"no unet/config\.json in it, but v1-5\.safetensors; .*name the file"):
        make_stage(tmp_path)
