"""Patching of features of an earlier SAE: which of them a later feature is computed from.

One upstream feature takes its activation from the other run, `x + (f_other - f)_i W_dec[i]`: the rest of x, including
the SAE's error, is unchanged. For comparison the whole site, all features together, and the error alone `(x -
x_hat)_other - (x - x_hat)` are patched, to show how much of the path the SAE captures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import HeadscopeError
from headscope.sae.convert import check_fits
from headscope.sae.model import SAE
from headscope.site import Site
from headscope.stats import Estimate
from headscope.studies.how.corruptions import PromptPair
from headscope.studies.how.patch_runs import BaseRun
from headscope.studies.how.patching import THRESHOLD, Scores, scored

BarName = Literal["site", "features", "error"]
BARS: tuple[BarName, ...] = ("site", "features", "error")
MOST = 32
"""Maximum number of features patched together when searching for a sufficient few."""
ENOUGH = 0.9
"""Share of the effect of all features that the few must reach jointly."""


@dataclass(frozen=True)
class FeaturePatching:
    """Upstream features patched between two prompts, one at a time; arrays are in the order of `latents`."""

    pair: PromptPair
    site: Site
    positions: tuple[int, ...]
    """Positions of the clean prompt at which they are patched together."""
    latents: Int[np.ndarray, " latent"]
    """Latents whose activations differ between the runs at these positions, largest effect first (the mean of both
    directions, on the pre-activation). All others have exactly no effect."""
    change: Float[np.ndarray, " latent"]
    """Activation in the clean run minus that in the corrupted run, summed over the positions."""
    noising: Scores
    denoising: Scores
    bars_noising: Scores
    """Scores of the whole site, all features together, and the error alone: `BARS`."""
    bars_denoising: Scores
    together_noising: Scores
    """Scores of the first 1, 2, 3, ... of the latents together."""
    together_denoising: Scores
    null_noising: Scores
    """Scores of random directions of the site: each adds, at each position, a random vector with the norm of the first
    latent's. Empty where no latent changes."""
    null_denoising: Scores
    definition: str = "x + (f_other - f)_i W_dec[i] at the positions, the SAE's error kept"

    @property
    def null_effect(self) -> Estimate | None:
        """Return the effect by which latents are ranked for random directions: mean and range."""
        effect = ((1 - self.null_noising.pre_score) + self.null_denoising.pre_score) / 2
        return Estimate(float(effect.mean()), float(effect.min()), float(effect.max())) if len(effect) else None

    def bar(self, name: BarName) -> tuple[float, float]:
        """Return noising and denoising score of the pre-activation."""
        at = BARS.index(name)
        return float(self.bars_noising.pre_score[at]), float(self.bars_denoising.pre_score[at])

    @property
    def few(self) -> int | None:
        """Number of first latents that jointly have 90 % of the effect of all features in both directions.

        None when all features together have no effect of 0.1 in one of the directions, or more than 32 are needed.
        """
        noised, denoised = self.bar("features")
        if min(1 - noised, denoised) < THRESHOLD:
            return None
        losses, gains = 1 - self.together_noising.pre_score, self.together_denoising.pre_score
        enough = (losses >= ENOUGH * (1 - noised)) & (gains >= ENOUGH * denoised)
        return int(np.argmax(enough)) + 1 if enough.any() else None


