"""Keeps image latents on disk: a frozen encoder makes them once, and training reads them in the place of pictures.

FOLDER/KEY/  manifest.json  latents-00000.safetensors ...    [n, 2, C, h, w] float16: of a picture and of its mirror

KEY is a hash of the encoder's weights and settings, the transform and the list of pictures with their sizes. Where any
of them changes, the cache is another one. A shard is written whole or not at all, so an interrupted cache is completed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ldmseg_fast import distributed
from ldmseg_fast.config import Config, ImageEncoderConfig
from ldmseg_fast.config.roots import entries_of
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import read_json, require_file, sha256

PER_SHARD = 512
MANIFEST = "manifest.json"


def default_folder(root: str | Path) -> Path:
    """Returns the folder below a data root where training looks for caches by itself."""
    return Path(root) / "latents"


def picture_files(dataset: CocoPanoptic) -> list[Path]:
    """Lists the pictures of a split, each once, in the order of their first annotation."""
    return list(dict.fromkeys(dataset.paths(index)[0] for index in range(len(dataset))))


def _rows(dataset: CocoPanoptic, files: list[Path]) -> dict[str, int]:
    """Maps each picture's name in the JSON, which may have folders in it, to its place in `files`."""
    places = {file: row for row, file in enumerate(files)}
    names = (dataset.image_name(index) for index in range(len(dataset)))
    return {name: places[dataset.folders.images / name] for name in names}


@dataclass(frozen=True)
class FileState:
    """Holds a file's size in bytes and the time of its last change in nanoseconds."""

    size: int
    changed: int


def file_states(files: list[Path]) -> list[FileState]:
    """Reads the states of files, in their order; each of their folders is listed once.

    A server of files answers a listing with the states of all that it lists, so this spares a question for each.
    """
    wanted: dict[str, set[str]] = {}
    for file in files:
        wanted.setdefault(str(file.parent), set()).add(file.name)
    states: dict[Path, os.stat_result] = {}
    for folder, names in wanted.items():
        with os.scandir(folder) as entries:
            states |= {Path(folder, entry.name): entry.stat() for entry in entries if entry.name in names}
    # a file system that takes other spellings for a name may list another one
    found = [states.get(file) or file.stat() for file in files]
    return [FileState(state.st_size, state.st_mtime_ns) for state in found]


def cache_key(
    encoder: nn.Module,
    settings: ImageEncoderConfig,
    size: int,
    files: list[Path],
    states: list[FileState] | None = None,
) -> str:
    """Hashes all that the latents depend on into 32 hexadecimal digits.

    Args:
        encoder: that makes the latents.
        settings: of it.
        size: side in pixels to which pictures are resized.
        files: the pictures, each once.
        states: of `files`, where they are known.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([settings.kind, settings.latent_channels, size, "pillow bicubic"]).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    absolute = [file.absolute() for file in files]
    folders = {file.parent for file in absolute}
    root = os.path.commonpath(folders) if folders else ""
    for file, state in zip(absolute, states or file_states(files)):
        name = file.relative_to(root).as_posix()
        digest.update(f"{name}:{state.size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class LatentCache:
    """Reads a complete cache; the names that pictures have in the JSON tell them apart."""

    folder: Path
    rows: dict[str, int]
    shards: dict[str, dict[str, Any]]  # of the manifest: file name to "bytes" and "sha256", in the order of the rows
    seconds_per_image: float
    factor: float  # from the scaling the cache was made with to the run's

    @classmethod
    def open(
        cls, folder: Path, key: str, files: list[Path], scaling_factor: float, rows: dict[str, int] | None = None
    ) -> LatentCache:
        """Opens the cache of `key` in `folder`; `read` multiplies its latents up to `scaling_factor`.

        rows: the place in `files` of each name that `read` is asked for; by default of each file's own name.

        Raises:
            CheckpointError: there is no cache, another one, or an incomplete or damaged one.
        """
        cure = "make it with `ldmseg data cache`"
        path = folder / key
        if not (path / MANIFEST).is_file():
            others = (
                [entry.name for entry in folder.iterdir() if (entry / MANIFEST).is_file()] if folder.is_dir() else []
            )
            stale = "; the one there belongs to another encoder, size or list of pictures" if others else ""
            raise CheckpointError(f"{folder}: no latent cache for this run{stale}; {cure}")
        manifest = read_json(path / MANIFEST)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), dict):
            raise CheckpointError(f"{path / MANIFEST}: damaged; {cure}")
        names = [shard_name(index) for index in range(-(-len(files) // PER_SHARD))]
        missing = [name for name in names if is_broken(path / name, manifest["shards"].get(name))]
        if missing:
            raise CheckpointError(f"{path}: {len(missing)} of {len(names)} shards are missing or damaged; {cure}")
        rows = rows or {file.name: row for row, file in enumerate(files)}
        factor = scaling_factor / manifest["scaling_factor"]
        shards = {name: manifest["shards"][name] for name in names}
        return cls(path, rows, shards, manifest["seconds_per_image"], factor)

    def read(self, file_name: str, flipped: bool) -> Tensor:
        """Reads float16 [C, h, w] of a picture, or of its mirror image. The latents are scaled."""
        shard, row = divmod(self.rows[file_name], PER_SHARD)
        latents = _open_shard(self.folder / shard_name(shard)).get_slice("latents")[row : row + 1, int(flipped)][0]
        return latents if self.factor == 1.0 else latents * self.factor


class ShardCheck:
    """Reads the shards of a cache once, in a thread beside the training, and finds bits that have flipped since.

    The ranks share the work. `LatentCache.open` looks at sizes only, because reading gigabytes would hold up the start.
    """

    def __init__(self, cache: LatentCache) -> None:
        self._problem = ""
        self._names = list(cache.shards)[distributed.rank() :: distributed.world_size()]
        self.thread = threading.Thread(target=self._run, args=(cache,), daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # no more threads
            self._run(cache)

    def raise_if_damaged(self) -> None:
        """Raises CheckpointError with the shard's name once one was found damaged."""
        if self._problem:
            raise CheckpointError(self._problem)

    def _run(self, cache: LatentCache) -> None:
        for name in self._names:
            try:
                broken = is_broken(cache.folder / name, cache.shards[name], thorough=True)
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
    require_file(path, CheckpointError)
    return safe_open(path, framework="pt")  # memory-mapped: all processes share one copy


