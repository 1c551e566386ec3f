"""The tables of an index folder, from what the passes found."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from headscope import attribution
from headscope.corpus import Corpus
from headscope.index.config import DEFINITIONS, FORMAT_VERSION, N_SOURCES
from headscope.index.summary import FeatureSummary, Group
from headscope.models.hf import Model
from headscope.sae.model import SAE

_ROW_GROUP = 1 << 18
_SMALL_ROW_GROUP = 8192  # of the examples: one card reads one of them


@dataclass(frozen=True)
class Pairs:
    """Every active (position, latent) pair, sorted by latent, then position."""

    latent: Int[np.ndarray, " pair"]
    position: Int[np.ndarray, " pair"]
    """Block number * block size + position in the block."""
    activation: Float[np.ndarray, " pair"]
    pre: Float[np.ndarray, " pair"]
    heads: Float[np.ndarray, "pair head"]
    """DFA of each head."""

    @cached_property
    def _starts(self) -> Int[np.ndarray, " latent_and_end"]:
        n_latents = int(self.latent[-1]) + 1 if len(self.latent) else 0
        return np.concatenate([[0], np.cumsum(np.bincount(self.latent, minlength=n_latents))])

    def of(self, latent: int) -> slice:
        """The pairs of one latent."""
        low, high = self._starts.take([latent, latent + 1], mode="clip")
        return slice(int(low), int(high))


@dataclass(frozen=True)
class Examples:
    """The stored examples, sorted by latent, then position; the arrays below the first four are filled by block."""

    latent: Int[np.ndarray, " example"]
    position: Int[np.ndarray, " example"]
    activation: Float[np.ndarray, " example"]
    block_size: int
    pre: Float[np.ndarray, " example"]
    bias: Float[np.ndarray, " example"]
    residual: Float[np.ndarray, " example"]
    heads: Float[np.ndarray, "example head"]
    source: Int[np.ndarray, "example k"]
    """Positions in the block of the largest sources, by |DFA| summed over heads; only the first `n_sources` count."""
    source_heads: Float[np.ndarray, "example k head"]
    rest: Float[np.ndarray, "example head"]

    @classmethod
    def empty(cls, index: Int[np.ndarray, " example"], pairs: Pairs, block_size: int, n_heads: int) -> "Examples":
        """Room for the pairs of these indices."""
        n, k = len(index), min(N_SOURCES, block_size)
        return cls(
            latent=pairs.latent[index],
            position=pairs.position[index],
            activation=pairs.activation[index],
            block_size=block_size,
            pre=np.zeros(n, np.float32),
            bias=np.zeros(n, np.float32),
            residual=np.zeros(n, np.float32),
            heads=np.zeros((n, n_heads), np.float32),
            source=np.zeros((n, k), np.int32),
            source_heads=np.zeros((n, k, n_heads), np.float32),
            rest=np.zeros((n, n_heads), np.float32),
        )

    @cached_property
    def block(self) -> Int[np.ndarray, " example"]:
        """Block number of each."""
        return self.position // self.block_size

    @cached_property
    def query(self) -> Int[np.ndarray, " example"]:
        """Position in the block of each."""
        return self.position % self.block_size

    @cached_property
    def n_sources(self) -> Int[np.ndarray, " example"]:
        """Sources that are kept: later positions contribute exactly 0."""
        return np.minimum(self.query + 1, self.source.shape[1])

    @cached_property
    def kept(self) -> Bool[np.ndarray, "example k"]:
        """Which of the sources count."""
        return np.arange(self.source.shape[1]) < self.n_sources[:, None]


@dataclass(frozen=True)
class Findings:
    """All that the passes found."""

    pairs: Pairs
    summaries: dict[int, FeatureSummary]
    """By latent; alive ones only."""
    groups: dict[int, list[Group]]
    """By latent; alive ones only."""
    examples: Examples
    weights: attribution.HeadWeights
    effects: attribution.LogitEffects


@dataclass(frozen=True)
class SAERecord:
    """What an index says of the SAE's file."""

    name: str
    hash: str
    """Of its weights."""
    quality: dict[str, Any] | None = None
    """`Quality.as_dict()`, if it was measured."""


def write_tables(folder: Path, model: Model, sae: SAE, corpus: Corpus, found: Findings) -> None:
    """Write all tables of an index into an empty folder."""
    _write(folder / "tokens.parquet", _token_table(corpus))
    _write(folder / "documents.parquet", pa.table({"document": list(corpus.documents)}))
    _write_activations(folder / "activations" / "part-0.parquet", found.pairs)
    _write(folder / "examples.parquet", _example_table(found.examples, found.pairs), _SMALL_ROW_GROUP)
    _write(folder / "groups.parquet", _group_table(found.groups, found.pairs))
    _write(folder / "features.parquet", _feature_table(model, sae, corpus, found))
    _write(folder / "vocabulary.parquet", _vocabulary_table(model))


