"""`ldmseg predict`, `inpaint` and `evaluate` on several ranks: the bytes of one process, whatever dies on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.commands import predict
from ldmseg_fast.distributed.liveness import LOST_RANK
from ldmseg_fast.distributed.shared_run import RUN
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png
from ldmseg_fast.pipeline import LDMSegPipeline
from tests.conftest import make_model
from tests.data.test_shards import write

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import errno, os, sys, time
from ldmseg_fast.cli import main
from ldmseg_fast.commands import predict
write, calls = predict.write_result, []
def slowly(out, picture, *rest):
    calls.append(picture)
    time.sleep(0.4)
    if os.environ.get("FULL") == os.environ.get("RANK") and len(calls) == 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / picture.file.name))
    return write(out, picture, *rest)
predict.write_result = slowly
sys.exit(main(sys.argv[1:]))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]


def start(rank: int, *arguments: object, code: str = "", **more: str) -> subprocess.Popen:
    """One of two ranks, which nobody else ends; `more` says so in Slurm's words where it has some."""
    told = more if "SLURM_PROCID" in more else {"RANK": str(rank), "WORLD_SIZE": "2", **more}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | told
    command = [sys.executable, *(["-c", code] if code else ["-m", "ldmseg_fast.cli"]), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten pictures of uneven sizes and a broken one, with their maps beside them."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for name in ("in", "maps"):
        (folder / name).mkdir()
    for number in range(10):
        size = (20 + 60 * (number % 2), 30 + 10 * number)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "in" / f"p{number}.png")
        ids = np.zeros(size, np.int32)
        ids[:, :15] = 7
        write_panoptic_png(folder / "maps" / f"p{number}.png", ids)
    (folder / "in" / "bad.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def model_dir(model_dir, tmp_path_factory) -> Path:
    """One whose thresholds keep every segment: maps of random weights would be empty."""
    folder = tmp_path_factory.mktemp("many_model") / "model"
    shutil.copytree(model_dir, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["postprocess"] = {"mask_threshold": 0.0, "count_threshold": 1, "overlap_threshold": 0.0}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def whole(pictures, model_dir) -> Path:
    """What one process makes of them."""
    out = pictures / "whole"
    assert main(["predict", str(model_dir), str(pictures / "in"), "--out", str(out), *OPTIONS]) == 1
    return out


OPTIONS = ["--steps", "1", "--batch-size", "2", "--format", "coco-panoptic"]
LARGER = ("data.image_size=32", "image_encoder.picture_scale=2")
SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}


@pytest.mark.serial
@pytest.mark.parametrize("told", ["torchrun's", "Slurm's"])
def test_two_ranks_make_the_bytes_of_one_process(pictures, whole, model_dir, tmp_path, told):
    asked = ["predict", model_dir, pictures / "in", "--out", tmp_path, *OPTIONS]
    more = [SLURM | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} if told == "Slurm's" else {} for n in (0, 1)]
    (code, out, error), other = map(ends, [start(rank, *asked, **more[rank]) for rank in (0, 1)])
    assert (code, other) == (1, (0, "", "")), error
    assert "10 images segmented" in out and "11 pictures in " in out and " on 2 ranks: " in out
    assert "1 could not be segmented:" in error and "bad.jpg: not a readable picture" in error
    assert "predict" not in out.splitlines()[0] and content(tmp_path) == content(whole)


@pytest.mark.serial
def test_under_torchrun_a_killed_rank_is_named_and_a_rerun_does_the_rest(pictures, whole, model_dir, tmp_path):
    asked = ["predict", model_dir, pictures / "in", "--out", tmp_path, *OPTIONS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, sys.executable, "-c", SLOW, *map(str, asked)]
    both = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    claims = f"{RUN}/launch-*/claims/*"
    while len(list(tmp_path.glob(claims))) < 2:
        assert both.poll() is None
        time.sleep(0.05)
    state = json.loads(next(tmp_path.glob(f"{RUN}/launch-*/rank-1")).read_bytes())
    os.kill(state["pid"], signal.SIGKILL)
    error = both.communicate(timeout=60)[1]
    assert both.returncode == 1 and error.count(f"error: rank 1 (process {state['pid']} on ") == 1, error
    assert main([*map(str, asked)]) == 1  # as one process
    assert content(tmp_path) == content(whole)