def patch_features(
    pair: PromptPair, upstream: SAE, positions: Sequence[int] | None = None, *, n_null: int = 32, seed: int = 0
) -> FeaturePatching:
    """Patch each feature of an SAE of an earlier site between two prompts, both ways.

    Args:
        pair: the prompts, with the later feature as the metric.
        upstream: an SAE of the same model.
        positions: positions of the clean prompt, patched together; default: all up to the query that have a
            counterpart.
        n_null: number of random directions, with the norm of the largest-effect feature's change.
        seed: seed of these.

    Raises:
        SAEError: an SAE of another model.
        HeadscopeError: an SAE that is not before the feature's, or a position that cannot be patched.
    """
    check_fits(upstream, pair.metric.model)
    last = pair.metric.sae.site
    if upstream.site.depth >= last.depth:
        raise HeadscopeError(
            f"an SAE of {upstream.site.hook_name}",
            expected=f"one of a site before {last.hook_name}, where the feature is read",
            do="pass an SAE of an earlier layer or site",
        )
    shared = [p for p in range(pair.query + 1) if pair.counterpart[p] >= 0]
    chosen = shared if positions is None else sorted({int(p) for p in positions})
    wrong = sorted(set(chosen) - set(shared))
    if wrong or not chosen:
        raise HeadscopeError(
            f"positions {wrong or chosen}",
            expected=f"some from 0 to the query, {pair.query}, that have a counterpart in the corrupted prompt",
            do="name others",
        )
    own = torch.tensor(chosen, device=pair.clean.device)
    other = pair.counterpart[own]
    clean, corrupted = (BaseRun(pair.metric, tokens, [upstream.site]) for tokens in (pair.clean, pair.corrupted))
    noised = _Moves(clean, corrupted, upstream, own, other, pair.query)
    denoised = _Moves(corrupted, clean, upstream, other, own, int(pair.counterpart[pair.query]))
    differ = (noised.change != 0).any(0).nonzero()[:, 0]
    alone = [[j] for j in differ.tolist()]
    singles = [scored(pair, *moves.read(alone)) for moves in (noised, denoised)]
    effect = (1 - singles[0].pre_score) + singles[1].pre_score
    order = np.argsort(-effect, kind="stable")
    latents = differ.cpu().numpy()[order]
    nulls = [scored(pair, *moves.random(latents[:1].tolist(), n_null, seed)) for moves in (noised, denoised)]
    together = [latents[:k].tolist() for k in range(1, min(MOST, len(latents)) + 1)]
    return FeaturePatching(
        pair=pair,
        site=upstream.site,
        positions=tuple(chosen),
        latents=latents,
        change=-noised.change.sum(0)[differ].double().cpu().numpy()[order],
        noising=_ordered(singles[0], order),
        denoising=_ordered(singles[1], order),
        bars_noising=scored(pair, *noised.bars()),
        bars_denoising=scored(pair, *denoised.bars()),
        together_noising=scored(pair, *noised.read(together)),
        together_denoising=scored(pair, *denoised.read(together)),
        null_noising=nulls[0],
        null_denoising=nulls[1],
    )


def _ordered(scores: Scores, order: Int[np.ndarray, " patch"]) -> Scores:
    return Scores(*(values[order] for values in vars(scores).values()))


class _Moves:
    """Runs of one prompt with vectors added at some positions of a site."""

    def __init__(
        self,
        base: BaseRun,
        other: BaseRun,
        sae: SAE,
        own: Int[Tensor, " chosen"],
        source: Int[Tensor, " chosen"],
        query: int,
    ) -> None:
        self.base, self.sae, self.own, self.query = base, sae, own, query
        x, x_other = base.found[sae.site][0, own], other.found[sae.site][0, source]
        self.whole = x_other - x
        self.change = sae.encode(x_other) - sae.encode(x)  # [chosen, latent]

    def read(self, sets: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Read the feature with some sets of upstream features as in the other run."""
        moved = [self.change[:, latents] @ self.sae.W_dec[latents] for latents in sets]
        return self._added(torch.stack(moved) if moved else self.whole[None][:0])

    def random(self, latents: list[int], n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Read the feature with random vectors added, of the norm of a latent's change at each position."""
        if not latents or not n:
            return self._added(self.whole[None][:0])
        length = (self.change[:, latents] @ self.sae.W_dec[latents]).norm(dim=-1, keepdim=True)
        noise = np.random.default_rng((seed, *latents)).standard_normal((n, 1, self.whole.shape[1]))
        direction = torch.from_numpy(noise).to(self.whole)
        return self._added(length * direction / direction.norm(dim=-1, keepdim=True))

    def bars(self) -> tuple[Tensor, Tensor]:
        """Read the feature with the whole site, all upstream features, and the error alone as in the other run."""
        features = self.change @ self.sae.W_dec
        return self._added(torch.stack([self.whole, features, self.whole - features]))

    def _added(self, moved: Float[Tensor, "row chosen d_in"]) -> tuple[Tensor, Tensor]:
        if not len(moved):
            return moved.new_empty(0), moved.new_empty(0)
        parts = []
        for rows in moved.split(self.base.rows_at_once()):

            def edit(value: Tensor, rows: Tensor = rows) -> Tensor:
                value = value.clone()
                value[:, self.own] += rows
                return value

            parts.append(self.base.again(len(rows), {self.sae.site: edit}, self.sae.site.layer, self.query))
        pre, activation = zip(*parts, strict=True)
        return torch.cat(pre), torch.cat(activation)
