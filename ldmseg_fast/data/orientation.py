"""Reads the EXIF orientation of pictures, and turns them as it says."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from PIL import Image

ORIENTATION = 0x0112  # the tag's number: EXIF 2.32, section 4.6.4; TIFF 6.0
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {6: TURNS[8], 8: TURNS[6]}  # all others undo themselves
_EXIF = ("exif", "Raw profile type exif")  # what Pillow names it in `Image.info`
_lock = threading.Lock()


def turned(image: Image.Image, orientation: int, *, exif: bool, by_itself: bool) -> Image.Image:
    """Turns a decoded picture as its EXIF orientation says.

    Args:
        image: that was decoded.
        orientation: of its file, 1 to 8.
        exif: False for the stored pixels.
        by_itself: whether Pillow has turned it already, as it does with TIFFs.

    Returns:
        The image itself where nothing is to be done.
    """
    if by_itself == exif or orientation not in TURNS:
        return image
    return image.transpose(TURNS[orientation] if exif else _BACK.get(orientation, TURNS[orientation]))


def orientation_of(image: Image.Image) -> int:
    """Reads the EXIF orientation of Pillow's image, 1 to 8; 1 where there is none, or none that can be read."""
    may_warn = hasattr(image, "tag_v2") or any(image.info.get(key) for key in _EXIF)
    try:
        with _no_warnings() if may_warn else nullcontext():
            orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # what Pillow raises on damaged EXIF depends on the tag; the picture itself is whole
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silences Pillow's warnings of damaged EXIF. The filters are the process's own, so this is for few pictures."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
