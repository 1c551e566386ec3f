"""Examples as JSON: columns of small integers instead of decimals, each text once, with exact sums.

A card has dozens of examples, each with the DFA of its sources by head. Invisible detail is omitted: a
head's part of a source below `_SMALL` of the pre-activation joins the sum of all other sources, `rest`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.encode import Json
from headscope.index.excerpts import join_runs
from headscope.index.records import ExampleColumns

_REACH, _REACH_TOP_SOURCE, _REACH_SOURCE = 16, 5, 1  # tokens shown on each side of the destination and of sources


@dataclass(frozen=True)
class Detail:
    """Level of detail of an example."""

    decimals: int
    """Decimals of DFA and activations where the pre-activation is from 1 to 10; one less from 10 to 100, and so on."""
    small: float
    """A head's part of a source below this share of the pre-activation joins `rest`."""
    attention: float
    """Less attention than this is omitted."""
    attended: float
    """A source with this much attention from some head is included, whatever its DFA."""
    n_sources: int
    """Maximum number of sources, in brief examples."""


WHOLE = Detail(decimals=3, small=0.004, attention=0.01, attended=0.05, n_sources=8)
LEAN = Detail(decimals=2, small=0.01, attention=0.05, attended=0.2, n_sources=3)
"""Detail for a file: what the page shows of an example by default."""


def examples_json(
    examples: ExampleColumns,
    runs: Sequence[list[tuple[int, int]]],
    brief: Bool[np.ndarray, " example"],
    block_size: int,
    d: Detail,
) -> Json:
    """Make the JSON of a feature's examples; `Examples` in static/types.d.ts has its columns.

    Integers count units of `10^unit`. For each head, its entries in `dfa` and `rest` sum to its DFA; all of them and
    the bias sum to the pre-activation, within half a unit.

    Args:
        examples: the examples of one feature.
        runs: the text ranges of each (`example_runs`).
        brief: marks those with `d.n_sources` sources and no attention.
        block_size: tokens per block.
        d: the level of detail.
    """
    if not len(examples):
        return {}
    pre, activation = examples.pre.astype(np.float64), examples.activation.astype(np.float64)
    unit = np.floor(np.log10(np.maximum(np.abs(pre), 1e-9))).astype(np.int64) - d.decimals
    scale = 10.0**-unit
    block, destination = np.divmod(examples.position, block_size)
    counts = examples.n_sources
    owner = np.repeat(np.arange(len(examples)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    exact = examples.source_heads.astype(np.float64) * scale[owner, None]
    pattern = examples.source_pattern.astype(np.float64)
    large = np.abs(exact) >= np.abs(d.small * pre * scale)[owner, None]
    kept = (large.any(1) | (pattern >= d.attended).any(1)) & ~(brief[owner] & (rank >= d.n_sources))
    shown = np.where(large & kept[:, None], np.rint(exact), 0.0)
    rest = examples.rest.astype(np.float64) * scale[:, None]
    np.add.at(rest, owner, exact - shown)
    seen = (pattern >= d.attention) & ~brief[owner, None]  # attention, in percent
    columns = {
        "block": block,
        "dst": destination,
        "unit": unit,
        "act": np.rint(activation * scale),
        "n_src": np.bincount(owner[kept], minlength=len(examples)),
        "offset": (destination[owner] - examples.source)[kept],
        "other": np.rint((exact - shown).sum(1))[kept],
        "rest": _round_keeping_sums(rest).ravel(),
        **_sparse("dfa", shown[kept], large[kept]),
        **_sparse("att", np.rint(100 * pattern[kept]), seen[kept]),
        **_others(examples, runs, scale, destination, block_size),
    }
    same = np.allclose(pre, activation, rtol=1e-5)
    return {
        **{name: column.astype(np.int64).tolist() for name, column in columns.items()},
        "pre": None if same else np.rint(pre * scale).astype(np.int64).tolist(),
        "brief": brief.astype(np.int64).tolist(),
    }


def _sparse(name: str, values: Float[np.ndarray, "row head"], where: Bool[np.ndarray, "row head"]) -> dict[str, Any]:
    """Encode the values at `where` row by row: number per row, heads, values."""
    return {f"n_{name}": where.sum(1), f"{name}_head": np.nonzero(where)[1], name: values[where]}


def _round_keeping_sums(values: Float[np.ndarray, "row head"]) -> Int[np.ndarray, "row head"]:
    """Round to integers, each within one of its value, so that a row's sum is within a half of its sum."""
    totals = np.rint(np.cumsum(values, axis=1)).astype(np.int64)
    return np.diff(totals, axis=1, prepend=0)


def _others(
    examples: ExampleColumns,
    runs: Sequence[list[tuple[int, int]]],
    scale: np.ndarray,
    destination: np.ndarray,
    block_size: int,
) -> dict[str, Any]:
    """Return the other active tokens of the feature in each example's text, with their activations."""
    shown = np.zeros((len(examples), block_size), dtype=bool)
    for row, own in zip(shown, runs, strict=True):
        for start, end in own:
            row[start:end] = True
    shown[np.arange(len(examples)), destination] = False
    owner, at = np.repeat(np.arange(len(examples)), examples.n_active), examples.active_at
    near = shown[owner, at]
    owner, at, value = owner[near], at[near], examples.active_value[near]
    return {
        "n_on": np.bincount(owner, minlength=len(examples)),
        "on_offset": destination[owner] - at,
        "on": np.rint(value * scale[owner]),
    }


# ------------------------------------------------------------------------------------------------------------ the text
def example_runs(examples: ExampleColumns, block_size: int) -> list[list[tuple[int, int]]]:
    """Return for each example the ranges of its block shown around the destination and each source."""
    sources, ends = examples.source.tolist(), np.cumsum(examples.n_sources)
    places = np.stack([examples.position % block_size, ends - examples.n_sources, ends], axis=1).tolist()
    return [windows(destination, sources[start:end], block_size) for destination, start, end in places]


def windows(destination: int, sources: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """Return the ranges around a destination and its sources, the largest first."""
    wanted = [(destination - _REACH, destination + _REACH + 1)]
    for rank, source in enumerate(sources):
        reach = _REACH_SOURCE if rank else _REACH_TOP_SOURCE
        wanted.append((source - reach, source + reach + 1))
    return join_runs([(max(0, start), min(block_size, end)) for start, end in wanted])
