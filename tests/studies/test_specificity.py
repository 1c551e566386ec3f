"""A feature against a proxy: every number against one counted token by token."""

from dataclasses import fields, is_dataclass
from math import isfinite

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import binomtest

from headscope.errors import IndexFormatError, ProxyError, StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.store import FeatureIndex
from headscope.proxies import evaluate, parse
from headscope.studies.when.sensitivity import REST, adjudicate
from headscope.studies.when.specificity import SpecificityPlan, expected_value, specificity
from headscope.studies.when.split import MAX_UNITS, TextTokens
from specificity_case import BLOCK, QUICK, Case


def finite(value) -> bool:
    """Whether no number anywhere in a record is NaN or infinite."""
    if is_dataclass(value):
        return all(finite(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple):
        return all(map(finite, value))
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).all())
    return not isinstance(value, float) or isfinite(value)


cases = st.builds(
    Case,
    n_blocks=st.integers(1, 25),
    seed=st.integers(0, 500),
    share_active=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    share_true=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    n_documents=st.sampled_from([1, 15, 200]),
)


# ------------------------------------------------------------------------------------------------- against brute force
@given(cases)
def test_counts_and_histograms_are_those_counted_token_by_token(case) -> None:
    study = case.study()
    f, y = case.f[case.text].astype(float), case.mask[case.text]
    counts = study.counts
    assert (counts.n_tokens, counts.n_active, counts.n_proxy) == (len(f), (f > 0).sum(), y.sum())
    assert (counts.n_both, counts.n_false_positives) == ((y & (f > 0)).sum(), (~y & (f > 0)).sum())
    assert counts.n_false_negatives == (y & (f == 0)).sum()
    assert counts.n_documents == len(set(case.document[case.text]))
    bins, edges = study.histogram, study.histogram.edges
    assert len(edges) == 101
    for i in range(100):
        inside = (f >= edges[i]) & ((f < edges[i + 1]) | (i == 99)) & (f > 0)
        assert (bins.true[i], bins.false[i]) == ((inside & y).sum(), (inside & ~y).sum())
        assert_allclose([bins.true_mass[i], bins.false_mass[i]], [f[inside & y].sum(), f[inside & ~y].sum()])
    assert bins.true.sum() + bins.false.sum() == counts.n_active == bins.n


@given(cases)
def test_nothing_is_ever_nan(case) -> None:
    assert finite(case.study(subtypes={"half": case.mask & (np.arange(len(case.mask)) % 2 == 0)}))


@given(cases, st.none() | st.just((0.0, 0.5, 1.25, 2.0, 1e9)))
def test_precision_by_threshold(case, thresholds) -> None:
    found = case.study(SpecificityPlan(thresholds=thresholds, n_samples=50, n_rotations=1)).precision_by_threshold
    f, y = case.f[case.text].astype(float), case.mask[case.text]
    grid = np.linspace(0, f.max(initial=0), 50, endpoint=False) if thresholds is None else np.array(thresholds)
    grid = [t for t in grid if (f > t).any()]
    assert_array_equal(found.threshold, grid)
    assert found.base_rate == y.mean()
    for i, t in enumerate(grid):
        n, both = int((f > t).sum()), int((y & (f > t)).sum())
        wilson = binomtest(both, n).proportion_ci(method="wilson")
        assert (found.n[i], found.n_both[i]) == (n, both)
        expected = [both / n, wilson.low, wilson.high]
        assert_allclose([found.value[i], found.low[i], found.high[i]], expected, atol=1e-12)


@given(cases)
def test_precision_at_the_top_counts_all_ties(case) -> None:
    found = case.study(SpecificityPlan(top=(1, 5, 50, 500), n_samples=50, n_rotations=1)).top
    f, y = case.f[case.text], case.mask[case.text]
    assert [top.k for top in found] == [k for k in (1, 5, 50, 500) if k <= (f > 0).sum()]
    for top in found:
        chosen = f >= np.sort(f)[-top.k]
        assert (top.n, top.n_both) == (chosen.sum(), (chosen & y).sum())
        assert top.precision.value == top.n_both / top.n


