"""The gradients that are written out are those of the loss as its formula says, differentiated by torch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cases import examples
from headscope.sae.training import kernels
from headscope.sae.training.objectives import Gated, JumpReLU, Now, Objective, Outcome, ReLU, Space, TopK, squared_error

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SIZES: dict[str, Any] = {
    "batch": st.integers(1, 9),
    "d_in": st.integers(1, 6),
    "d_sae": st.integers(3, 30),
    "seed": st.integers(0, 2**31 - 1),
    "prefixes": st.booleans(),
    "metric": st.booleans(),
    "coefficient": st.sampled_from([0.0, 0.7]),
    "n_dead": st.integers(0, 8),
    "centred": st.booleans(),
}


class Problem:
    """Weights, inputs and a space to measure errors in."""

    def __init__(
        self, batch=9, d_in=5, d_sae=20, seed=0, prefixes=True, metric=True, coefficient=0.7, n_dead=3, centred=True
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.p = {
            "encoder": normal(d_sae, d_in),
            "b_enc": normal(d_sae) - 1,
            "decoder": normal(d_sae, d_in),
            "b_dec": normal(d_in),
            "log_threshold": normal(d_sae) * 0.5,
            "r_mag": normal(d_sae) * 0.3,
            "b_mag": normal(d_sae),
        }
        self.x, root = normal(batch, d_in), normal(d_in, d_in)
        self.space = Space(root @ root.T if metric else None, (d_sae // 3, d_sae // 2) if prefixes else (), centred)
        self.coefficient = coefficient
        self.dead = torch.arange(d_sae) < n_dead

    def outcome(self, objective: Objective) -> Outcome:
        return objective(self.p, self.x, Now(self.coefficient, self.dead))


class Step(torch.autograd.Function):
    """1 where p > theta, its derivative by theta a rectangle; none by p."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(p, theta)
        ctx.width = width
        return (p > theta).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        p, theta = ctx.saved_tensors
        inside = ((p - theta).abs() < ctx.width / 2).to(p.dtype)
        return None, -(grad * inside).sum(0) / ctx.width, None


