"""The families of proxies: induction, contexts after given tokens, the tokens themselves, text, documents."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from headscope.errors import ProxyError
from headscope.proxies.algebra import Proxy, moved, quoted, token_name
from headscope.proxies.blocks import Blocks, Token
from headscope.proxies.matching import check_pattern, match_tokens, matches

Stop = Literal["punctuation"] | tuple[Token, ...]

_PART = 1 << 15  # positions processed together where tables grow with their tokens


@dataclass(frozen=True)
class Induction(Proxy):
    """See `induction_of`."""

    token: Token
    fuzzy: bool = False

    def __post_init__(self) -> None:
        """Check the token."""
        _check_tokens((self.token,))

    @property
    def name(self) -> str:
        """`induction("board")`, `induction("board", fuzzy=True)`."""
        return f"induction({token_name(self.token)}{', fuzzy=True' if self.fuzzy else ''})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        vocabulary, (n_blocks, size) = blocks.vocabulary, blocks.tokens.shape
        is_target = vocabulary.table([self.token])
        variants = vocabulary.variants if self.fuzzy else vocabulary.variants[:1]
        found = np.zeros((n_blocks, size), dtype=bool)
        rows = np.flatnonzero(is_target[blocks.tokens].any(1))
        step = max(1, _PART // size)
        for part in (rows[i : i + step] for i in range(0, len(rows), step)):
            found[part] = _follows(blocks.tokens[part], is_target, variants)
        return found


@dataclass(frozen=True)
class WithinAfter(Proxy):
    """See `within_after`."""

    tokens: tuple[Token, ...]
    n: int = 10
    stop: Stop = "punctuation"

    def __post_init__(self) -> None:
        """Check, and sort the tokens."""
        _set_tokens(self)
        _at_least_one("n", self.n)
        if self.stop != "punctuation":
            _check_tokens(self.stop)
            object.__setattr__(self, "stop", _ordered(self.stop))

    @property
    def name(self) -> str:
        """`within_after(["Which"], n=10)`, `within_after(["Which"], n=10, stop=["."])`."""
        stop = "" if self.stop == "punctuation" else f", stop={_list(self.stop)}"
        return f"within_after({_list(self.tokens)}, n={self.n}{stop})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        size = blocks.tokens.shape[1]
        is_trigger = blocks.vocabulary.table(self.tokens)
        if self.stop == "punctuation":
            stopped = blocks.stopped.ravel()
        else:
            stopped = blocks.last(blocks.vocabulary.table(self.stop)).ravel()
        found = np.zeros(blocks.tokens.size, dtype=bool)
        trigger = np.flatnonzero(is_trigger[blocks.tokens])
        position = (trigger % size).astype(np.int32)
        for step in range(1, min(self.n, size - 1) + 1):  # a stop ends the context
            open_ = position < size - step
            open_[open_] = stopped[trigger[open_] + step] <= position[open_]
            trigger, position = trigger[open_], position[open_]
            found[trigger + step] = True
        return found.reshape(-1, size)


@dataclass(frozen=True)
class AfterAny(Proxy):
    """See `after_any`."""

    tokens: tuple[Token, ...]

    def __post_init__(self) -> None:
        """Check, and sort the tokens."""
        _set_tokens(self)

    @property
    def name(self) -> str:
        """`after_any(["cat", "dog"])`."""
        return f"after_any({_list(self.tokens)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        is_there = blocks.vocabulary.table(self.tokens)[blocks.tokens]
        first = np.where(is_there.any(1), is_there.argmax(1), is_there.shape[1])
        return np.arange(is_there.shape[1]) > first[:, None]


@dataclass(frozen=True)
class TokenIn(Proxy):
    """See `token_in`."""

    tokens: tuple[Token, ...]

    def __post_init__(self) -> None:
        """Check, and sort the tokens."""
        _set_tokens(self)

    @property
    def name(self) -> str:
        """`token_in([","])`."""
        return f"token_in({_list(self.tokens)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return blocks.vocabulary.table(self.tokens)[blocks.tokens]


@dataclass(frozen=True)
class NextTokenIn(Proxy):
    """See `next_token_in`."""

    tokens: tuple[Token, ...]

    def __post_init__(self) -> None:
        """Check, and sort the tokens."""
        _set_tokens(self)

    @property
    def name(self) -> str:
        """`next_token_in(["board"])`."""
        return f"next_token_in({_list(self.tokens)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return moved(blocks.vocabulary.table(self.tokens)[blocks.tokens], -1)


@dataclass(frozen=True)
class Bigram(Proxy):
    """See `bigram`."""

    previous: Token
    token: Token

    def __post_init__(self) -> None:
        """Check the tokens."""
        _check_tokens((self.previous, self.token))

    @property
    def name(self) -> str:
        """`bigram("self", ".")`."""
        return f"bigram({token_name(self.previous)}, {token_name(self.token)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        previous, present = (blocks.vocabulary.table([t])[blocks.tokens] for t in (self.previous, self.token))
        return moved(previous, 1) & present


@dataclass(frozen=True)
class InRepeat(Proxy):
    """See `in_repeat`."""

    k: int

    def __post_init__(self) -> None:
        """Check k."""
        _at_least_one("k", self.k)

    @property
    def name(self) -> str:
        """`in_repeat(3)`."""
        return f"in_repeat({self.k})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        n_blocks, size = blocks.tokens.shape
        found = np.zeros((n_blocks, size), dtype=bool)
        if self.k < size:
            number, length = _numbered(blocks.tokens), 1  # of the run of `length` tokens that starts at each position
            while length < self.k:  # a run is the union of two shorter ones that may overlap
                step = min(length, self.k - length)
                number = _numbered(number[:, :-step] << _bits(size) | number[:, step:])
                length += step
            found[:, self.k - 1 :] = number != np.arange(number.shape[1])
        return found


@dataclass(frozen=True)
class Regex(Proxy):
    """See `regex`."""

    pattern: str

    def __post_init__(self) -> None:
        """Check the pattern."""
        check_pattern(self.pattern)

    @property
    def name(self) -> str:
        r"""`regex("def \\w+")`."""
        return f"regex({quoted(self.pattern)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return match_tokens(self.pattern, blocks)


@dataclass(frozen=True)
class Document(Proxy):
    """See `document`."""

    glob: str

    def __post_init__(self) -> None:
        """Check the pattern."""
        _check_text(self.glob)

    @property
    def name(self) -> str:
        """`document("json.*")`."""
        return f"document({quoted(self.glob)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        wild = {"*": ".*", "?": "."}
        pattern = "".join(wild.get(c, f"\\x{{{ord(c):x}}}") for c in self.glob)
        return _of_documents(f"(?s)^(?:{pattern})$", blocks)


@dataclass(frozen=True)
class DocumentRegex(Proxy):
    """See `document_regex`."""

    pattern: str

    def __post_init__(self) -> None:
        """Check the pattern."""
        check_pattern(self.pattern)

    @property
    def name(self) -> str:
        r"""`document_regex("^json\\.")`."""
        return f"document_regex({quoted(self.pattern)})"

    def _holds(self, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
        return _of_documents(self.pattern, blocks)


# ---------------------------------------------------------------------------------------------------------- by hand
def induction_of(token: Token, *, fuzzy: bool = False) -> Induction:
    """True where induction predicts `token`: at the last A of `... A token ... A`.

    True at t if some earlier t' < t in the block has `tokens[t' + 1] == token` and `tokens[t'] == tokens[t]`; t' + 1
    may be t. `fuzzy`: `tokens[t']` may be any of five single edits of the current token (`Vocabulary.variants`), as
    defined by the post's authors (Kissane et al., 2024).
    """
    return Induction(token, fuzzy)


def within_after(
    tokens: Iterable[Token], n: int = 10, stop: Literal["punctuation"] | Iterable[Token] = "punctuation"
) -> WithinAfter:
    """True where one of `tokens` occurs 1 to n tokens earlier in the block, with no stop in between.

    The token itself does not count (`| token_in(tokens)` adds it). A stop ends the window and is not in it; stops are
    the given tokens, or those with one of `PUNCTUATION` and no letter or digit, and always special tokens: a window
    never leaves its document.
    """
    return WithinAfter(tuple(tokens), n, stop if stop == "punctuation" else tuple(stop))  # pyright: ignore


def after_any(tokens: Iterable[Token]) -> AfterAny:
    """True where one of `tokens` occurs anywhere earlier in the block, in an earlier document of it too."""
    return AfterAny(tuple(tokens))


def token_in(tokens: Iterable[Token]) -> TokenIn:
    """True where the token is one of these."""
    return TokenIn(tuple(tokens))


def next_token_in(tokens: Iterable[Token]) -> NextTokenIn:
    """True where the next token of the block is one of these; false at the last token of a block."""
    return NextTokenIn(tuple(tokens))


def bigram(previous: Token, token: Token) -> Bigram:
    """True where the token is `token` and the previous one in the block is `previous`."""
    return Bigram(previous, token)


def in_repeat(k: int) -> InRepeat:
    """True where this token and the k - 1 before it occurred earlier in the block as a contiguous run.

    The two runs may overlap; special tokens are compared like others.
    """
    return InRepeat(k)


def regex(pattern: str) -> Regex:
    r"""True where the token's text overlaps a match of a regular expression.

    The text between special tokens is searched block by block, so `^` matches the start of a document, or of its part
    in the block. Matches are RE2's (https://github.com/google/re2/wiki/Syntax), leftmost and without overlap; they may
    end after the token. Bytes that are not UTF-8 (a character cut by a block) match nothing.
    """
    return Regex(pattern)


def document(glob: str) -> Document:
    """True where the document's whole name matches: `*` is any text, `?` any character, all else literal."""
    return Document(glob)


def document_regex(pattern: str) -> DocumentRegex:
    """True where a regular expression (RE2's syntax) matches anywhere in the document's name."""
    return DocumentRegex(pattern)


# ----------------------------------------------------------------------------------------------------------- inside
def _follows(
    tokens: Int[np.ndarray, "block position"],
    is_target: Bool[np.ndarray, " vocabulary"],
    variants: Int[np.ndarray, "edit vocabulary"],
) -> Bool[np.ndarray, "block position"]:
    """Mark positions where a variant of the token occurred earlier in the block, followed by the target."""
    block, before = np.nonzero(is_target[tokens[:, 1:]])
    sources, number = np.unique(tokens[block, before], return_inverse=True)
    column = np.full(variants.shape[1], len(sources), dtype=np.int32)  # the last token is not a source: leave it empty
    column[sources] = np.arange(len(sources))
    earliest = np.full((len(tokens), len(sources) + 1), tokens.shape[1], dtype=np.int32)
    np.minimum.at(earliest, (block, number), before)
    found = np.zeros(tokens.shape, dtype=bool)
    for variant in variants:
        found |= np.take_along_axis(earliest, column[variant][tokens], axis=1) < np.arange(tokens.shape[1])
    return found


def _numbered(values: Int[np.ndarray, "block position"]) -> Int[np.ndarray, "block position"]:
    """Return for each value the first position in its block that holds it. Values are from 0 to 2^63 / block size."""
    size = values.shape[1]
    bits = _bits(size)
    keys = values.astype(np.int64) << bits | np.arange(size)
    keys.sort(axis=1)
    position = keys & ((1 << bits) - 1)
    new = np.ones(keys.shape, dtype=bool)
    new[:, 1:] = keys[:, 1:] >> bits != keys[:, :-1] >> bits
    start = np.maximum.accumulate(np.where(new, np.arange(size), 0), axis=1)
    first = np.empty_like(keys)
    np.put_along_axis(first, position, np.take_along_axis(position, start, axis=1), axis=1)
    return first


def _bits(size: int) -> int:
    """Return the number of bits for positions."""
    return max(1, (size - 1).bit_length())


def _of_documents(pattern: str, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
    return matches(pattern, blocks.documents)[blocks.document]


def _set_tokens(proxy: WithinAfter | AfterAny | TokenIn | NextTokenIn) -> None:
    _check_tokens(proxy.tokens)
    if not proxy.tokens:
        raise ProxyError("an empty list of tokens", expected="at least one token", do="name a token")
    object.__setattr__(proxy, "tokens", _ordered(proxy.tokens))


def _ordered(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    """Remove duplicates and sort, texts before ids."""
    return tuple(sorted(set(tokens), key=lambda t: (isinstance(t, int), t)))


def _check_tokens(tokens: tuple[Token, ...]) -> None:
    for token in tokens:
        if isinstance(token, str):
            _check_text(token)
        elif type(token) is not int or token < 0:
            raise ProxyError(f"token {token!r}", expected="a text or an id from 0", do="name a token")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ProxyError(
            f"{text!r} is not text", expected="no lone surrogates", do="name tokens by id: #123"
        ) from error


def _at_least_one(what: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ProxyError(f"{what}={value!r}", expected="a whole number from 1", do=f"raise {what}")


def _list(tokens: tuple[Token, ...]) -> str:
    return f"[{', '.join(map(token_name, tokens))}]"
