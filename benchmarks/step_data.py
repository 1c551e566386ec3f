"""Inputs, initial weights and judgement that are the same for all that train on them.

Inputs are scaled to a mean distance of sqrt(d_in) from their mean, the units in which trainers' learning rates and L1
coefficients are meant. Initial weights are sparse from the first step on, as a dictionary is after a while of training:
for ReLU each latent's bias is set to a quantile of its own pre-activations.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from headscope.capture import activations
from headscope.corpus import load_corpus
from headscope.models.load import load_model
from headscope.site import Site
from planted_dictionary import PlantedConfig, PlantedDictionary, plant

N_HEADS = 8
CHUNK = 4096
QUANTILE_ROWS = 2048
"""Inputs from which a latent's bias is set."""


@dataclass(frozen=True)
class Inputs:
    """Inputs in files, and weights to start from."""

    data: Path
    sparse: Path
    """Initial weights with biases: each latent is active on its share of the inputs."""
    unbiased: Path
    """The same without biases, for variants that choose the largest pre-activations."""
    held_out: Tensor

    def initial(self, variant: str) -> Path:
        """The weights a variant starts from."""
        return self.sparse if variant == "relu" else self.unbiased


def planted_for(d_in: int, d_sae: int, l0: float) -> PlantedDictionary:
    """A quarter as many features as latents, in 8 heads of which each has three quarters of its directions."""
    d_head = d_in // N_HEADS
    config = PlantedConfig(
        n_features=d_sae // 4, n_heads=N_HEADS, d_head=d_head, rank=3 * d_head // 4, l0=l0, noise=0.02
    )
    return plant(config)


def planted_rows(planted: PlantedDictionary, n: int, *, seed: int) -> Tensor:
    """Inputs of a planted dictionary, unscaled."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([planted.sample(min(CHUNK, n - at), generator).x for at in range(0, n, CHUNK)])


def tiny_rows(n: int) -> Tensor:
    """Inputs `[n, 128]`, unscaled: z of layer 1 of the bundled model on Python source, mixed, BOS left out."""
    model = load_model("tiny")
    corpus = load_corpus("python", model.tokenizer, bos=model.bos, max_tokens=2 * n)
    order = np.random.default_rng(0).permutation(len(corpus.blocks))
    rows, have = [], 0
    for _, _, z in activations(model, corpus, Site("z", 1), order):
        rows.append(z[:, 1:].flatten(0, 1))
        have += len(rows[-1])
        if have >= n:
            break
    mixed = torch.cat(rows)
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))[:n]]


def scaled(rows: Tensor) -> Tensor:
    """Rows times the number that gives them a mean distance of sqrt(d_in) from their mean."""
    return rows * (math.sqrt(rows.shape[1]) / (rows - rows.mean(0)).norm(dim=1).mean())


def unit(rows: Tensor) -> Tensor:
    """Rows of norm 1."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def near_planted(planted: PlantedDictionary, rows: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Decoder rows at a cosine of about 0.9 with the planted features, then inputs; and how often each is active."""
    generator = torch.Generator().manual_seed(2)
    directions = planted.directions
    noise = unit(torch.randn(directions.shape, generator=generator))
    n_rest = d_sae - len(directions)
    others = unit(rows[torch.randint(0, len(rows), (n_rest,), generator=generator)] - rows.mean(0))
    shares = torch.cat([torch.from_numpy(planted.frequency).float(), torch.full((n_rest,), 1 / n_rest)])
    return torch.cat([unit(directions + 0.5 * noise), others]), shares


def from_rows(rows: Tensor, d_sae: int, l0: float) -> tuple[Tensor, Tensor]:
    """Decoder rows that are inputs, all equally often active; and how often."""
    chosen = torch.randint(0, len(rows), (d_sae,), generator=torch.Generator().manual_seed(2))
    return unit(rows[chosen] - rows.mean(0)), torch.full((d_sae,), l0 / d_sae)


def initial_weights(rows: Tensor, decoder: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """The encoder is the decoder's transpose; each latent is active on its share of the rows."""
    b_dec = rows.mean(0)
    pre = decoder @ (rows[:QUANTILE_ROWS] - b_dec).T
    place = ((1 - shares) * (pre.shape[1] - 1)).round().long()
    thresholds = pre.sort(1).values.gather(1, place[:, None])[:, 0].clamp_min(0.0)
    return {"W_enc": decoder.T.contiguous(), "b_enc": -thresholds, "W_dec": decoder.clone(), "b_dec": b_dec}


def inputs(kind: str, folder: Path, *, d_in: int, d_sae: int, l0: float, n: int, batch: int) -> Inputs:
    """Write n inputs for training and the initial weights; one more batch is held out.

    Args:
        kind: `planted` or `tiny`, whose z is 128 wide.
        folder: where the files go.
        d_in: components.
        d_sae: latents.
        l0: mean number of active features (planted) or, at first, of active latents (tiny).
        n: inputs for training.
        batch: inputs held out.
    """
    if kind == "planted":
        planted = planted_for(d_in, d_sae, l0)
        rows = scaled(planted_rows(planted, n + batch, seed=1))
        decoder, shares = near_planted(planted, rows, d_sae)
    else:
        rows = scaled(tiny_rows(n + batch))
        decoder, shares = from_rows(rows, d_sae, l0)
    files = Inputs(
        folder / f"{kind}-{d_in}.npy",
        folder / f"{kind}-{d_in}-sparse.safetensors",
        folder / f"{kind}-{d_in}-unbiased.safetensors",
        rows[n:],
    )
    weights = initial_weights(rows[:n], decoder, shares)
    np.save(files.data, rows[:n].numpy())
    save_file(weights, files.sparse)
    save_file(weights | {"b_enc": torch.zeros_like(weights["b_enc"])}, files.unbiased)
    return files


def encode(weights: dict[str, Tensor], x: Tensor, variant: str, k: int) -> Tensor:
    """Activations as in training.

    Positive pre-activations; of these the k largest of each input (topk), the k * n largest of n inputs (batchtopk,
    matryoshka), or those above their threshold (jumprelu, gated).
    """
    pre = torch.addmm(weights["b_enc"], x - weights["b_dec"], weights["W_enc"]).relu_()
    if variant == "topk":
        pre[pre < pre.topk(k, dim=1).values[:, -1:]] = 0.0
    elif variant in ("batchtopk", "matryoshka"):
        pre[pre < pre.flatten().topk(k * len(x)).values[-1]] = 0.0
    elif "threshold" in weights:
        pre[pre <= weights["threshold"]] = 0.0
    return pre


def squared_error(weights: dict[str, Tensor], x: Tensor, f: Tensor) -> float:
    """Mean over inputs of the squared error summed over components."""
    return (x - torch.addmm(weights["b_dec"], f, weights["W_dec"])).square().sum(1).mean().item()


def mean_l0(f: Tensor) -> float:
    """Mean number of active latents."""
    return (f > 0).sum().item() / len(f)
