"""Null directions of z (random or head-permuted), matched in density: the control of every share by head."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.attribution import HeadWeights
from headscope.index.config import N_NULLS

KINDS = ("random", "permuted")


@dataclass(frozen=True)
class NullDirections:
    """Null directions w of z with a threshold: active where `(z - c) . w` exceeds it."""

    kind: Int[Tensor, " null"]
    """Index into `KINDS`: a Gaussian direction, or a feature's encoder with its heads permuted."""
    latent: Int[Tensor, " null"]
    """The feature whose density it matches."""
    directions: Float[Tensor, "null head d_head"]
    threshold: Float[Tensor, " null"]

    @classmethod
    def matched(
        cls, weights: HeadWeights, z: Float[Tensor, "token d_in"], density: Float[Tensor, " d_sae"], seed: int = 0
    ) -> "NullDirections":
        """Draw directions, with thresholds set on some tokens so that each has the density of a live feature.

        Args:
            weights: the SAE's.
            z: a sample of the corpus, without special tokens.
            density: of each latent on that sample.
            seed: seed of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        live = density.nonzero().flatten().cpu()
        latent = live[torch.randperm(len(live), generator=generator)[:N_NULLS]]
        n_heads, d_head = weights.offset.shape
        gaussian = torch.randn(len(latent), n_heads, d_head, generator=generator).to(weights.encoder)
        order = torch.stack([_moved(n_heads, generator) for _ in latent]) if len(latent) else latent.view(0, n_heads)
        own = weights.encoder.transpose(0, 1)[latent.to(weights.encoder.device)]
        exchanged = own.gather(1, order.to(own.device)[:, :, None].expand_as(own))
        directions = torch.cat([gaussian, exchanged])
        latent = latent.repeat(2).to(directions.device)
        p = (z - weights.offset.flatten()) @ directions.flatten(1).T  # [token, null]
        n_active = (density[latent] * len(z)).round().long().clamp(1, max(1, len(z) - 1))
        ranked = p.sort(dim=0, descending=True).values
        around = ranked.gather(0, torch.stack([n_active - 1, n_active.clamp(max=len(z) - 1)]))
        threshold = around.mean(0)  # between two tokens, so that rounding moves neither across
        kind = torch.arange(2, device=directions.device).repeat_interleave(len(latent) // 2)
        return cls(kind, latent, directions, threshold)

    def active(
        self, z: Float[Tensor, "token d_in"], offset: Float[Tensor, "head d_head"]
    ) -> tuple[Int[Tensor, " pair"], Float[Tensor, " pair"], Float[Tensor, "pair head"]]:
        """Return (null, `(z - c) . w`, its part by head) of each active pair."""
        centred = z - offset.flatten()
        p = centred @ self.directions.flatten(1).T
        token, null = (p > self.threshold).nonzero(as_tuple=True)
        of_pairs = centred.index_select(0, token).view(-1, *offset.shape)
        heads = (of_pairs * self.directions.index_select(0, null)).sum(-1)
        return null, p[token, null], heads


def _moved(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Draw a cyclic permutation that moves every head (unless there is only one)."""
    shift = int(torch.randint(1, max(2, n), (1,), generator=generator))
    return (torch.arange(n) + shift) % n
