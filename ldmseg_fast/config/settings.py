"""Every setting of a run: frozen dataclasses, presets, `key=value` overrides.

An unknown key, a value of the wrong type or a value out of range is a `ConfigError` that names the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MaskVAEConfig:
    """Mask auto-encoder. The defaults are the released size, 2.02 M parameters."""

    num_bits: int = 7  # K, bit planes in
    num_slots: int = 128  # Q, logits out; slot 0 is void
    latent_channels: int = 4
    widths: tuple[int, ...] = (32, 64, 128, 256)  # encoder; one stride-2 step between neighbours
    middle_width: int = 0  # encoder, after its last step; 0: the last of `widths`
    decoder_width: int = 256
    upscale_width: int = 0  # decoder, from the first upscaler on; 0: decoder_width
    num_upscalers: int = 2
    num_mid_blocks: int = 0
    norm_groups: int = 32
    parametrization: Literal["gaussian", "auto", "discrete", "gumbel"] = "gaussian"
    bottleneck: Literal["none", "tanh", "sigmoid", "clip", "l2"] = "none"  # output activation of "auto"
    codebook_size: int = 128  # entries of "discrete" and "gumbel"
    scaling_factor: float = 0.18215  # latents are multiplied by it before diffusion; 0: 1 / their deviation in training

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """Denoiser. The defaults are Stable Diffusion 1.4's UNet without cross-attention, 815.6 M parameters."""

    sample_size: int = 64
    in_channels: int = 12  # noisy mask latents + image latents (+ self-condition)
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # per level, down path; the up path mirrors it
    layers_per_block: int = 2
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_layers: int = 1
    linear_projection: bool = False  # SD 2.x
    norm_groups: int = 32
    norm_eps: float = 1e-5
    mid_attention: bool = True
    conditioning: Literal["none", "learned", "clip_image", "clip_text"] = "none"
    cross_attention_dim: int = 0  # 0: no attn2, norm2
    separate_conv_in: bool = False  # one input convolution per part, summed
    separate_image_encoder: bool = False  # a second down path sees the image alone; its features are added
    image_channels: int = 4  # of in_channels; read where one of the two above is set


@dataclass(frozen=True)
class ImageEncoderConfig:
    """What turns the image into `image_latents`."""

    kind: Literal["conv", "taesd", "autoencoder_kl"] = "autoencoder_kl"
    latent_channels: int = 4
    widths: tuple[int, ...] = (32, 64, 128)  # "conv" only
    blocks: tuple[int, ...] = (0, 1, 1)  # "conv" only: residual blocks per level
    norm_groups: int = 8
    downsampling: int = 8
    scaling_factor: float = 0.18215
    path: str = ""  # weights: a diffusers folder (autoencoder_kl) or a .safetensors file (taesd)


@dataclass(frozen=True)
class ConditioningConfig:
    """What the UNet's cross-attention sees; `unet.conditioning` says which kind, and "none" reads nothing here."""

    num_queries: int = 128  # "learned"
    path: str = ""  # "clip_image", "clip_text": a transformers CLIP folder, or a Stable Diffusion folder
    guidance_scale: float = 7.5  # "clip_text"; 1: off
    caption_dropout: float = 0.1  # "clip_text": share of captions emptied in training


@dataclass(frozen=True)
class SchedulerConfig:
    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    rescale_zero_snr: bool = False
    timestep_spacing: Literal["trailing", "leading"] = "trailing"
    loss_weighting: Literal["none", "max_clamp_snr", "fixed", "linear", "inverse_log_snr"] = "max_clamp_snr"
    max_snr: float = 2.0
    fixed_weight: float = 1.0


@dataclass(frozen=True)
class PostprocessConfig:
    """Thresholds of METHOD section 5; `count_threshold` is in pixels of the output map."""

    mask_threshold: float = 0.5
    count_threshold: int = 512
    overlap_threshold: float = 0.5


@dataclass(frozen=True)
class DataConfig:
    root: str = ""
    train_split: str = "train2017"
    val_split: str = "val2017"
    image_size: int = 512
    num_workers: int = 4
    cache: bool = False  # decoded images stay in memory
    flip: float = 0.5
    scale_min: float = 1.0  # random scale/crop, off at 1
    color_jitter: float = 0.0
    min_area: int = 10  # smaller segments are void in training
    id_assignment: Literal["random", "position", "position_spread", "position_cell", "area"] = "random"
    resize: Literal["pillow", "torch"] = "pillow"  # of training pictures; torch's is faster and differs by a grey level
    limit: int = 0  # first images of the training split only; 0: all
    val_limit: int = 200
    bad_items: float = 0.001  # share of the training split that may be unreadable: named, replaced; beyond it an error
    timeout: float = 300.0  # seconds without a batch after which a read counts as hung
    latent_cache: str = ""  # folder of `ldmseg data cache`; "auto": beside the data; "": encode images in every step


