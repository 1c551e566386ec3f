"""DFA by head and source over a corpus: what is planted, slow loops, and what is refused."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from headscope.attribution import HeadWeights
from headscope.corpus import Corpus
from headscope.errors import HeadscopeError, IndexFormatError, ModelError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.studies.how.head_shares import head_shares
from headscope.studies.how.sources import compare_heads, source_shares
from planted import BOS, V, induction_sequences, planted_model, planted_sae

B = 5
"""The token that is next by induction."""


# ------------------------------------------------------------------------------------------------------------- planted
@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Of sequences A B ... A, one document each; in a part of them B is the token above."""
    tokens, where, second = induction_sequences(1000)
    own, rest = (second == B).nonzero()[:, 0], (second != B).nonzero()[:60, 0]
    rows = torch.cat([own, rest])
    blocks = tokens[rows].numpy()
    n, size = blocks.shape
    offset = np.tile(np.arange(size), (n, 1))
    document = np.tile(np.arange(n)[:, None], (1, size))
    names = tuple(f"sequence {i}" for i in range(n))
    corpus = Corpus("planted", "all", blocks, names, document, offset, BOS)
    model, sae = planted_model(), planted_sae()
    folder = tmp_path_factory.mktemp("upstream") / "index"
    (out,) = build_index(model, [(sae, SAERecord("planted", "none"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(out), model, sae), where[rows].numpy(), len(own)


def test_one_head_makes_the_planted_feature(planted):
    live, _, n = planted
    everything, above = head_shares(live.index, B, (0.0, 0.6))
    assert (everything.n, above.n) == (n, 0)
    first, other = everything.heads
    assert first.squared.value == pytest.approx(1.0)
    assert first.squared.low is None
    assert "alike" in first.squared.missing
    assert first.linear.value == pytest.approx(1.0)
    assert first.linear.null.value == pytest.approx(1 / 2)  # heads exchanged
    assert (first.linear.null.low, first.linear.null.high) == pytest.approx((0.0, 1.0))
    assert other.squared.value == pytest.approx(0.0)
    assert first.squared.null.high >= first.squared.null.value >= first.squared.null.low
    assert first.covariance.value is None
    assert "same on all" in first.covariance.missing
    assert [share.head for share in everything.top] == [0, 1]
    assert above.top == ()
    assert "0 tokens" in above.heads[0].squared.missing


def test_one_source_makes_the_planted_feature(planted):
    live, _, n = planted
    (found,) = source_shares(live, B, [B])
    assert (found.n, found.n_active, found.n_blocks) == (n, n, n)
    for measure in (found.summed, found.separate, found.linear, found.heads[0].squared, found.heads[0].linear):
        assert measure.value == pytest.approx(1.0)
        assert measure.n == n
    assert found.linear.null.value == found.heads[0].linear.null.value == found.frequency.value  # sources all alike
    assert found.summed.null.value < 0.9
    assert found.heads[0].squared.null.low == pytest.approx(1.0)  # a head that looks nowhere else brings nothing else
    assert found.bos.value == pytest.approx(0.0)
    assert found.frequency.value == pytest.approx(1 / 24)
    assert "nothing" in found.heads[1].squared.missing
    attention = found.heads[0].attention
    assert (attention.active.value, attention.visible.value) == pytest.approx((1.0, 1.0))
    assert attention.inactive.value == pytest.approx(0.0, abs=1e-10)
    assert attention.elsewhere.value == pytest.approx(0.0, abs=1e-10)
    own = found.heads[1].attention  # the head that attends to itself, so to the set where that is the token
    assert own.active.value == pytest.approx(0.0, abs=1e-10)
    assert own.inactive.value == pytest.approx(n / own.inactive.n)
    assert [(t.token, t.summed, t.linear) for t in found.top] == [(B, pytest.approx(1.0), pytest.approx(1.0))]
    (other,) = source_shares(live, B, [B + 1])
    assert other.summed.value == pytest.approx(0.0)


def test_heads_beside_each_other_on_one_example(planted):
    live, where, _ = planted
    position = live.index.block_size - 1
    found = compare_heads(live, position, B)
    assert [h.head for h in found.heads] == [0, 1]
    assert found.heads[0].contribution == pytest.approx(1.0)
    assert found.heads[0].share == pytest.approx(1.0)
    assert found.heads[0].sources[0] == where[0]
    assert found.heads[0].attention[0] == pytest.approx(1.0)
    assert found.agreement[0, 0] == pytest.approx(1.0)
    assert np.isnan(found.agreement[0, 1])
    alone = compare_heads(live, position, B, [1], k=2)
    assert alone.heads[0].head == 1
    assert len(alone.heads[0].sources) == 2
    with pytest.raises(ModelError, match=r"heads \[2\]"):
        compare_heads(live, position, B, [0, 2])


# ---------------------------------------------------------------------------------------------------------- slow loops
@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def live(request, random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model(request.param, dtype=torch.float64)
    sae = random_sae(model, 40)
    corpus = random_corpus(model, 40)
    folder = tmp_path_factory.mktemp("upstream") / "index"
    build_index(model, [(sae, SAERecord("random", "none"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae), corpus


def slow(live, corpus, latent, threshold):
    """Block, query, C [head, source] and pattern of each active token, and of each inactive one; token by token."""
    model, sae = live.model, live.sae
    weights = HeadWeights.of(sae, model)
    rows = []
    for b, block in enumerate(corpus.blocks):
        attention = model.attention(torch.from_numpy(block.astype(np.int64))[None], sae.site.layer)
        f = sae.encode(attention.z[0])[:, latent]
        for q, token in enumerate(block):
            pattern = attention.pattern[0, :, q]
            values = torch.stack([attention.value[0, :, h] - weights.offset[h] for h in range(len(pattern))])
            c = pattern * (values @ weights.encoder[:, latent, :, None])[..., 0]
            rows.append((b, q, token == model.bos, f[q].item(), c.numpy(), pattern.numpy(), block))
    return [r for r in rows if not r[2] and r[3] > threshold], [r for r in rows if not r[2] and r[3] <= 0]


def test_shares_are_those_of_a_slow_loop(live):
    index, corpus = live
    counts = [index.index.feature(j).n_active for j in range(40)]
    latent = int(np.argsort(counts)[len(counts) // 2])
    median = index.index.feature(latent).quantiles
    tau = float(median[len(median) // 2])
    chosen = [3, 7, 11, 20, 33, 41, 60, 77]
    for threshold, found, heads in zip(
        (0.0, tau),
        source_shares(index, latent, chosen, thresholds=(0.0, tau)),
        head_shares(index.index, latent, (0.0, tau)),
        strict=True,
    ):
        active, quiet = slow(index, corpus, latent, threshold)
        assert found.n == found.n_active == heads.n == len(active) >= 30
        inside = [np.isin(block, chosen) for *_, block in active]
        c = [r[4] for r in active]
        assert found.summed.value == pytest.approx(
            sum((x.sum(0)[i] ** 2).sum() for x, i in zip(c, inside, strict=True))
            / sum((x.sum(0) ** 2).sum() for x in c)
        )
        assert found.separate.value == pytest.approx(
            sum((x[:, i] ** 2).sum() for x, i in zip(c, inside, strict=True)) / sum((x**2).sum() for x in c)
        )
        assert found.linear.value == pytest.approx(
            sum(x[:, i].sum() for x, i in zip(c, inside, strict=True)) / sum(x.sum() for x in c)
        )
        assert found.bos.value == pytest.approx(
            sum((r[4].sum(0)[r[6] == corpus.bos] ** 2).sum() for r in active) / sum((x.sum(0) ** 2).sum() for x in c)
        )
        by_head = np.array([x.sum(1) for x in c])
        for h, head in enumerate(found.heads):
            assert head.squared.value == pytest.approx(
                sum((x[h, i] ** 2).sum() for x, i in zip(c, inside, strict=True)) / sum((x[h] ** 2).sum() for x in c)
            )
            attended = [r[5][h][i].sum() for r, i in zip(active, inside, strict=True)]
            assert head.attention.active.value == pytest.approx(np.mean(attended))
            seen = [a for a, r, i in zip(attended, active, inside, strict=True) if i[: r[1] + 1].any()]
            if len(seen) >= 30:
                assert head.attention.visible.value == pytest.approx(np.mean(seen))
            blocks = {r[0] for r in slow(index, corpus, latent, 0.0)[0]}
            off = [
                r[5][h][np.isin(r[6], chosen)].sum()
                for r in quiet
                if r[0] in blocks and np.isin(r[6][: r[1] + 1], chosen).any()
            ]
            assert head.attention.inactive.n == len(off)
            assert head.attention.inactive.value == pytest.approx(np.mean(off))
            share = heads.heads[h]
            # the index keeps 14 significant bits of each contribution
            assert share.squared.value == pytest.approx((by_head[:, h] ** 2).sum() / (by_head**2).sum(), rel=1e-3)
            total = by_head.sum(1)
            covariance = np.cov(by_head[:, h], total)[0, 1] / np.var(total, ddof=1)
            assert share.covariance.value == pytest.approx(covariance, abs=1e-3)
            assert share.linear.value == pytest.approx(by_head[:, h].sum() / total.sum(), abs=1e-3)
        assert sum(h.squared.value for h in heads.heads) == pytest.approx(1)
        assert sum(h.covariance.value for h in heads.heads) == pytest.approx(1)
        by_token = np.zeros(98)
        for r in active:
            np.add.at(by_token, r[6], r[4].sum(0) ** 2)
        assert [t.token for t in found.top] == np.argsort(-by_token)[:20].tolist()
        assert_allclose([t.summed for t in found.top], np.sort(by_token / by_token.sum())[::-1][:20])


def test_intervals_hold_the_value_and_samples_are_smaller(live):
    index, _ = live
    latent = int(np.argmax([index.index.feature(j).n_active for j in range(40)]))
    whole = source_shares(index, latent, [3, 7, 11, 20])[0]
    part = source_shares(index, latent, [3, 7, 11, 20], max_blocks=20)[0]
    assert part.n_blocks == 20
    assert 30 <= part.n < whole.n
    assert part.n_active == whole.n_active
    assert source_shares(index, latent, [3, 7, 11, 20], max_blocks=20)[0].summed == part.summed
    for measure in (whole.summed, whole.separate, whole.heads[0].attention.active):
        assert measure.low < measure.value < measure.high
    null = whole.summed.null
    assert null.low <= null.value <= null.high


def test_agreement_of_heads_is_one_less_the_divergence_of_their_sources(live):
    index, corpus = live
    found = compare_heads(index, corpus.block_size + 12, 3)
    mass = np.abs(found.dfa.by_source[[h.head for h in found.heads]])
    p = mass / mass.sum(1, keepdims=True)

    def entropy(q):
        return -(q[q > 0] * np.log2(q[q > 0])).sum()

    for i in range(4):
        for j in range(4):
            divergence = entropy((p[i] + p[j]) / 2) - (entropy(p[i]) + entropy(p[j])) / 2
            assert found.agreement[i, j] == pytest.approx(1 - divergence)
    assert sum(h.share for h in found.heads) == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------------- bad input
def test_what_cannot_be_asked(live):
    index, _ = live
    for tokens in ([], [0], [98], [-1]):
        with pytest.raises(HeadscopeError, match="source token"):
            source_shares(index, 0, tokens)
    with pytest.raises(IndexFormatError, match="latent 40"):
        source_shares(index, 40, [3])
    with pytest.raises(IndexFormatError, match="latent 40"):
        head_shares(index.index, 40)
    with pytest.raises(IndexFormatError):
        compare_heads(index, 10**6, 0)


def test_a_feature_that_is_never_active_has_no_numbers(planted):
    live, _, _ = planted
    (found,) = source_shares(live, V, [B])  # the current token is the BOS: no text token is
    assert (found.n, found.top) == (0, ())
    assert found.summed.value is None
    assert "0 tokens" in found.summed.missing
