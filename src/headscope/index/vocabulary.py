"""Contribution of each vocabulary token alone to a latent, computed in parts, since vocabularies are large.

The value vector of a token alone takes a run of the layers before the SAE's: for 262,144 tokens as much work as that
many tokens of text. The vectors are written to disk in parts, like all model outputs, so that an interrupted build
keeps them and memory holds those of one head at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from headscope import attribution
from headscope.index.config import N_COPY
from headscope.index.parts import Arrays, Parts
from headscope.index.passes import Subject
from headscope.index.writing import nullable, nullable_lists
from headscope.models.hf import Model

PART_TOKENS = 4096
_ROWS = 256  # rows of the copying table in memory at a time, each as wide as the vocabulary


def n_parts_of(d_vocab: int) -> int:
    """Return the number of parts of a vocabulary."""
    return -(-d_vocab // PART_TOKENS)


def tokens_of(part: int, d_vocab: int) -> range:
    """Return the tokens of a part."""
    return range(part * PART_TOKENS, min((part + 1) * PART_TOKENS, d_vocab))


def read_values(model: Model, layer: int, part: int) -> Arrays:
    """Compute the value vectors of a part's tokens, each alone: an array `[token, d_head]` for each query head."""
    tokens = tokens_of(part, model.spec.d_vocab)
    values = model.token_values(layer, torch.arange(tokens.start, tokens.stop)).cpu().numpy()
    return {_name(head): values[:, head] for head in range(values.shape[1])}


@dataclass(frozen=True)
class TokenValues:
    """The value vectors of all tokens at one layer, in the parts made by `read_values`."""

    parts: Parts

    def of_head(self, head: int) -> Float[np.ndarray, "token d_head"]:
        """Return those of one query head.

        Raises:
            IndexFormatError: a part is missing or damaged.
        """
        name = _name(head)
        return np.concatenate([self.parts.read(part, [name])[name] for part in range(self.parts.n_parts)])


def copying_columns(
    model: Model,
    subject: Subject,
    heads: Int[np.ndarray, " latent"],
    top_logit: Int[np.ndarray, " latent"],
    values: TokenValues,
    on_latents: Callable[[int, int], None],
) -> dict[str, pa.Array]:
    """Return the top entries of the static table of each live latent's top head, and the rank of its top logit token.

    Args:
        model: the model.
        subject: the SAE.
        heads: the top head of each latent; -1 for a dead one, whose columns are null.
        top_logit: the token whose logit each latent raises most.
        values: values of all tokens at the SAE's layer.
        on_latents: called with the live latents done and the total.
    """
    n, k, dead = len(heads), min(N_COPY, model.spec.d_vocab), heads < 0
    tokens, scores, rank = np.zeros((n, k), np.int64), np.zeros((n, k)), np.full(n, np.nan)
    done, n_live = 0, int((~dead).sum())
    for head in np.unique(heads[~dead]).tolist():
        own_values = torch.from_numpy(values.of_head(head)).to(model.device)
        for latents in torch.from_numpy(np.flatnonzero(heads == head)).split(_ROWS):
            table = attribution.source_table(subject.weights, own_values, head, latents.to(model.device))
            best = table.topk(k)
            own = table.gather(1, torch.from_numpy(top_logit)[latents, None].to(model.device))
            tokens[latents], scores[latents] = best.indices.cpu(), best.values.cpu()
            rank[latents] = ((table > own).sum(1).double() / table.shape[1]).cpu()
            done += len(latents)
            on_latents(done, n_live)
    return {
        "copy_tokens": nullable_lists(tokens, dead, pa.int32()),
        "copy_values": nullable_lists(scores, dead, pa.float32()),
        "copy_rank": nullable(rank, dead),
    }


def _name(head: int) -> str:
    return f"head_{head}"
