"""Training starts from Stable Diffusion folders, as diffusers writes them, and from models of ours."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.checkpoints.start_weights import initial
from ldmseg_fast.config import load_config
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.training.stages import DiffusionStage
from tests.conftest import NARROW, make_model

SD14 = {"attention_head_dim": 4}
SD15 = {
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
SD21 = {"attention_head_dim": [1, 2], "use_linear_projection": True, "upcast_attention": True, "sample_size": 96}


def write_stable_diffusion(folder: Path, unet: dict, scheduler: dict | None = None) -> Path:
    """A small Stable Diffusion folder by diffusers itself; its cross-attention adds nothing for a zero context."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = UNet2DConditionModel(
        **{"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
        | blocks
        | unet
    )
    for name, parameter in model.named_parameters():
        if name.endswith("attn2.to_out.0.bias"):
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.25,
    ).save_pretrained(folder / "vae")
    betas = {"beta_start": 0.0007, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    PNDMScheduler(**betas | (scheduler or {})).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd14", SD14)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    from ldmseg_fast.training.stages import AutoencoderStage

    path = tmp_path_factory.mktemp("ae") / "ae"
    settings = ["mask_vae.widths=8,8,16,16", "mask_vae.decoder_width=16", "image_encoder.downsampling=8"]
    AutoencoderStage(load_config("tiny", settings)).save(path)
    return path


@pytest.fixture
def make_stage(autoencoder):
    def make(folder, *settings, preset="coco"):
        fixed = [f"model.mask_vae={autoencoder}", "data.image_size=64", "train.precision=fp32"]
        return DiffusionStage(load_config(preset, [*fixed, f"model.init_from={folder}", *settings]))

    return make


def batch(count=2):
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "segment_ids": torch.randint(0, 5, (count, 64, 64), generator=generator, dtype=torch.uint8),
        "table": torch.arange(256).clamp(max=31).expand(count, -1),
        "image_id": list(range(count)),
    }


@pytest.mark.parametrize("version", [SD14, SD15, SD21], ids=["1.4", "1.5", "2.1"])
@torch.no_grad()
def test_the_pretrained_estimate_is_kept(version, make_stage, tmp_path):
    """With zero image and condition parts the widened UNet is the pre-trained one without its cross-attention."""
    from diffusers import UNet2DConditionModel

    write_stable_diffusion(tmp_path, version)
    stage = make_stage(tmp_path).eval()
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    expected = theirs(noisy, timesteps, encoder_hidden_states=torch.zeros(2, 5, 12)).sample
    actual = stage.unet(torch.cat([noisy, torch.randn(2, 8, 8, 8)], dim=1), timesteps)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not [name for name in stage.unet.state_dict() if "attn2" in name]


@torch.no_grad()
def test_image_vae_and_noise_schedule_come_along(folder, make_stage):
    from diffusers import AutoencoderKL

    stage = make_stage(folder)
    images = batch()["image"]
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    expected = vae.encode(images / 127.5 - 1).latent_dist.mode() * 0.25
    torch.testing.assert_close(stage.encode_images(images), expected, rtol=1e-4, atol=1e-5)
    assert stage.config.scheduler.beta_start == 0.0007
    assert stage.config.image_encoder.scaling_factor == 0.25


def test_prediction_type_is_the_folders_unless_the_run_sets_it(make_stage, tmp_path):
    write_stable_diffusion(tmp_path, SD21, {"prediction_type": "v_prediction"})
    assert make_stage(tmp_path).scheduler.config.prediction_type == "v_prediction"
    assert make_stage(tmp_path, "scheduler.prediction_type=sample").scheduler.config.prediction_type == "sample"


@pytest.mark.parametrize("mode", ["copy", "zero", "mean", "half", "random"])
def test_every_part_of_the_input_has_its_own_initialisation(mode, folder, make_stage):
    base = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    expected = {
        "copy": base["conv_in.weight"],
        "zero": torch.zeros(8, 4, 3, 3),
        "mean": base["conv_in.weight"].mean(1, keepdim=True).expand(-1, 4, -1, -1),
        "half": base["conv_in.weight"] / 2,
    }
    for index, part in enumerate(("noisy", "image", "condition")):
        conv = make_stage(folder, f"model.init_{part}={mode}").unet.conv_in
        weight = conv.weight[:, 4 * index : 4 * index + 4]
        if mode == "random":
            assert weight.std() > 0.01
            assert not torch.equal(weight, expected["copy"])
        else:
            assert torch.equal(weight, expected[mode])
        assert torch.equal(conv.bias, base["conv_in.bias"])


