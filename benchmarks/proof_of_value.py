"""Shows that a change alters no number: python benchmarks/proof_of_value.py BEFORE AFTER [--work FOLDER] [--quick]

BEFORE and AFTER are two checkouts. Each runs the same public commands on the same generated scenes:

- 20 steps of every stage on one and on two ranks, a run resumed in the middle, and one under ZeRO 3 with accumulation,
  checkpointing, augmentation and the paper's targets;
- `ldmseg predict` with every solver, with a cache and with samples, in bfloat16, and from ONNX graphs;
- `ldmseg inpaint`, `evaluate` (with classes and seeds, with dropped blocks, of an auto-encoder) and `pq`;
- the settings and the DeepSpeed configuration of both presets.

Settings, logged losses, weights, optimiser states, pictures, maps and reports must be equal bit for bit. Only times and
paths are left out. Not compared: Triton kernels and TensorRT engines, which need a GPU, and C++ that was not compiled
again.

Exit code 0: equal; 1: something differs, which is named; 2: a command failed, or what it made could show no change.

Run it on one idle machine with one Python environment. `git worktree add ../before main` makes the first checkout; copy
its compiled `ldmseg_fast/_C*.so`, or build it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.measuring import proof_records
from benchmarks.measuring.proof_records import ProofError, differences, digest, documents, losses, maps, plain
from ldmseg_fast.distributed.ending import run_command

SETTINGS = {
    "data": {"image_size": 32, "num_workers": 0, "cache": True, "id_assignment": "position", "val_limit": 8},
    "mask_vae": {
        "num_bits": 5, "num_slots": 32, "widths": [8, 16, 16], "decoder_width": 16, "num_upscalers": 1,
        "norm_groups": 4, "scaling_factor": 0.2,
    },
    "image_encoder": {
        "kind": "conv", "latent_channels": 8, "widths": [8, 8, 16], "blocks": [0, 1, 1], "norm_groups": 4,
        "downsampling": 4, "scaling_factor": 1.0,
    },
    "unet": {
        "sample_size": 8, "in_channels": 16, "block_out_channels": [16, 16], "attention": [False, True],
        "num_heads": [2, 2], "layers_per_block": 1, "norm_groups": 4,
    },
    "loss": {"num_points": 64},
    "train": {
        "steps": 20, "batch_size": 4, "learning_rate": 1e-3, "warmup": 2, "ema": 0.9, "precision": "fp32",
        "zero_stage": 1, "validate_every": 20, "save_every": 10, "log_every": 1, "threads": 1,
    },
    # 20 steps give no probability above a half: with lower thresholds their maps still have segments
    "postprocess": {"mask_threshold": 0.0, "count_threshold": 1, "overlap_threshold": 0.0},
    "num_inference_steps": 2,
}  # fmt: skip
STAGES = ("autoencoder", "diffusion", "one_step", "distillation")
# what the runs above leave at its default, together
OPTIONS = [
    "train.zero_stage=3", "train.accumulation=2", "train.checkpointing=blocks", "train.clip=0.1",
    "train.schedule=constant", "train.no_decay=norm,bias", "train.lr_factors=unet.conv_in:10",
    "scheduler.prediction_type=epsilon", "diffusion.task_loss=0.1", "diffusion.image_noise=0.1",
    "data.id_assignment=random", "data.scale_min=0.5", "data.color_jitter=0.2", "data.num_workers=1",
    "data.cache=false",
]  # fmt: skip
PREDICTIONS = {
    "as it is": [],
    "2 steps": ["--steps", 2],
    "dpmpp_2m": ["--steps", 4, "--solver", "dpmpp_2m"],
    "heun, another size": ["--steps", 3, "--solver", "heun", "--size", 96],
    "cache": ["--steps", 4, "--cache-interval", 2, "--batch-size", 3],
    "samples": ["--steps", 3, "--samples", 3, "--eta", 0.5, "--seed", 7],
}
QUICK_PREDICTIONS = ("as it is", "2 steps")
BFLOAT16 = """
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline

