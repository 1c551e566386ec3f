"""Build an index: read a corpus once for what is active, and the blocks of the shown examples once more for sources.

The first pass takes the fast path (z only) and keeps every active (position, latent) pair with the DFA of each head.
The second computes attention step by step and keeps, for each example, DFA by head and source. Both sums are checked
against the pre-activation before anything is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int

from headscope import attribution
from headscope.artefact import new_folder, refuse_existing, write_json
from headscope.capture import activations, token_batches
from headscope.corpus import Corpus
from headscope.errors import IndexFormatError, SAEError
from headscope.index.config import DEFINITIONS, FORMAT_VERSION, N_SOURCES, ExamplePlan
from headscope.index.summary import FeatureSummary, Group, choose_examples, summarise
from headscope.models.hf import Model
from headscope.sae.model import SAE
from headscope.sae.train import check_fits

_TOLERANCE = 1e-4  # of the summed |contributions|: float32 sums of a few hundred terms close better than this
_EXAMPLE_TOKENS = 2048  # tokens whose attention patterns are held at a time
Progress = Callable[[str, int, int], None]
"""Called with the stage, the work done and the work in all."""


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

    def of(self, latent: int) -> slice:
        """The pairs of one latent."""
        low, high = np.searchsorted(self.latent, [latent, latent + 1])
        return slice(int(low), int(high))


def build_index(
    model: Model,
    sae: SAE,
    corpus: Corpus,
    folder: Path,
    *,
    sae_name: str,
    sae_hash: str,
    quality: dict[str, Any] | None = None,
    overwrite: bool = False,
    plan: ExamplePlan | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Index every feature of a z SAE on a corpus.

    Args:
        model: the model the SAE was trained on.
        sae: an SAE of the z of one of its layers.
        corpus: what to read; every position but BOS counts.
        folder: must be new or empty, unless `overwrite`; it appears whole or not at all.
        sae_name: kept in the manifest, with `sae_hash`.
        sae_hash: of its weights.
        quality: `Quality.as_dict()` of the SAE, kept in the manifest for the page.
        overwrite: replace what is there.
        plan: how many examples to keep.
        on_progress: called as the work goes on.

    Raises:
        SAEError: not a z SAE, or of another width than the model's z.
        CorpusError, ModelError: the corpus or the layer does not fit the model.
        OutputError: the folder holds something, or cannot be written.
    """
    check_fits(sae, model)
    if sae.site.kind != "z":
        raise SAEError(f"an SAE of {sae.site.hook_name}", expected="an SAE of z, whose features are made by heads")
    refuse_existing(folder, overwrite=overwrite)
    report = on_progress or (lambda _stage, _done, _total: None)
    sae = sae.to(model.device)
    weights = attribution.HeadWeights.of(sae, model)
    pairs = _active_pairs(model, sae, weights, corpus, report)
    summaries, groups = _summaries(pairs, corpus, sae.d_sae, plan or ExamplePlan(), report)
    examples = _example_table(model, sae, weights, corpus, pairs, groups, report)
    effects = attribution.direct_logit_effects(sae, model)
    report("write", 0, 1)
    with new_folder(folder, overwrite=overwrite) as scratch:
        _write(scratch / "tokens.parquet", _token_table(corpus))
        _write(scratch / "documents.parquet", pa.table({"document": list(corpus.documents)}))
        _write_activations(scratch / "activations" / "part-0.parquet", pairs)
        _write(scratch / "examples.parquet", examples)
        _write(scratch / "groups.parquet", _group_table(groups, pairs))
        _write(
            scratch / "features.parquet",
            _feature_table(model, sae, weights, corpus, pairs, summaries, groups, examples, effects),
        )
        _write(scratch / "vocabulary.parquet", _vocabulary_table(model))
        write_json(
            scratch / "manifest.json",
            _manifest(model, sae, corpus, pairs, summaries, sae_name=sae_name, sae_hash=sae_hash, quality=quality),
        )
    report("write", 1, 1)
    return Path(folder)


