"""Test which heads have a role, against the same architecture with shuffled weights.

Heads of a random model do not attend uniformly either, so "more than uniform" is not a test. The null is the model
itself with the entries of each weight shuffled, many times: for independently drawn weights the model is exchangeable
with its shuffles, and the rank of a head's score among theirs is an exact p-value for any architecture (a permutation
test; Fisher 1935).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import HeadscopeError, ModelError
from headscope.models.hf import Model
from headscope.stats import MINIMUM_UNITS, resampled, unit_draws
from headscope.studies.heads.scores import repeated_tokens, scores_by_sequence

Role = Literal["previous_token", "induction", "duplicate_token", "copying"]
COPIES = "share of tokens whose own logit the head's output raises more than those of 99 % of the vocabulary"
ALPHA = 0.01
"""Significance level of a test of one role of one head."""
LEAST = 0.25
"""Minimum score of a role: share of the attention, or of the tokens copied."""
_TOP = 0.01
_OTHERS = 1024  # tokens of the vocabulary against which copying is tested

Progress = Callable[[int, int], None]
"""Progress callback: called with the shuffled models done and the total."""


# ------------------------------------------------------------------------------------------------------------- copying
@dataclass(frozen=True)
class Copying:
    """How far each head raises the logit of the token it attends to: `LN(e_t) W_V W_O` through the final norm."""

    share: Float[Tensor, "layer head"]
    """Share of tokens whose own logit it raises more than those of 99 % of all; 1 % for a random table."""
    interval: Float[Tensor, "end layer head"]
    """95 %, tokens resampled; NaN with fewer than 10 tokens."""
    n: int
    """Number of tokens."""
    definition: str = COPIES


def copying(model: Model, *, n_tokens: int = 512, seed: int = 0) -> Copying:
    """Score every head of every layer: each token alone, with the head's output going straight to the logits.

    Args:
        model: the model.
        n_tokens: number of tokens, drawn without replacement; at most the vocabulary.
        seed: seed of the draw.
    """
    copied = _copied(model, n_tokens, seed)
    share = copied.mean(0)
    interval = torch.full((2, *share.shape), torch.nan, dtype=torch.float64)
    if len(copied) >= MINIMUM_UNITS:
        draws = unit_draws(len(copied), n_samples=1000, seed=seed)
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                sums = copied[:, layer, head, None].numpy()
                ends = resampled(lambda s: s[:, 0] / len(copied), sums, draws)
                interval[:, layer, head] = torch.tensor(ends or (share[layer, head].item(),) * 2)
    return Copying(share, interval, len(copied))


def _copied(model: Model, n_tokens: int, seed: int, n_others: int | None = None) -> Float[Tensor, "token layer head"]:
    """Test whether each head raises a token's own logit more than those of 99 % of the vocabulary: 0 or 1 per token.

    Equal logits count a half. With `n_others` the vocabulary is a uniform sample of that size.
    """
    spec, generator = model.spec, torch.Generator().manual_seed(seed)
    tokens = torch.randperm(spec.d_vocab, generator=generator)[:n_tokens].to(model.device)
    others = torch.randperm(spec.d_vocab, generator=generator)[:n_others].to(model.device)
    directions = model.logit_directions
    of_own, of_others = directions[:, tokens].T, directions[:, others]
    copied = torch.zeros(len(tokens), spec.n_layers, spec.n_heads, dtype=torch.float64)
    for layer in range(spec.n_layers):
        values = model.token_values(layer, tokens)
        outputs = model.output_directions(layer).reshape(spec.n_heads, spec.d_head, -1)  # a scale does not change ranks
        for head in range(spec.n_heads):
            written = values[:, head] @ outputs[head]
            own = (written * of_own).sum(1, keepdim=True)
            logits = written @ of_others
            is_own = tokens[:, None] == others
            above = ((logits > own) & ~is_own).sum(1) + ((logits == own) & ~is_own).sum(1) / 2
            copied[:, layer, head] = (above < _TOP * len(others)).double().cpu()
    return copied


# --------------------------------------------------------------------------------------------------------------- roles
@dataclass(frozen=True)
class RoleTest:
    """Test of one role of every head, against the same head of the model with shuffled weights."""

    role: Role
    statistic: Float[np.ndarray, "layer head"]
    """The score, on the same text as the null; a smaller sample than in `heads.head_scores`."""
    null: Float[np.ndarray, "shuffle layer head"]

    @property
    def p(self) -> Float[np.ndarray, "layer head"]:
        """The p-values `(1 + shuffles with at least this score) / (1 + shuffles)`: valid at any level alpha."""
        return (1 + (self.null >= self.statistic).sum(0)) / (1 + len(self.null))

    def found(self, alpha: float = ALPHA, least: float = LEAST) -> Bool[np.ndarray, "layer head"]:
        """Mark the heads that have the role: p at most alpha and a score of at least `least`."""
        return (self.p <= alpha) & (self.statistic >= least)


@dataclass(frozen=True)
class HeadRoles:
    """Every role of every head."""

    tests: tuple[RoleTest, ...]
    n_shuffles: int
    definition: str = "score of a head beside those of the same head with all entries of each weight shuffled"

    def of(self, role: Role) -> RoleTest:
        """Return the test of one role."""
        return next(test for test in self.tests if test.role == role)

    def names(self, layer: int, head: int, alpha: float = ALPHA, least: float = LEAST) -> tuple[Role, ...]:
        """Return the roles of one head; none where no test is significant.

        Raises:
            HeadscopeError: no such head.
        """
        shape = self.tests[0].statistic.shape
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise HeadscopeError(
                f"head {layer}.{head}", expected=f"{shape[0]} layers of {shape[1]} heads, from 0", do="name another"
            )
        return tuple(test.role for test in self.tests if test.found(alpha, least)[layer, head])


def head_roles(
    model: Model,
    *,
    n: int | None = None,
    n_sequences: int = 4,
    n_tokens: int = 128,
    n_shuffles: int = 99,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> HeadRoles:
    """Test every role of every head of every layer.

    Args:
        model: the model.
        n: tokens of each copy of the repeated text; 32, or what fits the context, when None.
        n_sequences: sequences of repeated tokens, the same for the model and its shuffles.
        n_tokens: tokens of the copying table.
        n_shuffles: shuffles of the weights. The smallest p is 1 / (1 + n_shuffles): with fewer than 99 no role is found
            at 1 %.
        seed: seed of the text and the shuffles.
        on_progress: called after each shuffle.

    Raises:
        HeadscopeError: no shuffles.
        ModelError: the text does not fit the context.
    """
    if n_shuffles < 1:
        raise HeadscopeError(
            f"{n_shuffles} shuffles", expected="at least one, 99 for a p of 1 %", do="raise n_shuffles"
        )
    size = min(32, (model.spec.context - 1) // 2) if n is None else n
    if not 2 <= size <= (model.spec.context - 1) // 2:
        raise ModelError(
            f"two copies of {size} tokens", expected=f"copies of 2 to {(model.spec.context - 1) // 2}", do="pass such n"
        )
    tokens = repeated_tokens(model, size, n_sequences, seed)
    report = on_progress or (lambda _done, _total: None)

    def statistics(of: Model) -> dict[Role, np.ndarray]:
        found: dict[Role, Tensor] = {name: each.mean(0) for name, each in scores_by_sequence(of, tokens).items()}
        found["copying"] = _copied(of, n_tokens, seed, _OTHERS).mean(0)
        return {role: values.double().cpu().numpy() for role, values in found.items()}

    own, nulls = statistics(model), []
    for i, shuffled in enumerate(shuffles(model, n_shuffles, seed)):
        nulls.append(statistics(shuffled))
        report(i + 1, n_shuffles)
    tests = tuple(RoleTest(role, own[role], np.stack([null[role] for null in nulls])) for role in own)
    return HeadRoles(tests, n_shuffles)


def shuffles(model: Model, n: int, seed: int) -> Iterator[Model]:
    """Yield the model with the entries of each parameter shuffled, n times; each invalidates the previous one."""
    module = copy.deepcopy(model.module)
    held = Model(module, model.tokenizer, model.bos, f"{model.spec.name}, weights shuffled")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for own, shuffled in zip(model.module.parameters(), module.parameters(), strict=True):
            order = torch.randperm(own.numel(), generator=generator).to(own.device)
            shuffled.data = own.data.flatten()[order].view_as(own)
        yield held.replica()  # clears all cached data of the previous weights
