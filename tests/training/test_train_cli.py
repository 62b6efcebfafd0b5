"""`train.py` from outside: exit codes, one clear line for each mistake, both launchers, several machines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldmseg_fast.checkpoints.shipped import SHIPPED
from ldmseg_fast.checkpoints.tensors import load_weights, save_weights
from ldmseg_fast.train import main
from tests.training.helpers import ROOT, TINY, TRAIN, Job, deepspeed, free_port, losses, torchrun, train_command


@pytest.fixture
def empty_split(scenes: Path, tmp_path: Path) -> Path:
    root = tmp_path / "no-annotations"
    for folder in ("annotations", "train2017", "panoptic_train2017"):
        (root / folder).mkdir(parents=True)
    content = json.loads((scenes / "annotations" / "panoptic_train2017.json").read_text())
    content["annotations"] = []
    (root / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
    return root


MISTAKES = {
    "unknown stage": (["segmenter"], "autoencoder"),
    "unknown option": (["autoencoder", "--resum"], "--resum"),
    "unknown setting": (["autoencoder", "train.step=3"], "did you mean train.steps?"),
    "not key=value": (["autoencoder", "train.steps"], "key=value"),
    "wrong type": (["autoencoder", "train.steps=many"], "a whole number expected"),
    "no such preset": (["autoencoder", "--config", "huge"], "neither a preset"),
    "no data": (["autoencoder", "data.root="], "data.root is missing"),
    "no output": (["autoencoder", "output_dir="], "output_dir is missing"),
    "wrong path": (["autoencoder", "data.root=/nowhere"], "/nowhere"),
    "no such split": (["autoencoder", "data.train_split=train2018"], "train2017, val2017"),
    "no auto-encoder": (["diffusion"], "model.mask_vae"),
    "auto-encoder's path": (["diffusion", "model.mask_vae=/nowhere"], "/nowhere"),
    "nothing to resume": (["autoencoder", "--resume"], "leave out --resume"),
    "no DeepSpeed file": (["autoencoder", "--deepspeed_config", "/nowhere.json"], "/nowhere.json"),
    "batch": (["autoencoder", "train.batch_size=5", "train.accumulation=2"], "multiple of train.accumulation"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str,
    scenes: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    arguments, words = MISTAKES[mistake]
    config = [] if "--config" in arguments else ["--config", str(TINY)]
    assert main([arguments[0], *config, f"data.root={scenes}", f"output_dir={tmp_path / 'run'}", *arguments[1:]]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert words in error


def test_an_empty_split(empty_split: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["autoencoder", "--config", str(TINY), f"data.root={empty_split}", f"output_dir={tmp_path / 'x'}"]) == 2
    assert "the split is empty" in capfd.readouterr().err


def test_dry_run(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["diffusion", "--config", "coco", "--dry-run", "train.batch_size=64"]) == 0
    text = capsys.readouterr().out
    assert "train.batch_size=64" in text and '"train_batch_size": 64' in text
    assert re.search(r"unet +815,556,484", text)  # 815.6 M
    assert len(re.findall(r"ZeRO \d: +\d+\.\d+", text)) == 4 and "train.checkpointing=blocks" in text
    assert main(["autoencoder", "--dry-run"]) == 0
    assert re.search(r"mask_vae +334,600", capsys.readouterr().out)


def test_dry_run_of_one_step_from_an_autoencoder_alone(autoencoder: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["one_step", "--config", str(TINY), "--dry-run", "few_step.steps=2"]
    assert main([*command, f"model.mask_vae={autoencoder}"]) == 0
    told = capsys.readouterr().out
    assert "num_inference_steps=2" in told and re.search(r"unet +[\d,]+", told)
    assert main(command) == 2
    assert "model.init_from is missing" in capsys.readouterr().err


def test_dry_run_says_what_the_start_would_say(capfd: pytest.CaptureFixture, scenes: Path, tmp_path: Path) -> None:
    """The mistakes that are the folders' are the same line with --dry-run and without, and nothing is left behind."""
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    (used / "model_index.json").write_text("{}")
    file.touch()
    run = tmp_path / "new" / "run"
    for settings, words in (
        ((f"data.root={tmp_path / 'none'}", f"output_dir={run}"), "none"),
        ((f"data.root={tmp_path}", f"output_dir={run}"), str(tmp_path)),
        ((f"data.root={scenes}", "data.train_split=train2018", f"output_dir={run}"), "train2017, val2017"),
        ((f"data.root={scenes}", f"output_dir={file}"), "it is no folder"),
        ((f"data.root={scenes}", f"output_dir={used}"), "holds a model"),
        ((f"data.root={scenes}", f"output_dir={scenes}"), "choose another path"),
        ((f"data.root={scenes}", f"output_dir={run}", "--resume"), "leave out --resume"),
        ((f"data.root={scenes}", f"output_dir={run}", f"train.keep={2**31}", f"train.steps={2**31}",
          "train.save_every=1"), "are free there"),
    ):  # fmt: skip
        said = []
        for more in ((), ("--dry-run",)):
            assert main(["autoencoder", "--config", str(TINY), *settings, *more]) == 2, settings
            said.append(capfd.readouterr().err.strip())
        start, rehearsal = (re.sub(r"[\d.]+ GiB are free", "are free", text) for text in said)
        assert start == rehearsal and words in start and len(start.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "used"]
    settings = (f"data.root={scenes}", f"output_dir={run}")
    assert main(["autoencoder", "--config", str(TINY), *settings, "--dry-run"]) == 0
    told = capfd.readouterr().out
    assert re.search(r"trains on \d+ images", told) and f"output_dir={run} can be written" in told
    assert main(["autoencoder", "--config", str(TINY), f"output_dir={file / 'run'}", "--dry-run"]) == 2
    assert "a part of the path is no folder" in capfd.readouterr().err
    assert not run.parent.exists()


