"""PNG pictures: the pixels that Pillow gives, whatever the filters and sizes; damage is an error."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_PIXELS

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")

RGB, GREY = 2, 0
CHANNELS = {RGB: 3, GREY: 1}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, colour: int, rows: bytes, before: bytes = b"", level: int = 1) -> bytes:
    """A file of filtered rows; `before` stands between header and pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows, level))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + chunk(b"IEND", b"")


def filtered(rng: np.random.Generator, width: int, height: int, colour: int, filters: tuple = (0, 1, 2, 3, 4)) -> bytes:
    """Random rows under random filters; small, large or any differences, so that predictions go over every edge."""
    rows = rng.integers(0, 256, (height, 1 + CHANNELS[colour] * width))
    kind = rng.integers(0, 3)
    if kind == 1:
        rows = rows % 3 - 1
    elif kind == 2:
        rows = rng.choice([0, 1, 127, 128, 254, 255], rows.shape)
    rows = (rows % 256).astype(np.uint8)
    rows[:, 0] = rng.choice(filters, height)
    return rows.tobytes()


def by_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


def reads_as_pillow(content: bytes) -> bool:
    """Whether the pixels are Pillow's, in an array that can be written to."""
    found = _C.read_png_picture(content, MAX_PIXELS)
    usable = found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    return usable and np.array_equal(found, by_pillow(content))


@pytest.mark.parametrize("colour", [RGB, GREY])
def test_every_width_under_mixed_filters(colour: int) -> None:
    rng = np.random.default_rng(colour)
    for width in range(1, 68):
        for height in (1, 2, 3, 4, 5, 7, 8, 13):
            assert reads_as_pillow(png(width, height, colour, filtered(rng, width, height, colour)))


@pytest.mark.parametrize("colour", [RGB, GREY])
@pytest.mark.parametrize("filter_type", range(5))
def test_every_filter_in_every_row(colour: int, filter_type: int) -> None:
    rng = np.random.default_rng(filter_type)
    for width, height in ((1, 9), (2, 4), (3, 5), (5, 6), (17, 11), (64, 12), (250, 30)):
        assert reads_as_pillow(png(width, height, colour, filtered(rng, width, height, colour, (filter_type,))))


@pytest.mark.parametrize("level", range(10))
def test_files_of_pillow(level: int) -> None:
    rng = np.random.default_rng(level)
    for mode in ("RGB", "L"):
        smooth = np.add.outer(np.arange(70), np.arange(83))[..., None] * np.array([1, 2, 3]) + rng.integers(
            0, 9, (70, 83, 3)
        )
        buffer = io.BytesIO()
        Image.fromarray(smooth.astype(np.uint8)).convert(mode).save(buffer, format="PNG", compress_level=level)
        assert reads_as_pillow(buffer.getvalue())


@pytest.mark.parametrize("colour", [RGB, GREY])
@pytest.mark.parametrize(
    "before",
    [
        chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"sRGB", b"\0"),
        chunk(b"gAMA", struct.pack(">I", 220000)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"no real profile")),
        chunk(
            b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        ),  # to be rotated by 90 degrees
        chunk(b"sBIT", b"\5\5\5"),
        chunk(b"bKGD", b"\0\1\0\2\0\3"),
        chunk(b"pHYs", struct.pack(">IIB", 100, 300, 1)),
        chunk(b"tEXt", b"Comment\0of no concern"),
        chunk(b"prVt", b"of somebody else"),
    ],
    ids=lambda before: before[4:8].decode(),
)
def test_what_stands_beside_the_pixels_does_not_change_them(colour: int, before: bytes) -> None:
    rng = np.random.default_rng(3)
    assert reads_as_pillow(png(9, 6, colour, filtered(rng, 9, 6, colour), before))


def test_a_transparent_colour_is_an_ordinary_one() -> None:
    rows = b"".join(bytes([0]) + bytes([10, 20, 30, 200, 100, 50]) for _ in range(4))
    assert reads_as_pillow(png(2, 4, RGB, rows, chunk(b"tRNS", struct.pack(">HHH", 10, 20, 30))))
    assert reads_as_pillow(png(6, 4, GREY, rows, chunk(b"tRNS", struct.pack(">H", 10))))


def test_the_first_picture_of_an_animation() -> None:
    frames = [Image.fromarray(np.full((5, 7, 3), value, np.uint8)) for value in (10, 90, 200)]
    for default in (False, True):
        buffer = io.BytesIO()
        frames[0].save(buffer, format="PNG", save_all=True, append_images=frames[1:], default_image=default)
        assert reads_as_pillow(buffer.getvalue())


