"""Depth and modes of pictures: what has a defined range is scaled exactly, the rest is refused by name."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.data import pixel_formats
from ldmseg_fast.data.masks import read_mask
from ldmseg_fast.data.pictures import read_image, read_picture, rgb_of_image
from ldmseg_fast.errors import DataError


def samples(channels: int, height: int = 21, width: int = 13) -> np.ndarray:
    """16-bit values, uint16 [H, W, C], the ends of the range among them."""
    values = np.random.default_rng(channels).integers(0, 65536, (height, width, channels)).astype(np.uint16)
    values[0, :5] = np.array([0, 65535, 128, 129, 65407])[:, None]
    return values


def exact(values: np.ndarray) -> np.ndarray:
    return np.rint(values * (255 / 65535)).astype(np.uint8)


def png(values: np.ndarray, interlaced: bool = False) -> bytes:
    """A 16-bit PNG of uint16 [H, W, C]."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    adam7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [values[top::down, left::right] for top, left, down, right in adam7] if interlaced else [values]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in passes if part.size for row in part)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, interlaced)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def tiff(
    values: np.ndarray,
    order: str = "<",
    *,
    photometric: int | None = None,
    extra: int | None = None,
    deflate: bool = False,
    planar: bool = False,
    bits: int = 16,
    orientation: int = 1,
) -> bytes:
    """A TIFF of one strip a plane, of uint16 or uint8 [H, W, C]."""
    height, width, channels = values.shape
    planes = [values[..., c] for c in range(channels)] if planar else [values]
    strips = [plane.astype(f"{order}u{values.itemsize}").tobytes() for plane in planes]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    offsets = [8 + sum(map(len, strips[:number])) for number in range(len(strips))]
    photometric = (1 if channels == 1 else 2) if photometric is None else photometric
    tags: list[tuple[int, str, list[int]]] = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [bits] * channels),
        (259, "H", [8 if deflate else 1]),
        (262, "H", [photometric]),
        (273, "I", offsets),
        (274, "H", [orientation]),
        (277, "H", [channels]),
        (278, "I", [height]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planar else 1]),
    ]
    if extra is not None:
        tags.append((338, "H", [extra]))
    body = b"".join(strips)
    place = 8 + len(body) + 2 + 12 * len(tags) + 4
    directory, beyond = struct.pack(order + "H", len(tags)), b""
    for number, kind, numbers in tags:
        raw = struct.pack(order + kind * len(numbers), *numbers)
        directory += struct.pack(order + "HHI", number, {"H": 3, "I": 4}[kind], len(numbers))
        if len(raw) > 4:
            directory += struct.pack(order + "I", place + len(beyond))
            beyond += raw
        else:
            directory += raw.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(body))
    return head + body + directory + b"\0\0\0\0" + beyond


def colours(values: np.ndarray) -> np.ndarray:
    """What RGB [H, W, 3] is to be read of grey, grey with alpha, RGB and RGBA."""
    scaled = exact(values)
    return scaled[..., :3] if values.shape[2] > 2 else np.repeat(scaled[..., :1], 3, axis=2)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits(channels: int, interlaced: bool, tmp_path: Path) -> None:
    path, values = tmp_path / "deep.png", samples(channels)
    path.write_bytes(png(values, interlaced))
    np.testing.assert_array_equal(read_image(path), colours(values))
    np.testing.assert_array_equal(np.array(read_picture(path).pixels), colours(values))


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("channels", "extra"), [(1, None), (3, None), (4, 0), (4, 2)])
def test_tiff_of_16_bits(channels: int, extra: int | None, order: str, deflate: bool, tmp_path: Path) -> None:
    path, values = tmp_path / "deep.tif", samples(channels)
    path.write_bytes(tiff(values, order, extra=extra, deflate=deflate))
    np.testing.assert_array_equal(read_image(path), colours(values))


def test_tiff_whose_white_is_zero(tmp_path: Path) -> None:
    path, values = tmp_path / "deep.tif", samples(1)
    path.write_bytes(tiff(values, photometric=0))
    np.testing.assert_array_equal(read_image(path), 255 - colours(values))


