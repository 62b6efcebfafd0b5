"""Checks what a launcher says in the environment, before ranks wait for each other in vain."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from ldmseg_fast.errors import LaunchError

CURE = (
    "start with `torchrun --nproc_per_node N ...` or `deepspeed ...`, which set RANK, WORLD_SIZE, LOCAL_RANK, "
    "MASTER_ADDR and MASTER_PORT, or `unset RANK WORLD_SIZE` to run one process"
)
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ALONE = {"RANK", "MASTER_ADDR", "MASTER_PORT"}  # without one of these, one rank of one is a process like any other
NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_SIZE": 1}  # and their least value
TAKEN = (
    "another program has this port; choose a free one on every rank, with the launcher's --master_port (torchrun: "
    "--master-port) or by MASTER_PORT"
)
LOOKUP = 10.0  # seconds in which a name must be found
ANSWER = 10.0  # seconds in which rank 0's store must answer
QUIET = 20.0  # seconds after which a rank says what it waits for


def check_variables(environment: Mapping[str, str]) -> None:
    """Checks the variables by which a launcher tells a process which rank it is.

    An empty variable counts as one that is not set. WORLD_SIZE=1, alone or with RANK=0, is one process. Variables of
    Slurm or MPI are not asked for.

    Raises:
        LaunchError: names the variable and the cure.
    """
    given = {
        name: value.strip() for name, value in environment.items() if name in (*NEEDED, *NUMBERS) and value.strip()
    }
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return
    numbers = {name: _number(name, given[name]) for name in NUMBERS if name in given}
    if numbers.get("WORLD_SIZE") == 1 and numbers.get("RANK", 0) == 0 and not given.keys() >= ALONE:
        return
    there = ", ".join(f"{name}={given[name]}" for name in NEEDED if name in given)
    needed = [name for name in NEEDED if name != "LOCAL_RANK" or numbers.get("WORLD_SIZE") != 1]
    if missing := [name for name in needed if name not in given]:
        empty = " or empty" if any(name in environment for name in missing) else ""
        raise LaunchError(f"the environment has {there}, but {', '.join(missing)} is not set{empty}; {CURE}")
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise LaunchError(f"RANK={given['RANK']}: below WORLD_SIZE={given['WORLD_SIZE']} expected; {CURE}")
    size = numbers.get("LOCAL_WORLD_SIZE", numbers.get("LOCAL_SIZE", numbers["WORLD_SIZE"]))
    if numbers.get("LOCAL_RANK", 0) >= size:
        raise LaunchError(f"LOCAL_RANK={given['LOCAL_RANK']}: there are {size} ranks on this machine; {CURE}")
    port = given["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise LaunchError(f"MASTER_PORT={port}: a port from 1 to 65535 expected, the same on every rank")


def _number(name: str, text: str) -> int:
    least = NUMBERS[name]
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise LaunchError(f"{name}={text}: a whole number of at least {least} expected; {CURE}")
    return int(text)


@contextmanager
def meeting(address: str, port: str, rank: int, minutes: float) -> Iterator[None]:
    """Says in one line why ranks cannot meet inside a `with` block, and after a while whom this one waits for.

    Raises:
        LaunchError: the address is unknown, its port is taken, or rank 0 does not come within `minutes`.
    """
    _look_up(address)
    place = f"MASTER_ADDR={address} MASTER_PORT={port}"
    line = f"rank {rank}: waits for the other ranks at {place}; are all of them started?"
    notice = threading.Timer(QUIET, lambda: print(line, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        if rank > 0:
            _wait_for_store(address, int(port), place, minutes)
        yield
    except (DistNetworkError, DistStoreError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise LaunchError(f"{place}: {TAKEN}") from None
        reason = str(error).splitlines()[0]
        raise LaunchError(f"the ranks did not meet at {place} ({reason}); give the same to all of them") from None
    finally:
        notice.cancel()


def _wait_for_store(address: str, port: int, place: str, minutes: float) -> None:
    """Waits until rank 0 listens, and makes sure that it is rank 0. The store itself would ask a stranger for long."""
    end = time.monotonic() + 60 * minutes
    while True:
        try:
            socket.create_connection((address, port), timeout=LOOKUP).close()
            break
        except OSError as error:  # rank 0 may be a little slower
            if time.monotonic() > end:
                raise LaunchError(f"rank 0 did not come to {place} within {minutes:g} minutes ({error})") from None
            time.sleep(0.2)
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(DistNetworkError, DistStoreError):
            TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER))
            answered.set()

    with _quiet():
        threading.Thread(target=ask, daemon=True).start()
        if not answered.wait(ANSWER):
            raise LaunchError(f"{place}: {TAKEN}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what C++ writes to stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _look_up(address: str) -> None:
    end = time.monotonic() + LOOKUP
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end:
                raise LaunchError(
                    f"MASTER_ADDR={address}: no machine of this name ({error}); give the address of rank 0's machine"
                ) from None
        time.sleep(1.0)  # a cluster may tell names of machines that have just started a little later
