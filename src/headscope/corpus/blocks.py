"""Pack tokenised documents into blocks of equal length, with the origin of each token.

`packed`: the documents, each with a BOS, are concatenated and cut, and each piece gets its own BOS:

    block 0: BOS BOS d0 d0 d0 ... | block 1: BOS d0 d0 BOS d1 ... | ...

The tail that does not fill a block is dropped. `rows`: each document starts a block and continues in as many as it
needs, and the last one is padded at the end with BOS tokens that are not text.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from headscope.corpus.reading import BosAt, Packing, Split
from headscope.errors import CorpusError, OutputError

BLOCK_BOS = -1
"""Offset of the BOS at the start of a block, where no document starts."""
PADDING = -2
"""Offset of padding, such as at the end of a document's last block: excluded from all statistics."""
NOT_TEXT = -3
"""Offset of tokens that the model reads but that are not text, whatever their id: a separator."""

_GROUP = 64  # documents: with a limit of tokens, whole groups are named in a corpus
_IN_MEMORY = 1 << 30  # bytes of blocks; larger corpora are memory-mapped
_CHUNK = 1 << 20  # positions packed at a time


@dataclass(frozen=True)
class Corpus:
    """Token blocks with the origin of each token; the arrays of a large corpus are memory-mapped."""

    name: str
    """Name of the source: `python`, a path, or the name of a dataset."""
    split: Split
    blocks: Int[np.ndarray, "block position"]
    """Token ids; column 0 is the BOS unless `bos_at` puts it elsewhere."""
    documents: tuple[str, ...]
    """Names of the documents, in stream order."""
    document: Int[np.ndarray, "block position"]
    """Index into `documents` of each token."""
    offset: Int[np.ndarray, "block position"]
    """1 for the first token of a document, and so on; 0 is its BOS, or `BLOCK_BOS`, `PADDING`, `NOT_TEXT`."""
    bos: int
    """The token id of the BOS."""
    special: frozenset[int] = frozenset()
    """Ids that are never text, besides the BOS."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """The reading options."""

    @property
    def n_tokens(self) -> int:
        """All positions, including BOS."""
        return self.blocks.size

    def is_text(self, blocks: Int[np.ndarray, " n"] | slice = slice(None)) -> Bool[np.ndarray, "n position"]:
        """Mark the text positions of some blocks: those of all statistics, and where a proxy can be true.

        This is the one definition of a text token. A position is text if it belongs to the text of a document (its
        offset is 1 or more, so it is neither an inserted BOS, nor padding, nor a separator) and its id is not that of a
        special token, at any offset.
        """
        return (self.offset[blocks] > 0) & ~np.isin(self.blocks[blocks], sorted(self.special | {self.bos}))

    @property
    def n_text_tokens(self) -> int:
        """Number of positions that are text."""
        return sum(int(self.is_text(rows).sum()) for rows in _runs(self.blocks))

    @property
    def n_padding(self) -> int:
        """Number of positions that are padding."""
        return sum(int((self.offset[rows] == PADDING).sum()) for rows in _runs(self.offset))

    @property
    def block_size(self) -> int:
        """Positions per block, including BOS."""
        return self.blocks.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and their documents, as `sha256:<hex>`."""
        digest = hashlib.sha256(f"{self.blocks.shape} {self.bos}".encode())
        for values in (self.blocks, self.document, self.offset):
            for rows in _runs(values):
                digest.update(np.ascontiguousarray(values[rows], dtype="<i4").data)
        digest.update("\0".join(self.documents).encode())
        return f"sha256:{digest.hexdigest()}"

    def provenance(self) -> dict[str, Any]:
        """Provenance of the text for artefacts."""
        return {
            "name": self.name,
            "split": self.split,
            "hash": self.fingerprint(),
            "n_tokens": self.n_tokens,
            "bos": {"id": self.bos, "at": self.reading.get("bos_at", "not stated")},
            "reading": dict(self.reading),
        }


