"""A random index folder in the format of docs/index-format.md, as large as one likes: no model, no corpus.

Densities are spread over four decades, tokens are Zipf's, examples lie evenly over a feature's active tokens. Values
are as hard to compress as real ones; they mean nothing.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headscope.artefact import file_hash, new_folder, read_json, write_json
from headscope.index.config import DEFINITIONS, FORMAT_VERSION, N_BINS, QUANTILES, IndexPlan
from headscope.index.writing import ActivationWriter, write_table

_RANGE_ROWS = 1 << 20
_POOL_ROWS = 1 << 18
_GROUPS = (("top", 1, 12), ("random", 1, 8), ("quantile", 5, 4), ("interval", 10, 4), ("threshold", 1, 4))
_N_SLOTS = sum(number * size for _, number, size in _GROUPS)
_N_SOURCES = 8
_DEAD = 0.1


@dataclass(frozen=True)
class Shape:
    """How large the index is."""

    features: int = 24_576
    tokens: int = 10_000_000
    heads: int = 12
    l0: float = 12.0
    block_size: int = 256
    d_vocab: int = 50_257

    @property
    def n_blocks(self) -> int:
        """Blocks of the corpus."""
        return self.tokens // self.block_size


def write_index(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write the index, or leave the one of this shape that stands there already."""
    manifest = folder / "manifest.json"
    if manifest.is_file() and read_json(manifest).get("shape") == asdict(shape):
        return
    rng = np.random.default_rng(seed)
    with new_folder(folder, overwrite=True) as scratch:
        counts = _counts(shape, rng)
        maximum = rng.gamma(8, 0.5, shape.features) + 2
        _write_corpus(scratch, shape, rng)
        _write_pairs(scratch, shape, counts, maximum, rng)
        write_table(scratch / "features.parquet", _features(shape, counts, maximum, rng))
        _write_sources(scratch, shape, counts, rng)
        write_table(scratch / "nulls.parquet", _nulls(shape, counts, rng))
        write_json(scratch / "manifest.json", _manifest(scratch, shape, counts))


