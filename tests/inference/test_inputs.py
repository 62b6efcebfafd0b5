"""What a pipeline takes: every kind of picture gives the map of the same picture in 8 bits, or an error names it."""

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import ArgumentError, DataError, UserError
from ldmseg_fast.inference.inputs import check_images, check_thresholds, scaled_picture
from tests.data.test_pixel_formats import png, samples, tiff


@pytest.fixture(scope="module")
def pipe(model_dir: Path) -> LDMSegPipeline:
    return LDMSegPipeline.from_pretrained(model_dir)


def pixels_of(image: object, *, exif: bool = True, max_pixels: int = 2**26) -> np.ndarray:
    """The pixels that a network of side 16 sees."""
    return scaled_picture(check_images(image)[0], 0, 16, exif=exif, max_pixels=max_pixels).pixels


def picture(height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey() -> np.ndarray:
    return picture()[..., 0]


def repeated(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(grey().astype(np.uint16) * 257),
        Image.frombytes("I;16B", (16, 16), (grey().astype(">u2") * 257).tobytes()),
        Image.fromarray(repeated(grey())),
        repeated(grey()).astype(np.uint16) * 257,
        torch.from_numpy(repeated(grey())),
        torch.from_numpy(repeated(grey()))[None],
        [Image.fromarray(grey())],
        (array for array in [repeated(grey())]),
        np.asfortranarray(repeated(grey())),
    ],
)
def test_grey_of_any_kind(image: object) -> None:
    np.testing.assert_array_equal(pixels_of(image), repeated(grey()))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa"]
)
def test_every_mode_that_pillow_converts(mode: str) -> None:
    image = Image.frombytes("LAB", (16, 16), picture().tobytes()) if mode == "LAB" else None
    start = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    image = image or Image.fromarray(picture()).convert(start).convert(mode)
    through = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    np.testing.assert_array_equal(pixels_of(image), np.array(image.convert(through).convert("RGB")))


