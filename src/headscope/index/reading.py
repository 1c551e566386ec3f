"""Open, validate and read index files in chunks; errors name the damaged file. No torch."""

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from headscope.artefact import read_json
from headscope.errors import IndexFormatError
from headscope.index.config import FORMAT_VERSION
from headscope.index.schema import Sizes, check_manifest, one_array, read_footer

if TYPE_CHECKING:
    from headscope.index.token_texts import TokenTexts

TABLES = (
    "tokens",
    "documents",
    "vocabulary",
    "features",
    "sources",
    "source_totals",
    "nulls",
    "groups",
    "examples",
)
_NUMBERED = ("features", "documents", "vocabulary")  # their first column is the row number
_FILE = re.compile(r"(activations/)?[\w-]+\.\w+")
_CACHED_TOKENS = 1 << 24  # tokens in memory at a time, 9 bytes each: a card shows text from the whole corpus
_HELD_BYTES = 64 << 20  # row groups of one table in memory


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json.

    Raises:
        IndexFormatError: there is none, the build is unfinished, there are several indexes, or it is of another
            version.
    """
    partial = Path(f"{folder.resolve()}.partial")
    if not (folder / "manifest.json").is_file() and partial.is_dir():
        raise IndexFormatError(
            f"{folder} is not finished: {partial} holds an interrupted build",
            expected="an index that was built to its end",
            do="run the same `headscope index` command again: it goes on with what stands there",
        )
    try:
        if not (folder / "manifest.json").is_file() or (folder / "manifest.json").is_symlink():
            is_sae, lacks = (folder / "cfg.json").is_file(), "no index: it has no manifest.json of its own"
            found = ("an SAE, not an index" if is_sae else lacks) if folder.is_dir() else "no folder"
            raise IndexFormatError(
                f"{folder} is {found}",
                expected="a folder that `headscope index` wrote to its end",
                do=_advice(folder),
            )
        manifest = read_json(folder / "manifest.json")
        if "indexes" in manifest:
            names = ", ".join(manifest["indexes"])[:500]
            raise IndexFormatError(f"{folder} holds several indexes", expected="one", do=f"open one of: {names}")
        found = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IndexFormatError(
            f"no index in {folder}: {type(error).__name__} {error}",
            expected="a folder that `headscope index` wrote to its end",
            do=_advice(folder),
        ) from error
    if type(found) is not int or found != FORMAT_VERSION:
        raise IndexFormatError(f"index format {found}", expected=f"{FORMAT_VERSION}", do="build the index again")
    with reading(folder):
        check_manifest(manifest)
    return manifest


def _advice(folder: Path) -> str:
    below = sorted(str(path.parent) for path in folder.glob("*/manifest.json"))
    return f"did you mean {' or '.join(below[:3])}?" if below else "build it with `headscope index`"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report the damaged file, whatever exception reading it raises: a folder's content is untrusted."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise IndexFormatError(
            f"{path} is damaged: {error}", expected="tables as they were written", do="build the index again"
        ) from error


def check_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Locate the tables' files: those named in the manifest, in the folder itself, of the stated size.

    Raises:
        ValueError: a file is missing, unlisted or of another size.
    """
    files = manifest["files"]
    wrong = [f"{name}.parquet is not in the manifest" for name in TABLES if f"{name}.parquet" not in files]
    here = folder.resolve()
    for name, entry in files.items():
        inside = _FILE.fullmatch(name) and (folder / name).resolve() == here / name
        if not inside:
            wrong.append(f"{name!r} is not a file of this folder")
        elif not isinstance(entry, list) or [type(value) for value in entry] != [int, str]:
            wrong.append(f"manifest.json does not say the size and hash of {name}")
        elif not (folder / name).is_file() or (folder / name).stat().st_size != entry[0]:
            wrong.append(f"{name} is missing or cut short")
    parts = {f"activations/{path.name}" for path in (folder / "activations").glob("*")}
    wrong += [f"{name} is not in the manifest" for name in sorted(parts - set(files))]
    if wrong:
        raise ValueError("; ".join(wrong[:5]))
    return sorted(name for name in files if name.endswith(".parquet"))


def read_table(path: Path) -> pa.Table:
    """Read a whole table.

    Raises:
        IndexFormatError: it is damaged.
    """
    with reading(path):
        read_footer(path)
        return pq.read_table(path, page_checksum_verification=True)


def read_own(path: Path, sizes: Sizes) -> pa.Table:
    """Read a whole table of the index itself, and validate it against the sizes of the index.

    Raises:
        IndexFormatError: it is damaged.
    """
    with reading(path):
        table = sizes.check(read_table(path))
        if path.stem in _NUMBERED and not np.array_equal(table.column(0).to_numpy(), np.arange(len(table))):
            raise ValueError("rows that are not numbered from 0")
        return table


