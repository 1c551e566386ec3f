"""Text to token blocks: the bundled corpus `python`, or text files of the user's own.

A corpus is a list of named documents. Tokenised, they form one stream with a BOS before each document, and the
stream is cut into blocks of equal length that each start with a BOS:

    block 0: BOS d0 d0 d0 ... | block 1: BOS d0 d0 BOS d1 ... | ...

The tail that does not fill a block is left out. Documents are held out by the SHA-256 of their name, so that a
document is on the same side of the split on every machine and in every version of the text.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from headscope.errors import CorpusError

Split = Literal["train", "heldout", "all"]

HELD_OUT = 0.4
"""The share of documents (by hash of their name) that training never sees."""

SEPARATOR = "\n<|doc|>\n"
"""A line `<|doc|>` separates the documents inside one text file."""

_NOT_PYTHON_PROSE = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "ensurepip", "pydoc_data"}
    | {"_vendor", "site-packages", "dist-packages", "__pycache__"}
)
_SECTION = 65_536  # characters; longer files are cut at line ends, so that one large file can be split too


@dataclass(frozen=True)
class Document:
    """One text with the name that decides its side of the split."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Token blocks and where each token came from."""

    name: str
    """What was read: `python`, or the path of a file or folder."""
    split: Split
    blocks: Int[np.ndarray, "block position"]
    """Token ids; column 0 is the BOS."""
    documents: tuple[str, ...]
    """Names of the documents, in stream order."""
    document: Int[np.ndarray, "block position"]
    """Index into `documents` of each token."""
    offset: Int[np.ndarray, "block position"]
    """Tokens since the start of its document; 0 is the document's BOS, and a block's own BOS is -1."""
    bos: int
    """The token id of the BOS."""

    @property
    def n_tokens(self) -> int:
        """All positions, BOS included."""
        return self.blocks.size

    @property
    def n_text_tokens(self) -> int:
        """Positions that are not a BOS."""
        return int((self.blocks != self.bos).sum())

    @property
    def block_size(self) -> int:
        """Positions in a block, BOS included."""
        return self.blocks.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of the documents they are from, as `sha256:<hex>`."""
        digest = hashlib.sha256(f"{self.blocks.shape} {self.bos}".encode())
        for values in (self.blocks, self.document, self.offset):
            digest.update(np.ascontiguousarray(values, dtype="<i4").data)
        digest.update("\0".join(self.documents).encode())
        return f"sha256:{digest.hexdigest()}"


def load_corpus(
    source: str,
    tokenizer: Tokenizer,
    *,
    bos: int,
    split: Split = "train",
    block_size: int = 256,
    max_tokens: int | None = None,
) -> Corpus:
    """Read, tokenise and pack a corpus.

    Args:
        source: `python` (the standard library of the running interpreter), or a UTF-8 text file, or a folder of them.
        tokenizer: its special tokens are never produced from text: `<|bos|>` in a document is seven characters.
        bos: token id of the BOS.
        split: documents to take: those for training, those held out, or all.
        block_size: positions in a block, BOS included.
        max_tokens: stop after this many positions (rounded down to whole blocks).

    Raises:
        CorpusError: the source does not exist, is not UTF-8, is empty, or is shorter than one block.
    """
    if block_size < 2:
        raise CorpusError(f"a block of {block_size} tokens", expected="2 or more", do="raise --block-size")
    tokens, lengths, names = [], [], []
    total = 0
    for batch in _batches(_in_split(read_documents(source), split), 64):
        for document, ids in zip(batch, encode(tokenizer, [d.text for d in batch]), strict=True):
            names.append(document.name)
            tokens.append(np.array([bos, *ids], dtype=np.int32))
            lengths.append(len(ids) + 1)
            total += len(ids) + 1
        if max_tokens is not None and total >= max_tokens + block_size:
            break
    if not names:
        raise CorpusError(
            f"no documents in {source!r} (split {split!r})",
            expected="text with at least one document on this side of the split",
            do="add text, separate documents with a line <|doc|>, or use --split all",
        )
    return _pack(source, split, tokens, names, bos, block_size, max_tokens)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without any special token."""
    tokenizer.encode_special_tokens = True  # a special token's spelling in a text is text
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _pack(
    source: str,
    split: Split,
    tokens: list[np.ndarray],
    names: list[str],
    bos: int,
    block_size: int,
    max_tokens: int | None,
) -> Corpus:
    stream = np.concatenate(tokens)
    lengths = np.array([len(t) for t in tokens])
    document = np.repeat(np.arange(len(tokens), dtype=np.int32), lengths)
    offset = (np.arange(len(stream)) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32)
    body = block_size - 1
    n_blocks = len(stream) // body
    if max_tokens is not None:
        n_blocks = min(n_blocks, max_tokens // block_size)
    if n_blocks <= 0:
        raise CorpusError(
            f"{len(stream)} tokens in {source!r} (split {split!r})",
            expected=f"at least one block of {block_size} tokens",
            do="add text, lower --block-size, or raise --max-tokens",
        )

    def cut(values: np.ndarray, first: np.ndarray) -> np.ndarray:
        rows = values[: n_blocks * body].reshape(n_blocks, body)
        return np.concatenate([first.astype(np.int32)[:, None], rows], axis=1)

    first_document = document[: n_blocks * body : body]
    return Corpus(
        name=source,
        split=split,
        blocks=cut(stream, np.full(n_blocks, bos)),
        documents=tuple(names),
        document=cut(document, first_document),
        offset=cut(offset, np.full(n_blocks, -1)),
        bos=bos,
    )


def name_fraction(name: str) -> float:
    """A fixed number in [0, 1) for a name: the first 64 bits of its SHA-256 as a fraction of 2^64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_held_out(name: str) -> bool:
    """Whether training never sees the document of this name: `name_fraction` below 0.4."""
    return name_fraction(name) < HELD_OUT


def _in_split(documents: Iterable[Document], split: Split) -> Iterator[Document]:
    for document in documents:
        if split == "all" or is_held_out(document.name) == (split == "heldout"):
            yield document


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def read_documents(source: str) -> Iterator[Document]:
    """Yield the documents of `python`, a text file, or a folder of text files.

    Raises:
        CorpusError: the source does not exist or is not UTF-8.
    """
    if source == "python":
        yield from python_documents()
        return
    path = Path(source)
    if path.is_file():
        yield from _file_documents(path, path.name)
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        for file in files:
            yield from _file_documents(file, file.relative_to(path).as_posix())
    else:
        raise CorpusError(
            f"no corpus {source!r}",
            expected="'python', a UTF-8 text file, or a folder of them",
            do="check the path given to --corpus",
        )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_documents(path: Path, name: str) -> Iterator[Document]:
    texts = _read_utf8(path).split(SEPARATOR)
    for i, text in enumerate(texts):
        own_name = name if len(texts) == 1 else f"{name}:{i}"
        sections = list(_sections(text))
        for j, section in enumerate(sections):
            if section.strip():
                yield Document(own_name if len(sections) == 1 else f"{own_name}#{j}", section)


def _sections(text: str) -> Iterator[str]:
    """Cut a long text at line ends; a text of ordinary length stays whole."""
    if len(text) <= _SECTION:
        yield text
        return
    start = 0
    while start < len(text):
        end = text.find("\n", start + _SECTION)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 (byte {error.start})",
            expected="UTF-8 text",
            do="convert it, or leave it out of the folder",
        ) from error
    except OSError as error:
        raise CorpusError(
            f"cannot read {path}: {error.strerror}", expected="a readable text file", do="check its permissions"
        ) from error


def python_documents() -> Iterator[Document]:
    """The standard library of the running interpreter, one document a module, named by its dotted name.

    Left out: tests, idlelib, lib2to3, encodings, vendored copies, and generated data.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _NOT_PYTHON_PROSE & set(parts) or parts[0].startswith("_sysconfigdata"):
            continue
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = _read_utf8(path)
        if text.strip():
            yield Document(dotted, text)
