"""Claims on the upstream causes of an exemplar, by patching between prompts of the corpus and their corruptions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float

from headscope.errors import StudyError
from headscope.report.model_heads import model_heads
from headscope.report.prompt_pairs import CorpusPair, Pairs, pairs_of
from headscope.report.records import Claim, Exemplar, Figure, Finding, Kind, Listing, Section
from headscope.report.rows import Filled, Row, fill_each, mean_by, share_that, why
from headscope.report.subject import Subject
from headscope.stats import Measure
from headscope.studies.how.feature_patching import BARS, FeaturePatching, patch_features
from headscope.studies.how.patching import THRESHOLD, Node, NodeKind, Patching, interaction, patch, role

_CONTEXT: tuple[Kind, ...] = ("local context", "high-level context")
_METRICS = {"pre": "pre-activation", "activation": "activation"}
_SCORE = "(m - m_corrupted) / (m_clean - m_corrupted), m the feature at the last token; mean over prompts of the corpus"
_SHOWN = 12
_FEATURE_PROMPTS = 16

Direction = Literal["noising", "denoising"]
_NOTHING: dict[Direction, float] = {"noising": 1.0, "denoising": 0.0}
"""The scores of patches without effect."""


@dataclass(frozen=True)
class _Scores:
    """Scores of the same patches for all pairs."""

    documents: tuple[int, ...]
    values: dict[tuple[Direction, str], Float[np.ndarray, "pair patch"]]

    @classmethod
    def of(cls, pairs: Sequence[CorpusPair], results: Sequence[Patching]) -> "_Scores":
        values = {}
        for direction in ("noising", "denoising"):
            for metric in _METRICS:
                rows = [getattr(getattr(result, direction), f"{metric}_score") for result in results]
                values[direction, metric] = np.stack(rows)
        return cls(tuple(pair.document for pair in pairs), values)

    def mean(self, direction: Direction, metric: str, number: int, null: float | None = None) -> Measure:
        return mean_by(self.documents, self.values[direction, metric][:, number], null=null)


def _pairs(subject: Subject, exemplar: Exemplar) -> Pairs:
    return pairs_of(subject, exemplar)


def _survival(row: Row, pairs: Pairs) -> Claim:
    control = share_that(pairs.control)
    return replace(row.of(share_that(pairs.died)), null=control.value)


def _shown(subject: Subject, pair: CorpusPair) -> Listing:
    tokens, other = pair.pair.clean.tolist(), pair.pair.corrupted.tolist()
    rows = tuple(
        (str(i), subject.text(t), subject.text(o) if o != t else "", "source" if i in pair.sources else "")
        for i, (t, o) in enumerate(zip(tokens, other, strict=True))
        if i
    )
    on, off = pair.pair.on, pair.pair.off
    return Listing(
        "A prompt of the corpus and its corruption",
        ("position", "clean", "corrupted", "role"),
        rows,
        f"the feature at the last token: {on.activation:.3g} in the clean prompt, {off.activation:.3g} in the other "
        f"(pre-activations {on.pre:.3g} and {off.pre:.3g})",
    )


# ---------------------------------------------------------------------------------------------------------------- heads
_AT_B = "earlier heads' z at the B after each replaced A"
_HEADS = {
    "survival": Row(
        "M24",
        "prompts in which replacing the first A turns the feature off",
        "prompts of the corpus A B ... A, at most 64 tokens, A's before earlier B's replaced by tokens of the text",
        null="as many other earlier tokens replaced",
        post="one prompt, mother|board to chalk|board",
        differs="many prompts, not one picked by hand",
    ),
    **{
        f"{direction} {metric}": Row(
            "M24",
            f"{words} the best previous-token head at B, by the {name}",
            f"{direction} score, {_AT_B}; {_SCORE}",
            null="mean of the other earlier heads",
            post=post,
        )
        for metric, name in _METRICS.items()
        for direction, words, post in (
            ("noising", "what is left of the feature without", "0.2 is necessary: near 0"),
            ("denoising", "what is brought back of the feature by", None),
        )
    },
    "rank": Row(
        "M24",
        "prompts in which the best previous-token head matters most of all earlier heads",
        "its loss by noising at B is the largest, by the pre-activation",
        null="one of the earlier heads",
    ),
    "all": Row(
        "M24",
        "what is left of the feature without any earlier head at B, by the pre-activation",
        f"noising score of all {_AT_B}, together; {_SCORE}",
        null="what does not matter leaves 1",
    ),
}


def head_patching(subject: Subject) -> tuple[Finding, ...]:
    """M24: whether the output of a previous-token head at B is necessary for the induction feature."""
    return fill_each(subject, ("induction",), _HEADS, partial(_head_patching, subject))


def _head_patching(subject: Subject, exemplar: Exemplar) -> Filled:
    layer, n_heads = subject.sae.site.layer, subject.model.spec.n_heads
    if layer == 0:
        raise StudyError("an SAE of the first layer", expected="heads of earlier layers", do="take a later layer")
    pairs = _pairs(subject, exemplar)
    heads = [(below, head) for below in range(layer) for head in range(n_heads)]

    def patches(pair: CorpusPair) -> list[tuple[Node, ...]]:
        own = [tuple(Node("z", below, head, b) for b in pair.sources) for below, head in heads]
        return [*own, tuple(node for nodes in own for node in nodes)]

    found = _Scores.of(pairs.found, [patch(pair.pair, patches(pair)) for pair in pairs.found])
    claims = {
        "survival": _survival(_HEADS["survival"], pairs),
        "all": _HEADS["all"].of(found.mean("noising", "pre", len(heads), null=1.0)),
    }
    figures = (_by_head(heads, found), _shown(subject, pairs.found[0]))
    try:
        best = heads.index(model_heads(subject).previous_token)
    except StudyError as error:
        return claims | {name: row.without(why(error)) for name, row in _HEADS.items() if name not in claims}, figures
    name = "{}.{}".format(*heads[best])
    for direction in ("noising", "denoising"):
        for metric in _METRICS:
            values = found.values[direction, metric][:, : len(heads)]
            others = np.delete(values, best, axis=1)
            null = float(others.mean()) if others.size else None
            row = _HEADS[f"{direction} {metric}"]
            claims[f"{direction} {metric}"] = row.of(found.mean(direction, metric, best, null), note=f"head {name}")
    first = found.values["noising", "pre"][:, : len(heads)].argmin(1) == best
    claim = _HEADS["rank"].of(share_that(first), note=f"head {name}")
    claims["rank"] = replace(claim, null=1 / len(heads))
    return claims, figures


def _by_head(heads: Sequence[tuple[int, int]], found: _Scores) -> Figure:
    measures = {
        f"{direction}, {_METRICS[metric]}": [found.mean(direction, metric, i) for i in range(len(heads))]
        for direction in ("noising", "denoising")
        for metric in _METRICS
    }
    return Figure(
        "Patching each earlier head at B",
        "grouped",
        tuple(f"{layer}.{head}" for layer, head in heads),
        {name: tuple(each.value for each in of) for name, of in measures.items()},
        f"{_AT_B}; {_SCORE}",
        x="head",
        y="score: corrupted 0, clean 1",
        low={name: tuple(each.low for each in of) for name, of in measures.items()},
        high={name: tuple(each.high for each in of) for name, of in measures.items()},
    )


# ----------------------------------------------------------------------------------------------------------- components
_SOURCE_SURVIVAL = Row(
    "M25",
    "prompts in which replacing the source tokens turns the feature off",
    "prompts of the corpus, cut to at most 64 tokens, all source tokens in them replaced by tokens of the text",
    null="as many other earlier tokens replaced",
    differs="many prompts, not one picked by hand",
)
_BY_SITE: dict[NodeKind, str | None] = {
    "mlp_out": "mlp_out of layer 0 matters much more than attn_out",
    "attn_out": None,
}
_COMPONENTS = {
    "survival": _SOURCE_SURVIVAL,
    **{
        f"{direction} {site}": Row(
            "M25",
            f"{words} {site} of the layer below, all positions",
            f"{direction} score of the pre-activation, {_SCORE}"
            + ("; mlp_out follows the patched attn_out, as in the post" if site == "attn_out" else ""),
            post=post,
        )
        for site, post in _BY_SITE.items()
        for direction, words in (
            ("noising", "what is left of the feature without"),
            ("denoising", "what is brought back of the feature by"),
        )
    },
    **{
        f"{direction} at sources": Row(
            "M25",
            f"{words} mlp_out of the layer below, at the source tokens",
            f"{direction} score of the pre-activation, {_SCORE}",
            post="the most important position",
        )
        for direction, words in (
            ("noising", "what is left of the feature without"),
            ("denoising", "what is brought back of the feature by"),
        )
    },
    "loss elsewhere": Row(
        "M25",
        "largest loss by mlp_out of the layer below at one other position",
        f"largest 1 - noising score of the activation over positions that are no source, {_SCORE}",
        post=0.2,
    ),
    "gain elsewhere": Row(
        "M25",
        "what is brought back by mlp_out at that position",
        f"denoising score of the activation, {_SCORE}",
        post=0.0,
    ),
    "and elsewhere": Row(
        "M25",
        "prompts in which another position's mlp_out is needed and not enough",
        f"prompts with another position whose noising loses {THRESHOLD:g} or more and whose denoising brings back less",
        differs='the post leaves noising without denoising at " look" unexplained',
    ),
    "joint": Row(
        "M25",
        "that position and the source tokens together: denoised above the source tokens alone",
        "denoising score of the activation of both less that of mlp_out at the source tokens; mean over these prompts",
        differs="above 0 where the position is needed with the sources: an AND",
    ),
}


_ELSEWHERE = ("loss elsewhere", "gain elsewhere", "and elsewhere", "joint")


def components(subject: Subject) -> tuple[Finding, ...]:
    """M25: attn_out and mlp_out of the layer below, at all positions and individually, and AND or OR."""
    return fill_each(subject, _CONTEXT, _COMPONENTS, partial(_components, subject))


def _components(subject: Subject, exemplar: Exemplar) -> Filled:
    below = subject.sae.site.layer - 1
    if below < 0:
        raise StudyError("an SAE of the first layer", expected="a layer below it", do="take a later layer")
    pairs = _pairs(subject, exemplar)

    def sources(pair: CorpusPair, site: NodeKind) -> tuple[Node, ...]:
        return tuple(Node(site, below, None, s) for s in pair.sources)

    def whole(pair: CorpusPair) -> list[tuple[Node, ...]]:
        return [(Node("mlp_out", below),), (Node("attn_out", below),), sources(pair, "mlp_out")]

    found = _Scores.of(pairs.found, [patch(pair.pair, whole(pair)) for pair in pairs.found])
    claims = {"survival": _survival(_COMPONENTS["survival"], pairs)}
    note = f"layer {below}"
    for number, name in enumerate(("mlp_out", "attn_out", "at sources")):
        for direction in ("noising", "denoising"):
            row = f"{direction} {name}"
            claims[row] = _COMPONENTS[row].of(found.mean(direction, "pre", number, _NOTHING[direction]), note=note)
    claims |= _elsewhere(pairs, below)
    return claims, (_components_drawn(exemplar, found), _shown(subject, pairs.found[0]))


def _elsewhere(pairs: Pairs, below: int) -> dict[str, Claim]:
    """Return the effect of mlp_out at single non-source positions; the largest loss of each prompt."""
    losses, gains, roles, joint, documents = [], [], [], [], []
    for pair in pairs.found:
        places = [p for p in range(pair.replaced[0] + 1, pair.pair.query + 1) if p not in pair.sources]
        if not places:
            continue
        nodes = [Node("mlp_out", below, None, p) for p in places]
        result = patch(pair.pair, nodes)
        loss, gain = 1 - result.noising.activation_score, result.denoising.activation_score
        most = int(loss.argmax())
        own = tuple(Node("mlp_out", below, None, s) for s in pair.sources)
        both = interaction(pair.pair, own, nodes[most]).patching.denoising.activation_score
        losses.append(loss[most])
        gains.append(gain[most])
        joint.append(both[2] - both[0])
        roles.append(any(role(*effect) == "AND" for effect in zip(loss.tolist(), gain.tolist(), strict=True)))
        documents.append(pair.document)
    if not losses:
        reason = "no prompt has another position between its source tokens and the feature"
        return {name: _COMPONENTS[name].without(reason) for name in _ELSEWHERE}
    note = "the position of the largest loss in each prompt"
    return {
        "loss elsewhere": _COMPONENTS["loss elsewhere"].of(mean_by(documents, np.array(losses), null=0.0), note=note),
        "gain elsewhere": _COMPONENTS["gain elsewhere"].of(mean_by(documents, np.array(gains), null=0.0), note=note),
        "and elsewhere": _COMPONENTS["and elsewhere"].of(share_that(roles)),
        "joint": _COMPONENTS["joint"].of(mean_by(documents, np.array(joint), null=0.0), note=note),
    }


def _components_drawn(exemplar: Exemplar, found: _Scores) -> Figure:
    labels = ("mlp_out", "attn_out", "mlp_out at sources")
    measures = {
        f"{direction}, {name}": [found.mean(direction, metric, i) for i in range(len(labels))]
        for direction in ("noising", "denoising")
        for metric, name in _METRICS.items()
    }
    return Figure(
        f"Patching the layer below for the {exemplar.kind} feature",
        "grouped",
        labels,
        {name: tuple(each.value for each in of) for name, of in measures.items()},
        _SCORE,
        x="component",
        y="score: corrupted 0, clean 1",
        low={name: tuple(each.low for each in of) for name, of in measures.items()},
        high={name: tuple(each.high for each in of) for name, of in measures.items()},
    )


# ------------------------------------------------------------------------------------------------------------- features
_AT = "at the source tokens, x + (f_other - f)_i W_dec[i], the error kept"
_FEATURES = {
    **{
        f"{direction} {name}": Row(
            "M26",
            f"{words} {what} of the earlier SAE at the source tokens",
            f"{direction} score of the pre-activation {_AT}; mean over prompts",
        )
        for name, what in (("site", "the whole site"), ("features", "all features"), ("error", "the error"))
        for direction, words in (
            ("noising", "what is left of the feature without"),
            ("denoising", "what is brought back of the feature by"),
        )
    },
    "noising top": Row(
        "M26",
        "what is left of the feature without the one upstream feature that matters most",
        f"noising score of the pre-activation {_AT}; the feature first in most prompts",
        null="the upstream feature in the middle",
        post="one feature (13570) clearly stands out",
    ),
    "denoising top": Row(
        "M26",
        "what is brought back of the feature by that upstream feature alone",
        f"denoising score of the pre-activation {_AT}",
        null="the upstream feature in the middle",
        post="one feature (13570) clearly stands out",
    ),
    "consistent": Row("M26", "prompts in which the same upstream feature matters most", "share of the prompts"),
    "few": Row(
        "M26",
        "upstream features that have 90 % of the effect of all, in both directions",
        "median over prompts where it can be said",
        post=1.0,
        unit="",
    ),
}


def features(subject: Subject) -> tuple[Finding, ...]:
    """M26: the features of an SAE of an earlier component that an exemplar is computed from."""
    return fill_each(subject, _CONTEXT, _FEATURES, partial(_features, subject))


def _features(subject: Subject, exemplar: Exemplar) -> Filled:
    sae = subject.upstream_sae
    if sae is None:
        raise StudyError(
            "no SAE of an earlier component", expected="one, of mlp_out for example (--upstream)", do="pass --upstream"
        )
    pairs = _pairs(subject, exemplar).found[:_FEATURE_PROMPTS]
    found = [(pair, patch_features(pair.pair, sae, list(pair.sources))) for pair in pairs]
    documents = [pair.document for pair, _ in found]
    claims: dict[str, Claim] = {}
    for number, name in enumerate(BARS):
        for direction in ("noising", "denoising"):
            values = np.array([getattr(each, f"bars_{direction}").pre_score[number] for _, each in found])
            row = f"{direction} {name}"
            claims[row] = _FEATURES[row].of(mean_by(documents, values, null=_NOTHING[direction]))
    known = [(pair, each) for pair, each in found if len(each.latents)]
    if not known:
        reason = "no upstream feature differs between the prompts"
        return claims | {name: row.without(reason) for name, row in _FEATURES.items() if name not in claims}, ()
    firsts = np.array([int(each.latents[0]) for _, each in known])
    values, counts = np.unique(firsts, return_counts=True)
    best = int(values[counts.argmax()])
    for direction in ("noising", "denoising"):
        claims[f"{direction} top"] = _top(f"{direction} top", direction, best, known)
    claims["consistent"] = _FEATURES["consistent"].of(share_that(firsts == best), note=f"feature {best}")
    few = [each.few for _, each in known if each.few is not None]
    if few:
        told = f"{len(few)} of {len(known)} prompts"
        claims["few"] = _FEATURES["few"].of(float(np.median(few)), n=len(few), note=told)
    else:
        claims["few"] = _FEATURES["few"].without("in no prompt do 32 features have 90 % of the effect of all")
    return claims, (_features_listed(exemplar, known),)


def _top(row: str, direction: Direction, best: int, known: Sequence[tuple[CorpusPair, FeaturePatching]]) -> Claim:
    """Return one feature's score, 1 (noising) or 0 (denoising) where the prompts do not differ, with the median one."""
    own, middle = [], []
    for _, each in known:
        scores = getattr(each, direction).pre_score
        at = np.flatnonzero(each.latents == best)
        own.append(scores[at[0]] if len(at) else _NOTHING[direction])
        middle.append(float(np.median(scores)))
    measured = mean_by([pair.document for pair, _ in known], np.array(own), null=float(np.mean(middle)))
    return _FEATURES[row].of(measured, note=f"feature {best}")


