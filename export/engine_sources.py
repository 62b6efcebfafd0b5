"""Prepares what `to_trt.py` builds from: checked settings, and graphs, exported first where it gets a model folder."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from ldmseg_fast.backends.graphs.manifest import FILE_NAME, read_manifest
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.trt.passport import Range
from ldmseg_fast.backends.trt.settings import BuildSettings
from ldmseg_fast.checkpoints.hub_names import GRAPHS, MODEL
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config.limits import OPTION_RANGES
from ldmseg_fast.errors import BackendError, CheckpointError
from ldmseg_fast.export.engine_build import TIMING_CACHE, BuildJob, Ranges, check_foreign, check_sides
from ldmseg_fast.export.model_export import ExportSettings, check_arguments, export_model, is_current
from ldmseg_fast.export.output_folder import exclusive
from ldmseg_fast.export.parity_report import ParityReport
from ldmseg_fast.files import real_path

DEFAULT_PRECISION = "fp16"


def make_job(args: argparse.Namespace, command: str) -> BuildJob:
    """Makes a build job of the command line.

    Raises:
        BackendError: names the option that is wrong.
    """
    targets = tuple(dict.fromkeys(part.strip().lower() for part in (args.target or "").split(",") if part.strip()))
    if args.target is not None and not targets:
        raise BackendError(f"--target {args.target!r}: names nothing; current, same, portable, or sm80,sm89,...")
    if len(targets) > 1 and {"portable", "current", "same"} & set(targets):
        raise BackendError(f"--target {args.target}: portable, same and current stand alone")
    if args.timing_cache is not None and args.flavour == "rtx":
        raise BackendError("--timing-cache: TensorRT-RTX tries no kernels out while it builds; leave it out")
    if args.level is not None and args.flavour == "rtx":
        raise BackendError("--level: TensorRT-RTX builds the same engine at every level; leave it out")
    if args.flavour == "tensorrt":
        _check_cache(args.timing_cache or args.out / TIMING_CACHE, args.out)
    if args.head == "logits" and args.max_side is not None:
        raise BackendError("--max-side beside --head logits: graphs of logits make no map; leave one of them out")
    check_arguments(args)
    settings = BuildSettings(
        targets=targets or (("portable",) if args.flavour == "rtx" else ("current",)),
        level=BuildSettings.level if args.level is None else args.level,
        workspace_gib=args.workspace,
        strip=args.strip,
        version_compatible=args.version_compatible,
        detailed=args.verbose,
        user_allocation=args.flavour == "rtx",
    )
    sizes = {f"--{name}-batch": getattr(args, f"{name}_batch") for name in ("min", "opt", "max")}
    given = [option for option, size in sizes.items() if size is not None]
    if args.profile and given:
        raise BackendError(f"{', '.join(given)} beside --profile: a profile says all three; leave one of them out")
    batches = [_range("--profile", text, "max_batch") for text in args.profile]
    if not batches:
        default = zip(sizes.items(), (1, 1, 8))
        least, best, largest = (size if size is not None else other for (_, size), other in default)
        if not 1 <= least <= best <= largest:
            raise BackendError(
                f"--min-batch {least}, --opt-batch {best}, --max-batch {largest}: from 1 on, in this order"
            )
        batches = [(least, best, largest)]
    max_side = 1024 if args.max_side is None else args.max_side
    if max_side < 1 or args.workspace < 0:
        raise BackendError(f"--max-side {max_side} must be positive, --workspace {args.workspace} not negative")
    sides = _range("--image-sizes", args.image_sizes, "size") if args.image_sizes is not None else None
    option = "--profile" if args.profile else ", ".join(given)
    ranges = Ranges(tuple(batches), max_side, sides, option, args.max_side is not None)
    return BuildJob(settings, ranges, command, args.timing_cache, print)


def _check_cache(path: Path, out: Path) -> None:
    """Raises BackendError for a timing cache that could not be written after minutes of work."""
    if path.is_dir():
        raise BackendError(f"{path}: a folder, in the place of the timing cache; name a file by --timing-cache")
    if not path.parent.is_dir() and real_path(path.parent) != real_path(out):
        raise BackendError(f"--timing-cache {path}: no folder {path.parent}")


def _range(option: str, text: str, limit: str) -> Range:
    """Reads three numbers; `limit` names the row of OPTION_RANGES that they must keep to."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise BackendError(f"{option} {text}: three numbers expected, such as 1,4,8")
    if any(len(part) > 9 or not OPTION_RANGES[limit].admits(int(part)) for part in parts):
        raise BackendError(f"{option} {text}: numbers {OPTION_RANGES[limit]} expected")
    least, best, largest = (int(part) for part in parts)
    if not 1 <= least <= best <= largest:
        raise BackendError(f"{option} {text}: least, best and largest, from 1 on, in this order")
    return least, best, largest


