"""Claims on the heads: concentration of features on few heads, and induction and previous-token heads."""

from dataclasses import replace

import numpy as np

from headscope.report.ablated import replacement
from headscope.report.model_heads import LEAST, N_SHUFFLED, ModelHeads, model_heads
from headscope.report.records import Claim, Figure, Finding, Section
from headscope.report.rows import Filled, Row, fill, share_that
from headscope.report.subject import Subject
from headscope.stats import Estimate, Measure, wilson
from headscope.studies.heads.scores import DEFINITIONS, ScoreName, prefix_curves
from headscope.studies.heads.superposition import Concentration, concentration, redundancy, source_agreement

_ONE = 0.9
_DIRECTIONS = "directions of z that mean nothing and are active as often"
_AGREEMENT_PLACES = 1

# ------------------------------------------------------------------------------------------------------- concentration
_OF_HEADS = {
    "median": Row(
        "M21",
        "share of variance of the top head of a feature: median over features",
        "largest share of a head in sum C_h^2, live features with 30 active tokens or more",
        post="a spread from about one head to all eight, no number",
        null=_DIRECTIONS,
    ),
    "one": Row(
        "M21",
        "features that one head makes",
        f"share of features whose top head has at least {_ONE:.0%} of sum C_h^2",
        null=_DIRECTIONS,
    ),
    "several": Row(
        "M21",
        "features that several heads make",
        "share of features with 1 / sum share^2 of 2 or more",
        null=_DIRECTIONS,
    ),
    "covariance": Row(
        "M21",
        "features that several heads make, by covariance",
        "share of features with 1 / sum share^2 of 2 or more, shares Cov(C_h, pre) / Var(pre)",
        differs="blind to a head that adds a constant",
        null=_DIRECTIONS,
    ),
}


def concentrations(subject: Subject) -> tuple[Finding, ...]:
    """M21: concentration of features on few heads, vs. null directions."""
    return fill(_OF_HEADS, lambda: _concentrations(subject))


def _concentrations(subject: Subject) -> Filled:
    squared, covariance = (concentration(subject.index, by) for by in ("dfa", "dfa_covariance"))
    null = np.concatenate([np.zeros(0), *squared.top_null.values()])
    claims = {
        "median": _OF_HEADS["median"].of(_median(squared.top, null)),
        "one": _OF_HEADS["one"].of(share_that(squared.top >= _ONE, _rate(null >= _ONE))),
        "several": _OF_HEADS["several"].of(squared.several),
        "covariance": _OF_HEADS["covariance"].of(covariance.several),
    }
    return claims, (_histogram(squared),)


def _median(values: np.ndarray, null: np.ndarray) -> Measure:
    of_null = float(np.median(null)) if len(null) else None
    expected = None if of_null is None else Estimate(of_null, of_null, of_null)
    if not len(values):
        return Measure("", 0, null=expected, missing="no live feature has 30 active tokens")
    draws = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return Measure("", len(values), float(np.median(values)), float(low), float(high), null=expected)


def _rate(holds: np.ndarray) -> Estimate | None:
    return wilson(int(holds.sum()), len(holds)) if len(holds) else None


def _histogram(found: Concentration) -> Figure:
    edges, counts, nulls = found.histogram()
    series = {"features": counts, **{f"null: {kind}": values for kind, values in nulls.items()}}
    return Figure(
        "Share of variance of the top head of each feature",
        "lines",
        tuple(f"{edge:.2f}" for edge in edges[:-1]),
        {name: tuple((values / max(values.sum(), 1)).tolist()) for name, values in series.items()},
        "live features, and directions that mean nothing, by the largest share of a head in sum C_h^2",
        x="largest share of a head",
        y="share of features",
    )


