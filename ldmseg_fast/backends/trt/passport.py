"""Reads and checks an engine's passport: the JSON beside it that says where it may run, read before the engine is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ldmseg_fast.backends.graphs.manifest import Manifest
from ldmseg_fast.backends.graphs.manifest_values import PRECISIONS
from ldmseg_fast.backends.graphs.seal import UNSEALED, check_seal, sealed
from ldmseg_fast.backends.trt.api import FLAVOURS
from ldmseg_fast.backends.trt.machine import MIN_DRIVER, Machine, driver_major
from ldmseg_fast.errors import BackendError
from ldmseg_fast.files import read_text, sha256, without_repeats, write_json

FORMAT_VERSION = 2
Range = tuple[int, int, int]  # least, best, largest


@dataclass(frozen=True)
class Passport:
    """Describes one engine.

    Attributes:
        graph: name of the graph; the engine is GRAPH.engine.
        engine_sha256, engine_bytes: of that file.
        flavour, version: of TensorRT.
        gpu, compute_capability, driver: of the machine that built it; empty where it had no GPU.
        targets: as asked for: ("current",), ("same",), ("portable",) or compute capabilities such as ("sm89",).
        onnx_sha256, model_hash, precision, image_size: of the export it was built from.
        profiles: per optimisation profile the range of each dynamic axis; `height` and `width` are the map's.
        version_compatible: built to be loaded by later versions of the same major.
        stripped: built without weights; they come from the graph, which must lie in the folder's `onnx/`.
        key: of the build's settings; an equal key needs no new build.
        build_seconds, built: duration, and the time in UTC.
        parity: worst value of each comparison of the parity report.
        compared: what that report is of: "graphs", or the "engine" itself, where it ran; "missed": an engine's too, of
            which one value is beyond its limit.
        layers: with --verbose how many layers of each type the engine has, or where it was built without a GPU the
            network that it was built from.
        command: that builds it again.
    """

    graph: str
    engine_sha256: str
    engine_bytes: int
    flavour: str
    version: str
    gpu: str
    compute_capability: str
    driver: str
    targets: tuple[str, ...]
    onnx_sha256: str
    model_hash: str
    precision: str
    image_size: int
    profiles: tuple[dict[str, Range], ...]
    version_compatible: bool
    stripped: bool
    key: str
    build_seconds: float
    built: str
    command: str
    parity: dict[str, float] = field(default_factory=dict)
    compared: str = "graphs"
    layers: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Writes the passport beside its engine."""
        write_json(passport_file(folder, self.graph), sealed(asdict(self)))

    @property
    def rebuild(self) -> str:
        """How an error tells people to build the engine again."""
        return f"build it again on this machine:\n  {self.command}"


def passport_file(folder: Path, graph: str) -> Path:
    """Names the passport of a graph's engine."""
    return folder / f"{graph}.passport.json"


def engine_file(folder: Path, graph: str) -> Path:
    """Names the engine of a graph."""
    return folder / f"{graph}.engine"


def read_passport(folder: Path, graph: str) -> Passport:
    """Reads a passport. Raises BackendError where there is none, or it is damaged, edited or of another format."""
    path = passport_file(folder, graph)
    if not path.is_file():
        raise BackendError(
            f"{engine_file(folder, graph)}: no passport beside it ({path.name}), so it is not loaded; "
            f"build it with `python export/to_trt.py MODEL_DIR --out {folder}`"
        )
    try:
        values: dict[str, Any] = json.loads(read_text(path), object_pairs_hook=without_repeats)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        if values.get("format_version") not in (UNSEALED, FORMAT_VERSION):
            raise BackendError(
                f"{path}: passport format {values.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
                f"build it again:\n  {values.get('command', 'python export/to_trt.py')}"
            )
        check_seal(values)
        names = {item.name for item in fields(Passport)}
        values = {key: value for key, value in values.items() if key in names}
        values["profiles"] = tuple(
            {a: (low, best, high) for a, (low, best, high) in p.items()} for p in values["profiles"]
        )
        passport = Passport(**values | {"targets": tuple(values["targets"])})
        _check_values(passport, graph)
        return passport
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BackendError(f"{path}: damaged ({str(error)[:200]}); build the engine again") from None


