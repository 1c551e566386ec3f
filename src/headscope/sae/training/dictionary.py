"""Initial dictionary, input scaling, and resampling of dead latents."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.sae.config import TrainConfig
from headscope.sae.training.objectives import Parameters

_THRESHOLD = 0.1
"""Initial jumprelu thresholds for random directions, in units of scaled inputs."""
_THRESHOLD_INPUTS = 1024
_SUBSPACE = 0.99  # share of the variance in the subspace where random directions are drawn
_MEDIAN_ROUNDS = 100
_FREE_NORM = 0.1
"""Norm of free decoder rows where the encoder starts as their transpose; within 0.05 to 1 (Conerly et al., April 2024).
"""


def unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Normalise rows."""
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)


def measured(x: Float[Tensor, "n d_in"], scaling: str) -> Float[Tensor, "n d_in"]:
    """Return the vectors whose length scaling measures: inputs minus their mean, or with `norm` the inputs."""
    return x if scaling == "norm" else x - x.mean(0)


def scale_of(x: Float[Tensor, "n d_in"], scaling: str, d_head: int) -> Float[Tensor, " d_in"]:
    """Return factors on inputs, by component, that make the mean measured length sqrt(d), per head or overall."""
    d = x.shape[1]
    if scaling == "none":
        return torch.ones_like(x[0])
    parts = measured(x, scaling).unflatten(1, (-1, d_head if scaling == "head" else d))
    length = torch.linalg.vector_norm(parts, dim=2).mean(0).clamp_min(1e-12)  # per head, or one
    return (math.sqrt(parts.shape[2]) / length).repeat_interleave(parts.shape[2])


def first_parameters(x: Float[Tensor, "n d_in"], config: TrainConfig, generator: torch.Generator) -> Parameters:
    """Make the initial weights, in the units of x."""
    d_in, d_sae = x.shape[1], config.d_sae

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(x)

    mean = x.mean(0)
    if config.start == "data":
        chosen = torch.randint(0, len(x), (d_sae,), generator=generator).to(x.device)
        decoder = unit(x[chosen] - mean + normal(d_sae, d_in) * 0.01)
        encoder = decoder.clone()
    elif config.start == "subspace":
        directions = _subspace(x - mean)
        decoder = unit(normal(d_sae, len(directions)) @ directions)
        encoder = decoder.clone()
    elif config.start == "transpose":
        decoder = unit(normal(d_sae, d_in)) * (_FREE_NORM if config.decoder == "free" else 1.0)
        encoder = decoder.clone()
    else:
        encoder, decoder = kaiming(d_sae, d_in, generator).to(x), unit(kaiming(d_sae, d_in, generator).to(x))
    zeros = torch.zeros(d_sae).to(x)
    p = {"encoder": encoder, "b_enc": zeros, "decoder": decoder, "b_dec": _center(x, config.center)}
    if config.variant == "jumprelu":
        p["log_threshold"] = torch.full_like(zeros, math.log(_THRESHOLD))
    if config.variant == "gated":
        p |= {"r_mag": zeros.clone(), "b_mag": zeros.clone()}
    return p


def _center(x: Float[Tensor, "n d_in"], center: str) -> Float[Tensor, " d_in"]:
    if center == "mean":
        return x.mean(0)
    return geometric_median(x) if center == "median" else torch.zeros_like(x[0])


def kaiming(d_sae: int, d_in: int, generator: torch.Generator) -> Float[Tensor, "d_sae d_in"]:
    """Draw uniformly with variance 2 / d_in (He et al. 2015), for vectors multiplied with inputs of width d_in."""
    return (torch.rand(d_sae, d_in, generator=generator) * 2 - 1) * math.sqrt(6 / d_in)


def first_threshold(p: Parameters, x: Float[Tensor, "n d_in"], l0: float) -> float:
    """Return the threshold, above 0, that gives the wanted number of active latents on some inputs."""
    x = x[:_THRESHOLD_INPUTS] - p["b_dec"]
    pre = (x @ p["encoder"].T).flatten()
    return max(pre.topk(min(len(pre), round(l0 * len(x)))).values[-1].item(), 1e-6)


def _subspace(centred: Float[Tensor, "n d_in"]) -> Float[Tensor, "rank d_in"]:
    """Return the fewest principal directions that hold nearly all variance, scaled to the inputs' spread."""
    variance, directions = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
    share = variance.flip(0).cumsum(0) / variance.sum()
    rank = int((share < _SUBSPACE).sum()) + 1
    kept = slice(len(variance) - min(rank, len(variance)), None)
    return (directions[:, kept] * variance[kept].clamp_min(0).sqrt()).T.to(centred.dtype)


def geometric_median(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Find the point with the least sum of distances, by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(_MEDIAN_ROUNDS):
        weight = 1 / torch.linalg.vector_norm(x - point, dim=1).clamp_min(1e-9)
        moved = (weight[:, None] * x).sum(0) / weight.sum()
        if torch.linalg.vector_norm(moved - point) < 1e-6 * (1 + torch.linalg.vector_norm(point)):
            return moved
        point = moved
    return point


def started_anew(
    p: Parameters,
    dead: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "n d_in"],
    squared_error: Float[Tensor, " n"],
    config: TrainConfig,
    generator: torch.Generator,
) -> Parameters:
    """Return new rows for dead latents, by parameter; nothing else changes.

    `loss` (Bricken et al. 2023): inputs are drawn without replacement with probability proportional to their squared
    loss; the decoder row is `unit(x - b_dec)`, the encoder row the same at a fifth of the mean norm of live rows.
    `random`: the encoder row is a random direction at a hundredth of that norm, the decoder row its unit vector. A
    variant that keeps the largest pre-activations would never pick so short a row: it gets the whole norm.
    """
    n_dead = int(dead.sum())
    alive = p["encoder"][~dead]
    norm = torch.linalg.vector_norm(alive, dim=1).mean().item() if len(alive) else 1.0
    if config.resample_by == "random":
        rows, factor = unit(kaiming(n_dead, x.shape[1], generator).to(x)), 0.01
    else:
        chosen = _drawn(squared_error.double().square().cpu(), n_dead, generator).to(x.device)
        rows, factor = unit(x[chosen] - p["b_dec"]), 0.2
    if config.variant in ("topk", "batchtopk"):
        factor = 1.0
    anew = {"encoder": rows * norm * factor, "decoder": rows, "b_enc": torch.zeros_like(p["b_enc"][dead])}
    if "log_threshold" in p:
        live = p["log_threshold"][~dead].mean().item() if len(alive) else math.log(_THRESHOLD)
        anew["log_threshold"] = torch.full_like(anew["b_enc"], live + math.log(factor))
    if "r_mag" in p:
        anew |= {"r_mag": torch.zeros_like(anew["b_enc"]), "b_mag": torch.zeros_like(anew["b_enc"])}
    return anew


def _drawn(weights: Float[Tensor, " n"], count: int, generator: torch.Generator) -> Tensor:
    """Draw indices by weight, without replacement while enough have a positive weight."""
    possible = int((weights > 0).sum())
    if not possible:
        weights, possible = torch.ones_like(weights), len(weights)
    return torch.multinomial(weights, count, replacement=count > possible, generator=generator)
