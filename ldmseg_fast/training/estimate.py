"""Estimates parameters and memory per rank before anything is allocated.

`train.py --dry-run` prints `dry_run`, a run that finds no memory `advice`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.hub import settings_alone
from ldmseg_fast.checkpoints.init_from import resolve_start
from ldmseg_fast.config import Config, describe
from ldmseg_fast.config.precision import resolve_precision
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.models.layers import ResnetBlock
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.models.unet import UNet
from ldmseg_fast.training.deepspeed_settings import BUCKET, deepspeed_config, merge_user_config
from ldmseg_fast.training.disk import MOMENT_BYTES, describe_disk, disk_need
from ldmseg_fast.training.optimizer import check_whole
from ldmseg_fast.training.rates import factor_of, rate_factors
from ldmseg_fast.training.stages import STAGES

GIB = 2**30
# main memory before any weight is there, measured on Linux x86 with PyTorch 2.13: the program with DeepSpeed, the
# server that forks loader processes, and what each of them has alone
PROGRAM, LOADER_SERVER, LOADER = 0.50 * GIB, 0.17 * GIB, 0.03 * GIB


@dataclass(frozen=True)
class Counts:
    """Counts parameters by part of the model, and how many of them are trained."""

    parts: dict[str, int]
    trainable: int

    @property
    def total(self) -> int:
        """Adds the parts up."""
        return sum(self.parts.values())


def count_parameters(stage_name: str, config: Config) -> Counts:
    """Counts parameters on the meta device: no weights are made or read."""
    parts = network_parts(stage_name, config)
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    trained, factors = {"mask_vae": stage_name == "autoencoder"}, rate_factors(config)
    trained |= {"unet": True, "image_vae": config.image_encoder.is_trained}
    trains_decoder = stage_name == "one_step" and config.few_step.train_decoder
    trainable = 0
    for part, module in parts.items():
        frozen = config.model.freeze if part == "unet" else ()
        for name, parameter in module.named_parameters():
            learns = trained[part] or (part == "mask_vae" and trains_decoder and name.startswith("decoder."))
            if learns and not name.startswith(frozen) and factor_of(f"{part}.{name}", factors):
                trainable += parameter.numel()
    return Counts(counts, trainable)


def network_parts(stage_name: str, config: Config) -> dict[str, nn.Module]:
    """Makes a stage's networks on the meta device, by their names in a model folder."""
    with torch.device("meta"):
        if stage_name == "autoencoder":
            return {"mask_vae": MaskVAE(config.mask_vae)}
        return {
            "unet": UNet(config.unet, "sdpa"),
            "mask_vae": MaskVAE(config.mask_vae),
            "image_vae": build_image_encoder(config.image_encoder),
        }