class LatentRows:
    """A table sorted by latent, read a few rows at a time: row groups are found by their statistics."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        """Open; only the statistics of the row groups are read."""
        self._path, self._sizes, self._file = path, sizes, pq.ParquetFile(path, page_checksum_verification=True)
        self._lock = RLock()
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._n_bytes = 0
        metadata = self._file.metadata
        self._numbers = [i for i in range(metadata.num_row_groups) if metadata.row_group(i).num_rows]
        latent = [metadata.row_group(i).column(0).statistics for i in self._numbers]
        if self._file.schema_arrow.names[0] != "latent" or not all(s is not None and s.has_min_max for s in latent):
            raise ValueError(f"{path.name} lacks statistics of its latents")
        self._first, self._last = np.array([s.min for s in latent]), np.array([s.max for s in latent])
        if (self._first[1:] < self._last[:-1]).any():
            raise ValueError(f"{path.name} has rows that are not sorted by latent")

    def of(self, latent: int) -> pa.Table:
        """Return the rows of one latent."""
        first, last = np.searchsorted(self._last, latent), np.searchsorted(self._first, latent, side="right")
        numbers = self._numbers[first:last]
        if not numbers:
            return self._file.schema_arrow.empty_table()
        with self._lock, reading(self._path):
            table = pa.concat_tables([self._group(number) for number in numbers])
        low, high = np.searchsorted(table["latent"].to_numpy(), [latent, latent + 1])
        return table.slice(low, high - low).combine_chunks()

    def preload(self) -> None:
        """Read row groups in order, up to the cache size."""
        for number in self._numbers:
            with self._lock, reading(self._path):
                self._group(number)
                if self._n_bytes > _HELD_BYTES // 2:
                    return

    def _group(self, number: int) -> pa.Table:
        """Return one row group, cached while the most recently used ones fit in memory."""
        if number not in self._held:
            table = self._sizes.check(self._file.read_row_group(number, use_threads=False))
            if (np.diff(table["latent"].to_numpy()) < 0).any():
                raise ValueError("rows that are not sorted by latent")
            self._held[number] = table
            self._n_bytes += table.nbytes
            while len(self._held) > 1 and self._n_bytes > _HELD_BYTES:
                self._n_bytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(number)
        return self._held[number]


class ActivationRows:
    """All active pairs, with the rows of latents one after another."""

    def __init__(self, paths: list[Path], counts: Int[np.ndarray, " latent"], sizes: Sizes) -> None:
        """Open all files; `counts` is the number of rows per latent."""
        files = [pq.ParquetFile(path, page_checksum_verification=True) for path in paths]
        self._groups = [(file, i) for file in files for i in range(file.metadata.num_row_groups)]
        rows = [file.metadata.row_group(i).num_rows for file, i in self._groups]
        self._group_starts = np.cumsum([0, *rows])
        self._starts = np.cumsum([0, *counts])
        self._folder, self._sizes, self._lock = paths[0].parent, sizes, RLock()
        if self._group_starts[-1] != self._starts[-1]:
            raise ValueError(f"{self._group_starts[-1]} activations, {self._starts[-1]} in features.parquet")

    def of(self, latent: int) -> pa.Table:
        """Return the rows of one latent."""
        low, high = self._starts[latent], self._starts[latent + 1]
        first = int(np.searchsorted(self._group_starts, low, side="right")) - 1
        last = max(first, int(np.searchsorted(self._group_starts, high)))
        first = min(first, len(self._groups) - 1)
        with self._lock, reading(self._folder):
            read = [file.read_row_group(i, use_threads=False) for file, i in self._groups[first : max(last, first + 1)]]
            table = pa.concat_tables(read).slice(low - self._group_starts[first], high - low)
            if not (table["latent"].to_numpy() == latent).all():
                raise ValueError(f"activations of latent {latent} are not where features.parquet says")
            return self._sizes.check(table)

    def each(self) -> Iterator[pa.Table]:
        """Yield the rows of each latent in turn; each row group is read once, and few are in memory."""
        groups, held, begins = iter(self._groups), None, 0
        for latent, (low, high) in enumerate(pairwise(self._starts)):
            while held is None or begins + len(held) < high:
                file, i = next(groups)
                with self._lock, reading(self._folder):
                    read = self._sizes.check(file.read_row_group(i, use_threads=False))
                held, begins = (read, 0) if held is None else (pa.concat_tables([held.slice(low - begins), read]), low)
            table = held.slice(low - begins, high - low)
            if not (table["latent"].to_numpy() == latent).all():
                with reading(self._folder):
                    raise ValueError(f"activations of latent {latent} are not where features.parquet says")
            yield table


class TokenBlocks:
    """The token table, with some row groups cached; a block never spans two of them.

    Safe to use from several threads.
    """

    COLUMNS = ("token", "document", "is_text")

    def __init__(self, path: Path, block_size: int, sizes: Sizes, texts: "TokenTexts") -> None:
        """Open the table; nothing is read yet.

        Args:
            path: the file.
            block_size: tokens per block.
            sizes: sizes of the index, for validation.
            texts: determine where a text starts, and which ids are never text where the table of an older index lacks
                `is_text`.
        """
        self._path, self._sizes, self._file = path, sizes, pq.ParquetFile(path, page_checksum_verification=True)
        self._special = None if "is_text" in self._file.schema_arrow.names else sorted(texts.vocabulary[1])
        self._texts = texts
        metadata = self._file.metadata
        *first, last = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        rows = first[0] if first else last
        if rows % block_size or set(first) - {rows} or not 0 < last <= rows:
            raise ValueError(f"row groups of {sorted({*first, last})} tokens for blocks of {block_size}")
        self._blocks = rows // block_size
        self._size = block_size
        self._lock = RLock()
        self._held: OrderedDict[tuple[int, _Before], tuple[dict[str, np.ndarray], _Before]] = OrderedDict()

    def end_with_blocks(self) -> bool:
        """Whether exactly the last tokens of blocks have no next token (in the first row group)."""
        following = self._file.read_row_group(0, columns=["next_token"], use_threads=False)["next_token"]
        last = following.is_null().to_numpy().reshape(-1, self._size)
        return bool((last == (np.arange(self._size) == self._size - 1)).all())

    @property
    def derived(self) -> str | None:
        """The SQL for a column that an older table lacks: text is then all but special tokens, decided by id alone."""
        if self._special is None:
            return None
        return f"NOT list_contains({self._special}::INTEGER[], token) AS is_text"

    def of(self, block: int, column: str) -> np.ndarray:
        """Return one of `COLUMNS` of one block."""
        group, number = divmod(block, self._blocks)
        values, _ = self._group(group, _Before())
        return values[column][number * self._size : (number + 1) * self._size]

    def each(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield all blocks, some at a time: `COLUMNS` and `starts`, where a text starts; each [block, position]."""
        before = _Before()
        for group in range(self._file.metadata.num_row_groups):
            columns, before = self._group(group, before)
            yield {name: values.reshape(-1, self._size) for name, values in columns.items()}

    def _group(self, group: int, before: "_Before") -> tuple[dict[str, np.ndarray], "_Before"]:
        key = group, before
        with self._lock:
            if key not in self._held:
                columns = ["token", "document", "offset", *(["is_text"] if self._special is None else [])]
                with reading(self._path):
                    table = self._sizes.check(self._file.read_row_group(group, columns=columns, use_threads=False))
                own = {name: table[name].to_numpy() for name in columns}
                text = own["is_text"] if self._special is None else ~np.isin(own["token"], self._special)
                starts, after = _starts(own["token"], text, own["offset"], *self._texts.segments, before)
                values = {"token": own["token"], "document": own["document"], "is_text": text, "starts": starts}
                self._held[key] = values, after
                if len(self._held) * self._blocks * self._size > _CACHED_TOKENS:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]


