"""Every example runs, as a user starts it, on tiny input."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.panoptic.format import read_panoptic_png
from tests.checkpoints.test_init_from import SD14, write_stable_diffusion
from tests.conftest import NARROW

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SHORT = [
    "train.steps=2",
    "train.batch_size=4",
    "train.warmup=1",
    "train.zero_stage=0",
    "train.precision=fp32",
    "train.threads=1",
    "data.val_limit=2",
    "data.num_workers=0",
    "loss.num_points=64",
]


def run(*words: object, cwd: Path = ROOT, **variables: str) -> str:
    """Runs a command from `cwd` with this Python and this checkout; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "LAUNCH": sys.executable} | variables
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, text[-4000:]
    return text


def first_scene(scenes: Path) -> tuple[Path, Path]:
    """The first validation picture and its map."""
    name = sorted((scenes / "val2017").iterdir())[0].name
    return scenes / "val2017" / name, scenes / "panoptic_val2017" / name


def test_predict(scenes, tmp_path):
    picture, _ = first_scene(scenes)
    text = run(sys.executable, EXAMPLES / "predict.py", picture, tmp_path)
    ids = read_panoptic_png(tmp_path / picture.name)
    assert text.count("segment ") == len(np.unique(ids[ids > 0])) > 0
    assert Image.open(tmp_path / f"{picture.stem}_overlay.png").size == (64, 64)


def test_inpaint(scenes, tmp_path):
    picture, truth = first_scene(scenes)
    text = run(sys.executable, EXAMPLES / "inpaint.py", picture, truth, tmp_path)
    share = re.match(r"(\d+) % of the hidden pixels", text.splitlines()[-1])
    assert share and int(share[1]) > 0
    given = np.ones((64, 64), bool)
    given[16:48, 16:48] = False
    assert (read_panoptic_png(tmp_path / truth.name) == read_panoptic_png(truth))[given].all()


def test_recipe_of_scenes_with_categories(tmp_path):
    """From scenes of both versions to small weights."""
    pytest.importorskip("scipy")
    counts = {"SCENES": "16", "OLD_SCENES": "16", "IMAGES": "2"}
    recipe = ["bash", EXAMPLES / "recipes" / "scenes.sh", tmp_path, *NARROW, *SHORT]
    assert "PQ of the dropped pixels alone" in run(*recipe, **counts)
    for scenes in ("scenes2", "scenes1"):
        report = json.loads((tmp_path / f"{scenes}.json").read_text(encoding="utf-8"))
        assert report["images"] == 2 and "class_aware" in report
    card = (tmp_path / "shipped" / "model" / "README.md").read_text(encoding="utf-8")
    assert card.count("## training") == 3 and "things (19)" in card


def test_recipe_of_photographs(scenes, tmp_path):
    """Two sets, of which one has no categories that count."""
    (tmp_path / "others").symlink_to(scenes)
    sets = f"{scenes}:train2017:val2017,{tmp_path / 'others'}:train2017:"
    small = [*NARROW, "data.image_size=32", "unet.sample_size=8", *SHORT]
    recipe = ["bash", EXAMPLES / "recipes" / "photographs.sh", tmp_path / "out", sets, "others", "14", *small]
    run(*recipe)
    card = (tmp_path / "out" / "shipped" / "model" / "README.md").read_text(encoding="utf-8")
    assert card.count("## training") == 3 and "data.paste=0.2" in card
    assert "resumed at step 2 of 2" in run(*recipe)


def test_recipe_of_photographs_on_a_gpu(scenes, tmp_path):
    """A call without enough time says so and the next one goes on; every test set has a report."""
    (tmp_path / "others").symlink_to(scenes)
    sets, others = f"{scenes}:train2017:val2017", f"{tmp_path / 'others'}:train2017:"
    widths = ["mask_vae.widths=8,8,16,16", "image_encoder.widths=8,8,16,16"]
    small = [*NARROW, *widths, "data.image_size=64", "unet.sample_size=8", "unet.norm_groups=8", *SHORT]
    script = EXAMPLES / "recipes" / "photographs_256.sh"
    recipe = ["bash", script, tmp_path / "out", f"{sets},{others}", "others", "14", "train.compile=none", *small]
    once = ["bash", "-c", 'rc=0; "$@" || rc=$?; [ $rc = 143 ]', "once", *recipe]
    run(*once, SECONDS_A_CALL="1")
    run(*recipe)
    reports = tmp_path / "out"
    assert [path.name for path in reports.glob("*.json")] == [f"{scenes.name}-val2017.json"]
    assert "class_aware" in json.loads(next(reports.glob("*.json")).read_text(encoding="utf-8"))
    assert "resumed at step 2 of 2" in run(*recipe, TESTS=f"{others}val2017")
    assert "class_aware" not in json.loads((reports / "others-val2017.json").read_text(encoding="utf-8"))
    card = (reports / "shipped" / "model" / "README.md").read_text(encoding="utf-8")
    assert card.count("## training") == 2 and "--config photographs_256" in card