def test_pixels_in_many_chunks() -> None:
    rng = np.random.default_rng(4)
    stream = zlib.compress(filtered(rng, 40, 30, RGB))
    parts = b"".join(chunk(b"IDAT", stream[at : at + 100]) for at in range(0, len(stream), 100))
    whole = png(40, 30, RGB, b"")
    head, tail = whole[: whole.index(b"IDAT") - 4], chunk(b"IEND", b"")
    assert reads_as_pillow(head + chunk(b"IDAT", b"") + parts + tail)


@pytest.mark.parametrize(
    "save",
    [
        lambda image, file: image.convert("RGBA").save(file, format="PNG"),
        lambda image, file: image.convert("LA").save(file, format="PNG"),
        lambda image, file: image.convert("P").save(file, format="PNG"),
        lambda image, file: image.convert("1").save(file, format="PNG"),
        lambda image, file: Image.fromarray(np.zeros((9, 8), np.uint16)).save(file, format="PNG"),
        lambda image, file: image.save(file, format="JPEG"),
    ],
    ids=["rgba", "grey with alpha", "palette", "one bit", "16 bits", "jpeg"],
)
def test_other_formats_are_refused(save: Callable) -> None:
    buffer = io.BytesIO()
    save(Image.fromarray(np.zeros((9, 8, 3), np.uint8)), buffer)
    with pytest.raises(_C.UnreadablePng, match="not a"):
        _C.read_png_picture(buffer.getvalue(), MAX_PIXELS)


def test_interlaced_and_oversized_files_are_refused() -> None:
    content = bytearray(png(8, 8, RGB, bytes(8 * 25)))
    with pytest.raises(_C.UnreadablePng, match="out of bounds"):
        _C.read_png_picture(bytes(content), 63)
    content[28] = 1
    with pytest.raises(_C.UnreadablePng, match="not an 8-bit"):
        _C.read_png_picture(bytes(content), MAX_PIXELS)


@pytest.mark.parametrize("colour", [RGB, GREY])
def test_an_unknown_filter_is_refused(colour: int) -> None:
    rows = np.zeros((7, 1 + 5 * CHANNELS[colour]), np.uint8)
    for row in range(7):
        rows[:, 0] = 0
        rows[row, 0] = 5
        with pytest.raises(_C.UnreadablePng, match="filter"):
            _C.read_png_picture(png(5, 7, colour, rows.tobytes()), MAX_PIXELS)


def test_every_cut_is_an_error() -> None:
    rng = np.random.default_rng(5)
    content = png(21, 10, RGB, filtered(rng, 21, 10, RGB))
    for length in range(len(content)):
        with pytest.raises(_C.UnreadablePng):
            _C.read_png_picture(content[:length], MAX_PIXELS)


def test_every_flipped_bit_is_an_error_or_does_not_matter() -> None:
    rng = np.random.default_rng(6)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words")
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (6, 9, 3)).astype(np.uint8)).save(buffer, format="PNG", pnginfo=text)
    content, expected = buffer.getvalue(), by_pillow(buffer.getvalue())
    harmless = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = _C.read_png_picture(bytes(damaged), MAX_PIXELS)
        except _C.UnreadablePng:
            continue
        np.testing.assert_array_equal(found, expected)
        harmless += 1
    assert harmless < 8 * 40  # within the comment, and the checksum at the very end


def test_damaged_streams_under_right_checksums() -> None:
    """Always the pixels that zlib's bytes mean, or an error."""
    rng, refused = np.random.default_rng(7), 0
    for _ in range(1500):
        width, height = (int(side) for side in rng.integers(1, 40, 2))
        colour = int(rng.choice([RGB, GREY]))
        stream = bytearray(zlib.compress(filtered(rng, width, height, colour), int(rng.integers(0, 10))))
        for at in rng.integers(2, len(stream), int(rng.integers(0, 3))):
            stream[at] ^= int(rng.integers(1, 256))
        whole = png(width, height, colour, b"")
        head, tail = whole[: whole.index(b"IDAT") - 4], chunk(b"IEND", b"")
        try:
            found = _C.read_png_picture(head + chunk(b"IDAT", bytes(stream)) + tail, MAX_PIXELS)
        except _C.UnreadablePng:
            refused += 1
            continue
        rows = zlib.decompressobj(-15).decompress(bytes(stream[2:]))
        np.testing.assert_array_equal(found, by_pillow(png(width, height, colour, rows)))
    assert 300 < refused < 1200
