"""Damaged PNGs and JSONs: always a named error or the same as the Python readers, never a crash."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic import annotations
from ldmseg_fast.panoptic.format import MAX_PIXELS, ids_to_rgb, read_panoptic_png, rgb_to_ids

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")

CONTENT = {
    "info": {"year": 2026, "deep": [[[{"a": [1.5e-3, -0.0, True, None]}]]], "text": 'q"\\/\u00e9\n'},
    "images": [{"id": k, "file_name": f"{k}.jpg", "height": 4, "width": 5} for k in range(4)],
    "annotations": [
        {
            "segments_info": [
                {"id": 10 * k + j, "category_id": j, "iscrowd": j % 2, "area": 3 * j, "bbox": [0, 1, 2.5, 3]}
                for j in range(1, 4)
            ],
            "file_name": f"{k}.png",
            "image_id": k,
        }
        for k in range(4)
    ],
    "categories": [{"id": j, "name": f"c{j}", "isthing": 1} for j in range(1, 4)],
}
TEXT = json.dumps(CONTENT).encode()
SNIPPETS = [
    b"[" * 200,
    b'{"a":' * 40,
    b"NaN",
    b"Infinity",
    b"1e999",
    b"9" * 5000,
    b"-0",
    b"01",
    b"\xef\xbb\xbf",
    b"\\ud800",
]
SNIPPETS += [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"]",
    b",",
    b":",
    b"null",
    b"true",
    b"\0",
    b"\xff",
    b"\xc3\xa9",
    b" \n",
    b"1.0",
    b"-",
]


def _damaged(rng: np.random.Generator, content: bytes, snippets: list[bytes]) -> bytes:
    """Some flipped bytes, a cut, a snippet put in, or a stretch repeated or left out."""
    data, kind = bytearray(content), int(rng.integers(0, 5))
    if kind == 0:
        for at in rng.integers(0, len(data), int(rng.integers(1, 4))):
            data[at] ^= int(rng.integers(1, 256))
        return bytes(data)
    first, last = sorted(int(at) for at in rng.integers(0, len(data), 2))
    if kind == 1:
        return bytes(data[:last])
    if kind == 2:
        return bytes(
            data[:first] + snippets[int(rng.integers(len(snippets)))] + data[first + int(rng.integers(0, 3)) :]
        )
    last = min(last, first + 40)
    return bytes(data[:first] + data[last:] if kind == 3 else data[:last] + data[first:])


def _listed(path, predictions):
    """All that an index tells, or the error in words."""
    try:
        index = index_annotations(path, predictions=predictions)
        entries = [index.annotation(k) for k in range(len(index.image_ids))]
    except PanopticFormatError as error:
        return str(error)
    return index.image_ids, index.categories, index.used_categories, [(name, table.tolist()) for name, table in entries]


@pytest.mark.parametrize("predictions", [False, True])
def test_json_reads_as_python_reads_it(tmp_path, monkeypatch, predictions):
    rng, path, streamed = np.random.default_rng(5), tmp_path / "x.json", 0
    for trial in range(1500):
        path.write_bytes(_damaged(rng, TEXT, SNIPPETS) if trial else TEXT)
        found = _listed(path, predictions)
        with monkeypatch.context() as patch:
            patch.setattr(annotations, "_C", None)
            assert _listed(path, predictions) == found, path.read_bytes()
        try:
            _C.AnnotationIndex(os.fsencode(path), predictions)
            streamed += 1
        except _C.UnusualJson:
            pass
    assert 50 < streamed < 1450  # both readers had something to do


@pytest.mark.parametrize(
    "text", [b"", b"[" * 200_000, b'{"annotations":' * 100_000, b'{"annotations":[' + b"9" * 10**6]
)
def test_hostile_json_is_a_named_error(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(PanopticFormatError, match=r"x\.json"):
        index_annotations(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"{", b"\xef\xbb\xbf{"),
        (b'"0.png"', b'"\\u0030.png"'),
        (b'"iscrowd": 0', b'"iscrowd": false'),
        (b'"area": 3,', b""),
        (b'"image_id": 0', b'"image_id": "0"'),
        (b'"name": "c1"', b'"name": "caf\xc3\xa9"'),
    ],
)
def test_legal_rarities_are_read(tmp_path, monkeypatch, old, new):
    path = tmp_path / "x.json"
    text = TEXT.replace(b'"id": 0', b'"id": "0"', 1) if b"image_id" in new else TEXT
    path.write_bytes(text.replace(old, new, 1))
    found = _listed(path, False)
    assert not isinstance(found, str)
    monkeypatch.setattr(annotations, "_C", None)
    assert _listed(path, False) == found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"area": 3', b'"area": 99999999999999999999', "image 0: segment 1: `area` must be"),
        (b'"area": 3', b'"area": 3.7', "image 0: segment 1: `area` must be a whole number"),
        (b'"iscrowd": 1', b'"iscrowd": "yes"', "image 0: segment 1: `iscrowd` must be 0 or 1"),
        (b'"year": 2026', b'"year": NaN', "NaN"),
        (b'"segments_info"', b'"segments_info": 5, "segments_info"', "segments_info"),
        (b'"0.png"', b'"a\\u0000b"', "`file_name` must name a PNG"),
        (b'"0.png"', b'"\\ud800"', "`file_name` must name a PNG"),
    ],
)
def test_values_that_fit_nothing_are_named(tmp_path, old, new, message):
    path = tmp_path / "x.json"
    path.write_bytes(TEXT.replace(old, new, 1))
    with pytest.raises(PanopticFormatError, match=message):
        index_annotations(path).annotation(0)


def test_a_file_that_changes_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(TEXT)
    index = index_annotations(path)
    with path.open("r+b") as file:
        file.truncate(40)
    with pytest.raises(PanopticFormatError, match="changed while it was being read"):
        index.annotation(3)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, stream: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")


def _map(rng: np.random.Generator) -> np.ndarray:
    height, width = (int(side) for side in rng.integers(1, 90, 2))
    block = int(rng.integers(1, 20))
    ids = rng.integers(0, 2**24, (height // block + 1, width // block + 1))
    return np.kron(ids, np.ones((block, block), int))[:height, :width].astype(np.int32)


def test_damaged_pngs_are_errors_or_whole(tmp_path):
    rng, path, errors = np.random.default_rng(6), tmp_path / "x.png", 0
    for _ in range(600):
        ids, buffer = _map(rng), io.BytesIO()
        Image.fromarray(ids_to_rgb(ids)).save(buffer, format="PNG", compress_level=int(rng.integers(0, 10)))
        path.write_bytes(_damaged(rng, buffer.getvalue(), [b"IDAT", b"\0\0\0\0", b"IEND"]))
        try:
            found = read_panoptic_png(path)
        except PanopticFormatError as error:
            assert str(path) in str(error)
            errors += 1
        else:
            np.testing.assert_array_equal(found, ids)
    assert 300 < errors < 600


def _deflated(rng: np.random.Generator, rows: bytes) -> bytes:
    strategy = [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY, zlib.Z_FILTERED]
    level, window = int(rng.integers(0, 10)), int(rng.integers(9, 16))
    stream = zlib.compressobj(level, zlib.DEFLATED, window, int(rng.integers(1, 10)), strategy[int(rng.integers(5))])
    middle = int(rng.integers(0, len(rows) + 1))
    flush = [zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH][int(rng.integers(3))]
    return stream.compress(rows[:middle]) + stream.flush(flush) + stream.compress(rows[middle:]) + stream.flush()


def _inflates_as_zlib(rng: np.random.Generator, trial: int) -> bool:
    """Whether a stream of any kind of block, every other one damaged under a right checksum, is read; or it fails.

    Rows are inflated in pieces of any size, so that a stream pauses wherever it can.
    """
    tall, wide = (300, 200) if trial % 50 == 0 else (60, 60)  # some are larger than what is looked back at
    height, width = int(rng.integers(1, tall)), int(rng.integers(1, wide))
    symbols = int(rng.choice([1, 2, 5, 256]))
    rows = rng.integers(0, symbols, (height, 1 + 3 * width)).astype(np.uint8)
    if trial % 3 == 0:
        rows = np.repeat(rows[:, :1], 1 + 3 * width, axis=1)
    rows[:, 0] = rng.integers(0, 5, height)
    stream = _deflated(rng, rows.tobytes())
    if trial % 2:
        stream = stream[:2] + _damaged(rng, stream[2:], [b"\0", b"\xff", b"\5\0\xfa\xff"])
    try:
        reference = zlib.decompressobj(-15)
        expected = reference.decompress(stream[2:], rows.size + 1)
        whole = (
            reference.eof
            and len(expected) == rows.size
            and all(expected[:: 1 + 3 * width][k] < 5 for k in range(height))
        )
    except zlib.error:
        whole = False
    piece = int(rng.integers(1, 4000))
    results = []
    for read in (_C.read_png_ids, lambda *arguments: _C.read_png(*arguments).ids(), _C.read_png_picture):
        pieces = () if read is _C.read_png_picture else (piece,)
        try:
            results.append(read(_png(width, height, stream), MAX_PIXELS, *pieces))
        except _C.UnreadablePng:
            assert not whole
    assert len(results) == (3 if whole else 0)
    if whole:
        picture = np.asarray(Image.open(io.BytesIO(_png(width, height, zlib.compress(expected, 1)))))
        for found, wanted in zip(results, (rgb_to_ids(picture), rgb_to_ids(picture), picture)):
            np.testing.assert_array_equal(found, wanted)
    return whole


def test_streams_inflate_as_zlib_inflates_them():
    rng = np.random.default_rng(7)
    refused = sum(not _inflates_as_zlib(rng, trial) for trial in range(1500))
    assert 300 < refused < 750


@pytest.mark.soak
def test_many_streams_inflate_as_zlib_inflates_them(record_property):
    seed, streams = int.from_bytes(os.urandom(4)), 100_000
    record_property("seed", seed)
    rng = np.random.default_rng(seed)
    refused = sum(not _inflates_as_zlib(rng, trial) for trial in range(streams))
    record_property("streams", streams)
    record_property("refused as zlib refuses them", refused)


def test_a_map_larger_than_a_piece():
    rng = np.random.default_rng(8)
    for block, level in ((1, 1), (40, 6), (7, 9), (40, 0)):
        ids = np.kron(rng.integers(0, 2**24, (1400 // block + 1, 1300 // block + 1)), np.ones((block, block), int))
        ids, buffer = ids[:1400, :1300].astype(np.int32), io.BytesIO()
        Image.fromarray(ids_to_rgb(ids)).save(buffer, format="PNG", compress_level=level)
        np.testing.assert_array_equal(_C.read_png_ids(buffer.getvalue(), MAX_PIXELS), ids)
        np.testing.assert_array_equal(_C.read_png(buffer.getvalue(), MAX_PIXELS).ids(), ids)
        for cut in (b"", b"\0" * 1000):  # a stream that ends too early, or goes on
            rows = b"".join(b"\0" + row.tobytes() for row in ids_to_rgb(ids))
            stream = zlib.compress(rows + cut if cut else rows[:-1], level)
            for read in (_C.read_png_ids, _C.read_png):
                with pytest.raises(_C.UnreadablePng, match="not of the size"):
                    read(_png(1300, 1400, stream), MAX_PIXELS)


def _any_png(rng: np.random.Generator) -> tuple[bytes, bytes]:
    """A PNG as some program would write it, and the same, or what is left of it after some damage."""
    kind, buffer = int(rng.integers(0, 4)), io.BytesIO()
    rgb = ids_to_rgb(_map(rng))
    if kind < 2:
        if kind == 1:
            rgb = rng.integers(0, 256, rgb.shape).astype(np.uint8)
        mode = str(rng.choice(["RGB", "RGB", "RGB", "RGB", "L", "P", "RGBA", "LA", "1", "I;16"]))
        picture = (
            Image.fromarray(rgb[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(rgb).convert(mode)
        )
        picture.save(buffer, format="PNG", compress_level=int(rng.integers(0, 10)), optimize=bool(rng.integers(0, 2)))
        content = buffer.getvalue()
    else:
        height, width = rgb.shape[:2]
        rows = np.concatenate([rng.integers(0, 5, (height, 1)), rgb.reshape(height, -1)], axis=1).astype(np.uint8)
        whole = _deflated(rng, rows.tobytes())
        cuts = sorted(int(cut) for cut in rng.integers(0, len(whole) + 1, int(rng.integers(0, 6))))
        parts = [whole[first:last] for first, last in zip([0, *cuts], [*cuts, len(whole)])]
        extra = [_chunk(b"tEXt", b"a\0b"), _chunk(b"gAMA", struct.pack(">I", 220000)), _chunk(b"prVt", bytes(40))]
        rng.shuffle(extra)
        header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        body = b"".join(_chunk(b"IDAT", part) for part in parts)
        content = b"\x89PNG\r\n\x1a\n" + header + b"".join(extra[: kind - 1]) + body + _chunk(b"IEND", b"")
    return content, _damaged(rng, content, [b"IDAT", b"\0\0\0\0", b"IEND"]) if rng.integers(0, 2) else content


def _reads_as_pillow(path, whole: bytes, content: bytes) -> bool:
    """Whether a file is read, and then with Pillow's pixels of the whole one; only damaged ones and no maps are not."""
    path.write_bytes(content)
    try:
        ids = read_panoptic_png(path)
    except PanopticFormatError as error:
        assert str(path) in str(error)
        assert content != whole or content[24:26] != b"\x08\2"
        return False
    with Image.open(io.BytesIO(whole)) as picture:
        np.testing.assert_array_equal(ids, rgb_to_ids(np.asarray(picture)))
    return True


def test_pngs_read_as_pillow_reads_them(tmp_path):
    rng = np.random.default_rng(9)
    read = sum(_reads_as_pillow(tmp_path / "x.png", *_any_png(rng)) for _ in range(300))
    assert 60 < read < 280


@pytest.mark.soak
def test_many_pngs_read_as_pillow_reads_them(tmp_path, record_property):
    seed, files = int.from_bytes(os.urandom(4)), 20_000
    record_property("seed", seed)
    rng = np.random.default_rng(seed)
    read = sum(_reads_as_pillow(tmp_path / "x.png", *_any_png(rng)) for _ in range(files))
    record_property("files", files)
    record_property("read as Pillow reads them", read)
