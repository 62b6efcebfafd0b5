"""PNG <-> ids and the JSON beside them."""

import errno
import io
import json
import os
import struct
import sys
import tempfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.files import check_output, replacing
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic import format as panoptic_format
from ldmseg_fast.panoptic.format import (
    MAX_ID,
    MAX_SIDE,
    ids_to_rgb,
    load_panoptic_json,
    read_panoptic_png,
    read_run_map,
    rgb_to_ids,
    two_channel_to_ids,
    write_panoptic_png,
)


@pytest.fixture(params=["native", "plain", "plain zlib"])
def implementation(request, monkeypatch):
    """The C++ path, Pillow in its place, and C++ with zlib in place of libdeflate."""
    if request.param == "plain":
        monkeypatch.setattr(panoptic_format, "_C", None)
    elif _C is None:
        pytest.skip("the extension is not built")
    if request.param == "plain zlib":
        monkeypatch.setitem(sys.modules, "deflate", None)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_rgb_round_trip(dtype):
    ids = np.random.default_rng(0).integers(0, min(MAX_ID, np.iinfo(dtype).max) + 1, (7, 5)).astype(dtype)
    rgb = ids_to_rgb(ids)
    assert rgb.dtype == np.uint8
    assert (rgb.astype(int) @ [1, 256, 65536] == ids).all()
    back = rgb_to_ids(rgb)
    assert back.dtype == np.int32
    assert (back == ids).all()


@pytest.mark.parametrize(
    "ids", [np.array([[-1]]), np.array([[2**24]]), np.array([[1.0]]), np.array([1]), np.zeros((0, 4), int)]
)
def test_ids_that_do_not_fit(ids, tmp_path):
    with pytest.raises(PanopticFormatError):
        ids_to_rgb(ids)
    with pytest.raises(PanopticFormatError):
        write_panoptic_png(tmp_path / "x.png", ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (63, 65), (427, 640)], ids=str)
