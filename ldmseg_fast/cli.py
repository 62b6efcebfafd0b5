"""Holds the table of `ldmseg`'s commands. Each has a module in `commands/` with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ldmseg_fast import __version__
from ldmseg_fast.allocator import keep_freed_memory
from ldmseg_fast.errors import ArgumentError, printable
from ldmseg_fast.imports import why_no_torch
from ldmseg_fast.stopping import terminable, why_stopped
from ldmseg_fast.streams import open_streams
from ldmseg_fast.threads import limit_threads

# command -> its module, and what `ldmseg --help` says of it
COMMANDS = {
    "predict": ("ldmseg_fast.commands.predict", "segment pictures"),
    "inpaint": ("ldmseg_fast.commands.inpaint", "complete a panoptic map of which a part is given"),
    "app": ("ldmseg_fast.commands.app", "serve a model as a web page and an HTTP API on this machine"),
    "evaluate": ("ldmseg_fast.commands.evaluate", "measure the panoptic quality of a model on a COCO-panoptic folder"),
    "pq": ("ldmseg_fast.commands.pq", "measure the panoptic quality of result files, as panopticapi does"),
    "data import": ("ldmseg_fast.commands.data_import", "make a COCO-panoptic folder of another data set"),
    "data export": ("ldmseg_fast.commands.data_export", "write a data set or results in another format"),
    "data check": ("ldmseg_fast.commands.data_check", "look for damaged or inconsistent files"),
    "data scenes": ("ldmseg_fast.commands.data_scenes", "generate scenes in COCO-panoptic layout"),
    "data merge": ("ldmseg_fast.commands.data_merge", "make one split of splits of several folders, by links"),
    "data cache": ("ldmseg_fast.commands.data_cache", "encode every picture once, for training"),
    "runs": ("ldmseg_fast.commands.runs", "list the training runs below a folder and their best PQ"),
    "report": ("ldmseg_fast.commands.report", "write curves and pictures of one training run as an HTML page"),
    "demo": ("ldmseg_fast.commands.demo", "run the whole path in minutes, from generated scenes to a report"),
    "convert": ("ldmseg_fast.commands.convert", "turn a published LDMSeg checkpoint into a model folder"),
    "ship": ("ldmseg_fast.commands.ship", "turn a training run into small weights with a model card"),
    "push": ("ldmseg_fast.commands.push", "send a model to the Hugging Face Hub, with a model card"),
    "doctor": ("ldmseg_fast.commands.doctor", "tell what this machine can run, and what would make it faster"),
    "completion": ("ldmseg_fast.commands.completion", "print a script that completes commands in bash, zsh or fish"),
}
NETWORKS = ("predict", "inpaint", "evaluate")  # what they run leaves much memory, and takes it again
GROUPS = {"data": "import, export, check, generate, merge or encode data sets"}
# the headings of `ldmseg --help`; a command that none lists stands below the last
SECTIONS = {
    "segment": ("predict", "inpaint", "app"),
    "measure": ("evaluate", "pq"),
    "data": ("data",),
    "train": ("runs", "report", "demo"),
    "models": ("convert", "ship", "push"),
    "tools": ("doctor", "completion"),
}
EXAMPLES = """\
examples:
  ldmseg predict tiny photo.png --out results     a map, an overlay and a JSON of the picture
  ldmseg evaluate tiny --data scenes              panoptic quality of the shipped model
  ldmseg pq GT.json PRED.json --json              that of any method's result files, as JSON
  python -m ldmseg_fast.train --help              training, on any number of ranks

