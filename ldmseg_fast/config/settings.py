"""Every setting of a run: frozen dataclasses, each setting with its type, its range and its default.

`values` holds them to it: an unknown key, a value of the wrong type or a value out of range is a `ConfigError` that
names the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ldmseg_fast.config.limits import Form, Length, Range

# Upper ends are far beyond what anyone trains; they catch a slip before it allocates memory or starts processes.
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, under=True)]  # of a moving average; the variance of a noise step
Weight = Annotated[float, Range(0, 1_000_000)]  # of a loss, or a factor that may be off
Factor = Annotated[float, Range(0.000001, 1_000_000)]
Deviation = Annotated[float, Range(0, 1000)]
Seconds = Annotated[float, Range(0.01, 10_000_000)]
Number = Annotated[int, Range(0, 10**12)]  # of steps or items: nothing is allocated for each
Positive = Annotated[int, Range(1, 10**12)]
Width = Annotated[int, Range(1, 16384)]  # channels
OptionalWidth = Annotated[int, Range(0, 16384)]
Pixels = Annotated[int, Range(1, 16384)]
Layers = Annotated[int, Range(1, 1024)]
OptionalLayers = Annotated[int, Range(0, 1024)]
Slots = Annotated[int, Range(2, 65536)]
Batch = Annotated[int, Range(1, 2**20)]
Timesteps = Annotated[int, Range(1, 1_000_000)]
Widths = Annotated[tuple[Width, ...], Length(1, 16)]  # one a resolution
Flags = Annotated[tuple[bool, ...], Length(1, 16)]
Blocks = Annotated[tuple[OptionalLayers, ...], Length(1, 16)]
TeacherSteps = Annotated[int, Range(0, 1_000_000)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Kind = Literal["norm", "bias", "embedding"]
IdAssignment = Literal["random", "position", "position_spread", "position_cell", "area"]

Location = Annotated[str, Form(r"[^\0]*", "a path without a null character")]
Folder = Annotated[str, Form(r"[^/\\,\0]+", "the name of a folder of data.root")]
Split = Annotated[str, Form(r"[^/\\\0]+", "the name of a split, such as train2017")]
Prefix = Annotated[str, Form(r"[\w.]+", "the beginning of a parameter's name, such as unet.conv_in")]
PrefixFactors = tuple[
    Annotated[str, Form(r"[\w.]+:(\d{1,6}(\.\d*)?|\.\d+)(e[-+]?0?\d)?", "PREFIX:NUMBER, such as unet.conv_in:10")], ...
]
Compiler = Annotated[str, Form(r"[\w.-]+", "a backend of torch.compile, such as inductor")]
Project = Annotated[str, Form(r"[^/\\#?%:\0]{0,128}", "the name of a project")]


@dataclass(frozen=True)
class MaskVAEConfig:
    """Mask auto-encoder. The defaults are the released size, 2.02 M parameters."""

    num_bits: Annotated[int, Range(1, 16)] = 7  # K, bit planes in
    num_slots: Slots = 128  # Q, logits out; slot 0 is void
    num_categories: Annotated[int, Range(0, 4095)] = 0  # C, of the data set; 0: segments without categories
    latent_channels: Width = 4
    widths: Widths = (32, 64, 128, 256)  # encoder; one stride-2 step between neighbours
    middle_width: OptionalWidth = 0  # encoder, after its last step; 0: the last of `widths`
    decoder_width: Width = 256
    upscale_width: OptionalWidth = 0  # decoder, from the first upscaler on; 0: decoder_width
    num_upscalers: Annotated[int, Range(0, 16)] = 2
    num_mid_blocks: OptionalLayers = 0
    norm_groups: Width = 32
    parametrization: Literal["gaussian", "auto", "discrete", "gumbel"] = "gaussian"
    bottleneck: Literal["none", "tanh", "sigmoid", "clip", "l2"] = "none"  # output activation of "auto"
    codebook_size: Annotated[int, Range(2, 2**20)] = 128  # entries of "discrete" and "gumbel"
    scaling_factor: Weight = 0.18215  # factor on latents before diffusion; 0: 1 / their deviation in training

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.widths) - 1)

    @property
    def category_bits(self) -> int:
        return self.num_categories.bit_length()  # ceil(log2(C + 1)), as void is none of them


@dataclass(frozen=True)
class UNetConfig:
    """Denoiser. The defaults are Stable Diffusion 1.4's UNet without cross-attention, 815.6 M parameters."""

    sample_size: Pixels = 64
    in_channels: Width = 12  # noisy mask latents + image latents (+ self-condition)
    out_channels: Width = 4
    block_out_channels: Widths = (320, 640, 1280, 1280)
    attention: Flags = (True, True, True, False)  # per level, down path; the up path mirrors it
    layers_per_block: Layers = 2
    num_heads: Widths = (8, 8, 8, 8)
    transformer_layers: Layers = 1
    linear_projection: bool = False  # SD 2.x
    norm_groups: Width = 32
    norm_eps: Share = 1e-5
    mid_attention: bool = True
    conditioning: Literal["none", "learned", "clip_image", "clip_text"] = "none"
    cross_attention_dim: OptionalWidth = 0  # 0: no attn2, norm2
    separate_conv_in: bool = False  # one input convolution per part, summed
    separate_image_encoder: bool = False  # a second down path sees the image alone; its features are added
    image_channels: Width = 4  # of in_channels; read where one of the two above is set


