"""Defines the errors that end a command in one line.

Every other exception is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROL = re.compile(r"\n(?!  )|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_MEMORY = (
    *("out of memory", "can't allocate memory", "not enough memory"),  # torch, on a GPU and on a CPU
    *("status_alloc_failed", "failed to allocate memory", "bad_alloc"),  # cuBLAS and cuDNN, ONNX Runtime
)


class UserError(Exception):
    """Marks what the caller can mend: the message names the file or the value, and the cure."""


class ArgumentError(UserError, ValueError):
    """Reports an argument or a command's option that is out of range or does not fit the others."""


class ConfigError(UserError, ValueError):
    """Reports a setting that does not exist, has the wrong type, or contradicts another."""


class CheckpointError(UserError, ValueError):
    """Reports a folder that is no model, of another architecture, or damaged."""


class HubError(CheckpointError):
    """Reports what the Hugging Face Hub does not give or take; the message names the repository and the cure."""


class DataError(UserError, ValueError):
    """Reports a data set that cannot be read; the message names the file and the cure."""


class PanopticFormatError(UserError, ValueError):
    """Reports a panoptic PNG or JSON that breaks the format; the message names the file, the value and the cure."""


class BackendError(UserError, RuntimeError):
    """Reports a backend that cannot run here; the message says why and what to do."""


class LaunchError(UserError, RuntimeError):
    """Reports variables of a launcher that are half set or wrong, or ranks that cannot meet."""


class InUseError(UserError, RuntimeError):
    """Reports a folder that another process writes into; the message names the process."""


class NonFiniteError(UserError, FloatingPointError):
    """Reports NaN or infinity: what a network computes, or losses and gradients of too many steps in a row."""


class OutOfMemory(UserError, RuntimeError):
    """Reports that no memory is left; `training.faults.out_of_memory` writes which settings free most."""


class Stopped(Exception):
    """Reports that a signal interrupted training, which has saved."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step} and saved; go on with --resume")
        self.exit_code = 128 + number


def why_out_of_memory(error: BaseException) -> str | None:
    """Returns in a line what an error says that tells of too little memory, on a GPU or in the host; else None."""
    text = str(error).strip().rpartition("Status Message: ")[2]  # which ends what ONNX Runtime says
    told = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
    found = told and any(words in text.lower() for words in _MEMORY)
    return (text or "too little of it").splitlines()[0][:240] if found or isinstance(error, MemoryError) else None


@contextmanager
def memory_at(size: int, folder: object) -> Iterator[None]:
    """Adds a note to an error of too little memory inside a `with` block: the size at which the networks ran.

    size: side in pixels of what they see. folder: of the model, whose index holds the size where none is asked for.
    """
    try:
        yield
    except Exception as error:
        if why_out_of_memory(error) and not memory_note(error):
            error.add_note(f"{_AT}{size}, of {folder}/model_index.json or as asked for")
        raise


def memory_note(error: BaseException) -> str:
    """Returns what `memory_at` has added to an error; "" where it has not."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(_AT)), "")


_AT = "at image_size="


def printable(text: str) -> str:
    """Writes a message's control characters, which come from names and values, as Python does: a line break is \\n.

    So a file's name cannot break a line or command a terminal. A line break before two blanks is the message's own.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
