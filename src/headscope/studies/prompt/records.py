"""Records of one prompt, with features and heads ablated or not. No torch.

`studies.prompt.prompts` runs the model and makes them. An ablation is written as `f7` (a feature, at all tokens),
`f7@12` (at one position), `h1.3=zero` or `h1.3=mean@12` (a head).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from headscope.errors import StudyError

By = Literal["zero", "mean"]
"""Replacement for a head's z: the constant c of z, at which its DFA is 0 (the post's zero), or its mean over text
tokens of the index's corpus."""

MAX_ABLATIONS = 64
_FEATURE = re.compile(r"f(\d{1,9})(?:@(\d{1,9}))?", re.ASCII)
_HEAD = re.compile(r"h(\d{1,4})\.(\d{1,4})=([a-z]+)(?:@(\d{1,9}))?", re.ASCII)


@dataclass(frozen=True, order=True)
class FeatureAblation:
    """Ablation of a feature of the SAE: `z - f_j W_dec[j]`, keeping the SAE's error."""

    latent: int
    position: int | None = None
    """The token; all tokens when None."""

    @property
    def name(self) -> str:
        """`f7` or `f7@12`."""
        return f"f{self.latent}{_at(self.position)}"


@dataclass(frozen=True, order=True)
class HeadAblation:
    """Replacement of a head's z."""

    layer: int
    head: int
    by: By
    position: int | None = None
    """The token; all tokens when None."""

    @property
    def name(self) -> str:
        """`h1.3=zero` or `h1.3=mean@12`."""
        return f"h{self.layer}.{self.head}={self.by}{_at(self.position)}"


Ablation = FeatureAblation | HeadAblation


def _at(position: int | None) -> str:
    return "" if position is None else f"@{position}"


def parse_ablation(text: str) -> Ablation:
    """Parse the name of an ablation.

    Raises:
        StudyError: it is invalid.
    """
    if found := _FEATURE.fullmatch(text):
        return FeatureAblation(int(found[1]), _number(found[2]))
    found = _HEAD.fullmatch(text)
    for by in get_args(By):
        if found and found[3] == by:
            return HeadAblation(int(found[1]), int(found[2]), by, _number(found[4]))
    raise StudyError(
        f"ablation {text[:80]!a}",
        expected="f7 or f7@12 (a feature), h1.3=zero or h1.3=mean@12 (a head)",
        do="write it so, with a position after @ or none for all tokens",
    )


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def parse_ablations(texts: Sequence[str]) -> tuple[Ablation, ...]:
    """Parse several ablations, without duplicates, in a fixed order.

    Raises:
        StudyError: an invalid one, more than `MAX_ABLATIONS`, or two different replacements of one head.
    """
    if len(texts) > MAX_ABLATIONS:
        raise StudyError(f"{len(texts)} ablations", expected=f"at most {MAX_ABLATIONS}", do="remove some")
    found = {parse_ablation(text) for text in texts}
    features = sorted((a for a in found if isinstance(a, FeatureAblation)), key=_place)
    heads = sorted((a for a in found if isinstance(a, HeadAblation)), key=_place)
    for one in heads:
        for other in heads:
            same = (one.layer, one.head) == (other.layer, other.head)
            meet = None in (one.position, other.position) or one.position == other.position
            if same and meet and one.by != other.by:
                raise StudyError(
                    f"head {one.layer}.{one.head} ablated as {one.name} and as {other.name}",
                    expected="one thing in its place at a token",
                    do="remove one of the two",
                )
    return (*heads, *features)


def _place(ablation: Ablation) -> tuple[int, ...]:
    at = -1 if ablation.position is None else ablation.position
    match ablation:
        case FeatureAblation(latent):
            return latent, at
        case HeadAblation(layer, head):
            return layer, head, at


@dataclass(frozen=True)
class PromptRun:
    """Run of a prompt by the unedited model, and with ablations."""

    tokens: Int[np.ndarray, " position"]
    """Tokens including the BOS, as in the blocks of an index."""
    ablations: tuple[Ablation, ...]
    position: Int[np.ndarray, " active"]
    """With `latent`: active features with their positions, with or without ablations; by position, the largest first.
    """
    latent: Int[np.ndarray, " active"]
    activation: Float[np.ndarray, " active"]
    """In the unedited model."""
    ablated: Float[np.ndarray, " active"]
    """With ablations: heads first, then the features of the remaining z; 0 for a feature that is ablated itself."""
    loss: Float[np.ndarray, " predicting"]
    """Loss of each next token, in nats: of token p + 1 at position p."""
    ablated_loss: Float[np.ndarray, " predicting"]


@dataclass(frozen=True)
class ActiveFeatures:
    """Features active at one token of the unedited model, the largest first."""

    query: int
    latent: Int[np.ndarray, " feature"]
    activation: Float[np.ndarray, " feature"]
    by_head: Float[np.ndarray, "feature head"]
    """DFA of each head: sums to the pre-activation with the bias."""
    source: Int[np.ndarray, " feature"]
    """The token with the largest |DFA|, summed over heads."""
    source_dfa: Float[np.ndarray, " feature"]
    target: int
    """The token of the logit in `effect`."""
    effect: Float[np.ndarray, " feature"] | None
    """Effect of the feature's direct path on that logit relative to the vocabulary mean, with the final norm's scale
    held
    fixed: `f_j centre(W_dec[j] W_O) . logit_directions[:, target] / sigma`. None where the model has no such path."""
    effect_missing: str | None
    """Reason why there is no `effect`."""


@dataclass(frozen=True)
class NextTokens:
    """Predictions after one token, without and with the ablations: the likeliest tokens of both."""

    query: int
    actual: int | None
    """The actual next token; None at the end of the prompt."""
    token: Int[np.ndarray, " token"]
    """The likeliest of the unedited model first."""
    probability: Float[np.ndarray, " token"]
    logit: Float[np.ndarray, " token"]
    rank: Int[np.ndarray, " token"]
    """1 is the likeliest."""
    ablated_probability: Float[np.ndarray, " token"]
    ablated_logit: Float[np.ndarray, " token"]
    ablated_rank: Int[np.ndarray, " token"]
    divergence: float
    """KL(unedited || with ablations), in nats."""
