"""Surveys: samples that any machine draws the same, shares with intervals, agreement of annotators."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from explorer_source import FakeIndex
from headscope import cli, jobs
from headscope.errors import LabelError
from headscope.index.labels import VERDICTS, Label, Labels, card_hash
from headscope.stats import wilson
from headscope.studies import survey as module
from headscope.studies.survey import N_STRATA, Sample, cohens_kappa, draw, survey

YES, UNSURE, NO = VERDICTS
FIRST = Sample("first", 50)


class Index(FakeIndex):
    """Of the densities given; by default like the post's: 38 of the first 50 latents are alive."""

    def __init__(self, density=None):
        self.density = np.array([0.01 * (i % 50 < 38) for i in range(200)] if density is None else density)
        super().__init__(len(self.density))

    def table(self):
        return pa.table({"density": self.density})


def label(index, latent, verdict=YES, annotator="ann", *, blind=False, card=None, number=[0]):  # noqa: B006
    number[0] += 1
    return Label(
        verdict=verdict,
        id=f"{number[0]:016x}",
        latent=latent,
        annotator=annotator,
        blind=blind,
        queue="",
        card=card_hash(index, latent, blind=blind) if card is None else card,
        time="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture(autouse=True)
def quick_hash(monkeypatch):
    """The hash of a card that names its index's say: its own tests are elsewhere."""

    def fake(index, latent, *, blind=False):
        return f"sha256:{latent * 2 + blind:064x}"

    monkeypatch.setattr(module, "card_hash", fake)
    monkeypatch.setitem(globals(), "card_hash", fake)


# ------------------------------------------------------------------------------------------------------------- samples
@pytest.mark.parametrize("name", ["first:50", "first:1", "random:50:0", "stratified:7:123"])
def test_a_name_says_all_of_a_sample(name):
    assert Sample.parse(name).name == name


@pytest.mark.parametrize(
    "text",
    ["", "first", "first:0", "first:-1", "first:50:0", "random:50", "random:5:x", "last:5:0", "first:٣", "first:50\n"],
)
def test_what_is_no_sample_is_refused(text):
    with pytest.raises(LabelError, match="sample"):
        Sample.parse(text)


@pytest.mark.parametrize("text", ["first:" + 50 * "9", "random:50:0 ", "x" * 10**5])
def test_what_is_no_sample_is_refused_without_repeating_it_at_length(text):
    with pytest.raises(LabelError, match="sample") as error:
        Sample.parse(text)
    assert len(str(error.value)) < 300


def test_the_first_features_are_the_posts():
    drawn = draw(Index(), FIRST)
    assert drawn.latents == tuple(range(50))
    assert len(drawn.live) == 38
    assert (drawn.n_latents, drawn.n_alive) == (200, 152)


@pytest.mark.parametrize("design", ["random", "stratified"])
def test_a_drawn_sample_is_live_without_repeats_and_the_same_again(design):
    rng = np.random.default_rng(0)
    index = Index(np.where(rng.random(3000) < 0.3, 0, 10 ** rng.uniform(-6, -1, 3000)))
    drawn = draw(index, Sample(design, 500, 3))
    assert len(set(drawn.latents)) == 500
    assert drawn.live == drawn.latents
    assert sorted(i for s in drawn.strata for i in s.latents) == sorted(drawn.latents)
    assert sum(s.population for s in drawn.strata) == drawn.n_alive == (index.density > 0).sum()
    assert draw(index, Sample(design, 500, 3)) == drawn
    assert set(draw(index, Sample(design, 500, 4)).latents) != set(drawn.latents)
    assert set(draw(index, Sample(design, 100, 3)).latents) <= set(drawn.latents), "a larger one holds the smaller"


def test_a_random_sample_is_pinned():
    """The draw depends on no library's generator, so it may never change."""
    assert draw(Index(), Sample("random", 5, 0)).latents == (87, 15, 185, 76, 115)


def test_a_random_sample_is_even():
    counts = np.zeros(100)
    for seed in range(2000):
        counts[list(draw(Index(np.full(100, 0.5)), Sample("random", 10, seed)).latents)] += 1
    assert np.sum((counts - 200) ** 2 / (200 * 0.9)) < 150, "chi squared with 99 degrees of freedom, p about 0.0007"


def test_strata_are_equal_ranges_of_log_density_each_feature_in_one():
    index = Index([0, *np.repeat([1e-5, 1.1e-4, 0.9e-3, 0.9e-2, 0.9e-1, 1], [100, 5, 5, 2, 1, 30])])
    drawn = draw(index, Sample("stratified", 20, 0))
    assert [s.population for s in drawn.strata] == [100, 10, 2, 1, 30]
    assert [len(s.latents) for s in drawn.strata] == [5, 6, 2, 1, 6], "those with room share what a small one cannot"
    for stratum in drawn.strata:
        assert np.all(index.density[list(stratum.latents)] >= stratum.low)
        assert np.all(index.density[list(stratum.latents)] <= stratum.high)
    first = [next(i for i, s in enumerate(drawn.strata) if latent in s.latents) for latent in drawn.latents[:5]]
    assert first == [0, 1, 2, 3, 4], "one of each, then the next of each"


@pytest.mark.parametrize("design", ["random", "stratified"])
def test_a_sample_of_all_is_all(design):
    for density in (np.full(30, 0.5), 10 ** -np.linspace(1, 5, 30)):
        assert set(draw(Index(density), Sample(design, 30)).latents) == set(range(30))


@pytest.mark.parametrize(
    ("sample", "most"), [(Sample("first", 201), 200), (Sample("random", 153), 152), (Sample("stratified", 153), 152)]
)
def test_more_than_there_are_is_refused(sample, most):
    with pytest.raises(LabelError, match=f"1 to {most}"):
        draw(Index(), sample)


def test_a_dead_dictionary():
    index = Index(np.zeros(60))
    result = survey(index, Labels((), None), FIRST)
    assert (result.drawn.live, result.alive) == ((), wilson(0, 50))
    for design in ("random", "stratified"):
        with pytest.raises(LabelError, match="1 to 0"):
            draw(index, Sample(design, 1))


# --------------------------------------------------------------------------------------------------------------- shares
def test_the_posts_figures():
    """38 of 50 alive and 31 of 38 interpretable: 76 % and 82 %."""
    index = Index()
    result = survey(index, Labels(tuple(label(index, i, YES if i < 31 else NO) for i in range(38)), None), FIRST)
    assert result.alive == wilson(38, 50)
    assert (result.alive.value, round(result.alive.low, 2), round(result.alive.high, 2)) == (0.76, 0.63, 0.86)
    (tally,) = result.tallies
    assert tally.counts == {YES: 31, UNSURE: 0, NO: 7}
    share = tally.interpretable
    for name in ("value", "low", "high"):
        assert getattr(share, name) == pytest.approx(getattr(wilson(31, 38), name), abs=1e-12)
    assert (round(share.value, 2), round(share.low, 2), round(share.high, 2)) == (0.82, 0.67, 0.91)
    rows = {row.name: row for row in result.rows()}
    assert rows["alive in the sample"].value.startswith("76.0 % [62.6, 85.7]")
    assert rows["interpretable, ann"].value == "81.6 % [66.6, 90.8], 31 of 38"
    assert rows["interpretable, ann"].post == "81.6 % [66.6, 90.8]"


def test_unsure_is_not_interpretable_and_left_out_apart():
    index = Index()
    verdicts = [YES] * 6 + [UNSURE] * 4 + [NO] * 10
    (tally,) = survey(index, Labels(tuple(label(index, i, v) for i, v in enumerate(verdicts)), None), FIRST).tallies
    assert tally.interpretable.value == pytest.approx(6 / 20)
    assert tally.decided.value == pytest.approx(6 / 16)
    assert tally.counts == {YES: 6, UNSURE: 4, NO: 10}


def test_only_the_latest_current_label_of_a_live_feature_of_the_sample_counts():
    index = Index()
    labels = [
        label(index, 0, NO),
        label(index, 0, YES, blind=True),
        label(index, 1, NO, card="sha256:" + 64 * "f"),  # stale
        label(index, 40, YES),  # dead
        label(index, 60, YES),  # not in the sample
        label(index, 2, NO, "bob"),
    ]
    result = survey(index, Labels(tuple(labels), "line 7 was cut off"), FIRST)
    ann, bob = result.tallies
    assert (ann.annotator, ann.n, ann.n_stale, ann.n_blind) == ("ann", 1, 1, 1)
    assert (bob.annotator, bob.n, bob.n_stale, bob.n_blind) == ("bob", 1, 0, 0)
    assert (ann.interpretable.value, bob.interpretable.value) == (1, 0)
    notes = "\n".join(result.notes)
    assert "ann judged 1 of 38" in notes
    assert "1 stale" in notes
    assert "line 7 was cut off" in notes
    assert result.agreements == (), "they judged no feature both"


def test_nothing_judged_is_no_number_but_no_failure():
    index = Index()
    assert survey(index, Labels((), None), FIRST).tallies == ()
    stale = Labels((label(index, 1, YES, card="sha256:" + 64 * "f"),), None)
    (tally,) = survey(index, stale, FIRST).tallies
    assert np.isnan(tally.interpretable.value)
    assert "nan" not in str([vars(row) for row in survey(index, stale, FIRST).rows()])


def weighted_index(sizes):
    return Index(np.repeat(10.0 ** np.linspace(-5, -1, N_STRATA), sizes))


def test_a_stratified_share_weighs_by_what_each_stands_for():
    """90 % of the rare features are interpretable and 10 % of the others, which the sample has as many of."""
    index = weighted_index([1000, 10, 10, 10, 10])
    sample = Sample("stratified", 50, 0)
    drawn = draw(index, sample)
    assert [len(s.latents) for s in drawn.strata] == [10] * 5
    given = [
        label(index, i, YES if k < 9 - 8 * (at > 0) else NO)
        for at, s in enumerate(drawn.strata)
        for k, i in enumerate(s.latents)
    ]
    (tally,) = survey(index, Labels(tuple(given), None), sample).tallies
    share = (1000 * 0.9 + 40 * 0.1) / 1040
    assert tally.interpretable.value == pytest.approx(share, abs=1e-12)
    effective = 1040**2 / (10 * 100**2 + 40)  # Kish
    # the ends of Wilson's interval are where the score test is at its limit
    for end, low, high in ((tally.interpretable.low, 1e-9, share), (tally.interpretable.high, share, 1 - 1e-9)):
        root = brentq(lambda p: (share - p) ** 2 * effective - norm.ppf(0.975) ** 2 * p * (1 - p), low, high)
        assert end == pytest.approx(root, abs=1e-9)


def test_a_stratified_share_is_right_on_average_and_its_interval_covers():
    sizes, truth = [400, 200, 100, 60, 40], [0.9, 0.7, 0.5, 0.3, 0.1]
    index = weighted_index(sizes)
    rng = np.random.default_rng(0)
    number = np.repeat(np.arange(N_STRATA), sizes)
    yes = rng.random(sum(sizes)) < np.array(truth)[number]
    shares = []
    for seed in range(300):
        sample = Sample("stratified", 100, seed)
        given = tuple(label(index, i, YES if yes[i] else NO) for i in draw(index, sample).latents)
        shares.append(survey(index, Labels(given, None), sample).tallies[0].interpretable)
    mean = np.mean([share.value for share in shares])
    error = np.std([share.value for share in shares]) / 300**0.5
    assert abs(mean - yes.mean()) < 4 * error
    plain = np.mean([yes[list(draw(index, Sample("stratified", 100, seed)).latents)].mean() for seed in range(20)])
    assert abs(plain - yes.mean()) > 0.1, "without weights it would be wrong"
    covered = np.mean([share.low <= yes.mean() <= share.high for share in shares])
    assert covered >= 0.95


def test_strata_that_an_annotator_did_not_reach_are_named():
    index = weighted_index([10] * 5)
    sample = Sample("stratified", 20, 0)
    given = tuple(label(index, i) for i in draw(index, sample).latents[:3])
    result = survey(index, Labels(given, None), sample)
    assert result.tallies[0].n_by_stratum == (1, 1, 1, 0, 0)
    assert any("none of 2 density ranges" in note for note in result.notes)


@pytest.mark.parametrize(("n", "population", "factor"), [(38, 152, "0.869"), (2, 152, "0.997")])
def test_the_finite_population_is_noted(n, population, factor):
    result = survey(Index(), Labels((), None), Sample("random", n))
    assert any(
        f"{n} of {population} live features without replacement have one {factor}" in note for note in result.notes
    )


def test_a_census_is_noted():
    assert any("All live features" in note for note in survey(Index(), Labels((), None), Sample("first", 200)).notes)


# ------------------------------------------------------------------------------------------------------------ agreement
def naive_kappa(pairs):
    n = len(pairs)
    agreement = sum(a == b for a, b in pairs) / n
    chance = sum(sum(a == v for a, _ in pairs) / n * sum(b == v for _, b in pairs) / n for v in VERDICTS)
    return None if chance == 1 else (agreement - chance) / (1 - chance)


@given(st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS)), min_size=1, max_size=40))
def test_kappa_is_the_formula(pairs):
    table = np.zeros((3, 3), dtype=np.int64)
    for a, b in pairs:
        table[VERDICTS.index(a), VERDICTS.index(b)] += 1
    expected = naive_kappa(pairs)
    if expected is None:
        assert cohens_kappa(table) is None
    else:
        assert cohens_kappa(table) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ([[20, 5, 0], [10, 15, 0], [0, 0, 0]], 0.4),  # the textbook's: 50 proposals, agreement 0.7, chance 0.5
        ([[9, 0, 0], [0, 5, 0], [0, 0, 3]], 1.0),
        ([[0, 5, 0], [5, 0, 0], [0, 0, 0]], -1.0),
        ([[4, 4, 0], [4, 4, 0], [0, 0, 0]], 0.0),
        ([[7, 0, 0], [0, 0, 0], [0, 0, 0]], None),
    ],
)
def test_kappa_by_hand(table, kappa):
    found = cohens_kappa(np.array(table))
    assert found == kappa if kappa is None else found == pytest.approx(kappa, abs=1e-12)


