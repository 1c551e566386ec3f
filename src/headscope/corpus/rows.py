"""Documents from JSONL, Parquet and Arrow files, `.npy` files of token ids, and datasets on the hub: one per row.

A row holds text or token ids. Its side of the split depends on its content, so that duplicates are on one side. Nothing
is unpickled.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from headscope.artefact import read_json
from headscope.corpus.padding import LAYOUT, check_holds_ids, check_unread, companions, pieces
from headscope.corpus.reading import Reading
from headscope.corpus.text import Document, cut_documents, sections
from headscope.errors import CorpusError
from headscope.hub import advice, trouble

if TYPE_CHECKING:
    import pyarrow as pa

FIELDS = ("text", "input_ids", "tokens")
"""Default fields, in order of precedence."""

_BATCH = 1024  # rows read at a time
_LARGEST = 2**31 - 1
_OF_IDS = re.compile(r"ids$|^tokens$")  # names of columns of token ids
_WRITTEN = re.compile(r"\s*[\[(]?\s*\d+[\s,]+\d")


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """Token ids with a name, and the key that determines their side of the split."""

    name: str
    ids: Int[np.ndarray, " token"]
    key: str
    is_row: bool = True
    """Whether it is a separate row, not a piece of a stream."""
    marked: frozenset[int] = frozenset()
    """Ids that the row marks as special (`special_tokens_mask`)."""
    beside: frozenset[str] = frozenset()
    """Companions that define which of its tokens see one another, as in `padding.companions`."""


def jsonl_documents(path: Path, name: str, reading: Reading) -> Iterator[Document | TokenDocument]:
    """Yield one document per line of JSON objects.

    Raises:
        CorpusError: a line is not a JSON object, or lacks the field.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for i, line in enumerate(file):
                if line.strip():
                    where = f"{path}, line {i + 1}"
                    yield from _of_row(_parsed(line, where), reading.field, where, f"{name}:{i}")
    except (UnicodeDecodeError, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read: {error}", expected="a readable UTF-8 file of JSON lines", do="convert it"
        ) from error


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: {error}", expected="one JSON object a line", do="mend the file") from error
    if not isinstance(row, dict):
        raise CorpusError(
            f"{where}: {type(row).__name__}", expected="one JSON object a line", do="write objects with a field `text`"
        )
    return row


def chosen_field(names: Sequence[str], field: str | None, where: str) -> str:
    """Return the field to read: the given one, or the first of `FIELDS` that exists.

    Raises:
        CorpusError: there is none.
    """
    found = next((f for f in ([field] if field else FIELDS) if f in names), None)
    if found is None:
        raise CorpusError(
            f"{where}: no field {field or ' or '.join(FIELDS)}",
            expected=f"one of its fields: {', '.join(map(str, names)) or 'it has none'}",
            do="name it with --field",
        )
    return found


def _of_row(row: dict[str, Any], field: str | None, where: str, name: str) -> Iterator[Document | TokenDocument]:
    chosen = chosen_field(list(row), field, where)
    if isinstance(row[chosen], list):
        check_unread(chosen, {name: isinstance(value, list) for name, value in row.items()}, where)
    _check_not_written(chosen, row[chosen], where)
    beside = {kind: row[column] for kind, column in companions(chosen, list(row)).items()}
    yield from row_documents(row[chosen], name, beside)


def _check_not_written(field: str, value: Any, where: str) -> None:
    """Raise CorpusError if token ids are stored as text, as in a table converted from CSV."""
    if isinstance(value, str) and _OF_IDS.search(field) and _WRITTEN.match(value):
        raise CorpusError(
            f"{where} has token ids stored as text in {field}: {value[:30]!r}",
            expected="lists of whole numbers",
            do=f"parse them (table['{field}'].map(json.loads)), and write the table as Parquet or JSONL",
        )