def _check_values(passport: Passport, graph: str) -> None:
    """Raises TypeError for a value of another type than `Passport` has, ValueError for one that no build has."""
    sizes = [size for profile in passport.profiles for span in profile.values() for size in span]
    numbers = [*sizes, passport.engine_bytes, passport.image_size, *passport.layers.values()]
    texts = [getattr(passport, item.name) for item in fields(Passport) if item.type == "str"]
    flags = [passport.version_compatible, passport.stripped]
    measured = [passport.build_seconds, *passport.parity.values()]
    for kinds, values in (
        ((int,), numbers),
        ((str,), [*texts, *passport.targets, *passport.parity, *passport.layers]),
        ((bool,), flags),
        ((int, float), measured),
    ):
        wrong = [value for value in values if type(value) not in kinds]
        if wrong:
            raise TypeError(f"{str(wrong[0])[:100]} is no {kinds[-1].__name__}")
    spans = [span for profile in passport.profiles for span in profile.values()]
    fits = {
        "graph": passport.graph == graph,
        "flavour": passport.flavour in FLAVOURS,
        "precision": passport.precision in PRECISIONS,
        "targets": bool(passport.targets),
        "profiles": bool(passport.profiles) and all(1 <= low <= best <= high <= 2**31 for low, best, high in spans),
        "compared": passport.compared in ("graphs", "engine", "missed"),
    }
    if wrong := [name for name, good in fits.items() if not good]:
        raise ValueError(f"no build has such values: {', '.join(wrong)}")


def check_passport(
    passport: Passport,
    folder: Path,
    manifest: Manifest,
    model_hash: str,
    flavour: str,
    version: str,
    machine: Machine,
    min_driver: int = MIN_DRIVER,
) -> None:
    """Checks everything that must be equal, before the engine's first byte is interpreted.

    Args:
        passport: of the engine.
        folder: where both lie.
        manifest: of the export in `folder`.
        model_hash: of the MODEL_DIR that is to run.
        flavour, version: of the TensorRT that would load it.
        machine: GPU and driver here.
        min_driver: major of the driver that this TensorRT needs at least.

    Raises:
        BackendError: one error that lists all that differs, and the command that builds the engine again.
    """
    graph = manifest.graphs[passport.graph]
    differences = [
        f"{what}: {was}, here {now}"
        for what, was, now in (
            ("TensorRT flavour", passport.flavour, flavour),
            ("model", passport.model_hash[:12], model_hash[:12]),
            ("model of the export", passport.model_hash[:12], manifest.model_hash[:12]),
            ("ONNX graph", passport.onnx_sha256[:12], graph.sha256[:12]),
            ("precision", passport.precision, manifest.precision),
            ("image size", passport.image_size, manifest.image_size),
        )
        if was != now
    ]
    differences += _version_difference(passport, version) if passport.flavour == flavour else []
    differences += _machine_differences(passport, machine, min_driver)
    needed = set(graph.spec.axes) | ({"height", "width"} if "size" in graph.spec.tensors else set())
    for index, profile in enumerate(passport.profiles):
        if set(profile) != needed:
            differences.append(f"axes of profile {index}: {sorted(profile)}, the graph has {sorted(needed)}")
    differences += file_differences(passport, engine_file(folder, passport.graph))
    if differences:
        raise BackendError(
            f"{engine_file(folder, passport.graph)} does not fit: " + "; ".join(differences) + f"; {passport.rebuild}"
        )


def _version_difference(passport: Passport, version: str) -> list[str]:
    if passport.version == version:
        return []
    was, now = (tuple(int(part) for part in text.split(".") if part.isdigit()) for text in (passport.version, version))
    if passport.version_compatible and was[:1] == now[:1] and was <= now:
        return []
    return [f"TensorRT version: {passport.version}, here {version}"]


def _machine_differences(passport: Passport, machine: Machine, min_driver: int) -> list[str]:
    """Asks what the level of the build asks: the GPU itself, its compute capability, one of several, or Ampere."""
    found = []
    here = "sm" + machine.compute_capability.replace(".", "")
    if passport.targets in (("current",), ("same",)):
        if passport.compute_capability != machine.compute_capability:
            found.append(f"compute capability: {passport.compute_capability}, here {machine.compute_capability}")
        # TensorRT-RTX knows compute capabilities alone
        if passport.targets == ("current",) and passport.flavour != "rtx" and passport.gpu != machine.gpu:
            found.append(f"GPU: {passport.gpu}, here {machine.gpu}")
    elif passport.targets == ("portable",):
        least = 7.5 if passport.flavour == "rtx" else 8.0
        if float(machine.compute_capability or 0) < least:
            found.append(f"compute capability: {least} or later, here {machine.compute_capability}")
    elif here not in passport.targets:
        found.append(f"compute capability: {', '.join(passport.targets)}, here {here}")
    if driver_major(machine.driver) < min_driver:
        found.append(f"NVIDIA driver: {min_driver} or later, here {machine.driver or 'none'}")
    return found


def file_differences(passport: Passport, path: Path) -> list[str]:
    """Lists how the engine file differs from the one that the passport was written for."""
    if not path.is_file():
        return [f"engine file: {passport.engine_bytes} bytes, here none"]
    if path.stat().st_size != passport.engine_bytes:
        return [f"engine file: {passport.engine_bytes} bytes, here {path.stat().st_size}"]
    digest = sha256(path)
    return (
        [] if digest == passport.engine_sha256 else [f"engine file: {passport.engine_sha256[:12]}, here {digest[:12]}"]
    )
