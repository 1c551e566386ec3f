"""First-order (gradient) estimate of the effect of ablating features on the loss, and its agreement with exact effects.

Before the last layer an exact ablation is a run for each token and feature. To first order one backward pass over a
block gives them all: `-f u_j . d(sum of losses) / d(attn_out)` at the token, `u_j = W_dec[j] @ W_O`. It linearises
norms, patterns and activation functions, so it is reported with its correlation to exact ablations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from headscope.errors import StudyError
from headscope.index.live import LiveIndex
from headscope.site import Site
from headscope.stats import MINIMUM
from headscope.studies.support.active import Text
from headscope.studies.what.ablation import downstream

_BATCH_TOKENS = 2048  # in one backward pass, which holds the logits


@dataclass(frozen=True)
class FirstOrder:
    """First-order and exact effects of ablating features, each at one token, error kept, norms recomputed."""

    definition = "summed loss change of the token and all later ones of its block"
    latent: Int[np.ndarray, " pair"]
    position: Int[np.ndarray, " pair"]
    estimate: Float[np.ndarray, " pair"]
    exact: Float[np.ndarray, " pair"]

    @property
    def n(self) -> int:
        """Number of pairs of a token and a feature."""
        return len(self.position)

    @property
    def pearson(self) -> float | None:
        """Correlation of estimate and exact effect; None for fewer than 30 pairs, or where one is constant."""
        if self.n < MINIMUM or not self.estimate.std() or not self.exact.std():
            return None
        return float(np.corrcoef(self.estimate, self.exact)[0, 1])

    @property
    def slope(self) -> float | None:
        """Slope of the exact effect on the estimate, least squares through 0: below 1, the gradient overestimates."""
        square = float(self.estimate @ self.estimate)
        return float(self.estimate @ self.exact) / square if self.n >= MINIMUM and square else None


def first_order(live: LiveIndex, latents: Sequence[int], *, max_tokens: int = 50, seed: int = 0) -> FirstOrder:
    """Compute both effects of some features, at some of their active tokens.

    Args:
        live: the index with its model and SAE.
        latents: the features.
        max_tokens: active tokens per feature, sampled uniformly.
        seed: seed of the samples.

    Raises:
        IndexFormatError: no such latent.
        StudyError: no latents.
    """
    if not latents:
        raise StudyError("no features", expected="some", do="name latents of the SAE")
    records = downstream(live, latents, where="one", max_tokens=max_tokens, seed=seed)
    totals = [record.paths["total"] for record in records]
    latent = np.repeat([record.latent for record in records], [record.n for record in records])
    position = np.concatenate([record.position for record in records])
    activation = np.concatenate([record.activation for record in records])
    return FirstOrder(
        latent=latent,
        position=position,
        estimate=_estimates(live, latent, position, activation),
        exact=np.concatenate([t.change if t.later is None else t.change + t.later for t in totals]),
    )


def _estimates(
    live: LiveIndex,
    latent: Int[np.ndarray, " pair"],
    position: Int[np.ndarray, " pair"],
    activation: Float[np.ndarray, " pair"],
) -> Float[np.ndarray, " pair"]:
    model, size, text = live.model, live.index.block_size, Text.of(live.index)
    site = Site("attn_out", live.sae.site.layer)
    directions = live.sae.W_dec @ model.W_O(live.sae.site.layer)
    blocks, number = np.unique(position // size, return_inverse=True)
    estimates, step = np.empty(len(position)), max(1, _BATCH_TOKENS // size)
    for start in range(0, len(blocks), step):
        own = np.flatnonzero((number >= start) & (number < start + step))
        tokens = torch.from_numpy(text.tokens[blocks[start : start + step]].astype(np.int64)).to(model.device)
        gradient = model.loss_gradient(tokens, site)[
            torch.from_numpy(number[own] - start), torch.from_numpy(position[own] % size)
        ]
        along = (gradient * directions[torch.from_numpy(latent[own])]).sum(1)
        estimates[own] = -activation[own] * along.double().cpu().numpy()
    return estimates
