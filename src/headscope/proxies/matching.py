"""Regular expressions over token blocks, by RE2 (in Arrow): time grows linearly with the text, whatever the pattern."""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from headscope.errors import ProxyError
from headscope.proxies.blocks import Blocks

MAX_PATTERN = 1_000
"""Maximum number of characters of a pattern."""
SECONDS = 10.0
"""Time limit of a search: a pattern of many counted repetitions can be slow, though never exponential."""

_BATCH = 1 << 16  # tokens between two checks of the time limit
_BEGIN, _END, _INVALID = b"\xfe", b"\xff", 0xF8  # bytes that do not occur in UTF-8


def check_pattern(pattern: str) -> None:
    """Reject patterns that RE2 does not support.

    Raises:
        ProxyError: a syntax error, a backreference or lookaround (RE2 has none), or too long.
    """
    if len(pattern) > MAX_PATTERN:
        raise ProxyError(
            f"a pattern of {len(pattern)} characters",
            expected=f"at most {MAX_PATTERN}",
            do="shorten it, or join two by |",
        )
    try:
        matches(pattern, [""])
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        raise ProxyError(
            f"{pattern!r}: {error}",
            expected="a regular expression in RE2's syntax: no backreferences, no lookaround",
            do="see https://github.com/google/re2/wiki/Syntax",
        ) from error


def matches(pattern: str, texts: Sequence[str]) -> Bool[np.ndarray, " text"]:
    """Return for each text whether a checked pattern (`check_pattern`) matches anywhere in it."""
    array = pa.array(texts, pa.large_string())
    found = pc.call_function("match_substring_regex", [array], pc.MatchSubstringOptions(pattern))
    return found.to_numpy(zero_copy_only=False)


def match_tokens(pattern: str, blocks: Blocks) -> Bool[np.ndarray, "block position"]:
    """Mark tokens whose bytes overlap a match, searched between special tokens, block by block.

    Raises:
        ProxyError: it exceeded `SECONDS`.
    """
    n_blocks, size = blocks.tokens.shape
    step = max(1, _BATCH // size)
    found = np.zeros((n_blocks, size), dtype=bool)
    start = time.monotonic()
    for first in range(0, n_blocks, step):
        part = slice(first, first + step)
        found[part] = _match(pattern, blocks, part)
        if time.monotonic() - start > SECONDS:
            raise ProxyError(
                f"regex {pattern!r} was not done after {SECONDS:g} s",
                expected="a pattern that is quick to search",
                do="leave out large counted repetitions such as {1,200}",
            )
    return found


def _match(pattern: str, blocks: Blocks, part: slice) -> Bool[np.ndarray, "block position"]:
    tokens, text = blocks.tokens[part], blocks.text[part]
    row = tokens.astype(np.int64)
    if blocks.starts is not None:
        row[blocks.starts[part]] += len(blocks.vocabulary.tokens)
    pieces = blocks.vocabulary.texts.take(pa.array(row.ravel()))
    ends = np.frombuffer(pieces.buffers()[1], np.int64)[: tokens.size + 1]  # end of each token, after a 0
    raw = pieces.buffers()[2]
    data = np.frombuffer(raw, np.uint8).copy() if raw is not None and raw.size else np.zeros(0, np.uint8)
    data[(data == _BEGIN[0]) | (data == _END[0])] = _INVALID  # these match nothing either
    begins = text.copy()  # starts of segments: the first text token of a block or after a special one
    begins[:, 1:] &= ~text[:, :-1]
    bounds = np.concatenate([ends[:-1][begins.ravel()], ends[-1:]])
    low, high = _spans(pattern, data, bounds)
    # a token overlaps [low, high) if it ends after low and starts before high
    change = np.zeros(tokens.size + 1, dtype=np.int64)
    np.add.at(change, np.searchsorted(ends[1:], low, side="right"), 1)
    np.add.at(change, np.searchsorted(ends[:-1], high, side="left"), -1)
    overlaps = np.cumsum(change[:-1]) > 0
    return (overlaps & (np.diff(ends) > 0)).reshape(tokens.shape)


def _spans(
    pattern: str, data: np.ndarray, bounds: Int[np.ndarray, " bound"]
) -> tuple[Int[np.ndarray, " match"], Int[np.ndarray, " match"]]:
    """Return start and end of non-empty matches in `data`, in which each piece between two bounds is a separate text.

    Arrow replaces matches but does not report their positions, so each is put between two marker bytes that no text
    has.
    """
    if len(bounds) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    texts = pa.LargeStringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(data))
    options = pc.ReplaceSubstringOptions(pattern, _BEGIN + rb"\0" + _END)
    marked = pc.call_function("replace_substring_regex", [texts], options)
    shown = np.frombuffer(marked.buffers()[2], np.uint8) if marked.buffers()[2] is not None else data[:0]
    low, high = np.flatnonzero(shown == _BEGIN[0]), np.flatnonzero(shown == _END[0])
    before = np.arange(len(low))
    low, high = low - 2 * before, high - 2 * before - 1  # the markers themselves take a byte each
    return low[high > low], high[high > low]
