"""Evaluation of proxies over the corpus of an index."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from threading import RLock
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, UInt8

from headscope.index.store import FeatureIndex
from headscope.proxies.algebra import Proxy
from headscope.proxies.blocks import Blocks, Vocabulary
from headscope.proxies.parse import parse

_CHUNK = 1 << 20  # positions evaluated at a time
_CACHED = 1 << 25  # bytes of cached masks per index, one bit per position


class _Text:
    """Cached data of an index: its vocabulary, and the last masks."""

    def __init__(self, index: FeatureIndex) -> None:
        texts, special = index.vocabulary
        own = index.token_texts
        self.vocabulary = Vocabulary(texts, frozenset(special), own.pieces, frozenset(own.byte_tokens), own.prefix)
        self.masks: OrderedDict[Proxy, UInt8[np.ndarray, " byte"]] = OrderedDict()


_TEXTS: WeakKeyDictionary[FeatureIndex, _Text] = WeakKeyDictionary()
_LOCK = RLock()


def evaluate(proxy: Proxy | str, index: FeatureIndex) -> Bool[np.ndarray, " token"]:
    """Evaluate a proxy at each position of an index's corpus; false at positions that are not text.

    The last masks of an index are cached, 32 MB at one bit per position.

    Args:
        proxy: a proxy, or its text, which is parsed.
        index: position = block * block_size + offset in the block.

    Raises:
        ProxyError: it cannot be parsed or evaluated.
    """
    proxy = parse(proxy) if isinstance(proxy, str) else proxy
    text = _text(index)
    with _LOCK:
        packed = text.masks.get(proxy)
        if packed is not None:
            text.masks.move_to_end(proxy)
    if packed is not None:
        return np.unpackbits(packed, count=index.n_blocks * index.block_size).view(bool)
    mask = np.concatenate([proxy.holds(blocks).ravel() for blocks in read_blocks(index)])
    packed = np.packbits(mask)
    with _LOCK:
        text.masks[proxy] = packed
        while len(text.masks) > 1 and packed.size * len(text.masks) > _CACHED:
            text.masks.popitem(last=False)
    return mask


def text_mask(index: FeatureIndex) -> Bool[np.ndarray, " token"]:
    """Return the positions of an index's corpus that are text, on which all statistics are based."""
    return np.concatenate([blocks.text.ravel() for blocks in read_blocks(index)])


def vocabulary_of(index: FeatureIndex) -> Vocabulary:
    """Return the vocabulary of an index, cached."""
    return _text(index).vocabulary


def read_blocks(index: FeatureIndex) -> Iterator[Blocks]:
    """Yield the corpus of an index, about a million positions at a time."""
    vocabulary, names, parts = vocabulary_of(index), index.documents, index.each_blocks()
    special = sorted(vocabulary.special)
    for first in parts:
        several = [first, *islice(parts, max(0, _CHUNK // first["token"].size - 1))]
        token, document, is_text, starts = (
            np.concatenate([part[name] for part in several]) for name in ("token", "document", "is_text", "starts")
        )
        # Padding and separators may have the ids of ordinary tokens; proxies treat them as special tokens.
        disguised = ~is_text & ~np.isin(token, special)
        if disguised.any():
            token[disguised] = special[0]
        yield Blocks(token, document, is_text, vocabulary, names, starts)


def _text(index: FeatureIndex) -> _Text:
    with _LOCK:
        if index not in _TEXTS:
            _TEXTS[index] = _Text(index)
        return _TEXTS[index]
