"""DFA of any token and feature, on demand: it sums, it is what the index stored, and it refuses other weights."""

from collections import defaultdict

import numpy as np
import pytest
from numpy.testing import assert_allclose

from headscope.errors import IndexFormatError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def live(request, random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model(request.param)
    sae = random_sae(model, 40)
    corpus = random_corpus(model)
    folder = tmp_path_factory.mktemp("live") / "index"
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae, sae_hash="sha256:0"), corpus


def test_parts_sum_to_the_pre_activation_whether_active_or_not(live):
    index, corpus = live
    position = corpus.block_size + 9
    found = index.dfa(position, list(range(40)))
    assert {dfa.activation > 0 for dfa in found} == {True, False}
    for dfa in found:
        assert_allclose(dfa.by_source.sum() + dfa.bias, dfa.pre, atol=1e-4)
        assert_allclose(dfa.pattern.sum(1), 1, atol=1e-5)
        assert dfa.tokens.tolist() == corpus.blocks[1, :10].tolist()


def test_it_is_what_the_index_stored_of_its_examples(live):
    index, _ = live
    n, at_position = 0, defaultdict(list)
    for latent in range(40):
        for example in (e for group in index.index.examples(latent) for e in group.examples):
            at_position[example.position].append((latent, example))
    for position, chosen in at_position.items():
        found = index.dfa(position, [latent for latent, _ in chosen])
        for dfa, (_, example) in zip(found, chosen, strict=True):
            assert_allclose(dfa.pre, example.pre, atol=1e-4)
            assert_allclose(dfa.by_head, example.heads, atol=1e-4)
            at = [source.position for source in example.sources]
            assert_allclose(dfa.by_source[:, at].T, [source.heads for source in example.sources], atol=1e-4)
            assert_allclose(dfa.by_head - dfa.by_source[:, at].sum(1), example.rest, atol=1e-4)
            n += 1
    assert n > 200


def test_a_feature_is_active_where_the_index_says(live):
    index, corpus = live
    stored = index.index.activations(3)
    where = dict(zip(stored.position.tolist(), stored.activation.tolist(), strict=True))
    text = np.flatnonzero(corpus.blocks.reshape(-1) != corpus.bos)
    for position in text[::5]:
        (dfa,) = index.dfa(int(position), [3])
        assert_allclose(dfa.activation, where.get(int(position), 0.0), atol=1e-5)


def test_other_weights_are_refused_by_name(live, random_model, random_sae):
    index, _ = live
    other = random_model(index.model.spec.family, seed=1)
    with pytest.raises(IndexFormatError, match="model sha256:"):
        LiveIndex(index.index, other, index.sae)
    with pytest.raises(IndexFormatError, match="SAE sha256:1"):
        LiveIndex(index.index, index.model, index.sae, sae_hash="sha256:1")
    with pytest.raises(IndexFormatError, match="41 latents"):
        LiveIndex(index.index, index.model, random_sae(index.model, 41))


def test_a_position_or_latent_that_does_not_exist_is_named(live):
    index, corpus = live
    with pytest.raises(IndexFormatError, match="block"):
        index.dfa(corpus.n_tokens, [0])
    with pytest.raises(IndexFormatError, match="latent 40"):
        index.dfa(0, [40])
