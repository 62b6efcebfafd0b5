"""Image latents on disk, made once by a frozen encoder and read back instead of pictures.

FOLDER/KEY/  manifest.json  latents-00000.safetensors ...    [n, 2, C, h, w] float16: of a picture and of its mirror

KEY is a hash of the encoder's weights and settings, the transform and the list of pictures with their sizes: with any
of them changed it is another cache. A shard is written whole or not at all, so an interrupted cache is completed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.checkpoint import CheckpointError, load_component, read_json, save_weights, write_json
from ldmseg_fast.config import Config, ConfigError, ImageEncoderConfig
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.folders import open_image
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.init_from import load_image_encoder, resolve_start
from ldmseg_fast.models.image_vae import build_image_encoder

PER_SHARD = 512
MANIFEST = "manifest.json"


def default_folder(root: str | Path) -> Path:
    return Path(root) / "latents"


def picture_files(dataset: CocoPanoptic) -> list[Path]:
    """The pictures of a split, each once, in the order of their first annotation."""
    return list(dict.fromkeys(dataset.paths(index)[0] for index in range(len(dataset))))


def cache_key(encoder: nn.Module, settings: ImageEncoderConfig, size: int, files: list[Path]) -> str:
    """What the latents depend on, in 32 hexadecimal digits."""
    digest = hashlib.sha256()
    digest.update(json.dumps([settings.kind, settings.latent_channels, size, "pillow bicubic"]).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class LatentCache:
    """A complete cache, opened for reading; pictures are told by their file names."""

    folder: Path
    rows: dict[str, int]
    shards: dict[str, dict[str, Any]]  # of the manifest: file name to "bytes" and "sha256", in the order of the rows
    seconds_per_image: float
    factor: float  # from the scaling the cache was made with to the run's

    @classmethod
    def open(cls, folder: Path, key: str, files: list[Path], scaling_factor: float) -> LatentCache:
        """The cache of `key` in `folder`, read out as latents times `scaling_factor`.

        Raises:
            CheckpointError: there is none, another one, or an incomplete or damaged one.
        """
        cure = "make it with `ldmseg data cache`"
        path = folder / key
        if not (path / MANIFEST).is_file():
            others = (
                [entry.name for entry in folder.iterdir() if (entry / MANIFEST).is_file()] if folder.is_dir() else []
            )
            stale = "; the one there is of another encoder, size or list of pictures" if others else ""
            raise CheckpointError(f"{folder}: no latent cache for this run{stale}; {cure}")
        manifest = read_json(path / MANIFEST)
        names = [_shard_name(index) for index in range(-(-len(files) // PER_SHARD))]
        missing = [name for name in names if _broken(path / name, manifest["shards"].get(name))]
        if missing:
            raise CheckpointError(f"{path}: {len(missing)} of {len(names)} shards are missing or damaged; {cure}")
        rows = {file.name: row for row, file in enumerate(files)}
        factor = scaling_factor / manifest["scaling_factor"]
        shards = {name: manifest["shards"][name] for name in names}
        return cls(path, rows, shards, manifest["seconds_per_image"], factor)

    def read(self, file_name: str, flipped: bool) -> Tensor:
        """float16 [C, h, w] of a picture, or of its mirror image."""
        shard, row = divmod(self.rows[file_name], PER_SHARD)
        latents = _open_shard(self.folder / _shard_name(shard)).get_slice("latents")[row : row + 1, int(flipped)][0]
        return latents if self.factor == 1.0 else latents * self.factor


class ShardCheck:
    """Reads the shards of a cache once, in a thread beside the training, for bits that have flipped since it was made.

    The ranks share the work. `LatentCache.open` looks at sizes only, because reading gigabytes would hold up the start.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._problem = ""
        self._names = list(cache.shards)[distributed.rank() :: distributed.world_size()]
        self.thread = threading.Thread(target=self._run, args=(cache,), daemon=True)
        self.thread.start()

    def raise_if_damaged(self) -> None:
        """Raises CheckpointError naming the shard, once one was found."""
        if self._problem:
            raise CheckpointError(self._problem)

    def _run(self, cache: LatentCache) -> None:
        for name in self._names:
            try:
                broken = _broken(cache.folder / name, cache.shards[name], thorough=True)
            except OSError as error:
                self._problem = f"{cache.folder / name}: {error.strerror or error}"
                return
            if broken:
                self._problem = (
                    f"{cache.folder / name}: damaged, its SHA-256 is not the manifest's. `ldmseg data cache` makes it "
                    f"again; then go on with --resume from the last checkpoint"
                )
                return