FINE_FEATURES = ("mean", "patches", "convolutions")  # each computes what those before it can
PYRAMID_STRIDES = {"efficientnet_lite": 32}  # kinds of image encoders with features at several strides: the largest


@dataclass(frozen=True)
class ImageEncoderConfig:
    """What turns the image into `image_latents`."""

    kind: Literal["conv", "taesd", "autoencoder_kl", "efficientnet_lite"] = "autoencoder_kl"
    latent_channels: Width = 4
    widths: Widths = (32, 64, 128)  # "conv", and fine features by convolutions
    blocks: Blocks = (0, 1, 1)  # alike: residual blocks per level
    norm_groups: Width = 8
    downsampling: Pixels = 8
    scaling_factor: Factor = 0.18215
    path: Location = ""  # weights: a diffusers folder or a .safetensors file; see below
    picture_scale: Annotated[int, Range(1, 16)] = 1  # side of the pictures it sees, as a multiple of data.image_size
    variant: Annotated[int, Range(0, 4)] = 0  # "efficientnet_lite" only: Lite0 to Lite4
    # "efficientnet_lite" only: features finer than the latents are averaged, or weighted by their place in a patch, and
    # convolutions trained with the UNet see the picture beside that
    fine_features: Literal["mean", "patches", "convolutions"] = "mean"

    # "efficientnet_lite" without a path takes the ImageNet weights that come with the package; path "random": none

    @property
    def is_pyramid(self) -> bool:
        return self.kind in PYRAMID_STRIDES

    @property
    def has_convolutions(self) -> bool:
        return self.kind == "conv" or (self.is_pyramid and self.fine_features == "convolutions")

    @property
    def is_trained(self) -> bool:
        return self.kind == "conv" or self.is_pyramid  # with the UNet

    @property
    def reduction(self) -> int:
        """By what the network divides the sides of the pictures that it sees."""
        fixed = {"conv": 2 ** (len(self.widths) - 1), "taesd": 8, "autoencoder_kl": self.downsampling}
        return fixed.get(self.kind, self.downsampling * self.picture_scale)

    @property
    def stride(self) -> int:
        """What the sides of the pictures that it sees must be multiples of."""
        return max(PYRAMID_STRIDES.get(self.kind, 1), self.downsampling * self.picture_scale)


@dataclass(frozen=True)
class ConditioningConfig:
    """What the UNet's cross-attention sees; `unet.conditioning` says which kind, and "none" reads nothing here."""

    num_queries: Width = 128  # "learned"
    path: Location = ""  # "clip_image", "clip_text": a transformers CLIP folder, or a Stable Diffusion folder
    guidance_scale: Annotated[float, Range(0, 1000)] = 7.5  # "clip_text"; 1: off
    caption_dropout: Share = 0.1  # "clip_text": share of captions emptied in training


@dataclass(frozen=True)
class SchedulerConfig:
    num_train_timesteps: Timesteps = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "scaled_linear"
    beta_start: Decay = 0.00085
    beta_end: Decay = 0.012
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    rescale_zero_snr: bool = False
    # standard deviation of x_T, where sampling starts; 0, for stage one_step: it starts from zeros, so that a picture
    # has one map whatever the seed
    init_noise_sigma: Share = 1.0
    timestep_spacing: Literal["trailing", "leading"] = "trailing"
    loss_weighting: Literal[
        "none", "max_clamp_snr", "fixed", "linear", "inverse_log_snr", "constant", "inverse_log1p_snr"
    ] = "max_clamp_snr"  # the first five are the original's; of the diffusion stage
    max_snr: Factor = 2.0  # "max_clamp_snr"
    fixed_weight: Weight = 1.0  # "constant"


