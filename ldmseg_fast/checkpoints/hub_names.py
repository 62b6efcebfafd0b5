"""Tells names of the Hugging Face Hub from paths, and lists which files of a repository belong to a model.

Nothing here asks the network for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmseg_fast.checkpoints.categories_file import CATEGORIES
from ldmseg_fast.checkpoints.schema import COMPONENTS, read_settings
from ldmseg_fast.checkpoints.tensors import WEIGHTS
from ldmseg_fast.checkpoints.weight_files import choose_files
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.files import real_path

PREFIX = "hf://"
MAIN = "main"
# https://huggingface.co/docs/huggingface_hub/package_reference/utilities: what validate_repo_id takes, with an owner
_PART = r"(?!.*(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?"
REPOSITORY = re.compile(rf"{_PART}/(?!.*\.git$){_PART}", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)[\w.+=-]+(/[\w.+=-]+)*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE = re.compile(r"(?!.*(?:\.\./|//))\w[\w. +()/-]*\.\w+", re.ASCII)
# first parts that people's own folders have: a slip in such a path is no question to the network
FOLDERS = (
    *("checkpoints", "ckpts", "data", "demo", "engines", "experiments", "graphs", "logs", "model", "models", "out"),
    *("output", "outputs", "releases", "results", "runs", "scenes", "tmp", "weights"),
)
FILES = (".bin", ".ckpt", ".json", ".onnx", ".pt", ".pth", ".safetensors", ".tar", ".yaml", ".yml", ".zip")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHT_FILES = (".safetensors", ".onnx", ".onnx.data")
RULE = (
    "a model of the Hub is written owner/name or owner/name@revision; where a folder `owner` is here, or its name is a "
    f"usual one such as runs or models, it is a path, and {PREFIX}owner/name the model of the Hub"
)
FILE_RULE = "one file of the Hub is written owner/name:FILE.safetensors or owner/name@revision:FILE.safetensors"


@dataclass(frozen=True)
class HubName:
    """Names a repository of the Hub at a branch, tag or commit, or one file of it."""

    repository: str
    revision: str = MAIN
    file: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repository}{revision}" + (f":{self.file}" if self.file else "")

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None


def shown_name(folder: Path) -> str:
    """Names a model folder in reports: its own name, or repository and commit of a snapshot in the cache."""
    folder = real_path(folder) if folder.name in ("", "..") else folder
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"
    return folder.name


def hub_name(word: str, revision: str | None = None) -> HubName | None:
    """Reads a name of the Hub; None where `word` is a path.

    Args:
        word: that names no file or folder that is there.
        revision: branch, tag or commit, where the word has none.

    Raises:
        ArgumentError: a name that is none behind `hf://`, a revision that is none, or two of them; a file that is no
            safetensors file.
    """
    explicit = word.startswith(PREFIX)
    whole, colon, file = word.removeprefix(PREFIX).partition(":")
    repository, at, own = whole.partition("@")
    owner = repository.partition("/")[0]
    if not REPOSITORY.fullmatch(repository):
        if explicit:
            raise ArgumentError(f"{word[:200]}: no name of the Hub; {RULE}")
        return None
    if not explicit and (owner in FOLDERS or Path(owner).exists() or repository.lower().endswith(FILES)):
        return None
    if at and revision is not None and revision != own:
        raise ArgumentError(f"{word}: revision={revision} is another one; leave one of them out")
    wanted = own if at else revision
    if wanted is not None and not REVISION.fullmatch(wanted):
        raise ArgumentError(f"{repository}: revision {wanted[:200]!r} is no branch, tag or commit; leave out the @?")
    if colon and not (FILE.fullmatch(file) and file.endswith(".safetensors")):
        what = f"{file[:200]} is a pickle, which can run code" if file.endswith(PICKLES) else "no safetensors file"
        raise ArgumentError(f"{word[:300]}: {what}; {FILE_RULE}")
    return HubName(repository, MAIN if wanted is None else wanted, file)


MODEL, DIFFUSERS, VAE, GRAPHS = "model", "diffusers", "vae", "graphs"  # kinds of repositories
_TOLD = {
    MODEL: "a model folder (model_index.json beside unet/, mask_vae/, image_vae/ and scheduler/)",
    DIFFUSERS: "a Stable Diffusion model in diffusers' layout (unet/ and vae/ with .safetensors files)",
    VAE: "an image VAE (config.json beside diffusion_pytorch_model.safetensors)",
    GRAPHS: "exported ONNX graphs (export.json beside .onnx files)",
}
_OURS = re.compile(
    rf"model_index\.json|config\.json|{re.escape(CATEGORIES)}|README\.md|"
    rf"(?:{'|'.join(COMPONENTS)})/(?:config\.json|{re.escape(WEIGHTS)})|conditioning/tokenizer/[\w.-]+\.json|"
    r"scheduler/scheduler_config\.json"
)
_GRAPHS = re.compile(r"export\.json|README\.md|[\w.-]+\.onnx(?:\.data)?")


def kind_of(names: Iterable[str]) -> str | None:
    """Tells from its files which kind of repository this is; None for another one."""
    names = set(names)
    if {"model_index.json", "mask_vae/config.json"} <= names:
        return MODEL
    if "unet/config.json" in names:
        return DIFFUSERS
    if "vae/config.json" in names or ("config.json" in names and any(map(_is_vae_weights, names))):
        return VAE
    return GRAPHS if "export.json" in names else None


def files_of(name: HubName, names: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Lists the files to fetch: JSON, safetensors and the model card, of exported graphs the graphs.

    Of Stable Diffusion these are unet/, vae/ and scheduler/, each in one variant, full precision before half.

    Args:
        name: of the repository, for errors.
        names: of all files in it.
        kinds: that the caller can use.

    Raises:
        CheckpointError: a repository of another kind, one whose weights are pickles only, or one without the file that
            is asked for.
    """
    if name.file:
        check_takes_file(name, kinds)
        if name.file not in names:
            known = [each for each in names if each.endswith(".safetensors") and "/" not in each]
            raise CheckpointError(f"{name}: no such file; there are {', '.join(sorted(known)[:5]) or 'none like it'}")
        return [name.file]
    kind = kind_of(names)
    if kind == DIFFUSERS and DIFFUSERS not in kinds and VAE in kinds and "vae/config.json" in names:
        kind = VAE  # of the whole model the VAE alone is asked for
    if kind not in kinds:
        found = f"it is {_TOLD[kind]}" if kind else f"its files are {', '.join(sorted(names)[:5]) or 'none'}"
        raise CheckpointError(f"{name}: {' or '.join(_TOLD[each] for each in kinds)} expected, and {found}")
    if kind == MODEL:
        return [each for each in names if _OURS.fullmatch(each)]
    if kind == GRAPHS:
        return [each for each in names if _GRAPHS.fullmatch(each)]
    parts = ("vae",) if kind == VAE else ("unet", "vae")
    folders = [folder for folder in parts if f"{folder}/config.json" in names] or [""]
    wanted = {"README.md"}
    if kind == DIFFUSERS:
        wanted |= {"model_index.json", "scheduler/scheduler_config.json", "scheduler/config.json"}
    for folder in folders:
        start = f"{folder}/" if folder else ""
        inside = [each.removeprefix(start) for each in names if each.startswith(start)]
        weights = choose_files([each for each in inside if "/" not in each])
        if not weights:
            raise CheckpointError(
                f"{name}: no safetensors files in {folder or 'it'}, and pickles are not fetched, because they can run "
                f"code when they are read; take a repository or a revision that has .safetensors files"
            )
        wanted |= {start + each for each in ("config.json", *weights)}
    return [each for each in names if each in wanted]


