"""Proxies written out as loops over tokens: what each means, one position at a time."""

import fnmatch
import re

import numpy as np

from headscope.proxies import And, Blocks, Not, Or, Proxy, Shift
from headscope.proxies.families import (
    AfterAny,
    Bigram,
    Document,
    DocumentRegex,
    Induction,
    InRepeat,
    NextTokenIn,
    Regex,
    TokenIn,
    WithinAfter,
)


def holds(proxy: Proxy, blocks: Blocks) -> np.ndarray:
    """[block, position], by asking of each text token."""
    found = np.zeros(blocks.tokens.shape, dtype=bool)
    for b in range(len(found)):
        for t in range(found.shape[1]):
            found[b, t] = _true(proxy, blocks, b, t)
    return found


def _true(proxy: Proxy, blocks: Blocks, b: int, t: int) -> bool:  # noqa: C901 - one case a family
    row = blocks.tokens[b].tolist()
    if not blocks.text[b, t]:
        return False
    match proxy:
        case And(of):
            return all(_true(p, blocks, b, t) for p in of)
        case Or(of):
            return any(_true(p, blocks, b, t) for p in of)
        case Not(of):
            return not _true(of, blocks, b, t)
        case Shift(of, n):
            return 0 <= t - n < len(row) and _true(of, blocks, b, t - n)
        case Induction(token, fuzzy):
            wanted = _edits(blocks, row[t]) if fuzzy else {row[t]}
            return any(row[s] in wanted and _is(blocks, row[s + 1], token) for s in range(t))
        case WithinAfter(tokens, n, stop):
            return any(
                _is(blocks, row[s], *tokens) and not any(_stops(blocks, b, u, stop) for u in range(s + 1, t + 1))
                for s in range(max(0, t - n), t)
            )
        case AfterAny(tokens):
            return any(_is(blocks, row[s], *tokens) for s in range(t))
        case TokenIn(tokens):
            return _is(blocks, row[t], *tokens)
        case NextTokenIn(tokens):
            return t + 1 < len(row) and _is(blocks, row[t + 1], *tokens)
        case Bigram(previous, token):
            return t > 0 and _is(blocks, row[t - 1], previous) and _is(blocks, row[t], token)
        case InRepeat(k):
            run = row[t - k + 1 : t + 1]
            return t - k + 1 > 0 and any(row[s : s + k] == run for s in range(t - k + 1))
        case Regex(pattern):
            return _overlaps_match(pattern, blocks, b, t)
        case Document(glob):
            return fnmatch.fnmatchcase(blocks.documents[blocks.document[b, t]], glob)
        case DocumentRegex(pattern):
            return re.search(pattern, blocks.documents[blocks.document[b, t]]) is not None
        case other:
            raise TypeError(other)


def _is(blocks: Blocks, token: int, *names: str | int) -> bool:
    text = None if token in blocks.vocabulary.special else blocks.vocabulary.tokens[token]
    return any(token == name if isinstance(name, int) else text == name.encode() for name in names)


def _edits(blocks: Blocks, token: int) -> set[int]:
    """The token, and for each edit of its text the first id with that text."""
    tokens, special = blocks.vocabulary.tokens, blocks.vocabulary.special
    try:
        text = tokens[token].decode()
    except UnicodeDecodeError:
        return {token}
    found = {token}
    for edit in (" " + text, text.strip(), text.capitalize(), text.lower()):
        found |= set([i for i, other in enumerate(tokens) if i not in special and other == edit.encode()][:1])
    return found


def _stops(blocks: Blocks, b: int, t: int, stop: str | tuple) -> bool:
    if not blocks.text[b, t]:
        return True
    token = int(blocks.tokens[b, t])
    if stop != "punctuation":
        return _is(blocks, token, *stop)
    text = blocks.vocabulary.tokens[token].decode(errors="replace")
    return re.search(r"[.,;:!?\n\r]", text) is not None and re.search(r"[^\W_]", text) is None


def _overlaps_match(pattern: str, blocks: Blocks, b: int, t: int) -> bool:
    """Python's own engine over the characters of the segment; nothing matches a byte that is no UTF-8."""
    first = last = t
    while first > 0 and blocks.text[b, first - 1]:
        first -= 1
    while last + 1 < blocks.tokens.shape[1] and blocks.text[b, last + 1]:
        last += 1
    pieces = [_text(blocks, b, u) for u in range(first, last + 1)]
    begin = sum(len(p) for p in pieces[: t - first])
    end = begin + len(pieces[t - first])
    characters = b"".join(pieces).decode(errors="surrogateescape")
    at = np.cumsum([0] + [len(c.encode(errors="surrogateescape")) for c in characters])
    python = pattern.replace(".", r"[^\n\udc80-\udcff]")
    return any(
        at[m.start()] < end and at[m.end()] > begin and begin < end and m.start() < m.end()
        for m in re.finditer(python, characters, re.ASCII)
    )


def _text(blocks: Blocks, b: int, t: int) -> bytes:
    token = int(blocks.tokens[b, t])
    return b"" if token in blocks.vocabulary.special else blocks.vocabulary.tokens[token]
