"""Model pass of an index build: DFA by head and source of every active (position, latent) in a run of blocks.

One run of the model serves all SAEs of all its layers. Memory does not grow with the corpus: results of a run of blocks
are returned as arrays (a part), sorted by latent, to be merged later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import attribution
from headscope.capture import is_text, token_batches
from headscope.corpus import Corpus
from headscope.errors import IndexFormatError
from headscope.index.config import IndexPlan
from headscope.index.nulls import NullDirections
from headscope.index.readers import OnBatch
from headscope.index.sources import SourceSums
from headscope.models.hf import Attention, Model
from headscope.sae.model import SAE

BATCH_TOKENS = 2048
"""Tokens whose attention patterns are in memory at a time."""
_ROWS = 256  # rows of pre-activations in memory at a time: they stay in the cache
_PAIRS = 512  # pairs whose [head, pair, source] contributions are in memory at a time, likewise
_EXAMPLE_SOURCES = 8  # sources shown per example when all are counted
_KEPT_ROWS = 1 << 18  # source tokens of all latents and thresholds together that a part stores,
_KEPT_TOKENS = 64  # but at least this many of each
_CALIBRATION_TOKENS = 1 << 13
_TOLERANCE = 1e-4  # of the summed |contributions|: float32 sums of a few hundred terms are more precise than this

MOMENTS = ("n", "f", "f2", "p", "p2")
"""Sums over the active tokens of a latent; then, per head, C_h, C_h^2 and C_h p."""
SOURCE_TOTALS = ("n", "d2", "d", "kept", "bos")
"""Sums over the active tokens of a latent and threshold; then, per head, C^2 over all sources, over the kept ones, and
over those at BOS."""
SOURCE_COLUMNS = ("n", "d2", "d")
"""Sums over the kept sources of a latent, threshold and token; then, per head, C^2 and the attention."""


@dataclass(frozen=True)
class Subject:
    """One SAE with precomputed quantities."""

    sae: SAE
    weights: attribution.HeadWeights
    nulls: NullDirections

    @property
    def layer(self) -> int:
        """The layer of its z."""
        return self.sae.site.layer


def subjects_of(model: Model, saes: Sequence[SAE], corpus: Corpus) -> list[Subject]:
    """Split each SAE by head, and fit its null directions on the first blocks of the corpus.

    Raises:
        IndexFormatError: the model's unembedding is not finite.
    """
    _check_finite("logit directions", model.logit_directions)
    blocks = np.arange(min(len(corpus.blocks), max(1, _CALIBRATION_TOKENS // corpus.block_size)))
    z: dict[int, list[Tensor]] = {sae.site.layer: [] for sae in saes}
    for numbers, tokens in token_batches(corpus, model.device, blocks, batch_tokens=BATCH_TOKENS):
        text = is_text(corpus, numbers, model.device)
        found = model.read(tokens, list({sae.site: None for sae in saes}))
        for site, value in found.items():
            z[site.layer].append(value[text])
    made = []
    for sae in saes:
        weights = attribution.HeadWeights.of(sae, model)
        sample = torch.cat(z[sae.site.layer])
        active = torch.zeros(sae.d_sae, dtype=torch.int64, device=sample.device)
        for rows in sample.split(_ROWS):
            active += (sae.encode(rows) > 0).sum(0)
        made.append(Subject(sae, weights, NullDirections.matched(weights, sample, active / max(1, len(sample)))))
    return made


# ---------------------------------------------------------------------------------------------------------------- part
def read_part(
    model: Model,
    subjects: Sequence[Subject],
    corpus: Corpus,
    blocks: Int[np.ndarray, " block"],
    plan: IndexPlan,
    on_batch: OnBatch = lambda _n: None,
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Process some blocks: return the arrays of each subject's part, and those shared by all.

    A subject's arrays: `counts` [d_sae] and, sorted by latent, then position, the columns `position`, `activation`,
    `heads` of its pairs; `moments`, `maximum`, `source_totals`, `source_keys`, `source_sums`, `null_moments`,
    `attention` (from any token to each token type, by head). Shared by all: `n_tokens`, `token_counts` and
    `source_pairs` by token type, and `losses` if planned. Sources that are not text count as the BOS.

    Raises:
        IndexFormatError: activations are not finite, or DFA does not sum to the pre-activation.
    """
    tallies = [_Tally(model, subject, plan) for subject in subjects]
    attention_to = {s.layer: torch.zeros(model.spec.d_vocab, model.spec.n_heads).double() for s in subjects}
    n_tokens, losses = 0, []
    token_counts, source_pairs = (torch.zeros(model.spec.d_vocab, dtype=torch.int64) for _ in range(2))
    batch_tokens = BATCH_TOKENS if plan.n_sources else BATCH_TOKENS // 16  # all sources need much memory
    for numbers, tokens in token_batches(corpus, model.device, blocks, batch_tokens=batch_tokens):
        text = is_text(corpus, numbers, model.device)
        n_tokens += int(text.sum())
        token_counts += torch.bincount(tokens[text], minlength=model.spec.d_vocab).cpu()
        kinds = torch.where(text, tokens, model.bos)  # a separator with an ordinary id is not a source of that token
        later = text.flip(1).cumsum(1).flip(1)  # text tokens from each position on: destinations that can attend to it
        source_pairs.index_add_(0, kinds.flatten().cpu(), later.flatten().cpu())
        if plan.losses:
            own = model.losses(tokens)
            _check_finite("losses", own)
            losses.append(torch.nn.functional.pad(own, (0, 1), value=float("nan")).cpu().numpy())
        for layer, attention in model.attentions(tokens, list(attention_to)).items():
            _check_finite("activations", attention.z)
            received = (text[:, None, None].to(attention.pattern) @ attention.pattern)[:, :, 0]  # [row, head, source]
            by_source = received.transpose(1, 2).flatten(0, 1).double().cpu()
            attention_to[layer].index_add_(0, kinds.flatten().cpu(), by_source)
            for tally in tallies:
                if tally.subject.layer == layer:
                    tally.add(numbers, tokens, kinds, text, attention)
        on_batch(len(numbers))
    parts = [t.result() | {"attention": attention_to[t.subject.layer].numpy()} for t in tallies]
    shared = {
        "n_tokens": np.array([n_tokens]),
        "token_counts": token_counts.numpy(),
        "source_pairs": source_pairs.numpy(),
    }
    if losses:
        shared["losses"] = np.concatenate(losses).astype(np.float32)
    return parts, shared


