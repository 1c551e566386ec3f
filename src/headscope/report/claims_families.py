"""Claims on the induction family: by the post's selection and behaviour, and by a rule independent of heads."""

import numpy as np

from headscope.errors import StudyError
from headscope.report.induction_family import PostFamily, composite, post_family
from headscope.report.model_heads import model_heads
from headscope.report.records import Claim, Figure, Finding, Section
from headscope.report.rows import Filled, Row, fill, mean_by, share_that, why
from headscope.report.subject import Subject
from headscope.stats import Estimate, wilson
from headscope.studies.induction.behaviour import (
    CONTROL,
    PASS,
    SELECTED,
    Behaviour,
    Reading,
    behaviour,
    compare_rule,
    control_group,
    head_share,
    selected,
)
from headscope.studies.induction.composite import InductionFeatures

# ----------------------------------------------------------------------------------------------------------- selection
_BY_SHARE = {
    "decoder": "||W_dec[j, h]||",
    "decoder_out": "||W_dec[j, h] W_O[h]||, free of the basis of z",
    "encoder": "||W_enc[h, :, j]||",
    "encoder_in": "||W_V[h] W_enc[h, :, j]||, free of the basis of z",
    "dfa": "sum over active tokens of C_h^2",
}
_SELECTION = {
    "n": Row(
        "M27",
        "features selected by their decoder: how many",
        f"live features with a decoder share of at least {SELECTED:g} in the induction head",
        post=586.0,
        unit="",
        differs="of another number of features: compare the share",
    ),
    **{
        name: Row(
            "M27",
            f"features selected by their share in the induction head: {name.replace('_', ' ')}",
            f"share of live features with at least {SELECTED:g} there of {of}",
            post=0.047 if name == "decoder" else None,
            null="the other heads, mean",
        )
        for name, of in _BY_SHARE.items()
    },
    "all": Row(
        "M27",
        "features selected in any induction head of the layer",
        f"share of live features with a decoder share of at least {SELECTED:g} in one of them",
    ),
}


def selection(subject: Subject) -> tuple[Finding, ...]:
    """M27: features by their share in the induction head, by all definitions of a share."""
    return fill(_SELECTION, lambda: _selection(subject))


def _selection(subject: Subject) -> Filled:
    heads, index = model_heads(subject), subject.index
    head = heads.induction
    others = [h for h in range(index.n_heads) if h != head]
    live = int((index.table()["n_active"].to_numpy() > 0).sum())
    note = f"head {subject.head_name(head)}"
    claims = {}
    for name in _BY_SHARE:
        counts = [len(selected(index, h, share=name)) for h in others]
        rates = np.array(counts) / max(live, 1)
        null = Estimate(float(rates.mean()), float(rates.min()), float(rates.max())) if others else None
        holds = np.arange(live) < len(selected(index, head, share=name))
        claims[name] = _SELECTION[name].of(share_that(holds, null), note=note)
    claims["n"] = _SELECTION["n"].of(len(selected(index, head)), n=live, note=note)
    every = np.flatnonzero(heads.holds("induction")[subject.sae.site.layer].numpy() > 0).tolist()
    union = np.unique(np.concatenate([selected(index, h) for h in every]))
    named = ", ".join(map(subject.head_name, every))
    claims["all"] = _SELECTION["all"].of(share_that(np.arange(live) < len(union)), note=f"heads {named}")
    return claims, ()


# ----------------------------------------------------------------------------------------------------------- behaviour
_PASSING = f"share of the features with a pass rate above {PASS:g}"
_RATES = "at later A's of A B ... A B of a block, B the top logit: on there and off at the first A"
_BEHAVIOUR = {
    "passing": Row(
        "M28",
        "selected features that behave like induction",
        f"{_PASSING}, {_RATES}",
        post=450 / 586,
        null="the control group",
    ),
    "control": Row(
        "M28",
        "control features that behave like induction",
        f"{_PASSING}, of features with a decoder share below {CONTROL:g} in the induction head",
        post=3 / 500,
    ),
    "matched": Row(
        "M28",
        "control features of like density and like B that behave like induction",
        f"{_PASSING}; each selected feature has a control of nearest density and frequency of B",
        differs="the post draws its control at random",
    ),
    "bigram": Row(
        "M28",
        "selected features that behave like induction, by groups of equal bigrams",
        f"{_PASSING}; a group A B ... A B passes when all its later A's do",
        null="the control group",
        differs="another reading of the pass rate",
    ),
    "lenient": Row(
        "M28",
        "selected features that behave like induction, most by any reading",
        f"{_PASSING}; the largest of 18 readings of the rate",
    ),
    "strict": Row(
        "M28",
        "selected features that behave like induction, fewest by any reading",
        f"{_PASSING}; the smallest of 18 readings of the rate",
    ),
    "rate": Row("M28", "pass rate of the selected features, mean", f"share of later A's that pass, {_RATES}"),
}


