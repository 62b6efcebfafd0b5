"""What settings may be, and which go together; which settings there are stands in `config`."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from ldmseg_fast.errors import ConfigError

if TYPE_CHECKING:
    from ldmseg_fast.config.settings import Config

_SHARE, _COUNT, _POSITIVE = (0, 1), (0, 1e15), (1, 1e15)
RANGES: dict[str, tuple[float, float]] = {
    "data.bad_items": _SHARE,
    "data.min_area": _COUNT,
    "conditioning.caption_dropout": _SHARE,
    "loss.num_points": _POSITIVE,
    "diffusion.self_condition": _SHARE,
    "diffusion.inpainting": _SHARE,
    "diffusion.inpainting_block": _POSITIVE,
    "train.learning_rate": _COUNT,
    "train.weight_decay": _COUNT,
    "train.warmup": _COUNT,
    "train.min_lr": _SHARE,
    "postprocess.mask_threshold": _SHARE,
    "postprocess.count_threshold": _COUNT,
    "postprocess.overlap_threshold": _SHARE,
    "num_inference_steps": _POSITIVE,
}


def validate(config: Config) -> Config:
    """`config` itself. Raises ConfigError where a setting is out of range, or two contradict each other."""
    vae, unet, train = config.mask_vae, config.unet, config.train
    condition = vae.latent_channels if config.diffusion.self_condition > 0 else 0
    needed = vae.latent_channels + config.image_encoder.latent_channels + condition
    checks = [
        (2**vae.num_bits >= vae.num_slots, f"mask_vae.num_bits={vae.num_bits} cannot name {vae.num_slots} slots"),
        (unet.in_channels == needed, f"unet.in_channels={unet.in_channels}: mask + image + condition make {needed}"),
        (
            config.image_encoder.kind != "conv" or len(config.image_encoder.blocks) == len(config.image_encoder.widths),
            "image_encoder.widths and image_encoder.blocks must be equally long",
        ),
        (
            config.model.attention != "fp8",
            "model.attention=fp8 has no backward pass: train with auto, and choose attention=fp8 for inference",
        ),
        (unet.out_channels == vae.latent_channels, "unet.out_channels must equal mask_vae.latent_channels"),
        (2**vae.num_upscalers <= vae.downsampling, f"mask_vae.num_upscalers={vae.num_upscalers} overshoots"),
        (
            len(unet.block_out_channels) == len(unet.attention) == len(unet.num_heads),
            "unet.block_out_channels, unet.attention and unet.num_heads must be equally long",
        ),
        (
            (unet.conditioning == "none") == (unet.cross_attention_dim == 0),
            f"unet.conditioning={unet.conditioning} and unet.cross_attention_dim={unet.cross_attention_dim} contradict "
            f"each other: cross-attention and what it sees come together",
        ),
        (
            not (unet.separate_conv_in or unet.separate_image_encoder)
            or unet.image_channels == config.image_encoder.latent_channels,
            f"unet.image_channels={unet.image_channels} must be image_encoder.latent_channels, "
            f"{config.image_encoder.latent_channels}",
        ),
        *(
            (least <= value <= most, f"{name}={value}: from {least:g} to {most:g}")
            for name, (least, most) in RANGES.items()
            for value in [attrgetter(name)(config)]
        ),
        (
            config.diffusion.inpainting == 0 or config.diffusion.self_condition > 0,
            "diffusion.inpainting needs the condition's channels: diffusion.self_condition above 0",
        ),
        (
            config.image_encoder.downsampling == vae.downsampling,
            f"image_encoder.downsampling={config.image_encoder.downsampling} and the mask auto-encoder's "
            f"{vae.downsampling} must agree",
        ),
        (
            config.data.image_size % (vae.downsampling * 2 ** (len(unet.block_out_channels) - 1)) == 0,
            f"data.image_size={config.data.image_size} must be a multiple of "
            f"{vae.downsampling * 2 ** (len(unet.block_out_channels) - 1)} for these models",
        ),
        (train.steps > 0 and train.batch_size > 0, "train.steps and train.batch_size must be positive"),
        (
            train.batch_size % max(train.accumulation, 1) == 0,
            "train.batch_size must be a multiple of train.accumulation",
        ),
        (train.zero_stage in (0, 1, 2, 3), f"train.zero_stage={train.zero_stage}: 0, 1, 2 or 3"),
        (train.accumulation > 0, "train.accumulation must be positive"),
        (
            min(train.log_every, train.validate_every, train.save_every, train.keep) > 0,
            "train.log_every, train.validate_every, train.save_every and train.keep must be positive",
        ),
        (
            train.compile == "none" or train.zero_stage < 3,
            f"train.compile={train.compile}: ZeRO 3 fetches weights layer by layer, which cannot be compiled; "
            f"set train.compile=none or train.zero_stage=2",
        ),
        (
            not train.offload or train.zero_stage > 0,
            "train.offload moves what ZeRO has cut to the CPU; set train.zero_stage=1, 2 or 3",
        ),
        (
            set(train.no_decay) <= {"norm", "bias", "embedding"},
            f"train.no_decay={','.join(train.no_decay)}: of norm, bias and embedding",
        ),
        (0 <= train.ema < 1, f"train.ema={train.ema}: at least 0 and under 1"),
    ]
    for ok, message in checks:
        if not ok:
            raise ConfigError(message)
    return config
