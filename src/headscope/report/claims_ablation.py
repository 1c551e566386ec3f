"""Claims on ablating the induction head: features it silences, effect on the loss, other functions of the head."""

from dataclasses import replace
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float

from headscope.errors import StudyError
from headscope.report.ablated import replacement
from headscope.report.induction_family import PostFamily, composite, is_member, post_family
from headscope.report.model_heads import model_heads
from headscope.report.records import Claim, Finding, Listing, Section
from headscope.report.rows import Filled, Row, Rows, fill, mean_by, share_that, why
from headscope.report.subject import Subject
from headscope.stats import Estimate, Measure, quotient, resampled, unit_draws
from headscope.studies.heads.ablation import (
    AblatedFiring,
    HeadEffects,
    LossTable,
    OffRule,
    firing_under_ablation,
    head_effects,
    loss_table,
    other_features,
)
from headscope.studies.heads.catalogue import HeadCard, HeadMass, catalogue, families, head_mass

_FIRING_BLOCKS, _LOSS_BLOCKS = 96, 192

# ---------------------------------------------------------------------------------------------------------- turned off
_RULES: dict[OffRule, str] = {
    "every token": "off at every token where it was active",
    "most tokens": "off at more than half of the tokens where it was active",
    "most activation": "summed activation less than half of what it was",
}
_OTHER_HEADS = "the other heads, mean"
_MEAN = "the head's z at its mean over text"
_READINGS = {
    "silenced": Row(
        "M29",
        "induction features that fire nowhere with the induction head ablated",
        f"selected features that behave like induction, active in the sample, and nowhere in it with {_MEAN}",
        post=443 / 450,
        differs="the post does not say what turned off means: this is its strictest reading, the easier to meet the "
        "fewer the tokens",
    ),
    **{
        rule: Row(
            "M29",
            f"induction features turned off by ablating the induction head: {rule}",
            f"selected features that behave like induction, {words}, {_MEAN}",
            post=443 / 450,
            differs="another reading of turned off",
        )
        for rule, words in _RULES.items()
    },
    "retained": Row(
        "M29",
        "activation that induction features keep with the induction head ablated",
        f"mean over features of sum f' / sum f over their active tokens, {_MEAN}",
    ),
    "composite": Row(
        "M29",
        "induction features of the composite rule turned off by ablating the induction head: most tokens",
        f"features of the composite rule, {_RULES['most tokens']}, {_MEAN}",
    ),
    "any head": Row(
        "M29",
        "induction features of the composite rule turned off by ablating the main head of each: most tokens",
        f"by the head with most DFA from earlier B's; {_RULES['most tokens']}, {_MEAN}",
        differs="needs no induction head to be named",
    ),
    "others": Row(
        "M29",
        "selected features that do not behave like induction, turned off by ablating it: most tokens",
        f"{_RULES['most tokens']}, {_MEAN}",
        differs="the post has no such control: selection by decoder share makes this nearly sure",
    ),
    "control": Row(
        "M29",
        "control features turned off by ablating the induction head: most tokens",
        f"features with little of their decoder in it, {_RULES['most tokens']}, {_MEAN}",
        differs="the post has no such control",
    ),
    "resample": Row(
        "M29",
        "induction features turned off with the induction head at another token's z: most tokens",
        f"selected features that behave like induction, {_RULES['most tokens']}",
        differs="resampled instead of mean",
    ),
}
_OFF: Rows = {name: replace(row, null=_OTHER_HEADS if name != "any head" else "") for name, row in _READINGS.items()}


def turned_off(subject: Subject) -> tuple[Finding, ...]:
    """M29: features silenced by ablating the induction head, by all definitions, vs. other heads and features."""
    return fill(_OFF, lambda: _turned_off(subject))


