"""Which settings go together; what each may be alone stands beside it in `settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from ldmseg_fast.config.recipes import STAGE_NAMES
from ldmseg_fast.config.settings import Config, ImageEncoderConfig, MaskVAEConfig, SchedulerConfig, UNetConfig
from ldmseg_fast.config.values import update
from ldmseg_fast.errors import ConfigError

LATER, FEW = STAGE_NAMES[1:], STAGE_NAMES[2:]
TASK_LOSS = (
    "autoencoder",
    "diffusion",
    "one_step",
)  # stages that score slots; diffusion where diffusion.task_loss is on
# settings, or groups of them, that not every stage uses -> the stages that do, or that refuse them in words of their
# own. Not here: what describes data, networks or the loss's points, which one command line may give to all stages
USED_BY: dict[str, tuple[str, ...]] = {
    "model.mask_vae": LATER,
    "model.init_from": LATER,
    "model.init_noisy": LATER,
    "model.init_image": LATER,
    "model.init_condition": LATER,
    "model.freeze": LATER,
    "conditioning": ("diffusion",),
    "scheduler.init_noise_sigma": LATER,
    "scheduler.loss_weighting": ("diffusion",),
    "scheduler.max_snr": ("diffusion",),
    "scheduler.fixed_weight": ("diffusion",),
    "loss.ce": TASK_LOSS,
    "loss.bce": TASK_LOSS,
    "loss.dice": TASK_LOSS,
    "loss.category": TASK_LOSS,
    "loss.category_balance": TASK_LOSS,
    "loss.kl": ("autoencoder",),
    "loss.drop_blocks": ("autoencoder",),
    "loss.drop_block_size": ("autoencoder",),
    "loss.latent_noise": ("autoencoder",),
    "diffusion.loss": ("diffusion",),
    "diffusion.mask_void": ("diffusion", "distillation"),
    "diffusion.hard_examples": ("diffusion",),
    "diffusion.area_weights": ("diffusion",),
    "diffusion.own_estimate": ("diffusion",),
    "diffusion.latent_scale": LATER,
    "diffusion.image_noise": ("diffusion",),
    "diffusion.sample_posterior": (),
    "diffusion.task_loss": ("diffusion",),
    "diffusion.inpainting": LATER,
    "diffusion.inpainting_block": ("diffusion", "one_step"),
    "few_step.steps": FEW,
    "few_step.depth": ("one_step",),
    "few_step.matching": ("one_step",),
    "few_step.train_decoder": ("one_step",),
    "few_step.resize": LATER,
    "few_step.new_autoencoder": LATER,
    "few_step.latent_loss": ("one_step",),
    "few_step.teacher_steps": ("distillation",),
}


def check_used(stage: str, given: Mapping[str, str], config: Config, base: Config) -> None:
    """Checks that a stage uses what a command line sets for it.

    What is set to its default, or to what the preset or the file has, may stand there for all stages.

    Args:
        stage: of `STAGE_NAMES`.
        given: text by the setting's name.
        config: with what is given.
        base: without it.

    Raises:
        ConfigError: a setting that the stage ignores.
    """
    for key, text in given.items():
        stages = USED_BY.get(key, USED_BY.get(key.partition(".")[0], STAGE_NAMES))
        value, *others = (attrgetter(key)(each) for each in (config, base, Config()))
        if value in others:
            continue
        if stage not in stages:
            users = f"only stage{'s' * (len(stages) > 1)} {', '.join(stages)} use{'s' * (len(stages) == 1)} it"
            raise ConfigError(f"{key}={text}: {users if stages else 'no stage uses it'}; leave it out")
        if stage == "diffusion" and stages == TASK_LOSS and not config.diffusion.task_loss:
            cure = "set diffusion.task_loss too, or leave it out"
            raise ConfigError(f"{key}={text}: stage diffusion uses it in its task loss, which is off; {cure}")


def validate(config: Config) -> Config:
    """`config` with every value in its own type.

    Raises:
        ConfigError: a value of the wrong type or out of range, or two that contradict each other.
    """
    config = update(config, asdict(config))
    vae, unet, train, encoder = config.mask_vae, config.unet, config.train, config.image_encoder
    condition = vae.latent_channels if config.diffusion.self_condition > 0 else 0
    needed = vae.latent_channels + encoder.latent_channels + condition
    checks = [
        (
            not config.data.weights or sum(config.data.weights) > 0,
            f"data.weights={','.join(f'{w:g}' for w in config.data.weights)} sum to 0: one above 0 expected",
        ),
        *part_checks(vae, "mask_vae."),
        *part_checks(encoder, "image_encoder."),
        *part_checks(unet, "unet."),
        *part_checks(config.scheduler, "scheduler."),
        (
            unet.in_channels == needed,
            f"unet.in_channels={unet.in_channels}: mask + image + condition make {needed} (mask_vae.latent_channels="
            f"{vae.latent_channels}, image_encoder.latent_channels={encoder.latent_channels})",
        ),
        *_width_checks(config),
        (
            config.model.attention != "fp8",
            "model.attention=fp8 has no backward pass: train with auto, and choose attention=fp8 for inference",
        ),
        (
            unet.out_channels == vae.latent_channels,
            f"unet.out_channels must equal mask_vae.latent_channels, {vae.latent_channels}",
        ),
        (
            (unet.conditioning == "none") == (unet.cross_attention_dim == 0),
            f"unet.conditioning={unet.conditioning} and unet.cross_attention_dim={unet.cross_attention_dim} contradict "
            f"each other: cross-attention and what it sees come together",
        ),
        (
            not (unet.separate_conv_in or unet.separate_image_encoder)
            or unet.image_channels == encoder.latent_channels,
            f"unet.image_channels={unet.image_channels} must be image_encoder.latent_channels, "
            f"{encoder.latent_channels}",
        ),
        (
            config.diffusion.inpainting == 0 or config.diffusion.self_condition > 0,
            "diffusion.inpainting needs the condition's channels: diffusion.self_condition above 0",
        ),
        (
            encoder.downsampling == vae.downsampling,
            f"image_encoder.downsampling={encoder.downsampling} and the mask auto-encoder's "
            f"{vae.downsampling} must agree",
        ),
        (
            config.data.image_size % (vae.downsampling * 2 ** (len(unet.block_out_channels) - 1)) == 0,
            f"data.image_size={config.data.image_size} must be a multiple of "
            f"{vae.downsampling * 2 ** (len(unet.block_out_channels) - 1)} for these models",
        ),
        (
            config.data.image_size * encoder.picture_scale % encoder.stride == 0,
            f"data.image_size={config.data.image_size} * image_encoder.picture_scale={encoder.picture_scale} makes "
            f"pictures of {config.data.image_size * encoder.picture_scale} pixels, no multiple of {encoder.stride}, "
            f"which image_encoder.kind={encoder.kind} divides by; choose another of the two",
        ),
        (
            config.num_inference_steps <= config.scheduler.num_train_timesteps,
            f"num_inference_steps={config.num_inference_steps}: scheduler.num_train_timesteps has "
            f"{config.scheduler.num_train_timesteps}",
        ),
        (
            train.validate_steps <= config.scheduler.num_train_timesteps,
            f"train.validate_steps={train.validate_steps}: scheduler.num_train_timesteps has "
            f"{config.scheduler.num_train_timesteps}",
        ),
        (train.validate_share > 0, "train.validate_share=0 leaves no time to validate; set train.validate_every high"),
        (train.batch_size % train.accumulation == 0, "train.batch_size must be a multiple of train.accumulation"),
        (
            train.compile == "none" or train.zero_stage < 3,
            f"train.compile={train.compile}: ZeRO 3 fetches weights layer by layer, which cannot be compiled; "
            f"set train.compile=none or train.zero_stage=2",
        ),
        (
            not train.fp8 or train.precision in ("auto", "bf16"),
            f"train.fp8=true goes with train.precision=bf16, not with {train.precision}; set one of the two",
        ),
        (
            not train.fp8 or train.zero_stage < 3,
            "train.fp8=true: ZeRO 3 fetches weights layer by layer, past torchao's layers; set train.zero_stage=2",
        ),
        (
            config.scheduler.fixed_weight == 1.0 or config.scheduler.loss_weighting == "constant",
            f"scheduler.fixed_weight={config.scheduler.fixed_weight:g} goes with scheduler.loss_weighting=constant, "
            f"not with {config.scheduler.loss_weighting}; set one of the two",
        ),
        (
            not train.offload or train.zero_stage > 0,
            "train.offload moves what ZeRO has cut to the CPU; set train.zero_stage=1, 2 or 3",
        ),
    ]
    for ok, message in checks:
        if not ok:
            raise ConfigError(message)
    return config


def part_checks(part: Any, prefix: str = "") -> list[tuple[bool, str]]:
    """Checks what the ranges of a network's or a schedule's settings cannot say.

    Args:
        part: MaskVAEConfig, ImageEncoderConfig, UNetConfig or SchedulerConfig.
        prefix: of the settings' names in the messages.

    Returns:
        (whether it holds, what is wrong otherwise) for each rule.
    """
    if isinstance(part, MaskVAEConfig):
        return [
            (
                2**part.num_bits >= part.num_slots,
                f"{prefix}num_bits={part.num_bits} cannot name {part.num_slots} slots",
            ),
            (
                2**part.num_upscalers <= part.downsampling,
                f"{prefix}num_upscalers={part.num_upscalers} overshoots the reduction of {part.downsampling}",
            ),
        ]
    if isinstance(part, ImageEncoderConfig):
        fits = not part.has_convolutions or len(part.blocks) == len(part.widths)
        scale = part.picture_scale
        return [
            (fits, f"{prefix}widths and {prefix}blocks must be equally long"),
            (scale & (scale - 1) == 0, f"{prefix}picture_scale={scale}: 1, 2, 4, 8 or 16 expected"),
        ]
    if isinstance(part, UNetConfig):
        fits = len(part.block_out_channels) == len(part.attention) == len(part.num_heads)
        names = [f"{prefix}{name}" for name in ("block_out_channels", "attention", "num_heads")]
        return [(fits, f"{names[0]}, {names[1]} and {names[2]} must be equally long")]
    if isinstance(part, SchedulerConfig):
        message = f"{prefix}beta_start={part.beta_start} must not exceed {prefix}beta_end, {part.beta_end}"
        return [(part.beta_start <= part.beta_end, message)]
    return []


def _width_checks(config: Config) -> list[tuple[bool, str]]:
    """Widths that norms cut into groups, attention into heads, and the timestep's embedding into halves."""
    vae, unet, encoder = config.mask_vae, config.unet, config.image_encoder
    upscaled = "upscale_width" if vae.upscale_width and vae.num_upscalers else "decoder_width"
    normed = [("mask_vae", vae.norm_groups, name, getattr(vae, name)) for name in ("middle_width", upscaled)]
    if not vae.middle_width:
        normed[0] = ("mask_vae", vae.norm_groups, "widths", vae.widths[-1])
    if vae.num_mid_blocks or vae.num_categories:
        normed.append(("mask_vae", vae.norm_groups, "decoder_width", vae.decoder_width))
    normed += [("unet", unet.norm_groups, "block_out_channels", width) for width in unet.block_out_channels]
    if encoder.has_convolutions:
        used = [width for width, blocks in zip(encoder.widths, encoder.blocks) if blocks]
        normed += [("image_encoder", encoder.norm_groups, "widths", width) for width in (*used, encoder.widths[-1])]
    levels = zip(
        unet.block_out_channels, unet.num_heads, (*unet.attention[:-1], unet.attention[-1] or unet.mid_attention)
    )
    return [
        *(
            (width % groups == 0, f"{part}.{name}: {width} must be a multiple of {part}.norm_groups={groups}")
            for part, groups, name, width in normed
        ),
        *(
            (width % heads == 0, f"unet.block_out_channels: {width} must be a multiple of its unet.num_heads, {heads}")
            for width, heads, attends in levels
            if attends
        ),
        (unet.block_out_channels[0] % 2 == 0, f"unet.block_out_channels: {unet.block_out_channels[0]} must be even"),
    ]
