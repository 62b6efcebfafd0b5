"""`ldmseg data cache` encodes the latents of every picture once for the trainings to come (see `latent_cache`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldmseg_fast.checkpoints.hub_names import MODEL, VAE
from ldmseg_fast.checkpoints.init_from import resolve_start
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.checkpoints.single_file import has_vae
from ldmseg_fast.checkpoints.start_weights import check_start, load_image_encoder
from ldmseg_fast.checkpoints.tensors import save_weights
from ldmseg_fast.config import Config, ImageEncoderConfig
from ldmseg_fast.data import latent_cache
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.folders import find_split, load_picture
from ldmseg_fast.data.latent_cache import MANIFEST, cache_key, default_folder, is_broken, picture_files, shard_name
from ldmseg_fast.data.reader import PatientReader, without_traceback
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.errors import CheckpointError, ConfigError, DataError
from ldmseg_fast.files import entry_of, read_json, replacing, why_not_written, write_json
from ldmseg_fast.locks import only_writer
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.outputs import check_outputs
from ldmseg_fast.temporary import clear_leftovers

CURE = "Raise --timeout where reading takes longer; the same command goes on where it stopped"


class _Pictures(Dataset):
    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(resize_image(load_picture(self.files[index]), self.size)).permute(2, 0, 1)


def build_cache(
    encoder: nn.Module,
    settings: ImageEncoderConfig,
    files: list[Path],
    size: int,
    folder: Path,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    timeout: float = 300.0,
    say: Callable[[str], None] = print,
) -> Path:
    """Encodes every picture and its mirror image, and keeps what is already there and whole.

    Args:
        encoder: on the device to use; float32.
        settings: of the encoder, as they stand in the cache's key.
        files: pictures, each once.
        size: side in pixels to which pictures are resized.
        folder: caches of several keys may lie in it.
        batch_size: pictures encoded together.
        num_workers: processes that decode pictures.
        timeout: seconds to wait for a batch of pictures.
        say: is told how far it is.

    Returns:
        The cache's own folder.

    Raises:
        DataError: a picture that cannot be read, or a read that hangs.
        CheckpointError: latents that cannot be written; whole shards stay.
        InUseError: another process fills the same cache.
    """
    path = folder / cache_key(encoder, settings, size, files)
    with only_writer(path, "a cache", "then the same command finds everything there"):
        _fill_cache(path, encoder, settings, files, size, batch_size, num_workers, timeout, say)
    return path


def _fill_cache(
    path: Path,
    encoder: nn.Module,
    settings: ImageEncoderConfig,
    files: list[Path],
    size: int,
    batch_size: int,
    num_workers: int,
    timeout: float,
    say: Callable[[str], None],
) -> None:
    """Encodes what a cache's own folder lacks; arguments as `build_cache` has them."""
    clear_leftovers(path)
    known, before = _known(path)
    names = [shard_name(index) for index in range(-(-len(files) // latent_cache.PER_SHARD))]
    todo = [index for index, name in enumerate(names) if is_broken(path / name, known.get(name), thorough=True)]
    say(f"{path}: {len(names) - len(todo)} of {len(names)} shards are there")
    seconds, encoded = 0.0, 0
    for index in tqdm(todo, desc="latents", unit="shard", disable=None):
        part = files[index * latent_cache.PER_SHARD : (index + 1) * latent_cache.PER_SHARD]
        latents, took = _encode(encoder, part, size, batch_size, num_workers, timeout)
        seconds, encoded = seconds + took, encoded + 2 * len(part)
        manifest = {
            "shards": known,
            "pictures": len(files),
            "size": size,
            "scaling_factor": settings.scaling_factor,
            "seconds_per_image": seconds / encoded,
        }
        _store(path, names[index], latents, manifest)
    if not todo and before:
        say(f"nothing to do; encoding took {1000 * before:.1f} ms per image")


def _known(path: Path) -> tuple[dict[str, Any], float]:
    """Returns shards and seconds per image by the manifest; a damaged one knows nothing."""
    try:
        manifest = read_json(path / MANIFEST)
        return dict(manifest["shards"]), float(manifest["seconds_per_image"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return {}, 0.0


@torch.inference_mode()
def _encode(
    encoder: nn.Module, files: list[Path], size: int, batch_size: int, num_workers: int, timeout: float
) -> tuple[Tensor, float]:
    """Encodes pictures and their mirror images.

    Returns:
        Latents, float16 [n, 2, C, h, w], and the seconds that encoding took.
    """
    device = next(encoder.parameters()).device
    batches = iter(DataLoader(_Pictures(files, size), batch_size, num_workers=num_workers))
    done, seconds = 0, 0.0
    latents = []
    reader = PatientReader(timeout, lambda: f"reading {_some(files[done : done + batch_size])}", CURE)
    while done < len(files):
        try:
            pictures = reader.call(lambda: next(batches))
        except DataError as error:
            raise without_traceback(error) from None
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise DataError(f"a loader process died ({error}); too little memory? Lower --workers") from None
        start = time.perf_counter()
        pictures = pictures.to(device)
        both = [encoder(each.contiguous(memory_format=torch.channels_last)) for each in (pictures, pictures.flip(-1))]
        latents.append(torch.stack(both, dim=1).half().cpu())
        done, seconds = done + len(pictures), seconds + time.perf_counter() - start
    reader.close()
    return torch.cat(latents), seconds


def _some(files: list[Path]) -> str:
    return f"{files[0]} or one of the {len(files) - 1} after it" if len(files) > 1 else str(files[0])


def _store(path: Path, name: str, latents: Tensor, manifest: dict[str, Any]) -> None:
    """Writes a shard and the manifest that vouches for it; `manifest["shards"]` gets its entry."""
    try:
        with replacing(path / name) as temporary:
            save_weights({"latents": latents}, temporary)
            manifest["shards"][name] = entry_of(temporary)
        write_json(path / MANIFEST, manifest)
    except OSError as error:
        reason = why_not_written(error, path / name, "free some space, or choose another disk with --out")
        raise CheckpointError(f"latents not saved: {reason}; the same command goes on where it stopped") from error


def load_encoder(source: str | Path, size: int) -> tuple[nn.Module, ImageEncoderConfig]:
    """Loads the image encoder of a model folder, of Stable Diffusion or a VAE as folder or file, or of a TAESD file.

    Raises:
        CheckpointError: nothing of the kind is there.
        ConfigError: an encoder that is trained with the UNet, or a size that it cannot take.
    """
    source = resolve_model_dir(source, kinds=(MODEL, VAE))
    if (source / "image_vae" / "config.json").is_file():
        encoder: Any = load_component(source, "image_vae")
        settings = encoder.config
    else:
        is_taesd = source.is_file() and not has_vae(source)
        kind = ImageEncoderConfig(kind="taesd" if is_taesd else "autoencoder_kl", path=str(source))
        if kind.kind == "taesd":
            kind = replace(kind, scaling_factor=1.0)
        start = resolve_start(Config(image_encoder=kind))
        settings = start.config.image_encoder
        check_start(start)
        encoder = build_image_encoder(settings, start.vae_config)
        load_image_encoder(encoder, start)
    if settings.is_trained:
        raise ConfigError(
            f"--image-vae {source}: its encoder is trained with the UNet, so its latents change in every step"
        )
    if size % settings.downsampling:
        raise ConfigError(f"--size {size}: a multiple of {settings.downsampling} expected")
    return encoder.eval().requires_grad_(False), settings


EXAMPLES = ("ldmseg data cache COCO --image-vae stable-diffusion-v1-4",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", help="COCO-panoptic folder")
    parser.add_argument(
        "--image-vae",
        required=True,
        help="model, Stable Diffusion or VAE: a folder or a name of the Hub; or a .safetensors file of Stable "
        "Diffusion, a VAE or TAESD",
    )
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--size", type=int, default=512, help="data.image_size of the training to come")
    parser.add_argument(
        "--out", type=Path, help="folder for caches; default ROOT/latents, which training finds by itself"
    )
    parser.add_argument("--limit", type=int, default=0, help="use the first annotations only, as data.limit does")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode pictures")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for a batch of pictures")


def run(args: argparse.Namespace) -> int:
    folder, split = args.out or default_folder(args.root), find_split(args.root, args.split)
    check_outputs({}, {"--out": folder}, inputs=[split.images, split.maps], roots=[args.root, args.image_vae])
    encoder, settings = load_encoder(args.image_vae, args.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = args.size * settings.picture_scale
    files = picture_files(CocoPanoptic(args.root, args.split, args.size, train=True, limit=args.limit))
    encoder = encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = build_cache(
        encoder,
        settings,
        files,
        size,
        folder,
        batch_size=args.batch_size,
        num_workers=args.workers,
        timeout=args.timeout,
    )
    wanted = "auto" if args.out is None else str(args.out)
    print(f"latents of {len(files)} pictures: {path}\ntrain with data.latent_cache={wanted}")
    return 0
