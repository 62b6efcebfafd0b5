"""Masks of every kind that programs write: the values decide, and what decides nothing is refused by name."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.data.masks import read_mask
from ldmseg_fast.errors import DataError
from tests.data.test_pixel_formats import png, tiff

KNOWN = np.indices((12, 10)).sum(0) % 5 < 3
KNOWN[:, 8:] = False


def image(values: np.ndarray, mode: str | None = None) -> Image.Image:
    return Image.fromarray(values) if mode is None else Image.frombytes(mode, values.shape[1::-1], values.tobytes())


def two(low: int, high: int, dtype: type = np.uint8) -> np.ndarray:
    return np.where(KNOWN, high, low).astype(dtype)


def palette(indices: np.ndarray, colours: list[int]) -> Image.Image:
    made = Image.frombytes("P", indices.shape[1::-1], indices.astype(np.uint8).tobytes())
    made.putpalette(colours + [0] * (768 - len(colours)))
    return made


def channels(*planes: np.ndarray) -> np.ndarray:
    return np.stack(planes, -1).astype(np.uint8)


NOISE = np.random.default_rng(0).integers(0, 256, (12, 10))
GOOD = {
    "0 and 1": image(two(0, 1)),
    "0 and 255": image(two(0, 255)),
    "1 and 2": image(two(1, 2)),
    "10 and 245": image(two(10, 245)),
    "one bit": image(two(0, 255)).convert("1"),
    "grey as RGB": image(two(0, 1)).convert("RGB"),
    "red": image(channels(two(0, 128), two(0, 0), two(0, 0))),
    "palette 0 and 1": palette(KNOWN, [0, 0, 0, 128, 0, 0]),
    "palette turned round": palette(~KNOWN, [255, 255, 255, 0, 0, 0]),
    "16 bits": image(two(0, 65535, np.uint16)),
    "16 bits, 0 and 1": image(two(0, 1, np.uint16)),
    "alpha": image(channels(two(0, 0), two(0, 0), two(0, 0), two(0, 255))),
    "alpha of a photograph": image(channels(NOISE, NOISE[::-1], NOISE.T.reshape(12, 10), two(0, 255))),
    "alpha 0 and 1": image(channels(NOISE, NOISE, NOISE, two(0, 1))),
    "white where it is opaque": image(channels(*[two(0, 255)] * 4)),
    "grey with alpha": image(channels(two(7, 7), two(0, 255)), "LA"),
    "opaque alpha": image(channels(*[two(0, 255)] * 3, two(255, 255))),
}


@pytest.mark.parametrize("name", GOOD)
def test_masks_that_decide(name: str, tmp_path: Path) -> None:
    GOOD[name].save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), KNOWN)


@pytest.mark.parametrize("count", [3, 4])
def test_16_bit_colours_whose_upper_bytes_are_equal(count: int, tmp_path: Path) -> None:
    values = np.stack([two(0, 1, np.uint16)] * count, -1)
    for content in (png(values), tiff(values)):
        (tmp_path / "mask").write_bytes(content)
        np.testing.assert_array_equal(read_mask(tmp_path / "mask"), KNOWN)


@pytest.mark.parametrize("values", [two(0, 1, np.float32), two(0, 1, np.int32)], ids=["F", "I"])
def test_numbers_without_a_range_decide_as_well(values: np.ndarray, tmp_path: Path) -> None:
    image(values).save(tmp_path / "mask.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), KNOWN)


def test_a_transparent_palette(tmp_path: Path) -> None:
    palette(KNOWN, [9, 9, 9, 9, 9, 9]).save(tmp_path / "mask.png", transparency=0)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), KNOWN)


def test_a_turned_mask(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    for name in ("mask.png", "mask.webp"):
        GOOD["0 and 255"].convert("RGB").save(
            tmp_path / name, exif=tags, **({"lossless": True} if "webp" in name else {})
        )
        np.testing.assert_array_equal(read_mask(tmp_path / name), np.rot90(KNOWN, -1))
        np.testing.assert_array_equal(read_mask(tmp_path / name, exif=False), KNOWN)
    (tmp_path / "mask.tif").write_bytes(tiff(two(0, 255)[..., None], bits=8, orientation=6))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), np.rot90(KNOWN, -1))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif", exif=False), KNOWN)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (image(two(0, 0)), "gives nothing"),
        (image(two(255, 255)), "gives the whole map"),
        (image(two(1, 1)), "gives the whole map"),
        (image(channels(*[two(255, 255)] * 3, two(0, 0))), "gives nothing"),
        (image(NOISE.astype(np.uint8)), r"more than two values"),
        (image(channels(NOISE, NOISE, NOISE)), r"more than two colours"),
        (image(channels(two(0, 0), two(0, 0), two(0, 0), NOISE)), r"more than two levels of transparency"),
        (image(channels(two(0, 255), two(0, 0), two(0, 0), np.where(NOISE > 99, 255, 0))), "both its transparency"),
        (palette(KNOWN, [0, 0, 0, 0, 0, 0]), "gives nothing"),
        (image(np.where(KNOWN, np.nan, 0).astype(np.float32)), "values"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_masks_that_decide_nothing(mask: Image.Image, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("mask.tif" if mask.mode == "F" else "mask.png")
    mask.save(path)
    with pytest.raises(DataError, match=rf"mask\.\w+: .*{message}"):
        read_mask(path)


def test_a_jpeg_has_no_two_values(tmp_path: Path) -> None:
    GOOD["0 and 255"].save(tmp_path / "mask.jpg", quality=60)
    with pytest.raises(DataError, match=r"mask\.jpg: more than two values.*PNG"):
        read_mask(tmp_path / "mask.jpg")


def test_no_picture_and_too_large(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    GOOD["0 and 1"].save(buffer, "PNG")
    (tmp_path / "mask.png").write_bytes(buffer.getvalue()[:60])
    with pytest.raises(DataError, match=r"mask\.png: not a readable picture"):
        read_mask(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png: 10x12 is over 100 pixels"):
        read_mask(tmp_path / "mask.png", max_pixels=100)
    with pytest.raises(DataError, match=r"none\.png: no such picture"):
        read_mask(tmp_path / "none.png")
