"""How a run ends that cannot go on: one line on the terminal, whatever the number of ranks."""

from __future__ import annotations

import sys
import time

from ldmseg_fast import distributed
from ldmseg_fast.errors import Stopped, UserError
from ldmseg_fast.training.liveness import LOST_RANK

PATIENCE = 8.0  # seconds that other ranks wait for rank 0's word


def exit_code_of(error: Exception) -> int | None:
    """Say what happened, once for all ranks, and return the exit code; None for what deserves a traceback.

    An error that every rank meets is printed by rank 0; the others wait until it has, or their launcher would kill rank
    0 before it could. What happens to one rank alone is printed by that one.
    """
    if isinstance(error, Stopped):
        _say(str(error), once=True)
        return error.exit_code
    if isinstance(error, UserError | OSError):
        _say(f"error: {error}", once=True)
        return 2
    if is_lost_connection(error):
        _say(f"error: rank {distributed.rank()}: another rank has gone; start again with --resume", once=False)
        return LOST_RANK
    return None


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank has gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "NCCL")
    return isinstance(error, RuntimeError) and distributed.launched() and any(word in str(error) for word in words)


def _say(text: str, once: bool) -> None:
    if not once or distributed.world_size() == 1 or not distributed.is_distributed():
        print(text, file=sys.stderr, flush=True)
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    try:
        if distributed.is_main():
            print(text, file=sys.stderr, flush=True)
            store.set("ldmseg/ended", text)
            time.sleep(1.0)  # the store may live in this process
            return
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if store.check(["ldmseg/ended"]):
                return
            time.sleep(0.2)
    except RuntimeError:  # the store has gone with rank 0, which has spoken then
        return
    print(f"rank {distributed.rank()}: {text}", file=sys.stderr, flush=True)
