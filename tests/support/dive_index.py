"""A small real index whose documents have hostile names, for what the deep-dive tabs show of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex

N_LATENTS, DEAD, RARE, COMMON = 24, 3, 5, 7
HOSTILE_NAME = "</script><img src=x onerror=alert(1)>"


def built(random_model, random_corpus, random_sae, folder: Path) -> FeatureIndex:
    """60 blocks of 32 random characters; feature 3 is dead, 5 fires on 12 tokens, 7 on half of them."""
    return built_live(random_model, random_corpus, random_sae, folder).index


def built_live(random_model, random_corpus, random_sae, folder: Path) -> LiveIndex:
    """The same with its model and SAE."""
    model = random_model("gpt_neox")
    corpus = random_corpus(model, 60, 32, seed=1)
    names = tuple(f"{HOSTILE_NAME} {i}" for i in range(len(corpus.documents)))
    sae = random_sae(model, N_LATENTS)
    _set_biases(model, corpus, sae)
    build_index(model, [(sae, SAERecord("made up", "sha256:0"))], replace(corpus, documents=names), folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


def _set_biases(model, corpus, sae) -> None:
    """One feature never fires, one on 12 tokens, one on half of them."""
    tokens = torch.from_numpy(corpus.blocks.astype(np.int64))
    pre = sae.pre_activations(model.read(tokens, [sae.site])[sae.site])[tokens != corpus.bos]
    ranked = pre.sort(dim=0, descending=True).values
    sae.b_enc[DEAD] = -1e4
    sae.b_enc[RARE] -= ranked[11:13, RARE].mean()
    sae.b_enc[COMMON] -= ranked[len(ranked) // 2, COMMON]


def text_positions(index: FeatureIndex) -> np.ndarray:
    """Whether each position of the corpus is text."""
    special = index.vocabulary[1]
    tokens = np.concatenate([index.tokens_of(block) for block in range(index.n_blocks)])
    return ~np.isin(tokens, special)


def dense(index: FeatureIndex, latent: int) -> np.ndarray:
    """The activation of a feature at each position."""
    f = np.zeros(index.n_blocks * index.block_size)
    found = index.activations(latent)
    f[found.position] = found.activation
    return f
