"""Distributions and examples of random rows against the plainest way to say the same."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headscope.index import sweep as sweep_module
from headscope.index.config import N_BINS, QUANTILES, IndexPlan
from headscope.index.parts import Parts, SortedParts
from headscope.index.sweep import _WEAKEST, _bits, _quantiles, _rank, _split, choose_groups, priority, sweep
from headscope.index.tables import head_shares

PLAN = IndexPlan(top=3, random=4, quantiles=3, per_quantile=2, intervals=4, per_interval=2, near_threshold=2)
SEEDS = st.integers(0, 2**32 - 1)


def random_rows(seed, n_latents=5, n=60, n_positions=400, base=0):
    """Rows sorted by latent, then position; activations of few values, so that there are ties."""
    rng = np.random.default_rng(seed)
    pairs = sorted({(int(rng.integers(n_latents)), int(rng.integers(n_positions)) + base) for _ in range(n)})
    latent, position = np.array(pairs).T
    activation = (rng.integers(1, 30, len(pairs)) / 8).astype(np.float32)
    return {"latent": latent, "position": position, "activation": activation}


def maxima(rows, n_latents=5):
    maximum = np.zeros(n_latents)
    np.maximum.at(maximum, rows["latent"], rows["activation"])
    return maximum


@given(SEEDS)
def test_ranks_are_those_of_a_stable_sort(seed):
    rows = random_rows(seed)
    rank, n = _rank(rows["latent"], _WEAKEST - _bits(rows["activation"]))
    for j in set(rows["latent"].tolist()):
        own = np.flatnonzero(rows["latent"] == j)
        assert (n[own] == len(own)).all()
        assert rank[own[np.argsort(-rows["activation"][own], kind="stable")]].tolist() == list(range(len(own)))


@given(st.integers(1, 200), st.integers(1, 12))
def test_split_is_array_split(n, parts):
    expected = np.concatenate([np.full(len(p), i) for i, p in enumerate(np.array_split(np.arange(n), parts))])
    assert _split(np.arange(n), np.full(n, n), parts).tolist() == expected.tolist()


@given(SEEDS, st.integers(1, 60))
def test_quantiles_are_numpys(seed, n):
    rows = random_rows(seed, n=n)
    found = np.zeros((5, len(QUANTILES)))
    _quantiles(found, rows)
    for j in range(5):
        own = rows["activation"][rows["latent"] == j].astype(float)
        expected = np.quantile(own, QUANTILES) if len(own) else np.zeros(len(QUANTILES))
        np.testing.assert_allclose(found[j], expected, rtol=1e-12)


@pytest.mark.parametrize("base", [0, 1 << 40])
def test_priority_is_uniform_and_of_the_position_alone(base):
    drawn = priority(np.arange(base, base + 200_000))
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = np.histogram(drawn, 100, (0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-squared of 99 degrees of freedom: 1 in 10,000
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01
    some = np.array([base + 7, base + 199_999, base + 7])
    assert priority(some).tolist() == drawn[[7, 199_999, 7]].tolist()


BLOCKS = np.random.default_rng(0).integers(1, 9, (20, 20)).astype(np.int32)
BLOCKS[10:] = BLOCKS[:10]  # each text twice


@given(SEEDS)
def test_groups_of_random_rows(seed):
    rows = random_rows(seed, n=150)
    counts = np.bincount(rows["latent"], minlength=5)
    groups = choose_groups(rows, (rows, rows), counts, maxima(rows), BLOCKS, PLAN)[0]
    assert groups.latent.tolist() == sorted(groups.latent.tolist())
    ends = np.cumsum(groups.n_chosen)
    for j in range(5):
        own = rows["latent"] == j
        f = dict(zip(rows["position"][own].tolist(), rows["activation"][own].tolist(), strict=True))
        found = [
            (sweep_module.KINDS[groups.kind[i]], i, groups.position[ends[i] - groups.n_chosen[i] : ends[i]].tolist())
            for i in np.flatnonzero(groups.latent == j)
        ]
        assert [kind for kind, *_ in found] == sorted((kind for kind, *_ in found), key=sweep_module.KINDS.index)
        for kind in ("quantile", "interval"):
            assert sum(groups.n[i] for k, i, _ in found if k == kind) == len(f)
        for kind, i, positions in found:
            values = [f[p] for p in positions]
            assert values == sorted(values, reverse=True)
            assert len(set(positions)) == len(positions)
            assert all(groups.low[i] - 1e-6 <= v <= groups.high[i] + 1e-6 for v in values)
            if kind == "threshold":
                assert sorted(values) == sorted(f.values())[: len(values)]
            if kind == "random":
                assert len(positions) == min(PLAN.random, len(f))
                assert set(positions) == set(sorted(f, key=lambda p: priority(np.array([p]))[0])[: PLAN.random])
            if kind == "top":
                texts = [text_around(p) for p in positions]
                assert len(set(texts)) == len(texts)
                assert values[0] == max(f.values())
                candidates = sorted(f, key=lambda p: (-f[p], p))[: PLAN.top * 20]
                copies = [sum(text_around(q) == t for q in candidates) - 1 for t in texts]
                assert groups.duplicates[ends[i] - groups.n_chosen[i] : ends[i]].tolist() == copies


def text_around(position):
    block, query = divmod(position, BLOCKS.shape[1])
    at = range(query - 10, query + 5)
    return tuple(int(BLOCKS[block, a]) if 0 <= a < BLOCKS.shape[1] else -1 for a in at)


def test_the_same_words_in_another_order_are_another_text():
    rng = np.random.default_rng(0)
    phrase = rng.integers(1, 50, 20)
    pieces = [phrase] * 5 + [rng.permutation(phrase), rng.integers(1, 50, 20)]
    blocks = np.concatenate(pieces).astype(np.int32)[None]
    position = np.array([14, 34, 54, 74, 114, 134])
    rows = {
        "latent": np.zeros(6, np.int64),
        "position": position,
        "activation": np.array([3.0, 3.0, 3.0, 2.9, 2.8, 1.0], np.float32),
    }
    top = choose_groups(rows, (rows, rows), np.array([6]), np.array([3.0]), blocks, PLAN)[0]
    n = top.n_chosen[0]
    assert top.position[:n].tolist() == [14, 114, 134]
    assert top.duplicates[:n].tolist() == [3, 0, 0]


# --------------------------------------------------------------------------------------------------------------- sweep
HUGE_BLOCKS = np.broadcast_to(np.random.default_rng(1).integers(1, 50, 256), (1 << 32, 256))
"""A corpus of 2^40 tokens, of one block that comes again and again."""


def sweep_of(folder, rows, plan, blocks, n_parts=3, n_latents=5):
    """Sweep rows that lie in some parts; also the rows that were written."""
    parts = Parts(folder, n_parts)
    edges = np.quantile(rows["position"], np.linspace(0, 1, n_parts + 1)[1:-1])
    where = np.searchsorted(edges, rows["position"])
    for number in range(n_parts):
        own = {name: column[where == number] for name, column in rows.items()}
        heads = np.stack([own["activation"], -own["activation"]], 1)
        counts = np.bincount(own["latent"], minlength=n_latents)
        parts.write(
            number, {"counts": counts, "heads": heads, "position": own["position"], "activation": own["activation"]}
        )
    written = []
    mean = np.bincount(rows["latent"], rows["activation"], n_latents) / np.maximum(
        1, np.bincount(rows["latent"], minlength=n_latents)
    )
    found, groups = sweep(
        SortedParts(parts), maxima(rows, n_latents), mean, blocks, plan, written.append, lambda _done: None
    )
    names = ("latent", "position", "activation")
    return found, groups, {name: np.concatenate([piece[name] for piece in written]) for name in names}


def naive_counts(rows, n_latents=5):
    histogram, mass, central = (
        np.zeros((n_latents, N_BINS), int),
        np.zeros((n_latents, N_BINS)),
        np.zeros((n_latents, 4)),
    )
    maximum = maxima(rows, n_latents)
    for j in range(n_latents):
        f = rows["activation"][rows["latent"] == j].astype(float)
        for value in f:
            which = min(int(value * N_BINS / maximum[j] * (1 + 1e-12)), N_BINS - 1)
            histogram[j, which] += 1
            mass[j, which] += value
        if len(f):
            central[j] = [((f - f.mean()) ** k).sum() for k in (1, 2, 3, 4)]
    return histogram, mass, central


@pytest.mark.parametrize("range_rows", [1 << 20, 200, 40])
@pytest.mark.parametrize("base", [0, (1 << 32) - 100, 1 << 39])
def test_what_is_swept(tmp_path, range_rows, base):
    """Ranges that hold all latents, one, or less than one; positions around and beyond 2^32."""
    rows = random_rows(1, n=1200, n_positions=2000, base=base)
    plan = dataclasses.replace(PLAN, range_rows=range_rows)
    blocks = HUGE_BLOCKS
    found, groups, written = sweep_of(tmp_path / "a", rows, plan, blocks)
    for name in written:
        assert np.array_equal(written[name], rows[name])
    histogram, mass, central = naive_counts(rows)
    assert found.histogram.sum(1).tolist() == histogram.sum(1).tolist()
    assert np.abs(found.histogram - histogram).sum() <= 2 * (rows["activation"] * 8 % 1 == 0).sum()
    np.testing.assert_allclose(found.mass.sum(1), mass.sum(1), rtol=1e-12)
    np.testing.assert_allclose(found.central, central, rtol=1e-9, atol=1e-8)
    counts = np.bincount(rows["latent"], minlength=5)
    for j in range(5):
        own = rows["latent"] == j
        f = rows["activation"][own].astype(float)
        if counts[j] <= range_rows:
            np.testing.assert_allclose(found.quantiles[j], np.quantile(f, QUANTILES), rtol=1e-12)
        else:  # of a sample: within four standard errors of the rank
            error = 4 * np.sqrt(np.array(QUANTILES) * (1 - np.array(QUANTILES)) / (range_rows * 0.7)) + 1 / range_rows
            low, high = (np.quantile(f, np.clip(np.array(QUANTILES) + s * error, 0, 1)) for s in (-1, 1))
            assert (found.quantiles[j] >= low).all()
            assert (found.quantiles[j] <= high).all()
        at = np.flatnonzero(groups.latent == j)
        quantile = at[groups.kind[at] == sweep_module.KINDS.index("quantile")]
        assert abs(groups.n[quantile].sum() - counts[j]) <= len(quantile)
    exact = sweep_of(tmp_path / "b", rows, PLAN, blocks)[1]
    for kind in (0,):  # the strongest are found in all rows, sampled or not
        assert tops(groups, kind) == tops(exact, kind)


def tops(groups, kind):
    ends = np.cumsum(groups.n_chosen)
    return [
        (int(groups.latent[i]), groups.position[ends[i] - groups.n_chosen[i] : ends[i]].tolist())
        for i in np.flatnonzero(groups.kind == kind)
    ]


def test_what_is_found_does_not_depend_on_the_parts(tmp_path):
    rows = random_rows(2, n=300)
    one, other = (sweep_of(tmp_path / str(n), rows, PLAN, BLOCKS, n_parts=n) for n in (1, 7))
    for a, b in zip(vars(one[1]).values(), vars(other[1]).values(), strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(one[0].histogram, other[0].histogram)


# ------------------------------------------------------------------------------------------------------------- moments
@given(SEEDS, st.integers(2, 40), st.floats(0, 1e3))
def test_shares_from_sums_are_those_of_the_rows(seed, n, offset):
    """Merged from sums of unequal parts."""
    rng = np.random.default_rng(seed)
    heads = rng.normal(size=(n, 3)) + offset * np.array([1.0, 0.0, -0.5])
    p = heads.sum(1) + 2.0
    cuts = np.sort(rng.integers(0, n, 2))
    sums, first = np.zeros((1, 3, 3)), np.zeros(3)
    for h, q in zip(np.split(heads, cuts), np.split(p, cuts), strict=True):
        sums[0] += [h.sum(0), (h**2).sum(0), (h * q[:, None]).sum(0)]
        first += [len(q), q.sum(), (q**2).sum()]
    share, covariance, mean = head_shares(*(first[:, None]), sums)
    np.testing.assert_allclose(share[0], (heads**2).sum(0) / (heads**2).sum(), rtol=1e-9)
    np.testing.assert_allclose(mean[0], heads.mean(0) / heads.mean(0).sum(), rtol=1e-6)
    if p.var() > 1e-3:
        expected = [np.cov(heads[:, h], p, bias=True)[0, 1] / p.var() for h in range(3)]
        np.testing.assert_allclose(covariance[0], expected, rtol=1e-4, atol=1e-4)
        assert covariance[0].sum() == pytest.approx(1, abs=1e-4)
