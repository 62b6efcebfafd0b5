"""Reads and writes `export.json`, which says what a folder of exported graphs holds, and of which model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ldmseg_fast.backends.graphs.manifest_values import wrong_values
from ldmseg_fast.backends.graphs.seal import UNSEALED, check_seal, sealed
from ldmseg_fast.backends.graphs.specs import GraphOptions, GraphSpec
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import BackendError
from ldmseg_fast.files import read_text, sha256, without_repeats, write_json

FORMAT_VERSION = 2
# Since 2 weights for a CPU are of 7 bits, whose sums of two products fit 16 bits, and TensorRT's int8 has attention.
# Since 3 a graph for a CPU has ONNX Runtime's own nodes of products and attention; since 4 the first convolution is
# of 8 bits there. Since 5 mask decoders in half precision divide by the latents' factor before they round.
# Since 6 scales of int8 come from fewer pictures of a large model, a few at a time.
RULES = 6
HALF_RULES, INT8_RULES = 5, 6  # the last that changed graphs in half precision, and in int8
FILE_NAME = "export.json"
GRAPHS = ("image_encoder", "denoiser", "mask_decoder")


@dataclass(frozen=True)
class GraphFile:
    """Describes one graph on disk.

    Attributes:
        spec: of the graph.
        file, weights: relative to the folder; None where the graph's file holds its weights.
        sha256: of both together, see `hash_files`.
    """

    spec: GraphSpec
    file: str
    weights: str | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Describes a folder that `to_onnx.py` wrote.

    Attributes:
        model_hash: of the model folder, see `model_hash`.
        precision: one of `manifest_values.PRECISIONS`.
        opset: of ONNX.
        image_size: side of the pictures in pixels, 0: any multiple of `size_multiple`.
        downsampling: pixels per latent cell, along each side.
        size_multiple: what a picture's side must be a multiple of, in pixels.
        options: what the export fixed.
        graphs: by name.
        versions: of the packages that exported.
        command: that makes this folder again.
        calibration: what the ranges of a quantised model were measured on.
        rules: by which the graphs were made, see `RULES`.
        lora: the LoRA in the UNet's weights, by its file's name, hash and scale; empty: none. The hash of the model is
            that of the folder without it.
        model, scheduler: the model's index and its schedule.
    """

    model_hash: str
    precision: str
    opset: int
    image_size: int
    downsampling: int
    size_multiple: int
    options: GraphOptions
    graphs: dict[str, GraphFile]
    versions: dict[str, str]
    command: str
    calibration: str = ""
    lora: str = ""
    rules: int = RULES
    model: dict[str, Any] = field(repr=False, default_factory=dict)
    scheduler: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def is_for_cpu(self) -> bool:
        """Whether integers are as ONNX Runtime's kernels for the CPU take them."""
        return self.precision == "int8" and self.options.dtype == "float32"

    @property
    def is_outdated(self) -> bool:
        """Whether the graphs would be other ones by the rules of today."""
        least = INT8_RULES if self.precision == "int8" else HALF_RULES if self.options.dtype != "float32" else 0
        return self.rules < least

    def write(self, folder: Path) -> None:
        """Writes the folder's `export.json`."""
        graphs = {
            name: {"file": g.file, "weights": g.weights, "sha256": g.sha256, "spec": g.spec.to_dict()}
            for name, g in self.graphs.items()
        }
        record = vars(self) | {"graphs": graphs, "options": vars(self.options), "format_version": FORMAT_VERSION}
        write_json(folder / FILE_NAME, sealed(record))