def shard_name(index: int) -> str:
    """Returns the file name of a shard."""
    return f"latents-{index:05d}.safetensors"


def is_broken(path: Path, known: dict[str, Any] | None, thorough: bool = False) -> bool:
    """Tells whether a shard is not what the manifest says; `thorough` reads all of it."""
    if known is None or not path.is_file() or path.stat().st_size != known["bytes"]:
        return True
    return thorough and sha256(path) != known["sha256"]


def why_not(config: Config) -> str:
    """Returns the reason why a run must encode its images in every step, "" where a cache would do."""
    data = config.data
    reasons = [
        (len(entries_of(data.root)) > 1, f"data.root={data.root} lists several sets"),
        (config.image_encoder.is_trained, f"image_encoder.kind={config.image_encoder.kind} is trained"),
        (data.scale_min < 1, f"data.scale_min={data.scale_min} crops at random"),
        (data.aspect_jitter > 0, f"data.aspect_jitter={data.aspect_jitter} crops at random"),
        (data.paste > 0, f"data.paste={data.paste} changes pictures at random"),
        (data.color_jitter > 0, f"data.color_jitter={data.color_jitter} changes colours at random"),
        (data.resize != "pillow", f"data.resize={data.resize} differs from the cache's, which is Pillow's"),
        (config.unet.conditioning == "clip_image", "unet.conditioning=clip_image sees the pictures"),
    ]
    return "; ".join(reason for found, reason in reasons if found)


def attach_cache(
    dataset: CocoPanoptic, config: Config, encoder: nn.Module, say: Callable[[str], None]
) -> LatentCache | None:
    """Lets a training set read latents where `data.latent_cache` asks for them and the augmentation allows it.

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
    size = config.data.image_size * config.image_encoder.picture_scale

    def look() -> tuple[str, list[int]]:
        states = file_states(files)
        key = cache_key(encoder, config.image_encoder, size, files, states)
        return key, [state.changed for state in states]

    key, changed = distributed.from_main(look)  # one rank asks the disk, for all of them
    folder = default_folder(dataset.root) if wanted == "auto" else Path(wanted)
    try:
        cache = LatentCache.open(folder, key, files, config.image_encoder.scaling_factor, _rows(dataset, files))
    except CheckpointError as error:
        if wanted != "auto":
            raise
        say(f"latent cache not used: {error}")
        return None
    made = (cache.folder / MANIFEST).stat().st_mtime_ns
    if newer := [file for file, at in zip(files, changed) if at > made]:
        say(f"{len(newer)} pictures, first {newer[0]}, are newer than their latents: where more than their time has "
            f"changed, delete {cache.folder} and run `ldmseg data cache` again")  # fmt: skip
    dataset.use_latents(cache)
    say(f"image latents of {len(files)} pictures from {cache.folder}; saves {1000 * cache.seconds_per_image:.1f} ms of "
        f"encoding per image, as measured when it was made")  # fmt: skip
    return cache
