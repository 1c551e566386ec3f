"""How the process holds memory that it has freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT = 256 * 2**20
_LARGEST = 32 * 2**20  # that glibc keeps at all


def keep_freed_memory() -> None:
    """Keep up to 256 MB that are free for what is asked for next, in parts of up to 32 MB.

    By default tensors of some megabytes are given back to the system each time, and the pages that come anew are a
    tenth of a training step. A setting of the whole process, for programs to make and not for libraries; it does
    nothing where the C library is not glibc. `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` say the same from
    outside (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
