"""Reads and writes COCO panoptic files: PNG <-> segment ids, and the JSON beside them.

A pixel's id is R + 256 G + 65536 B and 0 is void (Kirillov et al., "Panoptic Segmentation", CVPR 2019;
cocodataset.org/#format-data).
"""

import gc
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.files import read_file, replacing
from ldmseg_fast.native import _C

try:
    import deflate  # libdeflate: writes label maps several times faster than zlib
except ImportError:
    deflate = None  # type: ignore[assignment]

MAX_ID = 2**24 - 1
MAX_PIXELS = 2**26  # 8192 x 8192: far above any photograph, far below what exhausts memory

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

    The header is checked before any pixel is decoded, so that a tiny file cannot claim gigabytes.

    Raises:
        PanopticFormatError: a palette, grey, RGBA, 16-bit, oversized, truncated or damaged file.
        FileNotFoundError: there is no file.
    """
    content = read_file(path, PanopticFormatError, "map")
    _check_header(content[:29], path, max_pixels)
    interlaced = content[28] != 0
    try:
        if _C is not None and not interlaced:
            return _C.read_png(content, max_pixels).ids()
        _check_chunks(content)
        return _decode_pillow(content)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        raise PanopticFormatError(f"{path}: damaged or truncated PNG ({error}); write or download it again") from error


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


def load_panoptic_json(path: str | Path, *, predictions: bool = False) -> dict[str, Any]:
    """Loads a COCO panoptic JSON and checks its `images`, `annotations` and `categories`.

    With `predictions=True` only `annotations` is required, as in panopticapi; what is there is still checked.

    Raises:
        PanopticFormatError: names the file and the entry. Missing keys, wrong types, duplicate image ids, category ids,
            annotations of one image or segment ids of one annotation, ids outside 1..2^24-1, segments of a category or
            annotations of an image that the file does not list.
    """
    try:
        content = _load_json(Path(path))
    except PanopticFormatError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, not text, numbers of thousands of digits, deep nesting
        raise PanopticFormatError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise PanopticFormatError(f"{path}: expected an object with `annotations`, got a {type(content).__name__}")
    required = ("annotations",) if predictions else ("images", "annotations", "categories")
    for key in ("images", "annotations", "categories"):
        if key not in content and key in required:
            raise PanopticFormatError(f"{path}: `{key}` is missing; a COCO panoptic JSON has {', '.join(required)}")
        if not isinstance(content.get(key, []), list):
            raise PanopticFormatError(f"{path}: `{key}` must be a list, got {type(content[key]).__name__}")
    image_ids = _unique(path, content, "images", "id")
    category_ids = _unique(path, content, "categories", "id")
    annotated = _unique(path, content, "annotations", "image_id")
    if image_ids is not None and annotated is not None and not annotated <= image_ids:
        missing = sorted(annotated - image_ids, key=str)
        raise PanopticFormatError(f"{path}: annotations of images that `images` does not list: {_some(missing)}")
    for annotation in content["annotations"]:
        _check_annotation(path, annotation, category_ids)
    return content


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
    return zlib.compress(content, 1) if deflate is None else deflate.zlib_compress(content, 1)


def _decode_pillow(content: bytes) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return rgb_to_ids(np.asarray(image))
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
    if width == 0 or height == 0 or width * height > max_pixels:
        raise PanopticFormatError(f"{path}: header claims {width}x{height}; between 1 and {max_pixels} pixels are read")


def _load_json(path: Path) -> Any:
    """Loads a JSON without the garbage collector.

    It would go over the growing tree of dicts again and again and find nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(read_file(path, PanopticFormatError, "JSON"))
    finally:
        if enabled:
            gc.enable()


def _check_annotation(path: str | Path, annotation: dict[str, Any], category_ids: set | None) -> None:
    where = f"{path}: image {annotation['image_id']!r}"
    name = annotation.get("file_name")
    if (
        not isinstance(name, str)
        or not name
        or "\0" in name
        or any("\ud800" <= character <= "\udfff" for character in name)
    ):
        raise PanopticFormatError(f"{where}: `file_name` must name a PNG, got {name!r:.80}")
    segments = annotation.get("segments_info")
    if not isinstance(segments, list):
        raise PanopticFormatError(f"{where}: `segments_info` must be a list, got {segments!r:.80}")
    seen = set()
    for segment in segments:
        segment_id = segment.get("id") if isinstance(segment, dict) else None
        if type(segment_id) is not int or not 1 <= segment_id <= MAX_ID:
            raise PanopticFormatError(f"{where}: a segment id must be an integer in 1..{MAX_ID}, got {segment_id!r}")
        if segment_id in seen:
            raise PanopticFormatError(f"{where}: segment id {segment_id} appears twice in segments_info")
        seen.add(segment_id)
        category_id = segment.get("category_id")
        if type(category_id) is not int or (category_ids is not None and category_id not in category_ids):
            raise PanopticFormatError(f"{where}: segment {segment_id} has unknown category_id {category_id!r}")


def _unique(path: str | Path, content: dict[str, Any], key: str, field: str) -> set | None:
    """Returns the values of `field` over the list `key`, each there once; None where the file has no such list."""
    if key not in content:
        return None
    seen: set = set()
    for index, entry in enumerate(content[key]):
        value = entry.get(field) if isinstance(entry, dict) else None
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise PanopticFormatError(f"{path}: {key}[{index}] has no usable `{field}` (got {value!r})")
        if value in seen:
            raise PanopticFormatError(f"{path}: {key}[{index}]: `{field}` {value!r} appears twice; keep one entry")
        seen.add(value)
    return seen


def _some(values: list, limit: int = 20) -> str:
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more
