"""Adds the options that several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import CheckpointError, DataError
from ldmseg_fast.files import read_text

NETWORKS = ("fused", "precision", "attention")  # how networks compute, and how a runtime runs them
STDOUT = Path("/dev/stdout")
RUNTIME = ("cuda_graph", "profile", "kernel_specialization", "graph_strategy")


def add_model_argument(parser: argparse.ArgumentParser, kinds: str = "") -> None:
    """Adds MODEL_DIR and --revision; `kinds` says more of which models it takes."""
    text = "model folder, name of a shipped model (tiny), or owner/name[@revision] of the Hugging Face Hub"
    parser.add_argument("model_dir", help=f"{text}; {kinds}" if kinds else text)
    parser.add_argument("--revision", help="branch, tag or commit of a model of the Hub; default its main branch")


def take_model(args: argparse.Namespace) -> None:
    """Puts the folders that --model_dir and --engine-dir mean into `args`, so that every later step sees one commit.

    Raises:
        CheckpointError, ArgumentError: as `resolve_model_dir` and `resolve_engine_dir`.
    """
    from ldmseg_fast.checkpoints.shipped import resolve_engine_dir, resolve_model_dir

    args.model_dir = str(resolve_model_dir(args.model_dir, args.revision))
    if args.engine_dir is not None:
        args.engine_dir = str(resolve_engine_dir(args.engine_dir, args.backend))


def from_hub(args: argparse.Namespace) -> bool:
    """Tells whether MODEL_DIR or --engine-dir is a name of the Hub.

    Raises:
        ArgumentError: a name or a revision that cannot be.
    """
    from ldmseg_fast.checkpoints.hub_names import hub_name

    if not Path(args.model_dir).exists() and hub_name(args.model_dir, args.revision) is not None:
        return True
    engines = args.engine_dir
    return engines is not None and not Path(engines).exists() and hub_name(engines) is not None


def take_model_pinned(args: argparse.Namespace) -> dict[str, Any]:
    """Does what `take_model` does, and returns the entries of `args` that give another rank the same commits."""
    from ldmseg_fast.checkpoints.hub import pinned

    words = {"model_dir": args.model_dir, "engine_dir": args.engine_dir}
    take_model(args)
    same = {key: word and pinned(word, Path(getattr(args, key))) for key, word in words.items()}
    return {**same, "revision": None}


def model_folders(model_dir: str | Path) -> list[Path]:
    """Lists a model folder and those of its components, which no command may write into; none where it is not there."""
    from ldmseg_fast.checkpoints.model_folder import COMPONENTS
    from ldmseg_fast.checkpoints.shipped import resolve_model_dir

    try:
        model = resolve_model_dir(model_dir)
    except CheckpointError:  # it is told when the model is loaded
        return []
    return [model, *(model / name for name in COMPONENTS)]


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --json, for commands whose answer is text."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, and nothing else, on stdout")


def output_file(text: str) -> Path:
    """Makes a path of what an option for a file says; - is what the command prints to."""
    return STDOUT if text == "-" else Path(text)


def add_report_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --json [FILE], for commands that also write their answer as a file."""
    parser.add_argument(
        "--json",
        type=output_file,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write the whole report as JSON; without FILE, or with -, to stdout, and the table to stderr",
    )


def print_json(value: Any) -> None:
    """Prints one JSON value on stdout; paths in it as text."""
    print(json.dumps(value, indent=1, allow_nan=False, default=str))


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --backend, --engine-dir, those of `add_speed_arguments`, --steps, --batch-size, --solver and --threads."""
    parser.add_argument("--backend", default="torch", help="torch, compile, onnxruntime or tensorrt")
    parser.add_argument("--engine-dir", help="exported graphs or engines")
    add_speed_arguments(parser)
    parser.add_argument("--steps", type=int, help="denoising steps; default the model's own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--solver", default="ddim", help="ddim, dpmpp_2m or heun")
    parser.add_argument("--threads", type=int, help="of this process; default its share of the machine's cores")


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --precision, --attention, --fused and its like, those of engines, and of CUDA graphs, for `speed_of`."""
    parser.add_argument(
        "--precision",
        help="of torch and compile: fp32, tf32, bf16, fp16, fp8 (GPUs of sm_89 and newer) or fp8-emulated (slow, to "
        "measure quality); default bf16 on a GPU and fp32 on a CPU",
    )
    parser.add_argument(
        "--attention", default="auto", help="of torch and compile: auto, triton, sdpa, xformers or fp8 (default auto)"
    )
    parser.add_argument("--fused", action="store_true", help="of torch: run the UNet in few launches, for a GPU")
    parser.add_argument(
        "--fused-epilogues",
        dest="fused",
        action="store_const",
        const="epilogues",
        help="of torch: in still fewer, by products and convolutions of our own",
    )
    parser.add_argument(
        "--profile",
        type=int,
        metavar="N",
        help="of tensorrt: the place of the engines' optimisation profile to run; default the narrowest that fits",
    )
    parser.add_argument(
        "--kernel-specialization",
        metavar="WHEN",
        help="of engines of TensorRT-RTX: compile kernels for the shapes at hand lazy, eager or none",
    )
    parser.add_argument(
        "--graph-strategy",
        metavar="WHO",
        help="of engines of TensorRT-RTX: with whole_graph_capture it makes CUDA graphs itself; default disabled",
    )
    graph = parser.add_mutually_exclusive_group()
    graph.add_argument(
        "--cuda-graph",
        action="store_const",
        const=True,
        help="run the sampling loop as one CUDA graph; default on a GPU, but not with onnxruntime",
    )
    graph.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_const",
        const=False,
        help="run the sampling loop on a GPU step by step, not as one CUDA graph",
    )


