"""An index with its model at hand: DFA by head and source of any token and feature, not only of the shown examples."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from headscope import attribution
from headscope.errors import IndexFormatError
from headscope.index.passes import check_sum
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.sae.convert import check_fits
from headscope.sae.model import SAE


@dataclass(frozen=True)
class TokenDFA:
    """What makes the pre-activation of one feature at one token, active there or not.

    `by_source` and the bias sum to `pre`; the residual is what rounding leaves.
    """

    latent: int
    position: int
    """In the corpus: block number * block size + position in the block."""
    tokens: Int[np.ndarray, " source"]
    """Of the block, up to this token."""
    activation: float
    pre: float
    bias: float
    residual: float
    by_source: Float[np.ndarray, "head source"]
    """C[h, s]."""
    pattern: Float[np.ndarray, "head source"]

    @property
    def heads(self) -> Float[np.ndarray, " head"]:
        """C_h: the sum over sources."""
        return self.by_source.sum(1)

    @property
    def sources(self) -> Float[np.ndarray, " source"]:
        """The sum over heads."""
        return self.by_source.sum(0)


class LiveIndex:
    """An index, the model and the SAE it was built with."""

    def __init__(self, index: FeatureIndex, model: Model, sae: SAE, *, sae_hash: str | None = None) -> None:
        """Put them together.

        Args:
            index: open.
            model: the one it was built with; its weights are held against the index's.
            sae: likewise.
            sae_hash: of the SAE's file (`sae_hash`), held against the index's when given.

        Raises:
            IndexFormatError: another model or SAE.
            SAEError: one that reads activations of processed weights.
        """
        index.check_same(model=model, sae_hash=sae_hash)
        if (sae.d_sae, sae.site.hook_name) != (index.n_latents, index.manifest["site"]):
            raise IndexFormatError(
                f"an SAE of {sae.site.hook_name} with {sae.d_sae} latents",
                expected=f"{index.manifest['site']} with {index.n_latents}",
                do="pass the SAE that the index was built with",
            )
        check_fits(sae, model)
        self.index, self.model, self.sae = index, model, sae.to(model.device).to(model.module.dtype)
        self._weights = attribution.HeadWeights.of(self.sae, model)

    def dfa(self, position: int, latents: Int[np.ndarray, " n"] | list[int]) -> tuple[TokenDFA, ...]:
        """DFA by head and source of some features at one token of the corpus: one run of the model on its block.

        Args:
            position: in the corpus, as in `Example.position` and `Activations.position`.
            latents: which features.

        Raises:
            IndexFormatError: no such position or latent.
        """
        block, query = divmod(position, self.index.block_size)
        tokens = self.index.tokens_of(block)
        for latent in latents:
            self.index.check_latent(int(latent))
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=self.model.device)
        at = torch.full_like(chosen, query)
        batch = torch.from_numpy(tokens[: query + 1].astype(np.int64))[None].to(self.model.device)
        attention = self.model.attention(batch, self.sae.site.layer)
        dfa = attribution.dfa_by_source(self._weights, attention, torch.zeros_like(chosen), at, chosen)
        everything = self.sae.pre_activations(attention.z[0, query])
        pre, f = everything[chosen], self.sae.activation(everything)[chosen]
        bias = self._weights.bias[chosen]
        residual = pre - dfa.sum((1, 2)) - bias
        check_sum(residual, dfa)
        return tuple(
            TokenDFA(
                latent=int(chosen[i]),
                position=position,
                tokens=tokens[: query + 1],
                activation=f[i].item(),
                pre=pre[i].item(),
                bias=bias[i].item(),
                residual=residual[i].item(),
                by_source=dfa[i].cpu().numpy(),
                pattern=attention.pattern[0, :, query].cpu().numpy(),
            )
            for i in range(len(chosen))
        )