def _token_table(corpus: Corpus) -> pa.Table:
    return pa.table(
        {
            "token": pa.array(corpus.blocks.reshape(-1), pa.int32()),
            "document": pa.array(corpus.document.reshape(-1), pa.int32()),
            "offset": pa.array(corpus.offset.reshape(-1), pa.int32()),
        }
    )


def _vocabulary_table(model: Model) -> pa.Table:
    """Each token's bytes; special tokens keep their spelling and are marked."""
    pieces = [model.tokenizer.id_to_token(i) or "" for i in range(model.spec.d_vocab)]
    special = {i for i, t in model.tokenizer.get_added_tokens_decoder().items() if t.special} | {model.bos}
    byte_of = _byte_alphabet()
    content = [
        piece.encode() if i in special or any(c not in byte_of for c in piece) else bytes(byte_of[c] for c in piece)
        for i, piece in enumerate(pieces)
    ]
    return pa.table(
        {"bytes": pa.array(content, pa.binary()), "special": [i in special for i in range(model.spec.d_vocab)]}
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _group_table(groups: dict[int, list[Group]], pairs: Pairs) -> pa.Table:
    flat = [(latent, g) for latent, gs in groups.items() for g in gs]
    position = [pairs.position[pairs.of(latent).start + g.chosen] for latent, g in flat]
    return pa.table(
        {
            "latent": pa.array([latent for latent, _ in flat], pa.int32()),
            "kind": pa.array([g.kind for _, g in flat], pa.string()),
            "number": pa.array([g.number for _, g in flat], pa.int32()),
            "low": pa.array([g.low for _, g in flat], pa.float32()),
            "high": pa.array([g.high for _, g in flat], pa.float32()),
            "n": pa.array([g.n for _, g in flat], pa.int64()),
            "share_active": pa.array([g.share_active for _, g in flat], pa.float64()),
            "share_mass": pa.array([g.share_mass for _, g in flat], pa.float64()),
            "positions": pa.array([p.tolist() for p in position], pa.list_(pa.int64())),
            "duplicates": pa.array([g.duplicates.tolist() for _, g in flat], pa.list_(pa.int32())),
        }
    )


def _feature_table(model: Model, sae: SAE, corpus: Corpus, found: Findings) -> pa.Table:
    """One row a latent; what only an alive latent has is null for a dead one."""
    latents, summaries = range(sae.d_sae), found.summaries
    n_tokens = corpus.n_text_tokens
    columns: dict[str, Any] = {
        "latent": pa.array(latents, pa.int32()),
        "n_active": [summaries[i].n_active if i in summaries else 0 for i in latents],
        "density": [summaries[i].n_active / n_tokens if i in summaries else 0.0 for i in latents],
    }
    for name in FeatureSummary.__dataclass_fields__:
        if name != "n_active":
            columns[name] = [_plain(getattr(summaries[i], name)) if i in summaries else None for i in latents]
    shares = {
        "decoder_share": attribution.decoder_share(sae, model.spec.n_heads),
        "decoder_out_share": attribution.decoder_share_through_output(sae, model),
        "encoder_share": attribution.encoder_share(found.weights),
    }
    columns |= {name: _fixed_lists(share.cpu().numpy()) for name, share in shares.items()}
    columns["bias"] = pa.array(found.weights.bias.cpu().numpy(), pa.float32())
    for name in ("top_tokens", "top_values", "bottom_tokens", "bottom_values", "mean", "std"):
        column = f"logit_{name}"
        columns[column] = pa.array(getattr(found.effects, name).cpu().numpy().tolist())
    columns |= _source_tokens(corpus, found.examples, sae.d_sae)
    columns["example_tokens"] = pa.array([_top_tokens(corpus, found, i) for i in latents], pa.list_(pa.int32()))
    return pa.table(columns)


def _top_tokens(corpus: Corpus, found: Findings, latent: int) -> list[int]:
    """The tokens at a feature's top examples."""
    if latent not in found.groups:
        return []
    chosen = found.pairs.of(latent).start + found.groups[latent][0].chosen
    return corpus.blocks.reshape(-1)[found.pairs.position[chosen]].tolist()


def _plain(value: float | np.ndarray) -> float | list:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _source_tokens(corpus: Corpus, examples: Examples, d_sae: int, k: int = 10) -> dict[str, pa.Array]:
    """For each latent the source tokens with the largest share of squared DFA over its examples' stored sources."""
    start = np.repeat(examples.block * examples.block_size, examples.n_sources)
    token = corpus.blocks.reshape(-1)[start + examples.source[examples.kept]]
    latent = np.repeat(examples.latent.astype(np.int64), examples.n_sources)
    n_tokens = int(corpus.blocks.max()) + 1
    kinds, which, count = np.unique(latent * n_tokens + token, return_inverse=True, return_counts=True)
    mass = np.bincount(which, weights=examples.source_heads.sum(-1)[examples.kept] ** 2, minlength=len(kinds))
    owner, token = np.divmod(kinds, n_tokens)
    total = np.bincount(owner, weights=mass, minlength=d_sae)
    columns: dict[str, list] = {"source_tokens": [], "source_shares": [], "source_counts": []}
    for i, (low, high) in enumerate(pairwise(np.searchsorted(owner, np.arange(d_sae + 1)))):
        best = low + np.argsort(-mass[low:high], kind="stable")[:k]
        columns["source_tokens"].append(token[best].tolist())
        columns["source_shares"].append((mass[best] / max(total[i], 1e-300)).tolist())
        columns["source_counts"].append(count[best].tolist())
    return {name: pa.array(values) for name, values in columns.items()}


def _example_table(examples: Examples, pairs: Pairs) -> pa.Table:
    active_at, active_value = _active_in_block(examples, pairs)
    n_heads = examples.heads.shape[1]
    return pa.table(
        {
            "latent": pa.array(examples.latent, pa.int32()),
            "position": pa.array(examples.position, pa.int64()),
            "activation": pa.array(examples.activation, pa.float32()),
            "pre": examples.pre,
            "bias": examples.bias,
            "residual": examples.residual,
            "heads": _fixed_lists(examples.heads),
            "source": _lists(examples.source[examples.kept], examples.n_sources, pa.int32()),
            "source_heads": _lists(
                examples.source_heads[examples.kept].reshape(-1), examples.n_sources * n_heads, pa.float32()
            ),
            "rest": _fixed_lists(examples.rest),
            "active_at": active_at,
            "active_value": active_value,
        }
    )


def _active_in_block(examples: Examples, pairs: Pairs) -> tuple[pa.Array, pa.Array]:
    """Positions in the block, and values, of all activations of each example's feature in its block."""
    span = int(pairs.position.max(initial=0)) + examples.block_size + 1
    key = pairs.latent.astype(np.int64) * span + pairs.position  # sorted
    start = examples.latent.astype(np.int64) * span + examples.block * examples.block_size
    low, high = np.searchsorted(key, start), np.searchsorted(key, start + examples.block_size)
    lengths = high - low
    index = np.repeat(low - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    at = pairs.position[index] % examples.block_size
    return _lists(at, lengths, pa.int32()), _lists(pairs.activation[index], lengths, pa.float32())


def _write(path: Path, table: pa.Table, row_group: int = _ROW_GROUP) -> None:
    pq.write_table(table, path, compression="zstd", row_group_size=row_group)


def _write_activations(path: Path, pairs: Pairs) -> None:
    """Sorted by latent; contributions keep 14 significant bits, which halves the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "latent": pa.array(pairs.latent, pa.int32()),
        "position": pa.array(pairs.position, pa.int64()),
        "activation": pa.array(pairs.activation, pa.float32()),
    }
    floats = ["activation"]
    for h in range(pairs.heads.shape[1]):
        columns[f"head_{h}"] = pa.array(_rounded(pairs.heads[:, h]), pa.float32())
        floats.append(f"head_{h}")
    pq.write_table(
        pa.table(columns),
        path,
        compression="zstd",
        row_group_size=_ROW_GROUP,
        use_dictionary=False,
        column_encoding={"latent": "DELTA_BINARY_PACKED", "position": "DELTA_BINARY_PACKED"}
        | dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
    )


def _rounded(values: Float[np.ndarray, " n"], bits: int = 10) -> Float[np.ndarray, " n"]:
    """Round the mantissa to 23 - bits bits."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((raw + np.uint32(1 << (bits - 1))) & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)


def manifest(model: Model, sae: SAE, corpus: Corpus, found: Findings, record: SAERecord) -> dict[str, Any]:
    """What an index says of itself."""
    n_tokens = corpus.n_text_tokens
    return {
        "format_version": FORMAT_VERSION,
        "headscope": version("headscope"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "site": sae.site.hook_name,
        "layer": sae.site.layer,
        "z_convention": sae.metadata.get("z_convention", "not stated; read as raw"),
        "special_tokens": "left out of all statistics",
        "model": {
            "name": model.spec.name,
            "n_layers": model.spec.n_layers,
            "n_heads": model.spec.n_heads,
            "d_head": model.spec.d_head,
            "d_model": model.spec.d_model,
            "d_vocab": model.spec.d_vocab,
        },
        "sae": {
            "name": record.name,
            "hash": record.hash,
            "architecture": sae.activation.name,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "trained_on": sae.metadata.get("corpus"),
        },
        "corpus": {
            "name": corpus.name,
            "split": corpus.split,
            "hash": corpus.fingerprint(),
            "n_tokens": n_tokens,
            "n_blocks": len(corpus.blocks),
            "block_size": corpus.block_size,
            "n_documents": len(set(np.unique(corpus.document).tolist())),
        },
        "n_alive": len(found.summaries),
        "n_pairs": len(found.pairs.latent),
        "l0": len(found.pairs.latent) / n_tokens,
        "quality": record.quality,
        "definitions": DEFINITIONS,
    }


def _lists(values: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Consecutive runs of values as lists."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def _fixed_lists(values: np.ndarray) -> pa.Array:
    """Rows of a matrix as lists of float32."""
    return _lists(values.reshape(-1), np.full(len(values), values.shape[1]), pa.float32())
