"""`ldmseg ship RUN_DIR OUT` turns a training run into weights to ship.

OUT becomes a model folder in half precision, or smaller with UNet and mask auto-encoder in int8, with a model card that
says how the weights came to be. For the package it is ldmseg_fast/weights/NAME, where
`LDMSegPipeline.from_pretrained("NAME")` finds it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.checkpoints.categories_file import CATEGORIES, load_categories, save_categories
from ldmseg_fast.checkpoints.hub_names import PREFIX
from ldmseg_fast.checkpoints.model_card import write_model_card
from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config, load_index
from ldmseg_fast.checkpoints.run_records import read_log, read_run_settings
from ldmseg_fast.checkpoints.schema import COMPONENTS
from ldmseg_fast.checkpoints.tensors import INT8_SCALE, WEIGHTS, check_finite, load_weights, save_weights
from ldmseg_fast.config import PRESETS, to_dict
from ldmseg_fast.config.roots import set_names
from ldmseg_fast.config.settings import PYRAMID_STRIDES
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.files import inside, read_lines, replacing_folder
from ldmseg_fast.outputs import check_outputs, is_inside
from ldmseg_fast.training.provenance import STARTS, ancestors, cpu_minutes

LIMIT = 20 * 10**6  # bytes that a wheel may carry: OUT in weights/ and all model folders beside it
RELEASE_LIMIT = 25 * 2**20  # bytes of one model in releases/ of the source tree; elsewhere there is no limit
PRECISIONS = ("fp16", "bf16", "int8")
# not in int8: a few channels of EfficientNet-Lite0 are so large that 1 % of a weight is 4 % of the features
HALVES = ("image_vae",)
LARGE = 4096  # fewest elements at which a matrix or a convolution is worth int8


def half(state: dict[str, Tensor], dtype: torch.dtype, source: str) -> dict[str, Tensor]:
    """Converts the floats of a state, any shape, to `dtype`; integers stay.

    Raises:
        CheckpointError: a weight that is not finite in `dtype`; the message names `source`.
    """
    converted = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    lost = [name for name, value in converted.items() if not torch.isfinite(value.float()).all()]
    if lost:
        raise CheckpointError(
            f"{source}: {', '.join(lost[:5])} not finite in {dtype}; use --dtype bf16, or train again"
        )
    return converted


def to_int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stores large weights, float [O, ...], as int8 with one float16 scale [O] per output; the rest stays.

    The scale makes the largest weight of an output 127. Rounding is to the nearest, an error of at most half a scale.
    `load_weights` multiplies the weights out.
    """
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim < 2 or value.numel() < LARGE or not value.is_floating_point():
            stored[name] = value
            continue
        rows = value.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-7).half()
        stored[name] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).view(value.shape)
        stored[name + INT8_SCALE] = scale
    return stored


def ship(run_dir: Path, out: Path, dtype: str = "fp16", machine: str = "") -> Path:
    """Writes `out`, a model folder with the weights of `run_dir` made smaller; it appears whole or not at all.

    Args:
        run_dir: the folder of a finished run (a MODEL_DIR with its config.json and logs).
        out: the folder to make; a shipped model that is there is replaced.
        dtype: "fp16", "bf16", or "int8": large weights in int8 with a scale per output, the rest and the image encoder
            in float16.
        machine: where the run was trained, for runs whose log does not say so.

    Raises:
        CheckpointError: no model folder or a damaged one, weights that half precision does not hold, more bytes than
            `out` may have, or something else than a shipped model in it.
        ArgumentError: `out` is the run or a run that it was built on, or holds one.
    """
    index = load_index(run_dir)
    table = load_categories(run_dir, load_component_config(run_dir, "mask_vae")[0])
    out = Path(os.path.realpath(out))  # a link stays one
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is no folder, and a model would replace it; choose another path")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(held - {"model_index.json", "README.md", CATEGORIES, *COMPONENTS})
    if foreign or (held and "model_index.json" not in held):
        raise CheckpointError(
            f"{out}: holds something else than a shipped model ({', '.join(foreign[:3]) or 'no model_index.json'}); "
            f"choose another folder, or empty it"
        )
    runs = [run_dir, *ancestors(run_dir)]
    check_outputs({}, {"OUT": out}, roots=[folder / name for folder in runs for name in (".", "best", *COMPONENTS)])
    if within := [folder for folder in runs if is_inside(folder, out)]:
        raise ArgumentError(f"{out}: holds the run {within[0]}, and would be replaced whole; choose another folder")
    with replacing_folder(out) as temporary:
        shutil.copy2(run_dir / "model_index.json", temporary)
        save_categories(temporary, table)
        for component in index["components"]:
            _check_component(run_dir, component)
            _copy_others(run_dir, component, temporary)
            if component != "scheduler":
                weights = run_dir / component / WEIGHTS
                state = load_weights(weights)
                check_finite(state, str(weights))
                floats = torch.bfloat16 if dtype == "bf16" else torch.float16  # the scales of int8 too
                if dtype == "int8" and component not in HALVES:
                    state = to_int8(state)
                state = half(state, floats, str(weights))
                save_weights(state, temporary / component / WEIGHTS)
        kind = "int8, the image encoder in float16" if dtype == "int8" else dtype
        write_model_card(temporary, {"weights": kind, **history(run_dir, machine)})
        check_size(run_dir, folder_size(temporary), out, dtype)
    return out


