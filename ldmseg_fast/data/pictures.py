"""Reads pictures as 8-bit RGB: one reader for data sets, commands and the Python API.

A pixel format is scaled where its range is defined, and refused by name where it is not (`pixel_formats`).
"""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldmseg_fast.data.orientation import TURNS, orientation_of, turned
from ldmseg_fast.data.pixel_formats import check_depth, decode, pillow_errors, rgb_of_samples, to_rgb, unreadable
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import MAX_BYTES, read_file
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_PIXELS, MAX_SIDE  # of maps: a picture's map is read again

_MAY_BE_TURNED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # a PNG's places for the orientation

_HEAD = 4096  # bytes in which an animated PNG says that it is one

_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN_PNG = (b"\x08\x02\0\0\0", b"\x08\0\0\0\0")  # 8-bit RGB or grey, not interlaced
_STILLS = ("MPO", "PSD", "ICO", "ICNS")  # further frames are previews or layers
_SIZED = ("JPEG", "MPO", "PNG", "WEBP", "BMP")  # decoding others may change the size that their header gives
LARGE = 2**24  # pixels; Pillow reads larger pictures, as it would need a copy of an array to resize it
_lock = threading.RLock()

# Pillow warns below its bound, and our error at the bound says more. To silence it picture by picture would make
# Python forget each time which warnings it has shown, and change the filters of other threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Picture:
    """Holds a picture and the size that it has in its file.

    Attributes:
        pixels: uint8 RGB [h, w, 3] or Pillow's image, smaller than the file's where that has more than MAX_PIXELS.
        size: (H, W) of the file, turned where the picture is.
        turned: whether its EXIF orientation was applied.
        frames: whether the file has more than the one frame.
        orientation: EXIF orientation of the file, 1 to 8; 1 where the stored pixels were asked for.
    """

    pixels: np.ndarray | Image.Image
    size: tuple[int, int]
    turned: bool = False
    frames: bool = False
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """Returns (H, W) of the file as it is stored, not turned."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def load_picture(path: str | os.PathLike) -> np.ndarray | Image.Image:
    """Reads an RGB picture as it is stored, in the layout that costs less: uint8 [H, W, 3] or Pillow's image.

    C++ reads plain PNGs where it is built, Pillow reads everything else; the pixels are the same. Grey, palette, CMYK
    and 16-bit files are converted; transparency is dropped, and of several frames the first is read. Gamma, colour
    profiles and EXIF orientation are not applied: COCO's maps, and the sizes in its JSON, follow the stored pixels.

    Raises:
        DataError: a file that is missing, no regular file, truncated, damaged or too large, or whose values have no
            defined range.
    """
    content = read_content(path)
    if _is_plain_png(content):
        return _plain_png(path, content, MAX_PIXELS)
    return _opened(path, content, MAX_PIXELS).image


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a picture as it is stored: uint8 RGB [H, W, 3].

    Raises:
        DataError: see `load_picture`.
    """
    picture = load_picture(path)
    return picture if isinstance(picture, np.ndarray) else np.array(picture)


def stored_size(path: str | os.PathLike) -> tuple[int, int]:
    """Reads the size (H, W) that `read_image` finds; of the formats of photographs only the header is decoded.

    Raises:
        DataError: see `load_picture`.
    """
    content = read_content(path)
    with open_checked(path, content, MAX_PIXELS) as image:
        if image.format in _SIZED:
            return image.height, image.width
    decoded = _opened(path, content, MAX_PIXELS).image
    return decoded.height, decoded.width


def open_image(path: str | os.PathLike) -> Image.Image:
    """Reads a picture as it is stored, as Pillow's image in RGB.

    Raises:
        DataError: see `load_picture`.
    """
    picture = load_picture(path)
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture


def read_picture(path: str | os.PathLike, *, exif: bool = True, max_pixels: int = MAX_PIXELS) -> Picture:
    """Reads a picture as viewers show it, turned as its EXIF orientation says.

    Of more than MAX_PIXELS pixels a smaller picture is read: a JPEG at a part of its size, others box by box.

    Args:
        path: of the file.
        exif: False keeps the stored pixels.
        max_pixels: of a picture that is read; checked before anything is decoded.

    Raises:
        DataError: see `load_picture`.
    """
    return decode_picture(read_content(path), path, exif=exif, max_pixels=max_pixels)