def _runs(values: np.ndarray) -> Iterator[slice]:
    """Yield the rows of a matrix, some at a time."""
    step = max(1, _CHUNK // values.shape[1])
    return (slice(start, start + step) for start in range(0, len(values), step))


@dataclass(frozen=True)
class Stream:
    """Tokenised documents, concatenated without anything in between."""

    tokens: Int[np.ndarray, " token"]
    lengths: Int[np.ndarray, " document"]
    names: tuple[str, ...]
    rows: bool
    """Whether each is a row of a token file, to be kept separate."""
    told: Mapping[str, int] = field(default_factory=dict)
    """Numbers of documents to warn of, as `told.Told` has them."""


@dataclass(frozen=True)
class Layout:
    """Layout of documents in blocks."""

    block_size: int
    bos: int
    packing: Packing
    bos_at: BosAt
    separator: int | None
    """Token id appended to each document."""

    @property
    def block_bos(self) -> int:
        """1 where every block has a column for its own BOS."""
        return int(self.bos_at in ("both", "block"))

    @property
    def document_bos(self) -> int:
        """1 where each document has a BOS among its tokens; in `rows` it may be that of its first block."""
        at = ("document",) if self.packing == "rows" else ("both", "document")
        return int(self.bos_at in at)

    @property
    def body(self) -> int:
        """Positions of a block available to documents."""
        return self.block_size - self.block_bos


class _Spans(NamedTuple):
    """Positions of documents in the token stream and in the blocks."""

    start: Int[np.ndarray, " document"]
    """Start of its text in the tokens."""
    length: Int[np.ndarray, " document"]
    """Length of its text."""
    span: Int[np.ndarray, " document"]
    """Positions that it takes, including BOS and separator."""
    first: Int[np.ndarray, " document"]
    """`packed`: position in the stream; `rows`: its first block."""
    n_blocks: int


def pack(
    name: str,
    split: Split,
    stream: Stream,
    layout: Layout,
    max_tokens: int | None,
    *,
    scratch: Path,
    special: frozenset[int] = frozenset(),
    reading: Mapping[str, Any] | None = None,
) -> Corpus:
    """Pack documents into blocks.

    Args:
        name: name of the corpus.
        split: the side of the split of the documents.
        stream: the documents.
        layout: the layout.
        max_tokens: maximum number of positions (rounded down to whole blocks).
        scratch: folder for the blocks of a corpus too large for memory; they are deleted with the corpus.
        special: token ids that are not text.
        reading: the reading options.

    Raises:
        CorpusError: less text than one block.
        OutputError: no space for the blocks.
    """
    spans = _spans(stream, layout)
    n_documents = len(stream.names)
    if max_tokens is not None:
        n_documents = _groups(spans.span, max_tokens + layout.block_size)
    n_blocks = spans.n_blocks if max_tokens is None else min(spans.n_blocks, max_tokens // layout.block_size)
    if n_blocks <= 0:
        raise CorpusError(
            f"{spans.span.sum()} tokens in {name!r} (split {split!r})",
            expected=f"at least one block of {layout.block_size} tokens",
            do="add text, or lower --block-size",
        )
    blocks, document, offset = _allocate((3, n_blocks, layout.block_size), scratch)
    step = max(1, _CHUNK // layout.block_size)
    for start in range(0, n_blocks, step):
        rows = np.arange(start, min(start + step, n_blocks))
        blocks[rows], document[rows], offset[rows] = _lay_out(stream, layout, spans, rows)
    return Corpus(
        name=name,
        split=split,
        blocks=blocks,
        documents=stream.names[:n_documents],
        document=document,
        offset=offset,
        bos=layout.bos,
        special=special,
        reading=dict(reading or {}),
    )


def _groups(span: Int[np.ndarray, " document"], enough: int) -> int:
    """Return the documents in the first whole groups that have enough positions."""
    n = int(np.searchsorted(np.cumsum(span), enough)) + 1
    return min(len(span), -(-n // _GROUP) * _GROUP)


def _spans(stream: Stream, layout: Layout) -> _Spans:
    length = stream.lengths.astype(np.int64)
    start = np.cumsum(length) - length
    if layout.document_bos or (layout.packing == "rows" and layout.block_bos):
        own = np.zeros(len(length), bool)  # a document's own BOS is not doubled
        own[length > 0] = stream.tokens[start[length > 0]] == layout.bos
        start, length = start + own, length - own
    span = length + layout.document_bos + (layout.separator is not None)
    if layout.packing == "packed":
        return _Spans(start, length, span, np.cumsum(span) - span, int(span.sum()) // layout.body)
    rows = -(-span // layout.body)
    return _Spans(start, length, span, np.cumsum(rows) - rows, int(rows.sum()))


def _lay_out(
    stream: Stream, layout: Layout, spans: _Spans, rows: Int[np.ndarray, " row"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, documents and offsets [row, position] of some blocks."""
    column = np.arange(layout.body)
    if layout.packing == "packed":
        place = rows[:, None] * layout.body + column
        d = np.searchsorted(spans.first, place, side="right") - 1
        o = place - spans.first[d]
    else:
        d = np.repeat(np.searchsorted(spans.first, rows, side="right")[:, None] - 1, layout.body, axis=1)
        o = (rows[:, None] - spans.first[d]) * layout.body + column
    nth = o - layout.document_bos  # among the tokens of the text
    is_text = (nth >= 0) & (nth < spans.length[d])
    tokens = np.full(d.shape, layout.bos, np.int32)
    tokens[is_text] = stream.tokens[(spans.start[d] + nth)[is_text]]
    offset = np.where(o < spans.span[d], nth + 1, PADDING)
    if layout.separator is not None:
        ends = nth == spans.length[d]
        tokens[ends], offset[ends] = layout.separator, NOT_TEXT
    if not layout.block_bos:
        return tokens, d, offset
    begins = (o[:, 0] == 0) & (layout.packing == "rows")
    first = (np.full(len(rows), layout.bos), d[:, 0], np.where(begins, 0, BLOCK_BOS))
    return _after(first[0], tokens), _after(first[1], d), _after(first[2], offset)


def _after(first: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Prepend a column to [row, position]."""
    return np.concatenate([first[:, None], rest], axis=1)


def _allocate(shape: tuple[int, ...], scratch: Path) -> np.ndarray:
    """Allocate int32 in memory, or in an unnamed file where that would be too much."""
    n_bytes = 4 * int(np.prod(shape))
    if n_bytes <= _IN_MEMORY:
        return np.empty(shape, np.int32)
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            file.truncate(n_bytes)
            _reserve(file.fileno(), n_bytes)
            return np.memmap(file, np.int32, "r+", shape=shape)
    except OSError as error:
        raise OutputError(
            f"no room for {n_bytes / 2**30:.1f} GiB of blocks in {scratch}: {error.strerror or error}",
            expected="a disk with room for 12 bytes a token",
            do="lower --max-tokens, or set HEADSCOPE_CACHE to a folder on a larger disk",
        ) from error


def _reserve(file: int, n_bytes: int) -> None:
    """Reserve disk space, so that a full disk fails now rather than in the middle of writing."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n_bytes)
