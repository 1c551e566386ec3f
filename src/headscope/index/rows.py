"""What rows of an index's tables say, as its records."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from headscope.index.reading import flat
from headscope.index.records import (
    Activations,
    Correlated,
    Example,
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
    """A row of `features`, of a corpus of so many tokens."""
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
    """One latent's rows of `source_totals` and `sources`; None where it is never active above the threshold."""
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
    """Rows of `activations`."""
    heads = [table[f"head_{h}"].to_numpy() for h in range(n_heads)]
    return Activations(table["position"].to_numpy(), table["activation"].to_numpy(), np.stack(heads, axis=1))


def groups_of(latent: int, groups: pa.Table, examples: pa.Table) -> tuple[ExampleGroup, ...]:
    """A latent's rows of `groups`, with the examples of each.

    Raises:
        ValueError: a kind that is not known, or a group of examples that are not there.
    """
    by_position = {example.position: example for example in _examples(examples)}
    rows = groups.to_pylist()
    unknown = {p for group in rows for p in group["positions"]} - set(by_position)
    if unknown or {group["kind"] for group in rows} - set(KINDS):
        raise ValueError(
            f"groups of latent {latent} that are of no known kind, or lack examples: {sorted(unknown)[:5]}"
        )
    plain = ("kind", "number", "low", "high", "n", "share_active", "share_mass", "sampled")
    return tuple(
        ExampleGroup(
            **{name: group[name] for name in plain},
            examples=tuple(
                replace(by_position[p], duplicates=d) if d else by_position[p]
                for p, d in zip(group["positions"], group["duplicates"], strict=True)
            ),
        )
        for group in rows
    )


def null_of(row: dict[str, Any]) -> Null:
    """A row of `nulls`."""
    return Null(row["kind"], row["latent"], row["n_active"], _array(row["dfa_share"]), _array(row["dfa_covariance"]))


def _examples(table: pa.Table) -> list[Example]:
    """The records of some rows; lists are cut from whole columns, not built one by one."""
    plain = {name: table[name].to_pylist() for name in ("position", "activation", "pre", "bias", "residual")}
    cut: dict[str, Callable[[int], np.ndarray]] = {
        name: _cutter(table[name]) for name in table.column_names if pa.types.is_list(table[name].type)
    }
    examples = []
    for i in range(len(table)):
        heads = cut["heads"](i)
        by_source = cut["source_heads"](i).reshape(-1, len(heads))
        pattern = cut["source_pattern"](i).reshape(-1, len(heads))
        position = cut["source"](i).tolist()
        examples.append(
            Example(
                **{name: values[i] for name, values in plain.items()},
                heads=heads,
                sources=tuple(Source(*of) for of in zip(position, by_source, pattern, strict=True)),
                rest=cut["rest"](i),
                rest_pattern=1 - pattern.sum(0),
                active_at=cut["active_at"](i),
                active_value=cut["active_value"](i),
            )
        )
    return examples


def _cutter(lists: pa.ChunkedArray) -> Callable[[int], np.ndarray]:
    """The i-th list of a column as an array."""
    values, offsets = flat(lists)
    return lambda i: values[offsets[i] : offsets[i + 1]]


def _array(values: list | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values)


def _pairs(tokens: list[int] | None, values: list[float] | None) -> tuple[tuple[int, float], ...]:
    return () if tokens is None or values is None else tuple(zip(tokens, values, strict=True))
