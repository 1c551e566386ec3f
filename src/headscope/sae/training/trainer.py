"""State of a training run, and its training step."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import TrainingError
from headscope.sae import model as sae_model
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Status
from headscope.sae.model import SAE
from headscope.sae.training.dictionary import first_parameters, first_threshold, measured, scale_of, started_anew
from headscope.sae.training.kernels import sum_by_row, take_parallel
from headscope.sae.training.objectives import (
    Gated,
    JumpReLU,
    Now,
    Objective,
    Outcome,
    Parameters,
    ReLU,
    Space,
    TopK,
    squared_error,
)
from headscope.sae.training.ranks import ALONE, Ranks
from headscope.sae.training.schedule import coefficient_at, first_coefficient, l0_at, likely_coefficient, rate, steer
from headscope.site import Site

_THRESHOLD_RATE = 0.01  # rate of the running mean of the least kept activation; larger early in the run
_RESAMPLE_CHUNK = 8192
_SPEED = {"log_threshold": 10.0}
"""Factors on the learning rate, by weight: thresholds must keep up with encoder rows, whose components are small."""


class Trainer:
    """Weights, optimizer and counters, and one step of training."""

    @torch.no_grad()
    def __init__(
        self,
        samples: Float[Tensor, "n d_in"],
        config: TrainConfig,
        *,
        W_O: Float[Tensor, "d_in d_model"] | None = None,  # noqa: N803 - the field's name
        d_head: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Set the scale and the initial dictionary.

        Args:
            samples: raw activations.
            config: the recipe.
            W_O: the output matrix, where errors are measured after it.
            d_head: width of a head, where inputs are scaled by head.
            ranks: the processes that train together.

        Raises:
            TrainingError: samples that are not finite; W_O or d_head missing in a recipe that needs them.
        """
        if not samples.isfinite().all():
            raise TrainingError(
                "NaN or infinity in the activations", expected="finite activations", do="check the model's weights"
            )
        self.config, self.ranks = config, ranks
        self.generator = torch.Generator().manual_seed(config.seed)
        self._check_site(W_O, d_head)
        self.scale = scale_of(samples, config.scaling, d_head or 0)
        """Factor on each component of an input, `[d_in]`."""
        self.p: Parameters = first_parameters(samples * self.scale, config, self.generator)
        ranks.share([self.scale, *self.p.values()])
        metric = None if W_O is None or config.error_in == "site" else _metric(samples, W_O, self.scale, config)
        self.objective = _objective(config, metric, samples.shape[1], ranks)
        groups = [{"params": [weight], "speed": _SPEED.get(name, 1.0)} for name, weight in self.p.items()]
        self.adam = torch.optim.Adam(groups, lr=config.lr, betas=config.betas, fused=True)
        self._memory = {name: torch.empty_like(self.p[name]) for name in ("encoder", "decoder") if samples.is_cpu}
        self.step_number = 0
        self.coefficient = first_coefficient(config)
        self.threshold = 0.0
        """Running mean of the least activation of a batch, of batchtopk."""
        self.last_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=samples.device)
        """Step of each latent's last activation."""
        self.firings = torch.zeros_like(self.last_fired) if config.dead_below else None
        """Inputs that each latent fired on in the current window before a resampling, where dead_below is set."""
        if config.start in ("data", "subspace"):
            self._fit_first_size(samples[:_RESAMPLE_CHUNK] * self.scale)
            ranks.share(self.p.values())

    def _check_site(self, W_O: Tensor | None, d_head: int | None) -> None:  # noqa: N803
        config = self.config
        if (config.scaling == "head" and d_head is None) or (config.error_in == "output" and W_O is None):
            raise TrainingError(
                f"scaling = {config.scaling!r}, error_in = {config.error_in!r} at a site without heads or W_O",
                expected="both `site`, but for z",
                do="leave out --scaling and --error-in, or train on z",
            )

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents that have not fired for `dead_after` activations, or since the start when resampling comes sooner."""
        return self.step_number - self.last_fired > self.config.dead_steps

    @property
    def replaceable(self) -> Bool[Tensor, " d_sae"]:
        """Latents to resample: dead ones, or those that fired on too few inputs of the window."""
        if self.firings is None:
            return self.dead
        return self.firings < self.config.dead_below * self.config.dead_steps * self.config.batch

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch d_in"]) -> Status:
        """Train on one batch of raw activations.

        Raises:
            TrainingError: the loss is not finite; the batch has no effect.
        """
        x = x * self.scale
        dead = self.dead
        coefficient = coefficient_at(self.config, self.step_number, self.coefficient)
        outcome = self.objective(self.p, x, Now(coefficient, dead, self._memory))
        status = self._status(x, outcome, coefficient, dead)
        if not math.isfinite(status.squared_error + status.penalty + status.auxiliary):
            raise TrainingError(
                f"the loss at step {self.step_number} is {status.squared_error}",
                expected="a finite loss",
                do="lower --lr",
            )
        self._apply(outcome.gradients, status.lr)
        self._count(outcome, status)
        return status

    def _apply(self, gradients: Parameters, lr: float) -> None:
        """Apply Adam to all weights; decoder rows with unit norm keep it."""
        self.ranks.average(gradients.values())
        d_decoder, decoder = gradients["decoder"], self.p["decoder"]
        unit_rows = self.config.decoder == "unit"
        if unit_rows:
            take_parallel(d_decoder, decoder)
        if self.config.clip is not None:
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
            for gradient in gradients.values():
                gradient *= min(1.0, self.config.clip / max(norm, 1e-12))
        for name, weight in self.p.items():
            weight.grad = gradients[name]
        for group in self.adam.param_groups:
            group["lr"] = lr * group["speed"]
        self.adam.step()
        if unit_rows:
            decoder /= torch.linalg.vector_norm(decoder, dim=1, keepdim=True).clamp_min(1e-12)

    def _count(self, outcome: Outcome, status: Status) -> None:
        self.step_number += 1
        self.last_fired[outcome.active.latent] = self.step_number
        self.ranks.largest(self.last_fired)
        if self.firings is not None:
            self._count_firings(self.firings, outcome)
        if self.config.steered:
            self.coefficient = steer(self.config, self.coefficient, status.l0, status.step)
        if self.config.variant == "batchtopk":
            least = self.ranks.least(outcome.values)
            share = 1.0 if self.step_number == 1 else max(_THRESHOLD_RATE, min(0.3, 10 / self.step_number))
            self.threshold += share * (least - self.threshold)

    def _count_firings(self, firings: Tensor, outcome: Outcome) -> None:
        """Count the firings of a batch within the last `dead_steps` steps before a resampling."""
        left = min((at - self.step_number for at in self.config.resampled_at if at >= self.step_number), default=None)
        if left is None or left >= self.config.dead_steps:
            return
        if left == self.config.dead_steps - 1:
            firings.zero_()
        own = outcome.active.latent_starts.diff()
        self.ranks.total(own)
        firings += own

    def _status(self, x: Tensor, outcome: Outcome, coefficient: float, dead: Tensor) -> Status:
        centred = x - x.mean(0)
        metric = self.objective.space.metric
        variance = (centred * (centred if metric is None else centred @ metric)).sum(1).mean().item()
        error, variance, l0, penalty, auxiliary = self.ranks.mean(
            outcome.squared_error.mean().item(),
            variance,
            len(outcome.active) / len(x),
            outcome.penalty,
            outcome.auxiliary,
        )
        return Status(
            step=self.step_number,
            n_steps=self.config.n_steps,
            tokens=(self.step_number + 1) * len(x) * self.ranks.size,
            squared_error=error,
            l0=l0,
            explained_variance=1 - error / max(variance, 1e-30),
            dead=dead.float().mean().item(),
            coefficient=coefficient,
            penalty=penalty,
            auxiliary=auxiliary,
            lr=self.config.lr * rate(self.config, self.step_number),
        )

    def _fit_first_size(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set thresholds to give about the target L0, and scale the encoder for the best reconstruction.

        Latents initialised on inputs overlap, and their sum is a multiple of the separate contributions. For x_hat
        without b_dec, the factor is `sum x . x_hat / sum ||x_hat||^2`.
        """
        p, config, level = self.p, self.config, 0.0
        if config.variant in ("relu", "gated", "jumprelu"):
            level = first_threshold(p, x, l0_at(config, 0))
            if "log_threshold" in p:
                p["log_threshold"].fill_(math.log(level))
            else:
                p["b_enc"].fill_(-level)
        x = x - p["b_dec"]
        pairs, values = self.objective.encode(p, x)
        x_hat = sum_by_row(pairs, values, p["decoder"])
        factor = ((x * x_hat).sum() / x_hat.square().sum().clamp_min(1e-12)).clamp(0.01, 100)
        p["encoder"] *= factor
        p["b_enc"] *= factor
        if "log_threshold" in p:
            p["log_threshold"] += factor.log()
        if config.steered:
            self.coefficient = likely_coefficient(config, level)

    @torch.no_grad()
    def resample(self, x: Float[Tensor, "n d_in"]) -> int:
        """Resample `replaceable` latents on raw activations with a large error; return their number.

        Adam's moments of the new rows are zero; nothing else changes.
        """
        dead = self.replaceable
        if not dead.any():
            return 0
        x = x * self.scale
        errors = [squared_error(self.objective, self.p, part) for part in x.split(_RESAMPLE_CHUNK)]
        for name, rows in started_anew(self.p, dead, x, torch.cat(errors), self.config, self.generator).items():
            self.p[name][dead] = rows
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.adam.state[self.p[name]]:
                    self.adam.state[self.p[name]][moment][dead] = 0.0
        self.last_fired[dead] = self.step_number
        self.ranks.share(self.p.values())
        return int(dead.sum())

    @torch.no_grad()
    def finish(self, site: Site, model_name: str) -> SAE:
        """Return the SAE for raw activations: scales folded in, decoder rows of unit norm.

        BatchTopK becomes a JumpReLU whose threshold is the mean, over batches, of the least kept activation.
        """
        scale, p = self.scale, self.p
        decoder = p["decoder"] / scale  # per latent: x_hat = (f D + b_dec) / scale
        norm = torch.linalg.vector_norm(decoder, dim=1).clamp_min(1e-12)
        if self.config.variant == "topk":  # the set of the largest must not change
            norm = norm.mean().expand_as(norm)
        encoder, b_enc = p["encoder"] * scale * norm[:, None], p["b_enc"] * norm
        activation: sae_model.Activation = sae_model.ReLU()
        if self.config.variant == "topk":
            activation = sae_model.TopK(round(self.config.target_l0))
        elif self.config.variant == "batchtopk":
            activation = sae_model.JumpReLU(self.threshold * norm)
        elif self.config.variant == "jumprelu":
            activation = sae_model.JumpReLU(p["log_threshold"].exp() * norm)
        elif self.config.variant == "gated":
            gain = p["r_mag"].exp()
            activation = sae_model.Gated((p["b_mag"] - gain * p["b_enc"]) * norm)
            encoder, b_enc = encoder * gain[:, None], p["b_mag"] * norm
        return SAE(
            W_enc=encoder.T.contiguous(),
            b_enc=b_enc,
            W_dec=decoder / norm[:, None],
            b_dec=p["b_dec"] / scale,
            activation=activation,
            site=site,
            model_name=model_name,
            apply_b_dec_to_input=self.objective.space.centred,
        )

    def state(self) -> dict[str, Any]:
        """Return the complete state: tensors by name, and plain numbers."""
        moments = {
            f"adam.{name}.{key}": value
            for name, weight in self.p.items()
            for key, value in self.adam.state[weight].items()
        }
        return {
            **{f"p.{name}": weight for name, weight in self.p.items()},
            **moments,
            "scale": self.scale,
            "last_fired": self.last_fired,
            "firings": self.firings,
            "generator": self.generator.get_state(),
            "step_number": self.step_number,
            "coefficient": self.coefficient,
            "threshold": self.threshold,
            "guess": self.objective.guess if isinstance(self.objective, TopK) else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the result of `state`."""
        for name, weight in self.p.items():
            weight.copy_(state[f"p.{name}"])
            start = f"adam.{name}."
            moments = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            self.adam.state[weight] = {key: value.to(weight.device).clone() for key, value in moments.items()}
        self.scale.copy_(state["scale"])
        self.last_fired.copy_(state["last_fired"])
        if self.firings is not None:
            self.firings.copy_(state["firings"])
        self.generator.set_state(state["generator"])
        self.step_number, self.coefficient = state["step_number"], state["coefficient"]
        self.threshold = state["threshold"]
        if isinstance(self.objective, TopK):
            self.objective.guess = state["guess"]


def _metric(x: Tensor, W_O: Tensor, scale: Tensor, config: TrainConfig) -> Float[Tensor, "d_in d_in"]:  # noqa: N803
    """Compute `S^-1 W_O W_O^T S^-1` for inputs multiplied by S, in units that preserve their length."""
    read = W_O.to(scale) / scale[:, None]
    metric = read @ read.T
    if config.scaling == "none":
        return metric
    scaled = measured(x, config.scaling) * scale
    length = ((scaled @ metric) * scaled).sum(1).clamp_min(0).sqrt().mean().clamp_min(1e-12)
    return metric * (x.shape[1] / length.square())


def _objective(config: TrainConfig, metric: Tensor | None, d_in: int, ranks: Ranks) -> Objective:
    space = Space(metric, config.prefixes, centred=config.center != "none")
    if config.variant == "relu":
        return ReLU(space, free_decoder=config.decoder == "free")
    if config.variant == "gated":
        return Gated(space)
    if config.variant == "jumprelu":
        return JumpReLU(space, bandwidth=config.bandwidth, tanh=config.tanh, revive=config.auxiliary_coefficient)
    return TopK(
        config.target_l0,
        space,
        over_batch=config.variant == "batchtopk",
        auxiliary=config.auxiliary_coefficient,
        auxiliary_k=max(1, d_in // 2),
        ranks=ranks,
    )