# -------------------------------------------------------------------------------------------------------------- scores
_CHANCE = f"the largest of any head in {N_SHUFFLED} copies of the model with shuffled weights"
_SCORES = {
    "induction": Row(
        "M22",
        "induction score of the best head of the layer",
        DEFINITIONS["induction"],
        post="1.6 is clearly an induction head, no number",
        null=_CHANCE,
    ),
    "second": Row(
        "M22",
        "induction score of the second head of the layer",
        DEFINITIONS["induction"],
        post="1.4 has a partial score, no number",
        null=_CHANCE,
    ),
    "n_induction": Row(
        "M22",
        "induction heads in the layer",
        f"heads with an induction score of at least {LEAST:g} and above the null",
        unit="",
    ),
    "copy_loss": Row(
        "M22", "loss on the second copy of random tokens", "mean nats a token, from its second token on", unit="nats"
    ),
    "duplicate": Row(
        "M22", "duplicate-token score of the best head of the layer", DEFINITIONS["duplicate_token"], null=_CHANCE
    ),
    "previous": Row(
        "M23",
        "previous-token score of the best head before the layer",
        DEFINITIONS["previous_token"],
        post="0.2 is a previous-token head, no number",
        null=_CHANCE,
    ),
    "n_previous": Row(
        "M23",
        "previous-token heads before the layer",
        f"heads of earlier layers with a previous-token score of at least {LEAST:g} and above the null",
        unit="",
    ),
    "shortest": Row(
        "4.3",
        "attention of the best induction head at a prefix of one token",
        "mean attention from the last of p copied tokens to the token after their first copy, p = 1",
        null="the same places before anything is copied",
        differs="of GPT-2: heads 5.5 about 0.7, 5.1 below 0.3 (Kissane et al., 2024b)",
    ),
    "longest": Row(
        "4.3",
        "attention of the best induction head at a prefix of nine tokens",
        "the same for p = 9, or for as many as the context holds",
        null="the same places before anything is copied",
        differs="of GPT-2: above 0.7 for both heads",
    ),
}


def scores(subject: Subject) -> tuple[Finding, ...]:
    """M22, M23 and prefix curves: head scores on repeated random tokens, vs. shuffled weights."""
    return fill(_SCORES, lambda: _scores(subject))


def _scores(subject: Subject) -> Filled:
    heads, layer = model_heads(subject), subject.sae.site.layer
    n, own = heads.scores.n_sequences, heads.scores.induction[layer]
    order = own.argsort(descending=True).tolist()
    duplicate = int(heads.scores.duplicate_token[layer].argmax())
    claims = {
        "induction": _score("induction", heads, "induction", layer, order[0]),
        "n_induction": _SCORES["n_induction"].of(int((heads.holds("induction")[layer] > 0).sum()), n=len(own)),
        "copy_loss": _SCORES["copy_loss"].of(heads.scores.copy_loss, n=n),
        "duplicate": _score("duplicate", heads, "duplicate_token", layer, duplicate),
    }
    if len(order) > 1:
        claims["second"] = _score("second", heads, "induction", layer, order[1])
    if layer:
        before, head = divmod(int(heads.scores.previous_token[:layer].argmax()), len(own))
        claims["previous"] = _score("previous", heads, "previous_token", before, head)
        held = heads.holds("previous_token")[:layer]
        claims["n_previous"] = _SCORES["n_previous"].of(int((held > 0).sum()), n=held.numel())
    else:
        for name in ("previous", "n_previous"):
            claims[name] = _SCORES[name].without("there is no layer before the first")
    curves, figure = _prefixes(subject, order[0])
    return claims | curves, (_of_scores(heads), *figure)


def _score(row: str, heads: ModelHeads, name: ScoreName, layer: int, head: int) -> Claim:
    found = getattr(heads.scores, name)[layer, head]
    low, high = heads.scores.intervals[name][:, layer, head].tolist()
    estimate = Estimate(float(found), low, high)
    note = f"head {layer}.{head}; a head that attends evenly has {heads.scores.even[name]:.2g}"
    claim = _SCORES[row].of(estimate, n=heads.scores.n_sequences, note=note)
    return replace(claim, null=max(heads.chance[name]))


