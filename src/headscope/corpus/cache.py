"""Cache of tokenised documents on disk: whole or absent, and validated when read.

`<HEADSCOPE_CACHE>/corpora/<key>/` holds `tokens.i32`, `lengths.i64`, `names.txt` and `manifest.json`. The key is a hash
of the state of the source, of the tokenizer and of the options that select documents.
"""

import atexit
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from headscope.artefact import file_hash, new_folder, read_json, write_json
from headscope.corpus.blocks import Stream
from headscope.errors import OutputError

VARIABLE = "HEADSCOPE_CACHE"
"""Environment variable with the folder of the cache, which may be deleted at any time."""

_VERSION = 7
_FILES = ("tokens.i32", "lengths.i64", "names.txt")


def cache_folder() -> Path:
    """Return the folder of tokenised corpora; a temporary one, with a warning, without a permanent place.

    Raises:
        OutputError: there is not even a temporary folder.
    """
    named, base = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named).expanduser() if named else (Path(base) if base else Path.home() / ".cache") / "headscope"
    except RuntimeError:  # a container with a user that it does not know
        return _temporary("there is no home folder")
    return _usable(folder / "corpora")


@cache
def _usable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        return _temporary(f"{folder} cannot be written ({error.strerror})")


@cache
def _temporary(why: str) -> Path:
    warnings.warn(f"{why}: text is tokenised each time; set {VARIABLE}", stacklevel=4)
    try:
        scratch = Path(tempfile.mkdtemp(prefix="headscope-"))
    except OSError as error:
        raise OutputError(
            f"{why}, and neither can a temporary folder be made: {error.strerror or error}",
            expected="a folder for tokenised text",
            do=f"set {VARIABLE} to a folder that can be written",
        ) from error
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


class Writer:
    """Writes tokenised documents to a folder as they come."""

    def __init__(self, folder: Path) -> None:
        """Open the files."""
        self._tokens, self._lengths, self._names = ((folder / name).open("wb") for name in _FILES)
        self.n_tokens = self.n_documents = 0
        self.told: dict[str, int] = {}
        """As `told.Told` counts."""

    def add(self, name: str, ids: np.ndarray) -> None:
        """Write one document."""
        self._tokens.write(np.ascontiguousarray(ids, "<i4").data)
        self._lengths.write(len(ids).to_bytes(8, "little"))
        self._names.write(b"\0" * (self.n_documents > 0) + name.encode("utf-8", "surrogateescape"))
        self.n_tokens += len(ids)
        self.n_documents += 1

    def close(self) -> None:
        """Write the buffer."""
        for file in (self._tokens, self._lengths, self._names):
            file.close()


def cached(
    identity: dict[str, Any], n_tokens: int | None, write: Callable[[Writer], tuple[bool, bool]]
) -> tuple[Stream, Path]:
    """Return tokenised documents from the cache, or write them to it; equal requests wait for one another.

    Args:
        identity: JSON that identifies a corpus.
        n_tokens: sufficient number of tokens, for a corpus that need not be read to its end; None is all.
        write: writes documents up to that number; returns (whether that was all, whether they are rows).

    Returns:
        The documents, memory-mapped, and the folder for other large files.

    Raises:
        OutputError: the disk is full.
    """
    text = json.dumps([_VERSION, identity], sort_keys=True)
    root = cache_folder()
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
    with _locked(root, folder.name):
        manifest = _sound(folder)
        if manifest is None or not (
            manifest["complete"] or (n_tokens is not None and manifest["n_tokens"] >= n_tokens)
        ):
            with new_folder(folder, owned=True) as scratch:
                _write(scratch, identity, write)
            manifest = read_json(folder / "manifest.json")
        return _open(folder, manifest), root


def _write(folder: Path, identity: dict[str, Any], write: Callable[[Writer], tuple[bool, bool]]) -> None:
    writer = Writer(folder)
    try:
        complete, rows = write(writer)
    finally:
        writer.close()
    content = {
        "complete": complete,
        "rows": rows,
        "n_tokens": writer.n_tokens,
        "n_documents": writer.n_documents,
        "told": writer.told,
        "files": {name: file_hash(folder / name) for name in _FILES},
        "identity": identity,
    }
    write_json(folder / "manifest.json", content)


def _sound(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of an entry; None if there is none, or, with a warning, if it is damaged."""
    if not folder.exists():
        return None
    try:
        manifest = read_json(folder / "manifest.json")
        if all(file_hash(folder / name) == manifest["files"][name] for name in _FILES):
            return manifest
        damage = "its checksum is wrong"
    except (OSError, ValueError, KeyError, TypeError) as error:
        damage = repr(error)
    warnings.warn(f"{folder} is damaged ({damage}): the text is tokenised again", stacklevel=4)
    return None


def _open(folder: Path, manifest: dict[str, Any]) -> Stream:
    tokens = folder / "tokens.i32"
    names = (folder / "names.txt").read_bytes().decode("utf-8", "surrogateescape")
    return Stream(
        tokens=np.memmap(tokens, "<i4", "r") if manifest["n_tokens"] else np.empty(0, np.int32),
        lengths=np.fromfile(folder / "lengths.i64", "<i8"),
        names=tuple(names.split("\0")) if manifest["n_documents"] else (),
        rows=manifest["rows"],
        told=manifest["told"],
    )


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise OutputError(
            f"cannot write {root}: {error.strerror or error}",
            expected="a folder that can be written, on a disk with room",
            do=f"free some space, or set {VARIABLE} to another folder",
        ) from error
