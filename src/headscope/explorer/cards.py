"""Convert an index to the page's data: records in, JSON-able dictionaries out. No torch."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import pyarrow as pa

from headscope.encode import Json, short, significant
from headscope.errors import IndexFormatError
from headscope.explorer.answers import NothingThereError
from headscope.explorer.examples import LEAN, WHOLE, example_runs, examples_json
from headscope.explorer.families import member_of
from headscope.index.config import QUANTILES
from headscope.index.excerpts import corpus_json, text_runs
from headscope.index.records import DrawnGroup, Feature, Shares, Sources
from headscope.index.store import FeatureIndex
from headscope.names import shown
from headscope.sae.quality_table import quality_rows

_MAX_SOURCES = 10  # source tokens of a card
_FIRST = ("top", "random")  # the groups that a card shows first
_TABLE_DIGITS = 4

_GROUP_LABELS = {
    "top": "strongest, each text once",
    "random": "drawn at random from all active tokens",
    "quantile": "quantile {number} of active tokens, strongest first",
    "interval": "interval {number} of equal width",
    "threshold": "weakest active tokens",
}


class IndexCards:
    """A `CardSource` of one index."""

    def __init__(self, index: FeatureIndex) -> None:
        """Show an index."""
        self._index = index
        manifest = index.manifest
        self._block_size: int = manifest["corpus"]["block_size"]
        self._heads = [f"{manifest['layer']}.{h}" for h in range(manifest["model"]["n_heads"])]

    def about(self) -> Json:
        """Return the description and provenance of the index."""
        m = self._index.manifest
        model = shown(m["model"])
        return {
            "format": m["format_version"],
            "title": f"{model['name']} · {m['site']}",
            "site": m["site"],
            "model": model,
            "sae": {"kind": m["sae"]["architecture"]} | shown(m["sae"]),
            "corpus": shown(m["corpus"]),
            "heads": self._heads,
            "n_alive": m["n_alive"],
            "n_dead": m["sae"]["d_sae"] - m["n_alive"],
            "l0": m["l0"],
            "quality": [vars(row) for row in quality_rows(m["quality"])] if m["quality"] else [],
            "nulls": self._nulls(),
            "definitions": m["definitions"],
            "created": m["created"],
            "version": m["headscope"],
        }

    def _nulls(self) -> list[Json]:
        """Return the top head's share of DFA for null directions, by kind of null."""
        shares: dict[str, list[float]] = {}
        for null in self._index.nulls():
            if null.dfa is not None:
                shares.setdefault(null.kind, []).append(float(null.dfa.max()))
        return [
            {"kind": kind, "top_head_share": significant(np.sort(own), 3), "range": significant(_range(own), 3)}
            for kind, own in shares.items()
        ]

    def vocab(self) -> Json:
        """Return token bytes as strings of characters 0 to 255."""
        texts = self._index.token_texts
        content, special = texts.vocabulary
        own = {"special": special, "byte_tokens": texts.byte_tokens, "prefix": texts.prefix.decode()}
        return {"tokens": [b.decode("latin-1") for b in content], **own}

    def table(self) -> Json:
        """Return one row per latent, by column."""
        table = self._index.table()
        shown = [name for name in table.column_names if "." not in name or name in _STUDY_COLUMNS]
        rows = {name: _values(table[name]) for name in shown}
        for name in ("top_head", "decoder_head"):
            rows[name] = [None if h is None else self._heads[h] for h in rows[name]]
        rows["alive"] = [n > 0 for n in rows["n_active"]]
        words = self._index.manifest["definitions"]
        columns = [column | {"definition": column["definition"] or words[column["name"]]} for column in _COLUMNS]
        added = self._study_columns(table)
        listed, others = [[c for c in added if c["listed"] == yes] for yes in (True, False)]
        sort = next(name for name in _SORTS if name in rows)
        return {"columns": [*columns[:1], *listed, *columns[1:], *others], "rows": rows, "sort": f"-{sort}"}

    def _study_columns(self, table: pa.Table) -> list[Json]:
        """Return the columns of studies shown in the list and the dashboard's axes, in the studies' terms."""
        made = []
        for name, (label, kind, listed) in _STUDY_COLUMNS.items():
            study, column = name.split(".")
            if name in table.column_names:
                definition = self._index.study(study)[1]["definitions"][column]
                made.append(_column(name, label, kind, definition, listed=listed))
        return made

    def feature(self, latent: int, *, lean: bool = False) -> Json:
        """Return the card of one latent; a lean one, for a file, omits detail from all but top and random examples.

        Raises:
            NothingThereError: no such latent.
        """
        try:
            feature = self._index.feature(latent)
        except IndexFormatError as error:
            raise NothingThereError(str(error)) from error
        groups, examples = self._index.example_columns(latent)
        size = self._block_size
        runs = example_runs(examples, size)
        number = {position: i for i, position in enumerate(examples.position.tolist())}
        first = {number[position] for group in groups if group.kind in _FIRST for position in group.positions}
        brief = np.array([lean and i not in first for i in range(len(examples))], dtype=bool)
        thresholds = self._index.manifest["thresholds"] if feature.alive else []
        found = [self._index.sources(latent, threshold) for threshold in thresholds]
        return {
            "latent": latent,
            "alive": feature.alive,
            "stats": self._stats(feature),
            "histogram": _histogram(feature),
            "heads": _heads(feature.shares),
            "families": member_of(self._index.table(), latent),
            "logits": _logits(feature),
            "copying": {"top": _pairs(feature.copy_top), "rank": short(feature.copy_rank)},
            "sources": [_sources(sources) for sources in found if sources is not None],
            "correlated": [[c.latent, *significant([c.pearson, c.decoder_cosine], 3)] for c in feature.correlated],
            "bias": short(feature.bias, 6),
            "residual": short(float(np.abs(examples.residual).max()) if len(examples) else None, 1),
            "examples": examples_json(examples, runs, brief, size, LEAN if lean else WHOLE),
            "groups": [_group(group, number) for group in groups],
            **corpus_json(text_runs((examples.position // size).tolist(), runs), self._index),
        }

    def context(self, block: int) -> Json:
        """Return all tokens of one block, in the form of a card's text.

        Raises:
            NothingThereError: no such block.
        """
        if not 0 <= block < self._index.n_blocks:
            raise NothingThereError(f"blocks 0 to {self._index.n_blocks - 1}")
        return corpus_json({block: [(0, self._block_size)]}, self._index)

    def stamp(self) -> Hashable:
        """Return a value that changes when a study adds to the index, the only change possible."""
        return self._index.stamp()

    def _stats(self, feature: Feature) -> Json:
        n_tokens = self._index.manifest["corpus"]["n_tokens"]
        moments = (feature.mean, feature.std, feature.skew, feature.kurtosis, feature.maximum)
        names = ("mean", "std", "skew", "kurtosis", "max")
        quantiles = [] if feature.quantiles is None else significant(feature.quantiles)
        return {
            "n_tokens": n_tokens,
            "n_active": feature.n_active,
            "density": short(feature.density),
            "density_interval": significant(feature.density_interval, 3),
            "density_upper95": None if feature.alive else 3 / n_tokens,
            **{name: short(value, 6) for name, value in zip(names, moments, strict=True)},
            "quantiles": [list(q) for q in zip(QUANTILES, quantiles, strict=True)] if quantiles else [],
        }


def _range(values: list[float]) -> list[float]:
    return np.quantile(values, (0.05, 0.5, 0.95)).tolist()


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Convert a column to JSON; floats rounded, missing and non-finite values None."""
    if not pa.types.is_floating(column.type):
        return column.to_pylist()
    return significant(column.to_numpy(), _TABLE_DIGITS)


def _histogram(feature: Feature) -> Json | None:
    if feature.histogram is None or feature.mass is None:
        return None
    return {"counts": feature.histogram.tolist(), "mass": significant(feature.mass)}


def _heads(shares: Shares) -> Json:
    """Convert shares by head; None where the feature is never active."""
    rows = {"dfa": shares.dfa, "dfa_cov": shares.dfa_covariance, "dfa_mean": shares.dfa_mean}
    weights = ("decoder", "decoder_out", "encoder", "encoder_in")
    rows |= {name: getattr(shares, name) for name in weights}
    return {
        **{name: None if row is None else significant(row) for name, row in rows.items()},
        "disagreement": short(shares.disagreement, 3),
        "participation": short(shares.participation, 3),
    }


def _logits(feature: Feature) -> Json:
    names = ("mean", "std", "skew", "kurtosis")
    moments = significant([getattr(feature, f"logit_{name}") for name in names])
    return {"top": _pairs(feature.logit_top), "bottom": _pairs(feature.logit_bottom)} | dict(
        zip(names, moments, strict=True)
    )


def _pairs(pairs: tuple[tuple[int, float], ...]) -> list[list[Any]]:
    values = significant([value for _, value in pairs])
    return [[token, value] for (token, _), value in zip(pairs, values, strict=True)]


def _sources(sources: Sources) -> Json:
    """Convert source tokens to columns; lists by head within."""
    tokens = sources.tokens[:_MAX_SOURCES]
    numbers = {"share": "share", "linear": "share_linear", "frequency": "frequency"}
    by_head = {"by_head": "share_by_head", "attention": "attention", "elsewhere": "attention_elsewhere"}
    return {
        "threshold": sources.threshold,
        "n_active": sources.n_active,
        "kept": short(sources.kept, 3),
        "bos": short(sources.bos_share, 3),
        "token": [t.token for t in tokens],
        "n": [t.n for t in tokens],
        **{name: significant([getattr(t, field) for t in tokens], 3) for name, field in numbers.items()},
        "kept_by_head": significant(sources.kept_by_head, 3),
        **{name: significant([getattr(t, field) for t in tokens], 3) for name, field in by_head.items()},
    }


def _group(group: DrawnGroup, number: dict[int, int]) -> Json:
    return {
        "kind": group.kind,
        "index": group.number,
        "label": _GROUP_LABELS[group.kind].format(number=group.number + 1),
        "lo": short(group.low),
        "hi": short(group.high),
        "n": group.n,
        "share_active": short(group.share_active),
        "share_mass": short(group.share_mass),
        "examples": [number[position] for position in group.positions],
        "same": list(group.duplicates),
    }


def _column(name: str, label: str, kind: str, definition: str = "", *, listed: bool = True) -> Json:
    """Make a column of the table; without a definition, the index defines it under the column's name."""
    return {"name": name, "label": label, "kind": kind, "definition": definition, "listed": listed}


_STUDY_COLUMNS = {
    "proxies.kind": ("kind", "text", True),
    "proxies.precision": ("proxy precision", "percent", False),
    "proxies.recall": ("proxy recall", "percent", False),
    "proxies.pearson": ("proxy Pearson", "float", False),
    "effects.importance": ("loss effect", "float", True),
    "effects.top_share": ("effect on top logit", "percent", False),
}
"""Columns of studies in the table: label, kind and whether the list shows them; cards show all."""

_SORTS = ("effects.importance", "n_active")
"""Default sort keys of the list, descending: the first that the index has is used."""

_COLUMNS = [
    _column("latent", "id", "int", "index of the dictionary entry"),
    _column("alive", "alive", "bool", "active on at least one token of the corpus", listed=False),
    _column("top_logit", "top logit", "token", "the token whose logit the feature raises most by the direct path"),
    _column("top_source", "top source", "token", "source token with the largest share of squared DFA"),
    _column("density", "density", "percent"),
    _column("n_active", "tokens", "int", "tokens on which the feature is active"),
    _column("maximum", "max", "float", "largest activation in the corpus"),
    _column("mean", "mean", "float", "mean activation over active tokens", listed=False),
    _column("std", "std", "float", "standard deviation of the activation over active tokens", listed=False),
    _column("skew", "skew", "float", "skewness of the activation over active tokens", listed=False),
    _column("kurtosis", "kurtosis", "float", "kurtosis of the activation; of a normal distribution 3", listed=False),
    _column("top_head", "head", "head", "the head with the largest share of squared DFA"),
    _column("top_head_share", "DFA share", "percent", "that head's share of squared DFA over active tokens"),
    _column("participation", "heads", "float", listed=False),
    _column("decoder_head", "dec. head", "head", "the head with the largest norm in the decoder row"),
    _column("decoder_share", "dec. share", "percent", "that head's share of the decoder norms", listed=False),
    _column("disagreement", "apart", "percent"),
    _column("top_logit_value", "logit", "float", "logit per unit of activation; final norm's scale left out"),
    _column("top_source_share", "src share", "percent", "share of squared DFA of the top source token"),
    _column("copy_rank", "copy rank", "percent"),
    _column("bias", "bias", "float", listed=False),
]
