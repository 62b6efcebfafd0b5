"""Fetches models from the Hugging Face Hub into huggingface_hub's cache: one commit, and only files that are needed.

HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and tokens mean what they mean for that library
(https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables).
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.hub_errors import UnreachableError, library, retried, told
from ldmseg_fast.checkpoints.hub_names import (
    COMMIT,
    PREFIX,
    WEIGHT_FILES,
    HubName,
    check_takes_file,
    files_of,
    hub_name,
    missing_in,
)
from ldmseg_fast.errors import HubError
from ldmseg_fast.files import replacing

TIMEOUT = 15.0  # seconds that the Hub may take to answer

_WITH_WEIGHTS = ContextVar("with_weights", default=True)


@contextmanager
def settings_alone() -> Iterator[None]:
    """Fetches no weights inside a `with` block, for what only looks at a model's settings."""
    before = _WITH_WEIGHTS.set(False)
    try:
        yield
    finally:
        _WITH_WEIGHTS.reset(before)


def fetch(name: HubName, kinds: Sequence[str]) -> Path:
    """Finds a repository's snapshot in the cache, after downloading what it lacks.

    A branch or a tag is asked for anew each time, a commit only until it is in the cache. Without a connection the
    commit that the branch had last is taken, and a line says so. Ranks that were launched together get one commit.

    Args:
        name: of the repository.
        kinds: of repositories that the caller can use, of `hub_names`.

    Returns:
        The snapshot's folder, or the file that is asked for in it.

    Raises:
        HubError: a wrong name or revision, no access, no connection and nothing in the cache, or no huggingface_hub.
        CheckpointError: a repository of another kind.
    """
    check_takes_file(name, kinds)
    hub = library(name)
    cached = _cached(hub, name)
    lacking = missing_in(cached, kinds, _WITH_WEIGHTS.get(), name.file) if cached is not None else []
    whole = cached is not None and not lacking
    if cached is not None and whole and (name.is_commit or hub.constants.HF_HUB_OFFLINE):
        _say(f"{name}: commit {cached.name}, from the cache")
        return cached / name.file
    if hub.constants.HF_HUB_OFFLINE:
        has = f"has it without {', '.join(lacking[:3])}" if cached is not None else "does not have it"
        raise HubError(
            f"{name}: no such folder here, HF_HUB_OFFLINE is set, and the cache {hub.constants.HF_HUB_CACHE} {has}; "
            f"unset it once with a connection, check the name, or give a local folder"
        )
    try:
        with told(name):
            info = _agreed(hub, name, listing(hub, name))
    except UnreachableError as error:
        if cached is None or not whole:
            raise
        _say(f"{error}; taking commit {cached.name} from the cache")
        return cached / name.file
    with told(name):
        return _download(hub, name, info, kinds) / name.file


def _cached(hub: Any, name: HubName) -> Path | None:
    """The snapshot that the cache has for a revision, whole or not."""
    try:
        # the one pattern keeps files of the repository that nobody wants from counting as missing
        found = hub.snapshot_download(
            name.repository, revision=name.revision, local_files_only=True, allow_patterns=["*.no-such-file"]
        )
    except hub.errors.LocalEntryNotFoundError:
        return None
    return Path(found)


def _download(hub: Any, name: HubName, info: Any, kinds: Sequence[str]) -> Path:
    """Downloads what the cache lacks of a commit; `info` is the Hub's answer about it."""
    commit: str = info.sha
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    files = files_of(name, list(sizes), kinds)
    if not (_WITH_WEIGHTS.get() or name.file):  # a single file's settings are in its tensors
        files = [file for file in files if not file.endswith(WEIGHT_FILES)]
    waiting = [
        file
        for file in files
        if not isinstance(hub.try_to_load_from_cache(name.repository, file, revision=commit), str)
    ]
    total = megabytes(sum(sizes[file] for file in files))
    if waiting:
        _say(
            f"{name}: commit {commit}, {len(files)} files of {total}; downloading "
            f"{megabytes(sum(sizes[file] for file in waiting))}"
        )
    else:
        _say(f"{name}: commit {commit}, {len(files)} files of {total}, from the cache")
    folder = retried(
        lambda: hub.snapshot_download(
            name.repository,
            revision=commit,
            allow_patterns=[glob.escape(file) for file in files],
            etag_timeout=TIMEOUT,
            tqdm_class=_Bar,
        )
    )
    snapshot = Path(folder)
    if absent := [file for file in files if not (snapshot / file).is_file()]:
        # where the Hub falls silent at the wrong moment, huggingface_hub takes a part for the whole
        raise UnreachableError(f"{name}: {', '.join(absent[:3])} did not come; run it again")
    if not name.is_commit:  # so that the branch is found without a connection
        reference = snapshot.parents[1] / "refs" / name.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        with replacing(reference) as temporary:
            temporary.write_text(commit, encoding="utf-8")
    return snapshot


def listing(hub: Any, name: HubName) -> Any:
    """Asks the Hub about a revision: `sha`, its commit, and `siblings`, its files with their sizes.

    Raises:
        HubError: an answer that is none of a Hub's. Errors of huggingface_hub are left to `told`.
    """

    def ask() -> Any:
        return hub.HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=TIMEOUT)

    try:
        info = retried(ask)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        info = None
    if info is None or not COMMIT.fullmatch(str(info.sha)):
        raise HubError(f"{name}: {hub.constants.ENDPOINT} does not answer as a Hub does; check HF_ENDPOINT")
    return info


def _agreed(hub: Any, name: HubName, info: Any) -> Any:
    """The answer about the commit that the first rank to ask has found, as a branch may move meanwhile."""
    if distributed.world_size() == 1:
        return info
    from torch.distributed.distributed_c10d import _get_default_store

    commit = _get_default_store().compare_set(f"ldmseg/hub/{name}", "", info.sha).decode()
    return info if commit == info.sha else listing(hub, HubName(name.repository, commit))


def pinned(word: str, folder: Path) -> str:
    """Writes what names a snapshot's commit for ever, for the records of a run; other folders keep their word.

    Args:
        word: that the user wrote.
        folder: what it was resolved to, a snapshot or a file in one.
    """
    name = None if Path(word).exists() else hub_name(word)
    if name is None:
        return word
    snapshot = folder.parents[name.file.count("/")] if name.file else folder
    return PREFIX + str(HubName(name.repository, snapshot.name, name.file))


def megabytes(count: int) -> str:
    """Writes a number of bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


class _Bar(tqdm):
    """Is silent where there is no terminal, and on all ranks but the first."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.pop("name", None)  # of huggingface_hub's groups of bars
        hub = library("progress")
        quiet = not distributed.is_main() or hub.utils.are_progress_bars_disabled()
        super().__init__(*args, **settings | {"disable": True if quiet else None})


_said: set[str] = set()


def _say(line: str) -> None:
    """Prints a line on stderr, once in a process and on one rank."""
    if distributed.is_main() and line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)
