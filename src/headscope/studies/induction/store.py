"""Judge all live features for induction, compare with the post's rule and control groups, and store the results."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from headscope.errors import StudyError
from headscope.index.columns import add_columns
from headscope.index.head_table import add_head_table, measure_row
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.stats import Measure
from headscope.studies.induction.behaviour import (
    CONTROL,
    SELECTED,
    RuleComparison,
    behaviour,
    compare_rule,
    control_group,
    head_share,
    selected,
)
from headscope.studies.induction.composite import InductionFeatures, induction_features

Progress = Callable[[str, int, int], None]
"""Progress callback: called with the stage, the work done and the total."""

_COLUMNS = {
    "token": "B: the token whose logit the feature raises most",
    "n_expected": "later A's of groups A B ... A B of a block at which it should be on",
    "rate": "share of those at which it is on, and off at the first A of the group",
    "first_rate": "share of the first A's at which it is on",
    "source_share": "median share of positive DFA from earlier B's, at later A's where it is active",
    "head": "the head that brings most of it",
    "copy_rank": "share of the vocabulary that would raise it more than B does, through that head",
    "off": "share of later A's at which it turns off when the A's before earlier B's are replaced",
    "off_control": "the same when as many other tokens are",
    "verdict": "passes all tests",
}


@dataclass(frozen=True)
class InductionFamily:
    """The induction features of a dictionary, found without choosing a head, compared with the post's rule."""

    judged: InductionFeatures
    layer: int
    head: int | None
    """Top head of the most induction features; None where there are none: the family has no member."""
    rules: dict[int, RuleComparison]
    """By head: its decoder share compared with the composite test, for heads that are the top head of some."""
    measures: dict[str, Measure]
    """By name: the composite test with each of its parts, and the post's rates for its groups."""

    def lines(self) -> list[str]:
        """Return a summary as text, one number per line."""
        found = [f"{name}: {measure}" for name, measure in self.measures.items()]
        counts = self.judged.heads()
        heads = ", ".join(f"{self.layer}.{h}: {counts[h]}" for h in np.argsort(-counts, kind="stable") if counts[h])
        found.append(f"heads that bring most of them: {heads or 'none: no feature passes all tests'}")
        for head, rule in self.rules.items():
            found.append(f"decoder share of {self.layer}.{head} against the composite test: AUC {rule.auc}")
            found.append(f"  at {rule.at:g}: precision {rule.precision}; recall {rule.recall}")
        return found


def induction_family(live: LiveIndex, *, seed: int = 0, on_progress: Progress | None = None) -> InductionFamily:
    """Judge all live features, then apply the post's rule to the top heads found.

    The post's groups are for the top head of most induction features: selected (decoder share of at least 0.6),
    control (500 with less than 0.1), and control matched to the selected in density and in the frequency of B.

    Raises:
        StudyError: no live feature.
        IndexFormatError: a damaged index.
    """
    judged = induction_features(live, seed=seed, on_progress=on_progress)
    live_features = judged.latents
    measures = {"induction features": judged.share()}
    measures |= {f"pass {name}": judged.passing(name) for name in judged.tests}
    counts = judged.heads()
    heads = [int(h) for h in np.argsort(-counts, kind="stable") if counts[h]]
    if not heads:
        return InductionFamily(judged, live.sae.site.layer, None, {}, measures)
    head = heads[0]
    measures |= _groups(live, head, seed)
    rules = {
        h: compare_rule(head_share(live.index, h)[live_features].astype(np.float64), judged.verdict) for h in heads
    }
    return InductionFamily(judged, live.sae.site.layer, head, rules, measures)


