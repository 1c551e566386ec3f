"""Heads by the features they make: sums, clusters, effective numbers and their nulls."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from headscope.corpus import Corpus
from headscope.errors import StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.store import FeatureIndex
from headscope.studies.heads.catalogue import catalogue, families, head_mass, token_class
from planted import BOS, V, induction_sequences, planted_model, planted_sae


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The planted SAE, and one more feature of the induction head: that it found nothing and rests on the BOS."""
    tokens, _, second = induction_sequences(300)
    blocks = torch.cat([tokens, second[:, None]], dim=1).numpy().astype(np.int32)
    document = np.repeat(np.arange(len(blocks))[:, None], blocks.shape[1], axis=1)
    offset = np.repeat(np.arange(blocks.shape[1])[None], len(blocks), axis=0)
    corpus = Corpus("planted", "all", blocks, tuple(map(str, range(len(blocks)))), document, offset, BOS)
    model, sae = planted_model(), planted_sae()
    sae.W_enc[:, 2 * V] = 0
    sae.W_enc[BOS, 2 * V] = 1.0
    sae.b_enc[2 * V] = -0.5
    sae.W_enc[:, [BOS, V + BOS]] = 0
    folder = tmp_path_factory.mktemp("catalogue") / "index"
    build_index(model, [(sae, SAERecord("planted", "none"))], corpus, folder)
    return FeatureIndex.open(folder)


@pytest.fixture(scope="module")
def random(random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model("gpt2")
    folder = tmp_path_factory.mktemp("catalogue") / "index"
    build_index(model, [(random_sae(model, 120), SAERecord("r", "none"))], random_corpus(model, 100, 32), folder)
    return FeatureIndex.open(folder)


@pytest.mark.slow
def test_mass_is_the_summed_positive_dfa(random):
    mass = head_mass(random)
    assert len(mass.values) > 10
    for latent in (0, 3, 50):
        heads = random.activations(latent).heads.astype(np.float64)
        assert_allclose(mass.total[latent], np.maximum(heads, 0).sum(0))


def test_a_polysemantic_head_has_its_families_and_an_effective_number(planted):
    copying, own = catalogue(planted)
    assert families(planted, 0)[2 * V].startswith("BOS > ")
    assert {name for name in families(planted, 0)[1:V] if name} == {"copies other"}
    assert {cluster.family.split()[0] for cluster in copying.clusters} == {"copies", "BOS"}
    assert {cluster.family for cluster in own.clusters} == {"copies other"}
    share = copying.clusters[0].share
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert copying.effective_families.value == pytest.approx(np.exp(entropy))
    assert copying.largest.value == share > 0.5
    assert copying.largest.missing  # every document has one induction: resampling them says nothing
    assert copying.top[0] == 2 * V
    assert copying.top_in_one == 9
    assert own.effective_families.value == pytest.approx(1)
    assert own.top_in_one == 10
    assert V - 2 < own.effective_features.value <= V - 1


def test_families_of_ones_own(planted):
    names = ["induction" if 1 <= j < V else "other" for j in range(2 * V + 1)]
    copying, own = catalogue(planted, family=names)
    assert {c.family: c.n for c in copying.clusters} == {"other": 1, "induction": V - 1}
    assert {c.family: c.n for c in own.clusters} == {"other": V - 1}


def test_effective_numbers_by_hand(random):
    mass, names = head_mass(random), [str(j % 3) for j in range(120)]
    for card in catalogue(random, mass=mass, family=names):
        q = mass.total[:, card.head]
        share = q[q > 0] / q.sum()
        assert_allclose(card.effective_features.value, np.exp(-(share * np.log(share)).sum()))
        of_families = np.array([q[k::3].sum() for k in range(3)]) / q.sum()
        assert_allclose(card.largest.value, of_families.max())
        assert_allclose([c.share for c in card.clusters], np.sort(of_families)[::-1])
        assert card.effective_features.low < card.effective_features.high


def test_families_that_have_nothing_to_do_with_heads_are_within_their_null(random):
    names = np.random.default_rng(0).choice(list("abcde"), 120).tolist()
    for card in catalogue(random, family=names):
        for measure in (card.effective_families, card.largest):
            assert measure.null.low <= measure.value <= measure.null.high


@pytest.mark.parametrize("by", ["decoder", "decoder_out", "encoder", "encoder_in"])
def test_weights_have_no_interval(random, by):
    live = random.table()["n_active"].to_numpy() > 0
    for card in catalogue(random, by=by):
        assert card.n_features == live.sum()
        assert (card.effective_features.low, card.by) == (None, by)
        weights = random.shares[by][:, card.head] * live
        assert card.top[0] == weights.argmax()


def test_classes_of_tokens():
    expected = {
        b"\n    ": "newline or indent",
        b" ": "space",
        b" 12": "digit",
        b"my_name": "name",
        b" The": "capital",
        b" the": "word start",
        b"ing": "word part",
        b"(": "bracket or quote",
        b" ==": "punctuation",
        b"\xff": "other",
    }
    assert {token: token_class(token) for token in expected} == expected
    assert token_class(b"the", special=True) == "special"


def test_what_is_not_there_is_named(random):
    with pytest.raises(StudyError, match="head 4"):
        families(random, 4)
    with pytest.raises(StudyError, match="weights 'none'"):
        catalogue(random, by="none")
    with pytest.raises(StudyError, match="one a latent"):
        catalogue(random, family=["a"])
