"""The errors that end a command in one line; every other exception is a fault of ours and keeps its traceback."""

from __future__ import annotations

import signal


class UserError(Exception):
    """Something that whoever called can mend: the message names the file or the value, and the cure."""


class ArgumentError(UserError, ValueError):
    """An argument of a public function or an option of a command that is out of range or does not fit the others."""


class ConfigError(UserError, ValueError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


class CheckpointError(UserError, ValueError):
    """A folder that is no model, of another architecture, or damaged."""


class DataError(UserError, ValueError):
    """A data set that cannot be read; the message names the file and the cure."""


class PanopticFormatError(UserError, ValueError):
    """A panoptic PNG or JSON that breaks the format; the message names the file, the value and the cure."""


class BackendError(UserError, RuntimeError):
    """A backend that cannot run here; the message says why and what to do."""


class NonFiniteError(UserError, FloatingPointError):
    """Too many steps in a row whose loss or gradients were not finite."""


class OutOfMemory(UserError, RuntimeError):
    """No memory left; the message says which settings free most (`training.faults.out_of_memory` writes it)."""


class Stopped(Exception):
    """Training was interrupted by a signal and has saved."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step} and saved; go on with --resume")
        self.exit_code = 128 + number
