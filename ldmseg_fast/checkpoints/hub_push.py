"""Sends a model folder to the Hugging Face Hub as one commit: the model's own files, with a model card."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.hub import listing, megabytes
from ldmseg_fast.checkpoints.hub_card import CardFacts, card_of, default_message
from ldmseg_fast.checkpoints.hub_errors import LOG_IN, library, told
from ldmseg_fast.checkpoints.hub_names import MAIN, PREFIX, REPOSITORY, REVISION, HubName, is_models
from ldmseg_fast.checkpoints.model_folder import CARDS, known_files, load_component, load_component_config, load_index
from ldmseg_fast.errors import ArgumentError, HubError
from ldmseg_fast.files import inside, read_file
from ldmseg_fast.files import sha256 as sha256_of

CARD = "README.md"


@dataclass(frozen=True)
class PushSettings:
    """Says how a model is sent.

    Attributes:
        private: whether a repository that is made now is private; None: as the account has it.
        revision: the branch; one that is missing is made from main.
        message: of the commit; None: composed.
        create_pr: open a pull request against main in the place of a commit on it.
        new_card: send the folder's own card, and drop the one that the repository has.
        dry_run: show what would be sent, and send nothing.
        facts: for the card.
    """

    private: bool | None = None
    revision: str = MAIN
    message: str | None = None
    create_pr: bool = False
    new_card: bool = False
    dry_run: bool = False
    facts: CardFacts = field(default_factory=CardFacts)


def push(
    folder: Path, repository: str, settings: PushSettings | None = None, say: Callable[[str], object] = print
) -> str:
    """Sends what the repository does not have yet of a model, and returns the address of the commit.

    Args:
        folder: the model folder; it is loaded first, with all weights.
        repository: "owner/name"; it is made where it is missing.
        settings: default the defaults.
        say: is told what is sent.

    Returns:
        The address of the commit or the pull request; of the repository where nothing has changed or with `dry_run`.

    Raises:
        CheckpointError: a folder that is no model, or a damaged one.
        ArgumentError: a name or a branch that cannot be, or `private` for a repository that is public.
        HubError: no token, no access, no connection, or a repository that changes meanwhile; nothing is half sent.
    """
    settings = settings or PushSettings()
    name = _checked_name(repository, settings)
    hub = library(name)
    files = model_files(folder)
    if hub.constants.HF_HUB_OFFLINE:
        raise HubError(f"{name}: HF_HUB_OFFLINE is set; unset it to send a model")
    if hub.get_token() is None:
        raise HubError(f"{name}: no token of the Hub here; {LOG_IN}, with a token that may write")
    with told(name, "write"):
        info, branch_is_new = _present(hub, name)
        if settings.private and info is not None and info.private is False:
            raise ArgumentError(
                f"{name}: the repository is public already; make it private on its page, or leave private out"
            )
        existing = None if info is None or settings.new_card else _card_there(hub, name, info)
    card = card_of(folder, name.repository, settings.facts, existing).encode()
    contents: dict[str, Path | bytes] = {**files, CARD: card}
    there = {} if info is None else {each.rfilename: each for each in info.siblings or ()}
    changed = {each: content for each, content in contents.items() if not _same(content, there.get(each))}
    address = f"{hub.constants.ENDPOINT}/{name.repository}"
    _show(name, contents, changed, info is None, say)
    if b"\nlicense:" not in card:
        say("no licence is known: give --license IDENTIFIER, or name it in the folder's README.md")
    if not changed or settings.dry_run:
        return address
    with told(name, "write"), _bars_in_terminals_only(hub):
        return _send(hub, name, info, branch_is_new, changed, settings, settings.message or default_message(folder))


def _checked_name(repository: str, settings: PushSettings) -> HubName:
    repository = repository.removeprefix(PREFIX)
    if not REPOSITORY.fullmatch(repository):
        raise ArgumentError(f"{repository[:200]}: no name of a repository; write owner/name")
    if not REVISION.fullmatch(settings.revision):
        raise ArgumentError(f"revision={settings.revision[:200]}: no name of a branch")
    if settings.create_pr and settings.revision != MAIN:
        raise ArgumentError(
            f"revision={settings.revision}: a pull request is made against {MAIN}; leave one of them out"
        )
    return HubName(repository, settings.revision)


def model_files(folder: Path) -> dict[str, Path]:
    """Lists the files of a model to send, by name, the card apart; the model is loaded first.

    Raises:
        CheckpointError: no model folder, a damaged one, or a link out of it.
    """
    for component in load_index(folder)["components"]:
        if component == "scheduler":
            load_component_config(folder, component)
        else:
            load_component(folder, component)
    paths = [folder / "model_index.json", *known_files(folder)]
    named = {path.relative_to(folder).as_posix(): inside(folder, path) for path in paths}
    return {name: path for name, path in named.items() if name != CARD and (is_models(name) or name in CARDS)}


def _present(hub: Any, name: HubName) -> tuple[Any, bool]:
    """What the repository has, None where there is none, and whether the branch has to be made."""
    try:
        return listing(hub, name), False
    except hub.errors.RevisionNotFoundError:
        return listing(hub, HubName(name.repository)), True
    except hub.errors.GatedRepoError:
        raise
    except hub.errors.RepositoryNotFoundError:
        return None, name.revision != MAIN


def _card_there(hub: Any, name: HubName, info: Any) -> str | None:
    if all(each.rfilename != CARD for each in info.siblings or ()):
        return None
    path = hub.hf_hub_download(name.repository, CARD, revision=info.sha)
    return read_file(path, HubError, "model card").decode("utf-8-sig", "replace")


def _same(content: Path | bytes, there: Any) -> bool:
    """Whether a file is in the repository already, by its size and its sum: SHA-256, or git's of small files."""
    if there is None:
        return False
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != there.size:
        return False
    if there.lfs is not None:
        own = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)
        return own == there.lfs.sha256
    data = content if isinstance(content, bytes) else read_file(content, HubError)
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


