"""An index with its model loaded: DFA by head and source of any token and feature, not only of stored examples."""

import numpy as np
import torch
from jaxtyping import Int

from headscope import attribution
from headscope.errors import IndexFormatError
from headscope.index.passes import check_sum
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.sae.convert import check_fits
from headscope.sae.model import SAE


class LiveIndex:
    """An index with the model and the SAE it was built with."""

    def __init__(self, index: FeatureIndex, model: Model, sae: SAE, *, sae_hash: str | None = None) -> None:
        """Combine an index, a model and an SAE.

        Args:
            index: open.
            model: the one it was built with; its weights are checked against the index's.
            sae: the one it was built with.
            sae_hash: hash of the SAE's file (`sae_hash`), checked against the index's if given.

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

    def dfa(self, position: int, latents: Int[np.ndarray, " n"] | list[int]) -> tuple[attribution.DFA, ...]:
        """Compute DFA by head and source of some features at one token: one run of the model on its block.

        Args:
            position: position in the corpus, as in `Example.position` and `Activations.position`.
            latents: the features.

        Raises:
            IndexFormatError: no such position or latent.
        """
        block, query = divmod(position, self.index.block_size)
        tokens = self.index.tokens_of(block)
        for latent in latents:
            self.index.check_latent(int(latent))
        sequence = torch.from_numpy(tokens[: query + 1].astype(np.int64)).to(self.model.device)
        attention = self.model.attention(sequence[None], self.sae.site.layer)
        found = attribution.dfa_at(self._weights, self.sae, attention, sequence, query, [int(j) for j in latents])
        for dfa in found:
            check_sum(torch.tensor([dfa.residual]), torch.from_numpy(dfa.by_source)[None])
        return found
