"""Read, tokenise and pack a corpus."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from headscope.corpus.blocks import Corpus, Layout, Stream, pack
from headscope.corpus.cache import Writer, cached
from headscope.corpus.files import readable
from headscope.corpus.reading import Reading, Split, check_one_block, is_held_out
from headscope.corpus.rows import TokenDocument
from headscope.corpus.sources import Source, find_source
from headscope.corpus.text import Document
from headscope.corpus.told import Told, warn_of
from headscope.errors import CorpusError
from headscope.limits import BlockSize, Tokens, check
from headscope.tokens import encode, own_tokenizer, special_ids

_GROUP = 64  # documents tokenised at a time, with a thread per core and without handling Ctrl-C
_PATIENCE = 1.0  # seconds before progress is reported

OnTokens = Callable[[int, int | None], None]
"""Progress callback: called with the tokens so far and, where known, the approximate total."""


def load_corpus(
    source: str,
    tokenizer: Tokenizer,
    *,
    bos: int,
    split: Split = "train",
    block_size: int = 256,
    max_tokens: int | None = None,
    reading: Reading | None = None,
    on_tokens: OnTokens | None = None,
) -> Corpus:
    """Read, tokenise and pack a corpus; text that was tokenised before comes from the cache.

    Args:
        source: `python` (the standard library of the running interpreter); a file, a folder or a pattern of files:
            UTF-8 text, `.jsonl`, `.parquet`, `.npy`; a folder that `datasets` saved, or a copy of a dataset's
            repository; or a dataset on the hub.
        tokenizer: used as by `own_tokenizer`: every text whole, and `<|bos|>` in a document is seven characters.
        bos: token id of the BOS.
        split: documents to take: those for training, those held out, or all.
        block_size: positions in a block, BOS included.
        max_tokens: maximum number of positions (rounded down to whole blocks).
        reading: other reading options.
        on_tokens: called while tokenising, after the first second.

    Raises:
        CorpusError: the source does not exist, has a wrong format, is empty, or is shorter than one block.
        OutputError: the cache or the blocks of a large corpus do not fit the disk.
    """
    check("block_size", block_size, BlockSize, CorpusError)
    check("max_tokens", max_tokens, Tokens | None, CorpusError)
    check_one_block(max_tokens, block_size)
    reading, tokenizer = reading or Reading(), own_tokenizer(tokenizer)
    enough = None if max_tokens is None else max_tokens + block_size
    stream, folder = _tokenised(source, tokenizer, bos, split, reading, enough, on_tokens)
    if not stream.names:
        raise CorpusError(
            f"no documents in {source!r} (split {split!r})",
            expected="text with at least one document on this side of the split",
            do=f"add text, separate documents with a line {reading.document_line}, or use --split all",
        )
    warn_of(stream.told, len(stream.names), source)
    layout = Layout(
        block_size=block_size,
        bos=bos,
        packing=reading.packing or ("rows" if stream.rows else "packed"),
        bos_at=reading.bos_at or ("nowhere" if stream.rows else "both"),
        separator=_separator(tokenizer, reading.separator),
    )
    said = reading.as_dict() | {"packing": layout.packing, "bos_at": layout.bos_at}
    special = special_ids(tokenizer, bos)
    return pack(readable(source), split, stream, layout, max_tokens, scratch=folder, special=special, reading=said)


def read_documents(source: str, reading: Reading | None = None) -> Iterator[Document | TokenDocument]:
    """Yield the documents of a source, in order.

    Raises:
        CorpusError: the source does not exist or has a wrong format.
    """
    return find_source(source, reading or Reading(), bos=0).documents()


def _separator(tokenizer: Tokenizer, token: str | None) -> int | None:
    if token is None:
        return None
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CorpusError(
            f"separator {token!r}", expected="a token of the vocabulary, such as <|endoftext|>", do="change --separator"
        )
    return found


def _tokenised(
    name: str,
    tokenizer: Tokenizer,
    bos: int,
    split: Split,
    reading: Reading,
    enough: int | None,
    on_tokens: OnTokens | None,
) -> tuple[Stream, Path]:
    """Return token ids of documents on one side of the split, all or sufficiently many, and a folder for more."""
    source = find_source(name, reading, bos)
    state = source.state()
    chosen = reading.as_dict()
    for later in ("packing", "bos_at", "separator"):
        del chosen[later]
    identity = {
        "source": state,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "tokenizers": tokenizers.__version__,
        "bos": bos,
        "split": split,
        "reading": chosen,
    }

    def write(writer: Writer) -> tuple[bool, bool]:
        found = _write(writer, source, tokenizer, bos, split, reading, enough, on_tokens)
        if source.state() != state:
            raise CorpusError(
                f"{name!r} was changed while it was read", expected="files that stay as they are", do="try again"
            )
        return found

    return cached(identity, enough, write)


def _write(
    writer: Writer,
    source: Source,
    tokenizer: Tokenizer,
    bos: int,
    split: Split,
    reading: Reading,
    enough: int | None,
    on_tokens: OnTokens | None,
) -> tuple[bool, bool]:
    """Tokenise until there is enough; return (whether that is all, whether the documents are rows of token files)."""
    documents = _in_split(source.documents(), split)
    if reading.shuffle:
        documents = _shuffled(documents, reading.shuffle, reading.shuffle_seed)
    kinds: set[type] = set()
    beside: set[frozenset[str]] = set()
    rows, started = False, time.monotonic()
    special, told = special_ids(tokenizer, bos), Told(tokenizer, bos)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    for group in _groups(documents, _GROUP):
        _check_marked(group, special)
        _check_known(group, largest)
        kinds |= {type(document) for document in group}
        if len(kinds) > 1:
            raise CorpusError(
                f"text and token ids in one corpus ({group[0].name})", expected="one or the other", do="part the files"
            )
        beside |= {document.beside for document in group if isinstance(document, TokenDocument)}
        if len(beside) > 1:
            some = sorted(frozenset.union(*beside) - frozenset.intersection(*beside))
            raise CorpusError(
                f"{some[0]} beside the token ids of some rows, and none beside others (up to {group[-1].name})",
                expected="the same columns in all files and rows of a corpus",
                do=f"add {some[0]} to all of them, or read the files one by one",
            )
        for document, ids in zip(group, _ids(tokenizer, group), strict=True):
            rows = rows or (isinstance(document, TokenDocument) and document.is_row)
            writer.add(document.name, ids)
            told.add(document, ids)
        writer.told = told.counts()
        if on_tokens is not None and time.monotonic() - started > _PATIENCE:
            on_tokens(writer.n_tokens, enough)
        if enough is not None and writer.n_tokens >= enough:
            return False, rows
    return True, rows


def _check_marked(documents: list[Document | TokenDocument], special: frozenset[int]) -> None:
    """Raise CorpusError where a row marks a token as special that is text for the tokenizer."""
    for document in documents:
        marked = document.marked - special if isinstance(document, TokenDocument) else None
        if marked:
            raise CorpusError(
                f"{document.name} marks the token ids {sorted(marked)[:5]} in its special_tokens_mask",
                expected="tokens that the model's tokenizer has as special, which all statistics leave out",
                do="add them to the tokenizer as special tokens, or leave the column out",
            )


def _check_known(documents: list[Document | TokenDocument], largest: int) -> None:
    """Raise CorpusError if a row has a token id outside the tokenizer's vocabulary."""
    for document in documents:
        if isinstance(document, TokenDocument) and len(document.ids) and int(document.ids.max()) > largest:
            raise CorpusError(
                f"{document.name} has the token id {int(document.ids.max()):,}",
                expected=f"at most {largest:,}, the last id of the model's tokenizer",
                do="tokenise the text with that tokenizer, or load the model with a tokenizer that has this token",
            )


