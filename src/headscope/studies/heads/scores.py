"""Head scores on repeated random tokens: previous-token, induction and duplicate-token.

Olsson et al. (2022), https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads. Prefix curves are
those of Kissane et al. (2024), https://arxiv.org/abs/2406.17759, for all heads at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import HeadscopeError, ModelError
from headscope.models.hf import Model
from headscope.stats import MINIMUM_UNITS, unit_draws

ScoreName = Literal["previous_token", "induction", "duplicate_token"]

DEFINITIONS: dict[ScoreName, str] = {
    "previous_token": "mean attention from d to d - 1, over d >= 2",
    "induction": "mean attention from d in the second copy to d - n + 1, the token after the first copy of d's token",
    "duplicate_token": "mean attention from d in the second copy to d - n, the first copy of d's token",
}
"""On `[BOS, r(n), r(n)]`, r drawn uniformly from the vocabulary without the BOS."""

_BATCH_TOKENS = 2048
_SAMPLES = 1000


@dataclass(frozen=True)
class HeadScores:
    """Mean attention on `[BOS, r(n), r(n)]`, r drawn uniformly from the vocabulary without the BOS."""

    previous_token: Float[Tensor, "layer head"]
    """Attention from d to d - 1, over d >= 2."""
    induction: Float[Tensor, "layer head"]
    """Attention from d in the second copy to d - n + 1, the token after the first copy of d's token."""
    duplicate_token: Float[Tensor, "layer head"]
    """Attention from d in the second copy to d - n, the first copy of d's token."""
    intervals: dict[ScoreName, Float[Tensor, "end layer head"]]
    """95 %, sequences resampled; NaN with fewer than 10 sequences."""
    even: dict[ScoreName, float]
    """The same scores of a head with uniform attention over all visible tokens: the chance level."""
    copy_loss: float
    """Nats per token on the second copy, from its second token on."""
    n_sequences: int
    n: int
    """Tokens per copy."""

    def best(self, name: str) -> tuple[str, float]:
        """Return the head with the largest score, e.g. `("1.3", 0.84)`; name is one of `DEFINITIONS`."""
        scores: Tensor = getattr(self, name)
        layer, head = divmod(int(scores.argmax()), scores.shape[1])
        return f"{layer}.{head}", float(scores[layer, head])


