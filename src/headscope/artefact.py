"""Files that are whole or absent: atomic writes, hashes, and folders claimed for one run."""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from headscope.errors import OutputError
from headscope.names import local
from headscope.scratch import clean, move_into_place, scratch_file, scratch_folder


@runtime_checkable
class Fingerprinted(Protocol):
    """Interface for matching a model to an artefact: `headscope.models.hf.Model`."""

    def fingerprint(self) -> str:
        """Return the hash stored in new artefacts."""
        ...

    def matches(self, known: str) -> bool:
        """Whether a hash stored in an artefact is its own."""
        ...


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block succeeds, and is removed when it fails.

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
def new_folder(path: Path, *, overwrite: bool = False, owned: bool = False) -> Iterator[Path]:
    """Yield an empty scratch folder that becomes `path` when the block succeeds.

    An existing run at `path` is unchanged until then, and kept if the block raises. Anything at an `owned` path, as in
    a cache, may be replaced.

    Raises:
        OutputError: `path` exists and `overwrite` is false, or it cannot be written.
    """
    path = Path(path)
    if not owned:
        check_output(path, overwrite=overwrite)
    try:
        with scratch_folder(path) as scratch:
            yield scratch
            move_into_place(scratch, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def check_run_folder(path: Path, *, overwrite: bool, inputs: Iterable[str | Path]) -> None:
    """Check an output like `check_output`, for a run that reads files: none of them may be overwritten.

    Raises:
        OutputError: as `check_output`; or `path` is, or contains, one of the `inputs`.
    """
    path = Path(path)
    for given in map(local, inputs):
        # its own path, and the resolved one
        if any(p.is_relative_to(path.resolve()) for p in (given.resolve(), given.parent.resolve() / given.name)):
            raise OutputError(
                f"{path} holds what is to be read", expected="a folder of its own", do="choose another folder"
            )
    check_output(path, overwrite=overwrite)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check, before any work, that `path` can be written at the end.

    Raises:
        OutputError: `path` exists, and `overwrite` is false or headscope did not write all of it; or it is the current
            folder or a mount point, or cannot be written.
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
    taken = os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise OutputError(
            f"{path} already exists",
            expected="a new or empty folder",
            do="choose another folder, or pass --overwrite to replace it",
        )
    foreign = _foreign(path) if taken else None
    if foreign is not None:
        raise OutputError(
            f"{path} would be replaced, and headscope did not write {foreign}",
            expected="an SAE, an index or a page that headscope wrote, and nothing else",
            do="choose another place, or move what is there",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def check_holds_only(path: Path, names: Collection[str]) -> None:
    """Check that a folder for several runs holds no user data: only files of these names, SAEs, indexes, pages.

    Raises:
        OutputError: it holds something else; nothing is written there.
    """
    children = sorted(path.iterdir()) if path.is_dir() else []
    for child in children:
        if not (child.name in names or child.name.startswith(".") or _foreign(child) is None):
            raise OutputError(
                f"{path} holds {child.name}, which headscope did not write",
                expected="a new or empty folder, or one of an earlier run",
                do="choose another folder",
            )


PAGE_MARK = '<meta name="generator" content="headscope">'
"""Marker in the head of every written page, which allows replacing it."""
_PAGE_MARKS = (
    PAGE_MARK.encode(),
    b'<script type="application/octet-stream" id="data-core">',
)  # and of earlier versions
_SAE = {"cfg.json", "sae_weights.safetensors", "quality.json", "metrics.jsonl"}
_INDEX = {"manifest.json", "labels.jsonl", "columns", "heads", "sae"}
_EXPORT = {"index.html", "core.json.gz", "packs", "pages"}


def _foreign(path: Path) -> str | None:
    """Return what headscope did not write at a path: itself, or the name of a file in it; None if nothing."""
    try:
        if path.is_file():
            return None if any(mark in path.read_bytes() for mark in _PAGE_MARKS) else "it"
        if not path.is_dir():
            return "it"
        ours = _written(path)
        others = sorted(child.name for child in path.iterdir() if not (child.name in ours or _is_scratch(child)))
        if not ours or not others:
            return None if ours else "it"
        return others[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it is unreadable, or not in our format
        return "it"


def _written(folder: Path) -> set[str]:
    """Return the names in a folder that headscope writes there; none for other folders."""
    if (folder / "core.json.gz").is_file():
        return _EXPORT
    if (folder / "cfg.json").is_file():
        config = read_json(folder / "cfg.json")
        return _SAE if {"sae_lens_version", "hook_name"} <= config["metadata"].keys() else set()
    if not (folder / "manifest.json").is_file():
        return set()
    manifest = read_json(folder / "manifest.json")
    if "indexes" in manifest:  # for several SAEs, one folder each
        foreign = [name for name in manifest["indexes"] if _foreign(folder / Path(name).name)]
        return {"manifest.json", *manifest["indexes"]}.difference(foreign)
    files = {Path(name).parts[0] for name in manifest["files"]} if "format_version" in manifest else set()
    return files | _INDEX if files else set()


def _is_scratch(path: Path) -> bool:
    """Whether it is a file left by an interrupted write or by a file manager."""
    return path.name.startswith(".") and not path.is_dir()


def _written_out(path: str | Path) -> Path:
    """Check that a path to write to does not start with `~`, which the command line expands and Python does not.

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
    """Make the error for a file or folder rejected by the disk or its permissions."""
    return OutputError(
        f"cannot write {path}: {error.strerror or error}",
        expected="a folder that can be written, on a disk with room",
        do="choose another folder or free some space; what stood there before is untouched",
    )


Stamp = tuple[tuple[str, int, int, int], ...]


def stamp_of(path: Path) -> Stamp:
    """Return a cheap value that changes when a file, or any file of a folder, is written, replaced or removed.

    Name, time, size and inode of each file; empty for a missing path. Scratch files, whose names start with a dot, do
    not count.
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
        ValueError: it is not JSON, or nested deeper than headscope's files.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
