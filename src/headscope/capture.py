"""Stream the activations of a site from a corpus: the one fast read path."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.corpus import Corpus, check_block_size
from headscope.errors import CorpusError
from headscope.models.hf import Model
from headscope.site import Site

BATCH_TOKENS = 8192
"""Tokens per run of the model."""


def check_corpus(model: Model, corpus: Corpus) -> None:
    """Reject a corpus that the model cannot read.

    Raises:
        CorpusError: blocks longer than the model's context, or token ids outside its vocabulary.
    """
    check_block_size(corpus.block_size, model.spec.context, model.spec.name)
    largest = int(corpus.blocks.max())
    if largest >= model.spec.d_vocab or corpus.blocks.min() < 0:
        raise CorpusError(
            f"token id {largest}",
            expected=f"ids below {model.spec.d_vocab}, the model's vocabulary",
            do="tokenise the text with this model's own tokenizer",
        )


def is_text(corpus: Corpus, numbers: Int[np.ndarray, " n"], device: torch.device) -> Bool[Tensor, "n position"]:
    """Return `Corpus.is_text` of some blocks, on a device."""
    return torch.from_numpy(corpus.is_text(numbers)).to(device)


def token_batches(
    corpus: Corpus,
    device: torch.device,
    order: Int[np.ndarray, " n"] | None = None,
    *,
    batch_tokens: int | None = None,
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[Tensor, "n position"]]]:
    """Yield (block numbers, their tokens) over all blocks, or over `order`."""
    order = np.arange(len(corpus.blocks)) if order is None else order
    rows = max(1, (batch_tokens or BATCH_TOKENS) // corpus.block_size)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        yield chosen, torch.from_numpy(corpus.blocks[chosen].astype(np.int64)).to(device)


def activations(
    model: Model, corpus: Corpus, site: Site, order: Int[np.ndarray, " n"] | None = None
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[Tensor, "n position"], Float[Tensor, "n position d"]]]:
    """Yield (block numbers, tokens, activations of the site) batch by batch; activations in float32 at least.

    Raises:
        CorpusError: the model cannot read the corpus.
        ModelError: the site's layer does not exist, or its activations are not finite.
    """
    check_corpus(model, corpus)
    for numbers, tokens in token_batches(corpus, model.device, order):
        values = model.read(tokens, [site])[site]
        model.check_finite(site.hook_name, values)
        yield numbers, tokens, values.to(torch.promote_types(values.dtype, torch.float32))
