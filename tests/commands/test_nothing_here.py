"""Random-weight models: no induction or copying beyond the stated rate; families, with the reason for them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.studies.heads.catalogue import catalogue
from headscope.studies.induction.composite import copy_ranks, induction_features

pytestmark = pytest.mark.slow

SURE = 1e-4  # how rarely a right test fails for a bound
ALPHA = 0.01
N_MODELS, D_SAE = 4, 96


@pytest.fixture(scope="module")
def indexes(random_model, random_corpus, random_sae, tmp_path_factory):
    """Text whose second half repeats the first, so that there are later A's before B's everywhere."""
    found = []
    for seed in range(N_MODELS):
        model = random_model("gpt_neox", seed=seed)
        corpus = random_corpus(model, 60, 33, seed=seed)
        corpus.blocks[:, 17:] = corpus.blocks[:, 1:17]
        corpus.offset[:, 17:] = corpus.offset[:, 1:17]
        sae = random_sae(model, D_SAE, seed=seed)
        sae = replace(sae, W_dec=sae.W_enc.T.contiguous())  # as trained ones nearly are
        folder = tmp_path_factory.mktemp("nothing") / "index"
        build_index(model, [(sae, SAERecord("random", f"sha256:{seed}"))], corpus, folder)
        found.append(LiveIndex(FeatureIndex.open(folder), model, sae))
    return found


def test_features_of_random_models_are_no_induction_features(indexes):
    judged = [induction_features(live, null=False) for live in indexes]
    n = sum(len(of.latents) for of in judged)
    assert n > 200
    assert sum(int((of.behaviour.n_expected() >= 10).sum()) for of in judged) > 100  # they could have passed
    assert sum(len(of.found) for of in judged) <= binom.isf(SURE, n, ALPHA)


def test_tokens_are_copied_at_the_rate_of_chance(indexes):
    """The rank of a feature's own top token in the static table is uniform: 1 % pass at 1 %."""
    ranks = []
    for live in indexes:
        latents = np.arange(D_SAE)
        tokens = live.index.table()["top_logit"].to_numpy()
        for head in range(4):
            ranks.append(copy_ranks(live, latents, tokens, np.full(D_SAE, head)))
    own = np.concatenate(ranks)
    n, floor = len(own), 1 / 98  # the vocabulary has 98 tokens: the first of them is below 1 %
    assert (own <= ALPHA).sum() <= binom.isf(SURE, n, floor)
    assert (own <= ALPHA).sum() >= binom.ppf(SURE, n, floor)
    assert abs(own.mean() - 0.5) < 0.1


def test_families_there_are_and_their_null_says_why(indexes):
    """A random head still reads some tokens more than others; shuffled names of families give as large a share."""
    inside = []
    for live in indexes:
        for card in catalogue(live.index):
            if card.largest.value is not None:
                assert card.clusters
                null = card.largest.null
                inside.append(null.low <= card.largest.value <= null.high)
    assert len(inside) >= 12
    assert np.mean(inside) > 0.5