@given(cases)
def test_false_positives_by_range(case) -> None:
    plan = SpecificityPlan(n_ranges=4, n_examples=3, n_samples=50, n_rotations=1)
    ranges = case.study(plan).ranges
    assert len(ranges) == (4 if case.f.any() else 0)
    for i, part in enumerate(ranges):
        inside = (case.f >= part.low) & ((case.f < part.high) | (i == 3)) & (case.f > 0)
        false = np.flatnonzero(inside & ~case.mask)
        assert (part.n, part.n_false) == (inside.sum(), len(false))
        assert (part.share is None) == (part.n == 0)
        assert len(part.position) == min(3, len(false)) == len(set(part.position))
        assert set(part.position) <= set(false)
        assert_array_equal(part.activation, case.f[part.position])
        assert (np.diff(part.activation) <= 0).all()


@given(cases)
def test_the_curve_and_its_areas(case) -> None:
    study = case.study()
    f, y = case.f[case.text], case.mask[case.text]
    if not f.any() or y.all() or not y.any():
        assert study.curve is None
        return
    curve = study.curve
    assert (np.diff(curve.threshold) < 0).all()
    assert curve.threshold[0] == f.max()
    assert curve.recall[-1] == 1
    for t, n, both, precision, recall, rate in zip(
        curve.threshold, curve.n, curve.n_both, curve.precision, curve.recall, curve.false_positive_rate, strict=True
    ):
        chosen = f >= t
        assert (n, both) == (chosen.sum(), (chosen & y).sum())
        assert_allclose([precision, recall, rate], [both / n, both / y.sum(), (n - both) / (~y).sum()])
    if study.auc.value is not None:
        above = f[y][:, None] > f[~y][None]
        equal = f[y][:, None] == f[~y][None]
        assert_allclose(study.auc.value, above.mean() + equal.mean() / 2, rtol=1e-10)
        steps = np.diff(curve.recall, prepend=0) * curve.precision  # few enough groups that all are kept
        assert_allclose(study.average_precision.value, steps.sum(), rtol=1e-10)


@given(cases)
def test_correlations_and_shares(case) -> None:
    study = case.study(SpecificityPlan(tau=1.0, n_samples=50, n_rotations=3))
    f, y = case.f[case.text].astype(float), case.mask[case.text]
    strong = f > 1
    expected = {
        "precision": y[f > 0].mean() if (f > 0).any() else 0,
        "mass_share": f[y].sum() / max(f.sum(), 1e-9),
        "pearson": correlation(f, y),
        "phi": correlation(f > 0, y),
        "pearson_above": correlation(f[strong], y[strong]),
    }
    enough = {
        "precision": (f > 0).sum() >= 30,
        "mass_share": (f > 0).sum() >= 30,
        "pearson_above": strong.sum() >= 30 and expected["pearson_above"] is not None,
    }
    both = min((f > 0).sum(), y.sum(), (~y).sum()) >= 30
    for name, value in expected.items():
        measure = getattr(study, name)
        if enough.get(name, both) and value is not None:
            assert_allclose(measure.value, value, rtol=1e-10, atol=1e-10)
            assert measure.low is None or measure.low <= measure.value <= measure.high
            assert measure.low is not None or measure.missing
        else:
            assert measure.value is None
            assert measure.missing


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) == 0 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(np.corrcoef(a.astype(float), b.astype(float))[0, 1])


