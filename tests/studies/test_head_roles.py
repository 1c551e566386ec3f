"""Roles of heads: the planted ones are found, and in models at random none, at the rate that the test states."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch.testing import assert_close

from headscope.errors import HeadscopeError, ModelError
from headscope.studies.heads.roles import copying, head_roles, shuffles
from headscope.studies.heads.scores import head_scores
from planted import planted_model

SURE = 1e-4  # how rarely a right test fails for a bound


@pytest.fixture(scope="module")
def planted():
    return head_roles(planted_model(), n=12, n_sequences=8, n_shuffles=99)


def test_the_planted_heads_have_their_roles_and_no_others(planted):
    found = {(layer, head): planted.names(layer, head) for layer in range(2) for head in range(2)}
    assert found[0, 0] == ("previous_token",)
    assert found[0, 1] == ()
    assert found[1, 0] == ("induction", "copying")
    assert found[1, 1] == ("copying",)  # it attends to itself: none of the three patterns
    assert planted.of("induction").p[1, 0] == 0.01
    with pytest.raises(HeadscopeError, match=r"head 2\.0"):
        planted.names(2, 0)


def test_the_statistic_is_the_score(planted):
    model = planted_model()
    scores = head_scores(model, n=12, n_sequences=8)
    assert_close(planted.of("induction").statistic, scores.induction.numpy())
    assert_close(planted.of("previous_token").statistic, scores.previous_token.numpy())


def test_copying_is_that_of_a_slow_loop(random_model):
    model = random_model("llama", dtype=torch.float64)
    found = copying(model)
    assert found.n == 98
    for layer in range(2):
        values = model.token_values(layer)
        for head in range(4):
            output = model.W_O(layer).reshape(4, 12, -1)[head]
            logits = values[:, head] @ output @ model.logit_directions
            copies = [float((logits[t] > logits[t, t]).double().mean() < 0.01) for t in range(98)]
            assert found.share[layer, head].item() == pytest.approx(np.mean(copies))
            low, high = found.interval[:, layer, head].tolist()
            assert low <= np.mean(copies) <= high


def test_a_shuffle_keeps_every_entry_and_nothing_of_their_order(random_model):
    model = random_model("llama", dtype=torch.float64)
    before = [p.clone() for p in model.module.parameters()]
    for i, shuffled in enumerate(shuffles(model, 2, 0)):
        for own, other in zip(before, shuffled.module.parameters(), strict=True):
            assert_close(own.flatten().sort().values, other.flatten().sort().values, rtol=0, atol=0)
        assert not torch.equal(before[0], next(shuffled.module.parameters()))
        own = shuffled.logit_directions
        norm = shuffled.module.model.norm.weight[:, None] * shuffled.module.lm_head.weight.T
        assert_close(own, norm - norm.mean(1, keepdim=True))  # of this shuffle, not of the one before
        assert i < 2
    for own, after in zip(before, model.module.parameters(), strict=True):
        assert torch.equal(own, after)


@pytest.mark.slow
@pytest.mark.parametrize(("n_shuffles", "n_models", "family"), [(19, 14, "gpt_neox"), (99, 2, "gpt2")])
def test_models_at_random_have_roles_at_the_stated_rate(random_model, n_shuffles, n_models, family):
    """A score is one draw among its nulls: p is 1 / (1 + n_shuffles) or less in that share of heads, and no more."""
    alpha = 1 / (1 + n_shuffles)
    hits = dict.fromkeys(("previous_token", "induction", "duplicate_token", "copying"), 0)
    for seed in range(n_models):
        model = random_model(family, seed=seed)
        found = head_roles(model, n=8, n_sequences=2, n_tokens=98, n_shuffles=n_shuffles, seed=seed)
        for test in found.tests:
            hits[test.role] += int((test.p <= alpha + 1e-12).sum())
            assert test.found(alpha).sum() <= (test.p <= alpha + 1e-12).sum()
    n = n_models * 8
    for role, k in hits.items():
        assert k <= binom.isf(SURE, n, alpha), (role, k, n)
    attention = sum(k for role, k in hits.items() if role != "copying")  # copying has ties, and so is below its rate
    if n_shuffles == 19:
        assert attention >= binom.ppf(SURE, 3 * n, alpha)


def test_what_cannot_be_tested(random_model):
    model = random_model()
    with pytest.raises(HeadscopeError, match="0 shuffles"):
        head_roles(model, n_shuffles=0)
    with pytest.raises(ModelError, match="two copies of 40"):
        head_roles(model, n=40)