def _turned_off(subject: Subject) -> Filled:
    family, live = post_family(subject), subject.live
    head = family.head
    note = f"head {subject.head_name(head)}"
    claims = {"silenced": _silenced(_firing(subject), family, note)}
    try:
        effects = head_effects(live, replacement(subject))
    except StudyError as error:
        return claims | {name: _OFF[name].without(why(error)) for name in _OFF if name not in claims}, ()
    for rule in get_args(OffRule):
        claims[rule] = _OFF[rule].of(_off_share(effects, family.members, head, rule), note=note)
    kept = effects.retained[family.members]
    others = np.delete(kept, head, axis=1)
    null = float(others.mean()) if others.size else None
    claims["retained"] = _OFF["retained"].of(
        mean_by(family.members, kept[:, head], of="features", null=null), note=note
    )
    judged = composite(subject)
    claims["composite"] = _OFF["composite"].of(_off_share(effects, judged.found, head, "most tokens"), note=note)
    own = judged.sources.head[judged.verdict]
    off = effects.is_off("most tokens")[judged.found, own]
    claims["any head"] = _OFF["any head"].of(share_that(off))
    for name, latents in (("others", family.others), ("control", family.control.latents)):
        claims[name] = _OFF[name].of(_off_share(effects, latents, head, "most tokens"), note=note)
    other = head_effects(live, replacement(subject, "resample"))
    claims["resample"] = _OFF["resample"].of(_off_share(other, family.members, head, "most tokens"), note=note)
    return claims, ()


def _off_share(effects: HeadEffects, latents: np.ndarray, head: int, rule: OffRule) -> Measure:
    off = effects.is_off(rule)[latents[effects.n_active[latents] > 0]]
    return share_that(off[:, head], _elsewhere(off, head))


def _elsewhere(off: Bool[np.ndarray, "n head"], head: int) -> Estimate | None:
    """Return mean and range of the same for each of the other heads."""
    rates = np.delete(off, head, axis=1).mean(0) if len(off) else np.zeros(0)
    return Estimate(float(rates.mean()), float(rates.min()), float(rates.max())) if len(rates) else None


def _silenced(firing: AblatedFiring, family: PostFamily, note: str) -> Claim:
    chosen = family.members[firing.n_clean[family.members] > 0]
    off = firing.n_ablated[chosen] == 0
    found = share_that(off[:, family.head], _elsewhere(off, family.head))
    return _OFF["silenced"].of(found, note=f"{note}; sample of {firing.n_tokens:,} text tokens")


def _firing(subject: Subject) -> AblatedFiring:
    live, settings = subject.live, subject.settings
    blocks = min(_FIRING_BLOCKS, settings.sequences)
    return subject.once(
        "firing",
        lambda: firing_under_ablation(live, replacement(subject), max_blocks=blocks, seed=settings.seed),
    )


def _mass(subject: Subject) -> HeadMass:
    return subject.once("mass", lambda: head_mass(subject.index))


# ---------------------------------------------------------------------------------------------------------- loss table
_POST_LOSS = ((0.3644, 0.1125, 0.0371), (0.5282, 0.3041, 0.0195), (0.2648, 0.5074, -0.0024))
_ORDER = ("first", "second", "third")
_ALL_TEXT = "mean over all text of the same blocks"
_WHICH = "other features: outside the family, most DFA of the head; the post's are 6693, 4635, 1220 (12200 in its text)"


def _loss_rows() -> Rows:
    rows = {}
    for order, post in zip(_ORDER, _POST_LOSS, strict=True):
        words = (
            ("clean", "loss where it is active", "mean nats at its active tokens"),
            ("head", "loss added there by ablating the induction head", f"mean nats, {_MEAN}"),
            ("control", "loss added there by ablating a control head", f"mean nats, {_MEAN}"),
        )
        for (name, claim, definition), value in zip(words, post, strict=True):
            rows[f"{order} {name}"] = Row(
                "M30",
                f"{order} non-induction feature of the head: {claim}",
                definition,
                value,
                "nats",
                _WHICH,
                "" if name == "clean" else _ALL_TEXT,
            )
    rows["family head"] = Row(
        "M30",
        "induction features: loss added where they are active by ablating the induction head",
        f"mean over features of mean nats at their active tokens, {_MEAN}",
        unit="nats",
        differs="the post's table has non-induction features only",
        null=_ALL_TEXT,
    )
    rows["family control"] = replace(
        rows["family head"],
        claim="induction features: loss added where they are active by ablating a control head",
    )
    return rows


_LOSS = _loss_rows()


def losses(subject: Subject) -> tuple[Finding, ...]:
    """M30: the loss where features of the induction head are active: clean, with it ablated, with a control ablated."""
    return fill(_LOSS, lambda: _losses(subject))


