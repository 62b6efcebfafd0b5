"""Where a COCO-panoptic folder keeps things, and strict reading of its pictures."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldmseg_fast.panoptic_format import MAX_PIXELS

__all__ = ["DataError", "SplitFolders", "find_split", "list_splits", "open_image", "read_image"]

_PREFIX, _SUFFIX = "panoptic_", ".json"
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # what has eight bits and a meaning as RGB


class DataError(ValueError):
    """A data set that cannot be read; the message names the file and the cure."""


@dataclass(frozen=True)
class SplitFolders:
    """Annotation file, picture folder and map folder of one split."""

    annotations: Path
    images: Path
    maps: Path


def list_splits(root: str | os.PathLike) -> list[str]:
    """Names NAME of all ROOT/annotations/panoptic_NAME.json. Raises DataError where ROOT is no folder."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data root {str(root)!r} is not a folder: give one with annotations/panoptic_SPLIT.json")
    return sorted(
        path.name[len(_PREFIX) : -len(_SUFFIX)] for path in (root / "annotations").glob(f"{_PREFIX}*{_SUFFIX}")
    )


def find_split(root: str | os.PathLike, split: str) -> SplitFolders:
    """The files of a split: ROOT/annotations/panoptic_SPLIT.json; pictures in ROOT/SPLIT or ROOT/images/SPLIT; maps in
    ROOT/panoptic_SPLIT or ROOT/annotations/panoptic_SPLIT.

    A second annotation of a split (val2017_classes beside val2017) uses the folders of the name before its last
    underscore where it has none of its own. Raises DataError naming what is not there.
    """
    root, splits = Path(root), list_splits(root)
    annotations = root / "annotations" / f"{_PREFIX}{split}{_SUFFIX}"
    if split not in splits:
        found = ", ".join(splits) or "none"
        raise DataError(f"{annotations} does not exist; splits found in {root}: {found}")
    names = [split] if "_" not in split else [split, split.rsplit("_", 1)[0]]
    images = [root / parent / name for name in names for parent in ("", "images")]
    maps = [root / parent / f"{_PREFIX}{name}" for name in names for parent in ("", "annotations")]
    return SplitFolders(annotations, _first_folder(images, "pictures"), _first_folder(maps, "panoptic PNGs"))


def _first_folder(candidates: list[Path], contents: str) -> Path:
    for path in candidates:
        if path.is_dir():
            return path
    raise DataError(f"no folder with {contents}: expected {' or '.join(map(str, candidates[:2]))}")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture as uint8 RGB [H, W, 3], in the layout it is stored in. As `open_image` otherwise."""
    return np.array(open_image(path))


def open_image(path: str | os.PathLike) -> Image.Image:
    """A decoded RGB picture, in the layout it is stored in.

    Grey, palette, CMYK and transparent files are converted. An EXIF orientation is not applied: COCO's maps, and the
    sizes in its JSON, follow the stored pixels. Raises DataError for a missing, truncated, damaged, oversized or
    more-than-8-bit file.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} is over {MAX_PIXELS} pixels: scale it down")
            if image.mode not in _MODES:
                raise DataError(f"{path}: pixel format {image.mode} has more than 8 bits: save it as 8-bit RGB")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: over {MAX_PIXELS} pixels: scale it down") from None
    except (OSError, SyntaxError, struct.error, EOFError) as error:
        raise DataError(f"{path}: not a readable picture ({error}): fetch or save it again") from error