def repeated_tokens(model: Model, n: int, n_sequences: int, seed: int = 0) -> Int[Tensor, "sequence position"]:
    """Return `[BOS, r(n), r(n)]` for random r; no token of r is the BOS."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(0, model.spec.d_vocab - 1, (n_sequences, n), generator=generator)
    half += half >= model.bos
    start = torch.full((n_sequences, 1), model.bos)
    return torch.cat([start, half, half], dim=1).to(model.device)


def head_scores(model: Model, *, n: int = 100, n_sequences: int = 32, seed: int = 0) -> HeadScores:
    """Score every head of every layer; one run of the model for each batch of sequences.

    Raises:
        ModelError: 2n + 1 tokens do not fit the model's context.
    """
    if 2 * n + 1 > model.spec.context:
        raise ModelError(
            f"two copies of {n} tokens", expected=f"at most {model.spec.context} positions in all", do="lower n"
        )
    if n < 2 or n_sequences < 1:
        raise HeadscopeError(
            f"{n_sequences} sequences of two copies of {n} tokens",
            expected="one sequence or more, of copies of two tokens or more",
            do="raise n or n_sequences",
        )
    tokens = repeated_tokens(model, n, n_sequences, seed)
    by_sequence = scores_by_sequence(model, tokens)
    draws = torch.tensor(unit_draws(n_sequences, n_samples=_SAMPLES, seed=seed)) / n_sequences
    intervals: dict[ScoreName, Tensor] = {name: _interval(values, draws) for name, values in by_sequence.items()}
    even: dict[ScoreName, float] = {name: float((1 / (query + 1)).mean()) for name, (query, _) in _where(n).items()}
    return HeadScores(
        previous_token=by_sequence["previous_token"].mean(0),
        induction=by_sequence["induction"].mean(0),
        duplicate_token=by_sequence["duplicate_token"].mean(0),
        intervals=intervals,
        even=even,
        copy_loss=model.losses(tokens)[:, n + 1 :].mean().item(),
        n_sequences=n_sequences,
        n=n,
    )


def scores_by_sequence(
    model: Model, tokens: Int[Tensor, "sequence position"]
) -> dict[ScoreName, Float[Tensor, "sequence layer head"]]:
    """Return the scores of every head on each of some sequences of `repeated_tokens`."""
    places = _where((tokens.shape[1] - 1) // 2)
    found: dict[ScoreName, list[Tensor]] = {name: [] for name in places}
    for pattern in _patterns(model, tokens):
        for name, (query, source) in places.items():
            found[name].append(pattern[..., query, source].mean(-1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _where(n: int) -> dict[ScoreName, tuple[Int[Tensor, " query"], Int[Tensor, " query"]]]:
    """Return the queries and their sources whose mean attention each score is."""
    later, second = torch.arange(2, 2 * n + 1), torch.arange(n + 1, 2 * n + 1)
    return {
        "previous_token": (later, later - 1),
        "induction": (second, second - n + 1),
        "duplicate_token": (second, second - n),
    }


def _patterns(
    model: Model, tokens: Int[Tensor, "sequence position"]
) -> Iterator[Float[Tensor, "sequence layer head query source"]]:
    """Yield the attention of all heads of all layers, some sequences at a time."""
    layers = range(model.spec.n_layers)
    for rows in tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])):
        found = model.attentions(rows, layers)
        yield torch.stack([found[layer].pattern for layer in layers], dim=1)


def _interval(values: Float[Tensor, "unit *axes"], draws: Float[Tensor, "sample unit"]) -> Float[Tensor, "end *axes"]:
    """Return the 95 % percentile interval of means over units; NaN for too few."""
    if len(values) < MINIMUM_UNITS:
        return values.new_full((2, *values.shape[1:]), torch.nan)
    means = torch.tensordot(draws, values.double().cpu(), dims=1)
    low, high = np.percentile(means.numpy(), [2.5, 97.5], axis=0)
    return torch.from_numpy(np.stack([low, high])).to(values)


# ------------------------------------------------------------------------------------------------------- prefix curves
@dataclass(frozen=True)
class PrefixCurves:
    """Induction attention of each head by the length of the repeated prefix.

    In random text without repetition, p tokens are copied to a later place; from the last of them, attention is
    measured to the token after the first copy. A head that needs one matching token (short prefix) has the same curve
    at every p; one that matches several (long prefix) rises with p.
    """

    attention: Float[Tensor, "prefix layer head"]
    """Mean attention, for p = 1, 2, ..."""
    interval: Float[Tensor, "end prefix layer head"]
    """95 %, sequences resampled; NaN with fewer than 10 sequences."""
    null: Float[Tensor, "prefix layer head"]
    """The same positions of the same text before anything is copied."""
    n_sequences: int
    n_pairs: int
    """Copied prefixes per sequence; no two share a token."""
    definition: str = "mean attention from the last of p copied tokens to the token after their first copy"

    @property
    def gain(self) -> Float[Tensor, "layer head"]:
        """Attention at the longest prefix minus that at the shortest: 0 for a head that needs one token."""
        return self.attention[-1] - self.attention[0]


def prefix_curves(
    model: Model, *, longest: int = 9, length: int = 128, n_sequences: int = 64, seed: int = 0
) -> PrefixCurves:
    """Measure every head of every layer for prefixes of 1 to `longest` tokens.

    Each sequence is the BOS and distinct random tokens, split into slots of `longest + 1`; slots of the first half are
    copied to slots of the second, so that many pairs share a run.

    Args:
        model: the model.
        longest: longest prefix.
        length: length of a sequence, including the BOS.
        n_sequences: number of sequences, shared by all prefix lengths.
        seed: seed of the tokens and of the assignment of slots.

    Raises:
        ModelError: the sequences do not fit the context, or the vocabulary is too small for distinct tokens.
        HeadscopeError: no two slots fit in a sequence.
    """
    slot = longest + 1
    n_pairs = (length - 1) // slot // 2
    if length > model.spec.context or length > model.spec.d_vocab:
        raise ModelError(
            f"sequences of {length} distinct tokens",
            expected=f"at most {min(model.spec.context, model.spec.d_vocab)}, by the context and the vocabulary",
            do="lower length",
        )
    if longest < 1 or n_pairs < 1 or n_sequences < 1:
        raise HeadscopeError(
            f"{n_sequences} sequences of {length} tokens for prefixes of up to {longest}",
            expected=f"one sequence or more, of at least {2 * slot + 1} tokens",
            do="raise length or lower longest",
        )
    generator = torch.Generator().manual_seed(seed)
    plain = _distinct(model, length, n_sequences, generator)
    first = 1 + slot * torch.arange(n_pairs)  # start of the slots copied from
    order = torch.stack([torch.randperm(n_pairs, generator=generator) for _ in range(n_sequences)])
    second = 1 + slot * (n_pairs + order)  # [sequence, pair]
    curves, nulls = [], []
    untouched = list(_places(model, plain, first, second, range(1, slot)))
    for p in range(1, slot):
        copied = plain.clone()
        for i in range(p):
            copied.scatter_(1, second + i, plain[:, first + i])
        (values,) = _places(model, copied, first, second, [p])
        curves.append(values)
        nulls.append(untouched[p - 1].mean(0))
    by_sequence = torch.stack(curves, dim=1)  # [sequence, prefix, layer, head]
    draws = torch.tensor(unit_draws(n_sequences, n_samples=_SAMPLES, seed=seed)) / n_sequences
    return PrefixCurves(
        by_sequence.mean(0), _interval(by_sequence, draws), torch.stack(nulls), n_sequences=n_sequences, n_pairs=n_pairs
    )


def _distinct(
    model: Model, length: int, n_sequences: int, generator: torch.Generator
) -> Int[Tensor, "sequence position"]:
    """Return the BOS, then random tokens, all distinct."""
    rows = torch.stack([torch.randperm(model.spec.d_vocab - 1, generator=generator) for _ in range(n_sequences)])
    rows = rows[:, : length - 1]
    start = torch.full((n_sequences, 1), model.bos)
    return torch.cat([start, rows + (rows >= model.bos)], dim=1)


def _places(
    model: Model,
    tokens: Int[Tensor, "sequence position"],
    first: Int[Tensor, " pair"],
    second: Int[Tensor, "sequence pair"],
    prefixes: "range | list[int]",
) -> list[Float[Tensor, "sequence layer head"]]:
    """Return for each p the mean attention from the p-th token of a slot to the token after p in its source."""
    parts: list[list[Tensor]] = [[] for _ in prefixes]
    low = 0
    for pattern in _patterns(model, tokens.to(model.device)):
        row = torch.arange(len(pattern))[:, None]
        queries = second[low : low + len(pattern)]
        low += len(pattern)
        by_query = pattern.permute(0, 3, 4, 1, 2)  # [sequence, query, source, layer, head]
        for found, p in zip(parts, prefixes, strict=True):
            found.append(by_query[row, queries + p - 1, first + p].mean(1))
    return [torch.cat(found) for found in parts]