def _losses(subject: Subject) -> Filled:
    family, heads = post_family(subject), model_heads(subject)
    live, settings, index = subject.live, subject.settings, subject.index
    head = family.head
    scores = heads.scores.induction[subject.sae.site.layer].clone()
    control = int(scores.argmin())
    if control == head:
        raise StudyError("one head in the layer", expected="a control head beside the induction head", do="take more")
    enough = index.table()["n_active"].to_numpy() >= 30
    inside = is_member(composite(subject), index.n_latents)
    inside[family.members] = True
    ranked = other_features(_firing(subject), _mass(subject).total, inside | ~enough, head)
    others, members = ranked.by_dfa[: len(_ORDER)], family.members[enough[family.members]][:20]
    found = loss_table(
        live,
        [*others.tolist(), *members.tolist()],
        [head, control],
        replacement(subject),
        max_blocks=min(_LOSS_BLOCKS, settings.sequences),
        seed=settings.seed,
    )
    names = f"heads {subject.head_name(head)} and {subject.head_name(control)} (smallest induction score)"
    claims = {}
    for order, row in zip(_ORDER, found.rows[: len(others)], strict=False):
        measured = {"clean": row.clean, "head": row.change[head], "control": row.change[control]}
        for name, value in measured.items():
            claim = _LOSS[f"{order} {name}"].of(value, note=names)
            claims[f"{order} {name}"] = replace(claim, feature=row.latent)
    for name in _ORDER[len(others) :]:
        for part in ("clean", "head", "control"):
            claims[f"{name} {part}"] = _LOSS[f"{name} {part}"].without("the head makes no other feature")
    claims |= _of_family(found, members.tolist(), head, control)
    return claims, (_table(subject, found, head, control),)


def _of_family(found: LossTable, members: list[int], head: int, control: int) -> dict[str, Claim]:
    rows = [row for row in found.rows if row.latent in members]
    claims = {}
    for name, h in (("family head", head), ("family control", control)):
        known = [(row.latent, row.change[h]) for row in rows if row.change[h].value is not None]
        values = np.array([change.value for _, change in known], dtype=np.float64)
        nulls = [change.null.value for _, change in known if change.null is not None]
        null = float(np.mean(nulls)) if nulls else None
        measured = mean_by([latent for latent, _ in known], values, of="features", null=null)
        claims[name] = _LOSS[name].of(measured, note="at most 20 features, resampled")
    return claims


def _table(subject: Subject, found: LossTable, head: int, control: int) -> Listing:
    def words(value: Measure) -> str:
        return "none" if value.value is None else f"{value.value:+.4f}"

    tokens = subject.index.table()["top_logit"].to_numpy()
    rows = tuple(
        (
            str(row.latent),
            subject.text(int(tokens[row.latent])),
            str(row.n),
            words(row.clean),
            words(row.change[head]),
            words(row.change[control]),
        )
        for row in found.rows
    )
    headings = (
        "feature",
        "top logit",
        "tokens",
        "loss",
        f"{subject.head_name(head)} ablated",
        f"{subject.head_name(control)} ablated",
    )
    return Listing("Loss where features of the induction head are active", headings, rows, f"mean nats; {_MEAN}")


# --------------------------------------------------------------------------------------------------------- polysemantic
_POLYSEMANTIC = {
    "not induction": Row(
        "M31",
        "selected features that do not behave like induction",
        "of the features with most of their decoder in the induction head, those with a pass rate of 60 % or less",
        post=136 / 586,
    ),
    "mass": Row(
        "M31",
        "DFA of the induction head that is in induction features",
        "share of sum over active tokens of max(C_h, 0), induction features of either rule",
        null="the other heads, mean",
    ),
    "features": Row(
        "4.4",
        "features that the induction head makes: effective number",
        "exp(entropy) of sum max(C_h, 0) over features",
        unit="",
        null="each feature's heads exchanged in a cycle",
    ),
    "families": Row(
        "4.4",
        "families of features that the induction head makes: effective number",
        "exp(entropy) of sum max(C_h, 0) over (source class > output class)",
        unit="",
        null="names of families shuffled among its features",
    ),
    "largest": Row(
        "4.4",
        "largest family of the induction head",
        "largest share of sum max(C_h, 0) of a (source class > output class)",
        null="names of families shuffled among its features",
    ),
    "single": Row(
        "4.4",
        "heads of the layer whose top ten features are of one family",
        "heads, ten features with the largest decoder share each, families (source class > output class)",
        differs="of GPT-2, read by hand: 14 of 144 heads (Kissane et al., 2024b)",
    ),
}