def _counts(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Active tokens of each latent: log-normal densities, a tenth of them dead."""
    weight = rng.lognormal(0, 1.8, shape.features)
    counts = weight * (shape.l0 * shape.tokens / weight.sum())
    counts = np.clip(counts, _N_SLOTS, shape.tokens // 4).astype(np.int64)
    counts[rng.random(shape.features) < _DEAD] = 0
    return counts


# --------------------------------------------------------------------------------------------------------------- corpus
def _write_corpus(folder: Path, shape: Shape, rng: np.random.Generator) -> None:
    p = 1 / np.arange(2, shape.d_vocab + 1)
    p = np.concatenate([[0], np.cumsum(p / p.sum())])
    size = shape.n_blocks * shape.block_size
    tokens = np.searchsorted(p, rng.random(size), side="left").astype(np.int32).clip(1, shape.d_vocab - 1)
    starts = np.arange(0, size, shape.block_size)
    tokens[starts] = 0
    after = np.append(tokens[1:], 0)
    last = np.zeros(size, bool)
    last[starts + shape.block_size - 1] = True
    document, offset = np.divmod(np.arange(size), 1000)
    offset += 1  # documents without a BOS of their own: 0 would be one
    offset[starts] = -1
    columns = {"token": tokens, "document": document, "offset": offset}
    table = {name: pa.array(values, pa.int32()) for name, values in columns.items()}
    table = {"position": pa.array(np.arange(size))} | table
    table["next_token"] = pa.array(after, pa.int32(), mask=last)
    table["loss"] = pa.array(rng.gamma(2, 1.5, size), pa.float32(), mask=last)
    step = max(1, (1 << 14) // shape.block_size) * shape.block_size
    pq.write_table(
        pa.table(table), folder / "tokens.parquet", row_group_size=step, compression="zstd", write_page_checksum=True
    )
    documents = [f"document {i}" for i in range(-(-size // 1000))]
    write_table(
        folder / "documents.parquet",
        pa.table({"document": pa.array(range(len(documents)), pa.int32()), "name": documents}),
    )
    vocabulary = {"token": pa.array(range(shape.d_vocab), pa.int32())}
    vocabulary["bytes"] = pa.array([f" t{i}".encode() for i in range(shape.d_vocab)], pa.binary())
    vocabulary["special"] = pa.array([i == 0 for i in range(shape.d_vocab)])
    write_table(folder / "vocabulary.parquet", pa.table(vocabulary))


# --------------------------------------------------------------------------------------------------- pairs and examples
def _write_pairs(folder: Path, shape: Shape, counts: np.ndarray, maximum: np.ndarray, rng: np.random.Generator) -> None:
    """Activations, groups and examples, a range of latents at a time."""
    pool = rng.standard_normal((_POOL_ROWS, shape.heads), dtype=np.float32) * 0.3
    write = ActivationWriter(folder / "activations", shape.heads)
    groups: list[pa.Table] = []
    with _Appending(folder / "examples.parquet") as examples:
        for first, last in _ranges(counts):
            n = counts[first:last]
            latent = np.repeat(np.arange(first, last), n)
            position = _positions(n, shape, rng)
            f = (maximum[latent] * rng.random(len(latent), dtype=np.float32) ** 2).astype(np.float32) + 1e-3
            write({"latent": latent, "position": position, "activation": f, "heads": _some(pool, len(latent), rng)})
            live = np.flatnonzero(n)
            starts = np.cumsum(n) - n
            chosen = starts[live, None] + np.arange(_N_SLOTS) * n[live, None] // _N_SLOTS  # [latent, slot]
            groups.append(_group_table(first + live, position[chosen], n[live], maximum))
            examples.write(_example_table(chosen.reshape(-1), latent, position, f, pool, shape, rng))
    write.finish()
    write_table(folder / "groups.parquet", pa.concat_tables(groups), small_groups=True)


def _ranges(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    first, ends = 0, np.cumsum(counts)
    while first < len(counts):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _RANGE_ROWS, side="right")))
        yield first, last
        first = last


def _positions(n: np.ndarray, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Distinct text positions of each latent, sorted: running sums of random gaps, scaled to the corpus."""
    n_text = shape.n_blocks * (shape.block_size - 1)
    gaps = rng.standard_exponential(n.sum())
    total = np.cumsum(gaps)
    starts = np.cumsum(n) - n
    before = np.repeat(np.where(starts > 0, total[starts - 1], 0.0), n)
    rank = np.arange(len(total)) - np.repeat(starts, n)
    ends = np.repeat(np.where(n > 0, total[np.cumsum(n) - 1], 0.0), n)
    share = (total - before) / (ends - before + 1)
    text = (share * (n_text - np.repeat(n, n))).astype(np.int64) + rank
    block, query = np.divmod(text, shape.block_size - 1)
    return block * shape.block_size + 1 + query


def _some(pool: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of the pool from a random place on, again and again."""
    start = int(rng.integers(len(pool)))
    return np.take(pool, np.arange(start, start + n), axis=0, mode="wrap")


def _group_table(latent: np.ndarray, positions: np.ndarray, n: np.ndarray, maximum: np.ndarray) -> pa.Table:
    """The groups of some latents; each takes its share of the [latent, slot] positions."""
    rows = [(kind, number, size) for kind, many, size in _GROUPS for number in range(many)]
    kinds, numbers, sizes = (list(column) for column in zip(*rows, strict=True))
    n_groups = len(rows)
    offsets = np.append(0, np.cumsum(np.tile(sizes, len(latent)))).astype(np.int32)
    of = np.repeat(latent, n_groups)
    share = np.tile(1 / np.asarray(numbers, dtype=float).clip(1), len(latent)) / n_groups
    return pa.table(
        {
            "latent": pa.array(of, pa.int32()),
            "kind": kinds * len(latent),
            "number": pa.array(numbers * len(latent), pa.int32()),
            "low": pa.array(np.zeros(len(of)), pa.float32()),
            "high": pa.array(maximum[of], pa.float32()),
            "n": pa.array(np.maximum(1, np.repeat(n, n_groups) // n_groups), pa.int64()),
            "share_active": share,
            "share_mass": share,
            "sampled": pa.array(np.zeros(len(share), dtype=bool)),
            "positions": pa.ListArray.from_arrays(offsets, pa.array(positions.reshape(-1), pa.int64())),
            "duplicates": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(positions.size), pa.int32())),
        }
    )


def _example_table(
    rows: np.ndarray,
    latent: np.ndarray,
    position: np.ndarray,
    f: np.ndarray,
    pool: np.ndarray,
    shape: Shape,
    rng: np.random.Generator,
) -> pa.Table:
    of, at = latent[rows].astype(np.int64), position[rows]
    block, query = np.divmod(at, shape.block_size)
    n_sources = np.minimum(_N_SOURCES, query + 1)
    number = np.arange(n_sources.sum()) - np.repeat(np.cumsum(n_sources) - n_sources, n_sources)
    source = number * np.repeat(query + 1, n_sources) // np.repeat(n_sources, n_sources)
    span = np.int64(shape.n_blocks * shape.block_size)
    key = latent * span + position
    low = np.searchsorted(key, of * span + block * shape.block_size)
    n_active = np.searchsorted(key, of * span + (block + 1) * shape.block_size) - low
    active = np.arange(n_active.sum()) + np.repeat(low - np.cumsum(n_active) + n_active, n_active)
    n, flat = len(rows), n_sources * shape.heads
    return pa.table(
        {
            "latent": pa.array(of, pa.int32()),
            "position": pa.array(at, pa.int64()),
            "activation": f[rows],
            "pre": f[rows],
            "bias": np.full(n, -0.3, np.float32),
            "residual": rng.standard_normal(n, dtype=np.float32) * 1e-7,
            "heads": _lists(_some(pool, n, rng), np.full(n, shape.heads)),
            "source": _lists(source.astype(np.int32), n_sources),
            "source_heads": _lists(_some(pool, n_sources.sum(), rng), flat),
            "source_pattern": _lists(np.abs(_some(pool, n_sources.sum(), rng)) / _N_SOURCES, flat),
            "rest": _lists(_some(pool, n, rng), np.full(n, shape.heads)),
            "active_at": _lists((position[active] % shape.block_size).astype(np.int32), n_active),
            "active_value": _lists(f[active], n_active),
        }
    )


class _Appending:
    """A Parquet file in small row groups, opened with the first table."""

    def __init__(self, path: Path) -> None:
        self._path, self._writer = path, None

    def __enter__(self) -> "_Appending":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd", write_page_checksum=True)
        self._writer.write_table(table, row_group_size=512)


# ---------------------------------------------------------------------------------------------------- features, sources
def _features(shape: Shape, counts: np.ndarray, maximum: np.ndarray, rng: np.random.Generator) -> pa.Table:
    n, dead = shape.features, counts == 0
    n_tokens = shape.n_blocks * (shape.block_size - 1)

    def numbers(scale: float = 1.0) -> pa.Array:
        return pa.array(rng.random(n) * scale, pa.float64(), mask=dead)

    def live_lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.array([None if d else row for d, row in zip(dead, values, strict=True)], pa.list_(kind))

    def shares() -> np.ndarray:
        return rng.dirichlet(np.full(shape.heads, 0.3), n)

    def tokens(k: int) -> np.ndarray:
        return rng.integers(1, shape.d_vocab, (n, k))

    def descending(k: int) -> np.ndarray:
        return -np.sort(-rng.random((n, k)), axis=1).astype(np.float32)

    columns = {
        "latent": pa.array(range(n), pa.int32()),
        "n_active": pa.array(counts),
        "density": counts / n_tokens,
        **{name: numbers() for name in ("mean", "std", "skew", "kurtosis")},
        "maximum": pa.array(maximum, mask=dead),
        **{name: live_lists(shares(), pa.float64()) for name in ("dfa_share", "dfa_covariance", "dfa_mean")},
        "quantiles": live_lists(np.sort(rng.random((n, len(QUANTILES))), axis=1), pa.float64()),
        "histogram": live_lists(rng.integers(0, 1000, (n, N_BINS)), pa.int64()),
        "mass": live_lists(rng.random((n, N_BINS)), pa.float64()),
    }
    for name in ("decoder_share", "decoder_out_share", "encoder_share", "encoder_in_share"):
        columns[name] = pa.array(list(shares().astype(np.float32)))
    columns["bias"] = rng.standard_normal(n, dtype=np.float32)
    for end in ("top", "bottom"):
        columns[f"logit_{end}_tokens"] = pa.array(list(tokens(20)))
        columns[f"logit_{end}_values"] = pa.array(list(descending(20)))
    for name in ("mean", "std", "skew", "kurtosis"):
        columns[f"logit_{name}"] = rng.random(n, dtype=np.float32)
    columns["copy_tokens"] = live_lists(tokens(10), pa.int32())
    columns["copy_values"] = live_lists(descending(10), pa.float32())
    columns["copy_rank"] = numbers()
    columns["correlated_latents"] = pa.array(list(rng.integers(0, n, (n, 10))), pa.list_(pa.int32()))
    columns["correlated_pearson"] = pa.array(list(descending(10)))
    columns["correlated_cosine"] = pa.array(list(descending(10)))
    columns["example_tokens"] = pa.array(list(tokens(12)), pa.list_(pa.int32()))
    return pa.table(columns)


def _write_sources(folder: Path, shape: Shape, counts: np.ndarray, rng: np.random.Generator) -> None:
    live = np.flatnonzero(counts)
    n, k = len(live) * 20, 20

    def by_head(rows: int = n) -> pa.Array:
        return _lists(rng.random((rows, shape.heads), dtype=np.float32), np.full(rows, shape.heads))

    sources = {
        "latent": pa.array(np.repeat(live, k), pa.int32()),
        "threshold": np.zeros(n),
        "token": pa.array(rng.integers(1, shape.d_vocab, n), pa.int32()),
        "n": rng.integers(1, 1000, n),
        "share": (-np.sort(-rng.random((len(live), k)), axis=1) / k).reshape(-1),
        "share_linear": rng.random(n) / k,
        "share_by_head": by_head(),
        "attention": by_head(),
        "attention_elsewhere": by_head(),
        "frequency": rng.random(n) / 1000,
    }
    write_table(folder / "sources.parquet", pa.table(sources), small_groups=True)
    dead = counts == 0
    totals = {
        "latent": pa.array(range(shape.features), pa.int32()),
        "threshold": np.zeros(shape.features),
        "n_active": counts,
        "kept": pa.array(np.full(shape.features, 0.98), mask=dead),
        "bos_share": pa.array(rng.random(shape.features) / 10, mask=dead),
        "kept_by_head": by_head(shape.features),
        "bos_share_by_head": by_head(shape.features),
    }
    write_table(folder / "source_totals.parquet", pa.table(totals))


def _nulls(shape: Shape, counts: np.ndarray, rng: np.random.Generator) -> pa.Table:
    live = np.flatnonzero(counts)[:64]
    n = 2 * len(live)
    return pa.table(
        {
            "kind": ["random"] * len(live) + ["permuted"] * len(live),
            "latent": pa.array(np.tile(live, 2), pa.int32()),
            "n_active": np.tile(counts[live], 2),
            "dfa_share": list(rng.dirichlet(np.ones(shape.heads), n)),
            "dfa_covariance": list(rng.dirichlet(np.ones(shape.heads), n)),
        }
    )


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths)).astype(np.int32), pa.array(values.reshape(-1)))


def _manifest(folder: Path, shape: Shape, counts: np.ndarray) -> dict:
    n_tokens = shape.n_blocks * (shape.block_size - 1)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format_version": FORMAT_VERSION,
        "headscope": "synthetic",
        "created": "2000-01-01T00:00:00+00:00",
        "site": "blocks.5.attn.hook_z",
        "layer": 5,
        "z_convention": "raw",
        "special_tokens": "left out of all statistics",
        "dtype": "float32",
        "model": {
            "name": "synthetic",
            "hash": "",
            "n_layers": 12,
            "n_heads": shape.heads,
            "d_head": 64,
            "d_model": 64 * shape.heads,
            "d_vocab": shape.d_vocab,
        },
        "sae": {
            "name": "synthetic",
            "hash": "",
            "architecture": "standard",
            "d_in": 64 * shape.heads,
            "d_sae": shape.features,
            "trained_on": None,
        },
        "corpus": {
            "name": "synthetic",
            "split": "all",
            "hash": "",
            "n_tokens": n_tokens,
            "n_blocks": shape.n_blocks,
            "block_size": shape.block_size,
            "n_documents": -(-shape.n_blocks * shape.block_size // 1000),
        },
        "plan": IndexPlan(losses=True).as_dict(),
        "thresholds": [0.0],
        "n_alive": int((counts > 0).sum()),
        "n_pairs": int(counts.sum()),
        "l0": float(counts.sum() / n_tokens),
        "quality": None,
        "definitions": DEFINITIONS,
        "shape": asdict(shape),
        "files": {str(f.relative_to(folder)): [f.stat().st_size, file_hash(f)] for f in files},
    }
