"""Memory of the machine: how much is free, and how the process holds what it has freed."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

SETTINGS = (
    ("MALLOC_TRIM_THRESHOLD_", -1, 256 * 2**20),
    ("MALLOC_MMAP_THRESHOLD_", -3, 32 * 2**20),  # the most that glibc takes
)
"""Name from outside, number for mallopt, bytes."""


_MEMINFO = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container may hold, in versions 2 and 1 of its control groups."""


def available_memory() -> int | None:
    """Bytes that could still be allocated, swap included; None where the system does not say.

    On Linux no more than the container's limit. On other systems with `sysconf` all memory, whether free or not.
    """
    with suppress(OSError, ValueError, KeyError):
        rows = (line.split() for line in _MEMINFO.read_text().splitlines())
        kib = {row[0].rstrip(":"): int(row[1]) for row in rows}
        return min(1024 * (kib["MemAvailable"] + kib["SwapFree"]), *_limits())
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _limits() -> list[int]:
    found = [2**63]  # no limit
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or the word `max`
            found.append(int(path.read_text()))
    return found


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