def decode_picture(
    content: bytes, name: str | os.PathLike, *, exif: bool = True, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Decodes the bytes of a picture's file, as `read_picture` does.

    Args:
        content: of the file.
        name: of the picture, for the error.
        exif, max_pixels: as in `read_picture`.

    Raises:
        DataError: see `load_picture`.
    """
    small = _is_plain_png(content) and math.prod(struct.unpack(">II", content[16:24])) <= LARGE
    if small and not (exif and any(place in content for place in _MAY_BE_TURNED)):
        pixels = _plain_png(name, content, max_pixels)
        return Picture(pixels, pixels.shape[:2], frames=b"acTL" in content[:_HEAD])  # type: ignore[arg-type]
    stored = _opened(name, content, max_pixels, reduced=True)
    image, (width, height) = stored.image, stored.size
    if not exif or stored.orientation not in TURNS:
        return Picture(image, (height, width), frames=stored.frames)
    size = (width, height) if stored.orientation >= 5 else (height, width)
    shown = image.transpose(TURNS[stored.orientation])
    return Picture(shown, size, turned=True, frames=stored.frames, orientation=stored.orientation)


def rgb_of_image(image: Image.Image, name: str, *, exif: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Converts Pillow's image to RGB, turned as its EXIF orientation says.

    An image that is not decoded yet keeps the lower bytes of 16-bit colours; what Pillow has decoded has lost them.

    Args:
        image: of any mode, in memory or as a file was opened.
        name: of the image, for the error.
        exif: False keeps the stored pixels.
        max_pixels: of an image; checked before it is decoded.

    Raises:
        DataError: too large, damaged, or without a defined range.
    """
    check_pixels(name, *image.size, max_pixels)
    turns_itself = image.format == "TIFF" and bool(getattr(image, "tile", ()))
    orientation = orientation_of(image) if turns_itself else 1
    with pillow_errors(name):
        content = _content_of(image)
    check_depth(image, content, name)
    samples = decode(image, content, name)
    rgb = to_rgb(image, name, content) if samples is None else rgb_of_samples(samples, image.mode)
    orientation = orientation if turns_itself else orientation_of(image)
    return turned(rgb, orientation, exif=exif, by_itself=turns_itself)


def check_pixels(name: str | os.PathLike, width: int, height: int, max_pixels: int) -> None:
    """Checks a picture's size before anything is decoded.

    Raises:
        DataError: no pixels, more than `max_pixels`, or a side over MAX_SIDE; it names the picture.
    """
    if width < 1 or height < 1:
        raise DataError(f"{name}: {width}x{height}: a picture has pixels")
    if width * height > max_pixels:
        raise DataError(
            f"{name}: {width}x{height} is over {max_pixels} pixels: scale it down, or raise --max-pixels of a command "
            f"that has it"
        )
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{name}: {width}x{height}: sides of at most {MAX_SIDE} pixels are read: cut it into parts")


def open_checked(path: str | os.PathLike, content: bytes, max_pixels: int) -> Image.Image:
    """Opens a picture by Pillow, not yet decoded, with its size checked.

    Args:
        path: of the file, for the error.
        content: of the file.
        max_pixels: of a picture that is read.

    Raises:
        DataError: no picture, one that is too large, or PostScript.
    """
    try:
        with _bounds(max_pixels):
            image = Image.open(io.BytesIO(content))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{path}: over {max_pixels} pixels: scale it down, or raise --max-pixels of a command that has it"
        ) from None
    except Exception as error:  # what Pillow's formats raise on damaged files is nowhere listed
        raise unreadable(path, error) from error
    if image.format == "EPS":
        raise DataError(f"{path}: PostScript, a program that another one would have to run; save it as PNG")
    check_pixels(path, *image.size, max_pixels)
    return image


def read_content(path: str | os.PathLike) -> bytes:
    """Reads a picture's file.

    Raises:
        DataError: names the file that is missing, no regular file or too large.
    """
    try:
        return read_file(path, DataError, "picture", MAX_BYTES)
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        if isinstance(error, DataError):
            raise
        raise unreadable(path, error) from error


def _content_of(image: Image.Image) -> bytes:
    """Returns the file that an image was opened from, where its depth hangs on it; empty where it is decoded."""
    file = getattr(image, "fp", None)
    if image.format not in ("PNG", "TIFF", "JPEG2000", "SGI") or not getattr(image, "tile", ()) or file is None:
        return b""
    place = file.tell()
    file.seek(0)
    try:
        return file.read(MAX_BYTES)
    finally:
        file.seek(place)


def _is_plain_png(content: bytes) -> bool:
    return _C is not None and content.startswith(_PNG) and content[24:29] in _PLAIN_PNG


def _plain_png(path: str | os.PathLike, content: bytes, max_pixels: int) -> np.ndarray:
    width, height = struct.unpack(">II", content[16:24])
    check_pixels(path, width, height, max_pixels)
    try:
        return _C.read_png_picture(content, max_pixels)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


@dataclass(frozen=True)
class _Stored:
    image: Image.Image  # RGB
    orientation: int
    size: tuple[int, int]  # (W, H) of the file
    frames: bool


def _opened(path: str | os.PathLike, content: bytes, max_pixels: int, reduced: bool = False) -> _Stored:
    """Decodes a picture by Pillow as it is stored.

    With `reduced` it is smaller where it has more than MAX_PIXELS pixels, and its orientation is read.
    """
    with open_checked(path, content, max_pixels) as image:
        check_depth(image, content, path)
        orientation = 1
        turns_itself = image.format == "TIFF"  # Pillow turns these when it decodes, and forgets the tag
        if turns_itself:
            orientation = orientation_of(image)
        size = image.size[::-1] if turns_itself and orientation >= 5 else image.size
        large = size[0] * size[1] > MAX_PIXELS
        with pillow_errors(path):
            frames = bool(getattr(image, "is_animated", False)) and image.format not in _STILLS
        if reduced and large and image.format in ("JPEG", "MPO"):
            part = (MAX_PIXELS / (size[0] * size[1])) ** 0.5 / 2
            with pillow_errors(path):
                image.draft("RGB", (int(size[0] * part), int(size[1] * part)))
        with _bounds(max_pixels) if large else nullcontext():
            samples = decode(image, content, path)
        if reduced and not turns_itself:
            orientation = orientation_of(image)  # a PNG may have it behind its pixels
        rgb = to_rgb(image, path, content) if samples is None else rgb_of_samples(samples, image.mode)
    if reduced and rgb.width * rgb.height > MAX_PIXELS:
        rgb = rgb.reduce(_factor(rgb.width * rgb.height))
    return _Stored(turned(rgb, orientation, exif=False, by_itself=turns_itself), orientation, size, frames)


def _factor(pixels: int) -> int:
    factor = 2
    while pixels > MAX_PIXELS * factor**2:
        factor += 1
    return factor


@contextmanager
def _bounds(max_pixels: int) -> Iterator[None]:
    """Raises Pillow's own bound to ours."""
    with _lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if before is None else max(before, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
