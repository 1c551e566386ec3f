"""Heads of an index: the features they make, those they share, and the results of studies.

Shares of features are the index's own. Scores on repeated random tokens, the catalogue and ablations are read from the
tables that `headscope study heads` writes into it (`index.head_records`); for a missing one, the page names the
command. No torch, no model.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from headscope.encode import Json, encode, short, significant
from headscope.errors import IndexFormatError
from headscope.explorer.families import INDUCTION, member_of
from headscope.index.head_records import HeadScore, HeadTables, PrefixCurve, StoredCard, in_words
from headscope.index.head_table import ROLES, SCHEMAS
from headscope.index.store import FeatureIndex

CONTRIBUTES = 0.1
"""Minimum share of squared DFA for a head to contribute to a feature, as in `studies.heads.superposition`."""
WEIGHTS = ("dfa", "decoder")
"""Weightings of a head's features that a page shows side by side."""
_TOP = 25  # features in a list
_SHARED = 12  # features in a list of those shared by two heads
_BINS = 20
_DIGITS = 4
_CLUSTERS = 12
_COUNTS = ("kind", "family", "n_tokens", "n_clean", "n_lost", "n_gained")
_READINGS = ("firing", "lost", "by_dfa")
_COMMAND = "headscope study heads INDEX"


class IndexHeads:
    """The heads of one index; tables that studies add while it is open are included."""

    def __init__(self, index: FeatureIndex) -> None:
        """Show an index."""
        self._index = index
        self._layer: int = index.manifest["layer"]

    def heads(self) -> Json:
        """Return every head of every layer, with its scores where they were measured."""
        model = self._index.manifest["model"]
        found = self._section("scores", lambda tables: {"of": {(s.layer, s.head): s for s in tables.scores}})
        scores: dict[tuple[int, int], HeadScore] = found.pop("of", {})
        made = self._made
        return {
            "layer": self._layer,
            "n_features": int(self._live.sum()),
            "scores": {
                **found,
                "roles": [{"name": name, "definition": SCHEMAS["scores"].columns[name][1]} for name in ROLES],
            },
            "superposition": self._section("measures_superposition", _superposition),
            "layers": [
                [
                    {
                        "name": f"{layer}.{h}",
                        "scores": _scores(scores.get((layer, h))),
                        "roles": list(scores[layer, h].roles) if (layer, h) in scores else [],
                        "made": {name: int(count[h]) for name, count in made.items()} if layer == self._layer else None,
                    }
                    for h in range(model["n_heads"])
                ]
                for layer in range(model["n_layers"])
            ],
        }

    def head(self, name: str) -> Json:
        """Return one head: its scores, and in the SAE's layer also its features.

        Raises:
            KeyError: there is no such head.
        """
        layer, head = self._parse(name)
        made: Json = {"name": name, "layer": layer, "head": head, "of_layer": self._layer}
        made["scores"] = self._section("scores", lambda tables: _scored(tables, layer, head))
        if layer != self._layer:
            return made | {"features": None}
        return made | {
            "features": self._features(head),
            "shared": self._shared(head),
            "families": self._families(head),
            "catalogue": self._section("catalogue", lambda tables: _catalogued(tables, head)),
            "ablation": self._section("turned_off", lambda tables: self._ablated(tables, head)),
        }

    def _parse(self, name: str) -> tuple[int, int]:
        model = self._index.manifest["model"]
        layer, dot, head = name.partition(".")
        whole = all(part.isascii() and part.isdigit() and len(part) < 6 for part in (layer, head))
        if not (dot and whole and int(layer) < model["n_layers"] and int(head) < model["n_heads"]):
            last = f"{model['n_layers'] - 1}.{model['n_heads'] - 1}"
            raise KeyError(f"heads are named layer.head, 0.0 to {last}")
        if name != f"{int(layer)}.{int(head)}":
            raise KeyError(f"the name of this head is {int(layer)}.{int(head)}")
        return int(layer), int(head)

    def _section(self, table: str, make: Callable[[HeadTables], Json]) -> Json:
        """Return the stored data, or what is missing and the command that adds it."""
        tables = HeadTables(self._index.folder)
        if table not in tables.tables:
            return {"missing": f"Not measured: this index has no table {table!r} of heads.", "command": _COMMAND}
        try:
            return {"missing": None, **make(tables)}
        except IndexFormatError as error:
            return {"missing": f"The table {table!r} of heads is refused: {error.got}.", "command": _COMMAND}

    # -------------------------------------------------------------------------------------------- what the index knows
    @property
    def _table(self) -> pa.Table:
        return self._index.table()

    @cached_property
    def _live(self) -> Bool[np.ndarray, " latent"]:
        return self._table["n_active"].to_numpy() > 0

    @cached_property
    def _shares(self) -> dict[str, Float[np.ndarray, "latent head"]]:
        """Shares of live features; 0 for dead ones, which no list has."""
        return {name: np.nan_to_num(self._index.shares[name]) * self._live[:, None] for name in WEIGHTS}

    @cached_property
    def _made(self) -> dict[str, Int[np.ndarray, " head"]]:
        """Live features by the head with the largest share of them."""
        live = np.flatnonzero(self._live)
        n = self._index.n_heads
        return {name: np.bincount(of[live].argmax(1), minlength=n) for name, of in self._shares.items()}

    def _features(self, head: int) -> Json:
        """Return the features with the largest shares of this head, one list per weighting."""
        live = np.flatnonzero(self._live)
        lists = {}
        for name, shares in self._shares.items():
            own = shares[live, head]
            order = live[np.argsort(-own, kind="stable")][:_TOP]
            counts, _ = np.histogram(own, bins=_BINS, range=(0, 1))
            lists[name] = {"n": int(self._made[name][head]), "histogram": counts.tolist(), **self._rows(order, head)}
        top = {name: shares[live].argmax(1) == head for name, shares in self._shares.items()}
        return {"n": len(live), "n_both": int((top["dfa"] & top["decoder"]).sum()), "lists": lists}

    def _rows(self, latents: Int[np.ndarray, " n"], head: int) -> Json:
        """Return a list's data on features, by column."""
        known = self._table.take(latents)
        return {
            "latent": latents.tolist(),
            "token": known["top_logit"].to_pylist(),
            "source": known["top_source"].to_pylist(),
            "n_active": known["n_active"].to_pylist(),
            **{name: significant(self._shares[name][latents, head], _DIGITS) for name in WEIGHTS},
            "families": [member_of(self._table, latent) for latent in latents.tolist()],
        }

    def _shared(self, head: int) -> Json:
        """Return the features shared with another head, by other head; most first."""
        makes = self._shares["dfa"] >= CONTRIBUTES
        own = makes[:, head]
        others = []
        for other in range(self._index.n_heads):
            both = np.flatnonzero(own & makes[:, other]) if other != head else np.zeros(0, dtype=np.int64)
            if len(both):
                least = self._shares["dfa"][both][:, [head, other]].min(1)
                first = both[np.argsort(-least, kind="stable")][:_SHARED]
                others.append({"head": f"{self._layer}.{other}", "n": len(both), "latents": first.tolist()})
        alone = int((own & (makes.sum(1) == 1)).sum())
        others.sort(key=lambda found: -found["n"])
        return {"n": int(own.sum()), "alone": alone, "least": CONTRIBUTES, "others": others}

    def _families(self, head: int) -> Json:
        """Count the kinds of features of which this head has the largest share, as far as studies determined them."""
        own = np.flatnonzero(self._live & (self._shares["dfa"].argmax(1) == head))
        names = self._table.column_names
        counts: dict[str, int] = {}
        if f"{INDUCTION}.verdict" in names:
            counts[INDUCTION] = sum(map(bool, self._table[f"{INDUCTION}.verdict"].take(own).to_pylist()))
        kinds: dict[str, int] = {}
        if "proxies.kind" in names:
            for kind in self._table["proxies.kind"].take(own).to_pylist():
                kinds[kind or "too rare"] = kinds.get(kind or "too rare", 0) + 1
        ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
        return {"n": len(own), "verdicts": counts, "kinds": ordered}

    # --------------------------------------------------------------------------------------------- what studies stored
    def _ablated(self, tables: HeadTables, head: int) -> Json:
        said = tables.provenance("turned_off")
        turned = [
            {"kind": t.kind, "rule": t.rule, "family": t.family, "off": encode(t.off)} for t in tables.turned_off(head)
        ]
        kinds = list(dict.fromkeys(row["kind"] for row in turned))
        words = {name: SCHEMAS["turned_off"].columns[name][1] for name in ("kind", "rule", "family")}
        return {
            "turned_off": turned,
            "definitions": words | {name: SCHEMAS["ablation"].columns[name][1] for name in ("off", "retained")},
            "lost": {kind: self._most_lost(tables, kind, head) for kind in kinds},
            "fires": self._section("ablated", lambda own: self._fires(own, head)),
            "n": str(said["n"]),
            "created": said["created"],
        }

    def _most_lost(self, tables: HeadTables, kind: str, head: int) -> Json:
        """Return the features most suppressed, most frequent first, and how much of all features remains."""
        retained, off = (tables.ablation_matrix(kind, column)[:, head] for column in ("retained", "off"))
        known = np.flatnonzero(np.isfinite(retained))
        n_active = self._table["n_active"].to_numpy()[known]
        order = known[np.lexsort((known, -n_active, np.round(retained[known], 3)))][:_TOP]
        counts, _ = np.histogram(np.clip(retained[known], 0, 1), bins=_BINS, range=(0, 1))
        numbers = {"retained": significant(retained[order], _DIGITS), "off": significant(off[order], _DIGITS)}
        return {"n": len(known), "histogram": counts.tolist(), **self._rows(order, head), **numbers}

    def _fires(self, tables: HeadTables, head: int) -> Json:
        """Return the features that fire when the head is ablated, and those outside of a family by several rules."""
        found = tables.ablated(head)
        counts = {name: getattr(found, name) for name in _COUNTS}
        readings = {name: self._rows(np.array(getattr(found, name), dtype=np.int64), head) for name in _READINGS}
        words = {name: SCHEMAS["ablated"].columns[name][1] for name in _READINGS}
        return {**counts, "readings": readings, "definitions": words}


