"""Commands as a user types them: exit codes, one clear line for wrong input."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import COMMANDS, SECTIONS, build_parser, main
from ldmseg_fast.panoptic.format import read_panoptic_png

ROOT = Path(__file__).resolve().parents[1]


def test_predict_writes_three_files_a_picture(model_dir, scenes, tmp_path, capsys):
    pictures = sorted((scenes / "val2017").iterdir())[:3]
    arguments = ["predict", str(model_dir), *map(str, pictures), "--out", str(tmp_path), "--steps", "2"]
    assert main(arguments) == 0
    for picture in pictures:
        segmentation = read_panoptic_png(tmp_path / f"{picture.stem}.png")
        record = json.loads((tmp_path / f"{picture.stem}.json").read_text())
        assert segmentation.shape == (record["height"], record["width"]) == (64, 64)
        assert {segment["id"] for segment in record["segments_info"]} == set(np.unique(segmentation)) - {0}
        assert Image.open(tmp_path / f"{picture.stem}_overlay.png").size == (512, 512)  # small pictures are enlarged
    assert "3 images segmented" in capsys.readouterr().out


def test_an_option_that_cannot_act_is_one_line(model_dir, scenes, tmp_path):
    picture = next((scenes / "val2017").iterdir())
    options = ["--precision", "fp8", "--fused", "--steps", "1"]
    arguments = ["predict", str(model_dir), str(picture), "--out", str(tmp_path), *options]
    command = [sys.executable, "-m", "ldmseg_fast.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stderr.splitlines() if "arning" in line]
    assert len(lines) == 2 and all(line.startswith("ldmseg: warning: ") for line in lines)
    assert "precision=fp8: " in lines[0] and "fp32 is computed instead" in lines[0] and "fused: device=cpu" in lines[1]


def test_predict_takes_folders_and_odd_pictures(model_dir, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (1, 1)).save(folder / "dot.png")
    Image.new("CMYK", (30, 20)).save(folder / "print.jpg")
    (folder / "notes.txt").write_text("no picture")
    assert main(["predict", str(model_dir), str(folder), "--out", str(tmp_path / "out"), "--steps", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["dot.json", "print.json"]


def test_results_that_would_replace_each_other_are_refused(model_dir, tmp_path, capsys):
    for name in ("a.jpg", "a_overlay.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    out = str(tmp_path / "out")
    assert main(["predict", str(model_dir), str(tmp_path), "--out", out]) == 2
    assert "would both be written as a_overlay.png" in capsys.readouterr().err
    (tmp_path / "a_overlay.jpg").unlink()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "._a.jpg").write_bytes(b"what another system keeps beside a picture")
    once_each = [str(tmp_path), str(tmp_path / "a.jpg")]
    assert main(["predict", str(model_dir), *once_each, "--out", str(tmp_path), "--steps", "1"]) == 0
    assert "1 images segmented" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are text")
def test_a_name_that_is_no_text(model_dir, tmp_path, capsys):
    path = tmp_path / "b\udcffd\n.png"
    Image.new("RGB", (8, 8)).save(path)
    assert main(["predict", str(model_dir), str(path), "--out", str(tmp_path / "out"), "--steps", "1"]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"{path.stem}{end}" for end in ENDINGS}
    assert main(["evaluate", str(path), "--data", str(tmp_path)]) == 2
    assert "model folder" in capsys.readouterr().err


ENDINGS = (".png", "_overlay.png", ".json")


def test_a_name_with_a_line_break_stays_in_one_line(model_dir, tmp_path, capsys):
    (tmp_path / "a\nb.png").write_bytes(b"none")
    for argv in (["predict", model_dir, tmp_path / "a\nb.png", "--out", tmp_path / "o"], ["runs", tmp_path / "x\ny"]):
        assert main(list(map(str, argv))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "\\n" in error


def test_too_little_memory_names_the_size_of_the_networks(model_dir, scenes, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("ldmseg_fast.backends.torch_backend.TorchBackend.encode_image", full)
    assert main(["predict", str(model_dir), str(scenes / "val2017"), "--out", str(tmp_path / "o")]) == 2
    assert f"out of memory at image_size=64, of {model_dir}/model_index.json or as asked" in capsys.readouterr().err


@pytest.mark.parametrize("script", [["-m", "ldmseg_fast.cli", "doctor"], ["-m", "ldmseg_fast.train", "diffusion"]])
def test_a_torch_that_cannot_be_imported_is_one_line(script):
    done = subprocess.run(
        [sys.executable, *script], env=os.environ | {"TORCH_LOGS": "zzz"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "check TORCH_LOGS=zzz in the environment" in done.stderr


def test_a_large_picture_works(model_dir, tmp_path):
    Image.new("RGB", (8000, 6000), (90, 120, 30)).save(tmp_path / "large.jpg")
    assert (
        main(["predict", str(model_dir), str(tmp_path / "large.jpg"), "--out", str(tmp_path / "o"), "--steps", "1"])
        == 0
    )
    assert read_panoptic_png(tmp_path / "o" / "large.png").shape == (6000, 8000)


@pytest.fixture
def broken(scenes, tmp_path):
    """Files that a user might give by mistake."""
    whole = next((scenes / "val2017").iterdir()).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture at all")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{model}", "{broken}/cut.png", "--out", "{out}"], "cut.png"),
        (["predict", "{model}", "{broken}/text.jpg", "--out", "{out}"], "text.jpg"),
        (["predict", "{model}", "{broken}/none.jpg", "--out", "{out}"], "none.jpg: no such file"),
        (["predict", "{model}", "{broken}/empty", "--out", "{out}"], "no pictures in this folder"),
        (["predict", "{broken}/empty", "{broken}/cut.png", "--out", "{out}"], "no model_index.json"),
        (["predict", "{model}", "{broken}/cut.png", "--out", "{out}", "--backend", "magic"], "backend='magic'"),
        (["predict", "{model}", "{broken}/cut.png", "--out", "{out}", "--batch-size", "0"], "--batch-size 0"),
        (["predict", "{model}", "{broken}/cut.png", "--out", "{broken}"], "cut.png would be replaced"),
        (["evaluate", "{model}", "--data", "{broken}/empty"], "empty"),
        (["evaluate", "{model}", "--data", "{scenes}", "--ids", "random"], "--ids: "),
        (["evaluate", "{model}-autoencoder", "--data", "{scenes}", "--steps", "2", "--eta", "1"], "--steps, --eta: "),
        (["evaluate", "{model}", "--data", "{scenes}", "--json", "{broken}/empty"], "empty is a folder"),
        (["evaluate", "{model}", "--data", "{scenes}", "--page", "{broken}/text.jpg/page.html"], "text.jpg"),
        (["evaluate", "{model}", "--data", "{scenes}", "--mask-th", "50"], "--mask-th 50"),
        (["evaluate", "{model}", "--data", "{scenes}", "--split", "test2017"], "test2017"),
        (["evaluate", "{model}", "--data", "{scenes}", "--steps", "5000"], "num_inference_steps=5000"),
        (["data", "check", "{broken}/nowhere"], "nowhere"),
        (["data", "scenes", "{broken}", "--images", "4"], "not"),
        (["pq", "{broken}/gt.json", "{broken}/pred.json"], "gt.json"),
        (["convert", "{broken}/none.pt", "--out", "{out}"], "none.pt"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments, message, model_dir, scenes, broken, capsys):
    values = {"model": model_dir, "scenes": scenes, "broken": broken, "out": broken / "out"}
    assert main([argument.format(**values) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error


def test_evaluate_writes_its_report(model_dir, scenes, tmp_path, capsys):
    path = tmp_path / "deep" / "report.json"
    assert main(["evaluate", str(model_dir), "--data", str(scenes), "--steps", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert set(report["class_agnostic"]) >= {"pq", "sq", "rq", "pq_crowd_correct", "tp", "fp", "fn"}
    assert "halves" in capsys.readouterr().out


def test_data_check_of_a_good_and_a_bad_folder(scenes, tmp_path, capsys):
    assert main(["data", "check", str(scenes)]) == 0
    assert main(["data", "scenes", str(tmp_path / "s"), "--images", "2", "--size", "32"]) == 0
    next((tmp_path / "s" / "panoptic_val2017").iterdir()).unlink()
    assert main(["data", "check", str(tmp_path / "s")]) == 1
    assert "missing" in capsys.readouterr().out


def test_pq_of_a_set_with_itself(scenes, tmp_path):
    truth = str(scenes / "annotations" / "panoptic_val2017.json")
    folder = str(scenes / "panoptic_val2017")
    report = tmp_path / "pq.json"
    arguments = ["pq", truth, truth, "--gt-folder", folder, "--pred-folder", folder, "--json", str(report)]
    assert main(arguments) == 0
    assert json.loads(report.read_text())["All"]["pq"] == 1.0


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "PyTorch" in capsys.readouterr().out


def test_an_interrupted_command_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(root):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldmseg_fast.commands.data_check.check_folder", interrupted)
    assert main(["data", "check", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("ldmseg_fast.commands.data_check.check_folder", lambda root: None)
    with pytest.raises(AttributeError):
        main(["data", "check", str(tmp_path)])


def test_nobody_reads_the_output_any_more(tmp_path):
    """As after `ldmseg ... | head -1`."""
    code = "import sys, time; from ldmseg_fast.cli import main; time.sleep(0.5); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "runs", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(scenes, tmp_path, closed):
    truth = scenes / "annotations" / "panoptic_val2017.json"
    arguments = ["pq", truth, truth, "--gt-folder", scenes / "panoptic_val2017"]
    arguments += ["--pred-folder", scenes / "panoptic_val2017", "--csv", tmp_path / "pq.csv"]
    command = shlex.join(map(str, [sys.executable, "-m", "ldmseg_fast.cli", *arguments]))
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "pq.csv").read_text().startswith("category")


def test_commands_wait_for_no_imports_of_others():
    code = (
        "import sys; from ldmseg_fast.cli import main\n"
        "try: main(['pq', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.endswith(
        "False\n"
    )


def test_the_installed_command_runs():
    command = [sys.executable, "-m", "ldmseg_fast.cli", "--help"]
    assert "predict" in subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_help_groups_every_command_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    places = [text.index(f"\n{heading}:\n") for heading in SECTIONS]
    assert places == sorted(places)
    assert all(f"\n  {name.partition(' ')[0]} " in text for name in COMMANDS)
    assert "examples:" in text and "exit codes:" in text
    grouped = [name for names in SECTIONS.values() for name in names]
    assert {name.partition(" ")[0] for name in COMMANDS} <= set(grouped) and len(grouped) == len(set(grouped))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    examples = importlib.import_module(COMMANDS[name][0]).EXAMPLES
    assert examples and all(example in text for example in examples)
    for example in examples:
        words = shlex.split(example.partition(" > ")[0].partition("    #")[0])
        if words[0] == "ldmseg":
            assert build_parser().parse_args(words[1:]).run


def test_a_table_as_json_is_all_of_stdout(model_dir, scenes, tmp_path, capfd, monkeypatch):
    """`--json` of every command that prints a table."""
    truth = scenes / "annotations" / "panoptic_val2017.json"
    picture = next((scenes / "val2017").iterdir())
    given = scenes / "panoptic_val2017" / f"{picture.stem}.png"
    unknown = str(read_panoptic_png(given).max())
    run = tmp_path / "run" / "logs"
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    commands = {
        "predict": [model_dir, picture, "--out", tmp_path / "p", "--steps", "1", "--format", "labelme"],
        "inpaint": [model_dir, "--image", picture, "--map", given, "--unknown-id", unknown, "--out", tmp_path / "i"],
        "evaluate": [model_dir, "--data", scenes, "--steps", "1"],
        "pq": [truth, truth],
        "data check": [scenes],
        "data export": ["labelme", scenes, tmp_path / "labelme", "--split", "val2017"],
        "data import": ["labelme", tmp_path / "labelme", tmp_path / "imported"],
        "runs": [tmp_path],
    }
    for name, arguments in commands.items():
        assert main([*name.split(), *map(str, arguments), "--json"]) == 0, name
        assert json.loads(capfd.readouterr().out), name
    monkeypatch.chdir(tmp_path)
    assert main(["pq", str(truth), str(truth), "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)
    assert main(["pq", str(truth), str(truth), "--csv", "-"]) == 0
    assert capfd.readouterr().out.startswith("category")
    assert main(["pq", str(truth), str(truth), "--csv", "-", "--json", "-"]) == 2
    assert "--json and --csv would both be written to" in capfd.readouterr().err
    assert not (tmp_path / "-").exists()


def test_a_start_is_quick():
    """Importing the package and `ldmseg --help`, in CPU seconds above Python's own start."""

    def seconds(*arguments: str) -> float:
        code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
        code += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
        command = [sys.executable, "-c", code, sys.executable, *arguments]
        return min(float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) for _ in range(3))

    bare = seconds("-c", "pass")
    assert seconds("-c", "import ldmseg_fast") - bare < 0.3
    assert seconds("-m", "ldmseg_fast.cli", "--help") - bare < 0.3