exit codes: 0 done, 1 done in part or the answer is no, 2 wrong input, 74 another rank has gone,
  130 and 143 interrupted, 141 nobody reads the output"""


class LateParser(argparse.ArgumentParser):
    """Gets its arguments when it is used, so that no command waits for the imports of another."""

    fill: Callable[[], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.add_late()
        return super().parse_known_args(args, namespace)

    def add_late(self) -> None:
        """Adds the arguments, once."""
        if self.fill is not None:
            self.fill()
            self.fill = None


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands; `args.run(args)` carries out the one that was chosen."""
    parser = argparse.ArgumentParser(
        prog="ldmseg",
        usage="ldmseg [--version] COMMAND [--help] ...",
        description=f"Latent-diffusion panoptic segmentation.\n\n{_overview()}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands: Any = parser.add_subparsers(
        dest="command", required=True, parser_class=LateParser, prog="ldmseg", help=argparse.SUPPRESS
    )
    groups: dict[str, Any] = {}
    for name, (module, text) in COMMANDS.items():
        group, _, own_name = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = commands.add_parser(group, help=GROUPS[group]).add_subparsers(required=True)
        described = {"help": text, "description": f"{text[0].upper()}{text[1:]}."}
        command = (groups[group] if group else commands).add_parser(own_name, **described)
        command.fill = _filler(command, module)
    return parser


def _overview() -> str:
    """Lists the commands below their headings."""
    texts = GROUPS | {name: text for name, (_, text) in COMMANDS.items() if " " not in name}
    headings = {name: heading for heading, names in SECTIONS.items() for name in names}
    last = list(SECTIONS)[-1]
    return "\n".join(
        "\n".join([f"{heading}:", *(f"  {n:<11} {t}" for n, t in texts.items() if headings.get(n, last) == heading)])
        for heading in SECTIONS
    )


def _filler(parser: argparse.ArgumentParser, module: str) -> Callable[[], None]:
    def fill() -> None:
        command = importlib.import_module(module)
        command.add_arguments(parser)
        parser.set_defaults(run=command.run)
        examples = "\n".join(["examples:", *(f"  {line}" for line in command.EXAMPLES)])
        parser.epilog = f"{parser.epilog}\n\n{examples}" if parser.epilog else examples
        parser.formatter_class = argparse.RawDescriptionHelpFormatter

    return fill


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Writes a warning that is meant for users as one line, and others with the place that they come from."""
    if category is UserWarning:
        return f"ldmseg: warning: {printable(str(message))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _check_given(argv: Sequence[str]) -> None:
    """Refuses empty arguments: as a path, "" would be the folder that the shell is in.

    Raises:
        ArgumentError: names the first, or the option before it.
    """
    for before, value in zip(("", *argv), argv):
        if not value or (value.startswith("--") and value.endswith("=")):
            name = value[:-1] or (before if before.startswith("-") else f"behind {before!r}")
            raise ArgumentError(
                f"{name}: an empty argument; fill it or leave it out (is a variable of the shell not set?)"
            )


def _run(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    from ldmseg_fast.config.limits import check_ranges  # late, as all that a command needs

    _check_given(sys.argv[1:] if argv is None else argv)
    check_ranges(args)
    if args.command in NETWORKS:
        keep_freed_memory()
    code = args.run(args)
    sys.stdout.flush()
    return code


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    `ldmseg --help` lists the codes.
    """
    open_streams()
    limit_threads()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text in the terminal's encoding
    format_before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        with terminable():
            return _run(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the rest is written again at exit
        return 128 + signal.SIGPIPE
    except SystemExit:
        raise
    except BaseException as error:
        if (stopped := why_stopped(error)) and "ldmseg_fast.distributed.ending" not in sys.modules:
            if os.environ.get("RANK", "").strip() in ("", "0"):  # the first rank says it for all
                print(stopped[0], file=sys.stderr)  # what a command needs may be imported in part
            return stopped[1]
        if no_torch := why_no_torch(error):
            print(printable(no_torch), file=sys.stderr)  # what says it for all ranks needs torch
            return 2
        from ldmseg_fast.distributed.ending import end_alone, reason_of  # late: a command that ends well needs no torch

        reason = reason_of(error)
        if reason is None:
            raise
        return end_alone(*reason)
    finally:
        warnings.formatwarning = format_before


if __name__ == "__main__":
    sys.exit(main())
