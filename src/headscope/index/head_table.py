"""Results of studies of heads: tables with one row per head, per head and family, or per feature over all heads.

They are stored in `<index>/heads/<table>.parquet` and are written, stamped and validated like columns
(`index.columns`): whole or not at all, with the studied index in their metadata. `SCHEMAS` defines their columns. No
torch, no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headscope.errors import IndexFormatError
from headscope.index.columns import read_with_origin, write_with_origin
from headscope.index.reading import read_manifest
from headscope.stats import Measure

if TYPE_CHECKING:
    from headscope.index.store import FeatureIndex

FOLDER = "heads"
Type = Literal["int", "float", "text", "ints", "floats", "by head"]
_ARROW = {
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
    "ints": pa.list_(pa.int64()),
    "floats": pa.list_(pa.float64()),
    "by head": pa.list_(pa.float64()),  # one number per head of the layer
}
ROLES = ("previous_token", "induction", "duplicate_token", "copying")


@dataclass(frozen=True)
class Schema:
    """The columns of a table."""

    key: Mapping[str, tuple[Type, str]]
    """Key columns, with their definitions; never null."""
    values: Mapping[str, tuple[Type, str]]
    """The other columns, which may be null; never NaN or infinite."""

    @property
    def columns(self) -> dict[str, tuple[Type, str]]:
        """All columns, keys first."""
        return {**self.key, **self.values}

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema."""
        return pa.schema([(name, _ARROW[kind]) for name, (kind, _) in self.columns.items()])


def _measure(name: str, definition: str) -> dict[str, tuple[Type, str]]:
    """Return the columns of a `stats.Measure`."""
    return {
        name: ("float", definition),
        f"{name}_n": ("int", f"{name}: what it is a number of"),
        f"{name}_low": ("float", f"{name}: lower end of its 95 % interval"),
        f"{name}_high": ("float", f"{name}: upper end"),
        f"{name}_null": ("float", f"{name}: the same where there is nothing to find, mean"),
        f"{name}_null_low": ("float", f"{name}: lower end of the range of its null, or of its interval"),
        f"{name}_null_high": ("float", f"{name}: upper end"),
        f"{name}_interval": ("text", f"{name}: how its interval was made"),
        f"{name}_missing": ("text", f"{name}: why there is no number, or no interval"),
    }


def measure_row(name: str, measure: Measure) -> dict[str, Any]:
    """Return the cells of a measure, for `add_head_table`."""
    null = measure.null
    return {
        name: measure.value,
        f"{name}_n": measure.n,
        f"{name}_low": measure.low,
        f"{name}_high": measure.high,
        f"{name}_null": null and null.value,
        f"{name}_null_low": null and null.low,
        f"{name}_null_high": null and null.high,
        f"{name}_interval": measure.interval,
        f"{name}_missing": measure.missing,
    }


_HEAD: dict[str, tuple[Type, str]] = {"layer": ("int", "layer"), "head": ("int", "head of the layer")}
_WEIGHTS: dict[str, tuple[Type, str]] = {
    **_HEAD,
    "weights": ("text", "what features are weighed by: dfa, or a share of weights of features.parquet"),
}


def _role(name: str, definition: str) -> dict[str, tuple[Type, str]]:
    return {
        name: ("float", definition),
        f"{name}_low": ("float", f"{name}: lower end of its 95 % interval"),
        f"{name}_high": ("float", f"{name}: upper end"),
        f"{name}_even": ("float", f"{name} of a head that attends evenly, or of a table without meaning"),
        f"{name}_null": ("float", f"{name} of this head with all weights of the model shuffled, mean"),
        f"{name}_null_high": ("float", f"{name} with all weights shuffled, the most extreme of the shuffles"),
        f"{name}_p": (
            "float",
            f"share of shuffled models, the model itself included, whose head has this {name} or more",
        ),
    }


_MEASURES = Schema(
    {"measure": ("text", "its name")},
    {"definition": ("text", "of the measure"), **_measure("value", "as its definition says")},
)