@pytest.fixture(scope="session")
def contradiction(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scenes in which the first category is stuff and not a thing, or the other way round."""
    root = tmp_path_factory.mktemp("training") / "contradiction"
    shutil.copytree(scenes, root)
    for path in (root / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        content["categories"][0]["isthing"] = 1 - content["categories"][0]["isthing"]
        path.write_text(json.dumps(content))
    return root


PYRAMID = "image_encoder.kind=efficientnet_lite"
LITE0 = SHIPPED / "efficientnet_lite0" / "model.safetensors"
REFUSED = {
    "no encoder": ("diffusion", [PYRAMID, "image_encoder.path=/nowhere.safetensors"], "leave image_encoder.path out"),
    "another network": ("diffusion", [PYRAMID, "image_encoder.path={unet}"], "image_encoder.path="),
    "another variant": (
        "diffusion",
        [PYRAMID, f"image_encoder.path={LITE0}", "image_encoder.variant=2"],
        "or give the .safetensors file of the variant that image_encoder.variant names",
    ),
    "a folder": ("diffusion", [PYRAMID, "image_encoder.path={scenes}"], "image_encoder.path="),
    "thing and stuff": (
        "autoencoder",
        ["data.root={scenes},{contradiction}", "mask_vae.num_categories={categories}"],
        "correct one isthing",
    ),
    "categories": ("autoencoder", ["mask_vae.num_categories=3"], "mask_vae.num_categories=3"),
    "best": ("autoencoder", ["train.best=class_pq"], "train.best=class_pq"),
    "muon": ("autoencoder", ["train.optimizer=muon"], "train.optimizer=muon: no trained matrix"),
    "sigma": ("diffusion", ["scheduler.init_noise_sigma=0"], "scheduler.init_noise_sigma=0: stage diffusion"),
    "ignored": ("autoencoder", ["few_step.steps=4"], "few_step.steps=4: only stages one_step, distillation use it"),
    "hard examples": ("one_step", ["diffusion.hard_examples=0.5"], "only stage diffusion uses it; leave it out"),
    "prefix": ("diffusion", ["train.lr_factors=unet.nothing:2"], "no trained parameter's name starts with"),
    "nothing trained": ("autoencoder", ["train.lr_factors=mask_vae:0"], "nothing is trained"),
    "noise scale": ("autoencoder", ["train.noise_scale=true"], "train.noise_scale=true"),
    "no auto-encoder": ("diffusion", ["model.mask_vae=/nowhere"], "/nowhere"),
    "encoder's stride": ("diffusion", ["image_encoder.widths=8,16", "image_encoder.blocks=0,1"], "divides the picture"),
    "weights are missing": ("diffusion", ["model.init_from={damaged}"], "1 missing: conv_out.bias"),
    "one step, weights are missing": ("one_step", ["model.init_from={damaged}"], "1 missing: conv_out.bias"),
    "teacher's steps": ("distillation", ["model.init_from={model}", "few_step.teacher_steps=1"], "few_step.teacher_"),
    "teacher's latents": ("distillation", ["few_step.new_autoencoder=true"], "a teacher's latents are its own"),
    "compiler": ("diffusion", ["train.compile=blocks", "train.compile_backend=x"], "train.compile_backend=x: one of"),
    "fp8": ("diffusion", ["train.fp8=true"], "train.fp8=true goes with train.precision=bf16, not with fp32"),
    "tracker": ("autoencoder", ["train.trackio=x"], "train.trackio=x: `pip install trackio`"),
    "CLIP": (
        "diffusion",
        ["unet.conditioning=clip_text", "unet.cross_attention_dim=16", "conditioning.path=/nowhere"],
        "conditioning.path=/nowhere",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_dry_run_builds_what_the_start_would_build(
    mistake: str,
    scenes: Path,
    contradiction: Path,
    autoencoder: Path,
    diffusion: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not go together is the same line with --dry-run and without."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    stage, settings, words = REFUSED[mistake]
    places = {"scenes": scenes, "contradiction": contradiction, "model": diffusion, "damaged": tmp_path / "damaged"}
    if mistake.endswith("weights are missing"):
        shutil.copytree(diffusion, places["damaged"])
        weights = load_weights(diffusion / "unet" / "model.safetensors")
        del weights["conv_out.bias"]
        save_weights(weights, places["damaged"] / "unet" / "model.safetensors")
    annotations = json.loads((scenes / "annotations" / "panoptic_train2017.json").read_text())
    words_of = places | {"unet": diffusion / "unet/model.safetensors", "categories": len(annotations["categories"])}
    start = [f"model.mask_vae={autoencoder}"] if stage in ("diffusion", "one_step") else []
    fixed = ["--config", TINY, f"data.root={scenes}", f"output_dir={tmp_path / 'run'}", *start]
    said = []
    for more in ((), ("--dry-run",)):
        command = [stage, *fixed, *(setting.format(**words_of) for setting in settings), *more]
        assert main([*map(str, command)]) == 2
        said.append(capfd.readouterr().err.strip())
    assert said[0] == said[1] and words in said[0] and len(said[0].splitlines()) == 1


def test_dry_run_takes_what_trains(scenes: Path, autoencoder: Path, diffusion: Path, tmp_path: Path) -> None:
    start, model = f"model.mask_vae={autoencoder}", f"model.init_from={diffusion}"
    for stage, *settings in (
        ("diffusion", start, PYRAMID, "train.optimizer=muon"),
        ("diffusion", start, "unet.conditioning=learned", "unet.cross_attention_dim=16"),
        ("diffusion", model, "model.attention=triton"),  # of a machine with a GPU
        ("one_step", start, "few_step.matching=none", "train.optimizer=adamw_8bit"),
        ("one_step", start, model, "few_step.new_autoencoder=true", "few_step.matching=none"),
        ("distillation", model, "train.accumulation=2", "train.noise_scale=true"),
    ):
        fixed = ["--config", str(TINY), f"data.root={scenes}", f"output_dir={tmp_path / 'run'}"]
        assert main([stage, *fixed, *settings, "--dry-run"]) == 0, settings
    assert not any(tmp_path.iterdir())


def test_dry_run_merges_a_deepspeed_file(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 12345}}))
    assert main(["autoencoder", "--deepspeed", "--deepspeed_config", str(file), "--dry-run"]) == 0
    assert '"reduce_bucket_size": 12345' in capsys.readouterr().out


@pytest.mark.serial
def test_ranks_speak_once(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    settings = ["train.batch_size=6", "train.accumulation=2"]
    job = start(deepspeed(2, *train_command("autoencoder", tmp_path / "run", scenes, *settings)))
    assert job.wait() == 2
    lines = [line for line in job.output.splitlines() if "error: " in line]
    assert len(lines) == 1 and "train.batch_size=4 can" in lines[0]
    assert "Traceback" not in job.output and not job.members()


@pytest.mark.serial
def test_two_machines_under_torchrun(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    """Two launchers with node ranks 0 and 1 on this machine; the result is that of one process."""
    port, folder = free_port(), tmp_path / "run"
    rendezvous = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port]
    jobs = []
    for node in (0, 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--node_rank", node]
        jobs.append(start([*launcher, *train_command("autoencoder", folder, scenes, "train.steps=3")]))
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    state = json.loads((folder / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["world_size"] == 2 and len(losses(folder)) == 3


@pytest.mark.soak
def test_two_machines_under_torchrun_rendezvous(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "7"]
    jobs = []
    for _ in (0, 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, *rendezvous]
        jobs.append(start([*launcher, *train_command("autoencoder", tmp_path / "run", scenes, "train.steps=3")]))
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output


@pytest.mark.soak
def test_two_machines_under_deepspeed_hostfile(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    """DeepSpeed's launcher on each machine by itself (--no_ssh), with one hostfile."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port, folder = free_port(), tmp_path / "run"
    jobs = []
    for node in (0, 1):
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--hostfile",
            hosts,
            "--no_ssh",
            "--node_rank",
            node,
        ]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", port]
        jobs.append(start([*launcher, *train_command("autoencoder", folder, scenes, "train.steps=3")]))
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    state = json.loads((folder / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["world_size"] == 2


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_both_stages_under_both_launchers(
    launcher: Callable,
    scenes: Path,
    tmp_path: Path,
    start: Callable[..., Job],
) -> None:
    job = start(launcher(2, *train_command("autoencoder", tmp_path / "first", scenes)))
    assert job.wait() == 0, job.output
    settings = [f"model.mask_vae={tmp_path / 'first'}", "train.zero_stage=2"]
    job = start(launcher(2, *train_command("diffusion", tmp_path / "second", scenes, *settings)))
    assert job.wait() == 0, job.output
    assert f"model folder: {tmp_path / 'second'}" in job.output


def test_an_empty_folder_is_refused_quickly(tmp_path: Path, scenes: Path) -> None:
    """Before the model is built or DeepSpeed imported."""
    code = (
        "import sys, time; import torch; start = time.process_time(); from ldmseg_fast.train import main; "
        "code = main(sys.argv[1:]); assert 'deepspeed' not in sys.modules; print(code, time.process_time() - start)"
    )
    command = [sys.executable, "-c", code, *map(str, train_command("autoencoder", tmp_path, scenes, "--resume")[1:])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    exit_code, seconds = done.stdout.split()
    assert exit_code == "2" and float(seconds) < 5 and "is empty" in done.stderr


def test_the_script_is_where_the_readme_says() -> None:
    assert TRAIN.relative_to(ROOT).as_posix() == "ldmseg_fast/train.py"