def test_png_round_trip(implementation, tmp_path, shape):
    rng = np.random.default_rng(1)
    blocks = np.kron(rng.integers(0, 2**24, (shape[0] // 9 + 1, shape[1] // 9 + 1)), np.ones((9, 9), int))
    for ids in (blocks[: shape[0], : shape[1]], rng.integers(0, 2**24, shape), np.full(shape, MAX_ID)):
        write_panoptic_png(tmp_path / "x.png", ids)
        assert (rgb_to_ids(np.asarray(Image.open(tmp_path / "x.png"))) == ids).all()
        back = read_panoptic_png(tmp_path / "x.png")
        assert back.dtype == np.int32
        assert (back == ids).all()
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width, height, rows, depth=8, colour=2, interlace=0, parts=1):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = zlib.compress(rows)
    step = -(-len(body) // parts)
    data = b"".join(_chunk(b"IDAT", body[k : k + step]) for k in range(0, len(body), step))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + data + _chunk(b"IEND", b"")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(1, 3))
def test_every_filter_decodes_as_pillow_does(tmp_path_factory, seed, width, height, flat, parts):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 3 if flat else 256, (height, 1 + 3 * width)).astype(np.uint8)
    rows[:, 0] = rng.integers(0, 5, height)
    content = _png(width, height, rows.tobytes(), parts=parts)
    path = tmp_path_factory.getbasetemp() / "filters.png"
    path.write_bytes(content)
    assert (read_panoptic_png(path) == rgb_to_ids(np.asarray(Image.open(io.BytesIO(content))))).all()


def test_interlaced_png(implementation, tmp_path):
    (tmp_path / "x.png").write_bytes(_png(1, 1, b"\0\7\1\0", interlace=1))
    assert read_panoptic_png(tmp_path / "x.png").tolist() == [[7 + 256]]


def _saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_saved(Image.new("P", (4, 4))), "palette PNG"),
        (_saved(Image.new("L", (4, 4))), "8-bit greyscale PNG"),
        (_saved(Image.new("1", (4, 4))), "1-bit greyscale PNG"),
        (_saved(Image.new("RGBA", (4, 4))), "RGBA PNG"),
        (_saved(Image.new("LA", (4, 4))), "greyscale with alpha PNG"),
        (_saved(Image.fromarray(np.zeros((4, 4), np.uint16))), "16-bit greyscale PNG"),
        (_png(4, 4, b"\0" * 100, depth=16), "16-bit RGB PNG"),
        (_png(40000, 40000, b"\0" * 100), "header claims 40000x40000"),
        (_png(0, 4, b""), "header claims 0x4"),
        (b"", "not a PNG file"),
        (b"\xff\xd8\xff" * 20, "not a PNG file"),
        (_png(4, 4, b"\0" * 51), "damaged or truncated"),
        (_png(4, 4, b"\0" * 20), "damaged or truncated"),
        (_saved(Image.new("RGB", (40, 40)))[:-20], "damaged or truncated"),
        (_saved(Image.new("RGB", (40, 40)))[:60], "damaged or truncated"),
    ],
)
def test_pngs_that_hold_no_ids(implementation, tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(PanopticFormatError, match=message) as caught:
        read_panoptic_png(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("rows", [b"\5" + b"\0" * 12, b"\0" * 14])
def test_unknown_filters_and_excess_data(tmp_path, rows):
    if _C is None:
        pytest.skip("the extension is not built")
    (tmp_path / "x.png").write_bytes(_png(4, 1, rows))
    with pytest.raises(PanopticFormatError, match="damaged or truncated"):
        read_panoptic_png(tmp_path / "x.png")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_or_decode_but_never_crash(tmp_path_factory, data):
    ids = np.kron(np.arange(12).reshape(3, 4), np.ones((6, 5), int))
    path = tmp_path_factory.getbasetemp() / "fuzz.png"
    write_panoptic_png(path, ids)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_panoptic_png(path, max_pixels=10_000)
    except PanopticFormatError as error:
        assert str(path) in str(error)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_panoptic_png(tmp_path / "none.png")


def test_json_of_the_real_data(shared):
    for path in (shared / "data").glob("*/annotations/panoptic_*.json"):
        content = load_panoptic_json(path)
        assert len(content["annotations"]) == len(content["images"])


def _valid():
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 1, "width": 1}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 1, "category_id": 1}]}],
        "categories": [{"id": 1, "name": "object", "isthing": 1}],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "`images` is missing"),
        (lambda c: c.pop("categories"), "`categories` is missing"),
        (lambda c: c["categories"].append({"id": 1}), r"categories\[1\]: `id` 1 appears twice"),
        (lambda c: c["images"].append({"id": 1}), r"images\[1\]: `id` 1 appears twice"),
        (lambda c: c["images"].append({"name": 1}), r"images\[1\] has no usable `id`"),
        (lambda c: c["images"].append(5), r"images\[1\] has no usable `id`"),
        (lambda c: c["annotations"].append({"image_id": 9}), "does not list: 9"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=4), "unknown category_id 4"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id="7"), "integer in 1..16777215, got '7'"),
        (lambda c: c["annotations"][0].update(segments_info=None), "`segments_info` must be a list"),
        (lambda c: c["annotations"][0].update(segments_info=[3]), "a segment id must be an integer"),
    ],
)
def test_json_faults(tmp_path, change, message):
    content = _valid()
    change(content)
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PanopticFormatError, match=message) as caught:
        load_panoptic_json(path)
    assert str(path) in str(caught.value)


def test_predictions_need_annotations_alone(tmp_path):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({"annotations": _valid()["annotations"]}))
    assert load_panoptic_json(path, predictions=True)["annotations"]
    with pytest.raises(PanopticFormatError, match="`images` is missing"):
        load_panoptic_json(path)


def test_output_that_cannot_be_written_is_found_out_before(tmp_path, monkeypatch):
    check_output(tmp_path / "new" / "report.json")
    assert (tmp_path / "new").is_dir() and list((tmp_path / "new").iterdir()) == []
    with pytest.raises(OSError, match="is a folder: name a file"):
        check_output(tmp_path)

    def refused(dir):
        raise OSError(errno.EROFS, "Read-only file system", f"{dir}/tmp123")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(OSError, match=r"Read-only file system: .*report\.json"):
        check_output(tmp_path / "report.json")


def test_an_error_while_writing_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / "map.png").write_bytes(b"before")
    with pytest.raises(OSError, match=r"No space left on device: .*map\.png"), replacing(tmp_path / "map.png") as new:
        new.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    assert (tmp_path / "map.png").read_bytes() == b"before"