@pytest.mark.serial
def test_a_full_disk_on_one_rank(pictures, whole, model_dir, tmp_path):
    asked = ["predict", model_dir, pictures / "in", "--out", tmp_path, *OPTIONS]
    found = [ends(each) for each in [start(rank, *asked, code=SLOW, FULL="1") for rank in (0, 1)]]
    assert [code for code, _, _ in found] == [LOST_RANK, 2]
    assert found[0][2] == "" and found[1][2].startswith("error: rank 1: "), found
    assert "No space left on device; free some space" in found[1][2]
    assert found[1][2].count("\n") == 1
    (code, out, _), _ = map(ends, [start(rank, *asked) for rank in (0, 1)])
    assert code == 1 and "of the pictures were complete from an earlier start" in out
    assert content(tmp_path) == content(whole)


@pytest.mark.serial
def test_what_is_wrong_for_all_ranks_is_said_once(pictures, model_dir, tmp_path):
    found = [
        ends(each) for each in [start(r, "predict", model_dir, tmp_path / "x.png", "--out", tmp_path) for r in (0, 1)]
    ]
    assert [code for code, _, _ in found] == [2, LOST_RANK] and found[1][2] == ""
    assert found[0][2] == f"error: {tmp_path}/x.png: no such file or folder\n"


