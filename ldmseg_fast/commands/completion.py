"""`ldmseg completion SHELL` prints a script that completes ldmseg's commands, options and file names in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ldmseg_fast.commands.options import output_file

SHELLS = ("bash", "zsh", "fish")
PATHS = ("model_dir", "model", "images", "root", "data", "engine_dir", "image_vae")  # arguments that name files as text

EXAMPLES = (
    'eval "$(ldmseg completion bash)"    # in this shell; for all, append it to ~/.bashrc',
    "ldmseg completion zsh > ~/.zfunc/_ldmseg    # with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc",
    "ldmseg completion fish > ~/.config/fish/completions/ldmseg.fish",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    """Prints the script, which starts no Python when it completes."""
    import shtab

    from ldmseg_fast.cli import build_parser

    root = build_parser()
    for parser in _parsers(root):
        for action in parser._actions:
            if (action.type in (Path, output_file) or action.dest in PATHS) and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(root, args.shell))
    return 0


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields a parser and those of its sub-commands, with their arguments; shtab passes over what has no help."""
    getattr(parser, "add_late", lambda: None)()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            action.help = "command"
            for child in action.choices.values():
                yield from _parsers(child)
