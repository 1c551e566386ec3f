"""How the process holds memory that it has freed."""

import ctypes
import os
import sys

SETTINGS = (
    ("MALLOC_TRIM_THRESHOLD_", -1, 256 * 2**20),
    ("MALLOC_MMAP_THRESHOLD_", -3, 32 * 2**20),  # the most that glibc takes
)
"""Name from outside, number for mallopt, bytes."""


def keep_freed_memory() -> None:
    """Keep up to 256 MB that are free (a heap of glibc's) for what is asked for next, in parts of up to 32 MB.

    Else tensors of some megabytes may go back to the system each time, depending on where in the heap they are, and the
    pages that come anew take up to a tenth of a training step. A setting of the whole process, for programs to make and
    not for libraries. It does nothing where the C library is not glibc, and leaves alone what the environment sets by
    MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    for name, setting, size in SETTINGS:
        if name not in os.environ:
            mallopt(setting, size)
