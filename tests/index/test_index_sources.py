"""Sums by key against a dictionary, and the choice of sources against a sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headscope.errors import IndexFormatError
from headscope.index import sources
from headscope.index.passes import check_sum, largest_sources
from headscope.index.sources import SourceSums, keep_largest, merge_by_key

N_TOKENS = 10
BATCHES = st.lists(
    st.lists(st.tuples(st.integers(0, 49), st.integers(0, 40), st.integers(-9, 9)), max_size=20), max_size=6
)
"""Rows (key, weight, other value) of each batch; whole numbers, so that sums are exact."""


def tensors(rows):
    key = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    return key, torch.tensor([row[1:] for row in rows], dtype=torch.float64).view(-1, 2)


def dictionary(rows):
    sums = {}
    for key, weight, value in rows:
        known = sums.get(key, (0, 0))
        sums[key] = known[0] + weight, known[1] + value
    return dict(sorted(sums.items()))


def as_dictionary(key, values):
    return {k: tuple(v) for k, v in zip(key.tolist(), values.tolist(), strict=True)}


@given(BATCHES)
def test_rows_of_a_key_are_summed(batches):
    rows = [row for batch in batches for row in batch]
    key, values = merge_by_key(*tensors(rows))
    assert list(as_dictionary(key, values).items()) == list(dictionary(rows).items())


@given(BATCHES, st.integers(1, 4))
def test_of_each_owner_the_largest_stay(batches, n):
    sums = dictionary([row for batch in batches for row in batch])
    key, values = tensors([(k, *v) for k, v in sums.items()])
    kept = as_dictionary(*keep_largest(key, values, key // N_TOKENS, 0, n))
    assert list(kept) == sorted(kept)
    for owner in range(5):
        own = {k: v for k, v in sums.items() if k // N_TOKENS == owner}
        largest = sorted(own, key=lambda k: (-own[k][0], k))[:n]
        assert {k: v for k, v in kept.items() if k // N_TOKENS == owner} == {k: own[k] for k in largest}


@given(BATCHES, st.integers(1, 30))
def test_all_sums_are_exact_when_all_are_kept(batches, compact):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_COMPACT_ROWS", compact)
        sums = SourceSums(N_TOKENS, 0, None)
        for batch in batches:
            sums.add(*tensors(batch))
        found = sums.result()
    assert as_dictionary(*found) == dictionary([row for batch in batches for row in batch])


@given(BATCHES, st.integers(1, 30), st.integers(1, 12))
def test_what_is_kept_is_never_too_much_and_exact_where_none_was_given_up(batches, compact, n):
    rows = [row for batch in batches for row in batch]
    exact = dictionary(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_COMPACT_ROWS", compact)
        sums = SourceSums(N_TOKENS, 0, n)
        for batch in batches:
            sums.add(*tensors(batch))
        found = as_dictionary(*sums.result())
    for owner in range(5):
        own = {k: v for k, v in found.items() if k // N_TOKENS == owner}
        true = {k: v for k, v in exact.items() if k // N_TOKENS == owner}
        assert len(own) <= n
        assert all(weight <= true[k][0] for k, (weight, _) in own.items())
        if len(true) <= n:
            assert own == true


def test_nothing_added_is_nothing_kept():
    assert len(SourceSums(N_TOKENS, 0, 3).result()[0]) == 0
    sums = SourceSums(N_TOKENS, 0, 3)
    sums.add(torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
    assert len(sums.result()[0]) == 0


@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.float64])
)
def test_the_largest_sources_are_those_of_a_sort(n, k, seed, dtype):
    """Numbers a thousandth apart, of either sign: no ties within the digits that count."""
    rng = np.random.default_rng(seed)
    magnitude = 1.01 ** np.stack([rng.permutation(n) for _ in range(6)]) * 1e-3
    summed = torch.tensor(magnitude * rng.choice([-1, 1], (6, n)), dtype=dtype)
    chosen = largest_sources(summed, k)
    assert chosen.shape == (6, min(n, k))
    for row, own in zip(magnitude, chosen.tolist(), strict=True):
        assert sorted(own) == sorted(np.argsort(-row)[:k].tolist())


@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_chosen_sources_are_distinct_whatever_the_ties(n, k, seed):
    rng = np.random.default_rng(seed)
    summed = torch.tensor(rng.choice([0.0, -0.0, 1.0, -1.0], (4, n)))
    for row, own in zip(summed.abs(), largest_sources(summed, k).tolist(), strict=True):
        assert len(set(own)) == len(own) == min(n, k)
        assert sorted(row[own].tolist()) == sorted(row.tolist())[n - min(n, k) :]


def test_sources_that_exist_come_before_those_that_contribute_nothing():
    """An early query's missing sources contribute 0; so may one that exists, and it is the one to keep."""
    summed = torch.tensor([[0.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    assert sorted(largest_sources(summed, 3)[0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("bad", [1e-2, float("nan"), float("inf")])
def test_a_sum_that_does_not_close_is_refused(bad):
    check_sum(torch.zeros(3), torch.ones(3, 4))
    check_sum(torch.zeros(0), torch.ones(0, 4))
    with pytest.raises(IndexFormatError, match="misses the pre-activation"):
        check_sum(torch.tensor([0.0, bad, 0.0]), torch.ones(3, 4))
