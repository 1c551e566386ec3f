"""Convert text or token ids to token blocks; every token has its document and its offset in it.

`python` (the default), text, JSONL, Parquet and `.npy` files, saved datasets and datasets on the hub are lists of
documents (`sources`, `text`, `rows`). They are tokenised once (`load`, `cache`) and packed into blocks of equal length
(`blocks`). Documents are held out by a SHA-256, of their name or, for rows, of their content, so that a document is on
the same side of the split on every machine.
"""

from headscope.corpus.blocks import BLOCK_BOS, NOT_TEXT, PADDING, Corpus
from headscope.corpus.load import load_corpus, read_documents
from headscope.corpus.reading import (
    HELD_OUT,
    Reading,
    Split,
    check_block_size,
    check_one_block,
    is_held_out,
    name_fraction,
)
from headscope.corpus.text import SEPARATOR, Document, python_documents
from headscope.tokens import encode, special_ids

__all__ = [
    "BLOCK_BOS",
    "HELD_OUT",
    "NOT_TEXT",
    "PADDING",
    "SEPARATOR",
    "Corpus",
    "Document",
    "Reading",
    "Split",
    "check_block_size",
    "check_one_block",
    "encode",
    "is_held_out",
    "load_corpus",
    "name_fraction",
    "python_documents",
    "read_documents",
    "special_ids",
]
