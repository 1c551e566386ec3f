"""Schema of the index files, and the checks before a folder is read. No torch.

A column name means the same in every table (docs/index-format.md), so that one list by name defines its type, whether
it may be null, and the bounds of its numbers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headscope.index.config import N_BINS, N_COPY, N_LOGITS, QUANTILES

_FIELDS: dict[type, str] = {
    str: "headscope created site z_convention dtype model.name model.hash sae.name sae.hash sae.architecture "
    "corpus.name corpus.split corpus.hash definitions.density definitions.participation definitions.disagreement "
    "definitions.copy_rank definitions.bias",
    int: "layer n_alive n_pairs model.n_layers model.n_heads model.d_head model.d_model model.d_vocab sae.d_in "
    "sae.d_sae corpus.n_tokens corpus.n_blocks corpus.block_size corpus.n_documents",
    float: "l0",
    list: "thresholds",
    dict: "plan files",
}
"""Fields of manifest.json, by type."""

_KINDS = {
    "integers": "latent position token document offset next_token number n n_active",
    "numbers": "loss activation pre bias residual low high density mean std skew kurtosis maximum logit_mean logit_std "
    "logit_skew logit_kurtosis copy_rank threshold kept bos_share share share_linear frequency share_active share_mass",
    "string": "name kind",
    "binary": "bytes",
    "bool": "special sampled is_text byte_token",
    "lists of integers": "copy_tokens correlated_latents example_tokens duplicates source active_at histogram "
    "positions logit_top_tokens logit_bottom_tokens",
    "lists of numbers": "dfa_share dfa_covariance dfa_mean decoder_share decoder_out_share encoder_share "
    "encoder_in_share quantiles mass logit_top_values logit_bottom_values copy_values correlated_pearson "
    "correlated_cosine share_by_head attention attention_elsewhere kept_by_head bos_share_by_head heads source_heads "
    "source_pattern rest active_value",
}
COLUMNS = {name: kind for kind, names in _KINDS.items() for name in names.split()}
"""Type of each column; `head_0` and so on hold numbers. Others are for later versions, and ignored."""

_NULLABLE = (
    "next_token loss mean std skew kurtosis maximum dfa_share dfa_covariance dfa_mean quantiles histogram mass "
    "copy_tokens copy_values copy_rank kept bos_share"
)
_BY_HEAD = (
    "dfa_share dfa_covariance dfa_mean decoder_share decoder_out_share encoder_share encoder_in_share share_by_head "
    "attention attention_elsewhere kept_by_head bos_share_by_head heads rest"
)
_PAIRED = {
    "correlated_pearson": "correlated_latents",
    "correlated_cosine": "correlated_latents",
    "duplicates": "positions",
    "source_pattern": "source_heads",
    "active_value": "active_at",
}
"""Columns of lists, each with the length of another column's lists."""

_MAY_LACK = "share_linear share_by_head kept_by_head bos_share_by_head attention_elsewhere"
"""Columns of numbers that are NaN, or infinite, where the divisor of a share is 0; all others are finite."""
_SHARES = (
    "density frequency dfa_share decoder_share decoder_out_share encoder_share encoder_in_share copy_rank kept "
    "bos_share share share_by_head kept_by_head bos_share_by_head attention "
    "attention_elsewhere source_pattern"
)
_ROUNDING = 1e-3
"""Tolerance by which a share may exceed 1, or fall below 0."""

_EXPANSION, _SMALL = 512, 1 << 27
"""Maximum expansion factor of a file (what a build writes: 1 to 8 times), and a size in bytes allowed in any case."""


def check_manifest(manifest: dict[str, Any]) -> None:
    """Validate the fields of the manifest.

    Raises:
        ValueError: one is missing or of another type, a count is negative, or it cannot be sent as JSON.
    """
    json.dumps(manifest, allow_nan=False, ensure_ascii=False).encode()
    for kind, names in _FIELDS.items():
        for name in names.split():
            value: Any = manifest
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if type(value) is not kind or (kind is int and value < 0):
                raise ValueError(f"manifest.json says {name} = {str(value)[:50]!r}")


