"""Source tokens of a feature over a corpus, by direct feature attribution (DFA).

Head shares come from the index (`studies.how.head_shares`), without torch. Sources need the model: it runs once on each
sampled block, and every source of every active token counts, not only the largest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.attribution import DFA, HeadWeights, dfa_of_sequence
from headscope.errors import HeadscopeError, ModelError
from headscope.index.live import LiveIndex
from headscope.stats import Estimate, Measure, estimate_of, jensen_shannon, ratio
from headscope.studies.support.active import Text, drawn

_BATCH_TOKENS = 2048
_TOP_TOKENS = 20
_SQUARED = "sum C_h^2 / sum over heads"
N_NULL = 4
"""Number of random directions to compare with."""
_NULL_KEY, _ELSEWHERE_KEY = 1, 2  # distinguish the random numbers of nulls and of other blocks from those of samples


# -------------------------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True)
class AttentionTo:
    """Mean attention of one head from a text token d to all sources s <= d in a set of tokens.

    The first two are over tokens where the feature is active, the last two its baselines where it is not and a token of
    the set is at or before d.
    """

    active: Measure
    """Over all active tokens (the post's)."""
    visible: Measure
    """Over those with a token of the set at or before them: to be compared with the baselines."""
    inactive: Measure
    """Over inactive tokens of the same blocks."""
    elsewhere: Measure
    """Over tokens of other blocks, in which the feature is never active; sampled, at most as many blocks."""


@dataclass(frozen=True)
class HeadSources:
    """Contribution of one head from a set of source tokens."""

    head: int
    squared: Measure
    """Share of `sum_s C[h, s]^2`."""
    linear: Measure
    """Share of `sum_s C[h, s]`; may be negative or above 1."""
    attention: AttentionTo


@dataclass(frozen=True)
class TokenShare:
    """One token type among all sources; every source counts."""

    token: int
    summed: float
    separate: float
    linear: float
    heads: Float[np.ndarray, " head"]
    """Share of `sum_s C[h, s]^2` of each head; NaN for a head that contributes nothing."""


@dataclass(frozen=True)
class SourceShares:
    """Share of a feature that comes from a set of source tokens, over its active tokens above a threshold."""

    latent: int
    tokens: tuple[int, ...]
    """The set."""
    threshold: float
    n: int
    """Active tokens sampled."""
    n_active: int
    """Active tokens above the threshold in the index."""
    n_blocks: int
    """Blocks read for them."""
    summed: Measure
    """Share of `sum_s (sum_h C[h, s])^2`: heads are summed, then squared."""
    separate: Measure
    """Share of `sum_s sum_h C[h, s]^2`: squared, then summed over heads."""
    linear: Measure
    """Share of `sum_s sum_h C[h, s]`; may be negative or above 1."""
    bos: Measure
    """The share of the special tokens in the same sum as `summed`: they are in all denominators."""
    frequency: Measure
    """Sources in the set among all sources of these tokens: the share if all sources contributed equally."""
    heads: tuple[HeadSources, ...]
    top: tuple[TokenShare, ...]
    """The 20 token types of the largest share, with heads summed."""


@dataclass(frozen=True)
class _Rows:
    """Numbers per destination, one row each."""

    document: np.ndarray
    activation: np.ndarray
    inside: np.ndarray  # [row, direction, quantity]: summed over sources in the set; the first direction is the feature
    special: np.ndarray  # [row]: at special tokens
    total: np.ndarray  # [row, direction, quantity]
    n_inside: np.ndarray
    n_sources: np.ndarray
    attention: np.ndarray  # [row, head]

    @classmethod
    def joined(cls, parts: Sequence["_Rows"]) -> "_Rows":
        return cls(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))

    def of(self, chosen: np.ndarray) -> "_Rows":
        return _Rows(*(values[chosen] for values in vars(self).values()))


