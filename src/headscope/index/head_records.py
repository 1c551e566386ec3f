"""Results of studies of heads, as records read from the tables of an index. No torch, no model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from headscope.errors import IndexFormatError
from headscope.index.head_table import ROLES, head_tables, read_head_table
from headscope.index.reading import read_manifest
from headscope.names import local
from headscope.stats import Estimate, Measure


@dataclass(frozen=True)
class RoleScore:
    """One score of a head with its nulls."""

    role: str
    value: float
    low: float | None
    high: float | None
    even: float | None
    """For a head that attends uniformly; for copying, from a random table."""
    null: float | None
    """For this head with all weights shuffled: mean, and maximum."""
    null_high: float | None
    p: float | None
    definition: str


@dataclass(frozen=True)
class PrefixCurve:
    """Induction attention by the number of repeated tokens, 1, 2, ..."""

    attention: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Intervals; empty where there are none."""
    null: tuple[float, ...]
    """Before any token is repeated."""


@dataclass(frozen=True)
class HeadScore:
    """Scores of one head on repeated random tokens."""

    layer: int
    head: int
    scores: tuple[RoleScore, ...]
    """Measured scores, a subset of `head_table.ROLES`."""
    roles: tuple[str, ...]
    """Roles that the tests assign to it."""
    prefix: PrefixCurve


@dataclass(frozen=True)
class StoredCluster:
    """Features of one head in one family."""

    family: str
    n: int
    share: float
    latents: tuple[int, ...]


@dataclass(frozen=True)
class StoredCard:
    """Number of functions of one head of the SAE's layer, by one weighting of its features."""

    layer: int
    head: int
    weights: str
    n_features: int
    effective_features: Measure
    effective_families: Measure
    largest: Measure
    clusters: tuple[StoredCluster, ...]
    """Largest share first."""
    top: tuple[int, ...]
    top_in_one: int


@dataclass(frozen=True)
class FeatureAblation:
    """What remains of one feature when each head of its layer is ablated; None where undefined."""

    kind: str
    latent: int
    n_active: int
    off: tuple[float | None, ...]
    retained: tuple[float | None, ...]
    undecided: tuple[float | None, ...]


@dataclass(frozen=True)
class TurnedOff:
    """The share of a family of features that ablating a head silences, by one rule."""

    layer: int
    head: int
    kind: str
    rule: str
    family: str
    off: Measure


@dataclass(frozen=True)
class AblatedHead:
    """Features that fire on some blocks when a head is ablated, and the features outside of a family that it makes."""

    layer: int
    head: int
    kind: str
    n_tokens: int
    n_clean: int
    n_lost: int
    n_gained: int
    firing: tuple[int, ...]
    lost: tuple[int, ...]
    by_dfa: tuple[int, ...]
    family: str
    """Family that the lists exclude."""


@dataclass(frozen=True)
class StoredConcentration:
    """Concentration of features, or of null directions, on few heads."""

    weights: str
    of: str
    n: int
    top: tuple[int, ...]
    """Counts by largest share, in 20 equal bins from 0 to 1."""
    participation: tuple[float, ...]
    """Quantiles 0, 0.1, ... 1."""


@dataclass(frozen=True)
class StoredRule:
    """The post's selection by the decoder share of one head, compared with the composite test."""

    head: int
    n: int
    n_true: int
    """Induction features, out of n."""
    at: float
    """The post's threshold."""
    threshold: tuple[float, ...]
    """Descending; the next two are the ROC curve."""
    true_rate: tuple[float, ...]
    false_rate: tuple[float, ...]
    auc: Measure
    precision: Measure
    recall: Measure


_BY = {
    "dfa": "squared DFA",
    "dfa_covariance": "covariance of DFA",
    "dfa_mean": "mean DFA",
    "decoder": "decoder norm",
    "decoder_out": "decoder norm in the residual stream",
    "encoder": "encoder norm",
    "encoder_in": "encoder norm in the residual stream",
}
_JOINTLY = {
    "redundant": "off with all heads that make it ablated, on with any one",
    "and": "off with any one of them ablated",
    "some": "off with some one of them ablated, not with any",
    "not needed": "on with all of them ablated",
    "opposed": "on with all of them ablated, off with some one",
}


def in_words(measure: str) -> str:
    """Return the readable name of a superposition measure, which tables name after its columns."""
    by = measure.removeprefix("several heads by ")
    return f"several heads by {_BY.get(by, by)}" if by != measure else _JOINTLY.get(measure, measure)


