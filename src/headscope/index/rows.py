"""Convert rows of an index's tables to records."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from headscope.index.reading import flat
from headscope.index.records import (
    Activations,
    Correlated,
    DrawnGroup,
    Example,
    ExampleColumns,
    ExampleGroup,
    Feature,
    Null,
    Shares,
    Source,
    Sources,
    SourceToken,
)
from headscope.index.sweep import KINDS
from headscope.stats import wilson


def feature_of(row: dict[str, Any], n_tokens: int) -> Feature:
    """Convert a row of `features`, of a corpus of `n_tokens` tokens."""
    density = wilson(row["n_active"], n_tokens)
    plain = ("latent", "n_active", "density", "mean", "std", "skew", "kurtosis", "maximum", "bias", "copy_rank")
    return Feature(
        **{name: row[name] for name in plain},
        density_interval=(density.low, density.high),
        **{name: _array(row[name]) for name in ("quantiles", "histogram", "mass")},
        shares=Shares(
            decoder=np.asarray(row["decoder_share"]),
            decoder_out=np.asarray(row["decoder_out_share"]),
            encoder=np.asarray(row["encoder_share"]),
            encoder_in=np.asarray(row["encoder_in_share"]),
            dfa=_array(row["dfa_share"]),
            dfa_covariance=_array(row["dfa_covariance"]),
            dfa_mean=_array(row["dfa_mean"]),
        ),
        logit_top=_pairs(row["logit_top_tokens"], row["logit_top_values"]),
        logit_bottom=_pairs(row["logit_bottom_tokens"], row["logit_bottom_values"]),
        **{name: row[name] for name in ("logit_mean", "logit_std", "logit_skew", "logit_kurtosis")},
        copy_top=_pairs(row["copy_tokens"], row["copy_values"]),
        correlated=tuple(
            Correlated(*values)
            for values in zip(
                row["correlated_latents"], row["correlated_pearson"], row["correlated_cosine"], strict=True
            )
        ),
    )


def sources_of(totals: pa.Table, tokens: pa.Table, threshold: float) -> Sources | None:
    """Convert one latent's rows of `source_totals` and `sources`; None where it is never active above the threshold."""
    (total,) = (row for row in totals.to_pylist() if row["threshold"] == threshold)
    if not total["n_active"]:
        return None
    rows = (row for row in tokens.to_pylist() if row["threshold"] == threshold)
    return Sources(
        threshold=threshold,
        n_active=total["n_active"],
        kept=total["kept"],
        bos_share=total["bos_share"],
        kept_by_head=np.asarray(total["kept_by_head"], dtype=np.float64),
        bos_share_by_head=np.asarray(total["bos_share_by_head"], dtype=np.float64),
        tokens=tuple(_source_token(row) for row in rows),
    )


def _source_token(row: dict[str, Any]) -> SourceToken:
    values: dict[str, Any] = {name: row[name] for name in ("token", "n", "share", "share_linear", "frequency")}
    for name in ("share_by_head", "attention", "attention_elsewhere"):
        values[name] = np.asarray(row[name])
    return SourceToken(**values)


def activations_of(table: pa.Table, n_heads: int) -> Activations:
    """Convert rows of `activations`."""
    heads = [table[f"head_{h}"].to_numpy() for h in range(n_heads)]
    return Activations(table["position"].to_numpy(), table["activation"].to_numpy(), np.stack(heads, axis=1))


def drawn_groups(latent: int, groups: pa.Table, positions: Int[np.ndarray, " example"]) -> tuple[DrawnGroup, ...]:
    """Convert a latent's rows of `groups`; `positions` are those of its examples.

    Raises:
        ValueError: an unknown kind, or a group whose examples are missing.
    """
    rows = groups.to_pylist()
    unknown = {p for group in rows for p in group["positions"]} - set(positions.tolist())
    if unknown or {group["kind"] for group in rows} - set(KINDS):
        raise ValueError(
            f"groups of latent {latent} that are of no known kind, or lack examples: {sorted(unknown)[:5]}"
        )
    plain = ("kind", "number", "low", "high", "n", "share_active", "share_mass", "sampled")
    return tuple(
        DrawnGroup(
            **{name: group[name] for name in plain},
            positions=tuple(group["positions"]),
            duplicates=tuple(group["duplicates"]),
        )
        for group in rows
    )


