"""Files that are either whole or absent: atomic writes, hashes, and folders claimed for one run."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from headscope.errors import OutputError
from headscope.names import local
from headscope.scratch import clean, move_into_place, scratch_file, scratch_folder


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    path = _written_out(path)
    try:
        with scratch_file(path) as (scratch, file):
            yield file
            file.flush()
            os.fsync(file.fileno())
            scratch.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN) atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False).encode())


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty scratch folder that becomes `path` when the block ends well.

    An existing run at `path` stays as it was until that moment, and stays for good if the block raises.

    Raises:
        OutputError: `path` already holds something and `overwrite` is false, or it cannot be written.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    try:
        with scratch_folder(path) as scratch:
            yield scratch
            move_into_place(scratch, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def check_run_folder(path: Path, *, overwrite: bool, inputs: Iterable[str | Path]) -> None:
    """As `check_output`, and keep `overwrite` from giving up anything but an earlier run.

    Raises:
        OutputError: as `check_output`; or `path` holds one of the `inputs`; or it holds none of the files that an SAE,
            an index or an exported page has, and so is no earlier run.
    """
    path = Path(path)
    if any(local(i).resolve().is_relative_to(path.resolve()) for i in inputs):
        raise OutputError(
            f"{path} holds what is to be read", expected="a folder of its own", do="choose another folder"
        )
    check_output(path, overwrite=overwrite)
    holds = {child.name for child in path.iterdir()} if path.is_dir() else set()
    if holds and not holds & {"cfg.json", "manifest.json", "core.json.gz"}:
        raise OutputError(
            f"{path} holds something else than an earlier run",
            expected="an SAE, an index or an exported page to overwrite",
            do="choose another folder",
        )


def check_output(path: Path, *, overwrite: bool) -> None:
    """Make sure, before any work, that `path` can be written when it is done.

    Raises:
        OutputError: `path` already holds something that `overwrite` does not give up, is the current folder or a
            mount point, or cannot be written.
    """
    path = _written_out(path)
    whole = path.resolve()
    if whole == Path.cwd() or whole.is_mount():
        raise OutputError(
            f"{path} is the current folder or a mount point",
            expected="a folder that can be replaced as a whole",
            do="name a new folder in it",
        )
    clean(path.parent)
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise OutputError(
            f"{path} already exists",
            expected="a new or empty folder",
            do="choose another folder, or pass --overwrite to replace it",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def _written_out(path: str | Path) -> Path:
    """A path to write to, which must not begin with `~`: the command line has made it the home folder, Python has not.

    Raises:
        OutputError: it does.
    """
    if local(path) != Path(path):
        raise OutputError(
            f"the path {path}, of which Python does not read the ~",
            expected="a path that is written out",
            do="pass Path(...).expanduser()",
        )
    return Path(path)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error for a file or folder that the disk, or its permissions, refused."""
    return OutputError(
        f"cannot write {path}: {error.strerror or error}",
        expected="a folder that can be written, on a disk with room",
        do="choose another folder or free some space; what stood there before is untouched",
    )


Stamp = tuple[tuple[str, int, int, int], ...]


def stamp_of(path: Path) -> Stamp:
    """Return what changes when a file, or any file of a folder, is written, replaced or removed: cheap to ask for.

    Name, time, size and number of each file; nothing of what does not exist. Scratch files, whose names begin with a
    dot, do not count.
    """
    path = Path(path)
    try:
        found = list(os.scandir(path)) if path.is_dir() else [path]
    except OSError:
        return ()
    stamps = []
    for item in found:
        with suppress(OSError):
            status = item.stat()
            stamps.append((item.name, status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(sorted(stamp for stamp in stamps if not stamp[0].startswith(".")))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256:<hex>`."""
    with Path(path).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested deeper than any file of ours.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
