"""From the sorted activations of one feature to its statistics and the examples worth showing; numpy only."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from headscope.index.config import N_BINS, QUANTILES, ExamplePlan

_CONTEXT = (10, 4)  # tokens before and after that decide whether two top examples are the same text
_CANDIDATES = 20  # times the number of top examples: how many are searched for distinct ones


@dataclass(frozen=True)
class FeatureSummary:
    """Statistics of one alive feature over its active tokens."""

    n_active: int
    mean: float
    std: float
    maximum: float
    quantiles: Float[np.ndarray, " q"]
    histogram: Int[np.ndarray, " bin"]
    """Active tokens by activation, N_BINS equal bins from 0 to the maximum."""
    mass: Float[np.ndarray, " bin"]
    """Summed activation in each bin."""
    dfa_share: Float[np.ndarray, " head"]
    dfa_covariance: Float[np.ndarray, " head"]
    dfa_mean: Float[np.ndarray, " head"]


def summarise(
    activation: Float[np.ndarray, " n"], pre: Float[np.ndarray, " n"], heads: Float[np.ndarray, "n head"]
) -> FeatureSummary:
    """Moments, quantiles, histogram and the three DFA shares (see `config.DEFINITIONS`)."""
    activation, pre, heads = (a.astype(np.float64) for a in (activation, pre, heads))
    edges = np.linspace(0, activation.max(), N_BINS + 1)
    which = np.clip(np.searchsorted(edges, activation, side="right") - 1, 0, N_BINS - 1)
    squares, means = (heads**2).sum(0), heads.mean(0)
    centred = pre - pre.mean()
    covariance = (heads - means).T @ centred
    return FeatureSummary(
        n_active=len(activation),
        mean=float(activation.mean()),
        std=float(activation.std()),
        maximum=float(activation.max()),
        quantiles=np.quantile(activation, QUANTILES),
        histogram=np.bincount(which, minlength=N_BINS),
        mass=np.bincount(which, weights=activation, minlength=N_BINS),
        dfa_share=_ratio(squares, squares.sum()),
        dfa_covariance=_ratio(covariance, float(centred @ centred)),
        dfa_mean=_ratio(means, means.sum()),
    )


def _ratio(parts: np.ndarray, whole: float) -> np.ndarray:
    return parts / whole if whole != 0 else np.full(len(parts), np.nan)


@dataclass(frozen=True)
class Group:
    """Some active tokens of a feature and the examples drawn from them."""

    kind: str
    """top, random, quantile or interval."""
    number: int
    low: float
    high: float
    n: int
    """Active tokens in the group."""
    share_active: float
    """Of the feature's active tokens."""
    share_mass: float
    """Of its summed activation."""
    chosen: Int[np.ndarray, " example"]
    """Indices into the feature's activations, strongest first."""
    duplicates: Int[np.ndarray, " example"]
    """Further tokens with the same text around them, among the strongest searched; only `top` is searched."""


def choose_examples(
    activation: Float[np.ndarray, " n"],
    position: Int[np.ndarray, " n"],
    blocks: Int[np.ndarray, "block token"],
    plan: ExamplePlan,
    rng: np.random.Generator,
) -> list[Group]:
    """The groups of a feature's card: top, random, true quantiles (strongest first), equal-width intervals."""
    order = np.argsort(-activation, kind="stable")
    total = float(activation.sum())

    def group(kind: str, number: int, members: np.ndarray, n: int) -> Group:
        chosen = members if len(members) <= n else rng.choice(members, n, replace=False)
        chosen = chosen[np.argsort(-activation[chosen], kind="stable")]
        values = activation[members]
        return Group(
            kind=kind,
            number=number,
            low=float(values.min()),
            high=float(values.max()),
            n=len(members),
            share_active=len(members) / len(activation),
            share_mass=float(values.sum()) / total,
            chosen=chosen,
            duplicates=np.zeros(len(chosen), dtype=np.int64),
        )

    groups = [_top(activation, position, blocks, order, plan.top), group("random", 0, order, plan.random)]
    for number, members in enumerate(np.array_split(order, plan.quantiles)):
        if len(members):
            groups.append(group("quantile", number, members, plan.per_quantile))
    width = float(activation.max()) / plan.intervals
    interval = np.clip((activation / width).astype(int), 0, plan.intervals - 1)
    for number in range(plan.intervals - 1, -1, -1):
        members = np.flatnonzero(interval == number)
        if len(members):
            bounds = {"low": number * width, "high": (number + 1) * width}
            groups.append(replace(group("interval", number, members, plan.per_interval), **bounds))
    return groups


def _top(activation: np.ndarray, position: np.ndarray, blocks: np.ndarray, order: np.ndarray, n: int) -> Group:
    """The strongest active tokens, each text once."""
    before, after = _CONTEXT
    chosen: dict[bytes, int] = {}
    duplicates: dict[bytes, int] = {}
    for index in order[: _CANDIDATES * n]:
        block, query = divmod(int(position[index]), blocks.shape[1])
        text = blocks[block, max(0, query - before) : query + after + 1].tobytes()
        if text in chosen:
            duplicates[text] += 1
        elif len(chosen) < n:
            chosen[text], duplicates[text] = int(index), 0
    members = np.array(list(chosen.values()), dtype=np.int64)
    values = activation[members]
    return Group(
        kind="top",
        number=0,
        low=float(values.min()),
        high=float(values.max()),
        n=len(members),
        share_active=len(members) / len(activation),
        share_mass=float(values.sum() / activation.sum()),
        chosen=members,
        duplicates=np.array([duplicates[text] for text in chosen], dtype=np.int64),
    )