def test_intervals_by_document_are_those_of_drawing_documents_token_by_token() -> None:
    case = Case(40, seed=3)
    plan = SpecificityPlan(n_samples=200, n_rotations=1)
    study = case.study(plan)
    n = study.counts.n_documents
    draws = np.random.default_rng(plan.seed).multinomial(n, np.full(n, 1 / n), size=200)
    rows = {d: np.flatnonzero((case.document == d) & case.text) for d in sorted(set(case.document[case.text]))}
    drawn: dict[str, list[float]] = {name: [] for name in ("pearson", "phi", "mass_share", "precision", "recall")}
    for counts in draws:
        at = np.concatenate([np.repeat(row, k) for row, k in zip(rows.values(), counts, strict=True)])
        f, y = case.f[at].astype(float), case.mask[at]
        drawn["pearson"].append(np.corrcoef(f, y)[0, 1])
        drawn["phi"].append(np.corrcoef(f > 0, y)[0, 1])
        drawn["mass_share"].append(f[y].sum() / f.sum())
        drawn["precision"].append(y[f > 0].mean())
        drawn["recall"].append((f > 0)[y].mean())
    for name in ("pearson", "phi", "mass_share"):
        found = getattr(study, name)
        assert_allclose([found.low, found.high], np.percentile(drawn[name], [2.5, 97.5]), rtol=1e-10)
    for name, found in (("precision", study.precision), ("recall", study.sensitivity.recall)):
        assert_allclose(found.by_document, np.percentile(drawn[name], [2.5, 97.5]), rtol=1e-10)


def test_the_null_is_that_of_masks_moved_by_whole_blocks() -> None:
    case = Case(5, seed=1, share_active=0.6, share_true=0.4, n_documents=3)  # 4 rotations: all are drawn
    study = case.study(SpecificityPlan(n_samples=50, n_rotations=100))
    assert study.n_rotations == 4
    found: dict[str, list[float]] = {
        "precision": [],
        "recall": [],
        "pearson": [],
        "phi": [],
        "auc": [],
        "mass_share": [],
    }
    f = case.f[case.text].astype(float)
    for k in range(1, 5):
        y = np.roll(case.mask, k * BLOCK)[case.text]
        found["precision"].append(y[f > 0].mean())
        found["recall"].append((f > 0)[y].mean())
        found["pearson"].append(np.corrcoef(f, y)[0, 1])
        found["phi"].append(np.corrcoef(f > 0, y)[0, 1])
        above, equal = f[y][:, None] > f[~y][None], f[y][:, None] == f[~y][None]
        found["auc"].append(above.mean() + equal.mean() / 2)
        found["mass_share"].append(f[y].sum() / f.sum())
    for name, values in found.items():
        null = (study.sensitivity.recall if name == "recall" else getattr(study, name)).null
        assert_allclose([null.value, null.low, null.high], [np.mean(values), min(values), max(values)], rtol=1e-10)


def test_a_feature_that_has_nothing_to_do_with_the_proxy_is_within_its_null() -> None:
    rng = np.random.default_rng(0)
    case = Case(200, n_documents=40)
    case.mask = (rng.random(len(case.mask)) < 0.3) & case.text
    study = case.study(SpecificityPlan(n_samples=100, n_rotations=100))
    for measure in (study.pearson, study.phi, study.auc, study.mass_share, study.precision):
        assert measure.null.low <= measure.value <= measure.null.high


# ------------------------------------------------------------------------------------------------------ expected value
def test_the_joint_expected_value_is_a_decomposition_of_the_mean_and_the_posts_is_not() -> None:
    case = Case(40)
    f, y = case.f[case.text].astype(float), case.mask[case.text]
    study = case.study(SpecificityPlan(n_bins=2000, n_samples=50, n_rotations=1))
    joint = expected_value(study.histogram, study.counts.n_tokens)
    width = f.max() / 2000
    assert_allclose(joint.true.sum() + joint.false.sum(), f.mean(), atol=width)
    assert_allclose(joint.true.sum() / (joint.true.sum() + joint.false.sum()), study.mass_share.value, atol=1e-3)
    by_class = expected_value(study.histogram, study.counts.n_tokens, "class")
    assert (by_class.n_true, by_class.n_false) == ((y & (f > 0)).sum(), (~y & (f > 0)).sum())
    assert_allclose(by_class.true.sum(), f[y & (f > 0)].mean(), atol=width)
    assert_allclose(by_class.false.sum(), f[~y & (f > 0)].mean(), atol=width)
    assert joint.normalisation != by_class.normalisation
    assert joint.definition != by_class.definition