def speed_of(args: argparse.Namespace) -> dict[str, Any]:
    """Gives the options of `add_speed_arguments` as `LDMSegPipeline.from_pretrained` takes them."""
    return {name: getattr(args, name) for name in (*NETWORKS, *RUNTIME)}


def networks_of(args: argparse.Namespace) -> dict[str, Any]:
    """Gives those of `speed_of` that results depend on, within rounding."""
    return {name: getattr(args, name) for name in NETWORKS}


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --recursive and --share, of commands over many pictures."""
    parser.add_argument("--recursive", action="store_true", help="take the pictures of sub-folders too")
    parser.add_argument(
        "--share",
        type=Path,
        metavar="DIR",
        help="folder that all ranks see, where --out is on each machine's own disk; default --out",
    )


def lists_among(paths: Sequence[str]) -> list[Path]:
    """Returns the text files among paths: FILE of each @FILE, unless a file is called so."""
    return [Path(path[1:]) for path in paths if path.startswith("@") and not Path(path).exists()]


def listed(paths: Sequence[str]) -> list[str]:
    """Returns paths with those that a text file names, one a line, in the place of its @FILE.

    Raises:
        DataError: a list that is no text, or names nothing.
        OSError: a list that cannot be read.
    """
    named: list[str] = []
    for path in paths:
        if not lists_among([path]):
            named.append(path)
            continue
        try:
            lines = [line for line in read_text(path[1:], DataError, "list of paths").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path[1:]}: no text in UTF-8 ({error}); write one path a line") from None
        if not lines:
            raise DataError(f"{path[1:]}: names no picture; write one path a line")
        named += lines
    return named


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --flip, --scales, --fusion and --edges, which `views_of` reads."""
    parser.add_argument("--flip", action="store_true", help="an ensemble with the mirror image of each picture")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="X",
        default=[1.0],
        help="an ensemble over sides of what the networks see, in shares of the model's own",
    )
    parser.add_argument(
        "--fusion",
        choices=["medoid", "vote", "mean"],
        help="of an ensemble: the map that agrees best with the others (default), its segments as all of them see "
        "them, or the map of the mean probabilities (default with --edges)",
    )
    add_edges_argument(parser, "; joined by the mean, of which one view is enough")


def add_edges_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds --edges, as `LDMSegPipeline.inpaint` takes it, with more to tell in its help."""
    parser.add_argument(
        "--edges",
        type=int,
        default=0,
        metavar="R",
        help="edges of segments follow edges of the picture, by windows of R cells to each side (1 to 4 do well); "
        f"decodes in PyTorch{more}",
    )


def add_connected_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --connected, as `LDMSegPipeline` takes it."""
    parser.add_argument(
        "--connected",
        type=int,
        default=0,
        metavar="PX",
        help="each connected piece of a segment is a segment of its own, and pieces of fewer than PX pixels are void",
    )


def views_of(args: argparse.Namespace) -> dict[str, Any]:
    """Gives the fields of `Views` as `LDMSegPipeline.ensemble` takes them; nothing where all are the defaults.

    Raises:
        ArgumentError: scales that are none, or edges without a mean.
    """
    from ldmseg_fast.inference.ensemble import Views

    views = Views(args.flip, tuple(args.scales), args.fusion, args.edges)
    return {} if views == Views() else asdict(views)


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --keep-orientation and --max-pixels."""
    parser.add_argument(
        "--keep-orientation",
        dest="exif",
        action="store_false",
        help="take the pixels as they are stored, as COCO's maps do; default as the EXIF orientation shows them",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=2**26,
        metavar="N",
        help="refuse larger pictures before they are decoded (default 67108864)",
    )
