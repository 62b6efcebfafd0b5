"""Shows that a change alters no number: python benchmarks/proof_of_value.py BEFORE AFTER [--work FOLDER] [--quick]

BEFORE and AFTER are two checkouts. Each runs the same public commands on the same generated scenes: 20 steps of every
stage on one and on two ranks, `ldmseg predict`, `inpaint`, `evaluate` and `pq`, and an ONNX export. Losses, weights,
maps and reports must be equal bit for bit; times and paths are left out. Exit code 0: equal; 1: something differs,
which is named; 2: a command failed.

Run it on one idle machine with one Python environment. `git worktree add ../before main` makes the first checkout; copy
its compiled `ldmseg_fast/_C*.so`, or build it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    "postprocess": {"count_threshold": 4},
    "num_inference_steps": 2,
}  # fmt: skip
STAGES = ("autoencoder", "diffusion", "one_step", "distillation")


class CommandError(RuntimeError):
    """A command of a checkout failed."""


class Checkout:
    """One tree of the project, run through its public commands."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work = root.resolve(), work
        if not (self.root / "ldmseg_fast" / "train.py").is_file():
            raise CommandError(f"{root}: no checkout of ldmseg_fast; give the folder that holds setup.py")
        work.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }

    def run(self, *command: Any) -> None:
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(
            words, cwd=self.work, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode:
            text = done.stdout.decode(errors="replace")[-4000:]
            raise CommandError(f"exit code {done.returncode} of {' '.join(words)} in {self.root}\n{text}")

    def ldmseg(self, *command: Any) -> None:
        self.run("-m", "ldmseg_fast.cli", *command)

    def train(self, stage: str, ranks: int, *settings: str) -> Path:
        folder = self.work / f"{stage}-{ranks}"
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", _free_port()]
        script = [self.root / "ldmseg_fast" / "train.py", stage, "--config", self.work / "settings.yaml"]
        fixed = [f"data.root={self.work / 'scenes'}", f"output_dir={folder}"]
        self.run(*(launcher if ranks > 1 else []), *script, *fixed, *settings)
        return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(root: Path, work: Path, quick: bool = False) -> dict[str, Any]:
    """Everything that must stay equal, by name.

    Args:
        root: a checkout.
        work: an empty folder for what its commands write.
        quick: one rank only, and no export.

    Raises:
        CommandError: a command ended with another exit code than 0.
    """
    checkout = Checkout(root, work)
    found: dict[str, Any] = {}
    checkout.ldmseg("data", "scenes", work / "scenes", "--images", 24, "--size", 32, "--seed", 3)
    found["scenes"] = digest(work / "scenes")
    (work / "settings.yaml").write_text(json.dumps(SETTINGS), encoding="utf-8")
    for ranks in (1,) if quick else (1, 2):
        autoencoder = checkout.train("autoencoder", ranks)
        for stage in STAGES:
            folder = autoencoder
            if stage == "diffusion":
                folder = checkout.train(stage, ranks, f"model.mask_vae={autoencoder}", "diffusion.inpainting=0.5")
            elif stage != "autoencoder":
                folder = checkout.train(stage, ranks, f"model.init_from={work / f'diffusion-{ranks}'}")
            found[f"{stage}, {ranks} ranks: losses"] = losses(folder)
            found[f"{stage}, {ranks} ranks: weights"] = digest(folder, "*/*.safetensors")
    for model, name in (("tiny", "tiny"), (work / "diffusion-1", "trained")):
        pictures = work / "scenes" / "val2017"
        checkout.ldmseg("predict", model, pictures, "--out", work / f"maps-{name}", "--steps", 2)
        found[f"predict, {name}"] = digest(work / f"maps-{name}")
        report = work / f"evaluate-{name}.json"
        results = work / f"results-{name}"
        data = ["--data", work / "scenes", "--out", results, "--json", report]
        checkout.ldmseg("evaluate", model, *data, "--class-aware", "GT", "--seeds", 2)
        found[f"evaluate, {name}"] = plain(json.loads(report.read_text(encoding="utf-8")), work)
        found[f"results of evaluate, {name}"] = digest(results, "*/*.png", "*.png")
        truth = work / "scenes" / "annotations" / "panoptic_val2017.json"
        (prediction,) = sorted(results.rglob("panoptic*.json"))[:1]
        checkout.ldmseg("pq", truth, prediction, "--boundary", "--class-agnostic", "--json", work / f"pq-{name}.json")
        found[f"pq, {name}"] = plain(json.loads((work / f"pq-{name}.json").read_text(encoding="utf-8")), work)
    picture = sorted((work / "scenes" / "val2017").iterdir())[0]
    given = sorted((work / "scenes").rglob("panoptic_val2017/*.png"))[0]
    annotations = json.loads(truth.read_text(encoding="utf-8"))["annotations"]
    (unknown,) = (item["segments_info"][0]["id"] for item in annotations if item["file_name"] == given.name)
    inpaint = ["--image", picture, "--map", given, "--unknown-id", unknown, "--out", work / "completed"]
    checkout.ldmseg("inpaint", "tiny", *inpaint)
    found["inpaint"] = digest(work / "completed")
    if not quick:
        for precision in ("fp32", "fp16"):
            graphs = work / f"graphs-{precision}"
            settings = ["--precision", precision, "--no-parity", "--head", "both", "--sampler-steps", "2"]
            checkout.run(root.resolve() / "export" / "to_onnx.py", "tiny", "--out", graphs, *settings)
            out = work / f"maps-{precision}"
            backend = ["--backend", "onnxruntime", "--engine-dir", graphs]
            checkout.ldmseg("predict", "tiny", work / "scenes" / "val2017", "--out", out, *backend)
            found[f"predict from graphs, {precision}"] = digest(out)
    return found


def losses(folder: Path) -> list[Any]:
    """Loss and metrics of every logged step of a run."""
    lines = (folder / "logs" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: value for key, value in record.items() if _is_value(key)} for record in records]


