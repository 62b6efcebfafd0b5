"""Builds TensorRT engines with passports from a folder of ONNX graphs; locked, cached, and never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ldmseg_fast.backends.graphs.manifest import FILE_NAME, GraphFile, Manifest, check_files, read_manifest
from ldmseg_fast.backends.graphs.specs import GraphSpec
from ldmseg_fast.backends.trt.api import RTX_TARGETS, Shapes, TrtApi
from ldmseg_fast.backends.trt.machine import check_driver
from ldmseg_fast.backends.trt.passport import (
    Passport,
    Range,
    engine_file,
    file_differences,
    passport_file,
    read_passport,
)
from ldmseg_fast.backends.trt.settings import BuildSettings
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export.model_export import PARITY
from ldmseg_fast.export.output_folder import disk_full_named, exclusive
from ldmseg_fast.files import read_text, real_path

TIMING_CACHE, LOCK, UNFINISHED = "timing.cache", ".lock", ".ldmseg-new-"


@dataclass(frozen=True)
class Ranges:
    """Holds the sizes that the engines take.

    Attributes:
        profiles: (least, best, largest) batch of each profile.
        max_side: the largest side of a map in pixels.
        sides: (least, best, largest) side of pictures, for graphs without a fixed size.
        given: the options that set `profiles`; empty: it is the default.
        side_given: whether an option set `max_side`.
    """

    profiles: tuple[Range, ...] = ((1, 1, 8),)
    max_side: int = 1024
    sides: Range | None = None
    given: str = ""
    side_given: bool = False


@dataclass(frozen=True)
class BuildJob:
    """Holds what `build_engines` is to do."""

    settings: BuildSettings
    ranges: Ranges
    command: str
    timing_cache: Path | None = None
    progress: Callable[[str], None] = field(default=lambda _: None, compare=False)


def build_engines(onnx_dir: Path, out: Path, job: BuildJob, api: TrtApi) -> list[Passport]:
    """Builds one engine per graph of `onnx_dir`, but for those that are there already with equal settings.

    Raises:
        BackendError: files that differ from their manifest, settings that TensorRT does not take, a failed build, a
            full disk. Engines that were finished before it stay; none is ever half-written.
    """
    manifest = read_manifest(onnx_dir)
    check_files(onnx_dir, manifest, tuple(manifest.graphs))
    if manifest.opset > api.max_opset:
        raise BackendError(
            f"{onnx_dir}: opset {manifest.opset}; {api.name} takes up to {api.max_opset}, export with --opset 22"
        )
    check_ranges(onnx_dir, manifest, job.ranges)
    check_targets(api, job.settings)
    profiles = {name: profiles_of(graph.spec, manifest, job.ranges) for name, graph in manifest.graphs.items()}
    waiting = partial(job.progress, f"{out}: another build is under way; waiting for it")
    with disk_full_named(out), exclusive(out / LOCK, waiting):
        for pattern in (f".*{UNFINISHED}*", ".*.passport.json.*"):
            for abandoned in out.glob(pattern):
                abandoned.unlink()
        check_foreign(out)
        passports = []
        for name, graph in manifest.graphs.items():
            key = build_key(graph, profiles[name], job.settings, api)
            passport, how = _cached(out, name, key), "unchanged"
            if passport is None:
                passport = _build_one(onnx_dir, out, manifest, graph, profiles[name], key, job, api)
                how = f"{passport.build_seconds:.1f} s"
            passports.append(passport)
            job.progress(f"{name}: {passport.engine_bytes / 2**20:.1f} MiB, {how}")
        # the manifest last: a folder without it is not loaded
        for file in (FILE_NAME, PARITY):
            if (onnx_dir / file).is_file() and real_path(onnx_dir) != real_path(out):
                _replace(out / file, (onnx_dir / file).read_bytes())
        if not (onnx_dir / PARITY).is_file():
            (out / PARITY).unlink(missing_ok=True)  # of graphs that were here before
    return passports


def check_foreign(out: Path) -> None:
    """Raises BackendError where files of these names are somebody else's: an export's lie beside its manifest."""
    try:
        read_manifest(out)
    except BackendError:
        there = [name for name in (FILE_NAME, PARITY) if (out / name).exists()]
        if there:
            raise BackendError(
                f"{out / there[0]}: belongs to no export, and would be replaced; choose another folder, or remove it"
            ) from None


def check_targets(api: TrtApi, settings: BuildSettings) -> None:
    """Checks that this flavour can build for the targets on this machine.

    Raises:
        BackendError: it cannot.
    """
    targets = settings.targets
    if api.flavour == "rtx":
        unknown = [t for t in targets if t not in (*RTX_TARGETS, "portable", "current", "same")]
        if unknown:
            raise BackendError(
                f"--target {','.join(unknown)}: TensorRT-RTX builds for {', '.join(RTX_TARGETS)} or portable"
            )
        if settings.version_compatible:
            raise BackendError("--version-compatible: TensorRT-RTX engines belong to one version; leave it out")
        if {"current", "same"} & set(targets):
            if not api.machine.gpu:
                raise BackendError(
                    f"--target {targets[0]}: means the GPU here, and none answers to nvidia-smi; take portable, or "
                    f"name compute capabilities, such as sm89"
                )
            check_driver(api.machine, api.min_driver)
        if settings.strip and not api.machine.gpu:  # weights that come later are laid out by the GPU
            raise BackendError("--strip: TensorRT-RTX needs a GPU for it and none answers to nvidia-smi; leave it out")
        return
    check_driver(api.machine, api.min_driver)  # TensorRT tries kernels out on the GPU that it builds for
    here = "sm" + api.machine.compute_capability.replace(".", "")
    if targets not in (("current",), ("same",), ("portable",), (here,)):
        raise BackendError(
            f"--target {','.join(targets)}: TensorRT builds for the GPU it runs on, {here}; use current, "
            f"same for every GPU of its compute capability, portable for Ampere and later, or --flavour rtx"
        )


def check_ranges(onnx_dir: Path, manifest: Manifest, ranges: Ranges) -> None:
    """Checks that graphs leave open what the ranges are for.

    Raises:
        BackendError: names the option that could change nothing.
    """
    axes = {axis for graph in manifest.graphs.values() for axis in graph.spec.axes}
    if ranges.sides is not None and not axes - {"batch"}:
        raise BackendError(
            f"--image-sizes: {onnx_dir} was exported for pictures of {manifest.image_size} pixels, so it can change "
            f"nothing; leave it out, or export with --size dynamic"
        )
    if ranges.given and "batch" not in axes:
        raise BackendError(
            f"{ranges.given}: {onnx_dir} was exported for batches of {manifest.options.batch}, so it can change "
            f"nothing; leave it out, or export with --batch dynamic"
        )
    if ranges.side_given and not any("size" in graph.spec.tensors for graph in manifest.graphs.values()):
        raise BackendError(
            f"--max-side: {onnx_dir} was exported with --head logits, so it can change nothing; leave it out"
        )


def profiles_of(spec: GraphSpec, manifest: Manifest, ranges: Ranges) -> tuple[dict[str, Range], ...]:
    """Lists a graph's optimisation profiles.

    Raises:
        BackendError: a range is missing, or is none for this model.
    """
    found: list[dict[str, Range]] = []
    for batch in ranges.profiles:
        profile = axis_ranges(spec, manifest, batch, ranges)
        found += [profile] if profile not in found else []
    return tuple(found)


def axis_ranges(spec: GraphSpec, manifest: Manifest, batch: Range, ranges: Ranges) -> dict[str, Range]:
    """Returns least, best and largest size of every dynamic axis of a graph, and of the map's height and width.

    Raises:
        BackendError: a range is missing, or is none for this model.
    """
    found: dict[str, Range] = {}
    for axis in spec.axes:
        if axis == "batch":
            # the panoptic head holds every slot at the map's size: one image at a time
            found[axis] = (1, 1, 1) if "label" in spec.tensors else batch
            continue
        if ranges.sides is None:
            raise BackendError(f"{spec.name}: exported for any picture size; give --image-sizes LEAST,BEST,LARGEST")
        check_sides(ranges.sides, manifest.size_multiple)
        least, best, largest = (side // manifest.downsampling for side in ranges.sides)
        found[axis] = (least, best, largest)
    if "size" in spec.tensors:
        best = min(manifest.image_size or (ranges.sides or (0, 1, 0))[1], ranges.max_side)
        found |= dict.fromkeys(("height", "width"), (1, best, ranges.max_side))
    return found


def check_sides(sides: Range, multiple: int) -> None:
    """Raises BackendError for sides of pictures that are no multiples of what the networks divide by."""
    if any(side % multiple for side in sides):
        raise BackendError(
            f"--image-sizes {','.join(map(str, sides))}: this model needs multiples of {multiple} pixels"
        )


def shapes_of(spec: GraphSpec, profile: Mapping[str, Range]) -> tuple[Shapes, Shapes]:
    """Writes a profile as TensorRT wants it: ranges of shapes, and of shape inputs' values."""
    shapes, values = {}, {}
    ends = [{axis: span[end] for axis, span in profile.items()} for end in range(3)]
    for tensor in spec.inputs:
        if tensor.is_shape:
            values[tensor.name] = tuple((end["height"], end["width"]) for end in ends)
        else:
            shapes[tensor.name] = tuple(tensor.resolve(end) for end in ends)
    return shapes, values  # type: ignore[return-value]


