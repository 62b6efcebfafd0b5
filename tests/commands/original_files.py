"""Makes checkpoints as the original code saves them, small and with random weights."""

from pathlib import Path

import torch
from torch import nn

from ldmseg_fast.checkpoints.tensors import load_weights
from ldmseg_fast.commands.convert import convert_checkpoint
from ldmseg_fast.config import ImageEncoderConfig, MaskVAEConfig, UNetConfig
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


def write(path: Path, values) -> Path:
    torch.save(values, path)
    return path


def run(files, values, **arguments):
    if "unet" in values:
        arguments = {"unet_config": files / "unet.json", "image_vae": files / "vae.json"} | arguments
    return convert_checkpoint(write(files / "model.pt", values), files / "out", **arguments)


def assert_nothing_written(folder):
    assert not [path.name for path in folder.iterdir() if "out" in path.name]


def assert_same_tensors(folder, name, state):
    saved = load_weights(folder / name / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)
