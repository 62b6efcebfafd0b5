"""Runs a launcher and outlives it: a signal reaches the ranks, and the command ends after they have saved.

python -m ldmseg_fast.distributed.keeper deepspeed ldmseg_fast/train.py ...

`deepspeed` ends a second after SIGTERM, whatever its ranks do. Where it is the main process of a container or a batch
job, everything in it is killed then. This process takes that place. Its exit code is the launcher's, or 143 and 130
where a signal came and the ranks have ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36  # https://man7.org/linux/man-pages/man2/PR_SET_CHILD_SUBREAPER.2const.html
PERIOD = 0.2  # seconds between two looks


def main(command: list[str]) -> int:
    """Runs `command`, hands SIGTERM and SIGINT on, and returns its exit code once no process of it is left."""
    if not command:
        print("usage: python -m ldmseg_fast.distributed.keeper LAUNCHER ARGUMENTS", file=sys.stderr)
        return 2
    # what outlives the launcher becomes a child of this process, which can wait for it
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, note)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror or error}", file=sys.stderr)
        return 2
    handed = 0
    while process.poll() is None or _children_left():
        for number in received[handed:]:
            handed += 1
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        time.sleep(PERIOD)
    return 128 + received[0] if received else process.returncode % 256


def _children_left() -> bool:
    """Takes the exit codes of processes that have ended, and tells whether any is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