@dataclass(frozen=True)
class PostprocessConfig:
    """Thresholds of METHOD section 5; `count_threshold` is in pixels of the output map."""

    mask_threshold: Share = 0.5
    count_threshold: Number = 512
    overlap_threshold: Share = 0.5


@dataclass(frozen=True)
class DataConfig:
    root: Location = ""  # a COCO-panoptic folder, or several: ROOT,ROOT:TRAIN,ROOT:TRAIN:VAL with splits of their own
    weights: Annotated[tuple[Weight, ...], Length(0, 1000)] = ()  # how often each root is drawn from; none: by its size
    train_split: Split = "train2017"
    val_split: Split = "val2017"
    image_size: Pixels = 512
    num_workers: Annotated[int, Range(0, 256)] = 4
    cache: bool = False  # decoded images stay in memory, where they fit
    flip: Share = 0.5
    scale_min: Annotated[float, Range(0.05, 1)] = 1.0  # random scale/crop, off at 1
    aspect_jitter: Annotated[float, Range(0, 0.9)] = 0.0  # largest relative change of a random crop's width to height
    color_jitter: Share = 0.0
    paste: Share = 0.0  # of pictures that get things of another picture of their set
    min_area: Number = 10  # smaller segments are void in training
    id_assignment: IdAssignment = "random"
    resize: Literal["pillow", "torch"] = "pillow"  # of training pictures; torch's is faster and differs by a grey level
    class_agnostic: tuple[Folder, ...] = ()  # sets of `root`, by their folders' names, whose categories are left out
    limit: Number = 0  # first images of the training split only; 0: all
    val_limit: Number = 200
    bad_items: Share = 0.001  # share of the training split that may be unreadable: named, replaced; beyond it an error
    timeout: Seconds = 300.0  # seconds without a batch after which a read counts as hung
    latent_cache: Location = ""  # of `ldmseg data cache`; "auto": beside the data; "": encode images in every step


@dataclass(frozen=True)
class ModelConfig:
    mask_vae: Location = ""  # second stage: MODEL_DIR of the trained auto-encoder
    init_from: Location = ""  # Stable Diffusion (folder or .safetensors file), or a MODEL_DIR of ours
    init_noisy: Literal["copy", "zero", "mean", "half", "random"] = "copy"
    init_image: Literal["copy", "zero", "mean", "half", "random"] = "zero"
    init_condition: Literal["copy", "zero", "mean", "half", "random"] = "zero"
    freeze: tuple[Prefix, ...] = ("time_embedding",)  # parameter-name prefixes of the UNet
    attention: Literal["auto", "triton", "sdpa", "xformers", "fp8"] = "auto"
    kernels: bool = True  # our kernels for bits, norms, head and step where they exist for the device


@dataclass(frozen=True)
class LossConfig:
    """Auto-encoder's loss, METHOD section 2."""

    ce: Weight = 1.0
    bce: Weight = 1.0
    dice: Weight = 1.0
    category: Weight = 1.0  # cross-entropy over categories, of models that have them
    category_balance: Share = 0.0  # their weights in it: (share of the labelled pixels)^-this, of mean 1; 0: all 1
    kl: Weight = 0.0
    num_points: Annotated[int, Range(1, 2**24)] = 12544
    oversample: Annotated[float, Range(1, 1000)] = 3.0
    importance: Share = 0.75
    drop_blocks: Share = 0.0  # largest share of blocks set to void in the input
    drop_block_size: Pixels = 32
    latent_noise: Deviation = 0.0  # standard deviation, relative to that of the latents, added before decoding


