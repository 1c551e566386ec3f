"""Resolve `--corpus`: the location of its documents, and their state."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any

from headscope.corpus.dataset_folder import dataset_rows
from headscope.corpus.files import files_below, is_folder, text_name
from headscope.corpus.reading import Reading
from headscope.corpus.rows import (
    TokenDocument,
    arrow_documents,
    hub_documents,
    jsonl_documents,
    npy_documents,
    parquet_documents,
    saved_dataset,
)
from headscope.corpus.text import Document, file_documents, python_documents, python_files
from headscope.errors import CorpusError
from headscope.limits import Name, check
from headscope.names import is_path

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_PACKED = "unpack it, and pass what it holds"
_NO_TEXT = {
    ".json": "write it as JSONL, one object with a field `text` a line, in a file NAME.jsonl",
    ".ipynb": "convert it: jupyter nbconvert --to markdown FILE",
    ".csv": "write it as JSONL: pandas.read_csv(FILE).to_json('NAME.jsonl', orient='records', lines=True)",
    ".tsv": "write it as JSONL: pandas.read_table(FILE).to_json('NAME.jsonl', orient='records', lines=True)",
    ".arrow": "pass the folder that save_to_disk wrote, or write it as Parquet",
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"), _PACKED),
}
"""By suffix: advice on files that are not text, though some could be read as text."""
_OF_FILES = {*_NO_TEXT, ".txt", ".text", ".md", ".rst", ".tex", ".py", ".html", ".jsonl", ".ndjson", ".parquet", ".npy"}
"""Suffixes that mark a name as a file, not a dataset on the hub."""


@dataclass(frozen=True)
class Source:
    """Documents with their state."""

    documents: Callable[[], Iterator[Document | TokenDocument]]
    state: Callable[[], list[Any]]
    """JSON that changes when the documents may have: names, sizes and times of files, or a name on the hub."""


def find_source(name: str, reading: Reading, bos: int) -> Source:
    """Resolve a name.

    Args:
        name: `python`; a file, a folder or a pattern of files: text, `.jsonl`, `.parquet`, `.npy`; a folder that
            `save_to_disk` of `datasets` wrote, or a copy of a dataset repository; or a dataset on the hub.
        reading: the field, the configuration and other reading options.
        bos: token at which a stream of token ids is split.

    Raises:
        CorpusError: it does not exist, or includes files that are not text.
    """
    name = check("corpus", name, Name, CorpusError)
    if name == "python":
        return Source(python_documents, partial(_state, dict(python_files())))
    path, named = Path(name), _files(name)
    if is_folder(path) and (arrow := saved_dataset(path, reading.dataset_split)) is not None:
        return Source(
            partial(arrow_documents, arrow, path.name, reading),
            partial(_state, {str(i): file for i, file in enumerate(arrow)}),
        )
    if named is not None:
        if is_folder(path) and (rows := dataset_rows(path, named, reading)) is not None:
            named = rows
        _check_endings(named, path)
        return Source(partial(_documents, named, reading, bos), partial(_state, named))
    is_file = path.suffix.lower() in _OF_FILES or is_path(name)
    if _HUB_NAME.fullmatch(name) and not is_file:
        return Source(partial(hub_documents, name, reading), lambda: ["hub", name])
    raise CorpusError(
        f"no corpus {name!r}: no such file or folder here" + (", and no file matches" if has_magic(name) else ""),
        expected="'python', a file or a folder of text, JSONL, Parquet or token ids, or a dataset on the hub",
        do="check the path given to --corpus",
    )


def _check_endings(files: dict[str, Path], path: Path) -> None:
    """Reject files that would be read as text and are not, by name."""
    for file in files.values():
        ending = file.suffix.lower()
        if ending in _NO_TEXT:
            out = (
                "" if file == path else f"; or leave it out: --corpus '{path if path.is_dir() else 'FOLDER'}/**/*.txt'"
            )
            raise CorpusError(
                f"{file} is no text, by its ending {ending}",
                expected="UTF-8 text, .jsonl, .parquet or .npy",
                do=_NO_TEXT[ending] + out + "; to read it as text all the same, end its name in .txt",
            )


def _files(name: str) -> dict[str, Path] | None:
    """Return files by the name that determines their side of the split; None if the path does not exist."""
    path = Path(name)
    if is_folder(path):
        return files_below(path, "**/*")
    if path.is_file():
        return {text_name(path.name): path}
    if has_magic(name):
        parts = path.parts
        n_fixed = next(i for i, part in enumerate(parts) if has_magic(part))
        folder = Path(*parts[:n_fixed])
        return (files_below(folder, str(Path(*parts[n_fixed:]))) or None) if is_folder(folder) else None
    return None


def _documents(files: dict[str, Path], reading: Reading, bos: int) -> Iterator[Document | TokenDocument]:
    for name, path in files.items():
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from jsonl_documents(path, name, reading)
            case ".parquet":
                yield from parquet_documents(path, name, reading)
            case ".npy":
                yield from npy_documents(path, name, bos)
            case _:
                yield from file_documents(path, name, reading.document_line)


def _state(files: dict[str, Path]) -> list[Any]:
    """Return what changes with a file: its name and path, size and times."""
    found = []
    for name, path in files.items():
        stat = path.stat()
        found.append([name, repr(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return found
