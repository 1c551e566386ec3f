"""Recipes and data of trainings that take milliseconds."""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.training.objectives import Now, Outcome
from headscope.sae.training.trainer import Trainer
from headscope.site import Site

D_IN, D_HEAD, BATCH = 16, 4, 64

RECIPES: dict[str, dict[str, Any]] = {
    "relu": {"variant": "relu"},
    "relu, free decoder": {"variant": "relu", "decoder": "free", "clip": 1.0},
    "jumprelu": {"variant": "jumprelu"},
    "jumprelu, tanh": {"variant": "jumprelu", "tanh": 2.0, "decoder": "free"},
    "gated": {"variant": "gated"},
    "topk": {"variant": "topk"},
    "batchtopk": {"variant": "batchtopk"},
    "matryoshka": {"variant": "batchtopk", "prefixes": (6, 12)},
    "after W_O": {"variant": "batchtopk", "error_in": "output"},
}
"""One of each kind."""
APRIL: dict[str, Any] = RECIPES["relu, free decoder"] | {
    "scaling": "norm",
    "center": "none",
    "start": "transpose",
}
"""As Conerly et al. (April 2024) scale inputs, read and start."""


def remembering(model: Model) -> Model:
    """Let a model read the same tokens once: a stream reads small groups often, and checked annotations are slow."""
    known: dict[tuple[Any, ...], dict[Site, Tensor]] = {}
    lock, read = threading.Lock(), model.read

    def remembered(tokens: Tensor, sites: list[Site]) -> dict[Site, Tensor]:
        key = tokens.numpy().tobytes(), *sites
        with lock:
            if key not in known:
                known[key] = read(tokens, sites)
            return known[key]

    model.read, model.replica = remembered, lambda: model
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **({"d_sae": 24, "target_l0": 3.0, "batch": BATCH, "tokens": BATCH * 100, "buffer": 512} | changes)
    )


def data(n: int, seed: int = 0) -> Tensor:
    """Inputs that vary little, and differently by component, around a point that is far away; float64."""
    spread, mean = torch.rand(D_IN, generator=generator(99)) * 0.2, torch.randn(D_IN, generator=generator(98))
    return (torch.randn(n, D_IN, generator=generator(seed)) * spread + mean).double()


def w_o() -> Tensor:
    return torch.randn(D_IN, 10, generator=generator(97)).double()


def trainer(steps: int = 0, samples: Tensor | None = None, **changes: Any) -> Trainer:
    made = Trainer(data(512) if samples is None else samples, config(**changes), W_O=w_o(), d_head=D_HEAD)
    for step in range(steps):
        made.step(data(BATCH, seed=step + 1))
    return made


def outcome(t: Trainer, x: Tensor, coefficient: float = 0.0) -> Outcome:
    """The objective on raw activations, with the weights as they are and no latent dead."""
    return t.objective(t.p, x * t.scale, Now(coefficient, torch.zeros(t.config.d_sae, dtype=torch.bool)))


def weights(t: Trainer) -> dict[str, Tensor]:
    """Copies of all weights and of Adam's moments."""
    state = {name: value for name, value in t.state().items() if isinstance(value, Tensor)}
    return {name: value.clone() for name, value in state.items() if name.startswith(("p.", "adam."))}


def planted(n: int, d_in: int, n_features: int, active: int) -> tuple[Tensor, Tensor]:
    """x = sum of a few random unit directions with positive coefficients, plus a constant and a little noise."""
    g = generator()
    directions = normalize(torch.randn(n_features, d_in, generator=g), dim=1)
    on = torch.rand(n, n_features, generator=g).argsort(1) < active
    coefficients = on * (0.5 + torch.rand(n, n_features, generator=g))
    noise = 0.01 * torch.randn(n, d_in, generator=g)
    return directions, coefficients @ directions + noise + torch.randn(d_in, generator=g)


def mean_max_cosine(truth: Tensor, rows: Tensor) -> float:
    return (truth @ normalize(rows, dim=1).T).max(1).values.mean().item()