def _of_scores(heads: ModelHeads) -> Figure:
    n_layers, n_heads = heads.scores.induction.shape
    labels = tuple(f"{layer}.{head}" for layer in range(n_layers) for head in range(n_heads))
    series = {name.replace("_", " "): tuple(getattr(heads.scores, name).reshape(-1).tolist()) for name in DEFINITIONS}
    return Figure(
        "Head scores on repeated random tokens",
        "grouped",
        labels,
        series,
        "; ".join(f"{name.replace('_', ' ')}: {of}" for name, of in DEFINITIONS.items()),
        x="head",
        y="score",
    )


def _prefixes(subject: Subject, head: int) -> tuple[dict[str, Claim], tuple[Figure, ...]]:
    model, layer = subject.model, subject.sae.site.layer
    length = min(128, model.spec.context, model.spec.d_vocab)
    longest = min(9, (length - 3) // 2)
    if longest < 1:
        reason = f"sequences of {length} distinct tokens hold no copied prefix"
        return {name: _SCORES[name].without(reason) for name in ("shortest", "longest")}, ()
    found = prefix_curves(model, longest=longest, length=length, n_sequences=min(64, subject.settings.sequences))
    claims = {}
    for name, p in (("shortest", 0), ("longest", longest - 1)):
        low, high = found.interval[:, p, layer, head].tolist()
        estimate = Estimate(float(found.attention[p, layer, head]), low, high)
        note = f"head {layer}.{head}, p = {p + 1}"
        claim = _SCORES[name].of(estimate, n=found.n_sequences, note=note)
        claims[name] = replace(claim, null=float(found.null[p, layer, head]))
    heads = range(model.spec.n_heads)
    figure = Figure(
        "How long a prefix the heads need",
        "lines",
        tuple(str(p) for p in range(1, longest + 1)),
        {f"{layer}.{h}": tuple(found.attention[:, layer, h].tolist()) for h in heads},
        found.definition,
        x="copied tokens",
        y="attention",
    )
    return claims, (figure,)


# -------------------------------------------------------------------------------------------------------- superposition
_SUPERPOSED = {
    "several": Row(
        "4.8", "features with two or more contributing heads", "heads with 10 % or more of sum C_h^2", null=_DIRECTIONS
    ),
    "redundant": Row(
        "4.8",
        "features of several heads that any one of them can lose",
        "share of them that stay on with any one of their heads mean-ablated and turn off with all, at most tokens",
        null=_DIRECTIONS,
    ),
    "and": Row(
        "4.8",
        "features of several heads that need each of them",
        "share of them that turn off with any one of their heads mean-ablated, at most active tokens",
        null=_DIRECTIONS,
    ),
    "divergence": Row(
        "4.8",
        "how far apart the sources of the heads of one feature are",
        "mean Jensen-Shannon divergence in bits of |C[h, s]| over sources between two of its heads: 0 alike, 1 apart",
        post="1.3 and 1.7 do similar, not identical things",
        unit="",
        null="one of its heads and one that does not make it",
    ),
}


def superposition(subject: Subject) -> tuple[Finding, ...]:
    """4.8: whether heads that make one feature read the same sources, and whether each of them is needed."""
    return fill(_SUPERPOSED, lambda: _superposition(subject))


def _superposition(subject: Subject) -> Filled:
    found = redundancy(subject.live, replacement(subject), seed=subject.settings.seed)
    claims = {name: _SUPERPOSED[name].of(found.share(name)) for name in ("redundant", "and")}
    claims["several"] = _SUPERPOSED["several"].of(found.several())
    if len(found.features.latents):
        agreement = source_agreement(subject.live, found.features, n_places=_AGREEMENT_PLACES)
        claims["divergence"] = _SUPERPOSED["divergence"].of(agreement.mean)
    else:
        claims["divergence"] = _SUPERPOSED["divergence"].without("no feature is made by several heads")
    return claims, ()


SECTIONS = (
    Section("concentration", ("M21",), "on how few heads features rest", concentrations),
    Section("head_scores", ("M22", "M23", "4.3"), "which heads are induction and previous-token heads", scores),
    Section("superposition", ("4.8",), "whether the heads of a feature do the same and are all needed", superposition),
)