@dataclass(frozen=True)
class ModelConfig:
    mask_vae: str = ""  # second stage: MODEL_DIR of the trained auto-encoder
    init_from: str = ""  # a Stable Diffusion folder, or a MODEL_DIR of ours
    init_noisy: Literal["copy", "zero", "mean", "half", "random"] = "copy"
    init_image: Literal["copy", "zero", "mean", "half", "random"] = "zero"
    init_condition: Literal["copy", "zero", "mean", "half", "random"] = "zero"
    freeze: tuple[str, ...] = ("time_embedding",)  # parameter-name prefixes of the UNet
    attention: Literal["auto", "triton", "sdpa", "xformers"] = "auto"
    kernels: bool = True  # our kernels for bits, norms, head and step where they exist for the device


@dataclass(frozen=True)
class LossConfig:
    """Auto-encoder's loss, METHOD section 2."""

    ce: float = 1.0
    bce: float = 1.0
    dice: float = 1.0
    kl: float = 0.0
    num_points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75
    drop_blocks: float = 0.0  # largest share of blocks set to void in the input
    drop_block_size: int = 32
    latent_noise: float = 0.0  # standard deviation, relative to that of the latents, added before decoding


@dataclass(frozen=True)
class DiffusionConfig:
    self_condition: float = 1.0  # share of steps that train with the model's own estimate; 0: no condition channels
    loss: Literal["l2", "l1", "smooth_l1"] = "l2"
    mask_void: bool = True
    latent_scale: float = 1.0  # factor on the auto-encoder's scaling_factor; below 1 the image matters more
    image_noise: float = 0.0  # standard deviation added to image latents
    sample_posterior: bool = False
    task_loss: float = 0.0  # weight of the decoded x0 estimate's auto-encoder loss
    inpainting: float = 0.0  # share of images that learn to complete a map, parts of which are their condition
    inpainting_block: int = 16  # pixels; the map is known or not by blocks of this side


@dataclass(frozen=True)
class FewStepConfig:
    """Stages `one_step` and `distillation`: a trained model (`model.init_from`) learns to do with few steps."""

    steps: int = 1  # N, of the sampler that is trained
    depth: Literal["any", "last"] = "any"  # one_step, N > 1: which of the N steps carries the loss
    matching: Literal["hungarian", "none"] = "hungarian"  # one_step: slots by least cost (needs SciPy), or by id
    train_decoder: bool = False  # one_step: the auto-encoder's decoder too
    latent_loss: float = 0.0  # one_step: weight of the squared error of the x0 estimate
    teacher_steps: int = 0  # distillation: of the model that is distilled, a multiple of `steps`; 0: twice `steps`


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 200_000
    batch_size: int = 256  # over all ranks and accumulation steps
    accumulation: int = 1
    learning_rate: float = 1e-4
    image_encoder_lr: float = 1.0  # factor on learning_rate
    lr_factors: tuple[str, ...] = ()  # more such factors, by parameter-name prefix: unet.conv_in:10,unet.time:0.1
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] = ("norm", "bias")  # kinds of parameters without weight decay: norm, bias, embedding
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup: int = 1000
    min_lr: float = 0.0  # share of learning_rate at the end of the cosine
    zero_stage: int = 1
    offload: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: Literal["none", "blocks", "model"] = "none"  # torch.compile: the repeated blocks, or whole networks
    compile_backend: str = "inductor"
    channels_last: bool = True
    checkpointing: Literal["none", "blocks", "all"] = "none"  # recompute: the UNet's blocks; the other networks too
    ema: float = 0.9999  # 0: off
    seed: int = 0
    log_every: int = 20
    validate_every: int = 5000
    save_every: int = 2000
    keep: int = 3  # newest checkpoints that stay
    keep_best: int = 1  # and those of the best validations
    max_skipped: int = 10  # steps in a row without finite loss and gradients before training ends; 0: never
    peer_timeout: float = 30.0  # seconds of silence after which a rank counts as dead
    wandb: str = ""  # project name for Weights & Biases; "": off
    max_minutes: float = 0.0  # wall time of the run, all starts together, that ends it before `steps`; 0: no limit
    threads: int = 0  # CPU threads per rank; 0: cores / ranks


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    mask_vae: MaskVAEConfig = field(default_factory=MaskVAEConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    few_step: FewStepConfig = field(default_factory=FewStepConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    num_inference_steps: int = 50
    output_dir: str = ""