@dataclass(frozen=True)
class StateMemory:
    """Holds bytes per rank, activations left out.

    `gradients` and `buffers` are what the backward pass needs at most.
    """

    weights: float
    gradients: float
    optimizer: float  # moments and, under ZeRO, the master copy of the rank's share of the weights
    averages: float
    frozen: float
    buffers: float  # through which gradients are reduced
    host: float  # what offloading puts into main memory

    @property
    def device(self) -> float:
        """Adds up what lies on the device."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.frozen + self.buffers


def state_memory(counts: Counts, config: Config, ranks: int, zero_stage: int, on_gpu: bool = True) -> StateMemory:
    """Estimates a rank's memory but for activations (Rajbhandari et al. 2020, ZeRO, section 3).

    Weights are float32 under autocast: a weight, its gradient, its average and each of two moments take 4 bytes, or a
    moment one (`train.optimizer=adamw_8bit`). Stage
    1 cuts moments, master copy and averages along the ranks, 2 the gradients too, 3 everything. On a GPU gradients pass
    through two buffers. What a step needs for a moment beside it is `passing_memory`'s.
    """
    trainable, frozen = counts.trainable, counts.total - counts.trainable
    share = trainable / ranks if zero_stage else trainable
    moments = MOMENT_BYTES[config.train.optimizer]
    optimizer, averages = (4.0 * bool(zero_stage) + moments) * share, 4.0 * share if config.train.ema else 0.0
    offloaded = optimizer + averages if config.train.offload and zero_stage else 0.0
    return StateMemory(
        weights=4.0 * (share if zero_stage == 3 else trainable),
        gradients=4.0 * (share if zero_stage >= 2 else trainable),
        optimizer=0.0 if offloaded else optimizer,
        averages=0.0 if offloaded else averages,
        frozen=4.0 * (frozen / ranks if zero_stage == 3 else frozen),
        buffers=4.0 * min(BUCKET, trainable) * (2 if on_gpu else 1) if zero_stage else 0.0,
        host=offloaded,
    )


def passing_memory(trainable: int, ranks: int, zero_stage: int) -> float:
    """Estimates the bytes that DeepSpeed 0.19 needs for a moment of each step beside `state_memory`.

    ZeRO 0 reduces gradients through flattened copies of BUCKET elements. Stages 1 and 2 copy a rank's share of the
    gradients out of the buffers and flatten it before the step; at stage 1 the gradients themselves are still there.
    Stage 3 keeps gathered weights, and more buffers to gather and reduce. The numbers of buffers were fitted to what
    ranks on a CPU took (tests/training/test_memory_forecast.py).
    """
    share, alone = trainable / ranks, ranks == 1
    buckets = {0: 2, 1: 0, 2: 1 if alone else 0, 3: 2 if alone else 4}[zero_stage]
    copies = {0: 0.0, 1: 2.0 * share, 2: share, 3: float(trainable)}[zero_stage]
    return 4.0 * (buckets * min(BUCKET, trainable) + copies)


def rank_memory(counts: Counts, config: Config, ranks: int, zero_stage: int, on_gpu: bool = True) -> float:
    """Estimates the most bytes of a rank but for activations, without what is offloaded.

    One process that no launcher has started is not under DeepSpeed, whose ZeRO 0 it is like.
    """
    alone = ranks == 1 and zero_stage == 0 and not distributed.launched()
    passing = 0.0 if alone else passing_memory(counts.trainable, ranks, zero_stage)
    return state_memory(counts, config, ranks, zero_stage, on_gpu).device + passing


def peak_memory_forecast(stage_name: str, config: Config, ranks: int) -> tuple[float, float]:
    """Forecasts the most memory of a training on CPUs: bytes of a rank, and of its loader processes together.

    The mask auto-encoder's activations are left out, which the point losses decide.
    """
    counts = count_parameters(stage_name, config)
    zero_stage = config.train.zero_stage if ranks > 1 or distributed.launched() else 0
    host = state_memory(counts, config, ranks, zero_stage, on_gpu=False).host
    activations = 0
    if stage_name != "autoencoder":
        activations = activation_memory(config, micro_batch(config, ranks), config.train.checkpointing != "none")
    workers = config.data.num_workers
    return (
        rank_memory(counts, config, ranks, zero_stage, on_gpu=False) + host + activations + PROGRAM,
        (LOADER_SERVER + workers * LOADER) if workers else 0.0,
    )


def activation_memory(config: Config, images: int, checkpointing: bool) -> int:
    """Measures the bytes that the UNet keeps for the backward pass of `images` images, on the meta device.

    This is what autograd saves. Attention's score matrices are left out, which no fused attention keeps. With
    `checkpointing` only the inputs of the blocks are kept.
    """
    unet = network_parts("diffusion", config)["unet"]
    side = config.data.image_size // config.mask_vae.downsampling
    half = resolve_precision(config.train.precision, distributed.device())[0] != "fp32"
    heads = config.unet.num_heads
    scores = {(heads[level], *[(side >> level) ** 2] * 2) for level in range(len(heads))}
    seen = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: list[Tensor] = []  # so that no id is used twice
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()._cdata
        if storage not in seen and tuple(tensor.shape[-3:]) not in scores:
            seen.add(storage)
            kept.append(tensor)
            total += tensor.numel() * (2 if half and tensor.element_size() == 4 else tensor.element_size())
        return tensor

    sample = torch.empty(1, config.unet.in_channels, side, side, device="meta")
    context = None
    if config.unet.cross_attention_dim:
        context = torch.empty(1, config.conditioning.num_queries, config.unet.cross_attention_dim, device="meta")
    timesteps = torch.zeros(1, device="meta")
    if not checkpointing:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            unet(sample, timesteps, context)
        return total * images

    def note_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        note(inputs[0])

    for module in unet.modules():
        if isinstance(module, ResnetBlock):  # each layer that is recomputed starts with one
            module.register_forward_pre_hook(note_input)
    with torch.no_grad():
        unet(sample, timesteps, context)
    return total * images


def micro_batch(config: Config, ranks: int) -> int:
    """Tells how many images a rank has in memory at a time."""
    return max(config.train.batch_size // config.train.accumulation // ranks, 1)


def device_memory() -> int | None:
    """Gives the bytes of this rank's GPU; None without one."""
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if torch.cuda.is_available()
        else None
    )


