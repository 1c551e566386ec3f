"""Claims, figures and whole reports: what they hold, how they refuse what is no number, and their JSON."""

import json

import pytest

from headscope.report.records import Claim, Figure, Listing
from headscope.report.results import Report, StudyResult, SubjectResult, id_order
from headscope.stats import Estimate, Measure

CLAIM = Claim("M2", "L0", "mean", post=12, ours=11.5, n=1000, interval=(11.0, 12.0), null=0.5, differs="model")
KEYS = ["id", "claim", "seed", "ours", "n", "interval", "null", "definition", "differs"]


def test_a_claim_has_the_keys_of_the_report_in_their_order():
    assert list(CLAIM.as_dict())[: len(KEYS)] == KEYS
    assert CLAIM.as_dict()["seed"] == 12
    assert CLAIM.as_dict()["interval"] == [11.0, 12.0]


def test_a_claim_comes_back_from_its_json():
    assert Claim.from_dict(json.loads(json.dumps(CLAIM.as_dict()))) == CLAIM


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_becomes_none_with_a_reason(value):
    claim = Claim("M2", "L0", "mean", ours=value, interval=(value, 1.0), null=value)
    assert (claim.ours, claim.interval, claim.null) == (None, None, None)
    assert claim.missing


def test_a_claim_without_a_number_or_a_reason_is_refused():
    with pytest.raises(ValueError, match="neither a number nor a reason"):
        Claim("M2", "L0", "mean")


def test_a_measure_fills_in_its_n_its_null_and_its_reason():
    start = Claim("M11", "precision", "", missing="")
    measured = start.with_measure(Measure("P", 40, 0.5, 0.4, 0.6, null=Estimate(0.1, 0.0, 0.2)))
    assert (measured.ours, measured.n, measured.interval, measured.null) == (0.5, 40, (0.4, 0.6), 0.1)
    assert measured.definition == "P"
    assert measured.missing is None
    few = start.with_measure(Measure("P", 3, missing="3 tokens"))
    assert (few.ours, few.missing) == (None, "3 tokens")


def test_a_figure_is_as_long_as_its_labels_and_holds_no_nan():
    figure = Figure("f", "bars", ("a", "b"), {"s": (1.0, float("nan"))}, "d")
    assert figure.series["s"] == (1.0, None)
    assert Figure.from_dict(json.loads(json.dumps(figure.as_dict()))) == figure
    with pytest.raises(ValueError, match="1 values of s at 2 places"):
        Figure("f", "bars", ("a", "b"), {"s": (1.0,)}, "d")


def test_the_result_of_a_study_comes_back_from_its_json():
    figure = Figure("f", "lines", ("0", "1"), {"s": (1.0, 2.0)}, "d", low={"s": (0.0, 1.0)}, high={"s": (2.0, 3.0)})
    result = StudyResult("quality", 1.5, (CLAIM, figure, Listing("l", ("a",), (("x",),), "d")))
    assert StudyResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result


def test_ids_are_in_the_order_of_their_numbers():
    assert sorted(["M13b", "M2", "4.1", "M13", "M31"], key=id_order) == ["M2", "M13", "M13b", "M31", "4.1"]


def _report(*claims_of: list[Claim]) -> Report:
    subjects = [
        SubjectResult(f"sae{i}", {}, (), (StudyResult("one", 1.0, tuple(claims)),), {})
        for i, claims in enumerate(claims_of)
    ]
    return Report("0", "now", {"name": "quick"}, {}, tuple(subjects))


def test_rows_put_the_same_claim_of_several_saes_side_by_side():
    other = Claim("M2", "L0", "mean", ours=14)
    only = Claim("M4", "dead", "share", ours=0.1)
    rows = _report([only, CLAIM], [other]).rows()
    assert [(row.said.id, dict(row.by_sae)) for row in rows] == [
        ("M2", {"sae0": CLAIM, "sae1": other}),
        ("M4", {"sae0": only}),
    ]


def test_the_same_words_twice_in_one_sae_are_two_rows():
    assert len(_report([CLAIM, CLAIM], [CLAIM]).rows()) == 2


def test_the_json_of_a_report_has_one_entry_for_each_number_and_sae():
    content = _report([CLAIM], [CLAIM]).as_dict()
    assert [claim["sae"] for claim in content["claims"]] == ["sae0", "sae1"]
    json.dumps(content, allow_nan=False)
