"""Figures hold the numbers of their record, and nothing in a proxy is read as HTML."""

import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from headscope import figures
from headscope.errors import FigureError
from headscope.stats import Measure
from headscope.studies.what.downstream import Downstream, LogitEffect, PathEffect
from headscope.studies.when.records import PredictionGroup, Predictions
from headscope.studies.when.specificity import SpecificityPlan, expected_value
from specificity_case import Case

OF_A_STUDY = {
    "specificity": figures.specificity,
    "expected value": lambda study: figures.expected_value(
        study, expected_value(study.histogram, study.counts.n_tokens)
    ),
    "precision by threshold": figures.precision_by_threshold,
    "precision and recall": figures.precision_recall,
    "roc": figures.roc,
    "recall by subtype": figures.recall_by_subtype,
}


@pytest.fixture(scope="module")
def study():
    case = Case(40)
    even = np.arange(len(case.mask)) % 2 == 0
    return case.study(SpecificityPlan(n_samples=50, n_rotations=1), subtypes={"even": even})


@pytest.fixture(scope="module")
def predicted():
    def group(name: str, p: np.ndarray) -> PredictionGroup:
        return PredictionGroup(name, 7, np.arange(len(p)), p, Measure("mean", len(p)))

    p = np.linspace(0, 1, 6).reshape(3, 2)
    groups = map(group, ("false negatives", "true positives", "elsewhere"), p)
    return Predictions(3, '<b>token_in(["a"])</b>', (5,), *groups, Measure("auc", 4))


def test_the_bars_of_the_histogram(study) -> None:
    figure = figures.specificity(study)
    assert figure.layout.barmode == "stack"
    true, false = figure.data
    assert_array_equal(true.y, study.histogram.true)
    assert_array_equal(false.y, study.histogram.false)
    edges = study.histogram.edges
    assert_allclose(true.x - true.width / 2, edges[:-1], atol=1e-12)
    assert_allclose(true.x + true.width / 2, edges[1:])
    assert true.marker.color != false.marker.color
    assert figures.specificity(study, log=True).layout.yaxis.type == "log"


def test_bars_are_stacked_only_where_they_may_be(study) -> None:
    joint, by_class = (
        expected_value(study.histogram, study.counts.n_tokens, normalisation) for normalisation in ("joint", "class")
    )
    stacked, beside = figures.expected_value(study, joint), figures.expected_value(study, by_class)
    assert (stacked.layout.barmode, beside.layout.barmode) == ("stack", "overlay")
    assert_array_equal(stacked.data[0].y, joint.true)
    assert_array_equal(beside.data[1].y, by_class.false)
    assert joint.definition in stacked.layout.title.text
    assert by_class.definition in beside.layout.title.text


def test_the_line_of_precision_lies_within_its_band(study) -> None:
    figure = figures.precision_by_threshold(study)
    band, line = figure.data
    found = study.precision_by_threshold
    n = len(found.threshold)
    assert_array_equal(line.x, found.threshold)
    assert_array_equal(line.y, found.value)
    assert_array_equal(line.customdata, found.n)
    assert_array_equal(band.y[:n], found.high)
    assert_array_equal(band.y[n:][::-1], found.low)
    assert_array_equal(band.x, [*found.threshold, *found.threshold[::-1]])
    assert figure.layout.shapes[0].y0 == found.base_rate


def test_the_curves(study) -> None:
    pr, roc = figures.precision_recall(study), figures.roc(study)
    assert_array_equal(pr.data[0].x, study.curve.recall)
    assert_array_equal(pr.data[0].y, study.curve.precision)
    assert_array_equal(roc.data[0].x, [0, *study.curve.false_positive_rate])
    assert_array_equal(roc.data[0].y, [0, *study.curve.recall])
    assert f"{study.auc.value:.3f}" in roc.layout.title.text
    assert f"{study.average_precision.value:.3f}" in pr.layout.title.text