def test_each_bar_is_its_centre_times_its_count() -> None:
    study = Case(10).study(SpecificityPlan(n_bins=7, n_samples=50, n_rotations=1))
    found = expected_value(study.histogram, study.counts.n_tokens)
    for i in range(7):
        centre = study.maximum * (i + 0.5) / 7
        assert_allclose(found.true[i], centre * study.histogram.true[i] / study.counts.n_tokens)


def test_of_a_class_without_tokens_the_bars_are_zero() -> None:
    study = Case(10, share_true=0.0).study()
    assert not expected_value(study.histogram, study.counts.n_tokens, "class").true.any()


# --------------------------------------------------------------------------------------------------------- sensitivity
@given(cases)
def test_recall_and_what_is_missed(case) -> None:
    study = case.study()
    found, y = study.sensitivity, case.mask
    missed = np.flatnonzero(y & (case.f == 0))
    assert_array_equal(found.false_negatives, missed)
    assert len(found.sample) == min(50, len(missed)) == len(set(found.sample))
    assert set(found.sample) <= set(missed)
    assert found.recall.n == y.sum()
    if y.sum() >= 30:
        assert found.recall.value == (case.f[y] > 0).mean()
    else:
        assert str(y.sum()) in found.recall.missing
        assert "30" in found.recall.missing


