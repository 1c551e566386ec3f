"""Read an index: records for Python, SQL for everything else. No torch, no model."""

import glob
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from headscope.artefact import read_json
from headscope.errors import IndexFormatError
from headscope.index.config import FORMAT_VERSION

_TABLES = ("tokens", "documents", "features", "groups", "examples", "vocabulary")


@dataclass(frozen=True)
class Source:
    """One source position of an example."""

    position: int
    """In the block."""
    heads: Float[np.ndarray, " head"]
    """DFA of each head from this source."""


@dataclass(frozen=True)
class Example:
    """One active token of a feature, with its DFA by head and source.

    For each head, the kept sources and the rest sum to `heads`; `heads` and the bias sum to `pre`.
    """

    position: int
    """In the corpus: block number * block size + position in the block."""
    activation: float
    pre: float
    bias: float
    residual: float
    """pre - (sum of all contributions + bias), as it was when written."""
    heads: Float[np.ndarray, " head"]
    sources: tuple[Source, ...]
    """Largest first, by |DFA| summed over heads."""
    rest: Float[np.ndarray, " head"]
    """DFA of each head from all other sources."""
    active_at: Int[np.ndarray, " n"]
    """Positions in the block where this feature is active."""
    active_value: Float[np.ndarray, " n"]
    duplicates: int = 0
    """Other tokens with the same text around them, not shown."""


@dataclass(frozen=True)
class ExampleGroup:
    """Some active tokens of a feature and the examples drawn from them."""

    kind: str
    number: int
    low: float
    high: float
    n: int
    share_active: float
    share_mass: float
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Activations:
    """Every active token of one feature, by position."""

    position: Int[np.ndarray, " n"]
    activation: Float[np.ndarray, " n"]
    heads: Float[np.ndarray, "n head"]
    """DFA of each head, to 14 significant bits."""


class FeatureIndex:
    """An index folder that is open for reading."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Use `FeatureIndex.open`."""
        self.folder, self.manifest = folder, manifest
        self._connection = duckdb.connect()
        self._lock = Lock()
        for name in _TABLES:
            self._create_view(name, f"{glob.escape(str(folder))}/{name}.parquet")
        self._create_view("activations", f"{glob.escape(str(folder))}/activations/*.parquet")

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureIndex":
        """Open an index.

        Raises:
            IndexFormatError: there is none, it is incomplete, or another version wrote it.
        """
        folder = Path(folder)
        try:
            manifest = read_json(folder / "manifest.json")
            found = manifest["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexFormatError(
                f"no index in {folder}: {type(error).__name__} {error}",
                expected="a folder that `headscope index` wrote to its end",
                do="build it with `headscope index`",
            ) from error
        if found != FORMAT_VERSION:
            raise IndexFormatError(f"index format {found}", expected=f"{FORMAT_VERSION}", do="build the index again")
        missing = [f"{n}.parquet" for n in _TABLES if not (folder / f"{n}.parquet").is_file()]
        if missing:
            raise IndexFormatError(
                f"{folder} lacks {', '.join(missing)}", expected="all of its tables", do="build the index again"
            )
        try:
            return cls(folder, manifest)
        except duckdb.Error as error:
            raise IndexFormatError(
                f"{folder} is damaged: {error}", expected="Parquet files", do="build the index again"
            ) from error

    def _create_view(self, name: str, pattern: str) -> None:
        quoted = pattern.replace("'", "''")
        self._connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{quoted}')")

    def sql(self, query: str, parameters: list[Any] | None = None) -> pa.Table:
        """Run a query over the views tokens, documents, features, groups, examples, vocabulary and activations."""
        with self._lock:
            return self._connection.sql(query, params=parameters).to_arrow_table()

    # -------------------------------------------------------------------------------------------------------- features
    @property
    def n_latents(self) -> int:
        """Latents of the SAE, dead ones included."""
        return int(self.manifest["sae"]["d_sae"])

    @cached_property
    def features(self) -> dict[str, list[Any]]:
        """The whole feature table, by column."""
        return pq.read_table(self.folder / "features.parquet").to_pydict()

    def feature(self, latent: int) -> dict[str, Any]:
        """All columns of one latent.

        Raises:
            IndexFormatError: no such latent.
        """
        self._check_latent(latent)
        return {name: column[latent] for name, column in self.features.items()}

    def _check_latent(self, latent: int) -> None:
        if not 0 <= latent < self.n_latents:
            raise IndexFormatError(
                f"latent {latent}", expected=f"0 to {self.n_latents - 1}", do="choose one of the SAE's latents"
            )

    def activations(self, latent: int) -> Activations:
        """Every active token of a feature.

        Raises:
            IndexFormatError: no such latent.
        """
        self._check_latent(latent)
        table = self.sql("SELECT * EXCLUDE (latent) FROM activations WHERE latent = ? ORDER BY position", [latent])
        heads = [table[f"head_{h}"].to_numpy() for h in range(self.manifest["model"]["n_heads"])]
        return Activations(table["position"].to_numpy(), table["activation"].to_numpy(), np.stack(heads, axis=1))

    def examples(self, latent: int) -> tuple[ExampleGroup, ...]:
        """The example groups of a feature, in the order of its card; empty for a dead one.

        Raises:
            IndexFormatError: no such latent.
        """
        self._check_latent(latent)
        rows = self.sql("SELECT * FROM examples WHERE latent = ?", [latent]).to_pylist()
        by_position = {row["position"]: row for row in rows}
        groups = self.sql("SELECT * FROM groups WHERE latent = ?", [latent]).to_pylist()
        return tuple(
            ExampleGroup(
                **{name: g[name] for name in ("kind", "number", "low", "high", "n", "share_active", "share_mass")},
                examples=tuple(
                    _example(by_position[p], d) for p, d in zip(g["positions"], g["duplicates"], strict=True)
                ),
            )
            for g in groups
        )

    # ---------------------------------------------------------------------------------------------------------- corpus
    @cached_property
    def tokens(self) -> Int[np.ndarray, "block position"]:
        """Token ids of the whole corpus."""
        return self._corpus_column("token")

    @cached_property
    def document(self) -> Int[np.ndarray, "block position"]:
        """Document number of each token."""
        return self._corpus_column("document")

    def _corpus_column(self, name: str) -> np.ndarray:
        column = pq.read_table(self.folder / "tokens.parquet", columns=[name])[name].to_numpy()
        return column.reshape(-1, self.manifest["corpus"]["block_size"])

    @cached_property
    def documents(self) -> list[str]:
        """Names of the documents."""
        return pq.read_table(self.folder / "documents.parquet")["document"].to_pylist()

    @cached_property
    def vocabulary(self) -> tuple[list[bytes], list[int]]:
        """Each token's bytes, and the ids of the special tokens."""
        table = pq.read_table(self.folder / "vocabulary.parquet")
        return table["bytes"].to_pylist(), np.flatnonzero(table["special"].to_numpy()).tolist()


def _example(row: dict[str, Any], duplicates: int) -> Example:
    n_heads = len(row["heads"])
    by_source = np.asarray(row["source_heads"], dtype=np.float32).reshape(-1, n_heads)
    return Example(
        **{name: row[name] for name in ("position", "activation", "pre", "bias", "residual")},
        heads=np.asarray(row["heads"], dtype=np.float32),
        sources=tuple(Source(p, h) for p, h in zip(row["source"], by_source, strict=True)),
        rest=np.asarray(row["rest"], dtype=np.float32),
        active_at=np.asarray(row["active_at"], dtype=np.int32),
        active_value=np.asarray(row["active_value"], dtype=np.float32),
        duplicates=duplicates,
    )