@dataclass(frozen=True)
class DiffusionConfig:
    self_condition: Share = 1.0  # share of steps that train with the model's own estimate; 0: no condition channels
    loss: Literal["l2", "l1", "smooth_l1"] = "l2"
    mask_void: bool = True
    hard_examples: Annotated[float, Range(0.001, 1)] = 1.0  # share of labelled cells in the loss, of the largest errors
    area_weights: bool = False  # labelled cells weigh as 1 / area of their segment: small ones count as large ones
    own_estimate: Share = 0.0  # share of steps whose x_t is of the network's own estimate of x_0
    latent_scale: Factor = 1.0  # factor on the auto-encoder's scaling_factor; below 1 the image matters more
    image_noise: Deviation = 0.0  # standard deviation added to image latents
    sample_posterior: bool = False  # of no effect: records of older runs have it
    task_loss: Weight = 0.0  # weight of the decoded x0 estimate's auto-encoder loss
    inpainting: Share = 0.0  # share of images that learn to complete a map, parts of which are their condition
    inpainting_block: Pixels = 16  # pixels; the map is known or not by blocks of this side


@dataclass(frozen=True)
class FewStepConfig:
    """Stages `one_step` and `distillation`: a trained model (`model.init_from`) learns to do with few steps."""

    steps: Timesteps = 1  # N, of the sampler that is trained
    depth: Literal["any", "last"] = "any"  # one_step, N > 1: which of the N steps carries the loss
    matching: Literal["hungarian", "none"] = "hungarian"  # one_step: slots by least cost (needs SciPy), or by id
    train_decoder: bool = False  # one_step: the auto-encoder's decoder too
    resize: bool = False  # image_size and picture_scale are this run's, not those of `model.init_from`
    new_autoencoder: bool = False  # `model.mask_vae` takes the place of the one in `model.init_from`
    latent_loss: Weight = 0.0  # one_step: weight of the squared error of the x0 estimate
    teacher_steps: TeacherSteps = 0  # distillation: of the distilled model, a multiple of `steps`; 0: twice `steps`


@dataclass(frozen=True)
class TrainConfig:
    steps: Positive = 200_000
    batch_size: Batch = 256  # over all ranks and accumulation steps
    accumulation: Batch = 1
    # muon: the UNet's hidden matrices; adamw_8bit: moments of a byte. Both need zero_stage=0 on many ranks
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    learning_rate: Weight = 1e-4
    image_encoder_lr: Weight = 1.0  # factor on learning_rate; of a pre-trained encoder 0 freezes it
    lr_factors: PrefixFactors = ()  # more such factors, by parameter-name prefix: unet.conv_in:10,unet.time:0.1
    weight_decay: Weight = 0.05
    no_decay: tuple[Kind, ...] = ("norm", "bias")  # kinds of parameters without weight decay
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    clip: Weight = 1.0  # largest norm of the gradients; 0: off
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup: Number = 1000
    min_lr: Share = 0.0  # share of learning_rate at the end of the cosine
    zero_stage: Annotated[int, Range(0, 3)] = 1
    offload: bool = False
    precision: Precision = "auto"  # bf16 where the device has units for it, else fp32
    fp8: bool = False  # linear layers of the UNet in eight bits, by torchao; bf16 runs on GPUs of sm_89 and newer
    compile: Literal["none", "blocks", "model"] = "none"  # torch.compile: the repeated blocks, or whole networks
    compile_backend: Compiler = "inductor"
    channels_last: bool = True
    checkpointing: Literal["none", "blocks", "all"] = "none"  # recompute: the UNet's blocks; the other networks too
    ema: Decay = 0.9999  # 0: off
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    log_every: Positive = 20
    noise_scale: bool = False  # logs the gradient noise scale, in pictures; a step needs several micro-batches
    validate_every: Positive = 5000
    validate_share: Share = 1.0  # of the time that validations may take; those beyond it are put off, but the last
    validate_steps: TeacherSteps = 0  # sampling steps of a validation; 0: num_inference_steps
    save_every: Positive = 2000
    keep: Positive = 3  # newest checkpoints that stay
    keep_best: Number = 1  # and those of the best validations
    best: Literal["pq", "class_pq"] = "pq"  # what these are best by; class_pq: of models with categories
    max_skipped: Number = 10  # steps in a row without finite loss and gradients before training ends; 0: never
    peer_timeout: Seconds = 30.0  # seconds of silence after which a rank counts as dead
    wandb: Project = ""  # of Weights & Biases; "": off
    mlflow: Project = ""  # experiment of MLflow, alike
    trackio: Project = ""  # project of trackio, alike
    max_minutes: Annotated[float, Range(0, 10_000_000)] = 0.0  # wall time of the run, all starts together; 0: no limit
    threads: Annotated[int, Range(0, 1024)] = 0  # CPU threads per rank; 0: cores / ranks


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
    num_inference_steps: Timesteps = 50
    output_dir: Location = ""
