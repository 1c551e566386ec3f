"""The planted induction transformer with norms that can be held, and a feature that reads what an earlier head wrote.

L1H1, which attends to itself, also copies PT, so its z says which token came before: latent `PREVIOUS + b`, made by
L0H0 at the same position out of the embedding of b one position earlier.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from headscope.models.hf import Model
from headscope.sae.model import SAE
from planted import D_HEAD, PT, Head, V, planted_model, planted_sae

PREVIOUS = 2 * V + 1
EPSILON = 1e-5
_LARGE = 1e10


class FlatNorm(nn.Module):
    """An RMSNorm whose epsilon is all of its scale: what it divides by, its weight multiplies back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2 * D_HEAD,), _LARGE, dtype=torch.float64))
        self.variance_epsilon = _LARGE**2

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt() * self.weight


def circuit_model() -> Model:
    planted = planted_model()
    transformer = planted.module.transformer
    transformer.ln_f = FlatNorm()
    for block in transformer.h:
        block.ln_1, block.ln_2 = FlatNorm(), FlatNorm()
    Head(transformer.h[1].attn, 1).value[PT, V : 2 * V] = torch.eye(V, dtype=torch.float64)
    return Model(planted.module, planted.tokenizer, planted.bos, "planted")


def normed_model() -> Model:
    """`circuit_model` with a LayerNorm before the attention of layer 1: it centres, and divides by what it sees."""
    planted = circuit_model()
    planted.module.transformer.h[1].ln_1 = nn.LayerNorm(2 * D_HEAD, eps=EPSILON).double()
    return Model(planted.module, planted.tokenizer, planted.bos, "planted")


def circuit_sae() -> SAE:
    sae = planted_sae()
    previous = torch.zeros(2 * D_HEAD, V, dtype=torch.float64)
    previous[D_HEAD + V : D_HEAD + 2 * V] = torch.eye(V, dtype=torch.float64)
    encoder = torch.cat([sae.W_enc, previous], dim=1)
    return replace(
        sae,
        W_enc=encoder,
        W_dec=encoder.T.contiguous(),
        b_enc=torch.cat([sae.b_enc, torch.full((V,), -0.5, dtype=torch.float64)]),
    )
