"""The vocabulary of an index: the bytes of each token, and the tokens of a text. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from headscope.errors import IndexFormatError, ModelError
from headscope.index.reading import read_own, reading
from headscope.index.schema import Sizes
from headscope.tokens import Spelling, encode, unknown_id


class TokenTexts:
    """The vocabulary table of an index, read on first use.

    Earlier versions treated every tokenizer as GPT-2's kind. Their indexes lack the column `byte_token`, and their
    tokens' bytes are recomputed from their tokenizer.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], sizes: Sizes) -> None:
        """Open the table; it is only read for an earlier index.

        Raises:
            IndexFormatError: it is an earlier index whose tokenizer cannot be read.
            ValueError: the manifest's spelling is invalid.
        """
        self._path, self._sizes = folder / "vocabulary.parquet", sizes
        self.respelled: dict[str, pa.Table] = {}
        """The recomputed table by its name, where it differs from the file."""
        said = manifest.get("spelling", {})
        self._tokenizer = folder / "tokenizer.json"
        if "byte_token" not in pq.read_schema(self._path).names:
            spelling = _spelling_of(self._tokenizer)
            special = read_own(self._path, sizes)["special"].to_pylist()
            self.respelled, said = {"vocabulary": vocabulary_table(spelling, special)}, described(spelling)
        if not isinstance(said, dict):
            raise ValueError(f"manifest.json says spelling = {str(said)[:50]!r}")
        self._said = said
        self.prefix = str(said.get("prefix", "")).encode()
        """Prefix that the tokenizer puts before a text, a space or nothing: the first token of a document starts with
        it."""

    @cached_property
    def segments(self) -> tuple[int | None, bool]:
        """Return the token for text that cannot be spelled, and whether the prefix also follows other special tokens.

        Raises:
            IndexFormatError: it is an earlier index, which lacks these, and its tokenizer cannot be read.
        """
        said = self._said
        if self.prefix and "repeats" not in said:
            said = described(_spelling_of(self._tokenizer))
        return said.get("unknown"), bool(said.get("repeats", False))

    @cached_property
    def vocabulary(self) -> tuple[list[bytes], list[int]]:
        """Return each token's bytes, and the ids of the special tokens."""
        return self._table["bytes"].to_pylist(), np.flatnonzero(self._table["special"].to_numpy()).tolist()

    @cached_property
    def byte_tokens(self) -> list[int]:
        """Return the tokens for single bytes that no other token spells, such as `<0x0A>` of SentencePiece."""
        return np.flatnonzero(self._table["byte_token"].to_numpy()).tolist()

    def token_id(self, text: str) -> int:
        """Return the token with exactly this text, including a leading space, or the special token of this name.

        Raises:
            IndexFormatError: there is none.
        """
        content, (tokens, special) = text.encode(errors="surrogatepass"), self.vocabulary
        named = self._ids.get(content) or [i for i in special if content and tokens[i] == content]
        if not named:
            raise IndexFormatError(
                f"{text!r} is not one token", expected="the text of a token", do="try it with a leading space"
            )
        return named[0]

    def pieces(self, text: str) -> list[str]:
        """Return the tokens of a text, by their own texts.

        Raises:
            IndexFormatError: the tokenizer cannot be read, or has tokens missing in the index.
        """
        ids, (tokens, _) = encode(_tokenizer_of(self._tokenizer), [text])[0], self.vocabulary
        if ids and max(ids) >= len(tokens):
            raise IndexFormatError(
                f"{self._tokenizer} has the token {max(ids)}",
                expected=f"the tokenizer of the index, whose vocabulary has {len(tokens)} tokens",
                do="build the index again",
            )
        return [tokens[i].decode(errors="replace") for i in ids]

    @cached_property
    def _table(self) -> pa.Table:
        if self.respelled:
            return self.respelled["vocabulary"]
        with reading(self._path):
            return read_own(self._path, self._sizes)

    @cached_property
    def _ids(self) -> dict[bytes, tuple[int, ...]]:
        return ids_by_bytes(*self.vocabulary, self.byte_tokens)


def _spelling_of(path: Path) -> Spelling:
    try:
        return Spelling.of(_tokenizer_of(path))
    except ModelError as error:
        raise IndexFormatError(f"{path}: {error.got}", expected=error.expected, do="build the index again") from error


def _tokenizer_of(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise IndexFormatError(
            f"{path} cannot be read: {error}", expected="the tokenizer of the index", do="build the index again"
        ) from error


def vocabulary_table(spelling: Spelling, special: Sequence[bool]) -> pa.Table:
    """Make one row per token of the model; `special` marks the special ones."""
    n = len(special)
    byte_tokens = set(spelling.byte_tokens(n))
    return pa.table(
        {
            "token": pa.array(range(n), pa.int32()),
            "bytes": pa.array(spelling.table({i for i in range(n) if special[i]}, n), pa.binary()),
            "special": pa.array(special, pa.bool_()),
            "byte_token": [i in byte_tokens for i in range(n)],
        }
    )


def described(spelling: Spelling) -> dict[str, Any]:
    """Return the manifest's entry for a spelling."""
    around = {"prefix": spelling.prefix.decode(), "suffix": spelling.suffix.decode()}
    return around | {
        "repeats": spelling.repeats,
        "loses": spelling.loses,
        "unknown": unknown_id(spelling.tokenizer),
    }


def ids_by_bytes(
    tokens: Sequence[bytes], special: Iterable[int], byte_tokens: Iterable[int]
) -> dict[bytes, tuple[int, ...]]:
    """Map bytes to the tokens with exactly these bytes, without special ones.

    A byte token (`<0x61>`) comes last: where another token has the same bytes, a tokenizer prefers that one.
    """
    left_out, last = set(special), set(byte_tokens)
    found: dict[bytes, tuple[int, ...]] = {}
    for i in sorted(range(len(tokens)), key=lambda i: (i in last, i)):
        if tokens[i] and i not in left_out:
            found[tokens[i]] = (*found.get(tokens[i], ()), i)
    return found
