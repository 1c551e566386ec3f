"""The records of upstream studies as JSON for the explorer's tabs; explorer/static/types.d.ts has their fields."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headscope.explorer.answers import Json
from headscope.explorer.circuit_json import DIGITS
from headscope.explorer.numbers import short, significant
from headscope.explorer.study_json import measure_json
from headscope.studies.how.corruptions import PromptPair, Reading
from headscope.studies.how.feature_patching import BARS, FeaturePatching
from headscope.studies.how.patching import Interaction, Patch, Patching, Scores, role
from headscope.studies.how.sources import HeadComparison, SourceShares

_WHOLE = ("summed", "separate", "linear", "bos", "frequency")
_ATTENTION = ("active", "visible", "inactive", "elsewhere")
_SCORES = ("pre_score", "activation_score")
_TOP_TOKENS, _TOP_LATENTS = 12, 20


def sources_json(found: Sequence[SourceShares]) -> Json:
    """Shares of a set of source tokens above thresholds, by head too, and the attention paid to them."""
    return {
        "tokens": list(found[0].tokens),
        "n_blocks": found[0].n_blocks,
        "thresholds": [
            {
                "threshold": one.threshold,
                "n": one.n,
                "n_active": one.n_active,
                **{name: measure_json(getattr(one, name)) for name in _WHOLE},
                "heads": [
                    {
                        "squared": measure_json(head.squared),
                        "linear": measure_json(head.linear),
                        "attention": {name: measure_json(getattr(head.attention, name)) for name in _ATTENTION},
                    }
                    for head in one.heads
                ],
                "top": [
                    [t.token, *significant([t.summed, t.separate, t.linear], DIGITS)] for t in one.top[:_TOP_TOKENS]
                ],
            }
            for one in found
        ],
    }


def comparison_json(found: HeadComparison) -> Json:
    """Heads beside each other at one token."""
    dfa = found.dfa
    return {
        "latent": dfa.latent,
        "at": dfa.position,
        "tokens": dfa.tokens.tolist(),
        "activation": short(dfa.activation, DIGITS),
        "pre": short(dfa.pre, DIGITS),
        "bias": short(dfa.bias, DIGITS),
        "residual": short(dfa.residual, 2),
        "heads": [
            {
                "head": one.head,
                "contribution": short(one.contribution, DIGITS),
                "share": short(one.share, DIGITS),
                "sources": [
                    [int(s), *significant([float(c), float(a)], DIGITS)]
                    for s, c, a in zip(one.sources, one.dfa, one.attention, strict=True)
                ],
            }
            for one in found.heads
        ],
        "agreement": significant(found.agreement, DIGITS),
    }


def patching_json(found: Patching, columns: Sequence[int], joint: Interaction | None) -> Json:
    """Components (rows) patched at all positions (the first column) and at single ones.

    Args:
        found: of patches of one node each.
        columns: the positions, in order.
        joint: two of them alone and together.
    """
    number = {nodes[0]: i for i, nodes in enumerate(found.patches)}
    whole = list(dict.fromkeys(replace(node, position=None) for node in number))
    places = [None, *columns]
    at = [[number.get(replace(node, position=place)) for place in places] for node in whole]
    return {
        **_prompts(found.pair),
        "n": found.n,
        "definition": found.definition,
        "rows": [{"name": str(node), "kind": node.kind, "layer": node.layer, "head": node.head} for node in whole],
        "columns": list(columns),
        "noising": _matrices(found.noising, at),
        "denoising": _matrices(found.denoising, at),
        "roles": [_role(found, number[node]) for node in whole],
        "joint": None if joint is None else _joint(joint),
    }


def features_json(found: FeaturePatching) -> Json:
    """Features of an earlier SAE: bars of all, of the error alone, and the few that matter."""
    k = min(len(found.latents), _TOP_LATENTS)
    n_together = len(found.together_noising.pre_score)
    return {
        **_prompts(found.pair),
        "definition": found.definition,
        "site": found.site.hook_name,
        "n_latents": len(found.latents),
        "positions": list(found.positions),
        "few": found.few,
        "bars": [
            {"name": name, "noising": _at(found.bars_noising, i), "denoising": _at(found.bars_denoising, i)}
            for i, name in enumerate(BARS)
        ],
        "latents": [
            {
                "latent": int(found.latents[i]),
                "change": short(float(found.change[i]), DIGITS),
                "noising": _at(found.noising, i),
                "denoising": _at(found.denoising, i),
                "noising_together": _at(found.together_noising, i) if i < n_together else None,
                "denoising_together": _at(found.together_denoising, i) if i < n_together else None,
            }
            for i in range(k)
        ],
    }


# --------------------------------------------------------------------------------------------------------------- parts
def _prompts(pair: PromptPair) -> Json:
    changed = (pair.clean != pair.corrupted).nonzero()[:, 0]
    return {
        "clean": pair.clean.tolist(),
        "corrupted": pair.corrupted.tolist(),
        "changed": changed.tolist(),
        "query": pair.query,
        "on": _reading(pair.on),
        "off": _reading(pair.off),
    }


def _reading(reading: Reading) -> Json:
    return {"pre": short(reading.pre, DIGITS), "activation": short(reading.activation, DIGITS)}


def _matrices(scores: Scores, at: Sequence[Sequence[int | None]]) -> Json:
    """Scores by component and position; None where nothing was patched."""
    picked = {name: getattr(scores, name) for name in _SCORES}
    return {
        name: significant([[np.nan if i is None else values[i] for i in row] for row in at], DIGITS)
        for name, values in picked.items()
    }


def _at(scores: Scores, i: int) -> Json:
    return {name: short(float(getattr(scores, name)[i]), DIGITS) for name in _SCORES}


def _role(found: Patching, i: int) -> Json:
    loss, gain = float(1 - found.noising.activation_score[i]), float(found.denoising.activation_score[i])
    return {"role": role(loss, gain), "loss": short(loss, DIGITS), "gain": short(gain, DIGITS)}


def _joint(found: Interaction) -> Json:
    return {
        "first": _name(found.first),
        "second": _name(found.second),
        "kind": found.kind,
        "excess": significant(found.excess, DIGITS),
        "on_without": list(found.on_without),
        "on_with": list(found.on_with),
    }


def _name(patch: Patch) -> str:
    return " + ".join(map(str, patch))