@pytest.mark.serial
def test_what_is_wrong_before_ranks_meet_is_said_once(tmp_path):
    asked = ["predict", "nosuch", tmp_path, "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, sys.executable, "-m", "ldmseg_fast.cli", *map(str, asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("nosuch: no such model folder") == 1, done.stderr


@pytest.mark.serial
def test_json_of_ranks_is_that_of_rank_0(pictures, model_dir, tmp_path):
    asked = ["predict", model_dir, pictures / "in", "--out", tmp_path, *OPTIONS[:4], "--flip", "--json"]
    (code, out, error), other = map(ends, [start(rank, *asked) for rank in (0, 1)])
    assert (code, other) == (1, (0, "", "")), error
    answer = json.loads(out)
    assert sorted(answer["written"]) == [str(tmp_path / f"p{number}.json") for number in range(10)]
    assert len(answer["bad"]) == 1 and len(list(tmp_path.glob("*_agreement.png"))) == 10


@pytest.mark.serial
def test_evaluate_under_srun(model_dir, scenes, tmp_path):
    reports = []
    for world in (1, 2):
        out = tmp_path / str(world)
        asked = ["evaluate", model_dir, "--data", scenes, "--steps", 1, "--batch-size", 2, "--out", out / "results"]
        asked += ["--json", out / "report.json"]
        more = [SLURM | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_NTASKS": str(world)} for n in (0, 1)]
        found = [ends(each) for each in [start(rank, *asked, **more[rank]) for rank in range(world)]]
        assert [code for code, _, _ in found] == [0] * world, found
        assert (" on 2 ranks: " in found[0][1]) == (world == 2)
        report = json.loads((out / "report.json").read_text())
        report.pop("seconds_per_image")
        kept = {name: each for name, each in content(out / "results").items() if not name.startswith(".")}
        reports.append((report, kept))
    assert reports[0] == reports[1]


def run(command: str, model_dir: Path, *arguments: object) -> int:
    return main([command, str(model_dir), *map(str, arguments), "--steps", "1", "--batch-size", "2"])


def test_one_process_goes_on_after_a_kill(pictures, whole, model_dir, tmp_path, monkeypatch, capsys):
    write_result, written = predict.write_result, []

    def interrupted(out, picture, *rest):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(picture.file.name)
        return write_result(out, picture, *rest)

    asked = [pictures / "in", "--out", tmp_path, "--format", "coco-panoptic"]
    monkeypatch.setattr(predict, "write_result", interrupted)
    assert run("predict", model_dir, *asked) == 130
    assert run("predict", model_dir, *asked, "--seed", 3) == 2
    assert "other settings was interrupted here (seed 0, now 3)" in capsys.readouterr().err
    assert run("predict", model_dir, *asked, "--flip", "--scales", 0.5, 1) == 2
    error = capsys.readouterr().err
    assert "(flip False, now True; scales 1.0, now 0.5 1.0)" in error and error.count("\n") == 1
    monkeypatch.setattr(
        predict, "write_result", lambda *given: written.append(given[1].file.name) or write_result(*given)
    )
    assert run("predict", model_dir, *asked) == 1
    assert written[4:] == [f"p{number}.png" for number in range(3, 10)]  # p3 was there, but not all of its batch
    assert "4 of the pictures were complete from an earlier start" in capsys.readouterr().out
    assert content(tmp_path) == content(whole)


def test_tar_files_give_what_their_pictures_give(pictures, whole, model_dir, tmp_path, capsys):
    files = sorted((pictures / "in").glob("p*.png"))
    for number in range(2):
        part = files[5 * number : 5 * number + 5]
        write(tmp_path / f"s-{number}.tar", {f"{file.name}": file.read_bytes() for file in part} | {"x.json": b"{}"})
    assert run("predict", model_dir, f"{tmp_path}/s-{{0..1}}.tar", "--out", tmp_path / "out") == 0
    assert "10 images segmented" in capsys.readouterr().out
    made = content(tmp_path / "out")
    assert len(made) == 30
    for name, each in content(whole).items():
        if name.endswith(".json") and "/" not in name:
            assert json.loads(made[name])["image"] == json.loads(each)["image"]
        elif name.endswith(".png") and "/" not in name:
            assert name in made
    assert run("predict", model_dir, f"{tmp_path}/s-0.tar", "--out", tmp_path / "o", "--format", "labelme") == 2
    assert "unpack" in capsys.readouterr().err
    shutil.copy(tmp_path / "s-0.tar", tmp_path / "t.tar")
    assert run("predict", model_dir, f"{tmp_path}/s-0.tar", tmp_path / "t.tar", "--out", tmp_path / "o") == 2
    assert "would both be written as p0.png" in capsys.readouterr().err


def test_a_list_of_paths(pictures, model_dir, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{pictures}/in/p1.png\n\n{pictures}/in/p0.png\n")
    assert run("predict", model_dir, f"@{tmp_path}/list.txt", "--out", tmp_path / "out") == 0
    assert "2 images segmented" in capsys.readouterr().out
    for content, words in (("x.png".encode("utf-16"), "no text in UTF-8"), (b"\n", "names no picture")):
        (tmp_path / "list.txt").write_bytes(content)
        assert run("predict", model_dir, f"@{tmp_path}/list.txt", "--out", tmp_path / "out") == 2
        assert words in capsys.readouterr().err
    assert run("predict", model_dir, "@none.txt", "--out", tmp_path / "out") == 2
    assert "none.txt" in capsys.readouterr().err


def test_inpaint_takes_folders_and_tars(pictures, model_dir, tmp_path, capsys):
    maps = pictures / "maps"
    given = ["--image", pictures / "in", "--map", maps]
    assert run("inpaint", model_dir, *given, "--unknown-id", 0, "--out", tmp_path / "a") == 1
    said = capsys.readouterr()
    assert "10 maps completed" in said.out and "1 could not be completed:\n" in said.err
    for path in maps.iterdir():
        result, partial = read_panoptic_png(tmp_path / "a" / path.name), read_panoptic_png(path)
        assert (result[partial > 0] == 7).all() and result.shape == partial.shape
    members = {}
    for path in sorted(maps.iterdir()):
        mask = 255 * (read_panoptic_png(path) > 0).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "mask.png")
        members |= {path.name: (pictures / "in" / path.name).read_bytes(), f"{path.stem}.map.png": path.read_bytes()}
        members |= {f"{path.stem}.known.png": (tmp_path / "mask.png").read_bytes()} if path.stem != "p3" else {}
    shard = write(tmp_path / "s.tar", members)
    assert run("inpaint", model_dir, "--image", shard, "--out", tmp_path / "b") == 1
    said = capsys.readouterr()
    assert "9 maps completed" in said.out and "s.tar/p3.png: no p3.known.png in the tar" in said.err
    assert run("inpaint", model_dir, "--image", shard, "--unknown-id", 0, "--out", tmp_path / "c") == 0
    assert len(content(tmp_path / "c")) == 30


def test_inpaint_of_a_folder_with_one_picture_that_is_broken(pictures, model_dir, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    shutil.copy(pictures / "in" / "bad.jpg", tmp_path / "in")
    asked = ["--image", tmp_path / "in", "--map", pictures / "maps", "--unknown-id", 0, "--out", tmp_path / "out"]
    assert run("inpaint", model_dir, *asked, "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["written"] == [] and "bad.jpg: not a readable picture" in said.err


def test_inpaint_gives_the_model_its_own_size_of_pictures(tmp_path, monkeypatch):
    """The image encoder of some models sees more than the networks behind it."""
    sizes, whole = [], LDMSegPipeline.inpaint

    def seen(pipe, images, *rest, **more):
        sizes.extend((pipe.info.picture_size, np.shape(image.pixels)) for image in images)
        return whole(pipe, images, *rest, **more)

    monkeypatch.setattr(LDMSegPipeline, "inpaint", seen)
    model = make_model(
        tmp_path / "model", ("image_encoder.kind=efficientnet_lite", "image_encoder.path=random", *LARGER)
    )
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    ids = np.zeros((300, 300), np.int32)
    ids[:150] = 7
    write_panoptic_png(tmp_path / "map.png", ids)
    asked = ["--image", tmp_path / "a.png", "--map", tmp_path / "map.png", "--unknown-id", 0, "--out", tmp_path / "out"]
    assert run("inpaint", model, *asked) == 0
    assert sizes == [(64, (64, 64, 3))]


def test_a_result_and_a_folder_of_one_name(pictures, model_dir, tmp_path, capsys):
    one = next((pictures / "in").glob("p*.png")).read_bytes()
    shard = write(tmp_path / "s.tar", {"a.jpg": one, "a.png/b.jpg": one})
    assert run("predict", model_dir, shard, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "s.tar/a.png/b.jpg has its results in a folder a.png" in error and error.count("\n") == 1


def test_inpaint_refuses_one_map_for_many(pictures, model_dir, tmp_path, capsys):
    for given, words in (
        ([], "--map: name the panoptic PNG"),
        (["--map", pictures / "maps" / "p0.png", "--unknown-id", 0], "one file for 11 pictures"),
        (["--map", pictures / "maps"], "--known or --unknown-id"),
    ):
        assert run("inpaint", model_dir, "--image", pictures / "in", *given, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_formats_need_all_results_in_one_folder(pictures, model_dir, tmp_path, capsys):
    asked = [pictures / "in", "--out", tmp_path / "out", "--share", tmp_path / "share"]
    assert run("predict", model_dir, *asked, "--format", "labelme") == 2
    assert "leave --share out" in capsys.readouterr().err
    assert run("predict", model_dir, *asked) == 1
    assert len(content(tmp_path / "out")) == 30 and not (tmp_path / "share").exists()


@pytest.mark.serial
@pytest.mark.parametrize("told", ["torchrun's", "Slurm's"])
def test_ranks_take_the_commit_that_the_first_one_finds(pictures, model_dir, tmp_path, told):
    from tests.checkpoints.hub_server import HubServer, Repository

    files, asked = content(model_dir), []

    def move() -> None:
        asked.append(1)
        hub.repositories["me/model"].commit({"README.md": b"another model"})

    with HubServer() as hub:
        hub.repositories["me/model"] = Repository()
        hub.repositories["me/model"].commit(files)
        hub.moves.append((r"GET /me/model/resolve", move))
        own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        words = [["me/model", pictures / "in", "--out", tmp_path / "out", *OPTIONS]] * 2
        names = [own if told == "torchrun's" else own | SLURM | {"SLURM_PROCID": str(rank)} for rank in (0, 1)]
        found = [ends(each) for each in [start(rank, "predict", *words[rank], **names[rank]) for rank in (1, 0)]]
        assert asked and [code for code, _, _ in found] == [0, 1], found
        questions = [line for line in hub.requests if "/api/models/me/model" in line]
        assert len([line for line in questions if line.endswith("/revision/main")]) <= 1, questions
    assert len(list((tmp_path / "out").glob("p*.json"))) == 10