def groups_of(groups: Sequence[DrawnGroup], examples: ExampleColumns) -> tuple[ExampleGroup, ...]:
    """Return groups with a record of each example."""
    by_position = {example.position: example for example in _records(examples)}
    plain = ("kind", "number", "low", "high", "n", "share_active", "share_mass", "sampled")
    return tuple(
        ExampleGroup(
            **{name: getattr(group, name) for name in plain},
            examples=tuple(
                replace(by_position[p], duplicates=d) if d else by_position[p]
                for p, d in zip(group.positions, group.duplicates, strict=True)
            ),
        )
        for group in groups
    )


def null_of(row: dict[str, Any]) -> Null:
    """Convert a row of `nulls`."""
    return Null(row["kind"], row["latent"], row["n_active"], _array(row["dfa_share"]), _array(row["dfa_covariance"]))


def example_columns(table: pa.Table, n_heads: int) -> ExampleColumns:
    """Convert rows of `examples`."""
    numbers = {name: table[name].to_numpy() for name in ("position", "activation", "pre", "bias", "residual")}
    lists = {name: flat(table[name]) for name in table.column_names if pa.types.is_list(table[name].type)}
    values = {name: of[offsets[0] : offsets[-1]] for name, (of, offsets) in lists.items()}
    by_head = ("heads", "rest", "source_heads", "source_pattern")
    return ExampleColumns(
        **numbers,
        **{name: values[name].reshape(-1, n_heads) for name in by_head},
        **{name: values[name] for name in ("source", "active_at", "active_value")},
        n_sources=np.diff(lists["source"][1]),
        n_active=np.diff(lists["active_at"][1]),
    )


def taken(examples: ExampleColumns, rows: Int[np.ndarray, " taken"]) -> ExampleColumns:
    """Select some examples in a new order."""
    source, active = (_places(n, rows) for n in (examples.n_sources, examples.n_active))
    where = {name: source for name in ("source", "source_heads", "source_pattern")}
    where |= {name: active for name in ("active_at", "active_value")}
    return ExampleColumns(**{name: own[where.get(name, rows)] for name, own in vars(examples).items()})


def _places(lengths: Int[np.ndarray, " row"], rows: Int[np.ndarray, " taken"]) -> Int[np.ndarray, " place"]:
    """Return the indices of the list elements of some rows, one row after the other."""
    own = lengths[rows]
    return np.repeat((np.cumsum(lengths) - lengths)[rows] - (np.cumsum(own) - own), own) + np.arange(own.sum())


def _records(examples: ExampleColumns) -> list[Example]:
    """Make a record of each example; its arrays are views of the columns."""
    source, active = np.cumsum(examples.n_sources), np.cumsum(examples.n_active)
    numbers = [getattr(examples, name).tolist() for name in ("position", "activation", "pre", "bias", "residual")]
    records = []
    for i, (position, activation, pre, bias, residual) in enumerate(zip(*numbers, strict=True)):
        own = slice(source[i] - examples.n_sources[i], source[i])
        near = slice(active[i] - examples.n_active[i], active[i])
        by_source, pattern = examples.source_heads[own], examples.source_pattern[own]
        records.append(
            Example(
                position=position,
                activation=activation,
                pre=pre,
                bias=bias,
                residual=residual,
                heads=examples.heads[i],
                sources=tuple(map(Source, examples.source[own].tolist(), by_source, pattern)),
                rest=examples.rest[i],
                rest_pattern=1 - pattern.sum(0),
                active_at=examples.active_at[near],
                active_value=examples.active_value[near],
            )
        )
    return records


def _array(values: list | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values)


def _pairs(tokens: list[int] | None, values: list[float] | None) -> tuple[tuple[int, float], ...]:
    return () if tokens is None or values is None else tuple(zip(tokens, values, strict=True))