SCHEMAS: dict[str, Schema] = {
    "scores": Schema(
        _HEAD,
        {
            **_role("previous_token", "mean attention from d to d - 1 on repeated random tokens"),
            **_role("induction", "mean attention from d in the second copy to the token after d's first copy"),
            **_role("duplicate_token", "mean attention from d in the second copy to d's first copy"),
            **_role("copying", "share of tokens whose own logit the head raises more than those of 99 % of tokens"),
            "roles": ("text", "roles by the tests, comma-separated; empty: none"),
            "prefix": ("floats", "attention to the token after the first copy of 1, 2, ... repeated tokens"),
            "prefix_low": ("floats", "lower ends of 95 % intervals"),
            "prefix_high": ("floats", "upper ends"),
            "prefix_null": ("floats", "the same before anything is copied"),
        },
    ),
    "catalogue": Schema(
        _WEIGHTS,
        {
            "n_features": ("int", "features with any weight in this head"),
            **_measure("effective_features", "exp(entropy) of the head's weights over features"),
            **_measure("effective_families", "exp(entropy) of its weights over families"),
            **_measure("largest", "share of its weights in the largest family"),
            "top": ("ints", "the heaviest latents, most first"),
            "top_in_one": ("int", "of them, those of the commonest family among them"),
        },
    ),
    "clusters": Schema(
        {**_WEIGHTS, "family": ("text", "(source class, output class), as `source > output`")},
        {
            "n": ("int", "features of the family with any weight in this head"),
            "share": ("float", "of the head's weights"),
            "latents": ("ints", "the heaviest of them, most first"),
        },
    ),
    "ablation": Schema(
        {"kind": ("text", "what stands in the place of a head's z"), "latent": ("int", "live latents, rising")},
        {
            "n_active": ("int", "active tokens"),
            "off": ("by head", "share of them at which the feature is off when the head is ablated"),
            "retained": ("by head", "summed activation left there, as a share of what it was"),
            "undecided": ("by head", "share of them at which rounding could change that"),
        },
    ),
    "turned_off": Schema(
        {
            **_HEAD,
            "kind": ("text", "what stands in the place of the head's z"),
            "rule": ("text", "when a feature counts as off: at every token, most tokens, or for most activation"),
            "family": (
                "text",
                "which features: live (all), own (those whose largest DFA share is the head's), "
                "selected (decoder share of the head >= 0.6), induction (by the composite test)",
            ),
        },
        _measure("off", "share of these features that are off when the head is ablated; null: of the other heads"),
    ),
    "ablated": Schema(
        {**_HEAD, "kind": ("text", "what stands in the place of the head's z")},
        {
            "n_tokens": ("int", "text tokens read"),
            "n_clean": ("int", "activations there, the model as it is"),
            "n_lost": ("int", "of them, off when the head is ablated"),
            "n_gained": ("int", "activations that there are only then"),
            "firing": ("ints", "latents outside of `family` most often active under ablation"),
            "lost": ("ints", "latents outside of it that lose most active tokens"),
            "by_dfa": ("ints", "latents outside of it with most positive DFA of the head"),
            "family": ("text", "what is left out: induction (by the composite test), or nothing"),
        },
    ),
    "measures_induction": _MEASURES,
    "measures_superposition": _MEASURES,
    "rules": Schema(
        {"head": ("int", "head of the SAE's layer whose decoder share is the score")},
        {
            "n": ("int", "features"),
            "n_true": ("int", "induction features among them, by the composite test"),
            "threshold": ("floats", "decoder shares, falling; at each, features with this share or more are chosen"),
            "true_rate": ("floats", "of the induction features, the share chosen"),
            "false_rate": ("floats", "of the others, the share chosen"),
            **_measure("auc", "area under that curve"),
            "at": ("float", "the post's threshold"),
            **_measure("precision", "of the features chosen there, the share of induction features"),
            **_measure("recall", "of the induction features, the share chosen there"),
        },
    ),
    "concentration": Schema(
        {
            "weights": ("text", "definition of shares by head"),
            "of": ("text", "features, or a kind of directions without meaning"),
        },
        {
            "n": ("int", "how many"),
            "top": ("ints", "how many have their largest share in each of 20 equal bins from 0 to 1"),
            "participation": ("floats", "quantiles 0, 0.1, ... 1 of 1 / sum share^2"),
        },
    ),
}
"""Every table by name."""


