"""Direct feature attribution (DFA): an exact split of a feature's pre-activation by heads and source tokens.

The pre-activation is linear in z, and z is linear in the values with the pattern held fixed, so

    pre_j[q] = sum_h sum_s C[h, s] + bias_j,    C[h, s] = pattern[h, q, s] (v[s, h] - c_h) . W_enc[h, :, j]

with `bias_j = b_enc_j - b_dec . W_enc_j + c . W_enc_j`. The constant c of z (`Model.value_offset`) is subtracted from
the values, since its split over sources is independent of the text; it is added to the bias, so the sum stays exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.hf import Attention, Model
from headscope.sae.model import SAE

_CACHED_ROWS = 8  # of vocabulary size, which stay in the cache while their powers are computed


@dataclass(frozen=True)
class HeadWeights:
    """An SAE's encoder split by head, with the constant part of z moved to the bias."""

    encoder: Float[Tensor, "head d_sae d_head"]
    bias: Float[Tensor, " d_sae"]
    """Part of the pre-activation independent of the heads."""
    offset: Float[Tensor, "head d_head"]
    """c, the constant part of z."""

    @classmethod
    def of(cls, sae: SAE, model: Model) -> "HeadWeights":
        """Compute the weights for a z SAE of this model."""
        offset = model.value_offset(sae.site.layer).to(sae.W_enc)
        encoder = sae.head_blocks(model.spec.n_heads).encoder.contiguous()
        return cls(encoder, sae.bias + offset @ sae.W_enc, offset.view(model.spec.n_heads, model.spec.d_head))


@dataclass(frozen=True)
class DFA:
    """Attribution of one feature at one token, active there or not: `by_source` + `bias` = `pre`."""

    latent: int
    query: int
    """The token's position in its sequence."""
    tokens: Int[np.ndarray, " source"]
    """The sequence up to the token."""
    activation: float
    pre: float
    bias: float
    residual: float
    """Rounding error: `pre` minus its parts."""
    by_source: Float[np.ndarray, "head source"]
    """C[h, s]."""
    pattern: Float[np.ndarray, "head source"]
    """Attention from the token to each source."""

    @property
    def by_head(self) -> Float[np.ndarray, " head"]:
        """C_h: the sum over sources."""
        return self.by_source.sum(1)

    @property
    def sources(self) -> Float[np.ndarray, " source"]:
        """The sum over heads."""
        return self.by_source.sum(0)


def dfa_at(
    weights: HeadWeights,
    sae: SAE,
    attention: Attention,
    tokens: Int[Tensor, " position"],
    query: int,
    latents: Sequence[int],
) -> tuple[DFA, ...]:
    """Compute DFA by head and source of some features at one token of a sequence.

    Args:
        weights: weights of the SAE and its model.
        sae: the z SAE.
        attention: attention of the SAE's layer, on the sequence as the only row of a batch.
        tokens: the sequence.
        query: the token's position.
        latents: the features.
    """
    upto = query + 1
    chosen = torch.as_tensor(latents, dtype=torch.int64, device=tokens.device)
    attended = attention.pattern[0, :, query, :upto]
    pattern = attended[:, None].expand(-1, len(chosen), -1)
    by_source = dfa_of_sequence(weights, attention.value[0, :upto], pattern, chosen)  # [head, latent, source]
    everything = sae.pre_activations(attention.z[0, query])
    pre, f = everything[chosen], sae.activation(everything)[chosen]
    bias = weights.bias[chosen]
    residual = pre.double() - by_source.double().sum((0, 2)) - bias.double()
    return tuple(
        DFA(
            latent=int(chosen[i]),
            query=query,
            tokens=tokens[:upto].cpu().numpy(),
            activation=f[i].item(),
            pre=pre[i].item(),
            bias=bias[i].item(),
            residual=residual[i].item(),
            by_source=_numpy(by_source[:, i]),
            pattern=_numpy(attended),
        )
        for i in range(len(chosen))
    )


def _numpy(values: Tensor) -> np.ndarray:
    """Values as numpy has them: it knows no bfloat16."""
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()


def dfa_by_head(
    weights: HeadWeights, z: Float[Tensor, "pair d_in"], latent: Int[Tensor, " pair"]
) -> Float[Tensor, "pair head"]:
    """Compute each head's share of the pre-activation: `C[h] = (z_h - c_h) . W_enc[h, :, j]`; sum + bias = pre."""
    heads = z.view(len(z), *weights.offset.shape) - weights.offset
    return (heads * weights.encoder.index_select(1, latent).transpose(0, 1)).sum(-1)


def dfa_of_sequence(
    weights: HeadWeights,
    value: Float[Tensor, "source head d_head"],
    pattern: Float[Tensor, "head pair source"],
    latent: Int[Tensor, " pair"],
) -> Float[Tensor, "head pair source"]:
    """Compute each head's contribution from each source of one sequence to each (position, latent).

    `pattern` is the attention from the pairs' positions. The values are contracted with the encoder first: z is never
    materialised by source. To omit the sources after the last query, which contribute 0, pass slices of both.
    """
    directions = weights.encoder.index_select(1, latent)  # [head, pair, d_head]
    dfa = directions @ (value - weights.offset).permute(1, 2, 0)
    return dfa.mul_(pattern)