def _check_finite(what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise IndexFormatError(
            f"{what} that are NaN or infinite", expected="finite ones", do="check the model's weights and dtype"
        )


def source_sums(d_vocab: int, n_owners: int, plan: IndexPlan) -> SourceSums:
    """Make sums by (latent, threshold) and source token, in bounded memory unless the plan stores all sources."""
    kept = None if plan.n_sources is None else max(_KEPT_TOKENS, _KEPT_ROWS // n_owners)
    return SourceSums(d_vocab, SOURCE_COLUMNS.index("d2"), kept)


class _Tally:
    """Accumulated results of one subject over a part."""

    def __init__(self, model: Model, subject: Subject, plan: IndexPlan) -> None:
        self.subject, self._plan, self._bos = subject, plan, model.bos
        self._d_vocab, self._levels = model.spec.d_vocab, len(plan.thresholds)
        heads, device = model.spec.n_heads, model.device

        def sums(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=torch.float64, device=device)

        self._moments = sums(subject.sae.d_sae, len(MOMENTS) + 3 * heads)
        self._totals = sums(subject.sae.d_sae * self._levels, len(SOURCE_TOTALS) + 3 * heads)
        self._nulls = sums(len(subject.nulls.kind), 3 + 3 * heads)
        self._sources = source_sums(self._d_vocab, len(self._totals), plan)
        self._pairs: list[tuple[Tensor, ...]] = []
        self._n_active = 0  # counted independently of the pairs, to check them
        self._thresholds = torch.tensor(plan.thresholds[1:], device=device, dtype=subject.sae.W_enc.dtype)

    def add(
        self, numbers: Int[np.ndarray, " row"], tokens: Tensor, kinds: Tensor, text: Tensor, attention: Attention
    ) -> None:
        """Add a batch; `kinds` are the tokens, with BOS in place of those that are not text."""
        row, query, latent, f, pre, n_active = _active(self.subject.sae, attention.z, text)
        self._n_active += n_active
        found = _contributions(self.subject.weights, attention, (row, query, latent), self._plan.n_sources)
        block = torch.from_numpy(numbers).to(row.device)[row]
        self._pairs.append((latent, block * tokens.shape[1] + query, f, found.heads))
        check_sum(pre - found.heads.sum(1) - self.subject.weights.bias[latent], found.heads)
        sources = row[:, None], found.source
        self._add_sources(found, kinds[sources], tokens[sources] == self._bos, query, latent, f)
        moments = [_moment_rows(f, None, powers=2), _moment_rows(pre, found.heads, powers=2)[:, 1:]]
        self._moments.index_add_(0, latent, torch.cat(moments, 1))
        null, p, heads = self.subject.nulls.active(attention.z[text], self.subject.weights.offset)
        self._nulls.index_add_(0, null, _moment_rows(p, heads, powers=2))

    def _add_sources(
        self, found: "_Contributions", token: Tensor, is_bos: Tensor, query: Tensor, latent: Tensor, f: Tensor
    ) -> None:
        """Add the kept sources of a batch's pairs, and their totals, by latent, threshold and token."""
        level = torch.searchsorted(self._thresholds, f) if self._levels > 1 else 0
        owner = latent * self._levels + level
        exists = found.source <= query[:, None]  # all others are 0 where they are not: the padding of early queries
        token = torch.where(exists, token, self._bos)
        squares, of_heads = found.summed.square(), found.by_head.square()
        at_bos = (squares * is_bos).sum(1)
        one = torch.ones_like(at_bos)
        totals = torch.stack([one, found.total_square, found.heads.sum(1), squares.sum(1), at_bos], 1)
        by_head = [found.head_square, of_heads.sum(1), (of_heads * is_bos[:, :, None]).sum(1)]
        self._totals.index_add_(0, owner, torch.cat([totals, *by_head], 1).double())
        values = torch.cat([torch.stack([exists.to(squares), squares, found.summed], 2), of_heads, found.attention], 2)
        self._sources.add((owner[:, None] * self._d_vocab + token).flatten(), values.flatten(0, 1))

    def result(self) -> dict[str, np.ndarray]:
        """Return the arrays of the part."""
        latent, position, f, heads = (torch.cat(column) for column in zip(*self._pairs, strict=True))
        latent, order = latent.sort(stable=True)
        d_sae = self.subject.sae.d_sae
        maximum = torch.zeros(d_sae, dtype=f.dtype, device=f.device).scatter_reduce_(0, latent, f[order], "amax")
        key, values = self._sources.result()
        arrays = {
            "n_active_tokens": torch.tensor([self._n_active]),
            "counts": torch.bincount(latent, minlength=d_sae),
            "position": position[order],
            "activation": f[order].float(),
            "heads": heads.index_select(0, order).float(),
            "maximum": maximum,
            "moments": self._moments,
            "source_totals": self._totals,
            "source_keys": key,
            "source_sums": values.to(f.dtype),
            "null_moments": self._nulls,
        }
        return {name: tensor.cpu().numpy() for name, tensor in arrays.items()}


class _Contributions(NamedTuple):
    """DFA of some pairs: sums over all sources, and the kept ones."""

    heads: Float[Tensor, "pair head"]
    """C_h."""
    head_square: Float[Tensor, "pair head"]
    """Sum over sources of C[h, s]^2."""
    total_square: Float[Tensor, " pair"]
    """Sum over sources of (sum_h C[h, s])^2."""
    source: Int[Tensor, "pair k"]
    """Position of each kept source."""
    summed: Float[Tensor, "pair k"]
    """Its DFA, heads summed."""
    by_head: Float[Tensor, "pair k head"]
    attention: Float[Tensor, "pair k head"]

    @classmethod
    def none(cls, like: Attention, n_heads: int) -> "_Contributions":
        """Make an empty record."""
        empty = like.z.new_empty
        columns = (empty(0, n_heads), empty(0, n_heads), empty(0), empty(0, 1, dtype=torch.int64), empty(0, 1))
        return cls(*columns, empty(0, 1, n_heads), empty(0, 1, n_heads))


def _contributions(
    weights: attribution.HeadWeights, attention: Attention, pairs: tuple[Tensor, Tensor, Tensor], k: int | None
) -> _Contributions:
    """Compute DFA of (row, query, latent), sorted by row, then query, with the k largest sources of each (None: all).

    Pairs are processed in chunks, so that [head, pair, source] stays in the cache.
    """
    row, query, latent = pairs
    n_positions = attention.pattern.shape[-1]
    k = min(k or n_positions, n_positions)
    n_pairs = torch.bincount(row, minlength=len(attention.z)).tolist()

    def of_sequence(i: int, queries: Tensor, latents: Tensor) -> list[_Contributions]:
        value = attention.value[i].transpose(0, 1).contiguous().transpose(0, 1)  # each head's values are contiguous
        found = []
        for q, j in zip(queries.split(_PAIRS), latents.split(_PAIRS), strict=True) if len(queries) else ():
            n = int(q[-1]) + 1  # later sources contribute 0
            pattern = attention.pattern[i, :, :, :n].index_select(1, q)
            dfa = attribution.dfa_of_sequence(weights, value[:n], pattern, j)
            found.append(_contributions_of(dfa, pattern, k))
        return found

    sequences = zip(query.split(n_pairs), latent.split(n_pairs), strict=True)
    columns = [piece for i, (queries, latents) in enumerate(sequences) for piece in of_sequence(i, queries, latents)]
    if not columns:
        return _Contributions.none(attention, len(weights.offset))
    return _Contributions(*(torch.cat(column) for column in zip(*columns, strict=True)))


def _contributions_of(
    dfa: Float[Tensor, "head pair source"], pattern: Float[Tensor, "head pair source"], k: int
) -> _Contributions:
    summed, missing = dfa.sum(0), max(0, k - dfa.shape[2])
    if missing:  # early queries have fewer sources than are kept: filled up with later ones, which contribute 0
        summed, dfa, pattern = (torch.nn.functional.pad(t, (0, missing)) for t in (summed, dfa, pattern))
    top = largest_sources(summed, k)
    of_heads = top.expand(len(dfa), -1, -1)
    kept = (
        top,
        summed.gather(1, top),
        dfa.gather(2, of_heads).permute(1, 2, 0),
        pattern.gather(2, of_heads).permute(1, 2, 0),
    )
    squares = torch.linalg.vector_norm(dfa, dim=-1).square().T
    return _Contributions(dfa.sum(-1).T, squares, summed.square().sum(1), *kept)


def _active(
    sae: SAE, z: Float[Tensor, "row query d_in"], text: Bool[Tensor, "row query"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Return (row, query, latent, activation, pre-activation) of active latents at text tokens, and their number."""
    flat, is_text = z.flatten(0, 1), text.flatten()

    def of_rows(start: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        pre = sae.pre_activations(flat[start : start + _ROWS])
        f = sae.activation(pre)
        active = (f > 0) & is_text[start : start + _ROWS, None]
        token, latent = active.nonzero(as_tuple=True)
        at = token * sae.d_sae + latent
        return token + start, latent, f.flatten()[at], pre.flatten()[at], int(active.sum())

    *columns, counts = zip(*map(of_rows, range(0, len(flat), _ROWS)), strict=True)
    token, latent, f, pre = (torch.cat(column) for column in columns)
    return token // z.shape[1], token % z.shape[1], latent, f, pre, sum(counts)


def _moment_rows(
    value: Float[Tensor, " pair"], heads: Float[Tensor, "pair head"] | None, powers: int
) -> Float[Tensor, "pair column"]:
    """Return rows 1, value, value^2, ... and, per head, C, C^2, C value."""
    value = value.double()
    columns = [torch.stack([value**k for k in range(powers + 1)], 1)]
    if heads is not None:
        heads = heads.double()
        columns += [heads, heads.square(), heads * value[:, None]]
    return torch.cat(columns, 1)


def largest_sources(summed: Float[Tensor, "pair source"], k: int) -> Int[Tensor, "pair k"]:
    """Return the k sources of largest |DFA|, unordered; |DFA| counts to about four digits, ties go to the first.

    The source's index, counted from the last, replaces the last bits of the number, so that selecting numbers selects
    indices. Among zero contributions, sources before the query precede those after it.
    """
    n = summed.shape[1]
    if k >= n:
        return torch.arange(n, device=summed.device).expand_as(summed)
    mask = (1 << (n - 1).bit_length()) - 1
    from_last = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=summed.device)
    packed = (summed.abs().float().view(torch.int32) & ~mask) | from_last
    if packed.device.type == "cpu":  # numpy selects eight times as fast as torch here
        chosen = torch.from_numpy(np.partition(packed.numpy(), n - k, axis=1)[:, n - k :])
    else:
        chosen = packed.topk(k, sorted=False).values
    return n - 1 - (chosen & mask).long()


def check_sum(residual: Float[Tensor, " pair"], parts: Float[Tensor, "pair *parts"]) -> None:
    """Check that parts sum to the whole; otherwise the numbers are wrong and nothing is written.

    Raises:
        IndexFormatError: they do not.
    """
    if len(residual) == 0:
        return
    scale = 1 + parts.abs().flatten(1).sum(1)
    worst = (residual.abs() / scale).max().item()
    if not worst < _TOLERANCE:
        raise IndexFormatError(
            f"DFA + bias misses the pre-activation by {worst:.1e} of its parts",
            expected=f"less than {_TOLERANCE:g}",
            do="use float32 weights; if they are, please report it",
        )


# ------------------------------------------------------------------------------------------------------------ examples
def read_examples(
    model: Model,
    subject: Subject,
    corpus: Corpus,
    latent: Int[np.ndarray, " example"],
    position: Int[np.ndarray, " example"],
    plan: IndexPlan,
    on_batch: OnBatch = lambda _n: None,
) -> dict[str, np.ndarray]:
    """Compute DFA by head and source, and attention, of (latent, position) sorted by position; output is by latent.

    Raises:
        IndexFormatError: DFA does not sum to the pre-activation.
    """
    block, query = np.divmod(position, corpus.block_size)
    columns: list[dict[str, Tensor]] = []
    for numbers, tokens in token_batches(corpus, model.device, np.unique(block), batch_tokens=BATCH_TOKENS):
        own = slice(*np.searchsorted(block, [numbers[0], numbers[-1] + 1]))
        row = np.searchsorted(numbers, block[own])
        attention = model.attentions(tokens, [subject.layer])[subject.layer]
        where = torch.from_numpy(np.stack([row, query[own], latent[own]]).astype(np.int64)).to(model.device)
        columns.append(_examples(subject, attention, where, plan.n_sources or _EXAMPLE_SOURCES))
        on_batch(len(numbers))
    names = columns[0] if columns else {}
    joined = {name: torch.cat([column[name] for column in columns]).cpu().numpy() for name in names}
    order = np.lexsort((position, latent))
    return {
        "counts": np.bincount(latent, minlength=subject.sae.d_sae),
        "position": position[order],
        **{name: column[order] for name, column in joined.items()},
    }


def _examples(subject: Subject, attention: Attention, where: Int[Tensor, "3 pair"], k: int) -> dict[str, Tensor]:
    row, query, latent = where
    weights = subject.weights
    found = _contributions(weights, attention, (row, query, latent), k)
    z = attention.z[row, query].view(len(row), *weights.offset.shape)
    pre = (z * weights.encoder[:, latent].transpose(0, 1)).flatten(1).sum(1) + subject.sae.bias[latent]
    residual = pre - found.heads.sum(1) - weights.bias[latent]
    check_sum(residual, found.heads)
    order = found.summed.abs().sort(dim=1, descending=True, stable=True).indices  # largest source first
    by_head = order[:, :, None].expand_as(found.by_head)
    of_sources = found.by_head.gather(1, by_head)
    columns = {
        "pre": pre,
        "bias": weights.bias[latent],
        "residual": residual,
        "heads": found.heads,
        "source_heads": of_sources,
        "source_pattern": found.attention.gather(1, by_head),
        "rest": found.heads - of_sources.sum(1),
    }
    return {name: column.float() for name, column in columns.items()} | {"source": found.source.gather(1, order).int()}
