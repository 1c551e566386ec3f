"""The exact direct-path effect of every live feature of an index on the loss, as columns of the index.

The model is run once over the text, for its final residual streams; each active pair then takes one operation of the
vocabulary's size (`studies.what.direct_path`). Features with many active tokens are sampled uniformly, at most
`max_tokens` each, and fewer where pairs times vocabulary would exceed `max_work`; totals are scaled up to n.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from headscope.errors import StudyError
from headscope.index.columns import add_columns
from headscope.index.live import LiveIndex
from headscope.limits import Above0, Count, check
from headscope.site import Site
from headscope.stats import MINIMUM, MINIMUM_UNITS, quotient, resampled, unit_draws
from headscope.studies.support.active import ActiveTokens, Text, drawn
from headscope.studies.what.direct_path import Pairs, direct_loss_changes

STUDY = "effects"
MAX_WORK = 1e11
"""Maximum of pairs times vocabulary."""
MAX_TOKENS = 2_000
"""Maximum active tokens per feature: the mean is then known to about 2 % of its standard deviation."""
N_NULL = 32
"""Tokens of each feature at which a random direction is subtracted instead."""
N_SAMPLES = 500
_PART_POSITIONS = 1 << 14  # final residual streams in memory at a time
_BATCH_TOKENS = 2048  # processed in one run
_NULL_KEY = 2

DEFINITIONS = {
    "n": "active tokens whose next token is text in the same block",
    "sampled": "of these, looked at: all, or so many drawn evenly",
    "mean": "mean loss change over them, nats, when the feature's direct write to the logits is taken away, the final "
    "norm recomputed; exact at each token",
    "mean_low": "lower end of its 95 % interval, documents resampled",
    "mean_high": "upper end",
    "total": "n * mean: the summed loss change, nats",
    "importance": "total / text tokens of the corpus: nats a token that the direct path of this feature is worth",
    "increase": "n * mean of max(change, 0): the summed loss increase, nats",
    "top_token": "the token whose logit the feature raises most",
    "top_rate": "share of the tokens looked at whose next token is that one: what the shares would be if the effect "
    f"had nothing to do with it. Shares need {MINIMUM} tokens, intervals also {MINIMUM_UNITS} documents",
    "top_share": "share of the loss increase that is on them",
    "top_share_low": "lower end of its 95 % interval, documents resampled",
    "top_share_high": "upper end",
    "top_share_net": "share of the summed loss change that is on them; may be negative or above 1",
    "top_share_net_low": "lower end of its 95 % interval, documents resampled",
    "top_share_net_high": "upper end",
    "null_mean": f"mean loss change at up to {N_NULL} of these tokens when a random direction that heads can write, of "
    "the same norm in the residual stream, is taken away instead",
}

Progress = Callable[[int, int], None]
"""Progress callback: called with the pairs done and the total."""


@dataclass(frozen=True)
class DirectEffects:
    """Direct-path effect of every latent; arrays have one entry per latent, NaN where undefined."""

    n_tokens: int
    """Text tokens of the corpus."""
    n_pairs: int
    """Active tokens sampled, over all latents."""
    max_work: float
    most: int | None
    """Maximum number of active tokens sampled per feature; None is all."""
    seed: int
    n: Int[np.ndarray, " latent"]
    sampled: Int[np.ndarray, " latent"]
    top_token: Int[np.ndarray, " latent"]
    values: dict[str, Float[np.ndarray, " latent"]]
    """The other columns of `DEFINITIONS`, by name."""

    def lines(self) -> list[str]:
        """A summary in words."""
        which = "all" if self.most is None else f"at most {self.most:,} of each feature"
        return [f"effects: {self.n_pairs:,} active tokens ({which}) of {int((self.n > 0).sum()):,} features"]

    def table(self) -> pa.Table:
        """Return one row per latent, null where undefined."""
        columns: dict[str, pa.Array] = {"latent": pa.array(range(len(self.n)), pa.int32())}
        for name in DEFINITIONS:
            own = self.values.get(name)
            if own is None:
                columns[name] = pa.array(getattr(self, name), pa.int64() if name != "top_token" else pa.int32())
            else:
                columns[name] = pa.array(own, pa.float64(), mask=~np.isfinite(own))
        return pa.table(columns)

    def provenance(self) -> dict:
        """Return the provenance stored with the columns."""
        settings = {"max_work": self.max_work, "most": self.most, "seed": self.seed, "n_null": N_NULL}
        limits = {"minimum_tokens": MINIMUM, "minimum_documents": MINIMUM_UNITS, "n_samples": N_SAMPLES}
        return {"settings": settings | limits, "definitions": DEFINITIONS, "n": self.n_pairs}


def direct_effects(
    live: LiveIndex,
    *,
    max_tokens: int = MAX_TOKENS,
    max_work: float = MAX_WORK,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> DirectEffects:
    """Compute the exact direct-path loss effect of every live feature over the index.

    Memory: 9 bytes per token of the index; some 60 per pair, of which there are at most `max_work / d_vocab`; the
    numbers in `direct_path`; and 4 bytes per document and resample.

    Args:
        live: the index with its model and SAE.
        max_tokens: maximum number of active tokens sampled per feature.
        max_work: maximum of pairs times vocabulary: with a large vocabulary, fewer tokens per feature are sampled.
        seed: seed of the samples.
        on_progress: called as pairs are done.

    Raises:
        ModelError: a model without a direct path that is linear in z.
        StudyError: `max_work` is not above 0, or infinite; `max_tokens` is below 1.
    """
    check("max_tokens", max_tokens, Count, StudyError)
    check("max_work", max_work, Above0, StudyError)
    live.model.check_direct_path()
    index = live.index
    text = Text.of(index)
    counted = text.counted.reshape(-1)
    known = index.sql("SELECT n_active, logit_top_tokens[1] AS top FROM features ORDER BY latent")
    n_active, top = known["n_active"].to_numpy(), known["top"].to_numpy()
    most = _most(n_active, max_tokens, max_work / live.model.spec.d_vocab)
    found = [ActiveTokens.of(index, counted, j, most=most, seed=seed) for j in range(index.n_latents)]
    sampled = np.array([len(active.position) for active in found])
    nulls = [
        active.position[drawn(len(active.position), N_NULL, (seed, j, _NULL_KEY))] for j, active in enumerate(found)
    ]
    changes, null_changes = _changes(live, text, found, nulls, seed, on_progress or (lambda _done, _total: None))
    n = np.array([active.n for active in found])
    summary = _Summary(text, unit_draws(len(index.documents), n_samples=N_SAMPLES, seed=seed).astype(np.float32))
    values: dict[str, list[float]] = {name: [] for name in DEFINITIONS if name not in ("n", "sampled", "top_token")}
    ends = np.cumsum(sampled)
    null_ends = np.cumsum([len(null) for null in nulls])
    n_tokens = int(text.is_text.sum())
    for j, active in enumerate(found):
        own = summary.of(active.position, changes[ends[j] - sampled[j] : ends[j]], int(top[j]))
        own["total"], own["increase"] = n[j] * own["mean"], n[j] * own["increase"]
        own["importance"] = own["total"] / n_tokens
        null = null_changes[null_ends[j] - len(nulls[j]) : null_ends[j]]
        own["null_mean"] = float(null.mean()) if len(null) else np.nan
        for name, column in values.items():
            column.append(own[name])
    arrays = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
    return DirectEffects(n_tokens, int(sampled.sum()), max_work, most, seed, n, sampled, top, arrays)


def write_effects(live: LiveIndex, effects: DirectEffects) -> None:
    """Add the effects to the index, as the columns `effects`.

    Raises:
        OutputError: they cannot be written.
    """
    add_columns(live.index, STUDY, effects.table(), effects.provenance())


def _most(n_active: Int[np.ndarray, " latent"], max_tokens: int, budget: float) -> int | None:
    """Return the per-latent limit that keeps all tokens within the budget; None if none is cut."""
    densest = int(n_active.max(initial=0))
    if densest <= max_tokens and n_active.sum() <= budget:
        return None
    low, high = 1, min(max_tokens, densest)  # at least one token of each
    while low < high:
        middle = (low + high + 1) // 2
        fits = np.minimum(n_active, middle).sum() <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


# ------------------------------------------------------------------------------------------------------------- changes
def _changes(
    live: LiveIndex,
    text: Text,
    found: list[ActiveTokens],
    nulls: list[np.ndarray],
    seed: int,
    report: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss change of each pair, and of each null, latent by latent; computed in the order of the text."""
    counts, n_latents = [len(active.position) for active in found], live.index.n_latents
    position = np.concatenate([*(active.position for active in found), *nulls])
    direction = np.repeat(np.arange(2 * n_latents, dtype=np.int32), [*counts, *map(len, nulls)])
    at_null = [
        active.activation[np.searchsorted(active.position, null)] for active, null in zip(found, nulls, strict=True)
    ]
    activation = np.concatenate([*(active.activation for active in found), *at_null])
    order = np.argsort(position, kind="stable")
    changes = np.empty(len(position), np.float32 if live.model.module.dtype != torch.float64 else np.float64)
    done = 0
    for low, high in _parts(position[order]):
        report(done, len(order))
        own = order[low:high]
        changes[own] = _of_part(live, text, position[own], direction[own], activation[own], seed)
        done = high
    report(len(order), len(order))
    return changes[: sum(counts)], changes[sum(counts) :]