class _Before(NamedTuple):
    """State at the end of some tokens of the document that continues after them."""

    bare: bool = False
    """Whether all of its tokens so far are special ones."""
    special: bool = False
    """Whether its last token is special, and the tokenizer puts its prefix after special tokens."""


def _starts(
    token: Int[np.ndarray, " position"],
    is_text: Bool[np.ndarray, " position"],
    offset: Int[np.ndarray, " position"],
    unknown: int | None,
    repeats: bool,
    before: _Before,
) -> tuple[Bool[np.ndarray, " position"], _Before]:
    """Find where texts start: at documents, after their leading special tokens; also return the final state.

    If the tokenizer also puts its prefix after special tokens (`repeats`), a text also starts after one inside a
    document, but not after the token for text that cannot be spelled (`unknown`).
    """
    place = np.flatnonzero(offset > 0)
    if not len(place):
        return np.zeros(len(token), bool), before
    within = is_text[place] | (token[place] == unknown if unknown is not None else False)
    begins = np.diff(offset[place], prepend=0) != 1  # where a document starts, or continues at the very first token
    begins[0] = True
    goes_on = offset[place[0]] > 1
    first = np.flatnonzero(begins)
    earlier = np.cumsum(within) - within  # preceding tokens of the text
    earlier -= np.repeat(earlier[first], np.diff(np.append(first, len(place))))
    if goes_on and not before.bare:
        earlier[: first[1] if len(first) > 1 else None] += 1
    starts = earlier == 0
    if repeats:
        starts[1:] |= ~within[:-1] & ~begins[1:]
        starts[0] |= goes_on and before.special
    found = np.zeros(len(token), bool)
    found[place[starts]] = True
    return found & is_text, _Before(bool(earlier[-1] == 0 and not within[-1]), repeats and not within[-1])


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Flatten a column of lists; return its values with the start and end of each list."""
    array = one_array(lists)
    return array.values.to_numpy(), array.offsets.to_numpy()


def matrix(lists: pa.ChunkedArray, width: int) -> np.ndarray:
    """Stack lists of one length as rows; NaN where a list is null."""
    values, offsets = flat(lists)
    present = np.diff(offsets) > 0
    matrix = np.full((len(present), width), np.nan)
    matrix[present] = values[offsets[0] : offsets[-1]].reshape(-1, width)
    return matrix