def dfa_by_source(
    weights: HeadWeights,
    attention: Attention,
    row: Int[Tensor, " pair"],
    query: Int[Tensor, " pair"],
    latent: Int[Tensor, " pair"],
) -> Float[Tensor, "pair head source"]:
    """Compute each head's contribution from each source to each (sequence, position, latent).

    `row` must be sorted, so that the pairs of a sequence are contiguous.
    """
    counts = torch.bincount(row, minlength=len(attention.pattern)).tolist()
    parts = [
        dfa_of_sequence(weights, value, pattern.index_select(1, q), j)
        for value, pattern, q, j in zip(
            attention.value, attention.pattern, query.split(counts), latent.split(counts), strict=True
        )
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


def source_table(
    weights: HeadWeights, values: Float[Tensor, "vocab d_head"], head: int, latent: Int[Tensor, " pair"]
) -> Float[Tensor, "pair vocab"]:
    """Compute the static table: each token's contribution through a head that attends only to it, with weight 1.

    `S[j, t] = (v_t[h] - c_h) . W_enc[h, :, j]` with v_t the value of token t alone (`Model.token_values`, of this
    head): no text is needed. For an induction feature the largest entry is the token it predicts.
    """
    return weights.encoder[head, latent] @ (values - weights.offset[head]).T


# -------------------------------------------------------------------------------------------------------------- shares
def encoder_share(weights: HeadWeights) -> Float[Tensor, "d_sae head"]:
    """Compute `||W_enc[h, :, j]|| / sum over heads`; depends on the basis of z (see `decoder_share`)."""
    return _share(weights.encoder.norm(dim=-1).T)


def encoder_share_through_value(weights: HeadWeights, model: Model, layer: int) -> Float[Tensor, "d_sae head"]:
    """Compute `||W_V[h] W_enc[h, :, j]|| / sum over heads`, in the residual stream: independent of the basis of z."""
    value = model.W_V(layer)  # [head, d_model, d_head]
    return _share(_norm_through(weights.encoder, value.transpose(1, 2)))


def decoder_share(sae: SAE, n_heads: int) -> Float[Tensor, "d_sae head"]:
    """Compute `||W_dec[j, h, :]|| / sum over heads`: the post's attribution of a feature to heads.

    It depends on the basis of z: rescaling a head's W_V against its W_O changes it but not the model.
    """
    return _share(sae.head_blocks(n_heads).decoder.norm(dim=-1).T)


def decoder_share_through_output(sae: SAE, model: Model) -> Float[Tensor, "d_sae head"]:
    """Compute `||W_dec[j, h, :] @ W_O[h]|| / sum over heads`: in the residual stream, independent of the basis of z.

    W_O includes the gain of a norm after it, whose scale cancels (`Model.output_directions`).
    """
    n_heads = model.spec.n_heads
    output = model.output_directions(sae.site.layer).reshape(n_heads, -1, model.spec.d_model)
    return _share(_norm_through(sae.head_blocks(n_heads).decoder, output))


def _norm_through(
    vectors: Float[Tensor, "head d_sae d_head"], maps: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "d_sae head"]:
    """Compute norms of `vectors @ maps`, by the maps' Gram matrices, without the d_model-wide products."""
    gram = maps.double() @ maps.double().transpose(1, 2)
    squares = ((vectors.double() @ gram) * vectors.double()).sum(-1)
    return squares.clamp_min(0).sqrt().T.to(vectors.dtype)


def _share(norms: Float[Tensor, "d_sae head"]) -> Float[Tensor, "d_sae head"]:
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)


@dataclass(frozen=True)
class LogitEffects:
    """Direct logit effect of each latent at activation 1: extremes and moments of `W_dec W_O W_U`."""

    top_tokens: Int[Tensor, "d_sae k"]
    top_values: Float[Tensor, "d_sae k"]
    bottom_tokens: Int[Tensor, "d_sae k"]
    bottom_values: Float[Tensor, "d_sae k"]
    mean: Float[Tensor, " d_sae"]
    std: Float[Tensor, " d_sae"]
    skew: Float[Tensor, " d_sae"]
    kurtosis: Float[Tensor, " d_sae"]
    """3 for a normal distribution."""


def direct_logit_effects(
    sae: SAE, model: Model, k: int = 20, rows: int = 128, on_latents: Callable[[int, int], None] | None = None
) -> LogitEffects:
    """Find the tokens each latent raises and lowers most by the direct path, `W_dec @ W_O @ W_U`.

    The final norm's gain and centring are folded into W_U, its scale is omitted (`Model.logit_directions`), and so is
    that of a norm after W_O, if there is one (`Model.output_directions`).

    Args:
        sae: the SAE.
        model: the model of W_O and W_U.
        k: number of tokens at either end.
        rows: latents per chunk.
        on_latents: called with the latents done and the total.
    """
    written = sae.W_dec @ model.output_directions(sae.site.layer)  # [d_sae, d_model]
    directions = model.logit_directions
    k = min(k, model.spec.d_vocab)
    parts = []
    for chunk in written.split(rows):
        effects = chunk @ directions
        top, bottom = effects.topk(k), effects.topk(k, largest=False)
        moments = zip(*map(_moments, effects.split(_CACHED_ROWS)), strict=True)
        parts.append((top.indices, top.values, bottom.indices, bottom.values, *map(torch.cat, moments)))
        if on_latents is not None:
            on_latents(min(len(parts) * rows, len(written)), len(written))
    return LogitEffects(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _moments(values: Float[Tensor, "row n"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, standard deviation, skew and kurtosis of each row."""
    mean = values.mean(1)
    centred = values - mean[:, None]
    squares = centred.square()
    variance = squares.mean(1)
    scale = variance.clamp_min(1e-30)
    return mean, variance.sqrt(), centred.mul_(squares).mean(1) / scale**1.5, squares.square_().mean(1) / scale**2