def _check_component(run_dir: Path, name: str) -> None:
    """Checks that a component can be loaded; of `conditioning`, which needs transformers, its configuration."""
    if name in ("scheduler", "conditioning"):
        load_component_config(run_dir, name)
    else:
        load_component(run_dir, name)


def _copy_others(run_dir: Path, name: str, out: Path) -> None:
    """Copies a component's files, the weights apart. Raises CheckpointError for a link out of the model."""
    for path in sorted((run_dir / name).rglob("*")):
        if path.is_file() and path.name != WEIGHTS:
            copy = out / path.relative_to(run_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(inside(run_dir, path), copy)


def check_size(run_dir: Path, size: int, out: Path, dtype: str) -> None:
    """Checks that a model is small enough for where it goes; the folder's name, weights or releases, says what that is.

    Raises:
        CheckpointError: names `run_dir`, its `size` in bytes, the limit and what helps.
    """
    limit, what, total = LIMIT, "the package's weights", size
    if out.parent.name == "weights":
        beside = [folder for folder in out.parent.iterdir() if (folder / "model_index.json").is_file()]
        total += sum(folder_size(folder) for folder in beside if folder != out)
    elif out.parent.name == "releases":
        limit, what = RELEASE_LIMIT, "one release"
    else:
        return
    if total > limit:
        others = f", {total / 1e6:.1f} MB with the other models in {out.parent}" if total > size else ""
        smaller = "" if dtype == "int8" else "use --dtype int8, "
        raise CheckpointError(
            f"{run_dir}: {size / 1e6:.1f} MB in {dtype}{others}; {limit / 1e6:.1f} MB are the limit of {what}: "
            f"{smaller}take an OUT outside {out.parent}, or train a smaller model"
        )


def folder_size(folder: Path) -> int:
    """Sums the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def history(run_dir: Path, machine: str = "") -> dict[str, Any]:
    """Gathers facts for the model card: each training that led to these weights, first to last."""
    facts: dict[str, Any] = {}
    for number, folder in enumerate(ancestors(run_dir), 1):
        settings = read_run_settings(folder)
        stage, logs = settings["stage"], folder / "logs"
        starts, records = read_lines(logs / STARTS), read_log(folder)
        machines = dict.fromkeys(start["machine"] for start in starts if isinstance(start.get("machine"), str))
        validated = [record for record in records if "val/pq" in record]
        training = {
            "command": command(settings),
            "data": ",".join(set_names(settings["data"]["root"])),
            "seed": settings["train"]["seed"],
            "steps": records[-1]["step"] if records else "not recorded",
            "ranks": max((r for start in starts if type(r := start.get("ranks")) is int), default="not recorded"),
            "minutes of processor time (rank 0)": round(cpu_minutes(logs), 1) or "not recorded",
            "machine": "; ".join(machines) or machine or "not recorded",
        }
        if validated:
            training["class-agnostic PQ on the validation split"] = round(validated[-1]["val/pq"], 2)
            if "val/class_pq" in validated[-1]:
                training["class-aware PQ"] = round(validated[-1]["val/class_pq"], 2)
        facts[f"training {number}: {stage}"] = training
    return facts


FOLDERS = {"output_dir", "model.mask_vae", "model.init_from", "data.latent_cache", "image_encoder.path"}
FEW_STEP = ("one_step", "distillation")
# what these stages take from the model they start from, `model.init_from`
FOUND = (
    *("mask_vae.", "unet.", "scheduler.", "model.mask_vae", "num_inference_steps"),
    *("diffusion.latent_scale", "diffusion.self_condition"),
)


def command(settings: dict[str, Any]) -> str:
    """Composes the command that trains this: what differs from the nearest preset.

    Folders are named by their last part.
    """
    stage = settings["stage"]
    given = _flat({key: value for key, value in settings.items() if key != "stage"})
    unused: tuple[str, ...] = () if stage in FEW_STEP else ("few_step.",)
    if stage in FEW_STEP and settings["model"].get("init_from"):
        replaced = given["image_encoder.kind"] in PYRAMID_STRIDES  # takes the place of another model's encoder
        unused = FOUND if replaced else (*FOUND, "image_encoder.")
    given = {key: value for key, value in given.items() if not key.startswith(unused)}
    candidates = {}
    for name, preset in PRESETS.items():
        usual = _flat(to_dict(preset))
        candidates[name] = [
            f"{key}={_shown(key, value)}" for key, value in given.items() if key in usual and usual[key] != value
        ]
    preset_name = min(candidates, key=lambda name: len(candidates[name]))
    return " ".join(["python ldmseg_fast/train.py", stage, "--config", preset_name, *candidates[preset_name]])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = ",".join(map(_text, value)) if isinstance(value, list | tuple) else _text(value)
    return flat


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(key: str, value: str) -> str:
    if key == "data.root":
        return ",".join(set_names(value))
    return _last_part(value) if key in FOLDERS else value


def _last_part(path: str) -> str:
    return Path(path).name if re.search(r"[/\\]", path) and not path.startswith(PREFIX) else path


EXAMPLES = ("ldmseg ship runs/one_step models/mine --dtype fp16",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="folder of a finished training run")
    parser.add_argument("out", type=Path, help="model folder to write, such as ldmseg_fast/weights/tiny")
    parser.add_argument("--dtype", choices=PRECISIONS, default="fp16")
    parser.add_argument("--machine", default="", help="where it was trained, if the run's log does not say so")


def run(args: argparse.Namespace) -> int:
    out = ship(args.run_dir, args.out, args.dtype, args.machine)
    print(f"{out}: {folder_size(out) / 1e6:.2f} MB")
    return 0