def check_takes_file(name: HubName, kinds: Sequence[str]) -> None:
    """Raises CheckpointError where one file is asked for and a whole model is needed."""
    if name.file and not {DIFFUSERS, VAE} & set(kinds):
        raise CheckpointError(
            f"{name}: one file of the Hub will do as model.init_from or as an image VAE; "
            f"{' or '.join(_TOLD[each] for each in kinds)} expected: leave out :{name.file}"
        )


def is_models(name: str) -> bool:
    """Tells whether a file of a model folder, named relative to it, is one that `files_of` fetches."""
    return _OURS.fullmatch(name) is not None


def missing_in(folder: Path, kinds: Sequence[str], weights: bool = True, file: str = "") -> list[str]:
    """Lists files that a snapshot in the cache lacks; a link that leads nowhere counts as lacking.

    Of shards `weight_files.read_weights` tells.

    Args:
        folder: of the snapshot.
        kinds: that the caller can use.
        weights: whether they have to be there too.
        file: the one that is wanted; "": the model.
    """
    if file:
        return [] if (folder / file).is_file() else [file]
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    kind = kind_of(names) or (VAE if "config.json" in names else None)
    index = read_settings(folder / "model_index.json") if "model_index.json" in names else {}
    if MODEL in kinds and "format_version" in index:
        kind = MODEL
    elif kind == DIFFUSERS and DIFFUSERS not in kinds:
        kind = VAE
    if kind not in kinds:
        return ["export.json" if GRAPHS in kinds else "model_index.json" if MODEL in kinds else "config.json"]
    if kind == MODEL:
        found = index.get("components")
        parts = [part for part in found if part in COMPONENTS] if isinstance(found, list) else []
        needed = [f"{part}/config.json" for part in parts]
        needed += [f"{part}/{WEIGHTS}" for part in parts if part != "scheduler" and weights]
        return [name for name in needed if name not in names]
    if kind == GRAPHS or not weights:
        return []
    parts = ["vae"] if kind == VAE else ["unet", "vae"]
    starts = [f"{part}/" for part in parts if f"{part}/config.json" in names] or [""]
    inside = {start: [name.removeprefix(start) for name in names if name.startswith(start)] for start in starts}
    return [f"{start}diffusion_pytorch_model.safetensors" for start in starts if not choose_files(inside[start])]


def _is_vae_weights(name: str) -> bool:
    return name.startswith("diffusion_pytorch_model") and "/" not in name
