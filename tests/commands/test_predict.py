"""`ldmseg predict` and `inpaint` over strangers' files: nothing lost, nothing skipped without a word."""

import errno
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.commands import predict
from ldmseg_fast.data.picture_folders import find_pictures, picture_suffixes
from ldmseg_fast.data.pictures import read_picture
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def run(model_dir: Path, *arguments: object) -> int:
    return main(["predict", str(model_dir), *map(str, arguments), "--steps", "1"])


def tagged(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub" / "deep").mkdir(parents=True)
    picture().save(folder / "a.png")
    picture().save(folder / "B.JPG")
    picture().save(folder / "sub" / "a.png")
    picture().save(folder / "sub" / "deep" / "c.gif")
    (folder / "notes.txt").write_text("no picture")
    picture().save(folder / ".hidden.png")
    return folder


def names(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.json"))


def test_a_result_that_goes_while_others_are_written_is_told_and_made_again(
    model_dir, folder, tmp_path, monkeypatch, capsys
):
    real, out = predict.predict_files, tmp_path / "out"

    def remove_the_first(*args: object, **named: object) -> object:
        outcome = real(*args, **named)
        if (out / "a.json").exists() and (out / "B.json").exists():
            (out / "B.json").unlink()
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict_files", remove_the_first)
        assert run(model_dir, folder, "--out", out, "--batch-size", 1) == 2
    assert f"{out}: 1 results have been removed while others were written (B.json); run" in capsys.readouterr().err
    assert run(model_dir, folder, "--out", out, "--batch-size", 1) == 0 and names(out) == ["B.json", "a.json"]


def test_a_bad_picture_is_listed_and_the_others_are_done(model_dir, folder, tmp_path, capsys):
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "floats.tif")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert run(model_dir, folder, "--out", tmp_path / "out", "--batch-size", 2) == 1
    said = capsys.readouterr()
    assert names(tmp_path / "out") == ["B.json", "a.json"]
    assert "2 images segmented" in said.out
    assert "4 could not be segmented:" in said.err and said.err.count("\n  ") == 4
    for bad in ("cut.png: not a readable", "pipe.png: a named pipe", "floats.tif: pixel format F", "gone.jpg: no such"):
        assert bad in said.err
    assert "left out: 1 hidden, 1 sub-folders (--recursive takes them), 1 with other endings than pictures" in said.out


def test_sub_folders_keep_their_names(model_dir, folder, tmp_path, capsys):
    out = folder / "out"
    for _ in range(2):  # results of the first time are no pictures of the second
        assert run(model_dir, folder, "--out", out, "--recursive") == 0
        assert names(out) == ["B.json", "a.json", "sub/a.json", "sub/deep/c.json"]
        assert "4 images segmented" in capsys.readouterr().out
    assert json.loads((out / "sub" / "deep" / "c.json").read_text())["image"] == "c.gif"


def test_pictures_of_one_name_are_refused_before_anything_is_written(model_dir, folder, tmp_path, capsys):
    picture().save(folder / "a.jpg")
    assert run(model_dir, folder, "--out", tmp_path / "out") == 2
    assert "would both be written as a.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(model_dir, folder / "sub", "--out", folder / "sub") == 2
    assert "would be replaced by the result" in capsys.readouterr().err


def test_a_name_that_is_too_long_for_its_results_is_refused_first(model_dir, tmp_path, capsys):
    path = tmp_path / ("x" * 250 + ".png")
    picture().save(path)
    assert run(model_dir, path, "--out", tmp_path / "out") == 2
    assert "rename the picture" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_that_are_all_bad(model_dir, folder, tmp_path, capsys):
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "text.jpg").write_text("text")
    assert run(model_dir, folder / "cut.png", folder / "text.jpg", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "cut.png" in error and "text.jpg: not a readable picture" in error
    assert run(model_dir, folder / "cut.png", folder / "a.png", "--out", tmp_path / "out") == 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("text")
    assert run(model_dir, tmp_path / "bad", "--out", tmp_path / "out") == 1
    assert "0 images segmented" in capsys.readouterr().out


def test_a_folder_without_pictures(model_dir, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("text")
    assert run(model_dir, tmp_path / "none", "--out", tmp_path / "out") == 2
    assert "no pictures in this folder; left out: 1 with other endings" in capsys.readouterr().err


def test_every_ending_of_pillow(tmp_path):
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".ppm"} <= picture_suffixes()
    assert not picture_suffixes() & {".txt", ".json", ".pdf", ".h5", ".mpg", ".npy"}
    saved = []
    for suffix in sorted(picture_suffixes()):
        try:
            picture(32, 32).save(tmp_path / f"a{suffix[1:]}{suffix}")
        except (OSError, ValueError, KeyError):
            (tmp_path / f"a{suffix[1:]}{suffix}").unlink(missing_ok=True)
        else:
            saved.append(f"a{suffix[1:]}{suffix}")
    assert len(saved) > 20
    assert [found.file.name for found in find_pictures([tmp_path]).pictures] == saved


def test_orientation_turns_the_outputs(model_dir, tmp_path, capsys):
    picture().save(tmp_path / "a.jpg", exif=tagged(6))
    out = tmp_path / "out"
    assert run(model_dir, tmp_path / "a.jpg", "--out", out) == 0
    assert read_panoptic_png(out / "a.png").shape == (30, 20)
    record = json.loads((out / "a.json").read_text())
    assert (record["height"], record["width"]) == (30, 20)
    assert "1 turned as their EXIF orientation says" in capsys.readouterr().out
    assert run(model_dir, tmp_path / "a.jpg", "--out", out, "--keep-orientation") == 0
    assert read_panoptic_png(out / "a.png").shape == (20, 30)
    assert "turned" not in capsys.readouterr().out


def test_pixels_are_bounded_before_they_are_decoded(model_dir, tmp_path, capsys):
    picture(200, 300).save(tmp_path / "a.png")
    assert run(model_dir, tmp_path / "a.png", "--out", tmp_path / "out", "--max-pixels", 59_999) == 2
    assert "a.png: 300x200 is over 59999 pixels" in capsys.readouterr().err
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with warnings.catch_warnings(record=True) as caught:
        assert run(model_dir, tmp_path / "bomb.png", "--out", tmp_path / "out") == 2
    assert not [one for one in caught if issubclass(one.category, Image.DecompressionBombWarning)]
    assert "bomb.png: over 67108864 pixels" in capsys.readouterr().err


def test_pictures_beyond_the_default_bound_are_read_smaller(model_dir, tmp_path, monkeypatch):
    for module in ("ldmseg_fast.data.pictures", "ldmseg_fast.commands.predict"):
        monkeypatch.setattr(f"{module}.MAX_PIXELS", 10_000)
    monkeypatch.setattr("ldmseg_fast.data.pictures.LARGE", 5_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for name in ("a.jpg", "b.png", "c.tif"):
        picture(400, 300).save(tmp_path / name)
    read = read_picture(tmp_path / "a.jpg", max_pixels=200_000)
    assert read.size == (400, 300) and 1_000 < read.pixels.width * read.pixels.height <= 10_000
    read = read_picture(tmp_path / "b.png", max_pixels=200_000)
    assert read.size == (400, 300) and read.pixels.size == (75, 100)
    assert run(model_dir, *tmp_path.glob("?.*"), "--out", tmp_path / "out", "--max-pixels", 200_000) == 0
    for name in "abc":
        assert read_panoptic_png(tmp_path / "out" / f"{name}.png").shape == (400, 300)
    assert Image.MAX_IMAGE_PIXELS == 10_000


def test_batches_do_not_change_results(model_dir, tmp_path, monkeypatch):
    for number in range(5):
        picture(20 + number % 2, 30, number).save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    assert run(model_dir, *files, "--out", tmp_path / "one") == 0
    monkeypatch.setattr("ldmseg_fast.commands.predict.MAX_PIXELS", 1300)  # two pictures at a time
    assert run(model_dir, *files, "--out", tmp_path / "two") == 0
    for file in files:
        one, two = (read_panoptic_png(tmp_path / out / file.name) for out in ("one", "two"))
        assert (one == two).mean() > 0.99  # a batch may round otherwise


def test_several_frames_are_said(model_dir, tmp_path, capsys):
    picture().save(tmp_path / "a.gif", save_all=True, append_images=[picture(seed=1)])
    assert run(model_dir, tmp_path / "a.gif", "--out", tmp_path / "out") == 0
    assert "1 have more than one frame, of which the first is segmented" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ending", "method", "before"),
    [(".png", "write_bytes", 0), ("_overlay.png", "write_bytes", 1), (".json", "write_text", 0)],
)
def test_a_full_disk_names_the_path(model_dir, tmp_path, monkeypatch, capsys, ending, method, before):
    picture().save(tmp_path / "a.png")
    write, written = getattr(Path, method), []

    def full(self, *arguments, **keywords):
        written.append(self)
        if len(written) > before:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments, **keywords)

    monkeypatch.setattr(Path, method, full)
    assert run(model_dir, tmp_path / "a.png", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"out/a{ending}" in error and "No space left" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", 10**9),
        ("--batch-size", -1),
        ("--steps", 10**9),
        ("--seed", -1),
        ("--seed", 2**63),
        ("--samples", 10**9),
        ("--size", 10**9),
        ("--cache-interval", 10**9),
        ("--connected", -1),
        ("--max-pixels", 0),
        ("--max-pixels", 10**12),
    ],
)
def test_numbers_out_of_range(model_dir, option, value, tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    arguments = ["predict", str(model_dir), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert main([*arguments, option, str(value)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option} {value}: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "m", "--data", "d", "--batch-size", "1000000000"],
        ["evaluate", "m", "--data", "d", "--limit", "-1"],
        ["evaluate", "m", "--data", "d", "--worst", "1000000000"],
        ["evaluate", "m", "--data", "d", "--block", "16", "1000000000"],
        ["evaluate", "m", "--data", "d", "--inpainting", "--probability", "nan"],
        ["pq", "a.json", "b.json", "--threads", "100000"],
        ["pq", "a.json", "b.json", "--seed", "-1"],
        ["data", "scenes", "out", "--images", "1000000000"],
        ["data", "cache", "d", "--image-vae", "v", "--workers", "100000"],
        ["data", "cache", "d", "--image-vae", "v", "--timeout", "nan"],
        ["demo", "--ranks", "100000"],
        ["demo", "--minutes", "inf"],
        ["inpaint", "m", "--image", "a", "--map", "b", "--out", "o", "--unknown-id", "99999999"],
    ],
    ids=" ".join,
)
def test_numbers_of_other_commands(arguments, capsys):
    assert main(arguments) == 2
    option = [word for word in arguments if word.startswith("--")][-1]
    assert capsys.readouterr().err.startswith(f"error: {option} {arguments[-1]}: ")


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    picture(40, 60).save(tmp_path / "p.jpg")
    ids = np.zeros((40, 60), np.int32)
    ids[:, :25], ids[:15, 40:] = 7, 300
    write_panoptic_png(tmp_path / "m.png", ids)
    Image.fromarray((ids > 0).astype(np.uint8)).save(tmp_path / "k.png")
    return tmp_path


