"""Scratch files and folders with locks, and cleaning up after killed processes.

A scratch is next to its final path, as `.NAME.<8 hex digits>.headscope-scratch`, and its process holds a lock (`flock`)
on it until it is moved into place. The kernel releases the lock when a process dies in any way, so a scratch that can
be locked is abandoned: the next process that writes to the folder removes it.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from headscope.errors import OutputError

_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.headscope-(scratch|displaced)", re.DOTALL)
_SHOWN = 32  # characters of the final name used for a scratch: names of any length leave room for the rest
_cleaned: set[Path] = set()


@contextmanager
def scratch_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Yield the path of a new file next to `path`, and the open file; removed at the end if still there."""
    scratch, handle = _new(path)
    with os.fdopen(handle, "wb") as file:
        try:
            yield scratch, file
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`; removed at the end if still there."""
    with _folder(path, "scratch") as scratch:
        yield scratch


def move_into_place(scratch: Path, path: Path) -> None:
    """Move the folder `scratch` to `path`; an old folder there is removed only once the new one is in place.

    Raises:
        OSError: it cannot be moved; both are unchanged.
    """
    if not path.exists():
        scratch.replace(path)
        return
    with _folder(path, "displaced") as displaced:
        kept = displaced / path.name
        try:
            path.replace(kept)
            scratch.replace(path)
        finally:
            if not path.exists():
                kept.replace(path)


def clean(folder: Path) -> None:
    """Remove the scratches of dead processes from a folder; only on a process's first call for it.

    An old folder whose replacement was never completed is restored.
    """
    folder = folder.resolve()
    if folder in _cleaned or not folder.is_dir():
        return
    _cleaned.add(folder)
    names: list[str] = []
    with suppress(PermissionError):
        names = os.listdir(folder)  # noqa: PTH208 - a folder may hold a hundred thousand files
    for name in names:
        if found := _NAME.fullmatch(name):
            with suppress(OSError):
                _discard(folder / name, displaced=found[1] == "displaced")


@contextmanager
def held(lock: Path, refusal: OutputError) -> Iterator[None]:
    """Hold a lock file, created if missing, so that one process at a time does the work.

    The file is removed at the end, and its folder too if empty.

    Raises:
        OutputError: the `refusal`, where another process holds it.
        OSError: the file cannot be created.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _hold(lock, os.O_RDWR | os.O_CREAT)
    if handle is None:
        raise refusal
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        with suppress(OSError):
            lock.parent.rmdir()
        os.close(handle)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file; a killed one does not."""
    try:
        handle = _hold(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    if handle is not None:
        os.close(handle)
    return handle is None


@contextmanager
def _folder(path: Path, kind: str) -> Iterator[Path]:
    scratch, handle = _new(path, kind, folder=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def _new(path: Path, kind: str = "scratch", *, folder: bool = False) -> tuple[Path, int]:
    """Create a scratch, with permissions by the umask, and lock it."""
    clean(path.parent)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name[:_SHOWN]}.{secrets.token_hex(4)}.headscope-{kind}")
        with suppress(FileExistsError, FileNotFoundError):  # name taken; or another process considered it abandoned
            if folder:
                scratch.mkdir()
            handle = _hold(scratch, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL)
            if handle is not None:
                return scratch, handle


def _hold(path: Path, flags: int) -> int | None:
    """Open and lock a path; None where another process holds it, or is just removing it.

    A file system without locks never refuses.
    """
    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        return handle
    os.close(handle)
    return None


def _discard(scratch: Path, *, displaced: bool) -> None:
    """Remove a scratch that is not locked.

    Raises:
        OSError: it is locked, or the file system has no locks.
    """
    is_folder = scratch.is_dir()
    handle = os.open(scratch, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for kept in scratch.iterdir() if displaced else ():
            if not (scratch.parent / kept.name).exists():
                kept.replace(scratch.parent / kept.name)
        if is_folder:
            shutil.rmtree(scratch)
        else:
            scratch.unlink()
    finally:
        os.close(handle)
