"""The hand-built induction transformer: what is known on paper is what is measured."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.testing import assert_close

from headscope.attribution import HeadWeights, dfa_by_head, dfa_by_source, direct_logit_effects
from headscope.corpus import Corpus
from headscope.index.build import SAERecord, build_index
from headscope.index.config import IndexPlan
from headscope.index.store import FeatureIndex
from headscope.interventions import constant
from headscope.site import Site
from headscope.studies.heads.scores import head_scores
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


@pytest.fixture(scope="module")
def index(model, sae, data, tmp_path_factory):
    """Of the sequences, and of four blocks that make the feature of two heads fire and repeat one text."""
    special = torch.cat([torch.full((4, 1), BOS), torch.tensor([[3, 5, 7, 3]]).expand(4, 4)], dim=1)
    blocks = torch.cat([data[0], torch.nn.functional.pad(special, (0, data[0].shape[1] - 5), value=9)]).numpy()
    offset = np.indices(blocks.shape)[1]
    corpus = Corpus("planted", "all", blocks, ("planted",), np.zeros_like(blocks), offset, BOS)
    out = tmp_path_factory.mktemp("planted") / "index"
    plan = IndexPlan(thresholds=(0.0, 0.45, 0.7), part_tokens=200)
    return FeatureIndex.open(build_index(model, [(sae, SAERecord("planted", "none"))], corpus, out, plan=plan)[0])


@pytest.fixture(scope="module")
def induced(data):
    """The tokens by induction at the end of the sequences, but for those that the added blocks have too."""
    counts = torch.bincount(data[2], minlength=V)
    return {b: int(counts[b]) for b in range(1, V) if counts[b] and b not in (5, 7, 9)}


def test_the_index_finds_one_head_and_one_source_of_every_induction_feature(index, induced, data):
    assert len(induced) > 10
    tokens, where, second = data
    for b, n in induced.items():
        feature, sources = index.feature(b), index.sources(b)
        assert feature.n_active == n
        assert [feature.mean, feature.maximum] == pytest.approx([0.5, 0.5])
        assert feature.skew is None  # constant
        assert feature.shares.dfa == pytest.approx([1.0, 0.0], abs=1e-10)
        assert feature.shares.dfa_mean == pytest.approx([1.0, 0.0], abs=1e-10)
        assert feature.shares.dfa_covariance is None
        assert feature.shares.decoder == pytest.approx([1.0, 0.0])
        assert feature.shares.encoder_in == pytest.approx([1.0, 0.0])
        assert feature.shares.participation == pytest.approx(1.0)
        assert feature.shares.disagreement == pytest.approx(0.0, abs=1e-6)
        first = sources.tokens[0]
        assert (first.token, first.n) == (b, n)
        assert [first.share, first.share_linear, sources.kept] == pytest.approx([1.0] * 3)
        assert sources.bos_share == pytest.approx(0.0, abs=1e-12)
        assert first.share_by_head[0] == pytest.approx(1.0)
        assert first.attention == pytest.approx([1.0, 0.0], abs=1e-10)
        assert first.attention_elsewhere[0] < 0.1
        for example in index.examples(b)[0].examples:
            block, query = divmod(example.position, tokens.shape[1])
            assert int(second[block]) == b
            assert query == tokens.shape[1] - 1
            assert example.sources[0].position == int(where[block])
            assert example.sources[0].heads == pytest.approx([1.0, 0.0])
            assert example.rest == pytest.approx([0.0, 0.0], abs=1e-7)
            assert example.active_at.tolist() == [query]


def test_an_induction_feature_copies(index, induced):
    for b in induced:
        feature = index.feature(b)
        assert feature.logit_top[0][0] == b
        assert feature.copy_top[0] == (b, pytest.approx(1.0))
        assert feature.copy_rank == 0


def test_thresholds_cut_where_they_say(index, induced):
    for b in induced:
        assert index.sources(b, 0.45).n_active == index.sources(b, 0.0).n_active
        assert index.sources(b, 0.7) is None


def test_the_feature_of_two_heads_has_their_shares_exactly(index):
    both = index.feature(2 * V)
    assert both.n_active == 4
    assert both.shares.dfa == pytest.approx([0.64, 0.36])
    assert both.shares.dfa_mean == pytest.approx([0.8 / 1.4, 0.6 / 1.4])
    assert both.shares.decoder == pytest.approx([0.8 / 1.4, 0.6 / 1.4])
    assert both.shares.participation == pytest.approx(1 / (0.64**2 + 0.36**2))
    assert both.shares.dfa_covariance is None
    sources = {t.token: t for t in index.sources(2 * V).tokens}
    assert [sources[5].share, sources[3].share] == pytest.approx([0.64, 0.36])
    assert sources[5].attention == pytest.approx([1.0, 0.0], abs=1e-10)
    assert sources[3].n == 8  # both 3s of each block are kept, and only the second is attended to
    assert sources[3].attention == pytest.approx([0.0, 0.5], abs=1e-10)
    top = index.examples(2 * V)[0]
    assert len(top.examples) == 1  # four times the same text
    assert top.examples[0].duplicates == 3


def test_features_that_fire_together_are_correlated(index):
    """The feature of two heads fires exactly where token 5 by induction does on a 3."""
    both = index.feature(2 * V)
    found = {c.latent: c for c in both.correlated}
    assert {5, V + 3} <= set(found)
    assert found[5].decoder_cosine == pytest.approx(0.8)
    assert found[V + 3].decoder_cosine == pytest.approx(0.6)
    dense = np.zeros((2 * V + 1, index.n_blocks * index.block_size))
    for j in range(2 * V + 1):
        own = index.activations(j)
        dense[j, own.position] = own.activation
    text = np.concatenate([index.tokens_of(b) for b in range(index.n_blocks)]) != BOS
    r = np.corrcoef(dense[[2 * V, 5]][:, text])[0, 1]
    assert found[5].pearson == pytest.approx(r, rel=1e-5)


def test_the_feature_of_the_own_token_is_the_other_heads(index):
    for b in (1, 4, 11):
        feature = index.feature(V + b)
        assert feature.shares.dfa == pytest.approx([0.0, 1.0], abs=1e-10)
        assert index.sources(V + b).tokens[0].token == b
        assert feature.copy_rank == 0


def test_null_controls_are_not_what_features_are(index):
    """An encoder whose heads are exchanged is made by the other head; a random direction by both."""
    nulls = index.nulls()
    permuted = {n.latent: n for n in nulls if n.kind == "permuted" and n.latent < 2 * V and n.n_active}
    assert permuted
    for latent, null in permuted.items():
        assert index.feature(latent).shares.top_head != int(np.argmax(null.dfa))
        assert null.dfa.max() == pytest.approx(1.0, abs=1e-6)
    random = np.array([n.dfa.max() for n in nulls if n.kind == "random" and n.n_active])
    assert len(random)
    assert random.mean() < 0.95


def test_no_number_is_nan_but_those_that_say_so(index):
    """Head 1 contributes exactly nothing to an induction feature, so of its DFA no token has a share."""
    said = {"share_by_head", "attention_elsewhere", "kept_by_head", "bos_share_by_head"}
    for name in ("features", "sources", "source_totals", "groups", "examples", "nulls"):
        table = index.sql(f"SELECT * FROM {name}")
        for column in table.column_names:
            values = table[column].combine_chunks()
            values = values.flatten() if pa.types.is_list(values.type) else values
            if pa.types.is_floating(values.type) and column not in said:
                assert not np.isnan(values.drop_null().to_numpy()).any(), f"{name}.{column}"
