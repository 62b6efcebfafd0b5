"""Finds a model to time: a folder of trained weights, or a preset's sizes with random ones.

python benchmarks/random_model.py --preset coco --out MODEL_DIR
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch

from benchmarks.measuring.options import parse_options
from ldmseg_fast.checkpoints.hub_names import shown_name
from ldmseg_fast.checkpoints.model_folder import postprocess_settings, save_component, save_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import PRESETS, Config
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.models.unet import UNet

MEASURED_SCALE = 0.2  # of mask latents where training would have measured it


def save_random_model(folder: Path, config: Config) -> Path:
    """Writes a model folder of a configuration's size with random weights."""
    torch.manual_seed(0)
    scale = config.mask_vae.scaling_factor or MEASURED_SCALE
    mask_vae = replace(config.mask_vae, scaling_factor=scale)
    encoder = build_image_encoder(config.image_encoder)
    vae_config: Any = getattr(encoder, "vae_config", None)
    extra = {"_vae_config": dict(vae_config)} if vae_config else None
    save_component(folder, "unet", config.unet, UNet(config.unet).state_dict())
    save_component(folder, "mask_vae", mask_vae, MaskVAE(mask_vae).state_dict())
    save_component(folder, "image_vae", config.image_encoder, encoder.state_dict(), extra)
    save_component(folder, "scheduler", config.scheduler, None)
    settings = {"image_size": config.data.image_size, "num_inference_steps": config.num_inference_steps}
    settings |= {"self_condition": config.diffusion.self_condition > 0} | postprocess_settings(config.postprocess)
    save_index(folder, ["unet", "mask_vae", "image_vae", "scheduler"], settings)
    return folder


def find_model(model: str | None, preset: str, scratch: Path) -> tuple[Path, str]:
    """Returns the folder to time and its name in the records: MODEL_DIR, or `preset` with random weights in `scratch`.

    Raises:
        FileNotFoundError: a MODEL_DIR that is not there.
        CheckpointError: a name that is neither a shipped model's nor one of the Hub.
    """
    if model is None:
        return save_random_model(scratch / f"random-{preset}", PRESETS[preset]), f"{preset}, random weights"
    folder = resolve_model_dir(model)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder}: no model_index.json; give a MODEL_DIR, or --preset {preset}")
    return folder, shown_name(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--out", type=Path, metavar="MODEL_DIR", required=True)
    args = parse_options(parser, argv)
    print(save_random_model(args.out, PRESETS[args.preset]).name)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
