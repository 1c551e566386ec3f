"""Features of several heads: AND and OR planted by hand, joint ablation against edited runs, sources against DFA."""

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import jensenshannon

from headscope.corpus import Corpus
from headscope.errors import StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.sae.model import SAE, ReLU
from headscope.site import Site
from headscope.studies.heads.superposition import (
    DEFINITIONS,
    OUTCOMES,
    concentration,
    redundancy,
    source_agreement,
)
from headscope.studies.support.replacement import Replacement
from planted import BOS, D_HEAD, induction_sequences, planted_model

AND, OR, ONE, BOTH = range(4)
WRITES_NOTHING = 1
"""A latent of the random SAE whose decoder vector is 0."""


def planted_pair_sae():
    """5 by induction at a 3: only together; either; the first alone; the pair of which neither is missed."""
    encoder = torch.zeros(2 * D_HEAD, 4, dtype=torch.float64)
    five, three = 5, D_HEAD + 3
    encoder[five, AND], encoder[three, AND] = 0.8, 0.6
    encoder[five, OR], encoder[three, OR] = 1.0, 1.0
    encoder[five, ONE] = 1.0
    encoder[five, BOTH], encoder[three, BOTH] = 0.5, 0.5
    return SAE(
        W_enc=encoder,
        b_enc=torch.tensor([-1.0, -0.5, -0.5, 0.1], dtype=torch.float64),
        W_dec=encoder.T.contiguous(),
        b_dec=torch.zeros(2 * D_HEAD, dtype=torch.float64),
        activation=ReLU(),
        site=Site("z", 1),
        model_name="planted",
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    tokens, _, _ = induction_sequences(64)
    pairs = torch.cat([torch.full((40, 1), BOS), torch.tensor([[3, 5, 7, 3]]).expand(40, 4)], dim=1)
    pairs = torch.nn.functional.pad(pairs, (0, tokens.shape[1] - 5), value=9)
    blocks = torch.cat([tokens, pairs]).numpy().astype(np.int32)
    document = np.repeat(np.arange(len(blocks))[:, None], blocks.shape[1], axis=1)
    offset = np.repeat(np.arange(blocks.shape[1])[None], len(blocks), axis=0)
    corpus = Corpus("planted", "all", blocks, tuple(map(str, range(len(blocks)))), document, offset, BOS)
    model, sae = planted_model(), planted_pair_sae()
    folder = tmp_path_factory.mktemp("superposition") / "index"
    build_index(model, [(sae, SAERecord("planted", "none"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


@pytest.fixture(scope="module")
def random(random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model("gpt2", dtype=torch.float64)
    sae = random_sae(model, 70)
    sae.W_dec[WRITES_NOTHING] = 0
    corpus = random_corpus(model, 40, 24)
    folder = tmp_path_factory.mktemp("superposition") / "index"
    build_index(model, [(sae, SAERecord("random", "none"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae), corpus


def test_an_and_and_an_or_are_told_apart(planted):
    found = redundancy(planted, Replacement.of(planted)).features
    assert found.latents.tolist()[:2] == [AND, OR]
    assert ONE not in found.latents
    both, either = (dict(zip(OUTCOMES, found.counts[row].tolist(), strict=True)) for row in (0, 1))
    assert both == {"redundant": 0, "and": 40, "some": 0, "not needed": 0, "opposed": 0}
    assert either["redundant"] == 40
    assert either["some"] == found.n[1] - 40 > 40  # where one of the two is there alone, it alone is needed
    assert found.mostly("and").tolist()[0]
    assert found.super_additivity[0] == pytest.approx(-1)  # 0.4 lost jointly, and by each head alone
    assert found.heads[:2].all()


def test_what_a_bias_holds_up_is_not_needed(planted):
    """With the constant part in the place of both heads, a feature with a bias above 0 stays on."""
    found = redundancy(planted, Replacement.of(planted, "zero"))
    row = found.features.latents.tolist().index(BOTH)
    assert found.features.counts[row, OUTCOMES.index("not needed")] == found.features.n[row]
    assert found.features.super_additivity[row] == pytest.approx(0, abs=1e-4)


def test_heads_that_read_different_tokens_share_no_source(planted):
    found = redundancy(planted, Replacement.of(planted)).features
    sources = source_agreement(planted, found)
    assert sources.divergence[found.latents == AND] == pytest.approx(1.0)
    assert sources.n[0] == 16


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_outcomes_are_those_of_edited_encodings(random, kind):
    live, corpus = random
    replacement = Replacement.of(live, kind)
    found = redundancy(live, replacement).features
    assert len(found.latents) > 20
    tokens = torch.from_numpy(corpus.blocks.astype(np.int64))
    z = live.model.read(tokens, [live.sae.site])[live.sae.site][torch.from_numpy(corpus.offset > 0)]
    heads = z.view(len(z), 4, -1)
    clean = live.sae.encode(z).numpy()

    def without(chosen):
        edited = heads.clone()
        edited[:, chosen] = replacement.z[0, chosen]
        return live.sae.encode(edited.flatten(1)).numpy()

    singly = np.stack([without([h]) for h in range(4)])
    for row, latent in enumerate(found.latents.tolist()):
        chosen = np.flatnonzero(found.heads[row])
        on = clean[:, latent] > 0
        share = live.index.feature(latent).shares.dfa
        assert_array_equal(chosen, np.flatnonzero(share >= 0.1))
        joint, single = without(chosen)[on, latent], singly[chosen][:, on, latent]
        off, none = single == 0, joint == 0
        expected = [
            none & ~off.any(0),
            none & off.all(0),
            none & off.any(0) & ~off.all(0),
            ~none & ~off.any(0),
            ~none & off.any(0),
        ]
        near = np.abs(found.counts[row] - [e.sum() for e in expected]).sum()
        assert near <= 2  # contributions are stored to 14 bits
        lost = (clean[on, latent] - joint).sum(), (clean[on, latent] - single).sum()
        assert_allclose([found.lost_jointly[row], found.lost_singly[row]], lost, rtol=2e-3, atol=1e-3)
        c = (heads[on] - live.model.value_offset(1).view(4, -1)).numpy()
        w = live.sae.W_enc[:, latent].view(4, -1).numpy()
        parts = np.einsum("nhe,he->nh", c, w)[:, chosen]
        r = [np.corrcoef(parts[:, a], parts[:, b])[0, 1] for a, b in combinations(range(len(chosen)), 2)]
        assert_allclose(found.correlation[row], np.mean(r), atol=1e-3)


@pytest.mark.slow
def test_divergences_are_those_of_the_dfa_of_each_token(random):
    live, _ = random
    found = redundancy(live, Replacement.of(live)).features
    sources = source_agreement(live, found, n_places=10**6)
    for row in (0, 5):
        latent, chosen = int(found.latents[row]), found.heads[row]
        between, elsewhere = [], []
        for position in live.index.activations(latent).position.tolist():
            share = np.abs(live.dfa(position, [latent])[0].by_source)
            pairs = {(a, b): jensenshannon(share[a], share[b], 2) ** 2 for a, b in combinations(range(4), 2)}
            between.append(np.mean([d for (a, b), d in pairs.items() if chosen[a] and chosen[b]]))
            other = [d for (a, b), d in pairs.items() if chosen[a] != chosen[b]]
            elsewhere.append(np.mean(other) if other else np.nan)
        assert_allclose(sources.divergence[row], np.mean(between), rtol=1e-8)
        if not chosen.all():
            assert_allclose(sources.elsewhere[row], np.mean(elsewhere), rtol=1e-8)
        assert sources.n[row] == len(between)


@pytest.mark.parametrize("by", DEFINITIONS)
def test_participation_in_every_definition(random, by):
    index = random[0].index
    found = concentration(index, by)
    assert len(found.latents) > 25
    for latent, top, participation in zip(found.latents, found.top, found.participation, strict=True):
        share = getattr(index.feature(int(latent)).shares, by)
        assert_allclose([top, participation], [share.max(), 1 / (share**2).sum()])
        assert index.feature(int(latent)).n_active >= 30
    edges, counts, nulls = found.histogram(10)
    assert counts.sum() == len(found.latents)
    assert (len(edges), edges[-1]) == (11, 1)
    assert set(nulls) == {"dfa": {"random", "permuted"}, "dfa_covariance": {"random", "permuted"}}.get(
        by, {"random"} if by in ("decoder", "encoder") else set()
    )
    assert (found.several.null is None) == (by in ("decoder_out", "encoder_in", "dfa_mean"))


def test_a_feature_that_writes_nothing_has_no_shares_of_its_decoder(random):
    index = random[0].index
    assert index.feature(WRITES_NOTHING).n_active >= 30
    assert index.feature(WRITES_NOTHING).shares.disagreement is None
    assert index.table()["disagreement"][WRITES_NOTHING].as_py() is None
    for by in DEFINITIONS:
        assert (WRITES_NOTHING in concentration(index, by).latents) == (by not in ("decoder", "decoder_out"))


def test_one_planted_head_has_all(planted):
    found = concentration(planted.index, least=1)
    row = found.latents.tolist().index(ONE)
    assert (found.top[row], found.participation[row]) == (pytest.approx(1), pytest.approx(1))


def test_directions_that_mean_nothing_stand_beside(random):
    found = redundancy(random[0], Replacement.of(random[0]))
    assert found.n_nulls > 20
    assert (found.nulls.counts.sum(1) == found.nulls.n).all()
    assert found.several().null is not None
    for outcome in OUTCOMES:
        measure = found.share(outcome)
        assert measure.null is not None
        assert measure.n == len(found.features.latents)


def test_what_does_not_fit_is_named(random, no_type_checks):
    live, _ = random
    with pytest.raises(StudyError, match="mean or zero"):
        redundancy(live, Replacement.of(live, "resample"))
    with pytest.raises(StudyError, match="one of decoder"):
        concentration(live.index, "none")