@dataclass(frozen=True)
class Sizes:
    """Bounds of index columns, and lengths of lists."""

    rows: dict[str, int]
    """Rows of each table where known; of all activations together."""
    below: dict[str, int]
    """By column, the upper bound (exclusive) of its numbers; none is negative."""
    lengths: dict[str, int]
    """By column, the length of its lists."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Sizes":
        """Read the sizes from a manifest."""
        corpus, n_heads = manifest["corpus"], manifest["model"]["n_heads"]
        d_vocab, d_sae = manifest["model"]["d_vocab"], manifest["sae"]["d_sae"]
        n_positions = corpus["n_blocks"] * corpus["block_size"]
        below = [
            (d_sae, "latent correlated_latents"),
            (d_vocab, "token next_token logit_top_tokens logit_bottom_tokens copy_tokens example_tokens"),
            (n_positions, "position positions"),
            (corpus["n_documents"], "document"),
            (corpus["block_size"], "source active_at"),
            (corpus["n_tokens"] + 1, "n_active histogram"),
        ]
        lengths = [
            (n_heads, _BY_HEAD),
            (len(QUANTILES), "quantiles"),
            (N_BINS, "histogram mass"),
            (min(N_LOGITS, d_vocab), "logit_top_tokens logit_top_values logit_bottom_tokens logit_bottom_values"),
            (min(N_COPY, d_vocab), "copy_tokens copy_values"),
        ]
        return cls(
            rows={
                "features": d_sae,
                "tokens": n_positions,
                "vocabulary": d_vocab,
                "documents": corpus["n_documents"],
                "source_totals": d_sae * len(manifest["thresholds"]),
                "activations": manifest["n_pairs"],
            },
            below=_by_name(below),
            lengths=_by_name(lengths),
        )

    def check(self, table: pa.Table) -> pa.Table:
        """Validate a table, or the part of it that was read, and return it.

        Raises:
            ValueError: a value is missing, out of bounds, not finite, not a share, or of another length.
        """
        for name in table.column_names:
            column = one_array(table[name])
            if column.null_count and name in COLUMNS and name not in _NULLABLE.split():
                raise ValueError(f"{name} is missing in {column.null_count} rows")
            if isinstance(column, pa.ListArray):
                lengths = column.value_lengths()
                if name in self.lengths and (lengths.drop_null().to_numpy() != self.lengths[name]).any():
                    raise ValueError(f"{name} with other than {self.lengths[name]} numbers")
                if name in _PAIRED and not lengths.equals(one_array(table[_PAIRED[name]]).value_lengths()):
                    raise ValueError(f"{name} and {_PAIRED[name]} of different lengths")
                column = column.flatten()
                if column.null_count:
                    raise ValueError(f"{name} with missing numbers")
            if name in self.below:
                numbers = column.drop_null().to_numpy()
                if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.below[name]:
                    raise ValueError(f"{name} from {numbers.min()} to {numbers.max()}, of {self.below[name]}")
            if pa.types.is_floating(column.type):
                _check_numbers(name, column.drop_null().to_numpy())
        return table


def _check_numbers(name: str, numbers: np.ndarray) -> None:
    if name in _MAY_LACK.split():
        numbers = numbers[np.isfinite(numbers)]
    elif not np.isfinite(numbers).all():
        raise ValueError(f"{name} with {numbers[~np.isfinite(numbers)][0]}")
    if name in _SHARES.split() and len(numbers) and not -_ROUNDING <= numbers.min() <= numbers.max() <= 1 + _ROUNDING:
        raise ValueError(f"{name} from {numbers.min():g} to {numbers.max():g}, of shares")


def one_array(column: pa.ChunkedArray) -> Any:
    """Return a column as one contiguous array."""
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _by_name(groups: list[tuple[int, str]]) -> dict[str, int]:
    return {name: number for number, names in groups for name in names.split()}


def check_footers(folder: Path, names: list[str], sizes: Sizes) -> None:
    """Validate the footers of the tables against the manifest and their own size, before their data is read.

    Raises:
        ValueError: other columns or another number of rows, or more data than plausible for the file size.
    """
    found = dict.fromkeys(sizes.rows, 0)
    for name in names:
        metadata = read_footer(folder / name)
        for field in metadata.schema.to_arrow_schema():
            own = _kind(field.type)
            expected = "numbers" if field.name.startswith("head_") else COLUMNS.get(field.name, own)
            if own != expected:
                raise ValueError(f"{field.name} in {name} is {field.type}, not {expected}")
        table = name.split("/")[0].removesuffix(".parquet")
        if table in found:
            found[table] += metadata.num_rows
    for table, rows in found.items():
        if rows != sizes.rows[table]:
            raise ValueError(f"{rows:,} {table} in the tables, {sizes.rows[table]:,} in the manifest")


def read_footer(path: Path) -> pq.FileMetaData:
    """Read the footer of a Parquet file, with a plausibility check of its content against the file size.

    Raises:
        ValueError: it is implausible.
        OSError, pyarrow.ArrowException: it is not a Parquet file.
    """
    metadata = pq.read_metadata(path)
    rows, counts, unpacked = 0, [], 0
    in_lists = [i for i in range(metadata.num_columns) if metadata.schema.column(i).max_repetition_level]
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        of_lists = [group.column(i).num_values for i in in_lists]
        values = group.num_rows * metadata.num_columns + sum(of_lists)
        rows += group.num_rows
        counts += [group.num_rows, *of_lists]
        unpacked += max(8 * values, group.total_byte_size)
    if min(counts, default=0) < 0 or rows != metadata.num_rows:
        raise ValueError(f"{path.name} has a footer that cannot be")
    if unpacked > max(_SMALL, _EXPANSION * path.stat().st_size):
        raise ValueError(f"{path.name} would unpack to {unpacked:,} bytes")
    return metadata


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"lists of {_kind(kind.value_type)}"
    if pa.types.is_integer(kind):
        return "integers"
    return "numbers" if pa.types.is_floating(kind) else str(kind)