def test_two_channel_form():
    channels = np.array([[[0, 0, 0], [0, 9, 0], [3, 0, 0], [3, 1, 0], [3, 1, 0]]], np.uint8)
    ids, segments = two_channel_to_ids(channels)
    assert ids.tolist() == [[0, 0, 3, 259, 259]]
    assert [(s["id"], s["category_id"], s["area"]) for s in segments] == [(3, 3, 1), (259, 3, 2)]
    assert (two_channel_to_ids(channels[..., :2])[0] == ids).all()
    with pytest.raises(PanopticFormatError, match="third channel"):
        two_channel_to_ids(channels + np.uint8(1))


def _adam7(ids):
    """The filtered rows of an interlaced file."""
    rgb, rows = ids_to_rgb(ids), b""
    for x, y, across, down in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        part = rgb[y::down, x::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    return rows


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 8), (1100, 1000)], ids=str)
def test_interlaced_maps_are_read_in_bands(implementation, tmp_path, shape):
    ids = np.random.default_rng(2).integers(0, 2**24, shape).astype(np.int32)
    (tmp_path / "x.png").write_bytes(_png(shape[1], shape[0], _adam7(ids), interlace=1))
    np.testing.assert_array_equal(read_panoptic_png(tmp_path / "x.png"), ids)
    if panoptic_format._C is not None:
        np.testing.assert_array_equal(read_run_map(tmp_path / "x.png").ids(), ids)


def test_sides_are_bounded_by_the_header(implementation, tmp_path):
    path = tmp_path / "x.png"
    for width, height in ((1, MAX_SIDE + 1), (MAX_SIDE + 1, 1), (2**26, 1), (1, 2**31)):
        path.write_bytes(_png(width, height, b"\0" * 10))
        with pytest.raises(PanopticFormatError, match=f"header claims {width}x{height}; sides of 1 to {MAX_SIDE}"):
            read_panoptic_png(path)
    for width, height in ((1, MAX_SIDE), (MAX_SIDE, 1)):
        ids = np.arange(MAX_SIDE).reshape(height, width) // 9
        write_panoptic_png(path, ids)
        np.testing.assert_array_equal(read_panoptic_png(path), ids)
    assert _C is None or _C.LONGEST_SIDE == MAX_SIDE


def test_pillow_gets_no_larger_picture_than_it_may_hold(implementation, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(_png(8000, 8000, b"\0" * 10, interlace=1))
    with pytest.raises(PanopticFormatError, match="8000x8000 is over 48000000 pixels for Pillow"):
        read_panoptic_png(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        with pytest.raises(PanopticFormatError, match=r"(a folder|a named pipe|a device), not a readable PNG file"):
            read_panoptic_png(name)
    if _C is not None:
        with pytest.raises(_C.UnreadablePng):
            _C.match_files(
                os.fsencode(tmp_path / "pipe.png"),
                np.empty((0, 4), np.int64),
                b"",
                np.empty((0, 4), np.int64),
                False,
                9,
            )
        with pytest.raises(_C.UnusualJson):
            _C.AnnotationIndex(os.fsencode(tmp_path / "pipe.png"), False)


def test_chunks_that_claim_much(implementation, tmp_path):
    """Lengths of gigabytes, texts that inflate to megabytes, thousands of small chunks: an error, or the map."""
    path, ids = tmp_path / "x.png", np.arange(12).reshape(3, 4)
    rows = b"".join(b"\0" + row.tobytes() for row in ids_to_rgb(ids))
    plain = _png(4, 3, rows)
    head, tail = plain[:33], plain[33:]
    for kind in (b"tEXt", b"IDAT", b"prVt", b"iCCP"):
        path.write_bytes(head + struct.pack(">I4s", 2**31 - 1, kind) + tail)
        with pytest.raises(PanopticFormatError, match=r"x\.png: damaged or truncated"):
            read_panoptic_png(path)
    stream = zlib.compress(rows)
    body = b"".join(_chunk(b"IDAT", stream[k : k + 1]) + _chunk(b"IDAT", b"") for k in range(len(stream)))
    path.write_bytes(head + body + _chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_panoptic_png(path), ids)
    path.write_bytes(head + _chunk(b"IDAT", zlib.compress(rows + bytes(2**24), 9)) + _chunk(b"IEND", b""))
    if _C is not None and panoptic_format._C is not None:
        with pytest.raises(PanopticFormatError, match="not of the size"):
            read_panoptic_png(path)


@pytest.mark.parametrize("ids", [None, [[1, 2]], "map.png"])
def test_what_is_no_array(tmp_path, ids):
    with pytest.raises(PanopticFormatError, match=f"expected an array of integer ids .*, got {type(ids).__name__}"):
        write_panoptic_png(tmp_path / "map.png", ids)