def row_documents(value: Any, name: str, beside: Mapping[str, Any] | None = None) -> Iterator[Document | TokenDocument]:
    """Yield the documents of a row: text, split if very long, or token ids without padding; none if it is empty.

    Args:
        value: text, or token ids.
        name: name of the row.
        beside: masks and positions of token ids, as in `padding.companions`.

    Raises:
        CorpusError: it is neither, or has unsupported companions.
    """
    if value is None:
        return
    if isinstance(value, str):
        yield from cut_documents(sections(value), name, hashlib.sha256(_encoded(value, name)).hexdigest())
        return
    try:
        values = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise CorpusError(
            f"{name} holds lists of different lengths",
            expected="text, or one list of token ids",
            do="name another field with --field",
        ) from error
    found = pieces(checked_ids(values, name), beside or {}, name)
    layout = LAYOUT.intersection(beside or {})
    for i, piece in enumerate(found):
        if len(piece.ids):
            own = name if len(found) == 1 else f"{name}#{i}"
            key = hashlib.sha256(piece.ids.astype("<i4").tobytes()).hexdigest()
            yield TokenDocument(own, piece.ids, key, marked=piece.marked, beside=layout)


def _encoded(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{name} holds half of a surrogate pair at character {error.start}",
            expected="text that can be written as UTF-8",
            do="write the file again with a program that keeps characters whole",
        ) from error


def checked_ids(values: np.ndarray, where: str) -> Int[np.ndarray, " token"]:
    """Convert a row of token ids to int32.

    Raises:
        CorpusError: not non-negative integers.
    """
    if values.size and (values.ndim != 1 or values.dtype.kind not in "iu"):
        raise CorpusError(
            f"{where} holds {values.dtype} of {values.ndim} dimensions",
            expected="text, or a list of token ids",
            do="name another field with --field",
        )
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= _LARGEST:
        raise CorpusError(
            f"{where} has the token ids {int(values.min())} to {int(values.max())}",
            expected="ids of a vocabulary, from 0 on",
            do="tokenise the text with the model's own tokenizer",
        )
    return values.astype(np.int32)


def npy_documents(path: Path, name: str, bos: int) -> Iterator[TokenDocument]:
    """Yield token ids of a `.npy` file: [row, position], or one stream, which is split only before each BOS.

    Raises:
        CorpusError: it is not an array of integers in one or two dimensions, or holds Python objects.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CorpusError(
            f"{path}: {str(error).splitlines()[0]}", expected="a .npy file of token ids", do="save an array of integers"
        ) from error
    if not isinstance(values, np.ndarray) or values.ndim not in (1, 2) or values.dtype.kind not in "iu":
        raise CorpusError(
            f"{path} holds {getattr(values, 'dtype', type(values))} of {getattr(values, 'ndim', 0)} dimensions",
            expected="token ids [row, position] or [position]",
            do="save an array of integers",
        )
    check_holds_ids(path.stem, values, str(path))
    if values.ndim == 2:
        for i, row in enumerate(values):
            yield from _token_documents(row, f"{name}:{i}", is_row=True)
        return
    starts = np.flatnonzero(values == bos)
    if not len(starts) or starts[0] != 0:
        starts = np.concatenate([[0], starts])
    for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(values)], strict=True)):
        yield from _token_documents(values[start:end], f"{name}:{i}", is_row=False)


def _token_documents(values: np.ndarray, name: str, *, is_row: bool) -> Iterator[TokenDocument]:
    ids = checked_ids(np.asarray(values), name)
    if len(ids):
        yield TokenDocument(name, ids, hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(), is_row)


def parquet_documents(path: Path, name: str, reading: Reading) -> Iterator[Document | TokenDocument]:
    """Yield one document per row of a Parquet file.

    Raises:
        CorpusError: it is damaged, or lacks the field.
    """
    import pyarrow.parquet as pq

    with _arrow_errors(path):
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        field = chosen_field(names, reading.field, str(path))
        batches = file.iter_batches(_BATCH, columns=[field, *companions(field, names).values()])
        yield from _batch_documents(batches, name, field, file.schema_arrow)


def arrow_documents(paths: Iterable[Path], name: str, reading: Reading) -> Iterator[Document | TokenDocument]:
    """Yield one document per row of the Arrow files of a saved dataset.

    Raises:
        CorpusError: one is damaged, or lacks the field.
    """
    import pyarrow as pa

    first = 0
    for path in paths:
        with _arrow_errors(path), pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            field = chosen_field(stream.schema.names, reading.field, str(path))
            for batch in stream:
                yield from _batch_documents([batch], name, field, stream.schema, first)
                first += batch.num_rows


def saved_dataset(folder: Path, split: str) -> list[Path] | None:
    """Return the Arrow files of a dataset saved by `save_to_disk` of `datasets`, in order; None for other folders.

    Raises:
        CorpusError: a file is missing, there is no such split, or not all rows of the files are of the dataset.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json")["splits"]
            if split not in splits:
                raise CorpusError(
                    f"no split {split!r} in {folder}", expected=", ".join(splits), do="name it with --dataset-split"
                )
            folder = folder / split
        if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
            return None
        state = read_json(folder / "state.json")
        files = [folder / Path(f["filename"]).name for f in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{folder} is a damaged dataset: {error!r}", expected="what save_to_disk wrote", do="save it again"
        ) from error
    if state.get("_indices_data_files"):  # of version 1 of the library
        raise CorpusError(
            f"{folder} holds a dataset with a selection of its rows stored separately",
            expected="the rows of a dataset alone",
            do="load it with `datasets`, call flatten_indices(), and save it again",
        )
    for file in files:
        if not file.is_file():
            raise CorpusError(f"{file} is missing", expected="all files of the dataset", do="save it again")
    return files