@functools.cache
def _open_shard(path: Path) -> Any:
    return safe_open(path, framework="pt")  # memory-mapped: all processes share one copy


def _shard_name(index: int) -> str:
    return f"latents-{index:05d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(path: Path, known: dict[str, Any] | None, thorough: bool = False) -> bool:
    """Whether a shard is not what the manifest says; `thorough` reads all of it."""
    if known is None or not path.is_file() or path.stat().st_size != known["bytes"]:
        return True
    return thorough and _sha256(path) != known["sha256"]


class _Pictures(Dataset):
    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(resize_image(open_image(self.files[index]), self.size)).permute(2, 0, 1)


@torch.inference_mode()
def build_cache(
    encoder: nn.Module,
    settings: ImageEncoderConfig,
    files: list[Path],
    size: int,
    folder: Path,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Encode every picture and its mirror image; what is already there and whole is kept.

    Args:
        encoder: on the device to use; float32.
        files: pictures, each once.
        folder: caches of several keys may lie in it.

    Returns:
        The cache's own folder.

    Raises:
        DataError: a picture that cannot be read.
    """
    path = folder / cache_key(encoder, settings, size, files)
    path.mkdir(parents=True, exist_ok=True)
    for leftover in path.glob(".*.new"):
        leftover.unlink()
    known: dict[str, Any] = {}
    before = 0.0
    try:
        manifest = read_json(path / MANIFEST)
        known, before = manifest["shards"], manifest["seconds_per_image"]
    except (CheckpointError, KeyError, TypeError):
        pass  # a new cache
    names = [_shard_name(index) for index in range(-(-len(files) // PER_SHARD))]
    todo = [index for index, name in enumerate(names) if _broken(path / name, known.get(name), thorough=True)]
    say(f"{path}: {len(names) - len(todo)} of {len(names)} shards are there")
    device = next(encoder.parameters()).device
    encoding, encoded = 0.0, 0
    for index in tqdm(todo, desc="latents", unit="shard", disable=None):
        part = files[index * PER_SHARD : (index + 1) * PER_SHARD]
        latents = []
        for pictures in DataLoader(_Pictures(part, size), batch_size, num_workers=num_workers):
            start = time.perf_counter()
            pictures = pictures.to(device)
            both = [
                encoder(each.contiguous(memory_format=torch.channels_last)) for each in (pictures, pictures.flip(-1))
            ]
            latents.append(torch.stack(both, dim=1).half().cpu())
            encoding, encoded = encoding + time.perf_counter() - start, encoded + 2 * len(pictures)
        temporary = path / f".{names[index]}.new"
        save_weights({"latents": torch.cat(latents)}, temporary)
        known[names[index]] = {"bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
        temporary.replace(path / names[index])
        write_json(
            path / MANIFEST,
            {
                "shards": known,
                "pictures": len(files),
                "size": size,
                "scaling_factor": settings.scaling_factor,
                "seconds_per_image": encoding / encoded,
            },
        )
    if not todo and before:
        say(f"nothing to do; encoding took {1000 * before:.1f} ms per image")
    return path


def why_not(config: Config) -> str:
    """The reason why a run must encode its images in every step, "" where a cache would do."""
    data = config.data
    reasons = [
        (config.image_encoder.kind == "conv", "image_encoder.kind=conv is trained"),
        (data.scale_min < 1, f"data.scale_min={data.scale_min} crops at random"),
        (data.color_jitter > 0, f"data.color_jitter={data.color_jitter} changes colours at random"),
        (data.resize != "pillow", f"data.resize={data.resize}, the cache is made with Pillow's"),
        (config.diffusion.sample_posterior, "diffusion.sample_posterior draws other latents each time"),
        (config.unet.conditioning == "clip_image", "unet.conditioning=clip_image sees the pictures"),
    ]
    return "; ".join(reason for found, reason in reasons if found)


def attach_cache(
    dataset: CocoPanoptic, config: Config, encoder: nn.Module, say: Callable[[str], None]
) -> LatentCache | None:
    """Let a training set read latents, where `data.latent_cache` asks for them and the augmentation allows it.

    Returns:
        The cache; None where pictures are encoded in every step.

    Raises:
        CheckpointError: `data.latent_cache` names a folder that holds no complete cache for this run.
    """
    wanted = config.data.latent_cache
    if not wanted:
        return None
    reason = why_not(config)
    if reason:
        say(f"latent cache not used: {reason}")
        return None
    files = picture_files(dataset)
    key = cache_key(encoder, config.image_encoder, config.data.image_size, files)
    folder = default_folder(config.data.root) if wanted == "auto" else Path(wanted)
    try:
        cache = LatentCache.open(folder, key, files, config.image_encoder.scaling_factor)
    except CheckpointError as error:
        if wanted != "auto":
            raise
        say(f"latent cache not used: {error}")
        return None
    dataset.use_latents(cache)
    say(f"image latents of {len(files)} pictures from {cache.folder}; saves {1000 * cache.seconds_per_image:.1f} ms of "
        f"encoding per image, as measured when it was made")  # fmt: skip
    return cache


def load_encoder(source: str | Path, size: int) -> tuple[nn.Module, ImageEncoderConfig]:
    """The image encoder of a model folder, a Stable Diffusion or VAE folder, or a TAESD file.

    Raises:
        CheckpointError, ConfigError: nothing of the kind there, or an encoder that is trained with the UNet.
    """
    source = Path(source)
    if (source / "image_vae" / "config.json").is_file():
        encoder: Any = load_component(source, "image_vae")
        settings = encoder.config
    else:
        kind = ImageEncoderConfig(kind="taesd" if source.is_file() else "autoencoder_kl", path=str(source))
        if kind.kind == "taesd":
            kind = replace(kind, scaling_factor=1.0)
        start = resolve_start(Config(image_encoder=kind))
        settings = start.config.image_encoder
        encoder = build_image_encoder(settings, start.vae_config)
        load_image_encoder(encoder, start)
    if settings.kind == "conv":
        raise ConfigError(
            f"--image-vae {source}: its encoder is trained with the UNet, so its latents change in every step"
        )
    if size % settings.downsampling:
        raise ConfigError(f"--size {size}: a multiple of {settings.downsampling} expected")
    return encoder.eval().requires_grad_(False), settings


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", help="COCO-panoptic folder")
    parser.add_argument(
        "--image-vae", required=True, help="model folder, Stable Diffusion or VAE folder, or TAESD file"
    )
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--size", type=int, default=512, help="data.image_size of the training to come")
    parser.add_argument(
        "--out", type=Path, help="folder for caches; default ROOT/latents, which training finds by itself"
    )
    parser.add_argument("--limit", type=int, default=0, help="first annotations only, as data.limit")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode pictures")


def run_cache(args: argparse.Namespace) -> int:
    encoder, settings = load_encoder(args.image_vae, args.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = picture_files(CocoPanoptic(args.root, args.split, args.size, train=True, limit=args.limit))
    folder = args.out or default_folder(args.root)
    encoder = encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    path = build_cache(encoder, settings, files, args.size, folder, **options)
    wanted = "auto" if args.out is None else str(args.out)
    print(f"latents of {len(files)} pictures: {path}\ntrain with data.latent_cache={wanted}")
    return 0
