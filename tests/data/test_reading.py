"""Pictures and maps from files: the same with the C++ helpers and without, and damage named with its file."""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast.data import folders, transforms
from ldmseg_fast.data import pictures as pictures_module
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.folders import load_picture, open_image, read_dense_map, read_image
from ldmseg_fast.data.masks import read_mask
from ldmseg_fast.data.pictures import read_picture, rgb_of_image
from ldmseg_fast.data.transforms import Augmentation, dense_ids
from ldmseg_fast.errors import DataError, PanopticFormatError
from ldmseg_fast.files import MAX_BYTES
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import write_panoptic_png

needs_c = pytest.mark.skipif(_C is None, reason="the extension is not built")


@pytest.fixture
def without_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it takes the C++ helpers away."""

    def take() -> None:
        for module in (folders, pictures_module, transforms):
            monkeypatch.setattr(module, "_C", None)

    return take


def pictures(folder: Path) -> Iterator[Path]:
    """Files of every mode and format that a data set may hold."""
    numbers = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (33, 67), (50, 48)):
        rgba = Image.fromarray(numbers.integers(0, 256, (height, width, 4)).astype(np.uint8))
        for mode in ("RGB", "L", "LA", "P", "RGBA", "1"):
            path = folder / f"{mode}-{height}x{width}.png"
            rgba.convert("RGB").convert(mode).save(path)
            yield path
        for suffix in ("jpg", "bmp", "webp"):
            path = folder / f"{height}x{width}.{suffix}"
            rgba.convert("RGB").save(path)
            yield path
        renamed = folder / f"png-{height}x{width}.jpg"  # the content counts, not the name
        rgba.convert("RGB").save(renamed, format="PNG")
        yield renamed


def test_pictures_are_pillows(tmp_path: Path) -> None:
    for path in pictures(tmp_path):
        with Image.open(path) as image:
            expected = np.array(image.convert("RGB"))
        found = read_image(path)
        assert found.dtype == np.uint8 and found.flags.writeable
        np.testing.assert_array_equal(found, expected, str(path))
        opened = open_image(path)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.array(opened), expected, str(path))
        np.testing.assert_array_equal(np.array(load_picture(str(path))), expected, str(path))


@needs_c
def test_plain_pngs_do_not_go_through_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("RGB", "L"):
        Image.new(mode, (9, 7), 90).save(tmp_path / f"{mode}.png")
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was asked"))
    for mode in ("RGB", "L"):
        assert read_image(tmp_path / f"{mode}.png").shape == (7, 9, 3)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_c), False])
def test_damaged_pictures_are_named(native: bool, tmp_path: Path, without_c: Callable[[], None]) -> None:
    """Cuts and flipped bits: an error that names the file, or the pixels that Pillow sees in it."""
    if not native:
        without_c()
    numbers, buffer = np.random.default_rng(1), io.BytesIO()
    Image.fromarray(numbers.integers(0, 256, (20, 23, 3)).astype(np.uint8)).save(buffer, format="PNG")
    content, path, errors = buffer.getvalue(), tmp_path / "picture.png", 0
    for trial in range(300):
        damaged = bytearray(content)
        if trial % 2:
            damaged = damaged[: int(numbers.integers(0, len(content) - 20))]
        else:
            damaged[int(numbers.integers(0, len(content)))] ^= 1 << int(numbers.integers(0, 8))
        path.write_bytes(damaged)
        try:
            found = read_image(path)
        except DataError as error:
            assert str(path) in str(error)
            errors += 1
        else:
            with Image.open(path) as image:
                np.testing.assert_array_equal(found, np.array(image.convert("RGB")))
    assert errors > 250


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.png", f"{tmp_path}/a\0b.png"):
        with pytest.raises(DataError, match=r"no such picture|not a readable picture|a null character in the name"):
            load_picture(path)
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        os.truncate(file.fileno(), MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(DataError, match=r"huge\.png.*over .* bytes"):
        load_picture(huge)


@needs_c
def test_dense_maps_are_the_same_in_cpp_and_numpy(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    for seed in range(40):
        numbers = np.random.default_rng(seed)
        count = int(numbers.choice([1, 3, 40, 255, 300]))
        segment_ids = numbers.choice(np.arange(1, 2**24, 997), count, replace=False).tolist()
        places = np.kron(numbers.integers(0, count + 1, (9, 8)), np.ones((5, 7), int))[
            :, : int(numbers.integers(1, 56))
        ]
        ids = np.array([0, *segment_ids], np.int32)[places]
        write_panoptic_png(path, ids)
        crowd = (numbers.random(count) < 0.2).tolist() if seed % 2 else []
        options = {"crowd": crowd, "min_area": int(numbers.choice([0, 10, 40]))}
        found, expected = read_dense_map(path, segment_ids, **options), dense_ids(ids, segment_ids, **options)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_c), False])
def test_bad_maps_are_named(native: bool, tmp_path: Path, without_c: Callable[[], None]) -> None:
    if not native:
        without_c()
    path = tmp_path / "map.png"
    write_panoptic_png(path, np.array([[5, 77]], np.int32))
    with pytest.raises(ValueError, match="segment id 77 is in the map but not in segments_info"):
        read_dense_map(path, [5])
    Image.new("P", (3, 3)).save(path)
    with pytest.raises(PanopticFormatError, match=r"map\.png.*palette"):
        read_dense_map(path, [5])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_dense_map(path, [5])


@needs_c
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 40},
        {"cache": True},
        {"resize": "torch", "size": 40},
        {"augmentation": Augmentation(flip=0.5, scale_min=0.5, color_jitter=0.2)},
        {"resize": "torch", "augmentation": Augmentation(flip=0.5, scale_min=0.5)},
        {"num_slots": 4},
        {"train": False},
    ],
    ids=str,
)
def test_items_are_the_same_in_cpp_and_numpy(options: dict, scenes: Path, without_c: Callable[[], None]) -> None:
    options = {"size": 64, "train": True} | options
    datasets = [CocoPanoptic(scenes, "train2017", **options) for _ in range(2)]
    keys = [(epoch, index) for epoch in (0, 3) for index in range(12)] * 2  # the second time from the cache
    kept = []
    for key in keys:
        item = datasets[0][key]
        kept.append({name: torch.clone(value) for name, value in item.items() if torch.is_tensor(value)})
        item["image"].zero_()  # what is handed out is nobody else's
        item["segment_ids"].zero_()
    without_c()
    for key, item in zip(keys, kept):
        plain = datasets[1][key]
        for name, value in item.items():
            assert torch.equal(plain[name], value) and plain[name].stride() == value.stride(), (key, name)


def test_reading_leaves_the_warnings_of_others_alone(tmp_path: Path) -> None:
    """Python shows a warning once a place, and forgets that it did where somebody changes the filters."""
    black = np.zeros((20, 30), bool)
    black[:9] = True
    for suffix in ("jpg", "png", "webp", "bmp", "gif"):
        Image.fromarray(black).convert("L").save(tmp_path / f"a.{suffix}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for path in sorted(tmp_path.iterdir()):
            warnings.warn("once", stacklevel=1)
            read_image(path)
            read_picture(path)
            with Image.open(path) as image:
                rgb_of_image(image, str(path))
            if path.suffix in (".png", ".bmp", ".gif"):
                read_mask(path)
    assert [str(one.message) for one in caught].count("once") == 1


def test_a_warning_of_too_many_pixels_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (300, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)  # type: ignore[arg-type]
            with pytest.raises(DataError, match=r"large\.png: .*over 50000 pixels: scale it down"):
                read_picture(path, max_pixels=50_000)


def test_postscript_is_refused_before_it_could_run(tmp_path, monkeypatch):
    """Pillow hands it to Ghostscript, and a picture may come from anybody."""
    path = tmp_path / "a.eps"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it ran"))
    for name in ("a.eps", "a.png"):
        path.rename(tmp_path / name)
        path = tmp_path / name
        with pytest.raises(DataError, match=rf"{name}: PostScript, .* save it as PNG"):
            read_picture(path)