def test_recipes_of_generated_scenes(tmp_path):
    """tiny.sh, a second time too, and one_step.sh on its result."""
    pytest.importorskip("scipy")
    counts = {"AUTOENCODER_SCENES": "16", "DIFFUSION_SCENES": "16", "IMAGES": "2"}
    recipe = ["bash", EXAMPLES / "recipes" / "tiny.sh", tmp_path / "tiny", *NARROW, *SHORT]
    run(*recipe, **counts)
    report = json.loads((tmp_path / "tiny" / "diffusion.json").read_text(encoding="utf-8"))
    assert report["images"] == 2
    assert "resumed at step 2 of 2" in run(*recipe, **counts)
    model, data = tmp_path / "tiny" / "diffusion", tmp_path / "tiny" / "scenes20k"
    text = run("bash", EXAMPLES / "recipes" / "one_step.sh", model, data, tmp_path / "short", *SHORT, **counts)
    assert "PQ of the dropped pixels alone" in text
    card = (tmp_path / "short" / "shipped" / "model" / "README.md").read_text(encoding="utf-8")
    assert card.count("## training") == 4


def test_recipe_of_coco(scenes, tmp_path):
    """coco.sh with a Stable Diffusion folder of a few kilobytes: first what a dry run says, then both trainings."""
    stable_diffusion = write_stable_diffusion(tmp_path / "sd", SD14)
    coco = tmp_path / "coco"
    coco.mkdir()
    for folder in scenes.iterdir():
        (coco / folder.name).symlink_to(folder)
    small = [
        "data.image_size=64",
        "mask_vae.widths=8,8,16,16",
        "mask_vae.decoder_width=16",
        "mask_vae.norm_groups=4",
        "train.compile=none",
        "num_inference_steps=2",
        *SHORT,
    ]
    recipe = ["bash", EXAMPLES / "recipes" / "coco.sh", coco, stable_diffusion, tmp_path / "out", *small]
    assert run(*recipe, DRY_RUN="--dry-run").count("parameters:") == 2
    assert not (tmp_path / "out").exists()
    text = run(*recipe, SIZE="64")
    assert "image latents of 24 pictures" in text
    report = json.loads((tmp_path / "out" / "diffusion.json").read_text(encoding="utf-8"))
    assert report["images"] == 8 and "class_aware" in report
    assert (tmp_path / "out" / "results" / "panoptic_classes.json").is_file()


def test_own_data(scenes, tmp_path):
    """The page's Python, then each of its commands with short settings."""
    page = (EXAMPLES / "own_dataset.md").read_text(encoding="utf-8")
    (tmp_path / "my_masks").mkdir()
    (tmp_path / "my_pictures").symlink_to(scenes / "train2017")
    for path in (scenes / "panoptic_train2017").iterdir():
        _, numbered = np.unique(read_panoptic_png(path), return_inverse=True)
        Image.fromarray(numbered.reshape(64, 64).astype(np.uint8)).save(tmp_path / "my_masks" / path.name)
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    run(sys.executable, "-c", script, cwd=tmp_path)
    assert len(list((tmp_path / "my_data" / "val2017").iterdir())) == 3
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) == 6
    for words in commands:
        if words[0] == "ldmseg":
            run(sys.executable, "-m", "ldmseg_fast.cli", *words[1:], cwd=tmp_path)
        else:
            run(sys.executable, ROOT / words[1], *words[2:], *NARROW, *SHORT, cwd=tmp_path)
    assert (tmp_path / "errors.html").is_file() and len(list((tmp_path / "results").glob("*.json"))) == 24


@pytest.mark.soak
def test_ray_predict(scenes, model_dir, tmp_path):
    """Two actors of a local Ray, with a picture that is broken; a second start does what is missing."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'ray[data]')")
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    for path in sorted((scenes / "train2017").iterdir())[:6]:
        (pictures / path.name).symlink_to(path)
    asked = [sys.executable, EXAMPLES / "ray_predict.py", pictures, "--out", out, "--model", model_dir]
    asked += ["--steps", "1", "--batch-size", "2", "--actors", "2", "--cpus", "0.5"]
    assert "6 images segmented" in run(*asked, OMP_NUM_THREADS="1")
    one = tmp_path / "one"
    run(sys.executable, "-m", "ldmseg_fast.cli", "predict", model_dir, pictures, "--out", one, *asked[7:11])
    assert len(list(one.iterdir())) == 18
    for path in one.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    sorted(out.glob("*.json"))[0].unlink()
    (pictures / "bad.png").write_bytes(b"no picture")
    asked = list(map(str, asked))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "5 of 7 pictures are there already" in done.stdout, done.stderr[-3000:]
    assert "1 images segmented" in done.stdout and "bad.png: not a readable picture" in done.stderr