def find_graphs(args: argparse.Namespace, job: BuildJob, held: ExitStack) -> tuple[Path, ParityReport | None]:
    """Returns the folder of graphs to build from, and the parity report of an export that was made now.

    What the engines could not be built from is refused before the export, which takes minutes. Graphs that are exported
    stay as they are until `held` ends: another command would put those of another model there.

    Raises:
        CheckpointError: a folder that is neither an export nor a model.
        BackendError: an export in another precision than the one asked for, or somebody else's files where the engines
            would go.
    """
    source = resolve_model_dir(args.source, kinds=(MODEL, GRAPHS))
    if (args.out / "model_index.json").is_file():
        raise BackendError(f"--out {args.out}: a model's folder; choose another one, or one inside it")
    if (source / FILE_NAME).is_file():
        manifest = read_manifest(source)
        _refuse_settled(source, args)
        if manifest.is_for_cpu:
            raise BackendError(
                f"{source}: in int8 for a CPU, which TensorRT does not take; give MODEL_DIR with --precision int8"
            )
        if args.precision not in (None, manifest.precision):
            raise BackendError(
                f"{source}: exported in {manifest.precision}, --precision {args.precision} was asked for; precision is "
                f"part of the graphs: give MODEL_DIR, or export it again with --precision {args.precision}"
            )
        return source, None
    if not (source / "model_index.json").is_file():
        raise CheckpointError(f"{source}: neither a model folder (model_index.json) nor exported graphs ({FILE_NAME})")
    settings = ExportSettings(
        precision=args.precision or DEFAULT_PRECISION,
        head=args.head or "panoptic",
        size="dynamic" if job.ranges.sides else "model",
        sampler_steps=args.sampler_steps,
        parity=not args.no_parity,
        parity_images=args.parity_images,
        data=args.data,
        calibration=args.calibration,
        runtime="tensorrt",
        lora=args.lora,
        lora_scale=args.lora_scale,
        command=job.command,
    )
    if job.ranges.sides is not None:
        check_sides(job.ranges.sides, read_model_info(source).size_multiple)
    graphs = args.out / "onnx"
    lock = exclusive(args.out / ".export.lock", lambda: print(f"{args.out}: another to_trt.py works there; waiting"))
    held.enter_context(lock)
    check_foreign(args.out)
    if is_current(source, graphs, settings):
        print(f"graphs: {graphs}, unchanged")
        return graphs, None
    return graphs, export_model(source, graphs, settings)


def _refuse_settled(source: Path, args: argparse.Namespace) -> None:
    """Raises BackendError for options that were settled when the graphs were exported."""
    given = {"--head": args.head, "--sampler-steps": args.sampler_steps or None, "--data": args.data}
    given |= {"--lora": args.lora, "--lora-scale": args.lora_scale, "--calibration": args.calibration}
    given |= {"--parity-images": args.parity_images, "--no-parity": args.no_parity or None}
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise BackendError(
            f"{source}: already exported, so {', '.join(names)} can change nothing; give MODEL_DIR, or export again"
        )
