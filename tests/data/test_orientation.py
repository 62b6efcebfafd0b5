"""EXIF orientation: data sets keep the stored pixels, everything else sees what viewers show."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldmseg_fast.data.orientation import ORIENTATION
from ldmseg_fast.data.pictures import read_image, read_picture, rgb_of_image
from tests.data.test_pixel_formats import samples, tiff


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def save(path: Path, orientation: int) -> None:
    """The picture with an orientation; TIFFs have it among their own tags."""
    if path.suffix == ".tif":
        path.write_bytes(tiff(np.array(picture()), bits=8, orientation=orientation))
    else:
        picture().save(path, exif=exif(orientation), quality=95)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"turned.{suffix}"
    save(path, 1)
    stored = read_image(path)
    save(path, orientation)
    with Image.open(path) as image:
        shown = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert shown.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))
    np.testing.assert_array_equal(read_image(path), stored)
    kept = read_picture(path, exif=False)
    np.testing.assert_array_equal(np.array(kept.pixels), stored)
    found = read_picture(path)
    np.testing.assert_array_equal(np.array(found.pixels), shown)
    assert found.size == shown.shape[:2] and kept.size == (24, 40)
    assert found.turned == (orientation > 1) and not kept.turned
    for decoded in (False, True):
        for turned, want in ((True, shown), (False, stored)):
            with Image.open(path) as image:
                if decoded and suffix != "tif":  # Pillow turns TIFFs by itself when it decodes them
                    image.load()
                np.testing.assert_array_equal(np.array(rgb_of_image(image, "picture", exif=turned)), want)


def test_a_converted_image_is_turned_too(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", 6)
    with Image.open(tmp_path / "a.jpg") as image:
        converted = image.convert("RGB")
    assert rgb_of_image(converted, "picture").size == (24, 40)
    assert rgb_of_image(ImageOps.exif_transpose(converted), "picture").size == (24, 40)
    assert rgb_of_image(picture(), "picture").size == (40, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_tiffs_are_turned_as_well(orientation: int, tmp_path: Path) -> None:
    path, values = tmp_path / "deep.tif", samples(3, 24, 40)
    path.write_bytes(tiff(values))
    stored = read_image(path)
    path.write_bytes(tiff(values, orientation=orientation))
    np.testing.assert_array_equal(read_image(path), stored)
    assert read_picture(path).size == ((40, 24) if orientation >= 5 else (24, 40))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", ORIENTATION, 3, 1, 77, 0) + b"\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", ORIENTATION, 3, 2**31, 6, 0) + b"\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(100),
        b"Exif\0\0nothing of the kind",
    ],
)
def test_broken_exif_turns_nothing(block: bytes, tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"broken.{suffix}"
        picture().save(path, exif=block)
        found = read_picture(path)
        assert found.size == (24, 40) and not found.turned
        np.testing.assert_array_equal(np.array(found.pixels), read_image(path))