def error_of(space: Space, x: Tensor, f: Tensor, decoder: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over prefixes of the mean squared error, and x - x_hat."""
    metric = torch.eye(x.shape[1], dtype=x.dtype) if space.metric is None else space.metric
    losses = []
    for end in [*space.prefixes, len(decoder)]:
        e = x - f[:, :end] @ decoder[:end] - b_dec
        losses.append(((e @ metric) * e).sum(1).mean())
    return torch.stack(losses).mean(), e


def naive(  # noqa: PLR0915 - a branch a variant
    problem: Problem, objective: Objective
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients by autograd over full matrices; activations; error."""
    q = {name: t.clone().requires_grad_(True) for name, t in problem.p.items()}
    x, lam, space = problem.x, problem.coefficient, objective.space
    read = (x - q["b_dec"] if space.centred else x) @ q["encoder"].T
    pre, norm = read + q["b_enc"], q["decoder"].norm(dim=1)
    if isinstance(objective, ReLU):
        f = pre.relu()
        penalty = (f * norm if objective.free_decoder else f).sum(1).mean()
    elif isinstance(objective, JumpReLU):
        theta = q["log_threshold"].exp()
        on = Step.apply(pre, theta, objective.bandwidth)
        f = pre * on
        if objective.tanh is None:
            penalty = on.sum(1).mean()
        else:  # beside the smooth path, the step's: a rectangle times what firing at the threshold costs
            smooth = torch.tanh(objective.tanh * norm * pre) * on.detach()
            jump = torch.tanh(objective.tanh * norm * theta).detach() * on
            penalty = (smooth + jump - jump.detach()).sum(1).mean()
        f = pre * on.detach() + theta.detach() * on - (theta * on).detach()
        lack = ((theta - pre).relu() * norm)[:, problem.dead]
        penalty = lam * penalty + objective.revive * lack.sum(1).mean()
        lam = 1.0
    elif isinstance(objective, Gated):
        gate = (read + q["b_enc"]).relu()
        f = (q["r_mag"].exp() * read + q["b_mag"]).relu() * (gate > 0)
        aside, _ = error_of(space, x, gate, q["decoder"].detach(), q["b_dec"].detach())
        penalty, lam = lam * gate.sum(1).mean() + aside, 1.0
    else:
        assert isinstance(objective, TopK)
        kept = torch.zeros_like(pre).flatten()
        if objective.over_batch:
            kept[pre.flatten().topk(round(objective.k * len(x))).indices] = 1
        else:
            kept = torch.zeros_like(pre).scatter_(1, pre.topk(round(objective.k), 1).indices, 1.0)
        f = pre.relu() * kept.view_as(pre)
        penalty, lam = torch.zeros((), dtype=x.dtype), 1.0
    loss, error = error_of(space, x, f, q["decoder"], q["b_dec"])
    if isinstance(objective, TopK) and objective.auxiliary and problem.dead.any():
        dead = pre[:, problem.dead]
        k = min(objective.auxiliary_k, dead.shape[1])
        values, latents = dead.topk(k, 1)
        f_dead = torch.zeros_like(dead).scatter(1, latents, values.relu())
        left = error.detach() - f_dead @ q["decoder"][problem.dead]
        metric = torch.eye(x.shape[1], dtype=x.dtype) if space.metric is None else space.metric
        penalty = objective.auxiliary * k / objective.auxiliary_k * ((left @ metric) * left).sum(1).mean()
    (loss + lam * penalty).backward()
    return {n: t.grad for n, t in q.items() if t.grad is not None}, f.detach(), error.detach()


def objectives(space: Space) -> dict[str, Objective]:
    return {
        "relu": ReLU(space),
        "relu, free decoder": ReLU(space, free_decoder=True),
        "jumprelu": JumpReLU(space, bandwidth=0.8),
        "jumprelu, tanh": JumpReLU(space, bandwidth=3.0, tanh=0.7, revive=0.3),
        "gated": Gated(space),
        "topk": TopK(3.0, space),
        "topk, auxiliary": TopK(2.0, space, auxiliary=0.4, auxiliary_k=2),
        "batchtopk": TopK(1.5, space, over_batch=True, auxiliary=0.4, auxiliary_k=4),
    }


NAMES = list(objectives(Space()))


def assert_is_naive(problem: Problem, objective: Objective) -> None:
    got = problem.outcome(objective)
    gradients, f, error = naive(problem, objective)
    assert_close(got.active.matrix(got.values), f, **EXACT)
    assert_close(got.error, error, **EXACT)
    assert (got.values > 0).all()
    for name, gradient in got.gradients.items():
        expected = gradients.get(name, torch.zeros_like(gradient))
        assert_close(gradient, expected, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    for name, expected in gradients.items():
        assert name in got.gradients or not expected.any(), name


@pytest.mark.parametrize("name", NAMES)
@examples(40)
@given(**SIZES)
def test_gradients_are_those_of_autograd(name: str, **sizes: Any) -> None:
    problem = Problem(**sizes)
    assert_is_naive(problem, objectives(problem.space)[name])


@pytest.mark.parametrize("name", NAMES)
def test_dense_products_change_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    for share, dense in ((2.0, False), (0.0, True)):
        monkeypatch.setattr(kernels, "DENSE_ABOVE", share)
        assert problem.outcome(objectives(problem.space)[name]).active.dense == dense
        assert_is_naive(problem, objectives(problem.space)[name])


@pytest.mark.parametrize("name", NAMES)
@examples(20)
@given(**SIZES)
def test_errors_without_gradients_are_the_same_bits(name: str, **sizes: Any) -> None:
    problem = Problem(**sizes)
    got = squared_error(objectives(problem.space)[name], problem.p, problem.x)
    assert torch.equal(got, problem.outcome(objectives(problem.space)[name]).squared_error)


@pytest.mark.parametrize("name", NAMES)
def test_what_encodes_is_active_or_zero(name: str) -> None:
    problem = Problem()
    pairs, values = objectives(problem.space)[name].encode(problem.p, problem.x - problem.p["b_dec"])
    got = problem.outcome(objectives(problem.space)[name])
    assert torch.equal(pairs.matrix(values), got.active.matrix(got.values))


@pytest.mark.parametrize("name", NAMES)
def test_no_input_is_changed(name: str) -> None:
    problem = Problem()
    before = {n: t.clone() for n, t in problem.p.items()} | {"x": problem.x.clone()}
    problem.outcome(objectives(problem.space)[name])
    for n, t in (problem.p | {"x": problem.x}).items():
        assert_close(t, before[n], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_guess_from_the_last_batch_changes_nothing(name: str) -> None:
    problem = Problem(batch=40)
    objective = objectives(problem.space)[name]
    for _ in range(3):
        assert_is_naive(problem, objective)


def test_the_threshold_learns_the_derivative_of_the_mean_loss() -> None:
    """One latent on inputs along it, pre-activations p spread evenly over [0, W], squared error and lambda an input.

    The mean loss at threshold t is `t^3 / 3W + lambda (1 - t / W)`. Its derivative is `(t^2 - lambda) / W`; a rectangle
    of width e reads p half below t in the mean by e / 4, so the estimate is `(t (t - e / 4) - lambda) / W`.
    """
    n, width, bandwidth, theta, coefficient = 100_000, 2.0, 0.2, 0.7, 0.3
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    p = {"encoder": one, "b_enc": zero, "decoder": one, "b_dec": zero, "log_threshold": zero + math.log(theta)}
    x = ((torch.arange(n, dtype=torch.float64) + 0.5) * (width / n))[:, None]

    def mean_loss(at: float) -> float:
        moved = p | {"log_threshold": zero + math.log(at)}
        got = JumpReLU(bandwidth=bandwidth)(moved, x, Now(coefficient, torch.zeros(1, dtype=torch.bool)))
        return got.squared_error.mean().item() + coefficient * got.penalty

    got = JumpReLU(bandwidth=bandwidth)(p, x, Now(coefficient, torch.zeros(1, dtype=torch.bool)))
    estimate = got.gradients["log_threshold"].item() / theta
    assert estimate == pytest.approx((theta * (theta - bandwidth / 4) - coefficient) / width, abs=1e-6)
    exact = (mean_loss(theta + 0.01) - mean_loss(theta - 0.01)) / 0.02
    assert exact == pytest.approx((theta**2 - coefficient) / width, abs=1e-4)
    assert estimate == pytest.approx(exact, abs=theta * bandwidth / (4 * width) + 1e-4)


def test_a_guess_that_is_no_number_is_none() -> None:
    objective = TopK(2.0)
    p = {"encoder": torch.eye(3), "b_enc": torch.full((3,), -1e3), "decoder": torch.eye(3), "b_dec": torch.zeros(3)}
    outcome = objective(p, torch.ones(4, 3), Now(0.0, torch.zeros(3, dtype=torch.bool)))
    assert len(outcome.active) == 0
    assert objective.guess is None
