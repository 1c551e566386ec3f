"""Scores of heads on text without meaning: what is planted, a slow loop, and chance."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headscope.errors import HeadscopeError, ModelError
from headscope.site import Site
from headscope.studies.heads.scores import DEFINITIONS, head_scores, prefix_curves, repeated_tokens
from planted import D_HEAD, OUT, SHARP, E, Head, P, T, V, planted_model

EXACT = {"atol": 1e-10, "rtol": 0}


def test_scores_of_the_planted_heads():
    scores = head_scores(planted_model(), n=15, n_sequences=64)
    assert_close(scores.previous_token[0, 0].item(), 1.0, **EXACT)
    assert scores.best("previous_token") == ("0.0", pytest.approx(1.0))
    assert scores.best("induction")[0] == "1.0"
    low, high = scores.intervals["previous_token"][:, 0, 0].tolist()
    assert (low, high) == pytest.approx((1.0, 1.0))
    assert scores.even["previous_token"] == pytest.approx(np.mean([1 / (d + 1) for d in range(2, 31)]))


def test_a_duplicate_token_head_is_told_from_an_induction_head():
    model = planted_model()
    head = Head(model.module.transformer.h[1].attn, 1)
    for weight in (head.query, head.key):
        weight.zero_()
    head.query[E, :V] = torch.eye(V, dtype=torch.float64) * SHARP * D_HEAD**0.5
    head.key[E, :V] = torch.eye(V, dtype=torch.float64)  # its own token, here and earlier, equally
    scores = head_scores(model, n=15, n_sequences=16)
    assert scores.best("duplicate_token")[0] == "1.1"
    assert 0.4 < scores.duplicate_token[1, 1] <= 0.5
    assert scores.duplicate_token[1, 0] < 0.2
    assert scores.induction[1, 1] < 0.2


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_scores_are_those_of_a_slow_loop(random_model, family):
    model = random_model(family, dtype=torch.float64, n_layers=3)
    n = 9
    scores = head_scores(model, n=n, n_sequences=12, seed=3)
    tokens = repeated_tokens(model, n, 12, 3)
    assert_close(tokens[:, 1 : n + 1], tokens[:, n + 1 :])
    for layer in range(3):
        pattern = model.read(tokens, [Site("pattern", layer)])[Site("pattern", layer)]
        for head in range(4):
            found = {name: [] for name in DEFINITIONS}
            for row in pattern[:, head]:
                found["previous_token"] += [row[d, d - 1].item() for d in range(2, 2 * n + 1)]
                found["induction"] += [row[d, d - n + 1].item() for d in range(n + 1, 2 * n + 1)]
                found["duplicate_token"] += [row[d, d - n].item() for d in range(n + 1, 2 * n + 1)]
            for name, values in found.items():
                mean = getattr(scores, name)[layer, head].item()
                assert mean == pytest.approx(np.mean(values), abs=1e-10)
                low, high = scores.intervals[name][:, layer, head].tolist()
                assert low < mean < high


def test_batches_change_nothing_and_few_sequences_have_no_interval(random_model, monkeypatch):
    model = random_model(dtype=torch.float64)
    whole = head_scores(model, n=8, n_sequences=9)
    curves = prefix_curves(model, longest=3, length=40, n_sequences=9)
    monkeypatch.setattr("headscope.studies.heads.scores._BATCH_TOKENS", 40)
    pieces = head_scores(model, n=8, n_sequences=9)
    for name in DEFINITIONS:
        assert_close(getattr(pieces, name), getattr(whole, name), **EXACT)
        assert whole.intervals[name].isnan().all()
    again = prefix_curves(model, longest=3, length=40, n_sequences=9)
    assert_close(again.attention, curves.attention, **EXACT)
    assert_close(again.null, curves.null, **EXACT)
    assert curves.interval.isnan().all()


# ------------------------------------------------------------------------------------------------------- prefix curves
def long_prefix_model():
    """The planted model with L0H1 copying the token two before, and L1H1 matching two tokens at once.

    L1H0 attends to s where the token before s is the current one; L1H1 where also the one before that is the previous
    one. Its sink at the BOS has three quarters of the score of a full match, so half a match is not enough.
    """
    model = planted_model()
    before, both = Head(model.module.transformer.h[0].attn, 1), Head(model.module.transformer.h[1].attn, 1)
    eye, score = torch.eye(V, dtype=torch.float64), SHARP * D_HEAD**0.5
    before.query[P, :T] = torch.eye(T, dtype=torch.float64) * score
    before.key[P, 2 : T + 2] = torch.eye(T, dtype=torch.float64)  # what position s + 2 asks for
    before.value[E, :V] = eye
    before.output[:V, OUT] = eye
    previous = slice(V + T, 2 * V + T)
    for weight in (both.query, both.key):
        weight.zero_()
    both.query[E, :V] = both.query[previous, V : 2 * V] = eye * score * 2
    both.key[previous, :V] = both.key[OUT, V : 2 * V] = eye
    both.query_bias[2 * V] = score * 3
    both.key[E.start, 2 * V] = 1.0
    both.key[previous.start] = both.key[OUT.start] = 0.0  # nothing counts as preceded by the BOS
    return model


def test_a_long_prefix_head_rises_and_a_short_prefix_head_does_not():
    curves = prefix_curves(long_prefix_model(), longest=4, length=23, n_sequences=16)
    assert (curves.n_pairs, curves.n_sequences) == (2, 16)
    expected = torch.zeros(4, 2, dtype=torch.float64)
    expected[:, 0], expected[1:, 1] = 1.0, 1.0
    assert_close(curves.attention[:, 1], expected, **EXACT)
    assert_close(curves.interval[0, :, 1], expected, **EXACT)
    assert_close(curves.gain[1], torch.tensor([0.0, 1.0], dtype=torch.float64), **EXACT)
    assert curves.null[:, 1].max() < 1e-6
    assert curves.attention[:, 0, 0].max() < 1e-6


def test_nothing_is_found_in_a_random_model(random_model):
    """Random heads attend to what they attend to whether anything is copied or not."""
    curves = prefix_curves(random_model(n_layers=2), longest=4, length=64, n_sequences=48)
    low, high = curves.interval
    inside = (low <= curves.null) & (curves.null <= high)
    assert inside.float().mean() > 0.5
    assert curves.gain.abs().max() < 0.2
    scores = head_scores(random_model(n_layers=2), n=20, n_sequences=32)
    assert scores.induction.max() < 0.3


def test_what_cannot_be_measured(random_model):
    model = random_model()
    with pytest.raises(ModelError, match="two copies of 40"):
        head_scores(model, n=40)
    with pytest.raises(HeadscopeError, match="0 sequences"):
        head_scores(model, n=8, n_sequences=0)
    with pytest.raises(ModelError, match="65 distinct"):
        prefix_curves(model, length=65)
    with pytest.raises(ModelError, match="25 distinct"):
        prefix_curves(planted_model(), length=25, longest=2)
    with pytest.raises(HeadscopeError, match="at least 21"):
        prefix_curves(model, length=20)
