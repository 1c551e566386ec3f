"""Examples as JSON: columns of small integers instead of decimals, each text once, and sums that still close.

A card has dozens of examples, each with the DFA of its sources by head. What the page could not show is left out: a
head's part of a source below `_SMALL` of the pre-activation joins the sum of all other sources, `rest`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.explorer.answers import Json
from headscope.index.records import Example
from headscope.index.store import FeatureIndex

Runs = dict[int, list[tuple[int, int]]]
"""Stretches [start, end) of blocks, by block, sorted and disjoint."""

_REACH, _REACH_TOP_SOURCE, _REACH_SOURCE = 16, 5, 1  # tokens kept on each side of the destination and of sources


@dataclass(frozen=True)
class Detail:
    """How much of an example is kept."""

    decimals: int
    """Of DFA and activations where the pre-activation is from 1 to 10; one less from 10 to 100, and so on."""
    small: float
    """A head's part of a source below this share of the pre-activation joins `rest`."""
    attention: float
    """Less attention than this is left out."""
    attended: float
    """A source with this much attention from some head is kept, whatever its DFA."""
    n_sources: int
    """At most, in examples that are brief."""


WHOLE = Detail(decimals=3, small=0.004, attention=0.01, attended=0.05, n_sources=8)
LEAN = Detail(decimals=2, small=0.01, attention=0.05, attended=0.2, n_sources=3)
"""For a file: what the page shows of an example without being asked."""


def examples_json(
    examples: Sequence[Example],
    runs: Sequence[list[tuple[int, int]]],
    brief: Bool[np.ndarray, " example"],
    block_size: int,
    d: Detail,
) -> Json:
    """Make the JSON of a feature's examples; `Examples` in static/types.d.ts has its columns.

    Integers count units of `10^unit`. For each head, its entries in `dfa` and `rest` sum to its DFA; all of them and
    the bias sum to the pre-activation, within half a unit.

    Args:
        examples: of one feature.
        runs: of each, the text kept with it (`example_runs`).
        brief: which ones keep `d.n_sources` sources and no attention.
        block_size: tokens in a block.
        d: how much to keep.
    """
    if not examples:
        return {}
    n_heads = len(examples[0].rest)
    pre = np.array([e.pre for e in examples], dtype=np.float64)
    activation = np.array([e.activation for e in examples], dtype=np.float64)
    unit = np.floor(np.log10(np.maximum(np.abs(pre), 1e-9))).astype(np.int64) - d.decimals
    scale = 10.0**-unit
    block, destination = np.divmod(np.array([e.position for e in examples]), block_size)
    counts = np.array([len(e.sources) for e in examples])
    owner = np.repeat(np.arange(len(examples)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    exact = _stack([s.heads for e in examples for s in e.sources], n_heads) * scale[owner, None]
    pattern = _stack([s.pattern for e in examples for s in e.sources], n_heads)
    large = np.abs(exact) >= np.abs(d.small * pre * scale)[owner, None]
    kept = (large.any(1) | (pattern >= d.attended).any(1)) & ~(brief[owner] & (rank >= d.n_sources))
    shown = np.where(large & kept[:, None], np.rint(exact), 0.0)
    rest = _stack([e.rest for e in examples], n_heads) * scale[:, None]
    np.add.at(rest, owner, exact - shown)
    position = np.array([s.position for e in examples for s in e.sources], dtype=np.int64)
    seen = (pattern >= d.attention) & ~brief[owner, None]  # attention, in percent
    columns = {
        "block": block,
        "dst": destination,
        "unit": unit,
        "act": np.rint(activation * scale),
        "n_src": np.bincount(owner[kept], minlength=len(examples)),
        "offset": (destination[owner] - position)[kept],
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


def _stack(rows: list[np.ndarray], n_columns: int) -> Float[np.ndarray, "row column"]:
    return np.stack(rows).astype(np.float64) if rows else np.zeros((0, n_columns))


def _sparse(name: str, values: Float[np.ndarray, "row head"], where: Bool[np.ndarray, "row head"]) -> dict[str, Any]:
    """What stands `where`, row by row: how many in each, which heads, which values."""
    return {f"n_{name}": where.sum(1), f"{name}_head": np.nonzero(where)[1], name: values[where]}


def _round_keeping_sums(values: Float[np.ndarray, "row head"]) -> Int[np.ndarray, "row head"]:
    """Round to integers, each within one of its value, so that a row's sum is within a half of its sum."""
    totals = np.rint(np.cumsum(values, axis=1)).astype(np.int64)
    return np.diff(totals, axis=1, prepend=0)


def _others(
    examples: Sequence[Example],
    runs: Sequence[list[tuple[int, int]]],
    scale: np.ndarray,
    destination: np.ndarray,
    block_size: int,
) -> dict[str, Any]:
    """Where else a feature is active in the text kept with each example, and how strongly."""
    counts, offsets, values = [], [], []
    for i, (e, own) in enumerate(zip(examples, runs, strict=True)):
        shown = np.zeros(block_size, dtype=bool)
        for start, end in own:
            shown[start:end] = True
        shown[destination[i]] = False
        near = shown[e.active_at]
        counts.append(int(near.sum()))
        offsets.append(destination[i] - e.active_at[near])
        values.append(e.active_value[near] * scale[i])
    return {"n_on": np.array(counts), "on_offset": np.concatenate(offsets), "on": np.rint(np.concatenate(values))}


# ------------------------------------------------------------------------------------------------------------ the text
def example_runs(example: Example, block_size: int) -> list[tuple[int, int]]:
    """Stretches of its block that an example's windows show: around the destination and each source."""
    destination = example.position % block_size
    wanted = [(destination - _REACH, destination + _REACH + 1)]
    for rank, source in enumerate(example.sources):
        reach = _REACH_SOURCE if rank else _REACH_TOP_SOURCE
        wanted.append((source.position - reach, source.position + reach + 1))
    return join_runs([(max(0, start), min(block_size, end)) for start, end in wanted])


def join_runs(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort stretches and join those that meet, or leave out a single token."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if joined and start <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def text_runs(blocks: Iterable[int], runs: Iterable[list[tuple[int, int]]]) -> Runs:
    """All stretches of each block, each token once."""
    made: Runs = {}
    for block, own in zip(blocks, runs, strict=True):
        made.setdefault(block, []).extend(own)
    return {block: join_runs(own) for block, own in sorted(made.items())}


def text_json(runs: Runs, tokens_of: Callable[[int], Int[np.ndarray, " position"]]) -> list[list[Any]]:
    """Write stretches of text as [block, start, ids]."""
    made = []
    for block, own in runs.items():
        tokens = tokens_of(block)
        made += [[block, start, tokens[start:end].tolist()] for start, end in own]
    return made


def corpus_json(runs: Runs, index: FeatureIndex) -> Json:
    """The text of some stretches, and the document that each of their blocks' positions is from."""
    where, names = {}, {}
    for block, own in runs.items():
        document = index.documents_of(block)
        starts = np.flatnonzero(np.diff(document, prepend=-1)).tolist()
        where[block] = [[start, int(document[start])] for start in starts if start < own[-1][1]]
        names |= {number: index.documents[number] for _, number in where[block]}
    return {"text": text_json(runs, index.tokens_of), "document_at": where, "documents": names}