model, pictures, out = sys.argv[1:]
pipe = LDMSegPipeline.from_pretrained(model, dtype=torch.bfloat16)
paths = sorted(Path(pictures).iterdir())
for path, result in zip(paths, pipe([Image.open(path) for path in paths])):
    Path(out).mkdir(exist_ok=True)
    Image.fromarray(np.asarray(result.segmentation, np.uint8)).save(Path(out, path.name))
"""
PROTOCOL = "protocol"  # the key of a record's fingerprint of this file


class Checkout:
    """Runs one tree of the project through its public commands."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work = root.resolve(), work
        if not (self.root / "ldmseg_fast" / "train.py").is_file():
            raise ProofError(f"{root}: no checkout of ldmseg_fast; give the folder that holds setup.py")
        work.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }
        where = "import ldmseg_fast; from ldmseg_fast.native import _C; print(ldmseg_fast.__file__, _C is not None)"
        path, compiled = self.run("-c", where).split()[-2:]
        if not Path(path).is_relative_to(self.root):
            raise ProofError(f"{root}: Python imports {path} in its place; run this outside of any checkout")
        if compiled != "True":
            raise ProofError(f"{root}: not compiled; run python setup.py build_ext --inplace there")

    def run(self, *command: Any) -> str:
        """Runs Python with `command` and returns what it printed on stdout.

        Raises:
            ProofError: its exit code is not 0.
        """
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=self.work, env=self.environment, capture_output=True, check=False)
        if done.returncode:
            text = (done.stdout + done.stderr).decode(errors="replace")[-4000:]
            raise ProofError(f"exit code {done.returncode} of {' '.join(words)} in {self.root}\n{text}")
        return done.stdout.decode()

    def ldmseg(self, *command: Any) -> None:
        """Runs `ldmseg COMMAND`."""
        self.run("-m", "ldmseg_fast.cli", *command)

    def train(self, stage: str, ranks: int, *settings: str, name: str = "", resume: bool = False) -> Path:
        """Trains a stage and returns its folder, `name` or STAGE-RANKS."""
        folder = self.work / (name or f"{stage}-{ranks}")
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", _free_port()]
        script = [self.root / "ldmseg_fast" / "train.py", stage, "--config", self.work / "settings.yaml"]
        fixed = [f"data.root={self.work / 'scenes'}", f"output_dir={folder}", *(["--resume"] if resume else [])]
        self.run(*(launcher if ranks > 1 else []), *script, *fixed, *settings)
        return folder

    def defaults(self, preset: str) -> dict[str, Any]:
        """Returns every setting of a preset, and the DeepSpeed configuration that they mean."""
        command = [self.root / "ldmseg_fast" / "train.py", "diffusion", "--config", preset, "--dry-run"]
        text = self.run(*command)
        found: dict[str, Any] = dict(re.findall(r"^(\w+(?:\.\w+)*)=(.*)$", text, re.MULTILINE))
        configuration = re.search(r"^DeepSpeed configuration[^{]*(\{.*?^\})", text, re.MULTILINE | re.DOTALL)
        if not found or configuration is None:
            raise ProofError(f"{self.root}: --dry-run prints no settings or no DeepSpeed configuration")
        return found | {"DeepSpeed": json.loads(configuration[1])}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(root: Path, work: Path, quick: bool = False) -> dict[str, Any]:
    """Returns everything that must stay equal, by name.

    Args:
        root: a checkout.
        work: an empty folder for what its commands write.
        quick: one rank, no options, no export, fewer predictions and evaluations.

    Raises:
        ProofError: a command ended with another exit code than 0, or what it made could show no change.
    """
    tree = Checkout(root, work)
    found: dict[str, Any] = {}
    # checkouts from before version 2 have no such option
    known = "--version" in tree.run("-m", "ldmseg_fast.cli", "data", "scenes", "--help")
    version = ["--version", 1] if known else []
    tree.ldmseg("data", "scenes", work / "scenes", "--images", 24, "--size", 32, "--seed", 3, *version)
    found["scenes"] = digest(work / "scenes")
    (work / "settings.yaml").write_text(json.dumps(SETTINGS), encoding="utf-8")
    for preset in ("tiny",) if quick else ("tiny", "coco"):
        found[f"settings of {preset}"] = tree.defaults(preset)
    found |= measure_training(tree, quick)
    found |= measure_prediction(tree, quick)
    found |= measure_evaluation(tree, quick)
    if not quick:
        found |= measure_graphs(tree)
    return found


