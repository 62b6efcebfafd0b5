"""Has glibc keep the memory that tensors leave, for processes that run networks on a CPU and then end.

It would map every large array anew and give it back when it is freed, and the system clears each page that it maps. A
picture's features are tens of such arrays. What is kept stays with the process, and pictures of many sizes leave holes.
"""

import ctypes
import os

# of glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_KEPT, _GROWTH = 2**30, 2**26  # free bytes at the end of the heap that it keeps, and by how many it grows at least


def keep_freed_memory() -> bool:
    """Has glibc's malloc reuse freed memory: of any size in the main thread, below 64 MiB in the others.

    Returns:
        False where it was not asked to: another C library, or settings of the user's own (GLIBC_TUNABLES,
        MALLOC_MMAP_MAX_ and the like).
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(*setting) for setting in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWTH)))
