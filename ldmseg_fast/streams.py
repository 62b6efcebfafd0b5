"""Gives a process that was started without them its standard streams."""

import os
import sys


def open_streams() -> None:
    """Opens /dev/null in the place of standard streams that are closed.

    Python has None for them, and the next file that is opened would get their number: what a library prints would be
    written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 (lives as long as the process)
