"""Build an index: read a corpus once for what is active, and the blocks of the shown examples once more for sources.

The first pass takes the fast path (z only) and keeps every active (position, latent) pair with the DFA of each head.
The second computes attention step by step and keeps, for each example, DFA by head and source. Both sums are checked
against the pre-activation before anything is written.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from headscope import attribution
from headscope.artefact import check_output, new_folder, write_json
from headscope.capture import activations, token_batches
from headscope.corpus import Corpus
from headscope.errors import IndexFormatError, SAEError
from headscope.index.config import ExamplePlan
from headscope.index.summary import FeatureSummary, Group, choose_examples, summarise
from headscope.index.tables import Examples, Findings, Pairs, SAERecord, manifest, write_tables
from headscope.models.hf import Attention, Model
from headscope.sae.model import SAE
from headscope.sae.train import check_fits

_TOLERANCE = 1e-4  # of the summed |contributions|: float32 sums of a few hundred terms close better than this
_EXAMPLE_TOKENS = 2048  # tokens whose attention patterns are held at a time
Progress = Callable[[str, int, int], None]
"""Called with the stage, the work done and the work in all."""


def build_index(
    model: Model,
    sae: SAE,
    corpus: Corpus,
    folder: Path,
    record: SAERecord,
    *,
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
        record: what the manifest says of the SAE's file.
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
        raise SAEError(
            f"an SAE of {sae.site.hook_name}",
            expected="an SAE of z, whose features are made by heads",
            do="pass another --sae",
        )
    check_output(folder, overwrite=overwrite)
    report = on_progress or (lambda _stage, _done, _total: None)
    sae = sae.to(model.device)
    weights = attribution.HeadWeights.of(sae, model)
    pairs = _active_pairs(model, sae, weights, corpus, report)
    summaries, groups = _summaries(pairs, corpus, sae.d_sae, plan or ExamplePlan(), report)
    shown = [pairs.of(j).start + np.unique(np.concatenate([g.chosen for g in own])) for j, own in groups.items()]
    index = np.concatenate(shown) if shown else np.empty(0, dtype=np.int64)
    examples = _attribute_examples(model, sae, weights, corpus, pairs, index, report)
    found = Findings(pairs, summaries, groups, examples, weights, attribution.direct_logit_effects(sae, model))
    report("write", 0, 1)
    with new_folder(folder, overwrite=overwrite) as scratch:
        write_tables(scratch, model, sae, corpus, found)
        write_json(scratch / "manifest.json", manifest(model, sae, corpus, found, record))
    report("write", 1, 1)
    return Path(folder)


# -------------------------------------------------------------------------------------------------------------- passes
def _active_pairs(model: Model, sae: SAE, weights: attribution.HeadWeights, corpus: Corpus, report: Progress) -> Pairs:
    parts: list[tuple[np.ndarray, ...]] = []
    done = 0
    for numbers, tokens, z in activations(model, corpus, sae.site):
        flat = z.flatten(0, 1)
        pre = sae.pre_activations(flat)
        f = sae.activation(pre)
        f[(tokens == model.bos).flatten()] = 0
        row, latent = (f > 0).nonzero(as_tuple=True)
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
    for latent in range(d_sae):
        own = pairs.of(latent)
        if own.start == own.stop:
            continue
        activation, position = pairs.activation[own], pairs.position[own]
        summaries[latent] = summarise(activation, pairs.pre[own], pairs.heads[own])
        groups[latent] = choose_examples(activation, position, corpus.blocks, plan, np.random.default_rng(latent))
        if latent % 64 == 0:
            report("features", latent, d_sae)
    report("features", d_sae, d_sae)
    return summaries, groups


def _attribute_examples(
    model: Model,
    sae: SAE,
    weights: attribution.HeadWeights,
    corpus: Corpus,
    pairs: Pairs,
    index: Int[np.ndarray, " example"],
    report: Progress,
) -> Examples:
    """DFA by head and source of the pairs of some indices, block by block."""
    examples = Examples.empty(index, pairs, corpus.block_size, model.spec.n_heads)
    by_block = np.argsort(examples.block, kind="stable")
    blocks, done = np.unique(examples.block), 0
    for numbers, tokens in token_batches(corpus, model.device, blocks, batch_tokens=_EXAMPLE_TOKENS):
        low = np.searchsorted(examples.block[by_block], numbers[0])
        high = np.searchsorted(examples.block[by_block], numbers[-1], side="right")
        _fill(examples, by_block[low:high], numbers, model.attention(tokens, sae.site.layer), sae, weights)
        done += len(numbers)
        report("sources", done, len(blocks))
    return examples


def _fill(
    examples: Examples,
    chosen: Int[np.ndarray, " pair"],
    numbers: Int[np.ndarray, " block"],
    attention: Attention,
    sae: SAE,
    weights: attribution.HeadWeights,
) -> None:
    """Write the DFA of the chosen examples, all in the blocks of these numbers and sorted by block."""
    device = attention.z.device
    row = torch.from_numpy(np.searchsorted(numbers, examples.block[chosen])).to(device)
    query = torch.from_numpy(examples.query[chosen]).to(device)
    latent = torch.from_numpy(examples.latent[chosen].astype(np.int64)).to(device)
    dfa = attribution.dfa_by_source(weights, attention, row, query, latent)  # [pair, head, source]
    pre = (attention.z[row, query] * weights.encoder[latent].flatten(1)).sum(1) + sae.bias[latent]
    heads = dfa.sum(-1)
    residual = pre - heads.sum(1) - weights.bias[latent]
    _check_sum(residual, dfa)
    top = dfa.abs().sum(1).topk(examples.source.shape[1]).indices  # [pair, k]
    of_top = dfa.gather(2, top[:, None].expand(-1, dfa.shape[1], -1)).transpose(1, 2)  # [pair, k, head]
    found = {
        "pre": pre,
        "bias": weights.bias[latent],
        "residual": residual,
        "heads": heads,
        "source": top,
        "source_heads": of_top,
        "rest": heads - of_top.sum(1),
    }
    for name, values in found.items():
        getattr(examples, name)[chosen] = values.cpu().numpy()