def _groups(live: LiveIndex, head: int, seed: int) -> dict[str, Measure]:
    """Return the post's pass rates for features selected by one head, and for two control groups."""
    index = live.index
    chosen = selected(index, head)
    if not len(chosen):
        nothing = Measure(f"no live feature has a decoder share of {SELECTED:g} of head {head}", 0, missing="no member")
        return {"pass behaviour, selected": nothing}
    control = behaviour(index, control_group(index, head, seed=seed), seed=seed) if _some(live, head, 1) else None
    found = behaviour(index, chosen, seed=seed)
    measures = {"pass behaviour, selected": found.passing(null=control)}
    if control is not None:
        measures["pass behaviour, control"] = control.passing()
    if _some(live, head, len(chosen)):
        matched = behaviour(index, control_group(index, head, chosen, seed=seed), seed=seed)
        measures["pass behaviour, matched control"] = matched.passing()
    return measures


def _some(live: LiveIndex, head: int, n: int) -> bool:
    """Whether there are enough features for a control group."""
    share = head_share(live.index, head)
    return int(((live.index.table()["n_active"].to_numpy() > 0) & (share < CONTROL)).sum()) >= n


def save_family(live: LiveIndex, found: InductionFamily) -> None:
    """Store the result: the columns `induction.*`, and the tables of heads `measures_induction` and `rules`.

    Raises:
        IndexFormatError: it is of another index.
        OutputError: it cannot be written.
    """
    index = live.index
    if len(found.judged.latents) and int(found.judged.latents.max()) >= index.n_latents:
        raise StudyError("features of another SAE", expected="those of the index", do="study this index")
    save_columns(index, found.judged)
    provenance = {"settings": {"layer": found.layer}, "n": f"{len(found.judged.latents)} live features"}
    rows = [
        {"measure": name, "definition": measure.definition, **measure_row("value", measure)}
        for name, measure in found.measures.items()
    ]
    add_head_table(index, "measures_induction", rows, provenance)
    add_head_table(
        index, "rules", [{"head": head, **_rule_row(rule)} for head, rule in found.rules.items()], provenance
    )


def _rule_row(rule: RuleComparison) -> dict:
    curve = {name: getattr(rule, name).tolist() for name in ("threshold", "true_rate", "false_rate")}
    plain = {"n": rule.n, "n_true": rule.n_true, "at": rule.at}
    measured = (measure_row(name, getattr(rule, name)) for name in ("auc", "precision", "recall"))
    return {**plain, **curve, **{key: value for row in measured for key, value in row.items()}}


def save_columns(index: FeatureIndex, judged: InductionFeatures) -> None:
    """Add the verdicts to the index as the columns `induction.*`; see `index.columns`.

    Raises:
        IndexFormatError: they are of another index.
    """
    reading = judged.criteria.reading
    n, first, corruption = judged.behaviour.n_expected(reading), judged.behaviour.first, judged.corruption
    with np.errstate(invalid="ignore"):
        values = {
            "token": judged.behaviour.token,
            "n_expected": n,
            "rate": judged.behaviour.rate(reading),
            "first_rate": first[:, 1] / first[:, 0],
            "source_share": judged.sources.share,
            "head": judged.sources.head,
            "copy_rank": judged.copy_rank,
            "off": corruption.n_off / corruption.n,
            "off_control": corruption.n_off_control / corruption.n,
            "verdict": judged.verdict,
        }
    columns = {name: _spread(of, judged.latents, index.n_latents) for name, of in values.items()}
    table = pa.table({"latent": pa.array(np.arange(index.n_latents), pa.int32()), **columns})
    asked = {**vars(judged.criteria), "reading": vars(reading)}
    add_columns(
        index,
        "induction",
        table,
        {"settings": asked, "definitions": _COLUMNS, "n": f"{len(judged.latents)} live features"},
    )


def _spread(values: np.ndarray, latents: np.ndarray, n: int) -> pa.Array:
    """Expand values to all latents, null where there is none."""
    whole, missing = np.zeros(n, dtype=values.dtype), np.ones(n, dtype=bool)
    whole[latents] = values
    missing[latents] = (
        np.isnan(values) if values.dtype.kind == "f" else values == -1 if values.dtype.kind == "i" else False
    )
    return pa.array(np.where(missing, 0, whole).astype(values.dtype), mask=missing)