def report(stage_name: str, config: Config, ranks: int) -> list[str]:
    """Writes the estimate: parts, memory per rank for ZeRO 0-3, activations, and the device they must fit; lines."""
    counts = count_parameters(stage_name, config)
    lines = [f"parameters: {counts.total:,} of which {counts.trainable:,} are trained"]
    lines += [f"  {name:<12} {count:>14,}" for name, count in counts.parts.items()]
    total = device_memory()
    lines.append(
        f"most memory per rank for weights, gradients, moments, averages and DeepSpeed's copies, {ranks} ranks, GiB:"
    )
    for zero_stage in range(4):
        memory = rank_memory(counts, config, ranks, zero_stage)
        offloaded = state_memory(counts, config, ranks, zero_stage).host
        chosen = "  <- train.zero_stage" if zero_stage == config.train.zero_stage else ""
        host = f" + {offloaded / GIB:.2f} in main memory" if offloaded else ""
        lines.append(f"  ZeRO {zero_stage}: {memory / GIB:8.2f}{host}{chosen}")
    if stage_name != "autoencoder":
        images = micro_batch(config, ranks)
        plain, recomputed = (activation_memory(config, images, flag) / GIB for flag in (False, True))
        lines.append(
            f"activations of the UNet at {images} images a rank, about, GiB: {plain:.2f}; "
            f"with train.checkpointing=blocks {recomputed:.2f}"
        )
    if total is None:
        rank, loaders = (value / GIB for value in peak_memory_forecast(stage_name, config, ranks))
        shared = f", and {loaders:.2f} for its {config.data.num_workers} loader processes" if loaders else ""
        without = ", without the auto-encoder's activations" if stage_name == "autoencoder" else ""
        lines.append(f"forecast of the most main memory, GiB: {rank:.2f} for each of {ranks} ranks{shared}{without}")
    lines.append(describe_disk(disk_need(counts.trainable, counts.total, config.train)))
    lines.append("device: " + (f"{total / GIB:.1f} GiB" if total else "no GPU here"))
    return lines