# -------------------------------------------------------------------------------------------------------------- passes
def _active_pairs(
    model: Model, sae: SAE, weights: attribution.HeadWeights, corpus: Corpus, report: Progress
) -> Pairs:
    parts: list[tuple[np.ndarray, ...]] = []
    done = 0
    for numbers, tokens, z in activations(model, corpus, sae.site):
        flat = z.flatten(0, 1)
        pre = sae.pre_activations(flat)
        f = sae.activation(pre)
        f[(tokens == model.bos).flatten()] = 0
        row, latent = f.nonzero(as_tuple=True)
        own_pre = pre[row, latent]
        heads = attribution.dfa_by_head(weights, flat[row], latent)
        _check_sum(own_pre - heads.sum(1) - weights.bias[latent], heads)
        position = torch.from_numpy(numbers).to(row)[row // tokens.shape[1]] * tokens.shape[1] + row % tokens.shape[1]
        values = (latent.int(), position, f[row, latent], own_pre, heads)
        parts.append(tuple(v.cpu().numpy() for v in values))
        done += tokens.numel()
        report("activations", done, corpus.n_tokens)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return Pairs(*(column[order] for column in columns))


def _check_sum(residual: torch.Tensor, heads: torch.Tensor) -> None:
    """Parts must sum to the whole; if they do not, the numbers are wrong and nothing is written."""
    if len(residual) == 0:
        return
    scale = 1 + heads.abs().flatten(1).sum(1)
    worst = (residual.abs() / scale).max().item()
    if not worst < _TOLERANCE:
        raise IndexFormatError(
            f"DFA + bias misses the pre-activation by {worst:.1e} of its parts",
            expected=f"less than {_TOLERANCE:g}",
            do="use float32 weights; if they are, please report it",
        )


def _summaries(
    pairs: Pairs, corpus: Corpus, d_sae: int, plan: ExamplePlan, report: Progress
) -> tuple[dict[int, FeatureSummary], dict[int, list[Group]]]:
    summaries, groups = {}, {}
    tokens = np.ascontiguousarray(corpus.blocks.reshape(-1))
    for latent in range(d_sae):
        own = pairs.of(latent)
        if own.start == own.stop:
            continue
        activation, position = pairs.activation[own], pairs.position[own]
        summaries[latent] = summarise(activation, pairs.pre[own], pairs.heads[own])
        groups[latent] = choose_examples(activation, position, tokens, plan, np.random.default_rng(latent))
        if latent % 64 == 0:
            report("features", latent, d_sae)
    report("features", d_sae, d_sae)
    return summaries, groups


def _example_table(
    model: Model,
    sae: SAE,
    weights: attribution.HeadWeights,
    corpus: Corpus,
    pairs: Pairs,
    groups: dict[int, list[Group]],
    report: Progress,
) -> pa.Table:
    """DFA by head and source of every example, sorted by latent, then position."""
    rows = [pairs.of(latent).start + np.unique(np.concatenate([g.chosen for g in gs])) for latent, gs in groups.items()]
    index = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    block, query = np.divmod(pairs.position[index], corpus.block_size)
    by_block = np.argsort(block, kind="stable")
    tables, done = [], 0
    order = np.unique(block)
    for numbers, tokens in token_batches(corpus, model.device, order, batch_tokens=_EXAMPLE_TOKENS):
        low = np.searchsorted(block[by_block], numbers[0])
        high = np.searchsorted(block[by_block], numbers[-1], side="right")
        chosen = by_block[low:high]
        row = np.searchsorted(numbers, block[chosen])
        tables.append(_sources_of(model, sae, weights, tokens, row, query[chosen], pairs, index[chosen]))
        done += len(numbers)
        report("sources", done, len(order))
    if not tables:
        return pa.table({"latent": pa.array([], pa.int32()), "position": pa.array([], pa.int64())})
    return pa.concat_tables(tables).sort_by([("latent", "ascending"), ("position", "ascending")])


def _sources_of(
    model: Model,
    sae: SAE,
    weights: attribution.HeadWeights,
    tokens: torch.Tensor,
    row: np.ndarray,
    query: np.ndarray,
    pairs: Pairs,
    index: np.ndarray,
) -> pa.Table:
    """The examples of one batch of blocks; `row` is the block in the batch and is sorted."""
    attention = model.attention(tokens, sae.site.layer)
    latent = torch.from_numpy(pairs.latent[index].astype(np.int64)).to(tokens.device)
    where = torch.from_numpy(row).to(tokens.device), torch.from_numpy(query).to(tokens.device)
    dfa = attribution.dfa_by_source(weights, attention, *where, latent)  # [pair, head, source]
    z = attention.z[where]
    pre = (z * weights.encoder[latent].flatten(1)).sum(1) + sae.bias[latent]
    heads = dfa.sum(-1)
    residual = pre - heads.sum(1) - weights.bias[latent]
    _check_sum(residual, dfa)
    k = min(N_SOURCES, dfa.shape[-1])
    top = dfa.abs().sum(1).topk(k).indices  # [pair, k]
    of_top = dfa.gather(2, top[:, None].expand(-1, dfa.shape[1], -1)).transpose(1, 2)  # [pair, k, head]
    rest = heads - of_top.sum(1)
    n_sources = torch.from_numpy(query + 1).to(tokens.device).clamp(max=k)  # later positions contribute exactly 0
    lengths = n_sources.cpu().numpy()
    kept = (torch.arange(k, device=tokens.device) < n_sources[:, None]).cpu().numpy()
    f_in_block = sae.activation(sae.pre_activations(attention.z))[where[0], :, latent]  # [pair, position]
    f_in_block[(tokens == model.bos)[where[0]]] = 0
    return pa.table(
        {
            "latent": pa.array(pairs.latent[index], pa.int32()),
            "position": pa.array(pairs.position[index], pa.int64()),
            "activation": pa.array(pairs.activation[index], pa.float32()),
            "pre": pa.array(pre.cpu().numpy(), pa.float32()),
            "bias": pa.array(weights.bias[latent].cpu().numpy(), pa.float32()),
            "residual": pa.array(residual.cpu().numpy(), pa.float32()),
            "heads": _fixed_lists(heads.cpu().numpy()),
            "source": _lists(top.cpu().numpy()[kept], lengths, pa.int32()),
            "source_heads": _lists(of_top.cpu().numpy()[kept].reshape(-1), lengths * dfa.shape[1], pa.float32()),
            "rest": _fixed_lists(rest.cpu().numpy()),
            "active_at": _active_lists(f_in_block.cpu().numpy())[0],
            "active_value": _active_lists(f_in_block.cpu().numpy())[1],
        }
    )


def _active_lists(f: np.ndarray) -> tuple[pa.Array, pa.Array]:
    row, position = f.nonzero()
    lengths = np.bincount(row, minlength=len(f))
    return _lists(position, lengths, pa.int32()), _lists(f[row, position], lengths, pa.float32())


def _lists(values: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def _fixed_lists(values: np.ndarray) -> pa.Array:
    return _lists(values.reshape(-1), np.full(len(values), values.shape[1]), pa.float32())


# -------------------------------------------------------------------------------------------------------------- tables
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


def _feature_table(
    model: Model,
    sae: SAE,
    weights: attribution.HeadWeights,
    corpus: Corpus,
    pairs: Pairs,
    summaries: dict[int, FeatureSummary],
    groups: dict[int, list[Group]],
    examples: pa.Table,
    effects: attribution.LogitEffects,
) -> pa.Table:
    """One row a latent; what only an alive latent has is null for a dead one."""
    latents = range(sae.d_sae)
    n_tokens = int((corpus.blocks != corpus.bos).sum())
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
        "encoder_share": attribution.encoder_share(weights),
    }
    columns |= {name: _fixed_lists(share.cpu().numpy()) for name, share in shares.items()}
    columns["bias"] = pa.array(weights.bias.cpu().numpy(), pa.float32())
    for name in ("top_tokens", "top_values", "bottom_tokens", "bottom_values", "mean", "std"):
        column = f"logit_{name}"
        columns[column] = pa.array(getattr(effects, name).cpu().numpy().tolist())
    columns |= _source_tokens(corpus, examples, sae.d_sae)
    tokens = corpus.blocks.reshape(-1)
    columns["example_tokens"] = pa.array(
        [
            tokens[pairs.position[pairs.of(i).start + groups[i][0].chosen]].tolist() if i in groups else []
            for i in latents
        ],
        pa.list_(pa.int32()),
    )
    return pa.table(columns)


def _plain(value: float | np.ndarray) -> float | list:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _source_tokens(corpus: Corpus, examples: pa.Table, d_sae: int, k: int = 10) -> dict[str, pa.Array]:
    """For each latent the source tokens with the largest share of squared DFA over its examples' stored sources."""
    if len(examples) == 0:
        empty = pa.array([[] for _ in range(d_sae)], pa.list_(pa.float64()))
        return {"source_tokens": empty, "source_shares": empty, "source_counts": empty}
    lengths = pa.compute.list_value_length(examples["source"]).to_numpy()
    n_heads = len(examples["heads"][0])
    start = examples["position"].to_numpy() // corpus.block_size * corpus.block_size
    source = examples["source"].combine_chunks().flatten().to_numpy() + np.repeat(start, lengths)
    value = examples["source_heads"].combine_chunks().flatten().to_numpy().reshape(-1, n_heads).sum(1) ** 2
    latent = np.repeat(examples["latent"].to_numpy(), lengths)
    key = latent.astype(np.int64) * (int(corpus.blocks.max()) + 1) + corpus.blocks.reshape(-1)[source]
    kinds, which, count = np.unique(key, return_inverse=True, return_counts=True)
    mass = np.bincount(which, weights=value)
    owner, token = np.divmod(kinds, int(corpus.blocks.max()) + 1)
    total = np.bincount(owner, weights=mass, minlength=d_sae)
    columns: dict[str, list] = {"source_tokens": [], "source_shares": [], "source_counts": []}
    bounds = np.searchsorted(owner, np.arange(d_sae + 1))
    for i, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        best = low + np.argsort(-mass[low:high], kind="stable")[:k]
        columns["source_tokens"].append(token[best].tolist())
        columns["source_shares"].append((mass[best] / max(total[i], 1e-300)).tolist())
        columns["source_counts"].append(count[best].tolist())
    return {name: pa.array(values) for name, values in columns.items()}


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", row_group_size=8192 if path.name == "examples.parquet" else 1 << 20)


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
        row_group_size=1 << 18,
        use_dictionary=False,
        column_encoding={"latent": "DELTA_BINARY_PACKED", "position": "DELTA_BINARY_PACKED"}
        | dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
    )


def _rounded(values: Float[np.ndarray, " n"], bits: int = 10) -> Float[np.ndarray, " n"]:
    """Round the mantissa to 23 - bits bits."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((raw + np.uint32(1 << (bits - 1))) & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)


def _manifest(
    model: Model,
    sae: SAE,
    corpus: Corpus,
    pairs: Pairs,
    summaries: dict[int, FeatureSummary],
    *,
    sae_name: str,
    sae_hash: str,
    quality: dict[str, Any] | None,
) -> dict[str, Any]:
    n_tokens = int((corpus.blocks != corpus.bos).sum())
    return {
        "format_version": FORMAT_VERSION,
        "headscope": version("headscope"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "site": sae.site.hook_name,
        "layer": sae.site.layer,
        "z_convention": "raw",
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
            "name": sae_name,
            "hash": sae_hash,
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
        "n_alive": len(summaries),
        "n_pairs": len(pairs.latent),
        "l0": len(pairs.latent) / n_tokens,
        "quality": quality,
        "definitions": DEFINITIONS,
    }