def _show(
    name: HubName,
    contents: dict[str, Path | bytes],
    changed: dict[str, Path | bytes],
    new: bool,
    say: Callable[[str], object],
) -> None:
    sizes = {
        each: len(content) if isinstance(content, bytes) else content.stat().st_size
        for each, content in contents.items()
    }
    if not changed:
        say(f"{name}: nothing to send, all {len(contents)} files are there")
        return
    for each in sorted(changed):
        say(f"  {megabytes(sizes[each]):>10}  {each}")
    where = f"{name} (new)" if new else str(name)
    unchanged = f"; {len(contents) - len(changed)} are there already" if len(changed) < len(contents) else ""
    say(f"{where}: {len(changed)} files of {megabytes(sum(sizes[each] for each in changed))} to send{unchanged}")


def _send(
    hub: Any,
    name: HubName,
    info: Any,
    branch_is_new: bool,
    changed: dict[str, Path | bytes],
    settings: PushSettings,
    message: str,
) -> str:
    api = hub.HfApi()
    if info is None:
        api.create_repo(name.repository, private=settings.private, exist_ok=True)
    if branch_is_new:
        api.create_branch(name.repository, branch=name.revision, exist_ok=True)
    operations = [
        hub.CommitOperationAdd(
            path_in_repo=each, path_or_fileobj=content if isinstance(content, bytes) else str(content)
        )
        for each, content in changed.items()
    ]
    commit = api.create_commit(
        name.repository,
        operations,
        commit_message=message,
        revision=name.revision,
        create_pr=settings.create_pr,
        parent_commit=None if info is None else info.sha,
    )
    return str(commit.pr_url or commit.commit_url)


@contextmanager
def _bars_in_terminals_only(hub: Any) -> Iterator[None]:
    silence = not sys.stderr.isatty() and not hub.utils.are_progress_bars_disabled()
    if silence:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            hub.utils.enable_progress_bars()
