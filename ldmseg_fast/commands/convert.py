"""`ldmseg convert` turns a checkpoint of the original LDMSeg code into a model folder.

It runs nothing in the checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = ("ldmseg convert CHECKPOINT.pt --out MODEL_DIR",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="the .pt file: an auto-encoder, or a whole model")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--unet-config", type=Path, help="diffusers' config.json of the UNet before it was changed")
    parser.add_argument(
        "--image-vae", help="diffusers' AutoencoderKL: its folder, its config.json, or owner/name[@revision] of the Hub"
    )


def run(args: argparse.Namespace) -> int:
    print(f"model folder: {convert_checkpoint(args.checkpoint, args.out, args.unet_config, args.image_vae)}")
    return 0


def convert_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    unet_config: str | Path | None = None,
    image_vae: str | Path | None = None,
) -> Path:
    """Writes `out`, a model folder with the checkpoint's weights, whole or not at all.

    Args:
        checkpoint: {"vae", "p"} of the auto-encoder, or {"unet", "vae_semseg", "vae_image", "p"} of the whole model.
        out: must not exist, or be an empty folder.
        unet_config: diffusers' configuration of the UNet before its input was widened; default Stable Diffusion 1.4's,
            where the widths are its own.
        image_vae: diffusers' configuration of the image VAE, or its name on the Hub; default what the tensors say. A
            folder gives the weights too where the checkpoint has none.

    Returns:
        `out`.

    Raises:
        CheckpointError: a checkpoint that is damaged, of another kind, asks for code, or does not fit the
            configurations; the message lists what is wrong.
        ArgumentError: `unet_config` or `image_vae` of an auto-encoder, which has neither network.
        FileExistsError: `out` holds something.
    """
    from ldmseg_fast.checkpoints.model_card import write_model_card
    from ldmseg_fast.checkpoints.model_folder import save_component, save_index
    from ldmseg_fast.checkpoints.original import read_parts
    from ldmseg_fast.checkpoints.safe_pickle import load_torch_file
    from ldmseg_fast.files import replacing_folder

    source, target = Path(checkpoint), Path(out)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FileExistsError(f"{target}: there is something already; choose another --out, or remove it first")
    # 1. Shapes and settings are read and checked before anything is written; tensors stay on the disk
    parts, settings = read_parts(
        load_torch_file(source),
        str(source),
        None if unet_config is None else Path(unet_config),
        image_vae,
    )

    # 2. A folder beside `out`, each tensor from the checkpoint straight into its file, then a rename
    with replacing_folder(target) as temporary:
        for part in parts:
            save_component(temporary, part.name, part.config, part.state, part.extra)
        save_index(temporary, [part.name for part in parts], settings)
        write_model_card(
            temporary, {"converted from": source.name} | settings | {part.name: part.config for part in parts}
        )
    return target
