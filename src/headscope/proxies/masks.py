"""Proxies over the corpus of an index."""

from collections import OrderedDict
from collections.abc import Iterator
from threading import RLock
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool
from tokenizers import Tokenizer

from headscope.corpus import encode
from headscope.index.store import FeatureIndex
from headscope.proxies.algebra import Proxy
from headscope.proxies.blocks import Blocks, Vocabulary
from headscope.proxies.parse import parse

_CHUNK = 1 << 20  # positions evaluated at a time
_CACHED = 1 << 28  # bytes of masks held for an index


class _Text:
    """What is kept of an index between two proxies: its vocabulary, and the last masks."""

    def __init__(self, index: FeatureIndex) -> None:
        texts, special = index.vocabulary
        path = index.folder / "tokenizer.json"

        def split(text: str) -> list[str]:
            return [texts[i].decode(errors="replace") for i in encode(Tokenizer.from_file(str(path)), [text])[0]]

        self.vocabulary = Vocabulary(texts, frozenset(special), split)
        self.masks: OrderedDict[Proxy, np.ndarray] = OrderedDict()


_TEXTS: WeakKeyDictionary[FeatureIndex, _Text] = WeakKeyDictionary()
_LOCK = RLock()


def evaluate(proxy: Proxy | str, index: FeatureIndex) -> Bool[np.ndarray, " token"]:
    """Whether a proxy is true of each position of an index's corpus; false at special tokens.

    The last masks of an index are kept, 256 MB of them; they are read-only.

    Args:
        proxy: or its text, which is parsed.
        index: position = block * block_size + offset in the block.

    Raises:
        ProxyError: it cannot be parsed or evaluated.
    """
    proxy = parse(proxy) if isinstance(proxy, str) else proxy
    text = _text(index)
    with _LOCK:
        if proxy in text.masks:
            text.masks.move_to_end(proxy)
            return text.masks[proxy]
    mask = np.concatenate([proxy.holds(blocks).ravel() for blocks in read_blocks(index)])
    mask.flags.writeable = False
    with _LOCK:
        text.masks[proxy] = mask
        while len(text.masks) > 1 and mask.size * len(text.masks) > _CACHED:
            text.masks.popitem(last=False)
    return mask


def text_mask(index: FeatureIndex) -> Bool[np.ndarray, " token"]:
    """The positions of an index's corpus that are text: what all statistics are over."""
    return np.concatenate([blocks.text.ravel() for blocks in read_blocks(index)])


def vocabulary_of(index: FeatureIndex) -> Vocabulary:
    """The vocabulary of an index, made once."""
    return _text(index).vocabulary


def read_blocks(index: FeatureIndex) -> Iterator[Blocks]:
    """The corpus of an index, about a million positions at a time."""
    vocabulary, size = vocabulary_of(index), index.block_size
    names = index.documents
    file = pq.ParquetFile(index.folder / "tokens.parquet", page_checksum_verification=True)
    metadata = file.metadata
    groups = [i for i in range(metadata.num_row_groups) if metadata.row_group(i).num_rows]
    step = max(1, _CHUNK // max(1, metadata.row_group(groups[0]).num_rows))
    for first in range(0, len(groups), step):
        table = file.read_row_groups(groups[first : first + step], columns=["token", "document", "offset"])
        tokens, document, offset = (c.to_numpy().reshape(-1, size) for c in table.columns)
        yield Blocks(tokens, document, offset > 0, vocabulary, names)


def _text(index: FeatureIndex) -> _Text:
    with _LOCK:
        if index not in _TEXTS:
            _TEXTS[index] = _Text(index)
        return _TEXTS[index]