def _parts(position: Int[np.ndarray, " pair"]) -> Iterator[tuple[int, int]]:
    """Return cuts of pairs sorted by position so that each piece has a bounded number of positions."""
    first = np.flatnonzero(np.diff(position, prepend=-1))  # of each position
    cuts = [*first[::_PART_POSITIONS].tolist(), len(position)]
    yield from pairwise(cuts)


def _of_part(
    live: LiveIndex, text: Text, position: np.ndarray, direction: np.ndarray, activation: np.ndarray, seed: int
) -> np.ndarray:
    model = live.model
    where, token = np.unique(position, return_inverse=True)
    used, number = np.unique(direction, return_inverse=True)
    pairs = Pairs(*(torch.from_numpy(values).to(model.device) for values in (token, number, activation)))
    target = torch.from_numpy(text.next_token(where).astype(np.int64)).to(model.device)
    directions = _directions(live, used, seed)
    return direct_loss_changes(model, directions, _residual(live, text, where), target, pairs).cpu().numpy()


def _residual(live: LiveIndex, text: Text, position: np.ndarray) -> torch.Tensor:
    """Return the final residual streams at some ascending positions: one run over each of their blocks."""
    model, size = live.model, live.index.block_size
    site = Site("resid_post", model.spec.n_layers - 1)
    blocks = np.unique(position // size)
    step, parts = max(1, _BATCH_TOKENS // size), []
    for start in range(0, len(blocks), step):
        own = blocks[start : start + step]
        low, high = np.searchsorted(position, [own[0] * size, (own[-1] + 1) * size])
        tokens = torch.from_numpy(text.tokens[own].astype(np.int64)).to(model.device)
        block = torch.from_numpy(np.searchsorted(own, position[low:high] // size))
        parts.append(model.read(tokens, [site])[site][block, torch.from_numpy(position[low:high] % size)])
    return torch.cat(parts)


def _directions(live: LiveIndex, used: Int[np.ndarray, " direction"], seed: int) -> torch.Tensor:
    """Return what latents write to the residual stream; from n_latents on, random directions of the same norms."""
    sae, output = live.sae, live.model.W_O(live.sae.site.layer)
    latent = torch.from_numpy(used % sae.d_sae).to(output.device)
    written = sae.W_dec[latent] @ output
    for i in np.flatnonzero(used >= sae.d_sae):
        key = seed, int(used[i]) - sae.d_sae, _NULL_KEY
        random = torch.from_numpy(np.random.default_rng(key).standard_normal(sae.d_in)).to(output) @ output
        written[i] = random * (written[i].norm() / random.norm())
    return written


# ------------------------------------------------------------------------------------------------------------- summary
@dataclass(frozen=True)
class _Summary:
    """Sums over the tokens of a feature, with intervals by document."""

    text: Text
    draws: Float[np.ndarray, "sample document"]

    def of(self, position: np.ndarray, change: np.ndarray, top: int) -> dict[str, float]:
        """Summarise one latent, per sampled token; NaN where undefined."""
        change = change.astype(np.float64)
        on_top = self.text.next_token(position) == top
        increase = change.clip(min=0)
        columns = np.stack([np.ones(len(change)), change, increase, increase * on_top, change * on_top, on_top], axis=1)
        n, total, risen, risen_on_top, total_on_top, top_n = columns.sum(0).tolist()
        some = len(position) >= MINIMUM
        found = {
            "mean": _over(total, n),
            "increase": _over(risen, n),
            "top_rate": _over(top_n, n) if some else np.nan,
            "top_share": _over(risen_on_top, risen) if some else np.nan,
            "top_share_net": _over(total_on_top, total) if some else np.nan,
        }
        document, unit = np.unique(self.text.document.reshape(-1)[position], return_inverse=True)
        sums = np.zeros((len(document), 6))
        np.add.at(sums, unit, columns)
        draws = self.draws[:, document]
        for name, above, below in (("mean", 1, 0), ("top_share", 3, 2), ("top_share_net", 4, 1)):
            interval = resampled(quotient, sums[:, [above, below]], draws) if some else None
            found[f"{name}_low"], found[f"{name}_high"] = interval or (np.nan, np.nan)
        return found


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else np.nan