@dataclass(frozen=True)
class _Baseline:
    document: np.ndarray
    attention: np.ndarray  # [row, head]

    @classmethod
    def joined(cls, parts: Sequence["_Baseline"], n_heads: int) -> "_Baseline":
        if not parts:
            return cls(np.empty(0, np.int64), np.empty((0, n_heads)))
        return cls(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def source_shares(
    live: LiveIndex,
    latent: int,
    tokens: Sequence[int],
    *,
    thresholds: Sequence[float] = (0.0,),
    max_blocks: int | None = None,
    n_null: int = N_NULL,
    seed: int = 0,
) -> tuple[SourceShares, ...]:
    """Measure the share of a feature that comes from source tokens of a set, and the attention to them.

    Runs the model over the blocks in which the feature is active, and over as many others that hold the set. The null
    of a share of squares is that of random directions of z at the same tokens: mean and range over them. The sums of
    such directions are near 0, and their ratios arbitrary, so the null of a linear share is `frequency`: that of equal
    contributions.

    Args:
        live: the index with its model and SAE.
        latent: the feature.
        tokens: the set, as token ids.
        thresholds: one record for each, over active tokens with an activation above it.
        max_blocks: maximum number of the feature's blocks, sampled uniformly; None: all.
        n_null: number of random directions.
        seed: seed of the samples.

    Raises:
        IndexFormatError: no such latent.
        HeadscopeError: an empty set, a token that the model does not have, or a special one.
    """
    work = _Sources(live, latent, tuple(int(t) for t in tokens), thresholds, n_null, seed)
    return work.run(max_blocks)


class _Sources:
    """The runs for source shares, and their sums."""

    def __init__(
        self,
        live: LiveIndex,
        latent: int,
        tokens: tuple[int, ...],
        thresholds: Sequence[float],
        n_null: int,
        seed: int,
    ) -> None:
        self.model, self.layer, self.seed = live.model, live.sae.site.layer, seed
        self.latent, self.tokens, self.thresholds = latent, tokens, tuple(thresholds)
        self.found = live.index.activations(latent)
        _check_set(tokens, self.model.spec.d_vocab, live.index.vocabulary[1])
        self.text, self.size = Text.of(live.index), live.index.block_size
        weights = HeadWeights.of(live.sae, self.model)
        own = weights.encoder[:, latent]
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(n_null, *own.shape, generator=generator).to(own)
        encoder = torch.cat([own[:, None], random.transpose(0, 1)], dim=1)
        self.weights = replace(weights, encoder=encoder, bias=weights.bias[:1].expand(n_null + 1))
        self.directions = torch.arange(n_null + 1, device=own.device)
        in_set = torch.zeros(self.model.spec.d_vocab, dtype=torch.bool)
        in_set[list(tokens)] = True
        self.in_set = in_set.to(own.device)
        shape = len(self.thresholds), 3 + 2 * self.model.spec.n_heads, self.model.spec.d_vocab
        self.table = torch.zeros(shape, dtype=torch.float64, device=own.device)

    def run(self, max_blocks: int | None) -> tuple[SourceShares, ...]:
        """Do all runs, then make the records."""
        own = np.unique(self.found.position // self.size)
        chosen = own[drawn(len(own), max_blocks, (self.seed, self.latent))]
        holds = np.isin(self.text.tokens, self.tokens) & self.text.is_text
        others = np.setdiff1d(np.flatnonzero(holds.any(1)), own)
        others = others[drawn(len(others), len(chosen), (self.seed, self.latent, _ELSEWHERE_KEY))]
        active, inactive, elsewhere = [], [], []
        for block, tokens, pattern, value in self._attention(chosen):
            rows, baseline = self._of_block(block, tokens, pattern, value)
            active.append(rows)
            inactive.append(baseline)
        for block, tokens, pattern, _ in self._attention(others):
            elsewhere.append(self._baseline(block, tokens, pattern, self.text.is_text[block]))
        n_heads = self.model.spec.n_heads
        baselines = [_Baseline.joined(parts, n_heads) for parts in (inactive, elsewhere)]
        rows = _Rows.joined(active) if active else None
        return tuple(
            self._record(number, None if rows is None else rows.of(rows.activation > threshold), baselines, len(chosen))
            for number, threshold in enumerate(self.thresholds)
        )

    # ------------------------------------------------------------------------------------------------------------ runs
    def _attention(self, blocks: np.ndarray) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield each block with tokens, pattern `[head, query, source]` and values `[source, head, d_head]`."""
        step = max(1, _BATCH_TOKENS // self.size)
        for start in range(0, len(blocks), step):
            own = blocks[start : start + step]
            tokens = torch.from_numpy(self.text.tokens[own].astype(np.int64)).to(self.in_set.device)
            found = self.model.attention(tokens, self.layer)
            for i, block in enumerate(own.tolist()):
                yield block, tokens[i], found.pattern[i], found.value[i]

    def _of_block(self, block: int, tokens: Tensor, whole: Tensor, value: Tensor) -> tuple[_Rows, _Baseline]:
        low, high = np.searchsorted(self.found.position, [block * self.size, (block + 1) * self.size])
        query = self.found.position[low:high] % self.size
        activation = self.found.activation[low:high]
        quiet = self.text.is_text[block].copy()
        quiet[query] = False
        at = torch.from_numpy(query.astype(np.int64)).to(tokens.device)
        n, k = len(query), len(self.directions)
        pattern = whole.index_select(1, at)  # [head, destination, source]
        wide = pattern.repeat_interleave(k, dim=1)
        dfa = dfa_of_sequence(self.weights, value, wide, self.directions.repeat(n))
        quantities = _quantities(dfa.double().view(len(dfa), n, k, -1))  # [quantity, destination, direction, source]
        inside = self._inside(block, tokens)
        special = torch.from_numpy(~self.text.is_text[block]).to(tokens.device)
        for number, threshold in enumerate(self.thresholds):
            above = torch.from_numpy(activation > threshold).to(tokens.device)
            self.table[number].index_add_(1, tokens, quantities[:, above, 0].sum(1))
        visible = torch.arange(self.size, device=tokens.device) <= at[:, None]
        rows = _Rows(
            document=self.text.document[block][query],
            activation=activation,
            inside=_array(quantities[..., inside].sum(-1).permute(1, 2, 0)),
            special=_array(quantities[0, :, 0][:, special].sum(-1)),
            total=_array(quantities.sum(-1).permute(1, 2, 0)),
            n_inside=_array((visible & inside).sum(1)),
            n_sources=_array(at + 1),
            attention=_array(pattern[..., inside].double().sum(-1).T),
        )
        return rows, self._baseline(block, tokens, whole, quiet)

    def _inside(self, block: int, tokens: Tensor) -> Bool[Tensor, " position"]:
        """Mark the tokens of a block that are text and in the set."""
        return self.in_set[tokens] & torch.from_numpy(self.text.is_text[block]).to(tokens.device)

    def _baseline(self, block: int, tokens: Tensor, pattern: Tensor, quiet: Bool[np.ndarray, " position"]) -> _Baseline:
        """Add attention to the set from text tokens where the feature is inactive and a token of the set is visible."""
        inside = self._inside(block, tokens)
        chosen = quiet & inside.cumsum(0).bool().cpu().numpy()
        attended = pattern[..., inside].double().sum(-1).T  # [query, head]
        return _Baseline(self.text.document[block][chosen], _array(attended)[chosen])

    # --------------------------------------------------------------------------------------------------------- records
    def _record(self, number: int, rows: _Rows | None, baselines: Sequence[_Baseline], n_blocks: int) -> SourceShares:
        threshold, n_heads = self.thresholds[number], self.model.spec.n_heads
        rows = self._empty() if rows is None else rows
        frequency = ratio(rows.document, rows.n_inside, rows.n_sources, definition="sources in the set / all sources")
        alike = estimate_of(frequency)
        linear = {2, *range(3 + n_heads, 3 + 2 * n_heads)}  # of `_quantities`

        def share(quantity: int, definition: str) -> Measure:
            inside, total = rows.inside[..., quantity], rows.total[..., quantity]
            if quantity in linear:
                return ratio(rows.document, inside[:, 0], total[:, 0], definition=definition, null=alike)
            with np.errstate(divide="ignore", invalid="ignore"):
                random = inside[:, 1:].sum(0) / total[:, 1:].sum(0)
            random = random[np.isfinite(random)]
            null = Estimate(float(random.mean()), float(random.min()), float(random.max())) if len(random) else None
            return ratio(rows.document, inside[:, 0], total[:, 0], definition=definition, null=null)

        def attended(h: int) -> AttentionTo:
            seen = rows.n_inside > 0
            own = rows.attention[:, h]
            places = [
                (rows.document, own, "active tokens"),
                (rows.document[seen], own[seen], "active tokens that can see one"),
                (baselines[0].document, baselines[0].attention[:, h], "inactive tokens of these blocks that can"),
                (baselines[1].document, baselines[1].attention[:, h], "tokens of blocks without the feature that can"),
            ]
            return AttentionTo(
                *(
                    ratio(doc, values, np.ones(len(doc)), definition=f"mean attention to the set over {where}")
                    for doc, values, where in places
                )
            )

        return SourceShares(
            latent=self.latent,
            tokens=self.tokens,
            threshold=threshold,
            n=len(rows.document),
            n_active=int((self.found.activation > threshold).sum()),
            n_blocks=n_blocks,
            summed=share(0, "sum over s in the set of (sum_h C[h, s])^2 / the same over all s"),
            separate=share(1, "sum over s in the set of sum_h C[h, s]^2 / the same over all s"),
            linear=share(2, "sum over s in the set of sum_h C[h, s] / the same over all s"),
            bos=ratio(
                rows.document,
                rows.special,
                rows.total[:, 0, 0],
                definition="sum over special s of (sum_h C[h, s])^2 / the same over all s",
            ),
            frequency=frequency,
            heads=tuple(
                HeadSources(
                    head=h,
                    squared=share(3 + h, "sum over s in the set of C[h, s]^2 / the same over all s"),
                    linear=share(3 + n_heads + h, "sum over s in the set of C[h, s] / the same over all s"),
                    attention=attended(h),
                )
                for h in range(n_heads)
            ),
            top=self._top(number),
        )

    def _empty(self) -> _Rows:
        quantities, heads = self.table.shape[1], self.model.spec.n_heads
        sums = np.empty((0, len(self.directions), quantities))
        none = np.empty(0)
        return _Rows(none.astype(np.int64), none, sums, none, sums, none, none, np.empty((0, heads)))

    def _top(self, number: int) -> tuple[TokenShare, ...]:
        table = self.table[number].cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = table / table.sum(1, keepdims=True)
        order = np.argsort(-table[0], kind="stable")[:_TOP_TOKENS]
        n_heads = self.model.spec.n_heads
        return tuple(
            TokenShare(int(t), *(float(shares[q, t]) for q in range(3)), heads=shares[3 : 3 + n_heads, t])
            for t in order
            if table[0, t] > 0
        )


def _check_set(tokens: Sequence[int], d_vocab: int, special: Sequence[int]) -> None:
    wrong = [t for t in tokens if not 0 <= t < d_vocab or t in special]
    if wrong or not tokens:
        raise HeadscopeError(
            f"source tokens {wrong[:5]}" if tokens else "no source token",
            expected=f"ids from 0 to {d_vocab - 1}, none of a special token (their share is a figure of its own)",
            do="pass the ids of some tokens of the text",
        )


def _quantities(dfa: Float[Tensor, "head row direction source"]) -> Float[Tensor, "quantity row direction source"]:
    """Return sums of shares: heads summed and squared; squared and summed; summed; by head squared; by head."""
    summed, squares = dfa.sum(0), dfa.square()
    return torch.cat([torch.stack([summed.square(), squares.sum(0), summed]), squares, dfa])


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------- one example
@dataclass(frozen=True)
class HeadOnExample:
    """Contribution of one head to a feature at one token."""

    head: int
    contribution: float
    """C_h."""
    share: float
    """Share of the sum over all heads; may be negative or above 1."""
    sources: Int[np.ndarray, " source"]
    """Positions in the block, largest |C[h, s]| first."""
    dfa: Float[np.ndarray, " source"]
    """C[h, s] of each."""
    attention: Float[np.ndarray, " source"]
    """Attention of this head to each."""


@dataclass(frozen=True)
class HeadComparison:
    """Comparison of heads at one token of the corpus."""

    dfa: DFA
    heads: tuple[HeadOnExample, ...]
    """Largest |C_h| first."""
    agreement: Float[np.ndarray, "head head"]
    """`1 - JSD` in bits of the |C[h, s]| over sources, normalised, in the order of `heads`: 1 where two heads read the
    feature from the same sources, 0 where they share none; NaN for a head that contributes nothing."""


def compare_heads(
    live: LiveIndex, position: int, latent: int, heads: Sequence[int] | None = None, *, k: int = 5
) -> HeadComparison:
    """Compare heads at one token: their contributions, their sources, and the agreement of these.

    Args:
        live: the index with its model and SAE.
        position: position of the token in the corpus.
        latent: the feature, active there or not.
        heads: the heads; default: all.
        k: number of sources to list per head.

    Raises:
        IndexFormatError: no such position or latent.
        ModelError: no such head.
    """
    n_heads = live.model.spec.n_heads
    chosen = list(range(n_heads) if heads is None else heads)
    wrong = [h for h in chosen if not 0 <= h < n_heads]
    if wrong:
        raise ModelError(
            f"heads {wrong} of layer {live.sae.site.layer}", expected=f"0 to {n_heads - 1}", do="name other heads"
        )
    (found,) = live.dfa(position, [latent])
    chosen.sort(key=lambda h: -abs(found.by_head[h]))
    records = []
    for h in chosen:
        order = np.argsort(-np.abs(found.by_source[h]), kind="stable")[:k]
        records.append(
            HeadOnExample(
                head=h,
                contribution=float(found.by_head[h]),
                share=float(found.by_head[h] / found.by_head.sum()),
                sources=order,
                dfa=found.by_source[h, order],
                attention=found.pattern[h, order],
            )
        )
    return HeadComparison(found, tuple(records), _agreement(np.abs(found.by_source[chosen].astype(np.float64))))


def _agreement(mass: Float[np.ndarray, "head source"]) -> Float[np.ndarray, "head head"]:
    """Compute 1 - Jensen-Shannon divergence in bits between rows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = mass / mass.sum(1, keepdims=True)
    return 1 - jensen_shannon(*np.broadcast_arrays(p[:, None], p[None]))
