"""Warnings about a corpus: text that its tokens do not spell exactly, and rows that look padded."""

import warnings
from collections import Counter
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from headscope.corpus.padding import LAYOUT
from headscope.corpus.rows import TokenDocument
from headscope.corpus.text import Document
from headscope.tokens import MARK, Spelling, reads_as_space, special_ids

_RUN = 3  # equal tokens at an end of a row
_SHARE = 0.25  # of the rows that end so, with the same token: text does that less often


class Told:
    """Counts the documents to warn of, as they are tokenised."""

    def __init__(self, tokenizer: Tokenizer, bos: int) -> None:
        """Start with no document.

        Raises:
            ModelError: the bytes of the tokenizer's tokens cannot be read.
        """
        spelling = Spelling.of(tokenizer)
        self._spelling = None if spelling.loses is not None else spelling  # otherwise load_model warns
        self._special = special_ids(tokenizer, bos)
        self._reads_mark = reads_as_space(tokenizer, MARK)
        self._counts: Counter[str] = Counter()
        self._ends: Counter[tuple[str, int]] = Counter()

    def add(self, document: Document | TokenDocument, ids: Int[np.ndarray, " token"]) -> None:
        """Count a document, given its token ids."""
        if isinstance(document, Document):
            self._add_text(document.text, ids)
        elif document.is_row and not document.beside & LAYOUT:
            self._add_row(ids)

    def _add_text(self, text: str, ids: Int[np.ndarray, " token"]) -> None:
        marked = self._reads_mark and MARK in text
        special = bool(np.isin(ids, sorted(self._special)).any())
        self._counts["marked"] += marked
        self._counts["special"] += special
        if self._spelling is not None and not marked and not special:
            self._counts["changed"] += not self._spelling.keeps(ids.tolist(), text)

    def _add_row(self, ids: Int[np.ndarray, " token"]) -> None:
        self._counts["rows"] += 1
        if len(ids) <= _RUN:
            return
        if (ids[:_RUN] == ids[0]).all():
            self._ends["begin", int(ids[0])] += 1
        if (ids[-_RUN:] == ids[-1]).all() and int(ids[-1]) not in self._special:
            self._ends["end", int(ids[-1])] += 1

    def counts(self) -> dict[str, int]:
        """Return the number of documents for each warning of `warn_of`."""
        padded = [n for _, n in self._ends.most_common(1) if n > 1 and n >= _SHARE * self._counts["rows"]]
        return {name: self._counts[name] for name in ("marked", "special", "changed")} | {"padded": sum(padded)}


def warn_of(counts: Mapping[str, int], n_documents: int, source: str) -> None:
    """Issue a warning for each count that is not 0."""
    said = {
        "marked": f"hold {MARK!r}, which this tokenizer reads as a space: what is shown and searched has a space there",
        "special": "hold text that the tokenizer encodes as special tokens or as its unknown token: these are excluded "
        "from all statistics",
        "changed": "are changed by the tokenizer, which replaces or drops a part of their text: what is shown and "
        "searched is the text decoded from the tokens",
        "padded": "begin or end with one token repeated, like padding, and have no attention_mask, so all of it is "
        "counted as text; add the mask, or remove the padding",
    }
    for name, what in said.items():
        if counts[name]:
            warnings.warn(f"{counts[name]:,} of {n_documents:,} documents in {source!r} {what}", stacklevel=3)
