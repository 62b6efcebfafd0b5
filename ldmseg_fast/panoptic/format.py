"""Reads and writes COCO panoptic PNGs: PNG <-> segment ids. `panoptic.annotations` reads the JSON beside them.

A pixel's id is R + 256 G + 65536 B and 0 is void (Kirillov et al., "Panoptic Segmentation", CVPR 2019;
cocodataset.org/#format-data).
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.files import read_file, replacing
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.annotations import MAX_ID, load_panoptic_json

__all__ = [
    "MAX_ID",
    "MAX_PIXELS",
    "MAX_SIDE",
    "check_ids",
    "ids_to_rgb",
    "load_panoptic_json",
    "read_panoptic_png",
    "read_run_map",
    "rgb_to_ids",
    "two_channel_to_ids",
    "write_panoptic_png",
]

MAX_PIXELS = 2**26  # 8192 x 8192: far above any photograph, far below what exhausts memory
MAX_SIDE = 2**16  # above a JPEG's 65535; a map of one column would be all bookkeeping
MAX_PILLOW_PIXELS = 48_000_000  # Pillow holds 4 bytes a pixel beside the ids
MAX_INTERLACED_PIXELS = 2**22  # of maps that are read as runs, for which all ids must be held

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "greyscale", 2: "RGB", 3: "palette", 4: "greyscale with alpha", 6: "RGBA"}


def rgb_to_ids(rgb: np.ndarray) -> np.ndarray:
    """Turns RGB, uint8 [H, W, 3], into segment ids, int32 [H, W].

    Raises:
        PanopticFormatError: another shape or dtype.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise PanopticFormatError(f"expected an RGB map [H, W, 3] uint8, got {list(rgb.shape)} {rgb.dtype}")
    ids = rgb[..., 2].astype(np.int32)
    ids <<= 8
    ids |= rgb[..., 1]
    ids <<= 8
    ids |= rgb[..., 0]
    return ids


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Turns segment ids, integer [H, W], into RGB, uint8 [H, W, 3].

    Raises:
        PanopticFormatError: no such map, or ids outside 0..2^24-1.
    """
    ids = check_ids(ids)
    return np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(*ids.shape, 4)[..., :3].copy()


def check_ids(ids: np.ndarray) -> np.ndarray:
    """Returns `ids` itself, an integer map [H, W] with values in 0..2^24-1.

    Raises:
        PanopticFormatError: it is no such map.
    """
    if not isinstance(ids, np.ndarray):
        raise PanopticFormatError(f"expected an array of integer ids [H, W], got {type(ids).__name__}")
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise PanopticFormatError(f"expected integer ids [H, W], got {list(ids.shape)} {ids.dtype}")
    if ids.min() < 0 or ids.max() > MAX_ID:
        raise PanopticFormatError(
            f"segment ids must lie in 0..{MAX_ID} to fit three bytes, found {ids.min()}..{ids.max()}; renumber them"
        )
    return ids


def two_channel_to_ids(channels: np.ndarray) -> tuple[np.ndarray, list[dict[str, int]]]:
    """Turns the two-channel form into ids and segments.

    Channel 0 is the category, 0 void; channel 1 is the instance number.

    Args:
        channels: uint8 [H, W, 2] or [H, W, 3]; a third channel must be zero.

    Returns:
        ids int32 [H, W], which are category + 256 instance, and `[{"id", "category_id", "iscrowd", "area"}]`.

    Raises:
        PanopticFormatError: another shape or dtype, or a third channel that is not zero.
    """
    if channels.dtype != np.uint8 or channels.ndim != 3 or channels.shape[2] not in (2, 3):
        raise PanopticFormatError(f"expected [H, W, 2 or 3] uint8, got {list(channels.shape)} {channels.dtype}")
    if channels.shape[2] == 3 and channels[..., 2].any():
        raise PanopticFormatError("the third channel of a two-channel map must be zero; is this a three-byte map?")
    ids = channels[..., 0].astype(np.int32) | (channels[..., 1].astype(np.int32) << 8)
    ids[channels[..., 0] == 0] = 0
    present, areas = np.unique(ids, return_counts=True)
    return ids, [
        {"id": int(segment_id), "category_id": int(segment_id) & 255, "iscrowd": 0, "area": int(area)}
        for segment_id, area in zip(present, areas)
        if segment_id != 0
    ]


def read_panoptic_png(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads the segment ids, int32 [H, W], of an 8-bit RGB PNG.

    The header is checked before any pixel is decoded, so that a tiny file cannot claim gigabytes. Beside the ids, only
    a few rows are in memory; for an interlaced file, and where the extension is not built, Pillow's picture as well.

    Raises:
        PanopticFormatError: a palette, grey, RGBA, 16-bit, oversized, truncated or damaged file, or no file but a
            folder, pipe or device.
        FileNotFoundError: there is no file.
    """
    content = _read_content(path, max_pixels)
    with _named(path):
        if _C is not None and content[28] == 0:
            return _C.read_png_ids(content, max_pixels)
        return _decode_pillow(content, path)