def test_initial_repeats_channels_where_there_are_more():
    base = torch.randn(2, 4, 3, 3)
    assert torch.equal(initial(base, "copy", torch.empty(2, 6, 3, 3)), base[:, [0, 1, 2, 3, 0, 1]])


def test_frozen_is_what_was_asked(folder, make_stage):
    stage = make_stage(folder)
    frozen = {name for name, parameter in stage.unet.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"time_embedding.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    stage = make_stage(folder, "model.freeze=down_blocks.,conv_out")
    frozen = {name.split(".")[0] for name, parameter in stage.unet.named_parameters() if not parameter.requires_grad}
    assert frozen == {"down_blocks", "conv_out"}
    assert not any(parameter.requires_grad for parameter in stage.image_vae.parameters())


def test_a_step_and_a_saved_model(folder, make_stage, tmp_path):
    stage = make_stage(folder)
    losses = stage(batch(), 0)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert stage.unet.conv_in.weight.grad[:, 4:8].abs().max() > 0
    stage.save(tmp_path / "model")
    pipe = LDMSegPipeline.from_pretrained(tmp_path / "model", device="cpu")
    images = batch()["image"]
    actual = pipe([image.permute(1, 2, 0).numpy() for image in images], 3, output_type="latent")
    expected = stage.eval().sample({"image": images, "image_id": [0, 1]}, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"model.init_from={folder}" in card
    assert "scheduler.beta_start=0.0007" in card


def test_cross_attention_stays_where_it_is_used(folder, make_stage):
    stage = make_stage(folder, "unet.conditioning=learned", "unet.cross_attention_dim=12")
    theirs = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = [name for name in theirs if "attn2" in name]
    assert names
    assert all(torch.equal(stage.unet.state_dict()[name], theirs[name]) for name in names)
    with pytest.raises(CheckpointError, match=r"of another shape: .*attn2"):
        make_stage(folder, "unet.conditioning=learned", "unet.cross_attention_dim=16")


@torch.no_grad()
def test_separate_inputs_start_as_the_joint_one(folder, make_stage):
    joint = make_stage(folder, "model.init_image=half").unet
    parts = make_stage(folder, "model.init_image=half", "unet.separate_conv_in=true").unet
    encoder = make_stage(folder, "model.init_image=half", "unet.separate_image_encoder=true").unet
    sample, timesteps = torch.randn(1, 12, 8, 8), torch.tensor([3])
    expected = joint(sample, timesteps)
    torch.testing.assert_close(parts(sample, timesteps), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder(sample, timesteps), expected)
    down = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(encoder.state_dict()[f"image_{down}"], encoder.state_dict()[down])


# ---- files


def test_half_precision_shards_and_a_download_caches_links(folder, make_stage, tmp_path):
    expected = make_stage(folder).unet.state_dict()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    names = sorted(state)
    for index, part in enumerate((names[::2], names[1::2]), 1):
        save_file(
            {name: state[name] for name in part},
            copy / f"unet/diffusion_pytorch_model-0000{index}-of-00002.safetensors",
        )
    assert all(torch.equal(value, expected[name]) for name, value in make_stage(copy).unet.state_dict().items())

    for shard in (copy / "unet").glob("*.safetensors"):
        shard.unlink()
    save_file(
        {name: value.half() for name, value in state.items()}, copy / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    half = make_stage(copy).unet
    assert half.conv_out.weight.dtype == torch.float32
    assert torch.equal(half.conv_out.weight, expected["conv_out.weight"].half().float())

    cache = tmp_path / "models--sd"
    (cache / "blobs").mkdir(parents=True)
    for index, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        blob = cache / "blobs" / str(index)
        shutil.copy2(path, blob)
        link = cache / "snapshots" / "main" / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    linked = make_stage(cache / "snapshots" / "main").unet
    assert torch.equal(linked.conv_out.weight, expected["conv_out.weight"])


def test_folders_that_cannot_be_read(folder, make_stage, tmp_path):
    def broken(name):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    with pytest.raises(CheckpointError, match=r"no such folder; give a Stable Diffusion 1\.4"):
        make_stage(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no unet/config\.json"):
        make_stage(tmp_path / "empty")

    pickled = broken("pickled")
    (pickled / "unet/diffusion_pytorch_model.safetensors").rename(pickled / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin: no checkpoint of torch\.save"):
        make_stage(pickled)

    damaged = broken("damaged")
    file = damaged / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        make_stage(damaged)

    linked = broken("linked")
    file = linked / "vae/diffusion_pytorch_model.safetensors"
    file.rename(tmp_path / "outside.safetensors")
    file.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        make_stage(linked)

    incomplete = broken("incomplete")
    file = incomplete / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_out.bias"]
    save_file(state | {"more": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"1 missing: conv_out\.bias; 1 unexpected: more"):
        make_stage(incomplete)

    without_vae = broken("without_vae")
    shutil.rmtree(without_vae / "vae")
    with pytest.raises(CheckpointError, match="the image VAE comes from"):
        make_stage(without_vae)

    other = broken("other")
    config = json.loads((other / "unet/config.json").read_text())
    (other / "unet/config.json").write_text(json.dumps(config | {"resnet_time_scale_shift": "scale_shift"}))
    with pytest.raises(CheckpointError, match="resnet_time_scale_shift='scale_shift'"):
        make_stage(other)


def test_settings_that_contradict_the_folder_are_listed(folder, make_stage):
    with pytest.raises(ConfigError) as error:
        make_stage(folder, "unet.layers_per_block=3", "unet.num_heads=8,8,8,1")
    assert "unet.layers_per_block is 3 and 1 there" in str(error.value)
    assert "unet.num_heads is 8,8,8,1 and 4,4 there" in str(error.value)
    with pytest.raises(ConfigError, match=r"image_encoder\.scaling_factor is 0\.5 and 0\.25 there"):
        make_stage(folder, "image_encoder.scaling_factor=0.5")


def test_the_coco_preset_says_what_it_needs(make_stage):
    with pytest.raises(ConfigError, match=r"needs weights: set model\.init_from=FOLDER, a Stable Diffusion"):
        make_stage("")
    with pytest.raises(ConfigError, match="TAESD's encoder"):
        make_stage("", "image_encoder.kind=taesd")


# ---- models of ours


def test_a_model_of_ours_goes_on_where_it_was(model_dir):
    stage = DiffusionStage(load_config("tiny", [*NARROW, f"model.init_from={model_dir}"]))
    for name in ("unet", "image_vae", "mask_vae"):
        saved = load_component(model_dir, name).state_dict()
        own = getattr(stage, name).state_dict()
        assert own.keys() == saved.keys()
        assert all(torch.equal(own[key], saved[key]) for key in saved)


def test_a_model_of_ours_gets_self_conditioning(tmp_path):
    plain = ("unet.in_channels=12", "diffusion.self_condition=0")
    before = load_component(make_model(tmp_path / "plain", plain), "unet")
    stage = DiffusionStage(load_config("tiny", [*NARROW, f"model.init_from={tmp_path / 'plain'}"]))
    assert torch.equal(stage.unet.conv_in.weight[:, :12], before.conv_in.weight)
    assert stage.unet.conv_in.weight[:, 12:].abs().max() == 0
    again = DiffusionStage(load_config("tiny", [*NARROW, *plain, f"model.init_from={tmp_path / 'plain'}"]))
    assert torch.equal(again.unet.conv_in.weight, before.conv_in.weight)


def test_a_converted_model_is_a_start(shared, tmp_path):
    from ldmseg_fast.commands.convert import convert_checkpoint

    golden = shared / "golden"
    files = (golden / "base_unet_config.json", golden / "image_vae_config.json")
    model = convert_checkpoint(golden / "original_ldm.pt", tmp_path / "model", *files)
    stage = DiffusionStage(load_config("coco", [f"model.init_from={model}", "data.image_size=128"]))
    assert isinstance(stage.mask_vae, MaskVAE)
    assert stage.config.unet.block_out_channels == (32, 64, 64, 64)
    saved = load_component(model, "unet").state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in stage.unet.state_dict().items())
    with pytest.raises(CheckpointError, match=r"use it as model\.mask_vae"):
        ae = convert_checkpoint(golden / "original_ae.pt", tmp_path / "ae")
        DiffusionStage(load_config("coco", [f"model.init_from={ae}"]))
