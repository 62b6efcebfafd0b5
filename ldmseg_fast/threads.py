"""Finds out how many threads the system lets this process start, and asks libraries for no more."""

import os
import sys
import threading

# of OpenMP (torch, and our C++), OpenBLAS (numpy) and MKL: each starts as many threads as there are cores
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def startable_threads(wanted: int) -> int:
    """Counts how many of `wanted` threads can be started beside this one at once, 0 to `wanted`."""
    waiting, end = [], threading.Event()
    try:
        for _ in range(wanted):
            thread = threading.Thread(target=end.wait)
            thread.start()
            waiting.append(thread)
    except RuntimeError:  # "can't start new thread": a limit on processes, or no address space for a stack
        pass
    finally:
        end.set()
        for thread in waiting:
            thread.join()
    return len(waiting)


def limit_threads() -> None:
    """Lowers the thread counts of the libraries where the system does not let a thread per core start.

    They end the process where one of their threads cannot be started. To be called before numpy and torch are imported,
    which read the variables then.
    """
    wanted = cores()
    found = startable_threads(wanted)
    if found >= wanted:
        return
    count = max(1, found // 4)  # each library has its own
    for name in _VARIABLES:
        given = os.environ.get(name, "")
        os.environ[name] = str(min(count, int(given)) if given.isascii() and given.isdigit() and int(given) else count)
    print(
        f"warning: this system lets {found} more threads be started, {wanted} are wanted; runs with {count} a library",
        file=sys.stderr,
    )
