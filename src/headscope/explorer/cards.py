"""From an index to what the page shows: records in, JSON-able dictionaries out. No torch."""

from typing import Any

import numpy as np
from jaxtyping import Float

from headscope.errors import IndexFormatError
from headscope.explorer.server import Json
from headscope.index.config import N_BINS, QUANTILES
from headscope.index.store import Example, ExampleGroup, FeatureIndex
from headscope.sae.quality_table import quality_rows

_WINDOW = (16, 8)  # tokens shown before and after the destination
_AROUND_TOP_SOURCE = 5
_AROUND_SOURCE = 1

_GROUP_LABELS = {
    "top": "strongest, each text once",
    "random": "drawn at random from all active tokens",
    "quantile": "quantile {number} of active tokens, strongest first",
    "interval": "interval {number} of equal width",
}


class IndexCards:
    """A `CardSource` of one index."""

    def __init__(self, index: FeatureIndex) -> None:
        """Show an index."""
        self._index = index
        manifest = index.manifest
        self._heads = [f"{manifest['layer']}.{h}" for h in range(manifest["model"]["n_heads"])]

    def about(self) -> Json:
        """What is shown and where it comes from."""
        m = self._index.manifest
        return {
            "format": m["format_version"],
            "title": f"{m['model']['name']} · {m['site']}",
            "site": m["site"],
            "model": m["model"],
            "sae": m["sae"],
            "corpus": m["corpus"],
            "n_alive": m["n_alive"],
            "n_dead": m["sae"]["d_sae"] - m["n_alive"],
            "l0": m["l0"],
            "quality": [vars(row) for row in quality_rows(m["quality"])] if m["quality"] else [],
            "definitions": m["definitions"],
            "created": m["created"],
            "version": m["headscope"],
        }

    def vocab(self) -> Json:
        """Token bytes as strings of characters 0 to 255."""
        content, special = self._index.vocabulary
        return {"tokens": [b.decode("latin-1") for b in content], "special": special}

    def table(self) -> Json:
        """One row a latent, by column."""
        f = self._index.features
        top = [_best(shares) for shares in f["dfa_share"]]
        decoder = [_best(shares) for shares in f["decoder_share"]]
        alive = [n > 0 for n in f["n_active"]]
        rows = {
            "latent": f["latent"],
            "alive": alive,
            "density": f["density"],
            "n_active": f["n_active"],
            "max": f["maximum"],
            "mean": f["mean"],
            "top_head": [self._heads[h] if h is not None else None for h, _ in top],
            "top_head_share": [share for _, share in top],
            "decoder_head": [self._heads[h] if h is not None else None for h, _ in decoder],
            "decoder_share": [share for _, share in decoder],
            "top_logit": [tokens[0] for tokens in f["logit_top_tokens"]],
            "top_logit_value": [values[0] for values in f["logit_top_values"]],
            "top_source": [tokens[0] if tokens else None for tokens in f["source_tokens"]],
            "top_source_share": [shares[0] if shares else None for shares in f["source_shares"]],
            "logit_tokens": [tokens[:10] for tokens in f["logit_top_tokens"]],
            "example_tokens": f["example_tokens"],
        }
        return {"columns": _COLUMNS, "rows": rows}

    def feature(self, latent: int) -> Json:
        """The card of one latent.

        Raises:
            IndexError: no such latent.
        """
        try:
            row = self._index.feature(latent)
        except IndexFormatError as error:
            raise IndexError(str(error)) from error
        n_tokens = self._index.manifest["corpus"]["n_tokens"]
        alive = row["n_active"] > 0
        return {
            "latent": latent,
            "alive": alive,
            "stats": {
                "n_tokens": n_tokens,
                "n_active": row["n_active"],
                "density": row["density"],
                "density_upper95": None if alive else 3 / n_tokens,
                "mean": row["mean"],
                "max": row["maximum"],
                "std": row["std"],
                "quantiles": [list(q) for q in zip(QUANTILES, row["quantiles"], strict=True)] if alive else [],
            },
            "histogram": self._histogram(row) if alive else None,
            "heads": {
                "names": self._heads,
                "decoder": row["decoder_share"],
                "encoder": row["encoder_share"],
                "decoder_out": row["decoder_out_share"],
                "dfa": _finite(row["dfa_share"]) or [0.0] * len(self._heads),
                "dfa_cov": _finite(row["dfa_covariance"]),
            },
            "logits": {
                "top": _pairs(row["logit_top_tokens"], row["logit_top_values"]),
                "bottom": _pairs(row["logit_bottom_tokens"], row["logit_bottom_values"]),
                "mean": row["logit_mean"],
                "std": row["logit_std"],
            },
            "sources": [
                list(s) for s in zip(row["source_tokens"], row["source_shares"], row["source_counts"], strict=True)
            ],
            "bias": row["bias"],
            "groups": [self._group(group) for group in self._index.examples(latent)],
        }

    def context(self, block: int) -> Json:
        """All tokens of one block.

        Raises:
            IndexError: no such block.
        """
        if not 0 <= block < len(self._index.tokens):
            raise IndexError(f"blocks 0 to {len(self._index.tokens) - 1}")
        document = self._index.document[block]
        starts = np.flatnonzero(np.diff(document, prepend=-1))
        return {
            "block": block,
            "document_at": [[int(s), self._index.documents[document[s]]] for s in starts],
            "ids": self._index.tokens[block].tolist(),
        }

    def _histogram(self, row: dict[str, Any]) -> Json:
        edges = np.linspace(0, row["maximum"], N_BINS + 1)
        return {"edges": edges.tolist(), "counts": row["histogram"], "mass": row["mass"]}

    def _group(self, group: ExampleGroup) -> Json:
        return {
            "kind": group.kind,
            "index": group.number,
            "label": _GROUP_LABELS[group.kind].format(number=group.number + 1),
            "lo": group.low,
            "hi": group.high,
            "n": group.n,
            "share_active": None if group.kind == "random" else group.share_active,
            "share_mass": None if group.kind == "random" else group.share_mass,
            "examples": [self._example(example) for example in group.examples],
        }

    def _example(self, example: Example) -> Json:
        block, destination = divmod(example.position, self._index.tokens.shape[1])
        tokens = self._index.tokens[block]
        segments = _segments(destination, [s.position for s in example.sources], len(tokens))
        shown = np.concatenate([np.arange(start, end) for start, end in segments])
        acts = [[int(p), float(v)] for p, v in zip(example.active_at, example.active_value, strict=True) if p in shown]
        return {
            "position": example.position,
            "block": block,
            "dst": destination,
            "document": self._index.documents[self._index.document[block, destination]],
            "activation": example.activation,
            "pre": example.pre,
            "bias": example.bias,
            "residual": example.residual,
            "next": int(tokens[destination + 1]) if destination + 1 < len(tokens) else None,
            "segments": [[start, tokens[start:end].tolist()] for start, end in segments],
            "acts": acts,
            "heads": _short(example.heads),
            "sources": [{"pos": s.position, "heads": _short(s.heads)} for s in example.sources],
            "rest": _short(example.rest),
            "n_rest": destination + 1 - len(example.sources),
            "duplicates": example.duplicates,
        }