def behaviours(subject: Subject) -> tuple[Finding, ...]:
    """M28: whether the selected features are active where induction predicts them, vs. control groups."""
    return fill(_BEHAVIOUR, lambda: _behaviours(subject))


def _behaviours(subject: Subject) -> Filled:
    found = post_family(subject)
    control = share_that(found.control.passes())
    null = None if control.value is None else Estimate(control.value, control.low or 0.0, control.high or 1.0)
    own = found.behaviour
    note = f"head {subject.head_name(found.head)}"
    by_bigram = Reading(unit="bigram")
    bigram = share_that(own.passes(by_bigram), _estimate(found.control, by_bigram))
    rate = own.rate()[own.n_expected() > 0]
    claims = {
        "passing": _BEHAVIOUR["passing"].of(share_that(own.passes(), null), note=note),
        "control": _BEHAVIOUR["control"].of(control),
        "matched": _matched(subject, found),
        "bigram": _BEHAVIOUR["bigram"].of(bigram, note=note),
        "rate": _BEHAVIOUR["rate"].of(mean_by(np.arange(len(rate)), rate, of="features")),
    }
    readings = Reading.all()
    shares = [share_that(own.passes(reading)) for reading in readings]
    if len(found.selected):
        order = np.argsort(np.array([of.value for of in shares], dtype=np.float64), kind="stable")
        for name, at in (("strict", int(order[0])), ("lenient", int(order[-1]))):
            claims[name] = _BEHAVIOUR[name].of(shares[at], note=_name(readings[at]))
    figure = Figure(
        "Features that behave like induction, by reading of the pass rate",
        "grouped",
        tuple(_name(reading) for reading in readings),
        {
            "selected": tuple(of.value for of in shares),
            "control": tuple(share_that(found.control.passes(reading)).value for reading in readings),
        },
        _PASSING,
        x="reading: unit, first A, later A's",
        y="share of features",
    )
    return claims, (figure,)


def _estimate(control: Behaviour, reading: Reading) -> Estimate | None:
    passes = control.passes(reading)
    return wilson(int(passes.sum()), len(passes)) if len(passes) else None


def _name(reading: Reading) -> str:
    return f"{reading.unit}, first A {reading.first}, {reading.expected}"


def _matched(subject: Subject, found: PostFamily) -> Claim:
    row = _BEHAVIOUR["matched"]
    if not len(found.selected):
        return row.without("no feature is selected")
    try:
        matched = control_group(subject.index, found.head, found.selected, seed=subject.settings.seed)
    except StudyError as error:
        return row.without(why(error))
    judged = behaviour(subject.index, matched, seed=subject.settings.seed, finder=found.finder)
    return row.of(share_that(judged.passes()))


