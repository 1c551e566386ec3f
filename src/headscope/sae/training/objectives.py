"""Training objectives by variant, with hand-written gradients.

For a batch of B inputs x, pre-activations `p_j = (x - b_dec) . e_j + b_j`, activations f and `x_hat = f D + b_dec`,
with `||e||^2_M = e M e^T`, where M is the identity unless errors are measured after W_O:

    L = 1/B sum_n ||x_n - x_hat_n||^2_M  +  lambda/B sum_n penalty(f_n)

relu      f = relu(p); the penalty is `sum_j f_j`, or `sum_j f_j ||D_j||` where decoder rows are free
          (Bricken et al. 2023; Conerly et al., April 2024).
jumprelu  f = p where p > theta_j. The penalty is the number of active latents, or `sum_j tanh(c f_j ||D_j||)`;
          the threshold gradient replaces the step's derivative by a rectangle of width epsilon (Rajamanoharan et al.
          2024b), and dead latents by `sum_j relu(theta_j - p_j) ||D_j||` (Conerly et al., January 2025).
gated     f = relu(exp(r_j) s_j + m_j) where s_j + g_j > 0, `s_j = (x - b_dec) . e_j`. The penalty is
          `sum_j relu(s_j + g_j)`; these also reconstruct x, through a frozen decoder (Rajamanoharan et al. 2024a).
topk      f = the k largest p of a row (Gao et al. 2024).
batchtopk f = the k B largest p of the batch (Bussmann et al. 2024).

With prefixes `m_1 < ... < m_P = d_sae` the reconstruction error is the mean over them, each with the latents below m_i
alone (matryoshka: Bussmann et al. 2025). For topk and batchtopk, the dead latents with the largest pre-activations
reconstruct the error of the others (Gao et al. 2024, auxiliary loss).

Activations are sparse, so nearly all computation is sums over active pairs (`headscope.sae.training.kernels`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.sae.training.kernels import (
    Pairs,
    products,
    select_above,
    select_batch_topk,
    select_topk,
    sum_by_latent,
    sum_by_row,
)
from headscope.sae.training.ranks import ALONE, Ranks

Parameters = dict[str, Tensor]
"""Weights by name: encoder and decoder `[d_sae, d_in]`, b_enc `[d_sae]`, b_dec `[d_in]`, and those of the variant."""


@dataclass(frozen=True)
class Outcome:
    """Result of one batch: its losses, active pairs, and the gradient of the objective."""

    active: Pairs
    values: Float[Tensor, " pair"]
    """Activations, all positive."""
    squared_error: Float[Tensor, " batch"]
    """||x - x_hat||^2 of each input, in the metric of the objective, with all latents."""
    error: Float[Tensor, "batch d_in"]
    """x - x_hat."""
    penalty: float
    """Mean over inputs, without its coefficient."""
    auxiliary: float
    """Additional terms of the objective, with their coefficient."""
    gradients: Parameters


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of the inputs by activations, with its gradient."""

    squared_error: Float[Tensor, " batch"]
    error: Float[Tensor, "batch d_in"]
    loss: float
    """Mean over inputs and prefixes."""
    d_values: Float[Tensor, " pair"]
    d_b_dec: Float[Tensor, " d_in"]
    by_prefix: list[tuple[Pairs, Tensor, Tensor]]
    """For the latents that each prefix adds: pairs, activations [pair], and gradient of their reconstruction [batch,
    d_in]."""

    def d_decoder(self, out: Float[Tensor, "d_sae d_in"] | None = None) -> Float[Tensor, "d_sae d_in"]:
        """Compute the gradient of the decoder, in `out` where that is given."""
        if out is None:
            return _joined([sum_by_latent(*part) for part in self.by_prefix])
        for part, rows in zip(self.by_prefix, out.split([pairs.d_sae for pairs, _, _ in self.by_prefix]), strict=True):
            sum_by_latent(*part, rows)
        return out