def _batch_documents(
    batches: "Iterable[pa.RecordBatch]", name: str, field: str, schema: "pa.Schema", first: int = 0
) -> Iterator[Document | TokenDocument]:
    """Yield rows of batches of a table with these columns, numbered from `first` on."""
    import pyarrow as pa

    beside = companions(field, schema.names)
    lists = {column.name: pa.types.is_nested(column.type) for column in schema}
    for batch in batches:
        column = batch.column(field)
        others = {kind: batch.column(other) for kind, other in beside.items()}
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            check_unread(field, lists, name)
        is_list = _is_list(column.type)
        for i in range(len(column)):
            value = column[i]
            own = {kind: other[i].as_py() for kind, other in others.items()}
            if is_list and value.is_valid:
                ids = value.values.to_numpy(zero_copy_only=False)
                yield from row_documents(ids, f"{name}:{first + i}", own)
            else:
                _check_not_written(field, value.as_py(), f"{name}:{first + i}")
                yield from row_documents(value.as_py(), f"{name}:{first + i}", own)
        first += len(column)


def _is_list(kind: "pa.DataType") -> bool:
    """Whether values are lists with contiguous items."""
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read: {str(error).splitlines()[0]}",
            expected="a whole Parquet or Arrow file",
            do="write or download it again",
        ) from error


def hub_documents(name: str, reading: Reading) -> Iterator[Document | TokenDocument]:
    """Yield one document per row of a dataset on the hub, streamed; none of the dataset's code is run.

    Raises:
        CorpusError: `datasets` is not installed, there is no network, no such dataset, configuration, split or field,
            or the dataset is gated.
    """
    taken = f"no file or folder {name!r} here, so it was taken for a dataset on the hub"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CorpusError(
            f"{taken}, and the package `datasets` is not installed",
            expected="`python`, a path, or a dataset on the hub with that package",
            do="check the path, or: pip install 'headscope[hub]'",
        ) from error
    try:
        rows = load_dataset(
            name, reading.dataset_config, split=reading.dataset_split, revision=reading.dataset_revision, streaming=True
        )
        for i, row in enumerate(rows):
            yield from _of_row(dict(row), reading.field, f"{name}, row {i}", f"{name}:{i}")
    except CorpusError:
        raise
    except Exception as error:  # a dozen classes of three libraries, for a wrong name or the network
        raise _hub_error(taken, name, error) from error


def _hub_error(taken: str, name: str, error: Exception) -> CorpusError:
    problem = trouble(error)
    said = {
        "gated": ", which asks for a login, or for its terms to be accepted",
        "missing": ", and there is none of this name, or it is private",
        "unreachable": ", and the hub cannot be reached",
    }
    line = (str(error).splitlines() or [""])[0]
    do = advice(error, name, dataset=True, otherwise="name --dataset-config and --dataset-split, or check the path")
    return CorpusError(
        taken + (said[problem] if problem else f": {type(error).__name__}: {line}"),
        expected="a path on this machine, or a dataset that can be read, with its configuration and split",
        do=do if problem in (None, "gated") else f"check the path; if a dataset was meant, {do}",
    )