def _short(values: Float[np.ndarray, " n"]) -> list[float]:
    """To six digits, all that float32 sums hold: half the bytes of a card."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _best(shares: list[float] | None) -> tuple[int | None, float | None]:
    if shares is None or not np.isfinite(shares).all():
        return None, None
    best = int(np.argmax(shares))
    return best, shares[best]


def _finite(shares: list[float] | None) -> list[float] | None:
    return shares if shares is not None and np.isfinite(shares).all() else None


def _pairs(tokens: list[int], values: list[float]) -> list[list[int | float]]:
    return [list(pair) for pair in zip(tokens, values, strict=True)]


def _segments(destination: int, sources: list[int], n: int) -> list[tuple[int, int]]:
    """Disjoint runs [start, end) around the destination and the sources, in order; short gaps are filled."""
    before, after = _WINDOW
    wanted = [(destination - before, destination + after + 1)]
    for rank, source in enumerate(sources):
        around = _AROUND_TOP_SOURCE if rank == 0 else _AROUND_SOURCE
        wanted.append((source - around, source + around + 1))
    merged: list[tuple[int, int]] = []
    for start, end in sorted((max(0, s), min(n, e)) for s, e in wanted):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _column(name: str, label: str, kind: str, definition: str) -> Json:
    return {"name": name, "label": label, "kind": kind, "definition": definition}


_COLUMNS = [
    _column("latent", "id", "int", "index of the dictionary entry"),
    _column("alive", "alive", "bool", "active on at least one token of the corpus"),
    _column("density", "density", "percent", "share of tokens on which the feature is active"),
    _column("n_active", "tokens", "int", "tokens on which the feature is active"),
    _column("max", "max", "float", "largest activation in the corpus"),
    _column("mean", "mean", "float", "mean activation over active tokens"),
    _column("top_head", "head", "head", "the head with the largest share of squared DFA"),
    _column("top_head_share", "DFA share", "percent", "that head's share of squared DFA over active tokens"),
    _column("decoder_head", "dec. head", "head", "the head with the largest norm in the decoder row"),
    _column("decoder_share", "dec. share", "percent", "that head's share of the decoder norms"),
    _column("top_logit", "top logit", "token", "the token whose logit the feature raises most by the direct path"),
    _column("top_logit_value", "logit", "float", "that logit, per unit of activation; final norm's scale left out"),
    _column("top_source", "top source", "token", "source token with the largest share of squared DFA, over examples"),
    _column("top_source_share", "src share", "percent", "that token's share"),
]
