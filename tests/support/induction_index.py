"""An index of the planted induction transformer in which every second A is followed by its B again."""

from pathlib import Path

import numpy as np
import torch

from headscope.corpus import Corpus
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.sae.model import SAE
from planted import BOS, induction_sequences, planted_model, planted_sae


def planted_live(folder: Path, n: int = 400, model: Model | None = None, sae: SAE | None = None) -> LiveIndex:
    """Sequences `BOS ... A B ... A B`: B is there twice, so that the second A is expected to be on."""
    tokens, _, second = induction_sequences(n)
    blocks = torch.cat([tokens, second[:, None]], dim=1).numpy()
    document = np.repeat(np.arange(n)[:, None], blocks.shape[1], axis=1)
    offset = np.repeat(np.arange(blocks.shape[1])[None], n, axis=0)
    names = tuple(f"sequence {i}" for i in range(n))
    corpus = Corpus("planted", "all", blocks.astype(np.int32), names, document, offset, BOS)
    model, sae = model or planted_model(), sae or planted_sae()
    build_index(model, [(sae, SAERecord("planted", "none"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)