def build_key(graph: GraphFile, profiles: tuple[dict[str, Range], ...], settings: BuildSettings, api: TrtApi) -> str:
    """Hashes all that an engine depends on: equal keys make equal engines."""
    machine = asdict(api.machine) if settings.targets == ("current",) else {}
    parts = [graph.sha256, profiles, asdict(settings), api.flavour, api.version, machine]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _build_one(
    onnx_dir: Path,
    out: Path,
    manifest: Manifest,
    graph: GraphFile,
    profiles: tuple[dict[str, Range], ...],
    key: str,
    job: BuildJob,
    api: TrtApi,
) -> Passport:
    name = graph.spec.name
    cache_file = job.timing_cache or out / TIMING_CACHE
    cache = cache_file.read_bytes() if cache_file.is_file() else b""
    start = time.perf_counter()
    built = api.build(onnx_dir / graph.file, [shapes_of(graph.spec, p) for p in profiles], job.settings, cache)
    passport_file(out, name).unlink(missing_ok=True)  # from here on an older engine is not loaded any more
    _replace(engine_file(out, name), built.engine)
    if built.timing_cache:
        _replace(cache_file, built.timing_cache)
    if job.settings.detailed:
        _replace(out / f"{name}.layers.txt", "".join(f"{'  '.join(layer)}\n" for layer in built.layers).encode())
    passport = Passport(
        graph=name,
        engine_sha256=hashlib.sha256(built.engine).hexdigest(),
        engine_bytes=len(built.engine),
        flavour=api.flavour,
        version=api.version,
        gpu=api.machine.gpu,
        compute_capability=api.machine.compute_capability,
        driver=api.machine.driver,
        targets=job.settings.targets,
        onnx_sha256=graph.sha256,
        model_hash=manifest.model_hash,
        precision=manifest.precision,
        image_size=manifest.image_size,
        profiles=profiles,
        version_compatible=job.settings.version_compatible,
        stripped=job.settings.strip,
        key=key,
        build_seconds=round(time.perf_counter() - start, 2),
        built=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=job.command,
        parity=parity_summary(onnx_dir),
        layers=dict(Counter(kind for kind, _, _ in built.layers)) if job.settings.detailed else {},
    )
    passport.write(out)
    return passport


def _cached(out: Path, name: str, key: str) -> Passport | None:
    """Returns the passport of an engine that was built with the same key and is whole; None where there is none."""
    try:
        passport = read_passport(out, name)
    except BackendError:
        return None
    return passport if passport.key == key and not file_differences(passport, engine_file(out, name)) else None


def parity_summary(onnx_dir: Path) -> dict[str, float]:
    """Returns each comparison of the export's parity report; empty where the export has none.

    Raises:
        BackendError: a damaged report.
    """
    path = onnx_dir / PARITY
    if not path.is_file():
        return {}
    try:
        return {row["what"]: row["value"] for row in json.loads(read_text(path))["rows"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BackendError(f"{path}: damaged parity report ({type(error).__name__}: {error}); export again") from None


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Writes beside the file and renames: a reader sees the old one or the new one."""
    free = shutil.disk_usage(path.parent).free
    if free < len(content):
        raise BackendError(
            f"{path}: {len(content) / 2**20:.1f} MiB to write, {free / 2**20:.1f} MiB free here; free some space"
        )
    temporary = path.with_name(f".{path.name}{UNFINISHED}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
