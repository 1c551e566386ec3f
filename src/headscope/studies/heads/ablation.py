"""Ablate each head of an SAE's layer: features it silences, features it switches on, and the effect on the loss.

The pre-activation is a sum over heads, so replacing head h's z by a constant r_h changes it by stored quantities: `p' =
p - (C_h - R_h)` with `C_h` the head's DFA and `R_h = (r_h - c_h) . W_enc[h, :, j]`. Silenced features are therefore
computed from the index, for every head and feature, without running the model (`head_effects`). Features switched on
are not active in the index, and need one pass over z (`firing_under_ablation`); losses need a run per head
(`loss_table`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.attribution import HeadWeights
from headscope.errors import StudyError
from headscope.index.live import LiveIndex
from headscope.sae.model import SAE, JumpReLU, TopK
from headscope.site import Site
from headscope.stats import MINIMUM, Estimate, Measure, estimate_of, ratio, wilson
from headscope.studies.support.active import ActiveTokens, Text, drawn
from headscope.studies.support.replacement import Kind, Progress, Replacement, batches, tokens_of

OffRule = Literal["every token", "most tokens", "most activation"]
"""When a feature counts as off: at every token where it was active; at more than half of them; or when its summed
activation falls below half."""

STORED_BITS = 14
"""Significant bits of the contributions stored in an index: their relative error is at most 2^-14."""
_ROWS = 256  # rows of pre-activations of all latents in memory at a time


def activation_thresholds(sae: SAE) -> Float[np.ndarray, " latent"]:
    """Return the pre-activation above which each latent is active, independent of the others.

    Raises:
        StudyError: a TopK SAE, where it depends on the others.
    """
    if isinstance(sae.activation, TopK):
        raise StudyError(
            "a TopK SAE, where a feature that turns off turns another one on",
            expected="an SAE with a threshold for each latent: ReLU or JumpReLU",
            do="use firing_under_ablation, which encodes anew",
        )
    if isinstance(sae.activation, JumpReLU):
        return sae.activation.threshold.double().clamp_min(0).cpu().numpy()
    return np.zeros(sae.d_sae)


# ------------------------------------------------------------------------------------------------------- what turns off
@dataclass(frozen=True)
class HeadEffects:
    """Remainder of each feature, at its active tokens, when one head is ablated: features x heads."""

    kind: Kind
    layer: int
    n_active: Int[np.ndarray, " latent"]
    n_off: Int[np.ndarray, "latent head"]
    """Active tokens at which the feature is off when the head is ablated: `f - (C_h - R_h) <= threshold`."""
    n_undecided: Int[np.ndarray, "latent head"]
    """Tokens at which the rounding of stored contributions could change that."""
    retained: Float[np.ndarray, "latent head"]
    """`sum f' / sum f` over the active tokens; it may exceed 1. NaN for dead features."""
    definition: str = (
        "active tokens of a feature at which it is off when one head of its layer is ablated: p - (C_h - R_h) is not "
        "above the feature's threshold; R_h is the DFA of what stands in the head's place"
    )

    @property
    def n_heads(self) -> int:
        """Heads of the layer."""
        return self.n_off.shape[1]

    @property
    def fraction_off(self) -> Float[np.ndarray, "latent head"]:
        """Share of the active tokens at which it is silenced; NaN for dead features."""
        with np.errstate(invalid="ignore"):
            return self.n_off / self.n_active[:, None]

    def is_off(self, rule: OffRule = "every token") -> Bool[np.ndarray, "latent head"]:
        """Return whether ablating each head counts as silencing each feature; never for a dead one.

        Raises:
            StudyError: an unknown rule.
        """
        live = self.n_active[:, None] > 0
        with np.errstate(invalid="ignore"):
            match rule:
                case "every token":
                    return live & (self.n_off == self.n_active[:, None])
                case "most tokens":
                    return live & (2 * self.n_off > self.n_active[:, None])
                case "most activation":
                    return live & (self.retained < 0.5)
        raise StudyError(f"rule {rule!r}", expected=f"one of {', '.join(get_args(OffRule))}", do="name one of these")

    def turned_off(self, latents: Int[np.ndarray, " n"] | Sequence[int], head: int, rule: OffRule) -> Measure:
        """Measure the share of some features that ablating a head silences (the post's 443/450), without dead ones.

        Interval: Wilson, 95 %. Null: the same for each of the other heads, mean and range.

        Raises:
            StudyError: no such head or latent, or an unknown rule.
        """
        chosen = self._live(latents)
        check_head(head, self.n_heads)
        off = self.is_off(rule)[chosen]
        definition = f"share of these features that are off at {rule} when head {self.layer}.{head} is ablated"
        if rule == "most activation":
            definition = f"share of these features that lose {rule} when head {self.layer}.{head} is ablated"
        return share_of(definition, off[:, head], np.delete(off, head, axis=1))

    def _live(self, latents: Int[np.ndarray, " n"] | Sequence[int]) -> Int[np.ndarray, " n"]:
        chosen = check_latents(latents, len(self.n_active))
        return chosen[self.n_active[chosen] > 0]


def share_of(
    definition: str, holds: Bool[np.ndarray, " n"], elsewhere: Bool[np.ndarray, "n other"] | None = None
) -> Measure:
    """Measure the share of features for which something holds, Wilson 95 %; null: mean and range elsewhere."""
    n = len(holds)
    null = None
    if n and elsewhere is not None and elsewhere.shape[1]:
        rates = elsewhere.mean(0)
        null = Estimate(float(rates.mean()), float(rates.min()), float(rates.max()))
    if n < MINIMUM:
        return Measure(definition, n, null=null, missing=f"{n} features; at least {MINIMUM} are needed")
    found = wilson(int(holds.sum()), n)
    return Measure(definition, n, found.value, found.low, found.high, "Wilson 95 %", null=null)


def check_latents(latents: Int[np.ndarray, " n"] | Sequence[int], n_latents: int) -> Int[np.ndarray, " n"]:
    """Return latents as an array.

    Raises:
        StudyError: there are none, or one is invalid.
    """
    chosen = np.asarray(latents, dtype=np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= n_latents)]
    if chosen.ndim != 1 or len(wrong) or not len(chosen):
        raise StudyError(
            f"latents {wrong[:5].tolist() if chosen.ndim == 1 else chosen.shape}" if chosen.size else "no latents",
            expected=f"at least one number from 0 to {n_latents - 1}",
            do="name others",
        )
    return chosen


def check_head(head: int, n_heads: int) -> None:
    """Raise StudyError when the layer has no such head."""
    if not 0 <= head < n_heads:
        raise StudyError(
            f"head {head}", expected=f"0 to {n_heads - 1}: the layer has {n_heads}", do="name another head"
        )


def head_effects(live: LiveIndex, replacement: Replacement) -> HeadEffects:
    """Compute from the index what remains of each feature when each head of the SAE's layer is ablated, in one pass.

    Raises:
        StudyError: a TopK SAE.
        IndexFormatError: a damaged index.
    """
    return effects_of(live, [replacement])[0]


def effects_of(
    live: LiveIndex, replacements: Sequence[Replacement], on_progress: Progress | None = None
) -> tuple[HeadEffects, ...]:
    """Compute `head_effects` for several replacements, still in one pass. Progress is in latents.

    Raises:
        StudyError: a TopK SAE.
        IndexFormatError: a damaged index.
    """
    thresholds = activation_thresholds(live.sae)
    weights = HeadWeights.of(live.sae, live.model)
    shape = len(replacements), live.index.n_latents, live.index.n_heads
    n_active, n_off, undecided = np.zeros(shape[1], np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    retained = np.full(shape, np.nan)
    for latent, active in live.index.each_latent():
        if on_progress is not None and (latent % 64 == 63 or latent + 1 == shape[1]):
            on_progress(latent + 1, shape[1])
        n_active[latent] = len(active.position)
        if not len(active.position):
            continue
        f, heads = active.activation.astype(np.float64)[:, None], active.heads
        rounding = _rounding(f, heads)
        for i, replacement in enumerate(replacements):
            after = f - (heads - replacement.contributions(weights, latent, active.position))
            off = after <= thresholds[latent]
            n_off[i, latent] = off.sum(0)
            undecided[i, latent] = (np.abs(after - thresholds[latent]) <= rounding).sum(0)
            retained[i, latent] = np.where(off, 0, after).sum(0) / f.sum()
    return tuple(
        HeadEffects(of.kind, live.sae.site.layer, n_active, n_off[i], undecided[i], retained[i])
        for i, of in enumerate(replacements)
    )


def _rounding(f: Float[np.ndarray, "n 1"], heads: Float[np.ndarray, "n head"]) -> Float[np.ndarray, "n head"]:
    """Bound the error of a stored f - C_h: C_h has 14 bits, f the 24 of float32."""
    return np.abs(heads) * 2.0**-STORED_BITS + np.abs(f) * 2.0**-22


# -------------------------------------------------------------------------------------------------------- what turns on
@dataclass(frozen=True)
class AblatedFiring:
    """Activity of each feature when one head is ablated, over all text tokens of some blocks: features x heads."""

    kind: Kind
    layer: int
    n_tokens: int
    n_clean: Int[np.ndarray, " latent"]
    n_ablated: Int[np.ndarray, "latent head"]
    n_both: Int[np.ndarray, "latent head"]
    """Active with and without the head."""
    mass_clean: Float[np.ndarray, " latent"]
    mass_ablated: Float[np.ndarray, "latent head"]
    definition: str = "text tokens at which a feature is active when one head of its layer is ablated; SAE encoded anew"

    @property
    def n_turned_on(self) -> Int[np.ndarray, "latent head"]:
        """Tokens at which the feature is active only because the head is ablated."""
        return self.n_ablated - self.n_both

    def silenced(self, latents: Int[np.ndarray, " n"] | Sequence[int], head: int) -> Measure:
        """Measure the share of some features active in this sample that are nowhere active when a head is ablated.

        The strictest definition of the post's "turned off". Interval: Wilson. Null: the other heads, mean and range.

        Raises:
            StudyError: no such head or latent.
        """
        chosen = check_latents(latents, len(self.n_clean))
        check_head(head, self.n_ablated.shape[1])
        chosen = chosen[self.n_clean[chosen] > 0]
        off = self.n_ablated[chosen] == 0
        definition = f"share of these features that are active nowhere when head {self.layer}.{head} is ablated"
        return share_of(definition, off[:, head], np.delete(off, head, axis=1))


def firing_under_ablation(
    live: LiveIndex,
    replacement: Replacement,
    *,
    max_blocks: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> AblatedFiring:
    """Measure where every feature is active when each head is ablated, in one pass over z for all heads.

    Args:
        live: the index with its model and SAE; any activation function.
        replacement: replacement for a head's z.
        max_blocks: maximum number of blocks, sampled uniformly; None: all.
        seed: seed of the sample.
        on_progress: called as blocks are done.
    """
    report = on_progress or (lambda _done, _total: None)
    sae, site, n_heads = live.sae, live.sae.site, live.index.n_heads
    size, text = live.index.block_size, Text.of(live.index)
    blocks = drawn(live.index.n_blocks, max_blocks, (seed,))
    by_head = sae.W_enc.view(n_heads, -1, sae.d_sae)
    counts = torch.zeros(1 + 2 * n_heads, sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
    mass = torch.zeros(1 + n_heads, sae.d_sae, dtype=torch.float64, device=sae.W_enc.device)
    n_tokens = 0
    for start, own in batches(blocks, size):
        report(start, len(blocks))
        is_text = torch.from_numpy(text.is_text[own]).to(sae.W_enc.device)
        z = live.model.read(tokens_of(live, text, own), [site])[site][is_text]
        moved = replacement.values(own, size)[is_text].to(z) - z
        n_tokens += len(z)
        for rows, change in zip(z.split(_ROWS), moved.split(_ROWS), strict=True):
            pre = sae.pre_activations(rows)
            f = sae.activation(pre)
            _add(counts, mass, 0, f)
            active = f > 0
            for h, part in enumerate(change.view(len(rows), n_heads, -1).unbind(1)):
                without = sae.activation(pre + part @ by_head[h])
                _add(counts, mass, 1 + h, without)
                counts[1 + n_heads + h] += ((without > 0) & active).sum(0)
    report(len(blocks), len(blocks))
    found, masses = counts.cpu().numpy(), mass.cpu().numpy()
    return AblatedFiring(
        replacement.kind,
        site.layer,
        n_tokens,
        n_clean=found[0],
        n_ablated=found[1 : 1 + n_heads].T,
        n_both=found[1 + n_heads :].T,
        mass_clean=masses[0],
        mass_ablated=masses[1:].T,
    )


def _add(counts: Tensor, mass: Tensor, row: int, f: Float[Tensor, "row latent"]) -> None:
    counts[row] += (f > 0).sum(0)
    mass[row] += f.sum(0)


# ------------------------------------------------------------------------------------------- other features of a head
@dataclass(frozen=True)
class OtherFeatures:
    """Features of a head outside of a family, such as induction, by the two definitions of the post."""

    head: int
    firing: Int[np.ndarray, " n_firing"]
    """Those most often active when the head is ablated (the post, taken literally), most first."""
    lost: Int[np.ndarray, " n_lost"]
    """Those that lose the most active tokens when the head is ablated."""
    by_dfa: Int[np.ndarray, " n_by_dfa"]
    """Those with the largest summed positive DFA of the head over their active tokens."""


def other_features(
    firing: AblatedFiring,
    mass: Float[np.ndarray, "latent head"],
    family: Bool[np.ndarray, " latent"],
    head: int,
    k: int = 20,
) -> OtherFeatures:
    """Rank the features outside a family.

    Args:
        firing: activity under ablation of each head.
        mass: `sum max(C_h, 0)` over the active tokens (`catalogue.head_mass`).
        family: whether each latent belongs to it.
        head: the head.
        k: length of each list.

    Raises:
        StudyError: no such head, or arrays of different numbers of latents.
    """
    check_head(head, firing.n_ablated.shape[1])
    if mass.shape != firing.n_ablated.shape or family.shape != firing.n_clean.shape:
        raise StudyError(
            f"mass {mass.shape}, family {family.shape}",
            expected=f"{firing.n_ablated.shape}",
            do="pass those of the index",
        )

    def top(score: np.ndarray) -> Int[np.ndarray, " k"]:
        allowed = np.flatnonzero(~family & (score > 0))
        return allowed[np.argsort(-score[allowed], kind="stable")[:k]]

    lost = firing.n_clean - firing.n_both[:, head]
    return OtherFeatures(head, top(firing.n_ablated[:, head]), top(lost), top(mass[:, head]))


# ---------------------------------------------------------------------------------------------------------- loss table
@dataclass(frozen=True)
class LossRow:
    """Mean loss where a feature is active, and its increase under ablation of each head."""

    latent: int
    n: int
    clean: Measure
    change: dict[int, Measure]
    """By head. The null is the mean change over all text of the same blocks, with its interval."""


@dataclass(frozen=True)
class LossTable:
    """The post's table, for any features and heads."""

    kind: Kind
    layer: int
    heads: tuple[int, ...]
    rows: tuple[LossRow, ...]
    n_tokens: int
    """Text tokens of these blocks whose next token is text."""


def loss_table(
    live: LiveIndex,
    latents: Sequence[int],
    heads: Sequence[int],
    replacement: Replacement,
    *,
    max_blocks: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> LossTable:
    """Measure the mean next-token loss where each feature is active: clean, and with each head ablated.

    Args:
        live: the index with its model and SAE.
        latents: the features.
        heads: heads of the SAE's layer, for example the induction head and a control.
        replacement: replacement for a head's z, at all positions.
        max_blocks: maximum number of blocks in which a feature is active, sampled uniformly; None: all.
        seed: seed of the sample.
        on_progress: called as blocks are done.

    Raises:
        StudyError: no such latent or head.
    """
    report = on_progress or (lambda _done, _total: None)
    for head in heads:
        check_head(head, live.index.n_heads)
    chosen = check_latents(latents, live.index.n_latents).tolist()
    text, size = Text.of(live.index), live.index.block_size
    counted = text.counted
    active = {latent: ActiveTokens.of(live.index, counted.reshape(-1), latent).position for latent in chosen}
    holding = np.unique(np.concatenate(list(active.values())) // size)
    blocks = holding[drawn(len(holding), max_blocks, (seed,))]
    losses = np.zeros((1 + len(heads), len(blocks), size))
    site = live.sae.site
    for start, own in batches(blocks, size):
        report(start, len(blocks))
        tokens, place = tokens_of(live, text, own), slice(start, start + len(own))
        with live.model.restartable(site.layer) as restart:
            losses[0, place, :-1] = live.model.losses(tokens).double().cpu().numpy()
        for i, head in enumerate(heads):
            with live.model.edit({Site("z", site.layer): replacement.edit(own, size, [head])}):
                found = live.model.losses(tokens, restart)
            losses[1 + i, place, :-1] = found.double().cpu().numpy()
    report(len(blocks), len(blocks))
    seen = np.flatnonzero(counted[blocks].reshape(-1))
    flat, document = losses.reshape(len(losses), -1), text.document[blocks].reshape(-1)
    nulls = {h: _null(document[seen], flat[1 + i, seen] - flat[0, seen]) for i, h in enumerate(heads)}
    rows = []
    for latent in chosen:
        inside = active[latent][np.isin(active[latent] // size, blocks)]
        own = np.searchsorted(blocks, inside // size) * size + inside % size
        ones = np.ones(len(own))
        clean = ratio(document[own], flat[0, own], ones, definition="mean loss where the feature is active, nats")
        change = {
            h: ratio(
                document[own],
                flat[1 + i, own] - flat[0, own],
                ones,
                definition=f"mean loss change where the feature is active, head {site.layer}.{h} ablated, nats",
                null=nulls[h],
            )
            for i, h in enumerate(heads)
        }
        rows.append(LossRow(latent, len(own), clean, change))
    return LossTable(replacement.kind, site.layer, tuple(heads), tuple(rows), len(seen))


def _null(document: Int[np.ndarray, " token"], change: Float[np.ndarray, " token"]) -> Estimate | None:
    """Return the mean change over all tokens, with its interval; without the interval where it is undefined."""
    return estimate_of(ratio(document, change, np.ones(len(change)), definition=""))
