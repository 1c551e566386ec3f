"""The hand-built induction transformer: what is known on paper is what is measured."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headscope.attribution import HeadWeights, dfa_by_head, dfa_by_source, direct_logit_effects
from headscope.corpus import Corpus
from headscope.index.build import build_index
from headscope.index.store import FeatureIndex
from headscope.index.tables import SAERecord
from headscope.interventions import constant
from headscope.site import Site
from headscope.studies.heads import head_scores
from planted import BOS, D_HEAD, V, induction_sequences, planted_model, planted_sae

N = 64


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def sae():
    return planted_sae()


@pytest.fixture(scope="module")
def data():
    return induction_sequences(N)


def test_the_token_after_the_first_copy_is_predicted_everywhere(model, data):
    tokens, _, second = data
    assert_close(model.logits(tokens)[:, -1].argmax(-1), second)


def test_scores_are_exactly_those_of_perfect_heads(model):
    scores = head_scores(model, n=15, n_sequences=16)
    assert_close(scores.previous_token[0, 0].item(), 1.0, atol=1e-10, rtol=0)
    assert scores.best("previous_token")[0] == "0.0"
    assert scores.best("induction")[0] == "1.0"


def test_the_induction_score_is_one_on_distinct_tokens(model):
    generator = torch.Generator().manual_seed(0)
    half = torch.stack([1 + torch.randperm(V - 1, generator=generator)[:15] for _ in range(8)])
    tokens = torch.cat([torch.full((8, 1), BOS), half, half], dim=1)
    second = torch.arange(17, 31)  # the first token's earlier copy follows the BOS, whose key is the sink's
    pattern = model.attention(tokens, 1).pattern
    assert_close(pattern[:, 0, second, second - 14], torch.ones(8, 14, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_feature_fires_on_the_last_token_only(model, sae, data):
    tokens, _, second = data
    f = sae.encode(model.read(tokens, [Site("z", 1)])[Site("z", 1)])
    expected = torch.zeros(N, tokens.shape[1], V, dtype=torch.float64)
    expected[torch.arange(N), -1, second] = 0.5
    assert_close(f[:, 1:, 1:V], expected[:, 1:, 1:], atol=1e-10, rtol=0)


def test_dfa_is_all_in_the_induction_head_and_the_source_after_the_first_copy(model, sae, data):
    tokens, where, second = data
    weights = HeadWeights.of(sae, model)
    attention = model.attention(tokens, 1)
    rows, last = torch.arange(N), torch.full((N,), tokens.shape[1] - 1)
    by_head = dfa_by_head(weights, attention.z[:, -1], second)
    assert_close(by_head, torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(N, 2), atol=1e-10, rtol=0)
    by_source = dfa_by_source(weights, attention, rows, last, second)
    expected = torch.zeros_like(by_source)
    expected[rows, 0, where] = 1.0
    assert_close(by_source, expected, atol=1e-10, rtol=0)
    assert_close(by_source.sum((1, 2)) + weights.bias[second], torch.full((N,), 0.5, dtype=torch.float64))


def test_direct_logits_name_the_token(model, sae):
    effects = direct_logit_effects(sae, model, k=1)
    assert_close(effects.top_tokens[:V, 0], torch.arange(V))
    assert_close(effects.top_values[:V, 0], torch.full((V,), 1 - 1 / V, dtype=torch.float64))


def test_mean_ablating_the_induction_head_kills_the_feature_and_the_other_head_does_not(model, sae, data):
    tokens, _, second = data
    site = Site("z", 1)
    z = model.read(tokens, [site])[site]
    mean = z.flatten(0, 1).mean(0)
    for head, expected in ((0, 0.0), (1, 0.5)):
        edited = z.clone()
        block = slice(head * D_HEAD, (head + 1) * D_HEAD)
        edited[..., block] = mean[block]
        f = sae.encode(edited[:, -1])[torch.arange(N), second]
        assert_close(f, torch.full((N,), expected, dtype=torch.float64), atol=1e-10, rtol=0)


def test_without_the_previous_token_head_there_is_no_induction(model, data):
    tokens, _, second = data
    zero = torch.zeros(2 * D_HEAD, dtype=torch.float64)
    with model.edit({Site("z", 0): constant(zero)}):
        predicted = model.logits(tokens)[:, -1]
    assert not (predicted.argmax(-1) == second).any()


def test_the_index_says_all_this_of_every_feature(model, sae, data, tmp_path):
    tokens, _, second = data
    special = torch.cat([torch.full((4, 1), BOS), torch.tensor([[3, 5, 7, 3]]).expand(4, 4)], dim=1)
    blocks = torch.cat([tokens, torch.nn.functional.pad(special, (0, tokens.shape[1] - 5), value=9)]).numpy()
    corpus = Corpus(
        name="planted",
        split="all",
        blocks=blocks,
        documents=("planted",),
        document=np.zeros_like(blocks),
        offset=np.zeros_like(blocks),
        bos=BOS,
    )
    build_index(model, sae, corpus, tmp_path / "index", SAERecord("planted", "none"))
    index = FeatureIndex.open(tmp_path / "index")
    counts = torch.bincount(second, minlength=V)
    for b in range(1, V):
        feature = index.feature(b)
        if b in (5, 9):
            continue  # these also fire in the blocks added at the end
        assert feature["n_active"] == counts[b]
        if counts[b]:
            assert feature["dfa_share"] == pytest.approx([1.0, 0.0], abs=1e-10)
            assert feature["maximum"] == pytest.approx(0.5)
            assert feature["source_tokens"][0] == b
            assert feature["source_shares"][0] == pytest.approx(1.0)
        assert feature["decoder_share"] == pytest.approx([1.0, 0.0])
        assert feature["logit_top_tokens"][0] == b
    both = index.feature(2 * V)
    assert both["n_active"] == 4
    assert both["dfa_share"] == pytest.approx([0.64, 0.36])
    assert both["dfa_mean"] == pytest.approx([0.8 / 1.4, 0.6 / 1.4])