def measure_training(tree: Checkout, quick: bool) -> dict[str, Any]:
    """Losses and states of every stage on one and on two ranks, of a resumed run, and of one with options."""
    found: dict[str, Any] = {}
    work = tree.work

    def add(name: str, folder: Path) -> None:
        found[f"{name}: losses"] = losses(folder)
        states = digest(folder, "**/*.safetensors", "pictures/*.png")
        # checkpoints keep the generators of Python and numpy too, which training neither seeds nor draws from
        states = {path: sha256 for path, sha256 in states.items() if not Path(path).name.startswith("random-")}
        found[f"{name}: weights, states and pictures"] = states
        found[f"{name}: configuration"] = documents(work, folder, "*.json", "*/config.json")

    for ranks in (1,) if quick else (1, 2):
        autoencoder = tree.train("autoencoder", ranks)
        for stage in STAGES:
            folder = autoencoder
            if stage == "diffusion":
                folder = tree.train(stage, ranks, f"model.mask_vae={autoencoder}", "diffusion.inpainting=0.5")
            elif stage != "autoencoder":
                folder = tree.train(stage, ranks, f"model.init_from={work / f'diffusion-{ranks}'}")
            add(f"{stage}, {ranks} ranks", folder)
    if not quick:
        resumed = work / "resumed"
        shutil.copytree(work / "diffusion-1", resumed)
        shutil.rmtree(resumed / "checkpoints" / "step-00000020")
        made_from = (f"model.mask_vae={work / 'autoencoder-1'}", "diffusion.inpainting=0.5")
        add("resumed", tree.train("diffusion", 1, *made_from, name="resumed", resume=True))
        made_from = (f"model.mask_vae={work / 'autoencoder-2'}", *OPTIONS)
        add("with options, 2 ranks", tree.train("diffusion", 2, *made_from, name="options"))
    return found


def measure_prediction(tree: Checkout, quick: bool) -> dict[str, Any]:
    """Maps, overlays and JSONs of the shipped and of the trained model, and a completed map."""
    found: dict[str, Any] = {}
    work = tree.work
    pictures = work / "scenes" / "val2017"
    for model in ("tiny", work / "diffusion-1"):
        for name, options in PREDICTIONS.items():
            if name in QUICK_PREDICTIONS or (not quick and model == "tiny"):
                out = work / f"maps of {Path(model).name}, {name}"
                tree.ldmseg("predict", model, pictures, "--out", out, *options)
                found[f"predict, {Path(model).name}, {name}"] = maps(out)
    picture = sorted(pictures.iterdir())[0]
    given = sorted((work / "scenes").rglob("panoptic_val2017/*.png"))[0]
    truth = json.loads((work / "scenes" / "annotations" / "panoptic_val2017.json").read_text(encoding="utf-8"))
    (unknown,) = (entry["segments_info"][0]["id"] for entry in truth["annotations"] if entry["file_name"] == given.name)
    inpaint = ["--image", picture, "--map", given, "--unknown-id", unknown, "--out", work / "completed"]
    tree.ldmseg("inpaint", "tiny", *inpaint)
    found["inpaint"] = digest(work / "completed")
    if not quick:
        tree.run("-c", BFLOAT16, "tiny", pictures, work / "bfloat16")
        found["predict, tiny, bfloat16"] = maps(work / "bfloat16")
    return found