def test_the_sample_of_what_is_missed_is_drawn_evenly() -> None:
    case = Case(20)
    counts = np.zeros(len(case.mask))
    for seed in range(200):
        plan = SpecificityPlan(n_false_negatives=5, n_samples=1, n_rotations=1, seed=seed)
        counts[case.study(plan).sensitivity.sample[:1]] += 1  # the first one is a random one
    missed = np.flatnonzero(case.mask & (case.f == 0))
    assert counts.sum() == 200
    first_half = binomtest(int(counts[missed[: len(missed) // 2]].sum()), 200, (len(missed) // 2) / len(missed))
    assert first_half.pvalue > 0.001


def test_recall_by_subtype_and_what_no_subtype_covers() -> None:
    case = Case(40, seed=2)
    at = np.arange(len(case.mask))
    found = case.study(subtypes={"even": at % 2 == 0, "third": at % 3 == 0}).sensitivity.subtypes
    parts = {"even": at % 2 == 0, "third": at % 3 == 0, REST: (at % 2 != 0) & (at % 3 != 0)}
    assert [part.name for part in found] == list(parts)
    for part in found:
        own = parts[part.name] & case.mask
        assert (part.n, part.n_both) == (own.sum(), (own & (case.f > 0)).sum())
        assert part.recall.value == part.n_both / part.n
    assert not any(p.name == REST for p in case.study(subtypes={"all": case.text}).sensitivity.subtypes)
    assert case.study().sensitivity.subtypes == ()
    with pytest.raises(StudyError, match=REST):
        case.study(subtypes={REST: case.mask})


def test_verdicts_correct_recall() -> None:
    case = Case(40)
    found = case.study().sensitivity
    n_both, n_missed = found.recall.n - len(found.false_negatives), len(found.false_negatives)
    verdicts = dict(zip(found.sample.tolist(), ["miss"] * 3 + ["proxy wrong"] * 9 + ["unclear"] * 2, strict=False))
    judged = adjudicate(found, verdicts)
    assert (judged.n_judged, judged.n_unclear, judged.n_false_negatives) == (14, 2, n_missed)
    assert judged.misses.value == 0.25
    assert_allclose(judged.recall.value, n_both / (n_both + 0.25 * n_missed))
    assert found.recall.value < judged.recall.low < judged.recall.value < judged.recall.high


def test_without_verdicts_recall_is_not_corrected() -> None:
    judged = adjudicate(Case(40).study().sensitivity, {})
    assert judged.n_judged == 0
    assert judged.misses is None
    assert judged.recall is None


def test_all_misses_leave_recall_as_it_was_and_none_makes_it_one() -> None:
    found = Case(40).study().sensitivity
    for verdict, value in (("miss", found.recall.value), ("proxy wrong", 1.0)):
        judged = adjudicate(found, dict.fromkeys(found.false_negatives.tolist(), verdict))
        assert_allclose(judged.recall.value, value)


@pytest.mark.parametrize("verdict", ["good", "", None])
def test_a_verdict_that_is_none(verdict, no_type_checks) -> None:
    found = Case(40).study().sensitivity
    with pytest.raises(StudyError, match="verdict"):
        adjudicate(found, {int(found.sample[0]): verdict})


def test_a_verdict_on_what_was_not_missed() -> None:
    case = Case(40)
    with pytest.raises(StudyError, match="position"):
        adjudicate(case.study().sensitivity, {int(np.flatnonzero(case.f)[0]): "miss"})


# -------------------------------------------------------------------------------------------------------------- empty
def test_a_dead_feature() -> None:
    study = Case(20, share_active=0.0).study()
    assert study.notes == ("feature 0 is never active in this corpus",)
    assert (study.maximum, study.histogram.n, study.ranges, study.top, study.curve) == (0.0, 0, (), (), None)
    assert len(study.precision_by_threshold.threshold) == 0
    assert study.precision.missing == "0 active tokens: at least 30 are needed"
    assert study.sensitivity.recall.value == 0
    assert len(study.sensitivity.false_negatives) == study.counts.n_proxy > 0


def test_a_proxy_that_is_never_true() -> None:
    study = Case(20, share_true=0.0).study()
    assert study.notes == ("the proxy is never true in this corpus",)
    assert study.precision.value == 0
    assert study.sensitivity.recall.missing == "0 tokens where the proxy is true: at least 30 are needed"
    assert study.pearson.missing == study.auc.missing == study.sensitivity.recall.missing


def test_a_proxy_that_is_always_true() -> None:
    study = Case(20, share_true=1.0).study()
    assert study.notes == ("the proxy is true on every token of this corpus",)
    assert study.precision.value == study.mass_share.value == 1
    assert study.phi.missing == "0 tokens where the proxy is false: at least 30 are needed"


def test_a_feature_and_a_proxy_that_never_meet() -> None:
    case = Case(20)
    case.mask &= case.f == 0
    assert case.study().notes == ("the feature is never active where the proxy is true",)


def test_a_feature_that_is_the_same_everywhere_has_no_correlation() -> None:
    case = Case(20)
    case.f[:] = np.float32(0.1) * case.text
    study = case.study()
    for measure in (study.pearson, study.phi, study.pearson_above):
        assert measure.value is None
        assert "the same on all tokens" in measure.missing
    assert_allclose(study.auc.value, 0.5)


def test_few_documents_have_no_interval_but_a_value() -> None:
    study = Case(20, n_documents=9).study()
    assert study.pearson.value is not None
    assert study.pearson.missing == "no interval: 9 documents, at least 10 are needed"
    assert study.precision.by_document is None
    assert study.precision.low is not None


def test_one_block_has_no_null() -> None:
    study = Case(1, share_active=1.0, n_documents=1).study()
    assert study.n_rotations == 0
    assert study.phi.null is None


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "mask", [np.ones(3, bool), np.ones(400, int), np.ones((20, 20), bool), np.ones(400, float), [True] * 400]
)
def test_a_mask_of_another_shape_or_dtype(mask, no_type_checks) -> None:
    with pytest.raises(StudyError, match="400 bool"):
        specificity(Case(20).index, 0, mask, plan=QUICK)


def test_a_mask_that_is_true_at_special_tokens_counts_text_alone() -> None:
    case = Case(20)
    expected = case.study()
    case.mask |= ~case.text
    found = case.study()
    assert found.counts == expected.counts
    assert found.pearson == expected.pearson


@pytest.mark.parametrize(
    "options",
    [
        *({"n_bins": 0}, {"top": (0,)}, {"n_ranges": -1}, {"n_samples": 0}, {"tau": -1.0}, {"tau": float("inf")}),
        *({"thresholds": t} for t in [(1.0, 1.0), (-1.0,), (float("nan"),), (float("inf"),)]),
    ],
)
def test_a_plan_that_makes_no_sense(options) -> None:
    with pytest.raises(StudyError):
        SpecificityPlan(**options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_activations_that_are_none(value) -> None:
    case = Case(20)
    case.f[np.flatnonzero(case.f)[3]] = value
    with pytest.raises(IndexFormatError, match="activations"):
        case.study()


def test_an_activation_at_a_special_token() -> None:
    case = Case(20)
    case.f[0] = 1.0
    with pytest.raises(IndexFormatError, match="text tokens"):
        case.study()


def test_many_documents_are_put_together_in_groups_of_neighbours() -> None:
    document = np.repeat(np.arange(3 * MAX_UNITS, dtype=np.int32), 2)
    document[document % 3 == 1] = 0  # numbers without a token
    text = TextTokens.from_arrays(np.ones(len(document), bool), np.sort(document), BLOCK)
    assert text.n_documents == 2 * MAX_UNITS
    assert len(text.counts) == MAX_UNITS
    assert text.counts.min() > 0
    assert (np.diff(text.unit) >= 0).all()


# ------------------------------------------------------------------------------------------------------- on an index
@pytest.fixture(scope="module")
def index(random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model("gpt2")
    sae = random_sae(model, 12)
    sae.b_enc[7] = -1e4
    folder = tmp_path_factory.mktemp("specificity") / "index"
    build_index(model, [(sae, SAERecord("s", "sha256:s"))], random_corpus(model, 40, 16), folder)
    return FeatureIndex.open(folder)


def test_a_proxy_by_its_text_is_the_same_as_its_mask(index) -> None:
    proxy = parse('token_in(["a", "b", "c", "d", "e", "f", "g", "h"])')
    latent = int(np.argmax(index.table()["n_active"].to_numpy()))
    mask = evaluate(proxy, index)
    studies = [specificity(index, latent, p, plan=QUICK) for p in (proxy, proxy.name, mask)]
    assert studies[0].proxy == studies[1].proxy == proxy.name
    assert studies[0].proxy_hash == studies[1].proxy_hash == proxy.hash
    assert (studies[2].proxy, studies[2].proxy_hash) == ("a mask", None)
    for study in studies:
        assert study.counts == studies[0].counts
        assert study.pearson == studies[0].pearson
        assert study.corpus == "random"
    assert studies[0].counts.n_tokens == index.manifest["corpus"]["n_tokens"]
    assert studies[0].counts.n_active == index.feature(latent).n_active


def test_a_subtype_by_its_text(index) -> None:
    latent = int(np.argmax(index.table()["n_active"].to_numpy()))
    study = specificity(index, latent, 'token_in(["a", "b"])', subtypes={"a": 'token_in(["a"])'}, plan=QUICK)
    assert [s.name for s in study.sensitivity.subtypes] == ["a", REST]
    assert study.sensitivity.subtypes[0].n == evaluate('token_in(["a"])', index).sum()


def test_a_dead_feature_and_one_that_does_not_exist(index) -> None:
    assert specificity(index, 7, 'token_in(["a"])', plan=QUICK).notes[0] == "feature 7 is never active in this corpus"
    with pytest.raises(IndexFormatError, match="latent 12"):
        specificity(index, 12, 'token_in(["a"])')


def test_a_text_that_is_no_proxy(index) -> None:
    with pytest.raises(ProxyError):
        specificity(index, 0, "import os")