def _features_listed(exemplar: Exemplar, known: Sequence[tuple[CorpusPair, FeaturePatching]]) -> Listing:
    effects: dict[int, list[tuple[float, float]]] = {}
    for _, each in known:
        for i, latent in enumerate(each.latents[:_SHOWN].tolist()):
            effects.setdefault(latent, []).append(
                (1 - float(each.noising.pre_score[i]), float(each.denoising.pre_score[i]))
            )
    ranked = sorted(effects.items(), key=lambda item: -sum(map(sum, item[1])))[:_SHOWN]
    rows = tuple(
        (
            str(latent),
            f"{len(own)} of {len(known)}",
            f"{np.mean([loss for loss, _ in own]):.2f}",
            f"{np.mean([gain for _, gain in own]):.2f}",
        )
        for latent, own in ranked
    )
    site = known[0][1].site
    return Listing(
        f"Features of {site.hook_name} that the {exemplar.kind} feature is computed from",
        ("feature", "among the first in prompts", "loss by noising", "gain by denoising"),
        rows,
        f"pre-activation {_AT}; means over the prompts in which each is among the first {_SHOWN}",
    )


SECTIONS = (
    Section("head_patching", ("M24",), "whether a previous-token head is needed for induction", head_patching),
    Section("components", ("M25",), "which part of the layer below computes a context feature", components),
    Section("upstream_features", ("M26",), "which upstream SAE features a context feature is computed from", features),
)