def test_cmyk_of_16_bits(tmp_path: Path) -> None:
    path, values = tmp_path / "deep.tif", samples(4)
    path.write_bytes(tiff(values, photometric=5))
    scaled = exact(values)
    cmyk = Image.frombytes("CMYK", scaled.shape[1::-1], scaled.tobytes())
    np.testing.assert_array_equal(read_image(path), np.array(cmyk.convert("RGB")))


@pytest.mark.parametrize("options", [{"extra": 1}, {"planar": True}, {"planar": True, "deflate": True}], ids=str)
def test_tiffs_that_cannot_be_read_exactly(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff(samples(4 if "extra" in options else 3), **options))
    with pytest.raises(DataError, match=r"deep\.tif"):
        read_image(path)


def test_pgm_of_16_bits_and_of_10(tmp_path: Path) -> None:
    path, values = tmp_path / "deep.pgm", samples(1)
    path.write_bytes(b"P5 13 21 65535\n" + values.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(path), colours(values))
    ten = values // 64
    path.write_bytes(b"P5 13 21 1023\n" + ten.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(path)[..., 0], np.rint(ten[..., 0] * (255 / 1023)))


def test_jpeg_2000_of_16_bits(tmp_path: Path) -> None:
    path, values = tmp_path / "deep.jp2", samples(1)
    Image.fromarray(values[..., 0]).save(path)
    np.testing.assert_array_equal(read_image(path), colours(values))


def test_jpeg_2000_of_more_than_16_bits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.jp2"
    Image.fromarray(samples(1)[..., 0]).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 23  # 24 bits
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"deep\.jp2: "):
        read_image(path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "numbers.tif"
    Image.fromarray(np.ones((4, 4), dtype)).save(path)
    with pytest.raises(DataError, match=r"numbers\.tif: pixel format [IF] of a TIFF file.*no defined range"):
        read_image(path)


def test_16_bit_sgi_is_refused(tmp_path: Path) -> None:
    head = struct.pack(">HBBHHHH", 474, 0, 2, 3, 4, 4, 3)
    (tmp_path / "deep.sgi").write_bytes(head.ljust(512, b"\0") + bytes(2 * 4 * 4 * 3))
    with pytest.raises(DataError, match=r"deep\.sgi: SGI of more than 8 bits"):
        read_image(tmp_path / "deep.sgi")


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, kind) for mode in ("1", "L", "LA", "P", "RGB", "RGBA") for kind in ("PNG", "TIFF")),
        *((mode, "TIFF") for mode in ("CMYK", "YCbCr", "LAB")),
    ],
)
def test_every_mode_of_8_bits(mode: str, kind: str, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    image = Image.fromarray(numbers)
    if mode == "LAB":
        image = Image.frombytes("LAB", (8, 9), numbers.tobytes())
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind)
    (tmp_path / "picture").write_bytes(buffer.getvalue())
    with Image.open(buffer) as opened:
        try:
            expected = np.array(opened.convert("RGB"))
        except OSError:  # Pillow 12 cannot read the YCbCr that it writes
            with pytest.raises(DataError, match="not a readable picture"):
                read_image(tmp_path / "picture")
            return
    np.testing.assert_array_equal(read_image(tmp_path / "picture"), expected)


def test_transparency_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    image = Image.new("RGB", (4, 4), (255, 0, 0)).convert("P")
    image.save(path, transparency=int(np.array(image)[0, 0]))
    assert (read_image(path) == [255, 0, 0]).all()


def read_opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return rgb_of_image(image, str(path))


@pytest.mark.parametrize("read", [read_image, read_picture, read_opened, read_mask])
def test_a_fault_of_ours_is_not_called_a_damaged_picture(
    read: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png(samples(3)))
    monkeypatch.setattr(pixel_formats, "_OTHER_ORDER", {})
    with pytest.raises(KeyError):
        read(path)


@pytest.mark.parametrize("read", [read_image, read_picture, read_opened, read_mask])
@pytest.mark.parametrize("channels", [2, 3])
def test_a_cut_picture_of_16_bits_is_named(read: Callable, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png(samples(channels))[:400])
    with pytest.raises(DataError, match=r"deep\.png: not a readable picture"):
        read(path)