def advice(stage_name: str, config: Config, ranks: int, trainable: int | None = None) -> list[str]:
    """Names the three settings that free most memory, with estimates of how much.

    Args:
        stage_name: of `stages.STAGES`.
        config: the run's.
        ranks: how many there are.
        trainable: parameters that are trained, where it is known better than by `count_parameters`.
    """
    counts = count_parameters(stage_name, config)
    if trainable is not None:
        counts = replace(counts, trainable=trainable)
    train, images = config.train, micro_batch(config, ranks)
    options: list[tuple[float, str]] = []
    if stage_name != "autoencoder":
        recompute = train.checkpointing != "none"
        activations = activation_memory(config, images, recompute) / GIB
        if not recompute:
            saved = activations - activation_memory(config, images, True) / GIB
            options.append((saved, f"train.checkpointing=blocks: about {saved:.2f} GiB less, a third more time"))
    else:
        side, vae = config.data.image_size, config.mask_vae
        planes = vae.num_slots + (vae.num_categories + 1 if vae.num_categories else 0)
        logits = images * planes * (side * 2**vae.num_upscalers // vae.downsampling) ** 2 * 4
        activations = 4 * logits / GIB  # in both precisions, their gradient, and the widest decoder layer before them
    if images > 1:
        more = train.accumulation * 2
        saved = activations / 2
        text = (
            f"train.accumulation={more}: {images // 2} images at a time instead of {images}, about {saved:.2f} GiB less"
        )
        options.append((saved, text))
    now = state_memory(counts, config, ranks, train.zero_stage).device
    for zero_stage, offload in ((train.zero_stage + 1, train.offload), (3, True)):
        if train.optimizer != "adamw" or zero_stage > 3 or (zero_stage, offload) == (train.zero_stage, train.offload):
            continue
        changed = replace(config, train=replace(train, zero_stage=zero_stage, offload=offload))
        saved = (now - state_memory(counts, changed, ranks, zero_stage).device) / GIB
        name = f"train.zero_stage={zero_stage}" + (" train.offload=true" if offload and not train.offload else "")
        options.append((saved, f"{name}: {saved:.2f} GiB less on each of {ranks} ranks"))
    if train.optimizer == "adamw" and (ranks == 1 or not train.zero_stage):
        changed = replace(config, train=replace(train, optimizer="adamw_8bit"))
        saved = (now - state_memory(counts, changed, ranks, train.zero_stage).device) / GIB
        options.append((saved, f"train.optimizer=adamw_8bit, in a new run: {saved:.2f} GiB less"))
    if resolve_precision(train.precision, distributed.device())[0] == "fp32":
        options.append((activations / 2, f"train.precision=bf16: about {activations / 2:.2f} GiB less"))
    options.append((0.0, f"data.image_size={config.data.image_size // 2}: a quarter of the activations"))
    if stage_name == "autoencoder":
        points = config.loss.num_points
        options.append((0.0, f"loss.num_points={points // 2}: half of what the loss samples ({points} points now)"))
    best: list[Any] = sorted(options, key=lambda option: -option[0])[:3]
    return [text for _, text in best]


def with_start(stage_name: str, config: Config) -> Config:
    """Puts into the settings what the folders say that a stage starts from; no weights are fetched or read.

    Raises:
        ConfigError, CheckpointError: as `dry_run`.
    """
    with settings_alone():
        config = STAGES[stage_name].started(config)
        if stage_name != "autoencoder" and (config.model.init_from or config.image_encoder.path):
            config = resolve_start(config).config
    return config


def dry_run(stage_name: str, config: Config, user_config: dict[str, Any] | None) -> list[str]:
    """Writes what `--dry-run` prints, as lines.

    These are resolved settings, DeepSpeed's derived configuration, parameters, and memory per rank for ZeRO 0-3.

    `train.precision=auto` is resolved for the device of this machine; whether `model.attention` can run on it is not
    asked, so that a GPU's run can be tried without one.

    Raises:
        ConfigError: settings that contradict a pre-trained folder or the user's DeepSpeed configuration.
        CheckpointError: a pre-trained folder that is missing or damaged.
    """
    config = with_start(stage_name, config)
    check_whole(config.train)
    precision, reason = resolve_precision(config.train.precision, distributed.device())
    config = replace(config, train=replace(config.train, precision=precision))
    ranks = distributed.world_size()
    counts = count_parameters(stage_name, config)
    derived = deepspeed_config(config, ranks, counts.trainable)
    derived = merge_user_config(derived, user_config or {}, config.train.clip)
    return [
        *describe(config),
        "",
        f"precision: {precision} ({reason})",
        "",
        f"DeepSpeed configuration for {ranks} ranks: {json.dumps(derived, indent=2)}",
        "",
        *report(stage_name, config, ranks),
    ]