def both(index, pairs):
    given = [
        label(index, i, verdict, who) for i, pair in enumerate(pairs) for who, verdict in zip("ab", pair, strict=True)
    ]
    return survey(index, Labels(tuple(given), None), Sample("first", 200)).agreements


def test_two_annotators_are_compared_where_both_judged():
    index = Index(np.full(200, 0.1))
    pairs = [(YES, YES)] * 20 + [(YES, NO)] * 5 + [(NO, YES)] * 10 + [(NO, NO)] * 15
    (pair,) = both(index, pairs)
    assert (pair.annotators, pair.n) == (("a", "b"), 50)
    np.testing.assert_array_equal(pair.table, [[20, 0, 5], [0, 0, 0], [10, 0, 15]])
    assert pair.agreement == wilson(35, 50)
    assert pair.chance == pytest.approx(0.5)
    assert pair.kappa.value == pytest.approx(0.4)
    # large-sample standard error of kappa for this table (Fleiss, Cohen & Everitt 1969): 0.128
    assert pair.kappa.low == pytest.approx(0.4 - 1.96 * 0.128, abs=0.03)
    assert pair.kappa.high == pytest.approx(0.4 + 1.96 * 0.128, abs=0.03)
    assert both(index, pairs)[0].kappa == pair.kappa, "the bootstrap is seeded"