@dataclass(frozen=True)
class Space:
    """Metric of the error, and how the encoder sees inputs."""

    metric: Float[Tensor, "d_in d_in"] | None = None
    """M, symmetric; None is the identity."""
    prefixes: Sequence[int] = ()
    """Numbers of latents that also reconstruct alone, ascending, below d_sae; empty for all latents only."""
    centred: bool = True
    """Whether b_dec is subtracted from the encoder's inputs."""

    def seen(self, x: Float[Tensor, "batch d_in"], p: Parameters) -> Float[Tensor, "batch d_in"]:
        """Return inputs as the encoder sees them."""
        return x - p["b_dec"] if self.centred else x

    def through_encoder(self, d_b_enc: Float[Tensor, " n"], encoder: Float[Tensor, "n d_in"]) -> Float[Tensor, " d_in"]:
        """Return the gradient of b_dec through the encoder."""
        return -(d_b_enc @ encoder) if self.centred else torch.zeros_like(encoder[0])

    def reconstruct(
        self, x: Float[Tensor, "batch d_in"], active: Pairs, values: Float[Tensor, " pair"], p: Parameters
    ) -> Reconstruction:
        """Decode, and differentiate the mean squared error."""
        ends, groups, errors = self._decoded(x, active, values, p)
        error, weighted = errors[-1], [self._weighted(e) for e in errors]
        each = [(e * w).sum(1) for e, w in zip(errors, weighted, strict=True)]
        d_x_hat, d_values, by_prefix = torch.zeros_like(x), [], []
        for (pairs, at), end, w in reversed(list(zip(groups, ends, weighted, strict=True))):
            d_x_hat = d_x_hat - w * (2 / (len(x) * len(ends)))
            d_values.insert(0, products(pairs, p["decoder"][end - pairs.d_sae : end], d_x_hat))
            by_prefix.insert(0, (pairs, values[at], d_x_hat))
        loss = torch.stack(each).mean().item()
        return Reconstruction(each[-1], error, loss, _joined(d_values), d_x_hat.sum(0), by_prefix)

    def squared_error(
        self, x: Float[Tensor, "batch d_in"], active: Pairs, values: Float[Tensor, " pair"], p: Parameters
    ) -> Float[Tensor, " batch"]:
        """Return the squared error of `reconstruct`, bit for bit, without the gradients."""
        error = self._decoded(x, active, values, p)[2][-1]
        return (error * self._weighted(error)).sum(1)

    def _decoded(
        self, x: Tensor, active: Pairs, values: Tensor, p: Parameters
    ) -> tuple[list[int], list[tuple[Pairs, slice]], list[Tensor]]:
        """Return the ends of prefixes, the pairs that each adds with their slice, and the residual of x after each."""
        ends = [*self.prefixes, len(p["decoder"])]
        groups = [active.between(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        error, errors = x - p["b_dec"], []
        for (pairs, at), start in zip(groups, [0, *ends[:-1]], strict=True):
            error = error - sum_by_row(pairs, values[at], p["decoder"][start : start + pairs.d_sae])
            errors.append(error)
        return ends, groups, errors

    def _weighted(self, error: Tensor) -> Tensor:
        return error if self.metric is None else error @ self.metric


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def backward(
    space: Space,
    r: Reconstruction,
    seen: Float[Tensor, "batch d_in"],
    active: Pairs,
    d_pre: Float[Tensor, " pair"],
    p: Parameters,
    into: Parameters,
) -> Parameters:
    """Compute gradients of all weights from those of the reconstruction and of the pairs' pre-activations."""
    d_b_enc = active.latent_sums(d_pre)
    return {
        "encoder": sum_by_latent(active, d_pre, seen, into.get("encoder")),
        "b_enc": d_b_enc,
        "decoder": r.d_decoder(into.get("decoder")),
        "b_dec": r.d_b_dec + space.through_encoder(d_b_enc, p["encoder"]),
    }


@dataclass(frozen=True)
class Now:
    """Inputs of a step other than weights and batch."""

    coefficient: float
    """lambda."""
    dead: Bool[Tensor, " d_sae"]
    """Dead latents."""
    into: Parameters = field(default_factory=dict)
    """Memory for the gradients of encoder and decoder; allocated where it is missing."""


@runtime_checkable
class Objective(Protocol):
    """A variant: how a batch is encoded, the additional loss terms, and the gradient of the sum."""

    space: Space

    def __call__(self, p: Parameters, x: Float[Tensor, "batch d_in"], now: Now) -> Outcome:
        """Compute losses and gradients of a batch.

        Args:
            p: the weights.
            x: inputs.
            now: the other inputs of the step.
        """
        ...

    def encode(self, p: Parameters, seen: Float[Tensor, "batch d_in"]) -> tuple[Pairs, Float[Tensor, " pair"]]:
        """Encode inputs as the encoder sees them: pairs that include all non-zero activations, and their values."""
        ...


def squared_error(objective: Objective, p: Parameters, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " batch"]:
    """Compute ||x - x_hat||^2 of each input, bit for bit that of the objective's outcome, without gradients."""
    return objective.space.squared_error(x, *objective.encode(p, objective.space.seen(x, p)), p)


@dataclass
class ReLU:
    """relu: L1 of the activations, weighted by the norm of decoder rows where these are free."""

    space: Space = field(default_factory=Space)
    free_decoder: bool = False

    def __call__(self, p: Parameters, x: Float[Tensor, "batch d_in"], now: Now) -> Outcome:
        """See `Objective`."""
        seen = self.space.seen(x, p)
        active, values = self.encode(p, seen)
        r = self.space.reconstruct(x, active, values, p)
        share = now.coefficient / len(x)
        total = active.latent_sums(values)
        norm = torch.linalg.vector_norm(p["decoder"], dim=1) if self.free_decoder else torch.ones_like(total)
        gradients = backward(self.space, r, seen, active, r.d_values + share * norm[active.latent], p, now.into)
        if self.free_decoder:
            gradients["decoder"].addcmul_((total / norm.clamp_min(1e-12))[:, None], p["decoder"], value=share)
        penalty = (total * norm).sum().item() / len(x)
        return Outcome(active, values, r.squared_error, r.error, penalty, 0.0, gradients)

    def encode(self, p: Parameters, seen: Float[Tensor, "batch d_in"]) -> tuple[Pairs, Float[Tensor, " pair"]]:
        """See `Objective`."""
        return select_above(seen, p["encoder"], p["b_enc"])


@dataclass
class JumpReLU:
    """jumprelu: learned thresholds, with a penalty on active latents."""

    space: Space = field(default_factory=Space)
    bandwidth: float = 0.1
    """epsilon, in the units of the inputs."""
    tanh: float | None = None
    """c of the tanh penalty; None penalises the number of active latents."""
    revive: float = 0.0
    """Coefficient of the dead latents' pre-activation loss."""

    def __call__(self, p: Parameters, x: Float[Tensor, "batch d_in"], now: Now) -> Outcome:
        """See `Objective`; `log_threshold` is a weight too."""
        seen, theta = self.space.seen(x, p), p["log_threshold"].exp()
        near, pre, threshold = self._near(p, seen, theta)
        on = (pre > threshold).to(pre.dtype)
        r = self.space.reconstruct(x, near, pre * on, p)
        share = now.coefficient / len(x)
        norm = torch.linalg.vector_norm(p["decoder"], dim=1)
        d_pre, pull = r.d_values * on, None
        if self.tanh is None:
            penalty, cost = on.sum().item(), torch.full_like(pre, share)
        else:
            scale = self.tanh * norm[near.latent]
            bent = torch.tanh(scale * pre) * on
            slope = share * (on - bent.square())
            d_pre = d_pre + slope * scale
            pull = near.latent_sums(slope * self.tanh * pre) / norm.clamp_min(1e-12)
            penalty, cost = bent.sum().item(), share * torch.tanh(scale * threshold)
        # a latent that fires at its threshold adds theta to its activation, and costs the penalty of an active latent
        inside = ((pre - threshold).abs() < self.bandwidth / 2).to(pre.dtype)
        d_threshold = near.latent_sums((threshold * r.d_values + cost) * inside * (-1 / self.bandwidth))
        gradients = backward(self.space, r, seen, near, d_pre, p, now.into) | {"log_threshold": d_threshold * theta}
        if pull is not None:
            gradients["decoder"].addcmul_(pull[:, None], p["decoder"])
        auxiliary = self._revive(seen, p, norm, theta, now.dead, gradients)
        fires = on > 0
        return Outcome(near.kept(fires), pre[fires], r.squared_error, r.error, penalty / len(x), auxiliary, gradients)

    def encode(self, p: Parameters, seen: Float[Tensor, "batch d_in"]) -> tuple[Pairs, Float[Tensor, " pair"]]:
        """See `Objective`."""
        near, pre, threshold = self._near(p, seen, p["log_threshold"].exp())
        return near, pre * (pre > threshold)

    def _near(self, p: Parameters, seen: Tensor, theta: Tensor) -> tuple[Pairs, Tensor, Tensor]:
        """Return all pairs above threshold minus half a bandwidth, their pre-activations and thresholds.

        The others do not contribute to any gradient.
        """
        low = theta - self.bandwidth / 2
        near, above = select_above(seen, p["encoder"], p["b_enc"] - low)
        return near, above + low[near.latent], theta[near.latent]

    def _revive(
        self, seen: Tensor, p: Parameters, norm: Tensor, theta: Tensor, dead: Tensor, gradients: Parameters
    ) -> float:
        """Add `revive / B sum_n sum_dead relu(theta_j - p_j) ||D_j||` to the gradients; return it."""
        which = dead.nonzero()[:, 0]
        if not self.revive or not len(which):
            return 0.0
        encoder, share = p["encoder"][which], self.revive / len(seen)
        lack = (theta[which] - torch.addmm(p["b_enc"][which], seen, encoder.T)).relu()
        weight = norm[which]
        d_pre = -share * (lack > 0).to(lack.dtype) * weight
        total, d_b_enc = lack.sum(0), d_pre.sum(0)
        gradients["encoder"].index_add_(0, which, d_pre.T @ seen)
        gradients["b_enc"].index_add_(0, which, d_b_enc)
        gradients["b_dec"] += self.space.through_encoder(d_b_enc, encoder)
        gradients["log_threshold"].index_add_(0, which, -d_b_enc * theta[which])
        gradients["decoder"].index_add_(
            0, which, share * (total / weight.clamp_min(1e-12))[:, None] * p["decoder"][which]
        )
        return share * (total * weight).sum().item()


@dataclass
class Gated:
    """gated: one path decides what is active and is penalised, the other sets the magnitude."""

    space: Space = field(default_factory=Space)

    def __call__(self, p: Parameters, x: Float[Tensor, "batch d_in"], now: Now) -> Outcome:
        """See `Objective`; the gate's bias is b_enc, `r_mag` and `b_mag` are weights too."""
        seen = self.space.seen(x, p)
        open_, gate, read, gain, magnitude = self._open(p, seen)
        on = (magnitude > 0).to(magnitude.dtype)
        r = self.space.reconstruct(x, open_, magnitude.relu(), p)
        aside = self.space.reconstruct(x, open_, gate, p)  # the decoder is frozen there, b_dec too
        d_magnitude = r.d_values * on
        d_gate = aside.d_values + now.coefficient / len(x)
        d_read = d_magnitude * gain + d_gate
        gradients = backward(self.space, r, seen, open_, d_read, p, now.into) | {
            "b_enc": open_.latent_sums(d_gate),
            "b_mag": open_.latent_sums(d_magnitude),
            "r_mag": open_.latent_sums(d_magnitude * gain * read),
        }
        kept = on > 0
        penalty = gate.sum().item() / len(x)
        active, values = open_.kept(kept), magnitude[kept]
        return Outcome(active, values, r.squared_error, r.error, penalty, aside.loss, gradients)

    def encode(self, p: Parameters, seen: Float[Tensor, "batch d_in"]) -> tuple[Pairs, Float[Tensor, " pair"]]:
        """See `Objective`."""
        open_, *_, magnitude = self._open(p, seen)
        return open_, magnitude.relu()

    @staticmethod
    def _open(p: Parameters, seen: Tensor) -> tuple[Pairs, Tensor, Tensor, Tensor, Tensor]:
        """Return the pairs whose gate is open, with the gate, `s_j`, `exp(r_j)` and the activation before its relu."""
        open_, gate = select_above(seen, p["encoder"], p["b_enc"])
        read = gate - p["b_enc"][open_.latent]
        gain = p["r_mag"].exp()[open_.latent]
        return open_, gate, read, gain, gain * read + p["b_mag"][open_.latent]


@dataclass
class TopK:
    """topk and batchtopk: a fixed number of active latents, per row or over the batch."""

    k: float
    space: Space = field(default_factory=Space)
    over_batch: bool = False
    auxiliary: float = 0.0
    """Coefficient of the auxiliary loss."""
    auxiliary_k: int = 0
    """Number of dead latents per row that take part in it."""
    ranks: Ranks = ALONE
    """The processes whose inputs together form the batch."""
    guess: float | None = None
    """Final limit of the last batch's selection, from which the next starts, if it needs one; affects only speed."""

    def __call__(self, p: Parameters, x: Float[Tensor, "batch d_in"], now: Now) -> Outcome:
        """See `Objective`; the coefficient is unused here."""
        seen = self.space.seen(x, p)
        active, values = self.encode(p, seen)
        r = self.space.reconstruct(x, active, values, p)
        gradients = backward(self.space, r, seen, active, r.d_values, p, now.into)
        auxiliary = self._revive(seen, r.error, p, now.dead, gradients)
        penalty = values.sum().item() / len(x)
        return Outcome(active, values, r.squared_error, r.error, penalty, auxiliary, gradients)

    def encode(self, p: Parameters, seen: Float[Tensor, "batch d_in"]) -> tuple[Pairs, Float[Tensor, " pair"]]:
        """See `Objective`; batchtopk treats these inputs as one batch."""
        if self.over_batch:
            n = round(self.k * len(seen) * self.ranks.size)
            active, values = select_batch_topk(seen, p["encoder"], p["b_enc"], n, self.guess, self.ranks)
            self.guess = 0.93 * self.ranks.least(values)
            return active, values
        active, values = select_topk(seen, p["encoder"], p["b_enc"], round(self.k), self.guess)
        size = torch.linalg.vector_norm(seen, dim=1)
        least = size.new_full((len(seen),), torch.inf)
        least = least.scatter_reduce(0, active.row, values, "amin") / size.clamp_min(1e-12)
        low = 0.98 * least.sort().values[len(least) // 50].item()  # rows below it are read again
        [shared] = self.ranks.mean(low)  # a checkpoint holds one for all ranks
        self.guess = shared if math.isfinite(shared) else None
        return active, values

    def _revive(self, seen: Tensor, error: Tensor, p: Parameters, dead: Tensor, gradients: Parameters) -> float:
        """Let dead latents reconstruct the error, which is held fixed; add to the gradients, return the loss.

        `auxiliary / B sum_n ||error_n - sum over the largest of the dead f_j D_j||^2_M`, scaled down while fewer are
        dead than take part.
        """
        which = dead.nonzero()[:, 0]
        if not self.auxiliary or not len(which):
            return 0.0
        k = min(self.auxiliary_k, len(which))
        encoder, decoder = p["encoder"][which], p["decoder"][which]
        pre = torch.addmm(p["b_enc"][which], seen, encoder.T)
        values, latents = pre.topk(k, dim=1, sorted=False)
        f = torch.zeros_like(pre).scatter_(1, latents, values.relu())
        left = error - f @ decoder
        weighted = left if self.space.metric is None else left @ self.space.metric
        scale = self.auxiliary * k / self.auxiliary_k / len(error)
        d_x_hat = weighted * (-2 * scale)
        d_pre = (d_x_hat @ decoder.T) * (f > 0)
        d_b_enc = d_pre.sum(0)
        gradients["encoder"].index_add_(0, which, d_pre.T @ seen)
        gradients["decoder"].index_add_(0, which, f.T @ d_x_hat)
        gradients["b_enc"].index_add_(0, which, d_b_enc)
        gradients["b_dec"] += self.space.through_encoder(d_b_enc, encoder)
        return scale * (left * weighted).sum().item()