def _ids(tokenizer: Tokenizer, documents: list[Document | TokenDocument]) -> list[np.ndarray]:
    made = [document.ids for document in documents if isinstance(document, TokenDocument)]
    if made:
        return made
    texts = [document.text for document in documents if isinstance(document, Document)]
    return [np.array(ids, dtype=np.int32) for ids in encode(tokenizer, texts)]


def _in_split(documents: Iterable[Document | TokenDocument], split: Split) -> Iterator[Document | TokenDocument]:
    for document in documents:
        if split == "all" or is_held_out(document.key or document.name) == (split == "heldout"):
            yield document


def _shuffled(
    documents: Iterable[Document | TokenDocument], size: int, seed: int
) -> Iterator[Document | TokenDocument]:
    """Shuffle with a buffer of `size` documents, refilled from the source."""
    rng = np.random.default_rng(seed)
    buffer: list[Document | TokenDocument] = []
    for document in documents:
        if len(buffer) < size:
            buffer.append(document)
            continue
        at = int(rng.integers(size))
        yield buffer[at]
        buffer[at] = document
    for at in rng.permutation(len(buffer)):
        yield buffer[at]


def _groups(documents: Iterable[Document | TokenDocument], size: int) -> Iterator[list[Document | TokenDocument]]:
    group: list[Document | TokenDocument] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