def read_manifest(folder: str | Path, script: str = "to_onnx.py") -> Manifest:
    """Reads a folder's `export.json`.

    Args:
        folder: of exported graphs.
        script: makes such a folder; errors name it.

    Raises:
        BackendError: a folder that holds no export, one that is damaged or was edited, or one of another format.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise BackendError(
            f"{folder}: no {FILE_NAME} in it; make it with `python export/{script} MODEL_DIR --out {folder}`"
        )
    try:
        values = json.loads(read_text(path), object_pairs_hook=without_repeats)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        if values.get("format_version") not in (UNSEALED, FORMAT_VERSION):
            raise BackendError(
                f"{path}: format {values.get('format_version')!r}, this version reads {FORMAT_VERSION}; export again"
            )
        check_seal(values)
        options = values["options"] | {"sampler_steps": tuple(values["options"]["sampler_steps"])}
        graphs = {
            name: GraphFile(GraphSpec.from_dict(g["spec"]), g["file"], g["weights"], g["sha256"])
            for name, g in values["graphs"].items()
        }
        values.setdefault("lora", "")  # of exports from before these two were written
        values.setdefault("rules", 1)
        plain = {item.name: values[item.name] for item in fields(Manifest) if item.name not in ("options", "graphs")}
        if missing := [name for name in GRAPHS if name not in graphs]:
            raise BackendError(f"{path}: no {', '.join(missing)} in it; export again")
        manifest = Manifest(options=GraphOptions(**options), graphs=graphs, **plain)
        if wrong := wrong_values(values, manifest.options, {name: graph.spec for name, graph in graphs.items()}):
            raise ValueError(f"no export has such values: {', '.join(wrong[:5])}")
    except BackendError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BackendError(f"{path}: damaged ({shown(error)}); export again") from None
    return manifest


def check_files(folder: str | Path, manifest: Manifest, names: tuple[str, ...] = GRAPHS) -> None:
    """Checks graph files. Raises BackendError for one that is missing or differs from what was exported."""
    for name in names:
        graph = manifest.graphs[name]
        for file in filter(None, (graph.file, graph.weights)):
            if not (Path(folder) / file).is_file():
                what = "the weights of" if file == graph.weights else "the graph"
                raise BackendError(
                    f"{Path(folder) / file}: missing, it holds {what} {name}; copy it too, or export again"
                )
        if hash_files(Path(folder), graph.file, graph.weights) != graph.sha256:
            raise BackendError(f"{Path(folder) / graph.file}: not the file that was exported; export again")


def check_model(folder: str | Path, manifest_hash: str, info: ModelInfo, rebuild: str) -> None:
    """Checks that `folder` was made from `info`'s model. Raises BackendError with the command `rebuild` where not."""
    if model_hash(info.folder) != manifest_hash:
        raise BackendError(f"{folder}: made from another model than {info.folder}; make it again:\n  {rebuild}")


def at_graphs_size(info: ModelInfo, folder: str | Path, manifest: Manifest, image_size: int | None) -> ModelInfo:
    """Returns `info` at the picture size that graphs are run at: the one asked for, the graphs' own, or the model's.

    Raises:
        BackendError: graphs of another fixed size, or a size that the model does not take.
    """
    if manifest.image_size and image_size not in (None, manifest.image_size):
        raise BackendError(
            f"{folder}: exported for pictures of {manifest.image_size} pixels, image_size={image_size} was asked for; "
            f"export with --size {image_size}, or --size dynamic"
        )
    default = manifest.image_size or info.image_size
    return info.at_size(default if image_size is None else image_size)


def hash_files(folder: Path, *names: str | None) -> str:
    """Computes the SHA-256 over the files' own digests, in this order. None stands for no file."""
    total = hashlib.sha256()
    for name in filter(None, names):
        total.update(bytes.fromhex(sha256(folder / name)))
    return total.hexdigest()


def model_hash(folder: Path) -> str:
    """Computes the SHA-256 over every component's configuration and weights.

    The index's settings, names and dates do not matter.
    """
    paths = sorted(
        path
        for name in ("unet", "mask_vae", "image_vae", "scheduler", "conditioning")
        for path in (folder / name).glob("*")
        if path.suffix in (".json", ".safetensors")
    )
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(sha256, paths))
    total = hashlib.sha256()
    for path, digest in zip(paths, digests):
        total.update(f"{path.relative_to(folder).as_posix()}\0".encode() + bytes.fromhex(digest))
    return total.hexdigest()


def describe_model(info: ModelInfo) -> Mapping[str, Any]:
    """Returns the model's index and its categories, for the server and for people who find the folder later."""
    described = {key: value for key, value in info.index.items() if not key.startswith("_")}
    return described if info.categories is None else described | {"categories": info.categories.to_coco()}
