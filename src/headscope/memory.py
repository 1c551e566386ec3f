"""Memory of the machine: free memory, and how the process retains freed memory."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

SETTINGS = (
    ("MALLOC_TRIM_THRESHOLD_", -1, 256 * 2**20),
    ("MALLOC_MMAP_THRESHOLD_", -3, 32 * 2**20),  # the maximum of glibc
)
"""Environment variable, number for mallopt, bytes."""


_MEMINFO = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with a container's memory limit on Linux, in versions 2 and 1 of control groups."""


def available_memory() -> int | None:
    """Return the bytes that could still be allocated, swap included; None where unknown.

    On Linux at most the container's limit. On other systems with `sysconf` all memory, whether free or not.
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
        with suppress(OSError, ValueError):  # missing, or the word `max`
            found.append(int(path.read_text()))
    return found


def keep_freed_memory() -> None:
    """Retain up to 256 MB of freed memory (of a glibc heap) for later allocations, in chunks of up to 32 MB.

    Otherwise tensors of some megabytes may be returned to the system each time, depending on their place in the heap,
    and new page faults take up to a tenth of a training step. A setting of the whole process, for programs and not for
    libraries. It does nothing where the C library is not glibc, and does not override MALLOC_TRIM_THRESHOLD_ and
    MALLOC_MMAP_THRESHOLD_ (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    for name, setting, size in SETTINGS:
        if name not in os.environ:
            mallopt(setting, size)
