"""Sensitivity of a feature to its proxy: recall, its parts, and false negatives. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool

from headscope.errors import StudyError
from headscope.stats import Estimate, wilson
from headscope.studies.when.measures import Measures
from headscope.studies.when.records import Sensitivity, SubtypeRecall

REST = "none of these"

Verdict = Literal["miss", "proxy wrong", "unclear"]
"""Verdict on a false negative: the feature should have fired; the proxy is true where it should not be; unclear."""


def sensitivity(
    measures: Measures, subtypes: Mapping[str, Bool[np.ndarray, " token"]], *, n_examples: int, seed: int
) -> Sensitivity:
    """Compute recall over the whole proxy and by subtype, and the false negatives.

    Args:
        measures: measures of the feature and its proxy.
        subtypes: masks; they may overlap, and only their part within the proxy counts.
        n_examples: number of false negatives sampled for judgement.
        seed: seed of that sample.

    Raises:
        StudyError: a subtype that is called `none of these`.
    """
    if REST in subtypes:
        raise StudyError(f"a subtype called {REST!r}", expected="another name", do="call it something else")
    split = measures.split
    parts = {name: mask & split.mask for name, mask in subtypes.items()}
    if parts:
        rest = split.mask & ~np.logical_or.reduce(list(parts.values()))
        parts |= {REST: rest} if rest.any() else {}
    silent = split.mask.copy()
    silent[split.position] = False
    missed = np.flatnonzero(silent)
    rng = np.random.default_rng(seed)
    return Sensitivity(
        recall=measures.recall(),
        subtypes=tuple(_subtype(measures, name, mask) for name, mask in parts.items()),
        false_negatives=missed,
        sample=rng.choice(missed, min(n_examples, len(missed)), replace=False),
    )


def _subtype(measures: Measures, name: str, mask: Bool[np.ndarray, " token"]) -> SubtypeRecall:
    n_both = int(np.count_nonzero(mask[measures.split.position]))
    return SubtypeRecall(name, int(np.count_nonzero(mask)), n_both, measures.recall_of(mask))


# ------------------------------------------------------------------------------------------------------------ verdicts
@dataclass(frozen=True)
class Adjudication:
    """Estimates for all false negatives from a judged sample."""

    n_judged: int
    n_unclear: int
    n_false_negatives: int
    """Number of all of them, judged or not."""
    misses: Estimate | None
    """Share of real misses among the judged ones that are clear; Wilson. None when there are none."""
    recall: Estimate | None
    """TP / (TP + misses * FN): recall if the judged ones are a random sample of the false negatives; the interval is
    that of `misses` alone. None without clear verdicts, or when the feature is never active where the proxy is true."""
    definition: str = "recall with the false negatives that are the proxy's fault taken away"


def adjudicate(found: Sensitivity, verdicts: Mapping[int, Verdict]) -> Adjudication:
    """Correct recall by verdicts on false negatives.

    Args:
        found: the study.
        verdicts: by position. For the correction to hold they must be a random sample: the first ones of
            `found.sample`.

    Raises:
        StudyError: a position that is not a false negative of the study, or an unknown verdict.
    """
    known = set(found.false_negatives.tolist())
    for position, verdict in verdicts.items():
        if position not in known or verdict not in get_args(Verdict):
            raise StudyError(
                f"verdict {verdict!r} at position {position}",
                expected=f"{', '.join(get_args(Verdict))}, at a false negative of the study",
                do="judge the positions of `sample`",
            )
    given = list(verdicts.values())
    n_clear = len(given) - given.count("unclear")
    misses = wilson(given.count("miss"), n_clear) if n_clear else None
    n_missed, n_both = len(found.false_negatives), found.recall.n - len(found.false_negatives)
    corrected = None
    if misses and n_both:
        shares = (misses.value, misses.high, misses.low)  # the more are real, the lower the recall
        corrected = Estimate(*(n_both / (n_both + share * n_missed) for share in shares))
    return Adjudication(len(given), given.count("unclear"), n_missed, misses, corrected)
