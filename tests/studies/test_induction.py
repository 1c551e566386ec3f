"""Induction features: the planted ones are found and nothing else, counts are those of slow loops."""

from collections import Counter

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from headscope.errors import StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.studies.induction.behaviour import (
    BigramFinder,
    Reading,
    behaviour,
    compare_rule,
    control_group,
    head_share,
    selected,
    targets,
)
from headscope.studies.induction.composite import Criteria, copy_ranks, induction_features
from headscope.studies.induction.store import save_columns
from headscope.studies.support.active import Text
from induction_index import planted_live
from planted import V


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_live(tmp_path_factory.mktemp("induction") / "index")


@pytest.fixture(scope="module")
def random(random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model("gpt2", vocab_size=20)
    folder = tmp_path_factory.mktemp("induction") / "index"
    sae = random_sae(model, 200)
    build_index(model, [(sae, SAERecord("random", "none"))], random_corpus(model, 200, 48), folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


def slow_counts(index, latent, token, reading):
    """(expected, passed) by a loop over blocks."""
    text, size = Text.of(index), index.block_size
    on = np.zeros(index.n_blocks * size, bool)
    on[index.activations(latent).position] = True
    found = []
    for block in range(index.n_blocks):
        row, counted, is_on = text.tokens[block], text.counted[block], on.reshape(-1, size)[block]
        groups = []
        for a in sorted(set(row.tolist())):
            pairs = [q for q in range(size - 1) if row[q] == a and row[q + 1] == token and counted[q]]
            if pairs:
                same = [q for q in range(size) if row[q] == a and q > pairs[0]]
                later = [q for q in same if q in pairs] if reading.expected == "before B" else same
                groups.append((not is_on[pairs[0]], [bool(is_on[q]) for q in later]))
        groups = [g for g in groups if g[1]]
        match reading.unit:
            case "token":
                found += [(off, value) for off, later in groups for value in later]
            case "bigram":
                found += [(off, all(later)) for off, later in groups]
            case "block":
                found += [(all(o for o, _ in groups), all(all(later) for _, later in groups))] if groups else []
    match reading.first:
        case "ignored":
            return len(found), sum(value for _, value in found)
        case "fails":
            return len(found), sum(off and value for off, value in found)
        case "void":
            return sum(off for off, _ in found), sum(off and value for off, value in found)


@pytest.mark.slow
@pytest.mark.parametrize("reading", Reading.all(), ids=str)
def test_all_readings_are_those_of_a_slow_loop(random, reading):
    latents = [0, 5, 11]
    found = behaviour(random.index, latents, n_blocks=None)
    for row, latent in enumerate(latents):
        n, passed = slow_counts(random.index, latent, int(targets(random.index)[latent]), reading)
        assert found.n_expected(reading)[row] == n > 0
        assert_allclose(found.rate(reading)[row], passed / n)
        assert found.passes(reading, above=0.3)[row] == (passed / n > 0.3)
        assert_allclose(found.estimate(latent, reading).value, passed / n)


def test_a_sample_of_blocks_and_the_whole_in_order_are_the_same_features(random):
    every = behaviour(random.index)
    some = behaviour(random.index, every.latents[:7])
    assert_array_equal(every.counts[:7], some.counts)
    few = behaviour(random.index, every.latents[:7], n_blocks=20)
    assert (few.n_blocks <= 20).all()
    assert (few.n_expected() < some.n_expected()).any()


def test_bigrams_are_text_of_one_block(random):
    text = Text.of(random.index)
    finder, flat = BigramFinder(text), text.tokens.reshape(-1)
    for token in range(1, 20):
        found = finder.of(token, most=None)
        assert (flat[found.first + 1] == token).all()
        assert text.counted.reshape(-1)[found.first].all()
        assert_array_equal(flat[found.later], flat[found.first[found.group]])
        assert_array_equal(found.later // finder.size, found.first[found.group] // finder.size)
        assert (found.later > found.first[found.group]).all()
    assert len(finder.of(10**6).first) == 0


def test_the_planted_features_are_found_and_no_others(planted):
    judged = induction_features(planted, n_blocks=None)
    assert_array_equal(judged.found, np.arange(1, V))
    assert judged.n_null == 0
    rows = np.searchsorted(judged.latents, judged.found)
    assert_allclose(judged.behaviour.rate()[rows], 1.0)
    assert_allclose(judged.sources.share[rows], 1.0, atol=1e-10)
    assert_allclose(judged.sources.by_head[rows], np.tile([1.0, 0.0], (len(rows), 1)), atol=1e-10)
    assert (judged.sources.chance[rows] < 0.2).all()
    assert_allclose(judged.copy_rank[rows], 0)
    assert_array_equal(judged.corruption.n_off[rows], judged.corruption.n[rows])
    assert_allclose(judged.corruption.kept[rows], 0, atol=1e-10)
    assert_array_equal(judged.corruption.n_off_control[rows], 0)
    assert_allclose(judged.corruption.kept_control[rows], 1)
    assert judged.heads().tolist() == [V - 1, 0]


def test_the_feature_of_the_own_token_fails_each_test(planted):
    judged = induction_features(planted, n_blocks=None, null=False)
    own = np.flatnonzero((judged.latents > V) & (judged.latents < 2 * V))
    assert len(own) == V - 1
    for name in ("behaviour", "sources", "corruption"):
        assert not judged.tests[name][own].any()


def test_the_post_s_rule_is_perfect_on_paper(planted):
    judged = induction_features(planted, n_blocks=None, null=False)
    assert set(judged.found) <= set(selected(planted.index, 0))
    ruled = compare_rule(head_share(planted.index, 0)[judged.latents], judged.verdict)
    assert (ruled.recall.value, ruled.n_true, ruled.n) == (1.0, V - 1, len(judged.latents))
    n_false = len(judged.latents) - (V - 1)
    assert ruled.auc.value == pytest.approx(1 - 1 / (2 * n_false))  # latent 0 is all that head's too: where it rests
    other = compare_rule(head_share(planted.index, 1)[judged.latents], judged.verdict)
    assert other.auc.value == pytest.approx(1 / (2 * n_false))


def test_random_weights_have_no_induction_features(random):
    judged = induction_features(random)
    assert len(judged.latents) > 150
    assert len(judged.found) == 0
    assert judged.share().value == 0
    assert judged.share().high < 0.03
    assert judged.share().null.value == 0
    assert judged.heads().sum() == 0


def test_copying_ranks_are_those_of_the_index_for_its_head(random):
    index = random.index
    latents = [j for j in (0, 4, 9, 60) if index.feature(j).alive]
    heads = [index.feature(j).shares.top_head for j in latents]
    ranks = copy_ranks(random, latents, targets(index)[latents], heads)
    assert_allclose(ranks, [index.feature(j).copy_rank for j in latents], atol=1e-6)
    assert np.isnan(copy_ranks(random, [0], [3], [-1])).all()


def test_a_comparison_is_counted_by_hand():
    score = np.array([0.9, 0.7, 0.6, 0.6, 0.2, 0.1])
    verdict = np.array([True, False, True, False, True, False])
    found = compare_rule(score, verdict, at=0.6)
    pairs = [(s > t) + (s == t) / 2 for s in score[verdict] for t in score[~verdict]]
    assert found.auc.value == pytest.approx(np.mean(pairs))
    assert (found.precision.value, found.recall.value) == (0.5, pytest.approx(2 / 3))
    assert (found.precision.null.value, found.recall.null.value) == (0.5, pytest.approx(4 / 6))
    assert_allclose(found.true_rate, [1 / 3, 1 / 3, 2 / 3, 1, 1])
    assert_allclose(found.false_rate, [0, 1 / 3, 2 / 3, 2 / 3, 1])
    assert compare_rule(score, np.zeros(6, bool)).auc.value is None
    with pytest.raises(StudyError, match="NaN"):
        compare_rule(np.full(6, np.nan), verdict)


def test_the_auc_of_the_rule_and_its_interval(random):
    rng = np.random.default_rng(0)
    verdict = rng.random(400) < 0.2
    found = compare_rule(rng.random(400) + 0.3 * verdict, verdict)
    assert found.auc.low < found.auc.value < found.auc.high
    assert found.auc.low > 0.5
    assert found.auc.high - found.auc.low == pytest.approx(0.13, abs=0.05)


def test_control_groups(random):
    index = random.index
    like = np.arange(10)
    plain, matched = control_group(index, 1, n=12, below=0.25), control_group(index, 1, like, below=0.25)
    assert len(plain) == 12
    assert len(matched) == len(set(matched.tolist())) == 10
    assert (head_share(index, 1)[np.concatenate([plain, matched])] < 0.25).all()
    n = index.table()["n_active"].to_numpy()
    gap = abs(np.log(n[matched]).mean() - np.log(n[like]).mean())
    apart = abs(np.log(n[n > 0]).std())
    assert gap < apart
    with pytest.raises(StudyError, match="at least 10"):
        control_group(index, 1, like, below=0.0)


def test_it_is_saved_as_columns(planted):
    judged = induction_features(planted, n_blocks=None, null=False)
    save_columns(planted.index, judged)
    table = planted.index.columns("induction")
    assert np.flatnonzero(table["verdict"].fill_null(False).to_numpy()).tolist() == list(range(1, V))
    counts = Counter(table["head"].to_pylist()[1:V])
    assert counts == {0: V - 1}
    assert table["rate"].to_pylist()[1] == 1.0


def test_what_is_not_there_is_named(planted, no_type_checks):
    index = planted.index
    with pytest.raises(StudyError, match="head 2"):
        selected(index, 2)
    with pytest.raises(StudyError, match="decoder_out"):
        selected(index, 0, share="weights")
    with pytest.raises(StudyError, match="one a feature"):
        behaviour(index, [1, 2], tokens=[3])
    with pytest.raises(StudyError, match=r"rate 1\.5"):
        Criteria(rate=1.5)
    with pytest.raises(StudyError, match="no latents"):
        induction_features(planted, [])
