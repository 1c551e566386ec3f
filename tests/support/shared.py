"""Files that take long to make, made once a run of the tests: by the first process that asks, for all others too."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

ROOT = "HEADSCOPE_TESTS"
"""The variable with the folder of this run; `conftest.py` makes and removes it."""


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled. Nobody may change it."""
    folder = Path(os.environ[ROOT], name)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            scratch = Path(mkdtemp(dir=folder.parent, prefix=f"{name}-"))
            make(scratch)
            scratch.rename(folder)
    return folder