def _is_value(key: str) -> bool:
    return key in ("step", "loss") or key.startswith(("val/", "loss/"))


TIMES = ("seconds", "time", "memory", "command", "version", "date", "machine", "per_second")


def plain(value: Any, work: Path) -> Any:
    """A report without times and paths."""
    if isinstance(value, dict):
        return {key: plain(item, work) for key, item in value.items() if not any(word in key for word in TIMES)}
    if isinstance(value, list):
        return [plain(item, work) for item in value]
    return value.replace(str(work), "WORK") if isinstance(value, str) else value


def digest(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files in a folder, by their paths in it."""
    files = {path for pattern in patterns or ("*", "**/*") for path in folder.glob(pattern) if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if "checkpoints" not in path.parts
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each thing that is not equal."""
    lines = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
            lines.append(f"{name}: {len(keys)} of {len(old)} differ, first {keys[0]}")
        elif isinstance(old, list) and isinstance(new, list):
            places = [place for place, pair in enumerate(zip(old, new)) if pair[0] != pair[1]]
            first = f"first {old[places[0]]} -> {new[places[0]]}" if places else f"{len(old)} -> {len(new)} entries"
            lines.append(f"{name}: {len(places)} of {len(old)} differ, {first}")
        else:
            lines.append(f"{name}: {old!r} -> {new!r}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 equal, 1 different, 2 a command failed."""
    parser = argparse.ArgumentParser(prog="proof_of_value.py", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--work", type=Path, help="keep what the commands wrote in this folder")
    parser.add_argument("--quick", action="store_true", help="one rank, no export")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        base = args.work or Path(temporary)
        found = []
        for name, root in (("before", args.before), ("after", args.after)):
            record = base / name / "found.json"
            try:
                if record.is_file():
                    print(f"{name}: measured before ({record})", flush=True)
                else:
                    print(f"{name}: {root}", flush=True)
                    measured = measure(root, base / name, args.quick)
                    record.write_text(json.dumps(measured, indent=1), encoding="utf-8")
                found.append(json.loads(record.read_text(encoding="utf-8")))
            except CommandError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
    lines = differences(*found)
    print("\n".join(lines) or f"equal: {len(found[0])} things compared bit for bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
