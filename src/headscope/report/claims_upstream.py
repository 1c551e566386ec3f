"""Claims on the causes of an exemplar: heads, source tokens, attention, the static table, and the residual stream."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from headscope.report.records import KINDS, Claim, Exemplar, Figure, Finding, Listing, Section
from headscope.report.rows import Filled, Row, fill, fill_each, mean_by, share_that
from headscope.report.subject import Subject
from headscope.stats import Estimate, Measure, ratio
from headscope.studies.how.circuit_corpus import LINEAR, SQUARES, FeatureCircuit, feature_circuit
from headscope.studies.how.head_shares import HeadShares, head_shares
from headscope.studies.how.sources import SourceShares, compare_heads, source_shares
from headscope.studies.induction.composite import copy_ranks
from headscope.studies.support.active import Text, drawn

_THRESHOLDS = (0.0, 0.25, 0.5, 0.75)
"""Fractions of the largest activation."""
_SOURCE_BLOCKS, _CIRCUIT_TOKENS, _EXAMPLES = 160, 160, 32
_BY_DECODER = {
    "decoder": "||W_dec[j, h]||",
    "decoder_out": "||W_dec[j, h] W_O[h]||",
    "encoder": "||W_enc[h, :, j]||",
    "encoder_in": "||W_V[h] W_enc[h, :, j]||",
}

# ---------------------------------------------------------------------------------------------------------------- heads
_HEADS = {
    "squared": Row(
        "M17",
        "share of variance of the top head",
        "sum C_h^2 / sum over heads, active tokens; its largest over heads",
        post="0.94 (1.6) for induction, several heads for local context, one (1.1) for high-level context",
        null="the same head in directions that mean nothing",
    ),
    "covariance": Row(
        "M17",
        "share of variance of the top head, by covariance",
        "Cov(C_h, pre) / Var(pre) of the head with the largest sum C_h^2",
        differs="blind to a head that adds a constant, which the post's definition credits",
    ),
    "second": Row("M17", "share of variance of the second head", "sum C_h^2 / sum over heads, active tokens"),
    "third": Row("M17", "share of variance of the third head", "sum C_h^2 / sum over heads, active tokens"),
    "linear": Row(
        "M16",
        "share of the summed DFA of the top head",
        "sum C_h / sum over heads of the head with the largest sum C_h^2; heads may be negative",
    ),
    "participation": Row(
        "M17", "heads that make the feature: effective number", "1 / sum of squares of shares", unit=""
    ),
    **{
        name: Row(
            "M17",
            f"share of the weights of the top head: {name.replace('_', ' ')}",
            f"{words}, divided by its sum over heads, of the head with the largest sum C_h^2",
            differs="" if name == "decoder" else "another definition of a share than the post's",
        )
        for name, words in _BY_DECODER.items()
    },
}


def shares_by_head(subject: Subject) -> tuple[Finding, ...]:
    """M16, M17: the heads that make each exemplar, by all definitions of a share."""
    return fill_each(subject, KINDS, _HEADS, partial(_shares_by_head, subject))


def _shares_by_head(subject: Subject, exemplar: Exemplar) -> Filled:
    (found,) = head_shares(subject.index, exemplar.latent)
    ranked = found.top
    if not ranked:
        reason = f"{found.n} active tokens; at least 30 are needed"
        return {name: row.without(reason) for name, row in _HEADS.items()}, ()
    top = ranked[0]
    note = f"head {subject.head_name(top.head)}"
    claims = {
        "squared": _HEADS["squared"].of(top.squared, note=note),
        "covariance": _HEADS["covariance"].of(top.covariance, note=note),
        "linear": _HEADS["linear"].of(top.linear, note=note),
    }
    for name, share in zip(("second", "third"), ranked[1:], strict=False):
        claims[name] = _HEADS[name].of(share.squared, note=f"head {subject.head_name(share.head)}")
    for name in ("second", "third")[len(ranked) - 1 :]:
        claims[name] = _HEADS[name].without(f"the layer has {len(ranked)} heads")
    squares = np.array([share.squared.value or 0.0 for share in found.heads])
    claims["participation"] = _HEADS["participation"].of(float(1 / (squares**2).sum()), n=found.n)
    weights = {name: subject.index.shares[name][exemplar.latent] for name in _BY_DECODER}
    for name, of in weights.items():
        claims[name] = _HEADS[name].of(float(of[top.head]), n=len(of), note=note)
    return claims, (_heads_drawn(subject, exemplar, found, weights["decoder"]),)


def _heads_drawn(subject: Subject, exemplar: Exemplar, found: HeadShares, decoder: np.ndarray) -> Figure:
    measures = {name: [getattr(share, name) for share in found.heads] for name in ("squared", "covariance", "linear")}
    series = {name: tuple(each.value for each in of) for name, of in measures.items()}
    return Figure(
        f"Heads that make the {exemplar.kind} feature",
        "grouped",
        tuple(subject.head_name(share.head) for share in found.heads),
        {**series, "decoder": tuple(decoder.tolist())},
        "squared: sum C_h^2; covariance: Cov(C_h, pre) / Var(pre); linear: sum C_h; decoder: ||W_dec[j, h]||",
        x="head",
        y="share",
        low={name: tuple(each.low for each in of) for name, of in measures.items()},
        high={name: tuple(each.high for each in of) for name, of in measures.items()},
    )


# -------------------------------------------------------------------------------------------------------------- sources
_MAJORITY = "the majority, no number"
_DIRECTIONS = "random directions of z at the same tokens"
_INSIDE = "sum over sources in the exemplar's set of tokens / over all sources, active tokens"
_SOURCES = {
    **{
        f"top {threshold:g}": Row(
            "M19",
            f"share of variance of the top head from the feature's source tokens, activation above {threshold:.0%} "
            "of its maximum",
            f"C[h, s]^2, {_INSIDE}",
            null=_DIRECTIONS,
            post="induction: over 0.999 at an activation of 5; others: the majority" if threshold else None,
        )
        for threshold in _THRESHOLDS
    },
    "second": Row(
        "M19",
        "share of variance of the second head from the feature's source tokens",
        f"C[h, s]^2, {_INSIDE}",
        null=_DIRECTIONS,
        post=_MAJORITY,
    ),
    "third": Row(
        "M19",
        "share of variance of the third head from the feature's source tokens",
        f"C[h, s]^2, {_INSIDE}",
        null=_DIRECTIONS,
        post=_MAJORITY,
    ),
    "summed": Row(
        "M19",
        "share of variance of all heads from the feature's source tokens, heads summed before squaring",
        f"(sum_h C[h, s])^2, {_INSIDE}",
        null=_DIRECTIONS,
        post=_MAJORITY,
    ),
    "separate": Row(
        "M19",
        "share of variance of all heads from the feature's source tokens, heads squared before summing",
        f"sum_h C[h, s]^2, {_INSIDE}",
        null=_DIRECTIONS,
        post=_MAJORITY,
    ),
    "linear": Row(
        "M18",
        "share of the summed DFA from the feature's source tokens",
        f"sum_h C[h, s], {_INSIDE}",
        differs="not flattered by single large sources; may be negative or above 1",
    ),
    "bos": Row("M18", "share of variance of all heads from special tokens", "(sum_h C[h, s])^2 at special sources"),
    "frequency": Row("M18", "share of the sources that are source tokens", "sources in the set / all sources"),
    "attention": Row(
        "M20",
        "attention of the top head to the feature's source tokens where it is active",
        "mean over active tokens that can see one",
        null="inactive tokens of the same blocks that can",
        post="mostly attends to them, no number",
    ),
    "all attention": Row(
        "M20",
        "attention of the top head to the feature's source tokens over all active tokens",
        "mean over active tokens, whether or not they can see one",
        post="mostly attends to them, no number",
    ),
    "elsewhere": Row(
        "M20",
        "attention of the top head to the same tokens in blocks without the feature",
        "mean over tokens that can see one, of blocks in which the feature is never active",
        differs="the post has no baseline",
    ),
    "other heads": Row(
        "M20",
        "attention of the other heads to the feature's source tokens where it is active",
        "mean over heads and active tokens that can see one",
        differs="the post has no baseline",
    ),
}


def sources(subject: Subject) -> tuple[Finding, ...]:
    """M18 to M20: the share of each exemplar that comes from its source tokens, and the attention to them."""
    return fill_each(subject, KINDS, _SOURCES, partial(_sources, subject))


def _sources(subject: Subject, exemplar: Exemplar) -> Filled:
    (by_head,) = head_shares(subject.index, exemplar.latent)
    ranked = [share.head for share in by_head.top] or list(range(subject.index.n_heads))
    maximum = subject.index.feature(exemplar.latent).maximum or 0.0
    found = source_shares(
        subject.live,
        exemplar.latent,
        exemplar.sources,
        thresholds=[threshold * maximum for threshold in _THRESHOLDS],
        max_blocks=min(_SOURCE_BLOCKS, subject.settings.sequences),
        seed=subject.settings.seed,
    )
    every, tokens = found[0], ", ".join(map(subject.text, exemplar.sources[:8]))
    heads = {head.head: head for head in every.heads}
    name = subject.head_name(ranked[0])
    note = f"head {name}; sources {tokens}"
    claims: dict[str, Claim] = {}
    for threshold, record in zip(_THRESHOLDS, found, strict=True):
        own = record.heads[ranked[0]].squared
        claims[f"top {threshold:g}"] = _SOURCES[f"top {threshold:g}"].of(
            own, note=f"above {record.threshold:.3g}; {note}"
        )
    for row, head in zip(("second", "third"), ranked[1:], strict=False):
        claims[row] = _SOURCES[row].of(heads[head].squared, note=f"head {subject.head_name(head)}")
    for row in ("summed", "separate", "linear", "bos", "frequency"):
        claims[row] = _SOURCES[row].of(getattr(every, row))
    attention = heads[ranked[0]].attention
    claims["attention"] = replace(_SOURCES["attention"].of(attention.visible, note=note), null=attention.inactive.value)
    claims["all attention"] = _SOURCES["all attention"].of(attention.active, note=note)
    claims["elsewhere"] = _SOURCES["elsewhere"].of(attention.elsewhere, note=note)
    claims["other heads"] = _other_heads(every, ranked[0])
    return claims, (_by_threshold(exemplar, found, ranked[0], name), _source_tokens(subject, exemplar, every))


def _other_heads(found: SourceShares, top: int) -> Claim:
    own = [head.attention.visible for head in found.heads if head.head != top]
    values = [of.value for of in own if of.value is not None]
    row = _SOURCES["other heads"]
    return row.of(float(np.mean(values)), n=own[0].n) if values else row.without("too few tokens, or one head")


def _by_threshold(exemplar: Exemplar, found: Sequence[SourceShares], top: int, name: str) -> Figure:
    measures = {
        f"head {name}": [record.heads[top].squared for record in found],
        "all heads, summed then squared": [record.summed for record in found],
        "all heads, squared then summed": [record.separate for record in found],
        "linear": [record.linear for record in found],
    }
    return Figure(
        f"Share of the {exemplar.kind} feature from its source tokens",
        "lines",
        tuple(f"{record.threshold:.3g}" for record in found),
        {key: tuple(of.value for of in values) for key, values in measures.items()},
        f"C^2, or C for linear, {_INSIDE}, above each threshold",
        x="activation above",
        y="share",
        low={key: tuple(of.low for of in values) for key, values in measures.items()},
        high={key: tuple(of.high for of in values) for key, values in measures.items()},
    )


def _source_tokens(subject: Subject, exemplar: Exemplar, found: SourceShares) -> Listing:
    rows = tuple(
        (subject.text(each.token), f"{each.summed:.1%}", f"{each.separate:.1%}", f"{each.linear:.1%}")
        for each in found.top[:12]
    )
    headings = ("token", "summed then squared", "squared then summed", "linear")
    return Listing(f"Source tokens of the {exemplar.kind} feature", headings, rows, "share of each among all sources")


# ------------------------------------------------------------------------------------------------------- one by another
_COMPARED = {
    "agreement": Row(
        "M18",
        "agreement of the sources of the two top heads, on single tokens",
        "mean over active tokens of 1 - JSD in bits of |C[h, s]|: 1 the same sources, 0 none",
        null="the top and the last head",
        post="1.3 and 1.7 do similar, not identical things",
        unit="",
    ),
}


def compared(subject: Subject) -> tuple[Finding, ...]:
    """M18: whether the two top heads of an exemplar read it from the same sources, token by token."""
    return fill_each(subject, KINDS, _COMPARED, partial(_compared, subject))


def _compared(subject: Subject, exemplar: Exemplar) -> Filled:
    (by_head,) = head_shares(subject.index, exemplar.latent)
    ranked = [share.head for share in by_head.top]
    if len(ranked) < 3:
        return {"agreement": _COMPARED["agreement"].without("too few heads, or active tokens")}, ()
    text = Text.of(subject.index)
    position = subject.index.activations(exemplar.latent).position
    chosen = position[drawn(len(position), _EXAMPLES, (subject.settings.seed, exemplar.latent))]
    heads = [ranked[0], ranked[1], ranked[-1]]
    top, last = [], []
    for at in chosen.tolist():
        found = compare_heads(subject.live, at, exemplar.latent, heads)
        order = [each.head for each in found.heads]
        first, second, other = (order.index(head) for head in heads)
        top.append(found.agreement[first, second])
        last.append(found.agreement[first, other])
    known = np.isfinite(top) & np.isfinite(last)
    null = float(np.array(last)[known].mean()) if known.any() else None
    measured = mean_by(text.document.reshape(-1)[chosen][known], np.array(top)[known], null=null)
    note = f"heads {', '.join(map(subject.head_name, heads))}"
    return {"agreement": _COMPARED["agreement"].of(measured, note=note)}, ()


# --------------------------------------------------------------------------------------------------------- static table
_STATIC = {
    "token": Row(
        "M32",
        "tokens that would raise the feature more than its source tokens do, read alone through its top head",
        "share of the vocabulary above them in S_h[v, j] = ln(e_v) W_V[h] w[h, :, j], median over its source tokens",
        null="a token that has nothing to do with it",
    ),
}
_COPYING = {
    "dictionary": Row(
        "M32",
        "features that copy: their top logit token raises them most through their top head",
        "share of live features of which at most 1 % of the vocabulary is above that token in S_h[v, j]",
        null="with the top logit of another feature",
    ),
}


def static_table(subject: Subject) -> tuple[Finding, ...]:
    """M32: whether the weights alone identify the source token that drives a feature."""
    of_exemplars = fill_each(subject, KINDS, _STATIC, partial(_static, subject))
    return (*of_exemplars, *fill(_COPYING, lambda: _copying(subject)))


def _static(subject: Subject, exemplar: Exemplar) -> Filled:
    (by_head,) = head_shares(subject.index, exemplar.latent)
    head = by_head.top[0].head if by_head.top else int(subject.index.shares["decoder"][exemplar.latent].argmax())
    n = len(exemplar.sources)
    ranks = copy_ranks(subject.live, [exemplar.latent] * n, exemplar.sources, [head] * n)
    rank = float(np.median(ranks))
    measured = Measure("", n, rank, null=Estimate(0.5, 0.5, 0.5))
    note = f"head {subject.head_name(head)}, {n} source tokens"
    return {"token": _STATIC["token"].of(measured, note=note)}, ()


def _copying(subject: Subject) -> Filled:
    table = subject.index.table()
    live = np.flatnonzero((table["n_active"].to_numpy() > 0) & (subject.index.shares["dfa"].sum(1) > 0))
    rank = table["copy_rank"].to_numpy(zero_copy_only=False).astype(np.float64)[live]
    head, own = subject.index.shares["dfa"][live].argmax(1), table["top_logit"].to_numpy()[live]
    other = np.random.default_rng(subject.settings.seed).permutation(own)
    chance = copy_ranks(subject.live, live, other, head)[other != own]
    null = share_that(chance <= 0.01)
    expected = None if null.value is None else Estimate(null.value, null.low or 0.0, null.high or 1.0)
    found = share_that(rank[np.isfinite(rank)] <= 0.01, expected)
    return {"dictionary": _COPYING["dictionary"].of(found)}, ()


# -------------------------------------------------------------------------------------------------------------- circuit
_GROUPS = {"embedding": ("embedding",), "heads": ("head",), "mlps": ("mlp", "error", "b_dec")}
_CIRCUIT = {
    "largest": Row(
        "4.1",
        "part of the stream at the sources that makes most of the feature: its share of variance",
        SQUARES,
        null="directions of z that are random within each head",
        differs="recursive DFA, exact with frozen patterns and norms; the post patches instead",
    ),
    "embedding": Row("4.1", "share of the token embedding at the sources", LINEAR),
    "heads": Row("4.1", "share of the heads of earlier layers at the sources", LINEAR),
    "mlps": Row(
        "4.1",
        "share of the MLPs of earlier layers at the sources",
        f"{LINEAR}; an SAE's features, error and b_dec included",
        post="local context: mlp_out of layer 0 matters far more than its attn_out",
    ),
    "feature": Row(
        "4.1",
        "share of variance of the largest single feature of an earlier SAE at the sources",
        SQUARES,
        post="local context: one feature (13570) stands out",
    ),
    "residual": Row(
        "4.1",
        "what recursive DFA leaves out",
        "largest |pre - (constant + sum of parts)| / mean |pre|: rounding",
        unit="",
    ),
}


def circuit(subject: Subject) -> tuple[Finding, ...]:
    """4.1: the parts of the residual stream at its sources that make up an exemplar."""
    return fill_each(subject, KINDS, _CIRCUIT, partial(_circuit, subject))


def _circuit(subject: Subject, exemplar: Exemplar) -> Filled:
    sae, layer = subject.upstream_sae, subject.sae.site.layer
    saes = [sae] if sae is not None and sae.site.layer < layer else []
    found = feature_circuit(
        subject.live,
        exemplar.latent,
        saes=saes,
        max_tokens=min(_CIRCUIT_TOKENS, max(30, subject.settings.tokens // 10)),
        n_null=3,
        seed=subject.settings.seed,
        on_progress=subject.progress,
    )
    if not found.parts or found.parts[0].share.value is None:
        reason = f"{found.n} active tokens; at least 30 are needed"
        return {name: row.without(reason) for name, row in _CIRCUIT.items()}, ()
    top = found.parts[0]
    claims = {
        "largest": _CIRCUIT["largest"].of(top.share, note=top.part.name),
        "residual": _CIRCUIT["residual"].of(found.residual / float(np.abs(found.pre).mean()), n=found.n),
    }
    for name, kinds in _GROUPS.items():
        own = [i for i, part in enumerate(found.parts) if part.part.kind in kinds]
        sums = found.contributions[:, own].sum(1) + (found.of_features if name == "mlps" else 0)
        claims[name] = _CIRCUIT[name].of(ratio(found.document, sums, found.pre - found.constant, definition=LINEAR))
    if found.features:
        single = found.features[0]
        claims["feature"] = _CIRCUIT["feature"].of(single.share, note=single.part.name)
    else:
        claims["feature"] = _CIRCUIT["feature"].without("no SAE of an earlier component was given (--upstream)")
    return claims, (_parts(subject, exemplar, found),)


def _parts(subject: Subject, exemplar: Exemplar, found: FeatureCircuit) -> Listing:
    ranked = sorted([*found.parts, *found.features], key=lambda part: -(part.share.value or 0.0))
    rows = tuple(
        (
            part.part.name,
            f"{part.share.value or 0.0:.1%}",
            f"{part.linear.value or 0.0:+.1%}",
            ", ".join(subject.text(token.token) for token in (part.origins or part.sources)[:5]),
        )
        for part in ranked[:14]
    )
    title = f"What the {exemplar.kind} feature is made of at its sources"
    return Listing(title, ("part", "variance", "sum", "tokens it comes from"), rows, f"{SQUARES}; {LINEAR}")


SECTIONS = (
    Section("shares_by_head", ("M16", "M17"), "which heads make each exemplar", shares_by_head),
    Section("sources", ("M18", "M19", "M20"), "which source tokens each exemplar comes from", sources),
    Section("compared_heads", ("M18",), "whether the top heads of an exemplar read the same sources", compared),
    Section("static_table", ("M32",), "which source token drives each feature, by the weights alone", static_table),
    Section("circuit", ("4.1",), "which parts of the stream each exemplar is made of", circuit),
)
