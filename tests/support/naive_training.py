"""A training loop as the recipes of Kissane et al. (2024) and Conerly et al. (April 2024) say it, by autograd.

The decoder's rows have unit norm: what a gradient has along a row is taken out before Adam's step, and the rows are
divided by their norms after it (the post's code does so before the next step, in which the rows the gradients are
taken at have drifted from unit norm by what the step moved them).
"""

import math

import torch
from torch import Generator, Tensor

from headscope.sae.config import TrainConfig


class NaiveTraining:
    """Weights and one step; ReLU with an L1 penalty, on inputs that are scaled before, if at all."""

    def __init__(self, p: dict[str, Tensor], config: TrainConfig) -> None:
        self.p = {name: weight.clone().requires_grad_(True) for name, weight in p.items()}
        self.config = config
        self.adam = torch.optim.Adam(list(self.p.values()), lr=config.lr, betas=config.betas, foreach=False)
        self.n_steps_taken = 0
        self.last_fired = [0] * len(p["decoder"])
        self.fired_on: list[list[int]] = []  # inputs of each step's batch, by latent
        self.resampled_after = 0  # steps

    def activations(self, x: Tensor) -> Tensor:
        centred = x if self.config.center == "none" else x - self.p["b_dec"]
        return (centred @ self.p["encoder"].T + self.p["b_enc"]).relu()

    def loss_of(self, x: Tensor, f: Tensor) -> Tensor:
        return (x - f @ self.p["decoder"] - self.p["b_dec"]).square().sum(1)

    def factor(self) -> float:
        """On the learning rate."""
        config = self.config
        if config.warmup == "cosine" and config.warmup_steps:
            t = min(1.0, (self.n_steps_taken - self.resampled_after) / config.warmup_steps)
            return 0.1 + 0.9 * (1 - math.cos(math.pi * t)) / 2
        left = (config.n_steps - self.n_steps_taken) / config.n_steps
        return min(1.0, left / config.decay) if config.decay else 1.0

    def coefficient(self) -> float:
        config = self.config
        assert config.coefficient is not None
        if not config.coefficient_warmup:
            return config.coefficient
        return config.coefficient * min(1.0, self.n_steps_taken / (config.coefficient_warmup * config.n_steps))

    def step(self, x: Tensor) -> None:
        decoder, free = self.p["decoder"], self.config.decoder == "free"
        f = self.activations(x)
        cost = f * decoder.norm(dim=1) if free else f
        self.adam.zero_grad()
        (self.loss_of(x, f).mean() + self.coefficient() * cost.sum(1).mean()).backward()
        with torch.no_grad():
            if not free:
                assert decoder.grad is not None
                for row, gradient in zip(decoder, decoder.grad, strict=True):
                    gradient -= (gradient @ row) * row
            if self.config.clip is not None:
                gradients = [weight.grad for weight in self.p.values() if weight.grad is not None]
                norm = sum((g.square().sum() for g in gradients), torch.zeros((), dtype=x.dtype)).sqrt()
                for gradient in gradients:
                    gradient *= min(1.0, self.config.clip / norm.item())
            self.adam.param_groups[0]["lr"] = self.config.lr * self.factor()
            self.adam.step()
            if not free:
                for row in decoder:
                    row /= row.norm()
        self.n_steps_taken += 1
        self.fired_on.append([int((f[:, latent] > 0).sum()) for latent in range(len(decoder))])
        for latent, n in enumerate(self.fired_on[-1]):
            if n:
                self.last_fired[latent] = self.n_steps_taken

    def dead(self) -> list[int]:
        window = self.config.dead_after // self.config.batch
        return [j for j, last in enumerate(self.last_fired) if self.n_steps_taken - last > window]

    def to_start_anew(self) -> list[int]:
        """Latents whose frequency in the look-back window is below the cutoff (Kissane et al. 2024)."""
        if not self.config.dead_below:
            return self.dead()
        window = self.fired_on[-(self.config.dead_after // self.config.batch) :]
        inputs = len(window) * self.config.batch
        return [
            j for j, by_step in enumerate(zip(*window, strict=True)) if sum(by_step) / inputs < self.config.dead_below
        ]

    @torch.no_grad()
    def resample(self, x: Tensor, generator: Generator) -> None:
        """Start dead latents anew; draws what the recipe draws, from a generator in the state of the other's."""
        dead = self.to_start_anew()
        self.resampled_after = self.n_steps_taken
        if not dead:
            return
        d_in = x.shape[1]
        norms = [self.p["encoder"][j].norm() for j in range(len(self.last_fired)) if j not in dead]
        alive = sum(norms, torch.zeros((), dtype=x.dtype)) / len(norms)
        if self.config.resample_by == "random":
            column = (torch.rand(len(dead), d_in, generator=generator) * 2 - 1) * math.sqrt(6 / d_in)
            rows, factor = column.to(x), 0.01
        else:
            loss = self.loss_of(x, self.activations(x)).square()
            drawn = torch.multinomial(loss / loss.sum(), len(dead), replacement=False, generator=generator)
            rows, factor = x[drawn] - self.p["b_dec"], 0.2
        for j, row in zip(dead, rows, strict=True):
            direction = row / row.norm()
            self.p["decoder"][j] = direction
            self.p["encoder"][j] = direction * factor * alive
            self.p["b_enc"][j] = 0
            self.last_fired[j] = self.n_steps_taken
            for name in ("encoder", "decoder", "b_enc"):
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.adam.state[self.p[name]][moment][j] = 0
