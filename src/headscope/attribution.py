"""Direct feature attribution (DFA): which heads and source tokens make a feature's pre-activation, exactly.

The pre-activation is linear in z, and z is linear in the values with the pattern held fixed, so

    pre_j[q] = sum_h sum_s C[h, s] + bias_j,    C[h, s] = pattern[h, q, s] (v[s, h] - c_h) . W_enc[h, :, j]

with `bias_j = b_enc_j - b_dec . W_enc_j + c . W_enc_j`. The constant c of z (`Model.value_offset`) is taken out of the
values, since how it splits over sources says nothing of the text; it joins the bias, and the sum still closes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.hf import Attention, Model
from headscope.sae.model import SAE


@dataclass(frozen=True)
class HeadWeights:
    """An SAE's encoder cut into heads, with the constant part of z moved to the bias."""

    encoder: Float[Tensor, "d_sae head d_head"]
    bias: Float[Tensor, " d_sae"]
    """The part of the pre-activation that no head makes."""
    offset: Float[Tensor, "head d_head"]
    """c, the constant part of z."""

    @classmethod
    def of(cls, sae: SAE, model: Model) -> "HeadWeights":
        """For a z SAE of this model."""
        offset = model.value_offset(sae.site.layer).to(sae.W_enc)
        encoder = sae.W_enc.T.contiguous().view(sae.d_sae, model.spec.n_heads, model.spec.d_head)
        return cls(encoder, sae.bias + offset @ sae.W_enc, offset.view(model.spec.n_heads, model.spec.d_head))


def dfa_by_head(
    weights: HeadWeights, z: Float[Tensor, "pair d_in"], latent: Int[Tensor, " pair"]
) -> Float[Tensor, "pair head"]:
    """Contribution of each head to the pre-activation: `C[h] = (z_h - c_h) . W_enc[h, :, j]`; sum + bias = pre."""
    heads = z.view(len(z), *weights.offset.shape) - weights.offset
    return (heads * weights.encoder[latent]).sum(-1)


def dfa_by_source(
    weights: HeadWeights,
    attention: Attention,
    row: Int[Tensor, " pair"],
    query: Int[Tensor, " pair"],
    latent: Int[Tensor, " pair"],
) -> Float[Tensor, "pair head source"]:
    """Contribution of each head from each source to each (sequence, position, latent).

    Values are contracted with the encoder first, sequence by sequence: z is never built by source. `row` must be
    sorted, so that the pairs of a sequence lie together.
    """
    n_sequences, _, _, n_sources = attention.pattern.shape
    parts = []
    counts = torch.bincount(row, minlength=n_sequences).tolist()
    for sequence, own in enumerate(torch.arange(len(row), device=row.device).split(counts)):
        value = (attention.value[sequence] - weights.offset).permute(1, 2, 0)  # [head, d_head, source]
        weighted = weights.encoder[latent[own]].transpose(0, 1) @ value  # [head, pair, source]
        pattern = attention.pattern[sequence, :, query[own]]  # [head, pair, source]
        parts.append((pattern * weighted).transpose(0, 1))
    return torch.cat(parts) if parts else torch.empty(0, len(weights.offset), n_sources)


def encoder_share(weights: HeadWeights) -> Float[Tensor, "d_sae head"]:
    """`||W_enc[h, :, j]|| / sum over heads`."""
    return _share(weights.encoder.norm(dim=-1))


def decoder_share(sae: SAE, n_heads: int) -> Float[Tensor, "d_sae head"]:
    """`||W_dec[j, h, :]|| / sum over heads`: the post's attribution of a feature to heads.

    It depends on the basis of z: rescaling a head's W_V against its W_O changes it and not the model.
    """
    return _share(sae.W_dec.view(sae.d_sae, n_heads, -1).norm(dim=-1))


def decoder_share_through_output(sae: SAE, model: Model) -> Float[Tensor, "d_sae head"]:
    """`||W_dec[j, h, :] @ W_O[h]|| / sum over heads`: the same in the residual stream, free of the basis of z."""
    n_heads = model.spec.n_heads
    output = model.W_O(sae.site.layer).reshape(n_heads, -1, model.spec.d_model)
    written = torch.einsum("jhe,hed->jhd", sae.W_dec.view(sae.d_sae, n_heads, -1), output)
    return _share(written.norm(dim=-1))


def _share(norms: Float[Tensor, "d_sae head"]) -> Float[Tensor, "d_sae head"]:
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)


@dataclass(frozen=True)
class LogitEffects:
    """Direct logit effect of each latent at activation 1: the ends and moments of `W_dec W_O W_U`."""

    top_tokens: Int[Tensor, "d_sae k"]
    top_values: Float[Tensor, "d_sae k"]
    bottom_tokens: Int[Tensor, "d_sae k"]
    bottom_values: Float[Tensor, "d_sae k"]
    mean: Float[Tensor, " d_sae"]
    std: Float[Tensor, " d_sae"]


def direct_logit_effects(sae: SAE, model: Model, k: int = 20, rows: int = 1024) -> LogitEffects:
    """The tokens each latent raises and lowers most by the direct path, `W_dec @ W_O @ W_U`.

    The final norm's gain and centring are folded into W_U, its scale is left out (`Model.logit_directions`).
    """
    written = sae.W_dec @ model.W_O(sae.site.layer)  # [d_sae, d_model]
    k = min(k, model.spec.d_vocab)
    parts = []
    for chunk in written.split(rows):
        effects = chunk @ model.logit_directions
        top, bottom = effects.topk(k), effects.topk(k, largest=False)
        parts.append((top.indices, top.values, bottom.indices, bottom.values, effects.mean(1), effects.std(1)))
    return LogitEffects(*(torch.cat(column) for column in zip(*parts, strict=True)))
