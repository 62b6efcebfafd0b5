"""Turns Pillow's pixel formats into 8-bit RGB: by exact scales where the range is defined, by an error where not.

Pillow cuts 16-bit colours to their upper byte when it decodes them. The lower byte comes from a second decoding with
the other byte order, so that v becomes round(255 v / 65535) here as well.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldmseg_fast.errors import DataError

EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I")

_NATIVE, _FOREIGN = ("L", "B") if sys.byteorder == "little" else ("B", "L")
_OTHER_ORDER = {"B": "L", "L": "B", "N": _FOREIGN}
_DEEP_COLOURS = tuple(f"{mode};16{order}" for mode in ("RGB", "RGBA", "RGBX", "CMYK") for order in "BLN")
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF 6.0, section 8
_ROWS = 256  # rows that are scaled at once


def check_depth(image: Image.Image, content: bytes, name: str | os.PathLike) -> None:
    """Checks from the header that no depth is lost when Pillow decodes a picture.

    Args:
        image: as it was opened, not yet decoded.
        content: of its file.
        name: of the picture, for the error.

    Raises:
        DataError: values without a defined range, or a depth that Pillow cannot decode exactly.
    """
    if image.mode not in EIGHT_BITS and largest_value(image, content) is None:
        raise no_range(name, image)
    raw = _raw_mode(image)
    inexact = image.mode in EIGHT_BITS and (
        (";16" in raw and raw not in (*_DEEP_COLOURS, "LA;16B"))
        or (image.format == "TIFF" and _tag(image, _BITS, 8) > 8 and _tag(image, _PLANAR, 1) != 1)
        or (image.format == "SGI" and content[3:4] == b"\2")
        or (image.format == "JPEG2000" and _jpeg_2000_bits(content) > 8)
        or (image.format == "DDS" and "BC6" in str(getattr(image, "pixel_format", "")))
    )
    if inexact:
        raise DataError(
            f"{name}: {image.format} of more than 8 bits per channel ({raw or image.mode}), which cannot be read "
            f"exactly: save it as 8-bit RGB, or as a 16-bit PNG"
        )


def largest_value(image: Image.Image, content: bytes = b"") -> int | None:
    """Returns the value that is white in a picture of one of DEEP_GREY; None where the format defines none.

    Args:
        image: opened from a file, or made in memory.
        content: of its file, which JPEG 2000 needs.
    """
    mode, kind = image.mode, image.format
    if mode not in DEEP_GREY:
        return None
    if kind in ("PNG", "PPM"):
        return 65535
    if mode == "I":
        return None  # signed numbers of 16 or 32 bits
    if kind == "TIFF":
        return 2 ** _tag(image, _BITS, 16) - 1
    if kind == "JPEG2000":
        bits = _jpeg_2000_bits(content) or 16
        return (2**bits - 1) << (16 - bits) if bits <= 16 else None  # Pillow shifts them up
    return 65535 if kind is None else None


def decode(image: Image.Image, content: bytes, name: str | os.PathLike) -> np.ndarray | None:
    """Decodes a picture in place, and 16-bit colours to uint16 [H, W, C]: C 2 for grey with alpha, 4 for RGBA or CMYK.

    Args:
        image: as it was opened, not yet decoded.
        content: of its file; empty where the image alone is to be decoded.
        name: of the picture, for the error.

    Returns:
        None for every other format, whose pixels are in `image`.

    Raises:
        DataError: a damaged picture.
    """
    raw = _raw_mode(image)
    if not content or raw not in (*_DEEP_COLOURS, "LA;16B"):
        with pillow_errors(name):
            image.load()
        return None
    if raw == "LA;16B":
        _set_raw_mode(image, "RGBA")  # as many bytes: both of grey, both of alpha
        with pillow_errors(name):
            image.load()
        return np.asarray(image).view(">u2").astype(np.uint16)
    with pillow_errors(name):
        twin = Image.open(io.BytesIO(content))
        if frame := image.tell():
            twin.seek(frame)
    with twin:
        _set_raw_mode(twin, raw[:-1] + _OTHER_ORDER[raw[-1]])
        with pillow_errors(name):
            image.load()
            twin.load()
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(twin)


@contextmanager
def pillow_errors(name: str | os.PathLike) -> Iterator[None]:
    """Turns what Pillow raises on a damaged picture into an error that names it; nothing else belongs inside."""
    try:
        yield
    except Exception as error:  # what Pillow's formats raise on damaged files is nowhere listed
        raise unreadable(name, error) from error


def unreadable(name: str | os.PathLike, error: Exception) -> DataError:
    """Returns the error of a picture that Pillow or C++ cannot decode."""
    unknown = isinstance(error, UnidentifiedImageError)  # its text names a buffer of ours
    why = "cannot identify image file: no format that Pillow knows" if unknown else str(error) or type(error).__name__
    return DataError(f"{name}: not a readable picture ({why}): fetch or save it again")


def rgb_of_samples(samples: np.ndarray, mode: str) -> Image.Image:
    """Scales what `decode` returns to 8 bits: Pillow's image in RGB, without alpha.

    Args:
        samples: uint16 [H, W, C].
        mode: Pillow's, which tells CMYK from RGBA.
    """
    scaled = scale(samples, 65535)
    if mode == "CMYK":
        return Image.frombytes("CMYK", scaled.shape[1::-1], scaled.tobytes()).convert("RGB")
    if samples.shape[2] == 2:
        return Image.fromarray(np.ascontiguousarray(scaled[..., 0])).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(scaled[..., :3]))


def to_rgb(image: Image.Image, name: str | os.PathLike, content: bytes = b"") -> Image.Image:
    """Converts a decoded picture to RGB; an RGB picture is returned itself. Alpha is dropped.

    Args:
        image: of any mode.
        name: of the picture, for the error.
        content: of its file, where there is one.

    Raises:
        DataError: a pixel format without a defined range.
    """
    if image.mode == "RGB":
        return image
    largest = largest_value(image, content)
    if largest is not None:
        return Image.fromarray(scale(deep_grey(image, largest, name), largest)).convert("RGB")
    if image.mode not in EIGHT_BITS:
        raise no_range(name, image)
    try:
        if image.mode in ("RGBa", "La"):  # premultiplied
            image = image.convert(image.mode.upper())
        return image.convert("RGB")
    except (ValueError, OSError, ImportError) as error:  # LAB without LittleCMS, a palette that is none
        raise DataError(f"{name}: pixel format {image.mode} cannot be converted ({error}): save it as RGB") from error


def deep_grey(image: Image.Image, largest: int, name: str | os.PathLike) -> np.ndarray:
    """Returns a deep grey picture's values, integer [H, W], 0 for black.

    Raises:
        DataError: a value outside 0..largest.
    """
    values = np.asarray(image)
    if values.min() < 0 or values.max() > largest:
        raise DataError(
            f"{name}: pixel format {image.mode} with values {values.min()}..{values.max()}, 0..{largest} "
            f"expected: save it as 8-bit RGB"
        )
    inverted = image.format == "TIFF" and _tag(image, _PHOTOMETRIC, 1) == 0  # white is zero
    return largest - values if inverted else values


def scale(values: np.ndarray, largest: int) -> np.ndarray:
    """Scales integer values 0..largest of any shape to uint8: round(255 v / largest)."""
    scaled = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _ROWS):
        rows = values[top : top + _ROWS].astype(np.int64)
        scaled[top : top + _ROWS] = (510 * rows + largest) // (2 * largest)
    return scaled


def no_range(name: str | os.PathLike, image: Image.Image) -> DataError:
    """Returns the error of a pixel format without a defined range."""
    kind = f" of a {image.format} file" if image.format else ""
    return DataError(
        f"{name}: pixel format {image.mode}{kind} has more than 8 bits and no defined range: scale its values and save "
        f"it as 8-bit RGB"
    )


def _raw_mode(image: Image.Image) -> str:
    """Returns the layout of the pixels in the file, of the first tile; "" where the picture is decoded."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        return first if isinstance(first, str) else ""
    return ""


def _set_raw_mode(image: Image.Image, raw: str) -> None:
    tiles = []
    for codec, extents, offset, arguments in image.tile:  # type: ignore[attr-defined]
        changed = (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw
        tiles.append(type(image.tile[0])(codec, extents, offset, changed))  # type: ignore[attr-defined]
    image.tile = tiles  # type: ignore[attr-defined]


def _tag(image: Image.Image, number: int, default: int) -> int:
    value = image.tag_v2.get(number, default)  # type: ignore[attr-defined]
    return value[0] if isinstance(value, tuple) else value


def _jpeg_2000_bits(content: bytes) -> int:
    """Returns the most bits of a component: ISO/IEC 15444-1, Annex A.5.1, the SIZ marker; 0 where there is none."""
    start = content.find(b"\xff\x4f\xff\x51")
    count = int.from_bytes(content[start + 40 : start + 42], "big")
    depths = content[start + 42 : start + 42 + 3 * count : 3]
    return max(((depth & 127) + 1 for depth in depths), default=0) if start >= 0 else 0
