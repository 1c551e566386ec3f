"""Columns that a study adds to an index: one row per latent, in a separate file with provenance.

The index itself never changes. Results of a study for every latent are written to `<index>/columns/<study>.parquet`,
whole or not at all, with provenance as JSON in the file's metadata. Provenance identifies the studied index, so that
columns of another index are rejected. No torch, no model.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headscope.artefact import atomic_write
from headscope.errors import IndexFormatError
from headscope.index.reading import read_manifest, read_table
from headscope.names import local

if TYPE_CHECKING:
    from headscope.index.store import FeatureIndex

FOLDER = "columns"
_KEY = b"headscope"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SAID = ("settings", "definitions", "n")


def add_columns(index: "FeatureIndex", study: str, table: pa.Table, provenance: dict[str, Any]) -> Path:
    """Write a study's results for every latent, replacing earlier ones of the same study.

    Args:
        index: the studied index.
        study: names the file; lower-case letters, digits and underscores, as do the columns.
        table: `latent`, equal to the row number, and the study's columns; missing values are null, never NaN.
        provenance: JSON with `settings` (the options), `definitions` (one line per column) and `n` (the sample size:
            tokens, or the study's own unit). The studied index, the date and the version are added.

    Returns:
        The file.

    Raises:
        IndexFormatError: an invalid name, table or provenance.
        OutputError: it cannot be written.
    """
    _check_name("study", study)
    _check_table(study, table, index.n_latents)
    path = index.folder / FOLDER / f"{study}.parquet"
    write_with_origin(index, path, table, provenance, table.column_names[1:])
    return path


def write_with_origin(
    index: "FeatureIndex", path: Path, table: pa.Table, provenance: dict[str, Any], defined: Sequence[str]
) -> None:
    """Write the result table of a study, whole or not at all, with its provenance in the file's metadata.

    Args:
        index: the studied index.
        path: the file; an existing one is replaced.
        table: the results.
        provenance: as in `add_columns`.
        defined: the columns that must have a definition.

    Raises:
        IndexFormatError: an invalid provenance.
        OutputError: it cannot be written.
    """
    missing = [name for name in _SAID if name not in provenance]
    definitions = provenance.get("definitions", {})
    missing += [f"a definition of {name}" for name in defined if name not in definitions]
    if missing:
        raise _refused(
            f"provenance of {path.stem!r} without {', '.join(missing)}", "settings, definitions of all columns, n"
        )
    whole = provenance | {
        "index": index_identity(index.manifest),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "headscope": version("headscope"),
    }
    try:
        said = json.dumps(whole, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _refused(f"provenance of {path.stem!r}: {error}", "strict JSON, without NaN") from error
    with atomic_write(path) as file:
        pq.write_table(
            table.replace_schema_metadata({_KEY: said.encode()}), file, compression="zstd", write_page_checksum=True
        )


def read_columns(folder: str | Path, study: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read the columns of a study of the index in a folder, and their provenance.

    Raises:
        IndexFormatError: no index, no such study, a damaged file, or columns of another index; the error names the
            difference.
    """
    folder = local(folder)
    _check_name("study", study)
    if study not in studies(folder):
        raise IndexFormatError(
            f"no columns of {study!r} in {folder}",
            expected=f"one of {', '.join(studies(folder)) or 'none: no study was made of it'}",
            do="run the study on this index first",
        )
    path = folder / FOLDER / f"{study}.parquet"
    manifest = read_manifest(folder)
    table, provenance = read_with_origin(path, manifest)
    _check_table(study, table, int(manifest["sae"]["d_sae"]))
    return table, provenance


def read_with_origin(path: Path, manifest: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table that a study added to the index with this manifest, and its provenance.

    Raises:
        IndexFormatError: a damaged file, or a table of another index; the error names the difference.
    """
    table = read_table(path)
    try:
        provenance = json.loads((table.schema.metadata or {})[_KEY])
        found = dict(provenance["index"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(f"{path} does not say where it comes from", "a file that a study wrote") from error
    own = index_identity(manifest)
    other = [name for name, digest in own.items() if found.get(name) != digest]
    if other:
        raise IndexFormatError(
            f"{path} was made of an index with another {', '.join(other)}",
            expected=f"a study of the index in {path.parent.parent} as it is",
            do="run the study again, or remove the file",
        )
    return table, provenance


def studies(folder: Path) -> tuple[str, ...]:
    """Return the studies that have columns, by name."""
    names = [path.stem for path in (folder / FOLDER).glob("*.parquet") if path.is_file() and not path.is_symlink()]
    return tuple(sorted(name for name in names if _NAME.fullmatch(name)))


def index_identity(manifest: dict[str, Any]) -> dict[str, str]:
    """Return the identity of an index: hashes of its model, SAE and corpus, and of its activations."""
    files = sorted((name, digest) for name, (_, digest) in manifest["files"].items() if name.startswith("activations/"))
    activations = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    named = {name: manifest[name]["hash"] for name in ("model", "sae", "corpus")}
    return {**named, "activations": f"sha256:{activations}"}


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise _refused(f"{what} {name!r}", "lower-case letters, digits and underscores, a letter first")


def _check_table(study: str, table: pa.Table, n_latents: int) -> None:
    """Check that there is one row per latent in order, no duplicate column, and finite values in numeric columns."""
    names = table.column_names
    if names[:1] != ["latent"] or table["latent"].to_pylist() != list(range(n_latents)):
        raise _refused(f"columns of {study!r} with {len(table)} rows", f"latent first, from 0 to {n_latents - 1}")
    if len(set(names)) < len(names):
        raise _refused(f"a column of {study!r} twice", "each name once")
    for name in names[1:]:
        _check_name(f"column of {study}:", name)
        column = table[name]
        if pa.types.is_floating(column.type) and not np.isfinite(column.drop_null().to_numpy()).all():
            raise _refused(f"{study}.{name} holds NaN or infinity", "null where there is no number")


def _refused(got: str, expected: str) -> IndexFormatError:
    return IndexFormatError(got, expected=expected, do="write the columns again")