class HeadTables:
    """Results of studies of heads of an index; each table is read on first use."""

    def __init__(self, folder: str | Path) -> None:
        """Open the tables of the index in a folder.

        Raises:
            IndexFormatError: no index.
        """
        self.folder = local(folder)
        self._manifest = read_manifest(self.folder)
        self._held: dict[str, tuple[pa.Table, dict[str, Any]]] = {}

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the existing tables; empty where the heads were not studied."""
        return head_tables(self.folder)

    def provenance(self, name: str) -> dict[str, Any]:
        """Return settings, definitions of all columns, n and date of a table.

        Raises:
            IndexFormatError: no such table, or one that is damaged or of another index.
        """
        return self._read(name)[1]

    @cached_property
    def scores(self) -> tuple[HeadScore, ...]:
        """Return the scores of all heads of all layers, by layer and head.

        Raises:
            IndexFormatError: as in `provenance`.
        """
        table, said = self._read("scores")
        return tuple(
            _score(row, said["definitions"])
            for row in _rows(table.sort_by([("layer", "ascending"), ("head", "ascending")]))
        )

    def score(self, layer: int, head: int) -> HeadScore:
        """Return the scores of one head.

        Raises:
            IndexFormatError: no such head, or as in `provenance`.
        """
        for found in self.scores:
            if (found.layer, found.head) == (layer, head):
                return found
        raise self._no_head(layer, head)

    def cards(self, weights: str = "dfa") -> tuple[StoredCard, ...]:
        """Return the catalogue of the heads of the SAE's layer, by one weighting of features.

        Raises:
            IndexFormatError: weights that were not catalogued, or as in `provenance`.
        """
        table, said = self._read("catalogue")
        ways = sorted(set(table["weights"].to_pylist()))
        if weights not in ways:
            raise IndexFormatError(f"weights {weights!r}", expected=f"one of {', '.join(ways)}", do="name one of these")
        clusters = self._read("clusters")[0]
        clusters = _where(clusters, "weights", weights).sort_by([("share", "descending")])
        of_head: dict[int, list[StoredCluster]] = {}
        for row in _rows(clusters):
            of_head.setdefault(row["head"], []).append(
                StoredCluster(row["family"], row["n"], row["share"], tuple(row["latents"]))
            )
        own = _where(table, "weights", weights).sort_by("head")
        return tuple(_card(row, of_head.get(row["head"], []), said["definitions"]) for row in _rows(own))

    def card(self, head: int, weights: str = "dfa") -> StoredCard:
        """Return the catalogue entry of one head of the SAE's layer.

        Raises:
            IndexFormatError: no such head, or as in `cards`.
        """
        for card in self.cards(weights):
            if card.head == head:
                return card
        raise self._no_head(int(self._manifest["layer"]), head)

    def ablation(self, latent: int) -> tuple[FeatureAblation, ...]:
        """Return what remains of a feature under each head's ablation, one record per kind; none for a dead one.

        Raises:
            IndexFormatError: as in `provenance`.
        """
        table = self._read("ablation")[0]
        return tuple(
            FeatureAblation(
                row["kind"], row["latent"], row["n_active"], *(tuple(row[n]) for n in ("off", "retained", "undecided"))
            )
            for row in _rows(_where(table, "latent", latent))
        )

    def ablation_matrix(self, kind: str = "mean", column: str = "retained") -> Float[np.ndarray, "latent head"]:
        """Return features x heads of one kind of ablation: `retained` or `off`; NaN where undefined.

        Raises:
            IndexFormatError: no such kind or column, or as in `provenance`.
        """
        table = self._read("ablation")[0]
        kinds = sorted(set(table["kind"].to_pylist()))
        if kind not in kinds or column not in ("off", "retained", "undecided"):
            raise IndexFormatError(
                f"{column!r} under {kind!r} ablation",
                expected=f"off, retained or undecided under {', '.join(kinds)}",
                do="name one of these",
            )
        own = _where(table, "kind", kind)
        n_heads = int(self._manifest["model"]["n_heads"])
        whole = np.full((int(self._manifest["sae"]["d_sae"]), n_heads), np.nan)
        values = own[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        whole[own["latent"].to_numpy()] = values.astype(np.float64).reshape(-1, n_heads)
        return whole

    def turned_off(self, head: int | None = None) -> tuple[TurnedOff, ...]:
        """Return how many features of each family are silenced by ablating a head; of all heads when None.

        Raises:
            IndexFormatError: as in `provenance`.
        """
        table, said = self._read("turned_off")
        own = table if head is None else _where(table, "head", head)
        return tuple(
            TurnedOff(
                **{name: row[name] for name in ("layer", "head", "kind", "rule", "family")},
                off=measure_of(row, "off", said["definitions"]["off"]),
            )
            for row in _rows(own)
        )

    def ablated(self, head: int) -> AblatedHead:
        """Return the features that fire when a head of the SAE's layer is ablated.

        Raises:
            IndexFormatError: no such head, or as in `provenance`.
        """
        table = self._read("ablated")[0]
        for row in _rows(_where(table, "head", head)):
            cells: dict[str, Any] = row | {name: tuple(row[name]) for name in ("firing", "lost", "by_dfa")}
            return AblatedHead(**cells)
        raise self._no_head(int(self._manifest["layer"]), head)

    def measures(self, study: str) -> dict[str, Measure]:
        """Return the measures of the whole dictionary by name: of `induction`, or of `superposition`.

        Raises:
            IndexFormatError: a study without any, or as in `provenance`.
        """
        path = f"measures_{study}"
        if path not in ("measures_induction", "measures_superposition"):
            raise IndexFormatError(f"measures of {study!r}", expected="induction or superposition", do="name one")
        return {row["measure"]: measure_of(row, "value", row["definition"]) for row in _rows(self._read(path)[0])}

    def rules(self) -> tuple[StoredRule, ...]:
        """Compare the post's rule, by the decoder share of a head, with the composite test: one record per head.

        Raises:
            IndexFormatError: as in `provenance`.
        """
        table, said = self._read("rules")
        words = said["definitions"]
        return tuple(
            StoredRule(
                *(row[name] for name in ("head", "n", "n_true", "at")),
                *(tuple(row[name]) for name in ("threshold", "true_rate", "false_rate")),
                *(measure_of(row, name, words[name]) for name in ("auc", "precision", "recall")),
            )
            for row in _rows(table)
        )

    def concentration(self) -> tuple[StoredConcentration, ...]:
        """Return largest shares and participation, of features and of their nulls.

        Raises:
            IndexFormatError: as in `provenance`.
        """
        table = self._read("concentration")[0]
        return tuple(
            StoredConcentration(row["weights"], row["of"], row["n"], tuple(row["top"]), tuple(row["participation"]))
            for row in _rows(table)
        )

    def lines(self) -> list[str]:
        """Return a summary as text.

        Raises:
            IndexFormatError: as in `provenance`.
        """
        found = []
        for score in self.scores:
            if score.roles:
                told = {of.role: of for of in score.scores}
                roles = (f"{name} {told[name].value:.2f} (null {told[name].null:.2f})" for name in score.roles)
                found.append(f"head {score.layer}.{score.head}: {', '.join(roles)}")
        for card in self.cards():
            of_head = [off for off in self.turned_off(card.head) if (off.kind, off.rule) == ("mean", "most tokens")]
            off = next(off.off for off in of_head if off.family == "own")
            largest = f"{card.clusters[0].family} {card.largest}" if card.clusters else "no family"
            found.append(
                f"head {card.layer}.{card.head}: {card.effective_features.value or 0:.0f} effective features; largest "
                f"family {largest}; its own features off when ablated: {off}"
            )
        return found + [f"{in_words(name)}: {measure}" for name, measure in self.measures("superposition").items()]

    def _read(self, name: str) -> tuple[pa.Table, dict[str, Any]]:
        if name not in self._held:
            self._held[name] = read_head_table(self.folder, name)
        return self._held[name]

    def _no_head(self, layer: int, head: int) -> IndexFormatError:
        model = self._manifest["model"]
        return IndexFormatError(
            f"head {layer}.{head}",
            expected=f"one of {model['n_heads']} heads, from 0, of {model['n_layers']} layers; features are of layer "
            f"{self._manifest['layer']}",
            do="name another head",
        )


def measure_of(row: Mapping[str, Any], name: str, definition: str) -> Measure:
    """Read the measure written by `head_table.measure_row`."""
    null = row[f"{name}_null"]
    return Measure(
        definition,
        row[f"{name}_n"],
        value=row[name],
        low=row[f"{name}_low"],
        high=row[f"{name}_high"],
        interval=row[f"{name}_interval"],
        null=None if null is None else Estimate(null, row[f"{name}_null_low"], row[f"{name}_null_high"]),
        missing=row[f"{name}_missing"],
    )


def _where(table: pa.Table, column: str, value: Any) -> pa.Table:
    """Return the rows with a value in a column."""
    return table.filter(np.array([own == value for own in table[column].to_pylist()], dtype=bool))


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist()


def _score(row: dict[str, Any], definitions: Mapping[str, str]) -> HeadScore:
    parts = ("low", "high", "even", "null", "null_high", "p")
    return HeadScore(
        row["layer"],
        row["head"],
        tuple(
            RoleScore(name, row[name], *(row[f"{name}_{part}"] for part in parts), definition=definitions[name])
            for name in ROLES
            if row[name] is not None
        ),
        tuple(role for role in (row["roles"] or "").split(", ") if role),
        PrefixCurve(*(tuple(row[name] or ()) for name in ("prefix", "prefix_low", "prefix_high", "prefix_null"))),
    )


def _card(row: dict[str, Any], clusters: list[StoredCluster], definitions: Mapping[str, str]) -> StoredCard:
    names = ("effective_features", "effective_families", "largest")
    return StoredCard(
        row["layer"],
        row["head"],
        row["weights"],
        row["n_features"],
        *(measure_of(row, name, definitions[name]) for name in names),
        clusters=tuple(clusters),
        top=tuple(row["top"]),
        top_in_one=row["top_in_one"],
    )
