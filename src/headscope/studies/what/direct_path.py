"""Exact effect of a feature's direct path to the logits on the loss, without rerunning the model.

Ablating latent j at one token subtracts `f u_j` from the final residual stream r there, `u_j = W_dec[j] @ W_O`, and
leaves every other component unchanged. The final norm divides c, r itself or (LayerNorm) r centred, by sigma, so with
`g_j = u_j @ logit_directions` the logits become, up to a constant over the vocabulary,

    logits' = sigma / sigma' * (logits - b) - f / sigma' * g_j + b
    sigma'^2 = sigma^2 - 2 f mean(c(r) c(u_j)) + f^2 mean(c(u_j)^2)

b is the part independent of the residual stream. This takes one operation of the vocabulary's size per pair of a token
and a latent, and no matrix product. It is exact where attention writes linearly to the residual stream, as in all
families of `models.families`, and of the logits before any soft cap.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.hf import Model

_TABLE = 1 << 26  # numbers in memory at a time for a vocabulary chunk: logits of tokens, and effects of directions
_CHUNK = {"cpu": 1 << 18}  # numbers of logits' computed at a time: what fits a processor's cache
_CHUNK_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Pairs:
    """Tokens paired with directions that are subtracted from their residual streams."""

    token: Int[Tensor, " pair"]
    """Row of the residual streams."""
    direction: Int[Tensor, " pair"]
    """Row of the directions."""
    activation: Float[Tensor, " pair"]
    """Coefficient of the direction."""


@torch.no_grad()
def direct_loss_changes(
    model: Model,
    directions: Float[Tensor, "direction d_model"],
    residual: Float[Tensor, "token d_model"],
    target: Int[Tensor, " token"],
    pairs: Pairs,
) -> Float[Tensor, " pair"]:
    """Compute the loss change when `activation * direction` is subtracted from a token's final residual stream.

    Args:
        model: the model of the final norm and unembedding.
        directions: u; the output of a latent at activation 1.
        residual: `resid_post` of the last layer, before the final norm.
        target: the next token of each.
        pairs: the subtractions.

    Returns:
        In nats, in the model's precision and at least float32; positive where the subtracted vector predicted the
            target.
    """
    end = _End(model, directions, residual, target)
    keep, take = end.factors(pairs)
    clean = end.target_logits()
    after = keep * clean[pairs.token] - take * end.target_effects(pairs) + end.bias[target[pairs.token]]
    before = end.bias[target] + clean
    total = torch.full_like(after, -torch.inf)  # log of the summed exponentials of logits'
    total_before = torch.full_like(before, -torch.inf)
    for start in range(0, model.spec.d_vocab, end.width):
        logits, effects, bias = end.stretch(start)
        rows = max(1, _CHUNK.get(residual.device.type, _CHUNK_ELSEWHERE) // logits.shape[1])
        for low in range(0, len(before), rows):
            own = slice(low, low + rows)
            total_before[own] = torch.logaddexp(total_before[own], (logits[own] + bias).logsumexp(1))
        for low in range(0, len(after), rows):
            own = slice(low, low + rows)
            changed = logits.index_select(0, pairs.token[own]).mul_(keep[own, None]).add_(bias)
            changed.addcmul_(effects.index_select(0, pairs.direction[own]), take[own, None], value=-1)
            total[own] = torch.logaddexp(total[own], changed.logsumexp(1))
    return (total - after) - (total_before - before)[pairs.token]


class _End:
    """Final norm and unembedding at some tokens: all model-dependent terms of the formula."""

    def __init__(self, model: Model, directions: Tensor, residual: Tensor, target: Tensor) -> None:
        """Normalise the streams, and centre the directions as the norm does."""
        self.centred, self.scale = model.final_parts(residual)  # [token, d_model], [token, 1]
        self.directions = model.final_parts(directions)[0]
        self.to_logits = model.logit_directions.to(self.centred)
        self.bias = model.logit_bias.to(self.centred)
        self.target = target
        self.width = max(1, min(model.spec.d_vocab, _TABLE // (len(residual) + len(directions) + 1)))

    def factors(self, pairs: Pairs) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Compute `sigma / sigma'` and `f / sigma'`."""
        f = pairs.activation.to(self.centred)
        scale = self.scale[:, 0]
        common = torch.cat(
            [
                (self.centred[t] * self.directions[d]).mean(1)
                for t, d in zip(pairs.token.split(_TABLE >> 12), pairs.direction.split(_TABLE >> 12), strict=True)
            ]
        )
        own = self.directions.square().mean(1)[pairs.direction]
        after = (scale.square()[pairs.token] - 2 * f * common + f.square() * own).sqrt()
        return scale[pairs.token] / after, f / after

    def target_logits(self) -> Float[Tensor, " token"]:
        """The next token's logit at each token, without the bias."""
        return ((self.centred / self.scale) * self.to_logits.T[self.target]).sum(1)

    def target_effects(self, pairs: Pairs) -> Float[Tensor, " pair"]:
        """Return the direction's effect on the next token's logit, for each pair."""
        target = self.target[pairs.token]
        parts = zip(pairs.direction.split(_TABLE >> 12), target.split(_TABLE >> 12), strict=True)
        return torch.cat([(self.directions[d] * self.to_logits.T[t]).sum(1) for d, t in parts])

    def stretch(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits without the bias, effects of the directions, and the bias, on a vocabulary chunk."""
        own = slice(start, start + self.width)
        to_logits = self.to_logits[:, own]
        return (self.centred / self.scale) @ to_logits, self.directions @ to_logits, self.bias[own]
