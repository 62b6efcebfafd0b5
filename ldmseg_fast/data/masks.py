"""Reads masks that say where a map is given. Their values decide, not their format."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from ldmseg_fast.data.orientation import orientation_of, turned
from ldmseg_fast.data.pictures import MAX_PIXELS, open_checked, read_content
from ldmseg_fast.data.pixel_formats import DEEP_GREY, EIGHT_BITS, check_depth, decode, to_rgb
from ldmseg_fast.errors import DataError

_LUMA = np.array([299, 587, 114])  # ITU-R BT.601, as Pillow's "L"


def read_mask(path: str | os.PathLike, *, exif: bool = True, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads where a map is given: bool [H, W].

    A mask has two values, such as 0 and 1 or 0 and 255, of any depth, as grey, colours or palette: the brighter one is
    given. Where it is transparent in parts, what is opaque is given.

    Args:
        path: of a picture.
        exif: turn it as its EXIF orientation says; False keeps the stored pixels.
        max_pixels: of a picture that is read.

    Raises:
        DataError: names a mask that is no readable picture, has more than two values, or gives nothing or everything.
    """
    content = read_content(path)
    with open_checked(path, content, max_pixels) as image:
        if image.mode in EIGHT_BITS:
            check_depth(image, content, path)
        by_itself = image.format == "TIFF"
        orientation = orientation_of(image) if by_itself else 1
        samples = decode(image, content, path)
        orientation = orientation if by_itself else orientation_of(image)
        colour, alpha = _planes(image, samples, path)
    known = given_by(colour, alpha, path)
    if not known.any():
        raise DataError(f"{path}: the mask gives nothing of the map: it is black or transparent everywhere")
    if known.all():
        raise DataError(f"{path}: the mask gives the whole map: nothing to complete, no pixel is black or transparent")
    return np.asarray(turned(Image.fromarray(known.astype(np.uint8)), orientation, exif=exif, by_itself=by_itself)) > 0


def given_by(colour: np.ndarray, alpha: np.ndarray | None, name: str | os.PathLike) -> np.ndarray:
    """Decides which pixels a mask gives: bool [H, W].

    Args:
        colour: grey numbers [H, W], or RGB [H, W, 3], of any integer or float dtype.
        alpha: integer [H, W], 0 for transparent; None where there is none.
        name: of the mask, for the error.

    Raises:
        DataError: more than two values, or no order among them.
    """
    if alpha is not None and (alpha != alpha.flat[0]).any():
        opaque = _upper(alpha, name, "levels of transparency")
        if len(_values(_packed(colour)[opaque])) == 2:
            raise DataError(f"{name}: both its transparency and its colours make a mask: save it as black and white")
        return opaque
    if alpha is not None and not alpha.any():
        return np.zeros(alpha.shape, bool)
    if colour.ndim == 2:
        return _upper(colour, name, "values")
    packed = _packed(colour)
    values = _values(packed)
    if len(values) > 2:
        raise _too_many(name, "colours")
    lumas = [int(np.array([value >> 32, value >> 16 & 0xFFFF, value & 0xFFFF]) @ _LUMA) for value in values]
    if len(values) == 1:
        return np.full(packed.shape, lumas[0] > 0)
    if lumas[0] == lumas[1]:
        raise DataError(f"{name}: two colours of the same brightness: save it as black and white")
    return packed == values[int(np.argmax(lumas))]


def _planes(
    image: Image.Image, samples: np.ndarray | None, name: str | os.PathLike
) -> tuple[np.ndarray, np.ndarray | None]:
    """Splits a decoded picture into colours and alpha, at its own depth."""
    if samples is not None and image.mode != "CMYK":
        channels = samples.shape[2]
        colour = samples[..., 0] if channels == 2 else samples[..., :3]
        return colour, samples[..., -1] if channels in (2, 4) else None
    transparent = image.info.get("transparency")
    if image.mode in (*DEEP_GREY, "F"):
        values = np.asarray(image)
        return values, (values != transparent).astype(np.uint8) if isinstance(transparent, int) else None
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or transparent is not None:
        rgba = np.asarray(image.convert("RGBA"))
        return rgba[..., :3], rgba[..., 3]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")), None
    return np.asarray(to_rgb(image, name)), None


def _upper(values: np.ndarray, name: str | os.PathLike, what: str) -> np.ndarray:
    """Returns where the larger of at most two values is; a single value is given unless it is 0."""
    found = _values(values)
    if len(found) > 2 or not np.isfinite(np.array(found, np.float64)).all():
        raise _too_many(name, what)
    return values == max(found) if len(found) == 2 else np.full(values.shape, found[0] > 0)


def _values(values: np.ndarray) -> list:
    """Returns one, two or, where there are more, three of the values."""
    first = values.flat[0] if values.size else 0
    others = values[values != first]
    if not others.size:
        return [first]
    further = others[others != others[0]]
    return [first, others[0], *further[:1]]


def _packed(colour: np.ndarray) -> np.ndarray:
    """Packs RGB [H, W, 3] of up to 16 bits into one number a pixel, int64 [H, W]; grey stays as it is."""
    if colour.ndim == 2:
        return colour
    return colour[..., 0].astype(np.int64) << 32 | colour[..., 1].astype(np.int64) << 16 | colour[..., 2]


def _too_many(name: str | os.PathLike, what: str) -> DataError:
    return DataError(
        f"{name}: more than two {what}; a mask has two, black and white: save it without smoothing, as PNG"
    )
