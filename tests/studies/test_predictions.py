"""The model's p(X) at what a feature misses, against a softmax written out."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import mannwhitneyu

from headscope.errors import IndexFormatError, ProxyError, StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.store import FeatureIndex
from headscope.proxies import evaluate
from headscope.studies.when.predictions import next_token_probability, predictions

PROXY = 'token_in(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"])'
N_BLOCKS, BLOCK = 40, 16


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("gpt2", dtype=torch.float64)


@pytest.fixture(scope="module")
def corpus(random_corpus, model):
    return random_corpus(model, N_BLOCKS, BLOCK)


@pytest.fixture(scope="module")
def index(model, corpus, random_sae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions") / "index"
    sae = random_sae(model, 12)
    sae.b_enc[7] = -1e4
    build_index(model, [(sae, SAERecord("s", "sha256:s"))], corpus, folder)
    return FeatureIndex.open(folder)


@pytest.fixture(scope="module")
def probability(model, corpus):
    """[position, token]: of all the corpus, one block at a time."""
    rows = [model.logits(torch.from_numpy(block.astype(np.int64))[None])[0] for block in corpus.blocks]
    return torch.cat(rows).double().softmax(-1).numpy()


@pytest.fixture(scope="module")
def latent(index) -> int:
    """One that is active on about half of the tokens."""
    density = index.table()["density"].to_numpy()
    return int(np.argmin(np.abs(density - 0.5)))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_probability_of_a_set_of_tokens_at_any_positions(index, model, probability, batch_size) -> None:
    rng = np.random.default_rng(0)
    position, tokens = rng.permutation(N_BLOCKS * BLOCK)[:70], np.array([4, 9, 50])
    found = next_token_probability(index, model, tokens, position, batch_size=batch_size)
    assert_allclose(found, probability[position][:, tokens].sum(1), rtol=1e-10)


def test_no_position_takes_no_run(index, model) -> None:
    assert len(next_token_probability(index, model, np.array([1]), np.array([], dtype=np.int64))) == 0


def test_each_kind_is_what_it_is_called(index, model, probability, latent) -> None:
    found = predictions(index, model, latent, PROXY, ["x", 9], n_examples=10_000)
    ids = sorted([index.token_id("x"), 9])
    assert found.tokens == tuple(ids)
    active = np.zeros(N_BLOCKS * BLOCK, bool)
    active[index.activations(latent).position] = True
    text = np.asarray(index.sql('SELECT "offset" > 0 AS t FROM tokens')["t"])
    mask = evaluate(PROXY, index)
    kinds = {
        "false_negatives": mask & ~active,
        "true_positives": mask & active,
        "elsewhere": text & ~mask & ~active,
    }
    for name, kind in kinds.items():
        group = getattr(found, name)
        assert group.n == kind.sum()
        assert_array_equal(group.position, np.flatnonzero(kind))
        assert_allclose(group.probability, probability[kind][:, ids].sum(1), rtol=1e-10)
        assert_allclose(group.mean.value, group.probability.mean())
        assert group.mean.low <= group.mean.value <= group.mean.high
    hit, missed = found.true_positives.probability, found.false_negatives.probability
    assert_allclose(found.auc.value, mannwhitneyu(hit, missed).statistic / (len(hit) * len(missed)), rtol=1e-12)
    assert found.auc.low < found.auc.value < found.auc.high


def test_a_random_part_is_looked_at(index, model, latent) -> None:
    found = predictions(index, model, latent, PROXY, [9], n_examples=31)
    everything = predictions(index, model, latent, PROXY, [9], n_examples=10_000)
    for name in ("false_negatives", "true_positives", "elsewhere"):
        some, every = getattr(found, name), getattr(everything, name)
        assert some.n == every.n > 31
        assert len(some.position) == 31 == some.mean.n
        assert set(some.position) < set(every.position)


def test_the_top_logit_token_is_what_is_asked_for_by_default(index, model, latent) -> None:
    found = predictions(index, model, latent, PROXY, n_examples=31)
    assert found.tokens == (index.feature(latent).logit_top[0][0],)


def test_of_a_dead_feature_there_are_no_true_positives(index, model) -> None:
    found = predictions(index, model, 7, PROXY, [9])
    assert found.true_positives.n == len(found.true_positives.probability) == 0
    assert found.true_positives.mean.missing == "0 tokens: at least 30 are needed"
    assert found.auc.value is None
    assert "true positives" in found.auc.missing


def test_another_model_is_refused(index, random_model) -> None:
    with pytest.raises(IndexFormatError, match="model"):
        predictions(index, random_model("gpt2", seed=1), 0, PROXY)


def test_no_token_and_no_example(index, model) -> None:
    with pytest.raises(StudyError):
        predictions(index, model, 0, PROXY, [])
    with pytest.raises(StudyError):
        predictions(index, model, 0, PROXY, n_examples=0)
    with pytest.raises(ProxyError, match="pieces"):
        predictions(index, model, 0, PROXY, ["two words"])