def _superposition(tables: HeadTables) -> Json:
    said = tables.provenance("measures_superposition")
    measures = {in_words(name): encode(measure) for name, measure in tables.measures("superposition").items()}
    return {"measures": measures, "n": str(said["n"]), "created": said["created"]}


def _scored(tables: HeadTables, layer: int, head: int) -> Json:
    found, said = tables.score(layer, head), tables.provenance("scores")
    return {
        "rows": [{name: _rounded(value) for name, value in vars(score).items()} for score in found.scores],
        "roles": list(found.roles),
        "prefix": _prefix(found.prefix),
        "n": str(said["n"]),
        "created": said["created"],
    }


def _catalogued(tables: HeadTables, head: int) -> Json:
    said = tables.provenance("catalogue")
    by = {weights: _card(tables.card(head, weights)) for weights in WEIGHTS}
    return {"by": by, "n": str(said["n"]), "created": said["created"]}


def _scores(found: HeadScore | None) -> Json | None:
    if found is None:
        return None
    return {score.role: {name: _rounded(getattr(score, name)) for name in ("value", "p")} for score in found.scores}


def _rounded(value: Any) -> Any:
    return short(value, _DIGITS) if isinstance(value, float) else value


def _prefix(curve: PrefixCurve) -> Json:
    return {name: significant(list(values), _DIGITS) if values else [] for name, values in vars(curve).items()}


def _card(card: StoredCard) -> Json:
    names = ("effective_features", "effective_families", "largest")
    shown = [{"family": c.family, "n": c.n, "share": short(c.share), "latents": list(c.latents)} for c in card.clusters]
    return {
        "n_features": card.n_features,
        "measures": {name: encode(getattr(card, name)) for name in names},
        "n_families": len(card.clusters),
        "clusters": shown[:_CLUSTERS],
        "top": list(card.top),
        "top_in_one": card.top_in_one,
    }
