"""Read an index: records for Python, SQL for everything else. No torch, no model.

An index folder is untrusted: nothing in it is executed, nothing outside it is read, and its manifest is validated
against its tables.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from headscope.artefact import Fingerprinted, Stamp, file_hash, stamp_of
from headscope.errors import IndexFormatError
from headscope.index.columns import FOLDER as COLUMNS
from headscope.index.columns import read_columns, studies
from headscope.index.config import CARRIED
from headscope.index.consistency import check_counts, disagreements
from headscope.index.database import Database
from headscope.index.head_table import FOLDER as HEADS
from headscope.index.reading import (
    TABLES,
    ActivationRows,
    LatentRows,
    TokenBlocks,
    check_files,
    flat,
    matrix,
    read_manifest,
    read_own,
    reading,
)
from headscope.index.records import (
    Activations,
    DrawnGroup,
    ExampleColumns,
    ExampleGroup,
    Feature,
    Null,
    Shares,
    Sources,
)
from headscope.index.rows import (
    activations_of,
    drawn_groups,
    example_columns,
    feature_of,
    groups_of,
    null_of,
    sources_of,
    taken,
)
from headscope.index.schema import Sizes, check_footers
from headscope.index.token_texts import TokenTexts
from headscope.limits import NameOrPath, check
from headscope.sae.quality_table import quality_rows

P = ParamSpec("P")
R = TypeVar("R")


def _of_folder(reader: "Callable[Concatenate[FeatureIndex, P], R]") -> "Callable[Concatenate[FeatureIndex, P], R]":
    """Wrap a reading method: any exception means that the folder is damaged."""

    @wraps(reader)
    def reads(index: "FeatureIndex", *arguments: P.args, **named: P.kwargs) -> R:
        with reading(index.folder):
            return reader(index, *arguments, **named)

    return reads


class FeatureIndex:
    """An index folder opened for reading; thread-safe."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Private; use `FeatureIndex.open`."""
        self.folder, self.manifest = folder, manifest
        self._sizes = Sizes.of(manifest)
        names = check_files(folder, manifest)
        check_footers(folder, names, self._sizes)
        parts = [folder / name for name in names if name.startswith("activations/")]
        self._studies: dict[str, tuple[Stamp, pa.Table, dict[str, Any]]] = {}
        self._studied_table: tuple[Stamp, pa.Table] | None = None
        self._features = read_own(folder / "features.parquet", self._sizes)
        self._activations = ActivationRows(parts, self._features["n_active"].to_numpy(), self._sizes)
        self._examples, self._groups, self._sources, self._source_totals = (
            LatentRows(folder / f"{name}.parquet", self._sizes)
            for name in ("examples", "groups", "sources", "source_totals")
        )
        self.token_texts = TokenTexts(folder, manifest, self._sizes)
        self._tokens = TokenBlocks(folder / "tokens.parquet", self.block_size, self._sizes, self.token_texts)
        tables: dict[str, Any] = {name: [folder / f"{name}.parquet"] for name in TABLES} | {"activations": parts}
        self._database = Database(tables | self.token_texts.respelled, {"tokens": self._tokens.derived})
        self._check_meaning()

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureIndex":
        """Open an index.

        Files are checked for their presence and size; `verify` also reads them.

        Raises:
            IndexFormatError: there is none, it is unfinished, damaged, or of another version.
        """
        folder = Path(check("index", folder, NameOrPath, IndexFormatError))
        with reading(folder):
            return cls(folder, read_manifest(folder))

    def verify(self) -> None:
        """Read all files, including the copy of the SAE, and check checksums and the consistency of the tables.

        Raises:
            IndexFormatError: a check fails; the error names the files.
        """
        digests: dict[str, tuple] = {name: (digest,) for name, (_, digest) in self.manifest["files"].items()}
        carried, sae = f"{CARRIED}/sae_weights.safetensors", self.manifest["sae"]
        if (self.folder / carried).is_file():
            digests[carried] = (sae["hash"], sae.get("carried"))
        damaged = [name for name, known in digests.items() if file_hash(self.folder / name) not in known]
        if damaged:
            raise IndexFormatError(
                f"{self.folder}: {', '.join(damaged)} changed after being written",
                expected="the checksums of manifest.json",
                do="build the index again, or copy it again",
            )
        with reading(self.folder):
            if wrong := disagreements(lambda query: self._database.select(query, None, {}, None), self.manifest):
                raise ValueError("; ".join(wrong))

    def check_same(
        self, *, model: Fingerprinted | None = None, sae_hash: str | None = None, sae_name: str = ""
    ) -> None:
        """Reject a model or an SAE other than those the index was built with; its own copy of the SAE is the same.

        Args:
            model: a model.
            sae_hash: hash of an SAE's weights.
            sae_name: its name in errors.

        Raises:
            IndexFormatError: a hash differs; the error names it.
        """
        sae = self.manifest["sae"]
        if model is not None and not model.matches(self.manifest["model"]["hash"]):
            raise self._other("model", model.fingerprint())
        if sae_hash is not None and sae_hash not in (sae["hash"], sae.get("carried")):
            raise self._other("sae", f"{sae_name} ({sae_hash})" if sae_name else sae_hash)

    def _other(self, what: str, given: str) -> IndexFormatError:
        own, word = self.manifest[what], "SAE" if what == "sae" else what
        return IndexFormatError(
            f"{word} {given}",
            expected=f"the {word} with which {self.folder} was built: {own['name']} ({own['hash']})",
            do=f"name that {word} with --{what}, or build an index with this one",
        )

    def _check_meaning(self) -> None:
        """Validate the manifest's statements about the tables: a wrong count must not yield a wrong number."""
        check_counts(self.manifest, self._features)
        if not self._tokens.end_with_blocks():
            raise ValueError(f"blocks that are not of {self.block_size} tokens")
        if self._source_totals.of(0)["threshold"].to_pylist() != self.manifest["thresholds"]:
            raise ValueError(f"other thresholds than {self.manifest['thresholds']}")
        if self.manifest["quality"] is not None:
            quality_rows(self.manifest["quality"])
        most = int(
            np.argmax(self._features["n_active"].to_numpy())
        )  # open each reader once: missing parts of a footer are found here, not on first use
        for read in (self.feature, self.examples, self.sources, self.activations):
            read(most)
        self.tokens_of(0)

    def sql(self, query: str, parameters: list[Any] | None = None, *, seconds: float | None = 60.0) -> pa.Table:
        """Run one query over the views named in docs/index-format.md: tokens, features, activations, sources, ...

        Columns of studies are there as `<study>_columns`. The query reads the files of this index and no others, and
        writes none. DuckDB does not verify the checksums of pages; `verify` does.

        Args:
            query: one SELECT.
            parameters: values for its `?`.
            seconds: time limit; None for no limit.

        Raises:
            IndexFormatError: it is not one query, exceeds the limit, or DuckDB cannot run it.
        """
        columns = {f"{study}_columns": own for study, own in tuple(self._studied())}
        return self._database.select(query, parameters, columns, seconds)

    def preload(self) -> None:
        """Preload the data of feature records, as far as it fits the cache.

        Raises:
            IndexFormatError: it is damaged.
        """
        for rows in (self._source_totals, self._groups, self._sources, self._examples):
            rows.preload()

    # -------------------------------------------------------------------------------------------------------- features
    @property
    def n_latents(self) -> int:
        """Latents of the SAE, including dead ones."""
        return int(self.manifest["sae"]["d_sae"])

    @property
    def n_heads(self) -> int:
        """Heads of the layer."""
        return int(self.manifest["model"]["n_heads"])

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.manifest["corpus"]["block_size"])

    @property
    def n_blocks(self) -> int:
        """Blocks of the corpus."""
        return int(self.manifest["corpus"]["n_blocks"])

    def check_latent(self, latent: int) -> None:
        """Raise IndexFormatError when the SAE has no such latent."""
        _check_number("latent", latent, self.n_latents)

    @_of_folder
    def feature(self, latent: int) -> Feature:
        """Return the record of one latent, without examples and source tokens.

        Raises:
            IndexFormatError: no such latent.
        """
        self.check_latent(latent)
        row = {name: self._features[name][latent].as_py() for name in self._features.column_names}
        return feature_of(row, int(self.manifest["corpus"]["n_tokens"]))

    @_of_folder
    def sources(self, latent: int, threshold: float | None = None) -> Sources | None:
        """Return the source tokens that carry a feature's DFA, over its active tokens above a threshold of the index.

        Args:
            latent: the feature.
            threshold: one of `manifest["thresholds"]`; default: the first, 0.

        Returns:
            None when the feature is never active above the threshold.

        Raises:
            IndexFormatError: no such latent, or the index was built without this threshold.
        """
        self.check_latent(latent)
        thresholds = self.manifest["thresholds"]
        chosen = thresholds[0] if threshold is None else threshold
        if chosen not in thresholds:
            raise IndexFormatError(
                f"threshold {chosen}",
                expected=f"one of {', '.join(map(str, thresholds))}",
                do="build the index with it: headscope index --thresholds",
            )
        return sources_of(self._source_totals.of(latent), self._sources.of(latent), chosen)

    @_of_folder
    def activations(self, latent: int) -> Activations:
        """Return every active token of a feature.

        Raises:
            IndexFormatError: no such latent.
        """
        self.check_latent(latent)
        return activations_of(self._activations.of(latent), self.n_heads)

    def each_latent(self) -> Iterator[tuple[int, Activations]]:
        """Yield every latent with its active tokens, including dead ones: for studies of the whole dictionary.

        The activations are read once, in order, one latent in memory at a time.

        Raises:
            IndexFormatError: they are damaged.
        """
        for latent, table in enumerate(self._activations.each()):
            yield latent, activations_of(table, self.n_heads)

    @_of_folder
    def examples(self, latent: int) -> tuple[ExampleGroup, ...]:
        """Return the example groups of a feature, in the order of its card; empty for a dead one.

        Raises:
            IndexFormatError: no such latent.
        """
        return groups_of(*self.example_columns(latent))

    @_of_folder
    def example_columns(self, latent: int) -> tuple[tuple[DrawnGroup, ...], ExampleColumns]:
        """Return the same by column: the groups, and their distinct examples, in the order of first use.

        Raises:
            IndexFormatError: no such latent.
        """
        self.check_latent(latent)
        examples = example_columns(self._examples.of(latent), self.n_heads)
        groups = drawn_groups(latent, self._groups.of(latent), examples.position)
        row = {position: i for i, position in enumerate(examples.position.tolist())}
        named = dict.fromkeys(position for group in groups for position in group.positions)
        return groups, taken(examples, np.array([row[position] for position in named], dtype=np.int64))

    @cached_property
    @_of_folder
    def shares(self) -> dict[str, Float[np.ndarray, "latent head"]]:
        """Return each share of `Shares` for every latent; NaN where undefined."""
        return {
            field.name: matrix(self._features[column], self.n_heads)
            for field in fields(Shares)
            for column in (field.name if field.name.startswith("dfa_") else f"{field.name}_share",)
        }

    @_of_folder
    def nulls(self) -> tuple[Null, ...]:
        """Return the null directions, matched in density with features: the control of `Shares`."""
        rows = read_own(self.folder / "nulls.parquet", self._sizes).to_pylist()
        return tuple(null_of(row) for row in rows)

    # ----------------------------------------------------------------------------------------------------------- table
    @cached_property
    @_of_folder
    def _table(self) -> pa.Table:
        f = self._features
        n_heads = self.manifest["model"]["n_heads"]
        dfa, decoder = matrix(f["dfa_share"], n_heads), matrix(f["decoder_share"], n_heads)
        live = ~np.isnan(dfa).any(1)
        head, own = np.argmax(np.nan_to_num(dfa), axis=1), np.argmax(decoder, axis=1)
        rows, logits = np.arange(len(dfa)), np.stack(f["logit_top_tokens"].to_numpy())
        with np.errstate(invalid="ignore"):
            participation, disagreement = 1 / (dfa**2).sum(1), np.abs(dfa - decoder).sum(1) / 2
        sources = self.sql(
            """SELECT latent, arg_max(token, share) AS token, max(share) AS share FROM sources
            WHERE threshold = 0 GROUP BY latent"""
        )
        source, share = np.full(len(rows), -1), np.full(len(rows), np.nan)
        source[sources["latent"].to_numpy()] = sources["token"].to_numpy()
        share[sources["latent"].to_numpy()] = sources["share"].to_numpy()
        plain = ("n_active", "density", "mean", "std", "maximum", "skew", "kurtosis", "copy_rank", "bias")
        return pa.table(
            {
                "latent": f["latent"],
                **{name: f[name] for name in plain},
                "top_head": pa.array(head, pa.int32(), mask=~live),
                "top_head_share": pa.array(dfa[rows, head], mask=~live),
                "participation": pa.array(participation, mask=~live),
                "disagreement": pa.array(disagreement, mask=~(live & decoder.any(1))),
                "decoder_head": pa.array(own, pa.int32()),
                "decoder_share": decoder[rows, own],
                "top_logit": pa.array(logits[:, 0].astype(np.int32)),
                "top_logit_value": np.stack(f["logit_top_values"].to_numpy())[:, 0],
                "top_source": pa.array(source, pa.int32(), mask=source < 0),
                "top_source_share": pa.array(share, mask=source < 0),
                "logit_tokens": pa.array(list(logits[:, :10].astype(np.int32))),
                "example_tokens": f["example_tokens"],
            }
        )

    def table(self) -> pa.Table:
        """Return one row per latent, with the columns of a feature list, and those of studies as `<study>.<column>`.

        Columns that are damaged or of another index are skipped, with a warning. Columns that studies write while the
        index is open are included.
        """
        stamp = stamp_of(self.folder / COLUMNS)
        if self._studied_table is None or self._studied_table[0] != stamp:
            table = self._table
            for study, own in self._studied():
                for name in own.column_names[1:]:
                    table = table.append_column(f"{study}.{name}", own[name])
            self._studied_table = stamp, table
            return table
        return self._studied_table[1]

    def _studied(self) -> Iterator[tuple[str, pa.Table]]:
        for study in studies(self.folder):
            try:
                yield study, self.columns(study)
            except IndexFormatError as error:
                warnings.warn(f"columns of {study} are left out: {error}", stacklevel=3)

    def columns(self, study: str) -> pa.Table:
        """Return the columns that a study added, one row per latent; `study` also returns its provenance.

        Raises:
            IndexFormatError: no such study, or of another index.
        """
        return self.study(study)[0]

    def study(self, study: str) -> tuple[pa.Table, dict[str, Any]]:
        """Return a study's columns, one row per latent, and its provenance; a file is reread once it has changed.

        Raises:
            IndexFormatError: no such study, or of another index.
        """
        stamp = stamp_of(self.folder / COLUMNS / f"{study}.parquet")
        held = self._studies.get(study)
        if held is None or held[0] != stamp:
            held = self._studies[study] = (stamp, *read_columns(self.folder, study))
        return held[1:]

    def stamp(self) -> Hashable:
        """Return a value that changes when a study adds or rewrites columns."""
        return tuple(stamp_of(self.folder / name) for name in (COLUMNS, HEADS))

    def search(
        self,
        *,
        token: str | int | None = None,
        head: int | None = None,
        min_share: float = 0.0,
        min_density: float = 0.0,
        max_density: float = 1.0,
    ) -> tuple[int, ...]:
        """Return live latents that meet all conditions, largest share first.

        Args:
            token: a token among its ten top logits, its source tokens or the tokens of its top examples; an id, or its
                exact text, including a leading space.
            head: the head of `min_share`; default: the top head of each feature.
            min_share: minimum share of squared DFA of that head.
            min_density: minimum share of active tokens.
            max_density: maximum, likewise.

        Raises:
            IndexFormatError: no such token or head.
        """
        dfa = matrix(self._features["dfa_share"], self.manifest["model"]["n_heads"])
        if head is not None:
            _check_number("head", head, dfa.shape[1])
        share = dfa.max(1) if head is None else dfa[:, head]
        density = self._features["density"].to_numpy()
        with np.errstate(invalid="ignore"):
            found = (share >= min_share) & (density > 0) & (density >= min_density) & (density <= max_density)
        if token is not None:
            token = self.token_id(token) if isinstance(token, str) else token
            _check_number("token", token, self.manifest["model"]["d_vocab"])
            found &= self._mentions(token)
        chosen = np.flatnonzero(found)
        return tuple(chosen[np.argsort(-share[chosen], kind="stable")].tolist())

    def _mentions(self, token: int) -> np.ndarray:
        """Mark the latents with a token among their logits, sources or examples."""
        sources = self.sql("SELECT DISTINCT latent FROM sources WHERE token = ?", [token])["latent"].to_numpy()
        found = np.zeros(self.n_latents, dtype=bool)
        found[sources] = True
        for name in ("logit_tokens", "example_tokens"):
            values, offsets = flat(self._table[name])
            owner = np.repeat(np.arange(self.n_latents), np.diff(offsets))
            found[owner[values == token]] = True
        return found

    # ---------------------------------------------------------------------------------------------------------- corpus
    def tokens_of(self, block: int) -> Int[np.ndarray, " position"]:
        """Return the token ids of one block.

        Raises:
            IndexFormatError: no such block.
        """
        return self._block(block, "token")

    def documents_of(self, block: int) -> Int[np.ndarray, " position"]:
        """Return the document number of each token of one block.

        Raises:
            IndexFormatError: no such block.
        """
        return self._block(block, "document")

    def _block(self, block: int, column: str) -> np.ndarray:
        _check_number("block", block, self.n_blocks)
        return self._tokens.of(block, column)

    def each_blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the corpus, some blocks at a time: `token`, `document`, `is_text`, `starts`, each [block, position].

        `starts` marks the start of a separately tokenised text. 17M tokens stay in memory, 10 bytes each.
        """
        return self._tokens.each()

    @cached_property
    @_of_folder
    def documents(self) -> list[str]:
        """Return the names of the documents."""
        return read_own(self.folder / "documents.parquet", self._sizes)["name"].to_pylist()

    @property
    def vocabulary(self) -> tuple[list[bytes], list[int]]:
        """Return each token's bytes, and the ids of the special tokens."""
        return self.token_texts.vocabulary

    def token_id(self, text: str) -> int:
        """Look up a token as `TokenTexts.token_id` does."""
        return self.token_texts.token_id(text)


def _check_number(what: str, number: int, n: int) -> None:
    if not isinstance(number, (int, np.integer)) or not 0 <= number < n:
        raise IndexFormatError(
            f"{what} {number}", expected=f"a whole number from 0 to {n - 1}", do=f"pass another {what}"
        )