def measure_evaluation(tree: Checkout, quick: bool) -> dict[str, Any]:
    """Reports and result files of `ldmseg evaluate`, and what `ldmseg pq` says of them."""
    found: dict[str, Any] = {}
    work = tree.work
    scenes, report = work / "scenes", work / "report.json"

    def evaluate(name: str, model: Any, *options: Any) -> None:
        tree.ldmseg("evaluate", model, "--data", scenes, "--json", report, *options)
        found[f"evaluate, {name}"] = plain(json.loads(report.read_text(encoding="utf-8")), work)

    for model in ("tiny", work / "diffusion-1"):
        name = Path(model).name
        results = work / f"results of {name}"
        evaluate(name, model, "--out", results, "--class-aware", "GT", "--seeds", 2)
        found[f"results of evaluate, {name}"] = maps(results, "*/*.png", "*.png")
        found[f"result files of evaluate, {name}"] = documents(work, results, "*.json")
        truth = scenes / "annotations" / "panoptic_val2017.json"
        tree.ldmseg("pq", truth, results / "panoptic_seed0.json", "--boundary", "--class-agnostic", "--json", report)
        found[f"pq, {name}"] = plain(json.loads(report.read_text(encoding="utf-8")), work)
    if not quick:
        evaluate("tiny, dropped blocks", "tiny", "--inpainting", "--limit", 4)
        evaluate("auto-encoder", work / "autoencoder-1", "--ids", "random")
    return found


def measure_graphs(tree: Checkout) -> dict[str, Any]:
    """Maps from ONNX graphs: the whole sampler in one graph, and step by step."""
    found: dict[str, Any] = {}
    work = tree.work
    for precision in ("fp32", "fp16"):
        graphs = work / f"graphs-{precision}"
        settings = ["--precision", precision, "--no-parity", "--head", "both", "--sampler-steps", "2"]
        tree.run(tree.root / "export" / "to_onnx.py", "tiny", "--out", graphs, *settings)
        for steps in (1, 2):
            out = work / f"maps of graphs, {precision}, {steps}"
            backend = ["--backend", "onnxruntime", "--engine-dir", graphs, "--steps", steps]
            tree.ldmseg("predict", "tiny", work / "scenes" / "val2017", "--out", out, *backend)
            found[f"predict from graphs, {precision}, {steps} steps"] = maps(out)
    return found


def protocol(quick: bool) -> str:
    """Returns a fingerprint of what is measured and how."""
    sources = (Path(path).read_bytes() for path in (__file__, proof_records.__file__))
    return hashlib.sha256(b"".join(sources) + bytes([quick])).hexdigest()[:16]


def measured(name: str, root: Path, work: Path, quick: bool) -> dict[str, Any]:
    """Returns what was found in a checkout: from the record in `work`, or measured now and recorded there.

    Raises:
        ProofError: the record was made by another version of this file, or with another --quick.
    """
    record = work / "found.json"
    if record.is_file():
        print(f"{name}: measured before ({record})", flush=True)
        found = json.loads(record.read_text(encoding="utf-8"))
        if found.pop(PROTOCOL, None) != protocol(quick):
            raise ProofError(f"{record}: made by another proof_of_value.py or --quick; delete the folder {work}")
        return found
    print(f"{name}: {root}", flush=True)
    text = json.dumps({PROTOCOL: protocol(quick)} | measure(root, work, quick), indent=1)
    record.write_text(text, encoding="utf-8")
    found = json.loads(text)
    del found[PROTOCOL]
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 equal, 1 different, 2 a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--work", type=Path, help="keep what the commands wrote in this folder")
    parser.add_argument("--quick", action="store_true", help="one rank, no options, no export, fewer commands")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        base = (args.work or Path(temporary)).resolve()
        found = [
            measured(name, root, base / name, args.quick)
            for name, root in (("before", args.before), ("after", args.after))
        ]
    lines = differences(*found)
    print("\n".join(lines) or f"equal: {len(found[0])} things compared bit for bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