def test_bool_arrays() -> None:
    array = picture() > 99
    np.testing.assert_array_equal(pixels_of(array), 255 * array.astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("write", [png, tiff])
def test_16_bit_files_that_are_not_decoded_yet(channels: int, write: object) -> None:
    values = samples(channels, 16, 16)
    found = pixels_of(Image.open(io.BytesIO(write(values))))
    scaled = np.rint(values * (255 / 65535)).astype(np.uint8)
    np.testing.assert_array_equal(found, scaled[..., :3] if channels > 1 else repeated(scaled[..., 0]))


NAN = np.full((4, 4, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "images: None"),
        ([None], r"images\[0\]: None"),
        (7, "images: int"),
        ([3.5], r"images\[0\]: float"),
        ({"a.png": 1}, "images: dict"),
        (b"bytes", "images: bytes"),
        (io.BytesIO(b"file"), "images: BytesIO"),
        ([[[1, 2, 3]]], r"images\[0\]: list"),
        (object(), "images: object"),
        ("a text", "'a text': no such file"),
        ("", "''"),
        ("https://example.org/a.png", "no such file"),
        (Path("a\0b"), "no file"),
        ([picture(), "none.png"], r"images\[1\]: 'none.png'"),
        (NAN, "float32.*np.rint"),
        (torch.zeros(4, 4, 3), "float32.*np.rint"),
        (torch.zeros(4, 4, 3, dtype=torch.bfloat16), "bfloat16"),
        (np.zeros((4, 4, 3), np.int32), "int32"),
        (np.zeros((4, 4, 3), object), "object"),
        (np.zeros((3, 4, 5), np.uint8), "permute"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
        (np.zeros((4, 0, 3), np.uint8), r"shape \(4, 0, 3\)"),
        (np.zeros((), np.uint8), r"shape \(\)"),
        (np.zeros((1, 1, 1, 1, 3), np.uint8), "shape"),
        (np.zeros((1, 2**17 + 1, 3), np.uint8), "sides of at most"),
        (Image.new("RGB", (0, 5)), "0x5"),
        (Image.new("F", (4, 4)), r"images\[0\]: pixel format F"),
        (Image.new("I", (4, 4)), r"images\[0\]: pixel format I "),
        (Image.new("RGB", (90, 90)), "over 8000 pixels"),
        (torch.zeros(4, 4, 3, device="meta", dtype=torch.uint8), "no NumPy array"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture(image: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pixels_of(image, max_pixels=8000)


def test_a_picture_that_is_cut_or_closed(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(picture(90, 90)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ArgumentError, match=r"images\[0\]: not a readable picture"):
        pixels_of(Image.open(path))
    closed = Image.open(path)
    closed.close()
    with pytest.raises(ArgumentError, match=r"images\[0\]: not a readable picture"):
        pixels_of(closed)
    with pytest.raises(DataError, match=r"cut\.png: not a readable picture"):
        pixels_of(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        for name, kind in (("pipe.png", "a named pipe"), ("socket.png", "a socket"), ("", "a folder")):
            with pytest.raises(DataError, match=f"{kind}, not a readable picture"):
                pixels_of(tmp_path / name)
    with pytest.raises(DataError, match="/dev/zero: a device"):
        pixels_of("/dev/zero")


def test_paths_and_mixed_lists(pipe: LDMSegPipeline, tmp_path: Path) -> None:
    image = picture(40, 30)
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    want = pipe(image, 1, image_ids=[0])[0].segmentation
    results = pipe([path, str(path), image, Image.open(path), torch.from_numpy(image)], 1, image_ids=[0] * 5)
    assert all((result.segmentation == want).all() for result in results)
    assert (pipe(str(path), 1)[0].segmentation == want).all()
    assert (pipe.ensemble(path, 1, num_inference_steps=1)[0].segmentation == want).all()
    given = pipe.inpaint(path, np.ones((40, 30), int), np.ones((40, 30), bool), 1)[0]
    assert given.segmentation.shape == (40, 30)
    assert pipe([], 1) == []


def test_of_several_frames_the_first_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("L", (16, 16), shade) for shade in (40, 200)]
    for name in ("a.gif", "a.tif", "a.png", "a.webp"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {})
        )
        with pytest.warns(UserWarning, match=f"{name}: more than one frame"):
            assert (pixels_of(tmp_path / name) == 40).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 10**9}, "batch_size=1000000000"),
        ({"batch_size": 2.0}, "batch_size=2.0: a whole number"),
        ({"batch_size": True}, "batch_size=True"),
        ({"num_inference_steps": 10**9}, "num_inference_steps=1000000000"),
        ({"num_inference_steps": "4"}, "num_inference_steps='4'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"seed": 10**1000}, "seed=a number of"),
        ({"seed": None}, "seed=None"),
        ({"cache_interval": 10**9}, "cache_interval"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"eta": None}, "eta=None"),
        ({"timesteps": 5}, "timesteps=5"),
        ({"timesteps": [float("nan")]}, "timesteps=nan: a whole number"),
        ({"timesteps": [10**20]}, "timesteps=100000000000000000000"),
        ({"exif": None}, "exif=None"),
        ({"callback": 3}, "callback=3"),
        ({"captions": "text"}, "captions='text'"),
        ({"captions": 5}, "captions=5: a list of texts"),
        ({"captions": {"text": 1}}, "captions=.*: a list of texts"),
        ({"image_ids": "a"}, "image_ids='a'"),
        ({"image_ids": [None]}, r"image_ids\[0\]=None"),
        ({"image_ids": ["\udcff"]}, r"image_ids\[0\]"),
        ({"latents": [1.0]}, "latents: list"),
        ({"latents": torch.zeros(1, 4, 16, 16, dtype=torch.complex64)}, "latents: torch.complex64"),
        ({"latents": torch.zeros(1, 4, 16, 16, device="meta")}, "latents: .* on meta"),
        ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, "latents: the initial noise is not finite"),
        ({"generator": 3}, "generator=3"),
        ({"thresholds": 0.5}, "thresholds: float"),
        ({"thresholds": PostprocessConfig(mask_threshold="0.5")}, "thresholds.mask_threshold='0.5': a number"),
        ({"thresholds": PostprocessConfig(count_threshold="12")}, "thresholds.count_threshold='12': a number"),
        ({"thresholds": PostprocessConfig(mask_threshold=50)}, "thresholds.mask_threshold=50"),
        ({"thresholds": PostprocessConfig(overlap_threshold=float("nan"))}, "thresholds.overlap_threshold=nan"),
    ],
    ids=str,
)
def test_numbers_out_of_range(pipe: LDMSegPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(picture(), **({"num_inference_steps": 1} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_dir": None}, "model None: a folder or the name of a model"),
        ({"model_dir": b"tiny"}, "model b'tiny'"),
        ({"model_dir": ["tiny"]}, r"model \['tiny'\]"),
        ({"device": "gpu"}, "device='gpu': no such device here"),
        ({"device": "meta"}, "device='meta': no such device here"),
        ({"device": "xla"}, "device='xla': no such device here"),
        ({"device": -7}, "device=-7: no such device here"),
        ({"dtype": "fp16"}, "dtype='fp16': one of torch.float32"),
        ({"dtype": np.float32}, "dtype=.*: one of torch.float32"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"dtype": torch.complex64}, "dtype=torch.complex64"),
        ({"fused": "no"}, "fused='no': True, False or 'epilogues'"),
        ({"cuda_graph": "no"}, "cuda_graph='no': True or False"),
        ({"backend": "onnxruntime", "lanes": "2"}, "lanes='2': a whole number"),
        ({"backend": "onnxruntime", "threads": 1.5}, "threads=1.5: a whole number"),
    ],
    ids=str,
)
def test_what_no_model_is_loaded_with(model_dir: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LDMSegPipeline.from_pretrained(**({"model_dir": model_dir} | arguments))


def test_either_byte_order_and_numbers_of_numpy(pipe: LDMSegPipeline) -> None:
    deep = picture().astype(np.uint16) * 257
    assert (pixels_of(deep.astype(deep.dtype.newbyteorder())) == pixels_of(deep)).all()
    for scales in (np.ones(1, np.float32), [np.float16(1)], (1,)):
        assert len(pipe.ensemble(picture(), 1, num_inference_steps=1, scales=scales)) == 1
    for scales in (5, None):
        with pytest.raises(ArgumentError, match=f"scales={scales}: a list of numbers"):
            pipe.ensemble(picture(), 1, scales=scales)


def test_ranges_of_the_other_calls(pipe: LDMSegPipeline, model_dir: Path) -> None:
    with pytest.raises(ArgumentError, match="num_samples=1000000"):
        pipe.ensemble(picture(), 1_000_000)
    with pytest.raises(ArgumentError, match="draft_steps=-1"):
        pipe.inpaint(picture(), np.ones((16, 16), int), np.ones((16, 16), bool), 1, draft_steps=-1)
    for wrong in (None, [None], ["map.png"], 4):
        with pytest.raises(ArgumentError, match="segmentations"):
            pipe.inpaint([picture()], wrong, [np.ones((16, 16), bool)], 1)
        with pytest.raises(ArgumentError, match="known_masks"):
            pipe.inpaint([picture()], [np.ones((16, 16), int)], wrong, 1)
    with pytest.raises(ArgumentError, match="image_size=1000000000"):
        LDMSegPipeline.from_pretrained(model_dir, image_size=10**9)


def test_thresholds_are_given_back_as_the_numbers_that_they_stand_for():
    given = check_thresholds(PostprocessConfig(count_threshold=8.0, mask_threshold=1))
    assert given == PostprocessConfig(count_threshold=8, mask_threshold=1.0) and type(given.count_threshold) is int
    assert check_thresholds(None) is None
