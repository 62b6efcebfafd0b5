"""No output replaces what a command reads, or another output, however the path is written."""

import os
from pathlib import Path

import pytest

from ldmseg_fast import cli, outputs
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.outputs import check_outputs, check_replaced, is_inside, report_stream, same_place


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder with gt.json, and pictures/a.png beside it."""
    (tmp_path / "gt.json").write_text("{}")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"png")
    return tmp_path


def spellings(path: Path) -> dict[str, Path]:
    """Other paths to a file, beside it."""
    folder = path.parent
    (folder / "link").symlink_to(path.name)
    (folder / "link-to-link").symlink_to("link")
    (folder / "hard").hardlink_to(path)
    (folder / "elsewhere").symlink_to(folder)
    return {
        "itself": path,
        "a link": folder / "link",
        "a link to a link": folder / "link-to-link",
        "a hard link": folder / "hard",
        "..": folder / "pictures" / ".." / path.name,
        "the folder by a link": folder / "elsewhere" / path.name,
        "a relative path": Path(os.path.relpath(path)),
    }


def test_every_spelling_of_an_input_is_refused(there: Path) -> None:
    for how, path in spellings(there / "gt.json").items():
        with pytest.raises(ArgumentError, match=r"--json .* would replace .*gt\.json") as caught:
            check_outputs({"--json": path}, inputs=[there / "gt.json"])
        assert str(path) in str(caught.value), how
    check_outputs({"--json": there / "report.json", "--csv": None}, inputs=[there / "gt.json", None])


def test_beside_pictures_only_reports_are_written(there: Path) -> None:
    inputs = [there / "pictures"]
    for name in ("a.png", "new.png", "deep/new.jpg", "../pictures/a.png"):
        with pytest.raises(ArgumentError, match=r"--page .* lies in"):
            check_outputs({"--page": there / "pictures" / name}, inputs=inputs)
    check_outputs({"--page": there / "pictures" / "report.html", "--json": there / "x.json"}, inputs=inputs)
    with pytest.raises(ArgumentError, match=r"--out .* lies in"):
        check_outputs({}, {"--out": there / "pictures" / "results"}, inputs=inputs)


def test_a_root_is_no_output_folder_but_may_hold_one(there: Path) -> None:
    (there / "link").symlink_to(there)
    for out in (there, there / "link", there / "pictures" / ".."):
        with pytest.raises(ArgumentError, match="among what this command reads"):
            check_outputs({}, {"--out": out}, roots=[there])
    check_outputs({}, {"--out": there / "results"}, roots=[there, None])


def test_two_outputs_of_one_path(there: Path) -> None:
    (there / "l.csv").symlink_to("new.json")
    for second in ("new.json", "pictures/../new.json", "l.csv"):
        with pytest.raises(ArgumentError, match="--json and --csv would both be written"):
            check_outputs({"--json": there / "new.json", "--csv": there / second})
    check_outputs({"--json": "/dev/null", "--csv": "/dev/null"})


def test_letters_count_where_the_file_system_counts_them(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = there / "Report.json", there / "report.JSON"
    assert not same_place(first, second)
    monkeypatch.setattr(outputs, "_ignores_case", lambda folder: True)
    assert same_place(first, second) and not same_place(first, there / "other.json")
    composed, decomposed = there / "caf\u00e9.json", there / "cafe\u0301.json"
    assert same_place(composed, decomposed)


def test_inside(there: Path) -> None:
    (there / "link").symlink_to(there / "pictures")
    assert is_inside(there / "link" / "new" / "x", there / "pictures")
    assert not is_inside(there / "pictures", there / "pictures")
    assert not is_inside(there / "pictures2" / "x", there / "pictures")


def test_a_link_that_leads_to_itself(there: Path) -> None:
    for name, target in (("loop", "loop"), ("one", "two"), ("two", "one")):
        (there / name).symlink_to(target)
    assert not same_place(there / "loop", there / "gt.json") and same_place(there / "loop", there / "loop")
    assert is_inside(there / "one" / "x", there) and not is_inside(there / "one", there / "pictures")
    check_outputs({"--json": there / "loop"}, {"--out": there / "one"}, inputs=[there / "gt.json", there / "two"])


def test_a_result_that_is_a_link_to_a_picture(there: Path) -> None:
    (there / "out").mkdir()
    (there / "out" / "b.png").symlink_to(there / "pictures" / "a.png")
    with pytest.raises(ArgumentError, match=r"b\.png: a link to .*a\.png"):
        check_replaced([there / "out" / "b.png", there / "out" / "none"], [there / "pictures" / "a.png"])
    check_replaced([there / "out" / "c.png"], [there / "pictures" / "a.png"])


def test_the_table_goes_to_stderr_where_stdout_is_an_output(capsys: pytest.CaptureFixture) -> None:
    print("table", file=report_stream(["/dev/stdout", None]))
    print("table 2", file=report_stream(["/dev/null", None]))
    assert capsys.readouterr() == ("table 2\n", "table\n")


@pytest.fixture(scope="module")
def split(scenes: Path) -> dict[str, Path]:
    return {
        "json": scenes / "annotations" / "panoptic_val2017.json",
        "maps": scenes / "panoptic_val2017",
        "pictures": scenes / "val2017",
    }


@pytest.mark.parametrize("option", ["--json", "--csv", "--page"])
@pytest.mark.parametrize("what", ["json", "map", "picture"])
def test_pq_keeps_its_inputs(option: str, what: str, split: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    target = {"json": split["json"]}.get(what) or sorted(split["maps" if what == "map" else "pictures"].iterdir())[0]
    before = target.read_bytes()
    arguments = [split["json"], split["json"], "--gt-folder", split["maps"], "--pred-folder", split["maps"]]
    assert cli.main(list(map(str, ["pq", *arguments, option, target]))) == 2
    assert target.read_bytes() == before and str(target) in capsys.readouterr().err


def evaluate(model: Path, data: Path, *options: object) -> int:
    fixed = ["--steps", "1", "--limit", "1", "--no-baselines"]
    return cli.main(list(map(str, ["evaluate", model, "--data", data, *fixed, *options])))


def test_evaluate_keeps_its_inputs(model_dir: Path, scenes: Path, split: dict[str, Path], tmp_path: Path) -> None:
    map_file = sorted(split["maps"].iterdir())[0]
    read = [split["json"], map_file, model_dir / "model_index.json", model_dir / "unet" / "config.json"]
    before = [path.read_bytes() for path in read]
    for option in ("--json", "--instances", "--page"):
        assert [evaluate(model_dir, scenes, option, path) for path in read] == [2] * len(read)
    folders = [scenes, model_dir, model_dir / "unet", split["maps"], split["json"].parent, split["pictures"] / "out"]
    assert [evaluate(model_dir, scenes, "--out", path) for path in folders] == [2] * len(folders)
    out = tmp_path / "out"
    assert evaluate(model_dir, scenes, "--out", out, "--json", out / "panoptic.json") == 2
    assert evaluate(model_dir, scenes, "--json", tmp_path / "x", "--page", tmp_path / "x") == 2
    assert [path.read_bytes() for path in read] == before and not (split["pictures"] / "out").exists()


def test_predict_replaces_nothing_that_it_reads(model_dir: Path, scenes: Path, tmp_path: Path) -> None:
    pictures = scenes / "val2017"
    before = sorted(path.name for path in pictures.iterdir())
    (tmp_path / "link").symlink_to(pictures)
    for out in (pictures, tmp_path / "link", model_dir, model_dir / "unet"):
        assert cli.main(list(map(str, ["predict", model_dir, pictures, "--out", out, "--steps", "1"]))) == 2
    assert sorted(path.name for path in pictures.iterdir()) == before


def test_merge_and_cache_write_into_no_folder_that_they_read(
    model_dir: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train2017").symlink_to(scenes / "val2017")
    assert cli.main(["data", "merge", str(tmp_path / "out"), f"{scenes}:val2017"]) == 2
    assert "pictures of OUT" in capsys.readouterr().err
    for out in (scenes, scenes / "train2017", model_dir):
        command = ["data", "cache", scenes, "--image-vae", model_dir, "--size", "64", "--out", out]
        assert cli.main(list(map(str, command))) == 2
    assert "--out" in capsys.readouterr().err


def test_scenes_keep_their_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "scenes"
    fixed = ["data", "scenes", str(out), "--images", "1", "--size", "32", "--sheet"]
    for sheet in (out / "train2017" / "000000000001.png", out / "annotations" / "panoptic_val2017.json"):
        assert cli.main([*fixed, str(sheet)]) == 2 and not out.exists()
    assert cli.main([*fixed, str(tmp_path / "sheet.xyz")]) == 2
    assert "name it .png" in capsys.readouterr().err
    assert cli.main([*fixed, str(tmp_path / "sheet.png")]) == 0 and (tmp_path / "sheet.png").stat().st_size > 1000


def test_demo_and_ship_take_no_folder_of_somebody_else(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "evaluation").mkdir()
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "no demo has written" in capsys.readouterr().err and (tmp_path / "evaluation").is_dir()
    for out in (model_dir, model_dir / "unet"):
        assert cli.main(["ship", str(model_dir), str(out)]) == 2
    assert (model_dir / "unet" / "model.safetensors").is_file()