# ----------------------------------------------------------------------------------------------------------- composite
_COMPOSITE = {
    "share": Row(
        "M28",
        "induction features by the composite rule, no head named",
        "share of live features that pass behaviour, DFA from earlier B's, copying and a corrupted A",
        null="each feature with the B of another one",
        differs="the post has no such rule; its selection is 4.7 % of live features, and it asks for DFA in a footnote",
    ),
    "n": Row("M28", "induction features by the composite rule: how many", "as above", unit=""),
    "behaviour": Row(
        "M28",
        "live features that pass behaviour alone",
        "composite rule, one of its tests",
        null="each feature with the B of another one",
    ),
    "sources": Row(
        "M28",
        "live features with most DFA from earlier B's",
        "median share of positive DFA from earlier B's of at least 0.5; composite rule, one of its tests",
        null="each feature with the B of another one",
    ),
    "copying": Row(
        "M28",
        "live features that copy: B raises them most",
        "B among the 1 % of tokens that raise the feature most through its head; composite rule, one of its tests",
        null="each feature with the B of another one",
    ),
    "off": Row(
        "M28",
        "features that behave, source and copy like induction: share off when the first A is replaced",
        "share of later A's at which it is off when the A's before earlier B's are replaced; mean over features",
        null="as many other tokens replaced",
    ),
    "head": Row(
        "M28",
        "induction features made by the induction head",
        "share of the features of the composite rule of which it brings most",
    ),
    "auc": Row(
        "M28",
        "the post's selection against the composite rule: AUC",
        "P(decoder share in the induction head is larger for an induction feature than for another live one)",
    ),
    "precision": Row(
        "M28",
        "selected features that are induction features by the composite rule",
        f"precision of a decoder share of at least {SELECTED:g}",
    ),
    "recall": Row(
        "M28",
        "induction features by the composite rule that are selected",
        f"recall of a decoder share of at least {SELECTED:g}",
    ),
}
_OF_HEAD = ("head", "auc", "precision", "recall")


def composites(subject: Subject) -> tuple[Finding, ...]:
    """M28, the post's footnote 9: induction features without choosing a head, compared with the old rule."""
    return fill(_COMPOSITE, lambda: _composites(subject))


def _composites(subject: Subject) -> Filled:
    judged = composite(subject)
    n, tests = len(judged.latents), judged.tests
    claims = {
        "share": _COMPOSITE["share"].of(share_that(judged.verdict, judged.by_chance())),
        "n": _COMPOSITE["n"].of(int(judged.verdict.sum()), n=n),
        "off": _off(judged),
        **{
            name: _COMPOSITE[name].of(share_that(tests[name], judged.by_chance(name)))
            for name in ("behaviour", "sources", "copying")
        },
    }
    try:
        head = model_heads(subject).induction
    except StudyError as error:
        return claims | {name: _COMPOSITE[name].without(why(error)) for name in _OF_HEAD}, ()
    compared = compare_rule(head_share(subject.index, head)[judged.latents].astype(np.float64), judged.verdict)
    made = judged.sources.head[judged.verdict]
    live = np.arange(subject.index.n_heads) == head
    chance = float(live.mean())
    note = f"head {subject.head_name(head)}"
    claims["head"] = _COMPOSITE["head"].of(share_that(made == head, Estimate(chance, chance, chance)), note=note)
    for name in ("auc", "precision", "recall"):
        claims[name] = _COMPOSITE[name].of(getattr(compared, name), note=note)
    figures = (
        _by_head(subject, judged),
        Figure(
            "The post's selection against the composite rule",
            "lines",
            tuple(f"{rate:.3f}" for rate in compared.false_rate.tolist()),
            {"induction features selected": tuple(compared.true_rate.tolist())},
            "ROC of the decoder share in the induction head, features of the composite rule as the truth",
            x="other live features selected",
            y="induction features selected",
        ),
    )
    return claims, figures


def _off(judged: InductionFeatures) -> Claim:
    tested = judged.corruption.n > 0  # those that pass the other three tests
    n, off, control = (
        int(of[tested].sum()) for of in (judged.corruption.n, judged.corruption.n_off, judged.corruption.n_off_control)
    )
    if not n:
        return _COMPOSITE["off"].without("no feature passes the other three tests")
    rates = judged.corruption.n_off[tested] / judged.corruption.n[tested]
    found = mean_by(np.flatnonzero(tested), rates, of="features", null=control / n)
    return _COMPOSITE["off"].of(found, note=f"{off} of {n} A's")


def _by_head(subject: Subject, judged: InductionFeatures) -> Figure:
    counts = judged.heads()
    return Figure(
        "Induction features by the head that brings most of each",
        "bars",
        tuple(subject.head_name(h) for h in range(len(counts))),
        {"features": tuple(map(float, counts.tolist()))},
        "features of the composite rule, by the head with most DFA from earlier B's",
        x="head",
        y="features",
    )


SECTIONS = (
    Section("selection", ("M27",), "features selected by their share in the induction head", selection),
    Section("behaviour", ("M28",), "whether selected features behave like induction", behaviours),
    Section("composite", ("M28",), "induction features without naming a head", composites),
)
