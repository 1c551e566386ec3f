"""Documents to blocks: every token of every document once, in order, with its offset, whatever was chosen."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from headscope.corpus import BLOCK_BOS, NOT_TEXT, PADDING, Corpus, blocks
from headscope.corpus.blocks import Layout, Stream, pack
from headscope.errors import CorpusError, OutputError

BOS, SEPARATOR = 0, 1
DOCUMENTS = st.lists(st.lists(st.integers(2, 9), max_size=9), min_size=1, max_size=9)
PACKING = st.sampled_from(["packed", "rows"])
BOS_AT = st.sampled_from(["both", "block", "document", "nowhere"])


def stream_of(documents, *, rows: bool = False) -> Stream:
    return Stream(
        tokens=np.array([t for d in documents for t in d], np.int32),
        lengths=np.array([len(d) for d in documents], np.int64),
        names=tuple(f"d{i}" for i in range(len(documents))),
        rows=rows,
    )


def packed(documents, scratch, block_size=5, packing="packed", bos_at="both", separator=None, **more) -> Corpus:
    layout = Layout(block_size, BOS, packing, bos_at, separator)
    return pack("c", "all", stream_of(documents), layout, more.pop("max_tokens", None), scratch=scratch, **more)


def expected_blocks(documents, block_size, packing, bos_at, separator):
    """The same, one token after another: rows of (token, document, offset)."""
    block_bos = bos_at in ("both", "block")
    body = block_size - block_bos
    spans = []
    for d, ids in enumerate(documents):
        span = [(t, d, i + 1) for i, t in enumerate(ids)]
        if bos_at == "document" or (bos_at == "both" and packing == "packed"):
            span.insert(0, (BOS, d, 0))
        if separator is not None:
            span.append((separator, d, NOT_TEXT))
        spans.append(span)
    if packing == "packed":
        whole = list(itertools.chain(*spans))
        pieces = [whole[i : i + body] for i in range(0, len(whole) - body + 1, body)]
        return [([(BOS, p[0][1], BLOCK_BOS)] if block_bos else []) + p for p in pieces]
    found = []
    for d, span in enumerate(spans):
        for i in range(0, len(span), body):
            first = [(BOS, d, BLOCK_BOS if i else 0)] if block_bos else []
            row = first + span[i : i + body]
            found.append(row + [(BOS, d, PADDING)] * (block_size - len(row)))
    return found


@given(DOCUMENTS, st.integers(2, 7), PACKING, BOS_AT, st.sampled_from([None, SEPARATOR]))
def test_blocks_are_what_one_would_write_token_by_token(
    tmp_path_factory, documents, block_size, packing, bos_at, separator
):
    expected = expected_blocks(documents, block_size, packing, bos_at, separator)
    folder = tmp_path_factory.getbasetemp()
    if not expected:
        with pytest.raises(CorpusError, match="at least one block"):
            packed(documents, folder, block_size, packing, bos_at, separator)
        return
    corpus = packed(documents, folder, block_size, packing, bos_at, separator)
    got = np.stack([corpus.blocks, corpus.document, corpus.offset], axis=-1)
    assert_array_equal(got, np.array(expected))


@given(DOCUMENTS, st.integers(2, 7), PACKING, BOS_AT)
def test_every_token_of_every_document_is_there_once_in_order(tmp_path_factory, documents, block_size, packing, bos_at):
    try:
        corpus = packed(documents, tmp_path_factory.getbasetemp(), block_size, packing, bos_at)
    except CorpusError:
        return
    text = corpus.offset > 0
    got = list(zip(corpus.document[text], corpus.offset[text], corpus.blocks[text], strict=True))
    everything = [(d, i + 1, t) for d, ids in enumerate(documents) for i, t in enumerate(ids)]
    assert got == everything[: len(got)]
    left_out = len(everything) - len(got)
    assert left_out == 0 if packing == "rows" else left_out < block_size
    assert corpus.n_text_tokens == len(got)
    assert corpus.n_padding == (corpus.offset == PADDING).sum()


def test_a_bos_that_a_document_brings_is_not_doubled(tmp_path):
    own, bare = [[BOS, 5, 6, 7], [BOS, 8, 9]], [[5, 6, 7], [8, 9]]
    for packing, bos_at in (("packed", "both"), ("packed", "document"), ("rows", "block"), ("rows", "document")):
        a, b = (packed(d, tmp_path, 4, packing, bos_at) for d in (own, bare))
        assert a.fingerprint() == b.fingerprint()
    assert_array_equal(packed(own, tmp_path, 4, "rows", "nowhere").blocks, [[0, 5, 6, 7], [0, 8, 9, 0]])


def test_a_large_corpus_is_mapped_from_a_file_with_the_same_blocks(tmp_path, monkeypatch):
    documents = [[2 + (i * j) % 7 for j in range(i)] for i in range(1, 40)]
    small = packed(documents, tmp_path)
    monkeypatch.setattr(blocks, "_IN_MEMORY", 100)
    monkeypatch.setattr(blocks, "_CHUNK", 20)
    large = packed(documents, tmp_path)
    assert isinstance(large.blocks, np.memmap)
    assert not list(tmp_path.iterdir())
    assert large.fingerprint() == small.fingerprint()
    assert large.n_text_tokens == small.n_text_tokens


def test_no_room_for_a_large_corpus_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_IN_MEMORY", 1)

    def full(file, start, n):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"(?s)no room.*No space left.*HEADSCOPE_CACHE"):
        packed([[2, 3, 4, 5, 6, 7]], tmp_path)


def test_special_tokens_are_no_text(tmp_path):
    corpus = packed([[2, 3, 4, 5]], tmp_path, separator=SEPARATOR, special=frozenset({BOS, SEPARATOR, 4}))
    assert_array_equal(corpus.blocks, [[0, 0, 2, 3, 4]])
    assert corpus.n_text_tokens == 2