def add_head_table(
    index: "FeatureIndex", name: str, rows: Sequence[Mapping[str, Any]] | pa.Table, provenance: Mapping[str, Any]
) -> Path:
    """Write a table of heads, replacing an existing one of that name.

    Args:
        index: the studied index.
        name: one of `SCHEMAS`.
        rows: by column; missing values are None.
        provenance: JSON with `settings` (the options) and `n` (the sample size). Definitions are the schema's; the
            studied index, the date and the version are added.

    Returns:
        The file.

    Raises:
        IndexFormatError: no such table, or rows that violate its schema.
        OutputError: it cannot be written.
    """
    schema = _schema(name)
    try:
        table = (
            pa.Table.from_pylist(list(rows), schema.arrow) if isinstance(rows, Sequence) else rows.cast(schema.arrow)
        )
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise _refused(f"{name}: {error}", "columns of the types of its schema") from error
    _check(name, table, index.manifest)
    definitions = {column: said for column, (_, said) in schema.columns.items()}
    path = index.folder / FOLDER / f"{name}.parquet"
    write_with_origin(index, path, table, {**provenance, "definitions": definitions}, list(definitions))
    return path


def read_head_table(folder: str | Path, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table of the heads of the index in a folder, and its provenance.

    Raises:
        IndexFormatError: no such table, a damaged one, or one of another index.
    """
    folder = Path(folder)
    _schema(name)
    if name not in head_tables(folder):
        raise IndexFormatError(
            f"no table {name!r} of heads in {folder}",
            expected=f"one of {', '.join(head_tables(folder)) or 'none: its heads were not studied'}",
            do="run `headscope study heads` on this index first",
        )
    manifest = read_manifest(folder)
    table, provenance = read_with_origin(folder / FOLDER / f"{name}.parquet", manifest)
    _check(name, table, manifest)
    return table, provenance


def head_tables(folder: Path) -> tuple[str, ...]:
    """Return the names of the existing tables."""
    paths = (folder / FOLDER).glob("*.parquet")
    return tuple(sorted(p.stem for p in paths if p.stem in SCHEMAS and p.is_file() and not p.is_symlink()))


def _schema(name: str) -> Schema:
    if name not in SCHEMAS:
        raise _refused(f"a table {name!r} of heads", f"one of {', '.join(SCHEMAS)}")
    return SCHEMAS[name]


def _check(name: str, table: pa.Table, manifest: Mapping[str, Any]) -> None:
    """Check column types, unique keys, finite values, and head and latent bounds."""
    schema = SCHEMAS[name]
    if not table.schema.equals(schema.arrow):
        raise _refused(f"{name} with columns {table.schema.to_string()}", schema.arrow.to_string())
    keys = table.select(list(schema.key))
    if any(column.null_count for column in keys.columns) or len(keys.group_by(keys.column_names).aggregate([])) < len(
        keys
    ):
        raise _refused(f"{name} with a row twice, or without its key", f"{', '.join(schema.key)} once each")
    for column, (kind, _) in schema.columns.items():
        _check_numbers(f"{name}.{column}", table[column].combine_chunks(), kind, manifest["model"]["n_heads"])
    bounds = {"layer": manifest["model"]["n_layers"], "head": manifest["model"]["n_heads"]}
    bounds |= dict.fromkeys(("latent", "latents", "firing", "lost", "by_dfa"), manifest["sae"]["d_sae"])
    bounds |= {"top": manifest["sae"]["d_sae"]} if name == "catalogue" else {}
    for column in schema.columns.keys() & bounds.keys():
        values = table[column].combine_chunks()
        numbers = (values.flatten() if pa.types.is_list(values.type) else values).to_numpy(zero_copy_only=False)
        if not ((numbers >= 0) & (numbers < bounds[column])).all():
            raise _refused(f"{name}.{column} out of range", f"0 to {bounds[column] - 1}")


def _check_numbers(what: str, values: pa.Array, kind: Type, n_heads: int) -> None:
    """Check that lists have no nulls, per-head lists have one value per head, and floats are finite."""
    if pa.types.is_list(values.type):
        lengths = pc.list_value_length(values).drop_null()  # pyright: ignore[reportAttributeAccessIssue]
        if kind == "by head" and set(lengths.to_pylist()) - {n_heads}:
            raise _refused(f"{what} of other heads", f"{n_heads} numbers each")
        values = values.flatten()
        if kind != "by head" and values.null_count:
            raise _refused(f"{what} holds a null", "lists of numbers")
    if pa.types.is_floating(values.type) and not np.isfinite(values.drop_null().to_numpy()).all():
        raise _refused(f"{what} holds NaN or infinity", "null where there is no number")


def _refused(got: str, expected: str) -> IndexFormatError:
    return IndexFormatError(got, expected=expected, do="run `headscope study heads` again")