def test_recall_with_its_intervals(study) -> None:
    [bars] = figures.recall_by_subtype(study).data
    recalls = [study.sensitivity.recall, *(part.recall for part in study.sensitivity.subtypes)]
    assert_array_equal(bars.x, [r.value for r in recalls])
    assert_allclose(bars.x + bars.error_x.array, [r.high for r in recalls])
    assert_allclose(bars.x - bars.error_x.arrayminus, [r.low for r in recalls])


def test_what_the_model_predicts(predicted) -> None:
    figure = figures.next_token_probabilities(predicted)
    groups = (predicted.false_negatives, predicted.true_positives, predicted.elsewhere)
    for bars, group in zip(figure.data, groups, strict=True):
        assert_array_equal(bars.x, group.probability)
        assert group.name in bars.name
    assert "&lt;b&gt;" in figure.layout.title.text
    assert "<b>" not in figure.layout.title.text


@pytest.mark.parametrize("name", OF_A_STUDY)
def test_a_figure_says_what_it_is_of_and_can_be_written(study, name) -> None:
    figure = OF_A_STUDY[name](study)
    title = figure.layout.title.text
    assert f"Feature {study.latent}" in title
    assert study.proxy in title
    assert f"{study.counts.n_tokens:,} tokens of {study.corpus}" in title
    assert figure.layout.xaxis.title.text
    assert "NaN" not in figure.to_json()


@pytest.mark.parametrize("name", OF_A_STUDY)
@pytest.mark.parametrize("share", [{"share_active": 0.0}, {"share_true": 0.0}, {"share_true": 1.0}])
def test_a_figure_of_nothing_says_so(name, share) -> None:
    study = Case(20, **share).study()
    figure = OF_A_STUDY[name](study)
    assert study.notes[0] in figure.layout.title.text
    assert "NaN" not in figure.to_json()


@pytest.mark.parametrize("name", OF_A_STUDY)
def test_without_plotly_the_extra_is_named(study, name, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(FigureError, match=r"headscope\[plots\]"):
        OF_A_STUDY[name](study)


def effect(path: str, change: list[float]) -> PathEffect:
    return PathEffect(path, path, np.array(change), None, Measure("mean", len(change)))


def changed(**paths: list[float]) -> Downstream:
    n = len(next(iter(paths.values())))
    numbers = np.arange(n)
    return Downstream(
        latent=3,
        layer=1,
        baseline="error kept",
        where="everywhere",
        norms="recomputed",
        n_active=9,
        position=numbers,
        activation=np.ones(n),
        next_token=numbers,
        document=numbers,
        loss=np.ones(n),
        paths={name: effect(name, change) for name, change in paths.items()},
        notes=("<b>note</b>",),
    )


def test_loss_changes_are_counted_in_bins_that_all_paths_share() -> None:
    figure = figures.loss_changes(changed(total=[0.0, 1.0, 1.0], direct=[0.0, 0.0, 4.0]), bins=4)
    assert [trace.name for trace in figure.data] == ["total", "direct"]
    for trace, counts in zip(figure.data, ([1, 2, 0, 0, 0], [2, 0, 0, 1, 0]), strict=True):
        assert_allclose(trace.x, [0, 1, 2, 3, 4])
        assert_array_equal(trace.y, counts)
    assert figure.data[0].line.color != figure.data[1].line.color
    assert "&lt;b&gt;note" in figure.layout.title.text
    assert len(figures.loss_changes(changed(total=[])).data) == 0


def test_logit_bars_run_from_the_most_raised_to_the_most_lowered() -> None:
    found = LogitEffect(3, ((7, 2.0), (8, 1.0)), ((5, -3.0), (6, -1.0)), 4.0, 9.0, 7, True, 0.0)
    figure = figures.logit_effect(found, {7: "<i>", 8: "b", 5: "c", 6: "b"})
    assert [list(trace.x) for trace in figure.data] == [[2.0, 1.0], [-1.0, -3.0]]
    assert [list(trace.y) for trace in figure.data] == [["&lt;i&gt; (#7)", "b (#8)"], ["b (#6)", "c (#5)"]]