def test_annotators_who_say_alike_by_chance_have_a_kappa_about_zero():
    index = Index(np.full(200, 0.1))
    rng = np.random.default_rng(0)
    (pair,) = both(index, [tuple(rng.choice([YES, YES, YES, NO], 2)) for _ in range(200)])
    assert pair.agreement.value > 0.55, "they agree often"
    assert pair.kappa.low < 0 < pair.kappa.high
    assert abs(pair.agreement.value - pair.chance) < 0.1


def test_a_kappa_that_does_not_exist_or_has_no_interval_is_said():
    index = Index()
    (pair,) = both(index, [(YES, YES)] * 12)
    assert pair.kappa is None
    rows = {row.name: row.value for row in replace(survey(index, Labels((), None), FIRST), agreements=(pair,)).rows()}
    assert rows["kappa, a and b"] == "all verdicts alike: there is none"
    assert rows["agreement, a and b"].startswith("100.0 %")
    (pair,) = both(index, [(YES, YES), (NO, NO), (YES, NO)])
    assert (pair.kappa.low, pair.kappa.high) == (-1, 1)
    rows = {row.name: row.value for row in replace(survey(index, Labels((), None), FIRST), agreements=(pair,)).rows()}
    assert rows["kappa, a and b"] == "0.40 (no interval below 10 features)"


def test_three_annotators_are_three_pairs():
    index = Index()
    given = tuple(label(index, i, YES, who) for i in range(3) for who in "cab")
    pairs = survey(index, Labels(given, None), FIRST).agreements
    assert [pair.annotators for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_without_labels_the_command_says_where_they_are_made(capsys, monkeypatch):
    for labels, said in ((Labels((), None), True), (Labels((label(Index(), 1),), None), False)):
        monkeypatch.setattr(jobs, "survey", lambda *_, labels=labels, **__: survey(Index(), labels, FIRST))
        cli.main(["survey", "runs/index"])
        assert ("headscope serve --index runs/index` and press `n`" in capsys.readouterr().out) == said
