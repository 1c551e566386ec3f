"""Input of a proxy: token blocks, their documents, and the vocabulary. No torch, no model.

A block is one input of the model: nothing before its first token is visible, but earlier documents packed into the same
block are, since attention reaches them too. A token has the text of its bytes; a special token has none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from headscope.errors import ProxyError
from headscope.index.token_texts import ids_by_bytes

Token = str | int
"""A token by its text, leading space included, or by its id."""

PUNCTUATION = ".,;:!?\n\r"
"""Characters that make a token without letters and digits a stop."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a tokenizer by id."""

    tokens: Sequence[bytes]
    special: frozenset[int]
    """Ids without a text."""
    split: Callable[[str], list[str]]
    """Splits a text into the tokenizer's pieces, for error messages about a text that is not a token."""
    byte_tokens: frozenset[int] = frozenset()
    """Ids for single bytes that no other token spells."""
    prefix: bytes = b""
    """Prefix that the tokenizer puts before a text: the first token of a text starts with it."""

    def ids(self, tokens: Iterable[Token]) -> Int[np.ndarray, " id"]:
        """Return all matching ids: those with exactly the bytes of a text (rarely more than one), or the given ones.

        Raises:
            ProxyError: a text is several tokens (the error names them), or there is no such id.
        """
        return np.array([i for token in tokens for i in self._of(token)], dtype=np.int64)

    def table(self, tokens: Iterable[Token]) -> Bool[np.ndarray, " vocabulary"]:
        """Mark the matching ids; errors as in `ids`."""
        table = np.zeros(len(self.tokens), dtype=bool)
        table[self.ids(tokens)] = True
        return table

    def name(self, token: int) -> Token:
        """Return the text of an id if it is unique (apart from a byte token, which is then never used), else the id."""
        text, named = _decoded(self.tokens[token]), self._by_bytes.get(self.tokens[token], ())
        alone = named[:1] == (token,) and self.byte_tokens.issuperset(named[1:])
        return token if text is None or not alone else text

    @cached_property
    def stops(self) -> Bool[np.ndarray, " vocabulary"]:
        """The tokens with a character of `PUNCTUATION` and no letter or digit; and special tokens."""
        return np.array([i in self.special or _is_stop(t) for i, t in enumerate(self.tokens)])

    @cached_property
    def variants(self) -> Int[np.ndarray, "edit vocabulary"]:
        """Return each id under single edits of its text: itself, with a space, stripped, capitalised, lower case.

        An edit that does not give a token leaves the id unchanged. Edits are not composed.
        """
        edits: list[Callable[[str], str]] = [" {}".format, str.strip, str.capitalize, str.lower]
        table = np.tile(np.arange(len(self.tokens), dtype=np.int64), (1 + len(edits), 1))
        for i, token in enumerate(self.tokens):
            text = None if i in self.special else _decoded(token)
            if text is not None:
                for row, edit in zip(table[1:], edits, strict=True):
                    row[i] = self._by_bytes.get(edit(text).encode(), (i,))[0]
        return table

    @cached_property
    def texts(self) -> pa.Array:
        """The bytes of each token, none for special ones; then the same at the start of a text, without the prefix."""
        inside = [b"" if i in self.special else t for i, t in enumerate(self.tokens)]
        return pa.array([*inside, *(t.removeprefix(self.prefix) for t in inside)], pa.large_binary())

    @cached_property
    def _by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        return ids_by_bytes(self.tokens, self.special, self.byte_tokens)

    def _of(self, token: Token) -> tuple[int, ...]:
        if isinstance(token, int):
            if 0 <= token < len(self.tokens):
                return (token,)
            raise ProxyError(f"token #{token}", expected=f"#0 to #{len(self.tokens) - 1}", do="name another token")
        found = self._by_bytes.get(token.encode())
        if found is not None:
            return found
        pieces = self.split(token)
        raise ProxyError(
            f"{token!r} is no token but {len(pieces)} pieces: {', '.join(map(repr, pieces[:20]))}",
            expected="the text of one token, leading space included, or an id as #123",
            do="name one of the pieces, try it with a leading space, or match text with regex(...)",
        )


def _decoded(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _is_stop(token: bytes) -> bool:
    text = token.decode(errors="replace")
    return any(c in PUNCTUATION for c in text) and not any(c.isalnum() for c in text)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Some blocks of a corpus."""

    tokens: Int[np.ndarray, "block position"]
    document: Int[np.ndarray, "block position"]
    """Index into `documents`."""
    text: Bool[np.ndarray, "block position"]
    """False at special tokens, where no proxy is true."""
    vocabulary: Vocabulary
    documents: Sequence[str]
    """Names of the documents of the corpus."""
    starts: Bool[np.ndarray, "block position"] | None = None
    """Where a text starts; nowhere if None."""

    @cached_property
    def stopped(self) -> Int[np.ndarray, "block position"]:
        """The last stop of the vocabulary, or special token, up to each position of a block; -1 if there is none."""
        return self.last(self.vocabulary.stops)

    def last(self, stops: Bool[np.ndarray, " vocabulary"]) -> Int[np.ndarray, "block position"]:
        """Return the last of some tokens, or of special ones, up to each position of a block; -1 if there is none."""
        is_stop = stops[self.tokens] | ~self.text
        positions = np.where(is_stop, np.arange(self.tokens.shape[1], dtype=np.int32), np.int32(-1))
        return np.maximum.accumulate(positions, axis=1)