def inpaint(model_dir: Path, at: Path, mask: str, *more: str) -> int:
    files = ["--image", f"{at}/p.jpg", "--map", f"{at}/m.png", "--known", f"{at}/{mask}", "--out", f"{at}/out"]
    return main(["inpaint", str(model_dir), *files, "--steps", "1", *more])


def test_inpaint_keeps_what_a_mask_of_0_and_1_gives(model_dir, partial):
    assert inpaint(model_dir, partial, "k.png") == 0
    given, result = (read_panoptic_png(partial / name) for name in ("m.png", "out/p.png"))
    assert (result[given > 0] == given[given > 0]).all()


def test_inpaint_refuses_masks_that_give_nothing(model_dir, partial, capsys):
    ids = read_panoptic_png(partial / "m.png")
    for name, values, message in (
        ("inverted.png", 255 * (ids == 0), "inverted"),
        ("empty.png", 0 * ids, "gives nothing"),
        ("full.png", 0 * ids + 255, "gives the whole map"),
        ("small.png", 255 * (ids[:10] > 0), "60x10 pixels"),
    ):
        Image.fromarray(values.astype(np.uint8)).save(partial / name)
        assert inpaint(model_dir, partial, name) == 2
        error = capsys.readouterr().err
        assert name in error and message in error
    files = ["--image", f"{partial}/p.jpg", "--map", f"{partial}/m.png", "--out", f"{partial}/out"]
    write_panoptic_png(partial / "m.png", 0 * ids)
    assert main(["inpaint", str(model_dir), *files, "--unknown-id", "0"]) == 2
    assert "every pixel has the id 0" in capsys.readouterr().err


def test_inpaint_turns_the_picture(model_dir, partial, capsys):
    picture(60, 40).save(partial / "p.jpg", exif=tagged(8))
    assert inpaint(model_dir, partial, "k.png") == 0
    assert "turned as its EXIF orientation says" in capsys.readouterr().out
    assert inpaint(model_dir, partial, "k.png", "--keep-orientation") == 2
    picture(40, 60).save(partial / "p.jpg", exif=tagged(8))
    assert inpaint(model_dir, partial, "k.png", "--keep-orientation") == 0
    assert inpaint(model_dir, partial, "k.png") == 2
    assert "turned by its EXIF orientation (--keep-orientation" in capsys.readouterr().err