def polysemanticity(subject: Subject) -> tuple[Finding, ...]:
    """M31 and 4.4: other functions of the induction head, and the number of functions of each head."""
    return fill(_POLYSEMANTIC, lambda: _polysemanticity(subject))


def _polysemanticity(subject: Subject) -> Filled:
    index = subject.index
    names = [families(index, h) for h in range(index.n_heads)]
    by_weight = [catalogue(index, by="decoder", family=names[h])[h] for h in range(index.n_heads)]
    whole = np.array([card.top_in_one == len(card.top) and len(card.top) > 1 for card in by_weight])
    claims = {"single": _POLYSEMANTIC["single"].of(share_that(whole))}
    try:
        family = post_family(subject)
    except StudyError as error:
        return claims | {name: row.without(why(error)) for name, row in _POLYSEMANTIC.items() if name != "single"}, ()
    head, mass = family.head, _mass(subject)
    inside = is_member(composite(subject), index.n_latents)
    inside[family.members] = True
    shares = _shares(mass.total, inside)
    others = np.delete(shares, head)
    null = Estimate(float(others.mean()), float(others.min()), float(others.max())) if len(others) else None
    note = f"head {subject.head_name(head)}"
    failed = ~family.behaviour.passes()
    claims["not induction"] = _POLYSEMANTIC["not induction"].of(share_that(failed), note=note)
    claims["mass"] = replace(
        _POLYSEMANTIC["mass"].of(_resampled(mass.values, inside, head), note=note),
        null=None if null is None else null.value,
    )
    card = catalogue(index, family=names[head], mass=mass)[head]
    claims["features"] = _POLYSEMANTIC["features"].of(card.effective_features, note=note)
    claims["families"] = _POLYSEMANTIC["families"].of(card.effective_families, note=note)
    largest = f", {card.clusters[0].family!r}" if card.clusters else ""
    claims["largest"] = _POLYSEMANTIC["largest"].of(card.largest, note=note + largest)
    return claims, (_others(subject, family, mass, inside), _families_of(subject, card))


def _shares(total: Float[np.ndarray, "latent head"], inside: Bool[np.ndarray, " latent"]) -> Float[np.ndarray, " head"]:
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(total[inside].sum(0) / total.sum(0))


def _resampled(
    values: Float[np.ndarray, "unit latent head"], inside: Bool[np.ndarray, " latent"], head: int
) -> Measure:
    """Bootstrap a share of the head's mass over groups of documents."""
    own, whole = values[:, inside, head].sum(1), values[:, :, head].sum(1)
    n = int((values[:, :, head].sum(0) > 0).sum())
    if not whole.sum() > 0:
        return Measure("", n, missing="no feature has any DFA in this head")
    found = resampled(quotient, np.stack([own, whole], 1), unit_draws(len(own), n_samples=1000, seed=0))
    low, high = found or (None, None)
    return Measure("", n, float(own.sum() / whole.sum()), low, high)


def _others(subject: Subject, family: PostFamily, mass: HeadMass, inside: Bool[np.ndarray, " latent"]) -> Listing:
    ranked = other_features(_firing(subject), mass.total, inside, family.head, k=10)
    tokens, share = subject.index.table()["top_logit"].to_numpy(), subject.index.shares["decoder"][:, family.head]
    lists = {"by DFA": ranked.by_dfa, "fire most when ablated": ranked.firing, "lose most tokens": ranked.lost}
    rows = tuple(
        (name, str(latent), subject.text(int(tokens[latent])), f"{share[latent]:.0%}")
        for name, latents in lists.items()
        for latent in latents.tolist()
    )
    return Listing(
        "Features of the induction head that are not of the induction family",
        ("ranking", "feature", "top logit", "decoder share"),
        rows,
        "three readings of the post's list: most DFA, most often active with the head ablated, most tokens lost",
    )


def _families_of(subject: Subject, card: HeadCard) -> Listing:
    rows = tuple((each.family, str(each.n), f"{each.share:.1%}") for each in card.clusters[:12])
    title = f"Families of features of head {subject.head_name(card.head)}"
    return Listing(title, ("family", "features", "share of its DFA"), rows, "source class > output class")


SECTIONS = (
    Section("head_ablation", ("M29",), "which features ablating the induction head turns off", turned_off),
    Section("loss_table", ("M30",), "the loss where features of the induction head are active", losses),
    Section("polysemanticity", ("M31", "4.4"), "what else the induction head does", polysemanticity),
)