def read_run_map(path: str | Path) -> Any:
    """Reads the map of an 8-bit RGB PNG as the extension's `RunMap`, which is small for a small file.

    Raises:
        PanopticFormatError: see `read_panoptic_png`; besides, an interlaced file of more than `MAX_INTERLACED_PIXELS`,
            and a small file with millions of runs, which is no map.
        FileNotFoundError: there is no file.
    """
    content = _read_content(path, MAX_PIXELS)
    if content[28] == 0:
        with _named(path):
            return _C.read_png(content, MAX_PIXELS)
    width, height = struct.unpack(">II", content[16:24])
    if width * height > MAX_INTERLACED_PIXELS:
        raise PanopticFormatError(
            f"{path}: interlaced PNG of {width}x{height}, which must be held whole; save it without interlacing"
        )
    with _named(path):
        return _C.RunMap(_decode_pillow(content, path))


def write_panoptic_png(path: str | Path, ids: np.ndarray) -> None:
    """Writes segment ids, integer [H, W], as an 8-bit RGB PNG at compression level 1.

    The file appears whole or not at all.

    Raises:
        PanopticFormatError: no such map, or ids outside 0..2^24-1.
        OSError: a file that cannot be written.
    """
    if _C is None:
        content = _encode_pillow(ids_to_rgb(ids))
    else:
        height, width = check_ids(ids).shape
        rows = _deflate(_C.filter_ids(np.ascontiguousarray(ids, np.int32)))
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        content = _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _check_chunks(content: bytes) -> None:
    """Raises `ValueError` where a PNG ends early or a checksum fails; Pillow lets both pass."""
    offset = len(_SIGNATURE)
    while True:
        if offset + 12 > len(content):
            raise ValueError("the file ends before its IEND chunk")
        length, kind = struct.unpack_from(">I4s", content, offset)
        if offset + 12 + length > len(content):
            raise ValueError(f"the file ends inside its {kind!r} chunk")
        if kind in (b"IHDR", b"IDAT"):
            (checksum,) = struct.unpack_from(">I", content, offset + 8 + length)
            if zlib.crc32(content[offset + 4 : offset + 8 + length]) != checksum:
                raise ValueError(f"checksum of the {kind!r} chunk does not match")
        if kind == b"IEND":
            return
        offset += 12 + length


def _chunk(kind: bytes, body: bytes | bytearray) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _deflate(content: np.ndarray) -> bytes | bytearray:
    try:
        import deflate  # libdeflate: writes label maps several times faster than zlib
    except ImportError:
        deflate = None  # type: ignore[assignment]
    return zlib.compress(content, 1) if deflate is None else deflate.zlib_compress(content, 1)


def _read_content(path: str | Path, max_pixels: int) -> bytes:
    """Reads a PNG whose header is that of a map."""
    content = read_file(path, PanopticFormatError, "PNG file")
    _check_header(content[:29], path, max_pixels)
    return content


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Turns what the decoders raise into an error that names the file."""
    try:
        yield
    except PanopticFormatError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        if _C is not None and isinstance(error, _C.TooManyRuns):
            raise PanopticFormatError(f"{path}: {error}") from None
        raise PanopticFormatError(f"{path}: damaged or truncated PNG ({error}); write or download it again") from error


def _decode_pillow(content: bytes, path: str | Path) -> np.ndarray:
    from PIL import Image

    _check_chunks(content)
    width, height = struct.unpack(">II", content[16:24])
    if width * height > MAX_PILLOW_PIXELS:
        how = "build the extension" if _C is None else "save it without interlacing"
        raise PanopticFormatError(f"{path}: {width}x{height} is over {MAX_PILLOW_PIXELS} pixels for Pillow; {how}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            ids = np.empty((height, width), np.int32)
            step = max(1, 2**20 // width)  # rows: a megapixel at a time
            for top in range(0, height, step):
                band = image.crop((0, top, width, min(top + step, height)))
                ids[top : top + step] = rgb_to_ids(np.asarray(band))
            return ids
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _encode_pillow(rgb: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _check_header(header: bytes, path: str | Path, max_pixels: int) -> None:
    if len(header) < 29 or header[:8] != _SIGNATURE or header[12:16] != b"IHDR":
        raise PanopticFormatError(f"{path}: not a PNG file; panoptic maps are 8-bit RGB PNGs")
    width, height, depth, colour, _, _, _ = struct.unpack(">IIBBBBB", header[16:29])
    if colour != 2 or depth != 8:
        raise PanopticFormatError(
            f"{path}: {depth}-bit {_COLOUR_TYPES.get(colour, f'colour type {colour}')} PNG; "
            "segment ids need 8-bit RGB (id = R + 256 G + 65536 B): write it with write_panoptic_png"
        )
    if not 1 <= width <= MAX_SIDE or not 1 <= height <= MAX_SIDE or width * height > max_pixels:
        raise PanopticFormatError(
            f"{path}: header claims {width}x{height}; sides of 1 to {MAX_SIDE} and up to {max_pixels} pixels are read"
        )
