"""Scratch files and folders, and locks: what a process holds while it writes, and what a killed one left behind.

A scratch lies beside what it becomes, as `.NAME.<8 hex digits>.headscope-scratch`, and its process holds a lock
(`flock`) on it until it is in place. The kernel releases the lock of a process that dies, however it dies, so a scratch
that can be locked belongs to nobody: the next process that writes to the folder removes it.
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
_SHOWN = 32  # characters of the name that a scratch is of: names of any length leave room for the rest
_cleaned: set[Path] = set()


@contextmanager
def scratch_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Yield the path of a new file beside `path`, and the file, open for writing; removed at the end if still there."""
    scratch, handle = _new(path)
    with os.fdopen(handle, "wb") as file:
        try:
            yield scratch, file
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; removed at the end if still there."""
    with _folder(path, "scratch") as scratch:
        yield scratch


def move_into_place(scratch: Path, path: Path) -> None:
    """Put the folder `scratch` where `path` is; an old folder there is removed only once the new one stands.

    Raises:
        OSError: it cannot be moved; both are as they were.
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
    """Remove the scratches of dead processes from a folder; only the first call of a process for a folder looks.

    What was displaced by a folder that never came to stand is put back.
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
    """Hold a lock file, made where there is none, so that one process at a time does what it stands for.

    The file is removed at the end, and its folder too if nothing else came to be there.

    Raises:
        OutputError: the `refusal`, where another process holds it.
        OSError: the file cannot be made.
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
    """Whether a process holds a lock file: one that was killed does not."""
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
    """Make a scratch, with the permissions that the umask leaves, and lock it."""
    clean(path.parent)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name[:_SHOWN]}.{secrets.token_hex(4)}.headscope-{kind}")
        with suppress(FileExistsError, FileNotFoundError):  # of that name; or another process took it for litter
            if folder:
                scratch.mkdir()
            handle = _hold(scratch, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL)
            if handle is not None:
                return scratch, handle


def _hold(path: Path, flags: int) -> int | None:
    """Open and lock what stands at a path; None where another process holds it, or is just removing it.

    A disk that knows no locks refuses nobody.
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
    """Remove a scratch that nobody holds.

    Raises:
        OSError: somebody holds it, or the disk knows no locks.
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
