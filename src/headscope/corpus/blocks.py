"""Tokenised documents to blocks of equal length, and where each token came from.

`packed`: the documents, a BOS before each, are one stream; it is cut, and each piece gets a BOS of its own:

    block 0: BOS BOS d0 d0 d0 ... | block 1: BOS d0 d0 BOS d1 ... | ...

The tail that does not fill a block is left out. `rows`: each document begins a block and goes on in as many as it
takes, and the last one is filled up with BOS tokens that are no text and stand behind all of it.
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
"""Offset of the BOS that a block begins with, where no document does."""
PADDING = -2
"""Offset of padding, such as what fills up the last block of a document: no statistic counts it."""
NOT_TEXT = -3
"""Offset of what the model reads but is not text, whatever its id: a separator."""

_GROUP = 64  # documents: with a limit of tokens, whole groups are named in a corpus
_IN_MEMORY = 1 << 30  # bytes of blocks; larger corpora are mapped from a file
_CHUNK = 1 << 20  # positions laid out at a time


@dataclass(frozen=True)
class Corpus:
    """Token blocks and where each token came from; the arrays of a large corpus are mapped from a file."""

    name: str
    """What was read: `python`, a path, or the name of a dataset."""
    split: Split
    blocks: Int[np.ndarray, "block position"]
    """Token ids; column 0 is the BOS unless it was asked for elsewhere."""
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
    """The choices it was read with."""

    @property
    def n_tokens(self) -> int:
        """All positions, BOS included."""
        return self.blocks.size

    def is_text(self, blocks: Int[np.ndarray, " n"] | slice = slice(None)) -> Bool[np.ndarray, "n position"]:
        """Which positions of some blocks are text: what statistics are over, and where a proxy can be true.

        This is the one definition of a text token. A position is text if it belongs to the text of a document (its
        offset is 1 or more, so it is neither a BOS that was put there, nor padding, nor a separator) and its id is not
        that of a special token, wherever that stands.
        """
        return (self.offset[blocks] > 0) & ~np.isin(self.blocks[blocks], sorted(self.special | {self.bos}))

    @property
    def n_text_tokens(self) -> int:
        """Positions that are text."""
        return sum(int(self.is_text(rows).sum()) for rows in _runs(self.blocks))

    @property
    def n_padding(self) -> int:
        """Positions that are padding."""
        return sum(int((self.offset[rows] == PADDING).sum()) for rows in _runs(self.offset))

    @property
    def block_size(self) -> int:
        """Positions in a block, BOS included."""
        return self.blocks.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of the documents they are from, as `sha256:<hex>`."""
        digest = hashlib.sha256(f"{self.blocks.shape} {self.bos}".encode())
        for values in (self.blocks, self.document, self.offset):
            for rows in _runs(values):
                digest.update(np.ascontiguousarray(values[rows], dtype="<i4").data)
        digest.update("\0".join(self.documents).encode())
        return f"sha256:{digest.hexdigest()}"

    def provenance(self) -> dict[str, Any]:
        """What an artefact says of the text it was made from."""
        return {
            "name": self.name,
            "split": self.split,
            "hash": self.fingerprint(),
            "n_tokens": self.n_tokens,
            "bos": {"id": self.bos, "at": self.reading.get("bos_at", "not stated")},
            "reading": dict(self.reading),
        }


def _runs(values: np.ndarray) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    step = max(1, _CHUNK // values.shape[1])
    return (slice(start, start + step) for start in range(0, len(values), step))


@dataclass(frozen=True)
class Stream:
    """Tokenised documents, one after another, as they are: nothing is put between them."""

    tokens: Int[np.ndarray, " token"]
    lengths: Int[np.ndarray, " document"]
    names: tuple[str, ...]
    rows: bool
    """Whether each is a row of a token file, which stands for itself."""
    n_marked: int = 0
    """How many texts hold a `▁` that the tokenizer reads as a space."""


@dataclass(frozen=True)
class Layout:
    """How blocks are made of documents."""

    block_size: int
    bos: int
    packing: Packing
    bos_at: BosAt
    separator: int | None
    """Token id of what is put after each document."""

    @property
    def block_bos(self) -> int:
        """1 where every block has a column for a BOS of its own."""
        return int(self.bos_at in ("both", "block"))

    @property
    def document_bos(self) -> int:
        """1 where each document has a BOS among its tokens; in `rows` it may be that of its first block."""
        at = ("document",) if self.packing == "rows" else ("both", "document")
        return int(self.bos_at in at)

    @property
    def body(self) -> int:
        """Positions of a block that documents fill."""
        return self.block_size - self.block_bos


class _Spans(NamedTuple):
    """Where the documents lie in the stream of tokens, and where they go to."""

    start: Int[np.ndarray, " document"]
    """Of its text in the tokens."""
    length: Int[np.ndarray, " document"]
    """Of its text."""
    span: Int[np.ndarray, " document"]
    """Positions that it takes, BOS and separator included."""
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
    """Lay documents out in blocks.

    Args:
        name: of the corpus.
        split: the side of the split that the documents are of.
        stream: the documents.
        layout: what goes where.
        max_tokens: positions at most (rounded down to whole blocks).
        scratch: folder for the blocks of a corpus that is too large for memory; they vanish with the corpus.
        special: token ids that are no text.
        reading: the choices it was read with.

    Raises:
        CorpusError: less text than one block.
        OutputError: no room for the blocks.
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
    """Documents in the first whole groups that have enough positions."""
    n = int(np.searchsorted(np.cumsum(span), enough)) + 1
    return min(len(span), -(-n // _GROUP) * _GROUP)


def _spans(stream: Stream, layout: Layout) -> _Spans:
    length = stream.lengths.astype(np.int64)
    start = np.cumsum(length) - length
    if layout.document_bos or (layout.packing == "rows" and layout.block_bos):
        own = np.zeros(len(length), bool)  # a BOS that a document brings is not doubled
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
    """Tokens, documents and offsets [row, position] of some blocks."""
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
    """[row, position] with a column before it."""
    return np.concatenate([first[:, None], rest], axis=1)


def _allocate(shape: tuple[int, ...], scratch: Path) -> np.ndarray:
    """int32 in memory, or in a file without a name where that would be too much."""
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
    """Fail now rather than in the middle of writing, where the system can say so."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n_bytes)
