"""Replacement for an ablated head's z: a mean, the constant part, or another token's z.

One record serves runs of the model (`edit`) and sums over an index (`contributions`), so that both ablate identically.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.attribution import HeadWeights
from headscope.errors import StudyError
from headscope.index.live import LiveIndex
from headscope.interventions import at
from headscope.models.hf import SiteEdit
from headscope.studies.support.active import Text, drawn

Kind = Literal["mean", "position mean", "zero", "resample"]
"""Replacement for a head's z: its mean over text tokens, its mean at that position of a block, the constant c (so that
its DFA is 0, the post's zero), or its z at another text token, drawn at random."""

Progress = Callable[[int, int], None]
"""Progress callback: called with the blocks done and the total."""

N_RESAMPLED = 4096
"""Text tokens to draw from for `resample`."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Replacement:
    """Replacement for each head's z."""

    kind: Kind
    z: Float[Tensor, "row head d_head"]
    """One row for all tokens; one per position of a block (`position mean`); those to draw from (`resample`)."""
    n: int
    """Number of text tokens they are from; 0 for `zero`."""
    row: Int[np.ndarray, " position"]
    """The row for each position of the corpus."""

    @classmethod
    def of(cls, live: LiveIndex, kind: Kind = "mean", *, max_blocks: int | None = None, seed: int = 0) -> "Replacement":
        """Make one kind; see `several`."""
        return cls.several(live, [kind], max_blocks=max_blocks, seed=seed)[kind]

    @classmethod
    def several(
        cls,
        live: LiveIndex,
        kinds: Sequence[Kind],
        *,
        max_blocks: int | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> "dict[Kind, Replacement]":
        """Read z of the whole corpus, or of some blocks of it, once for all kinds; `zero` alone needs none.

        The means are over text tokens. A position without text takes the mean over all positions.

        Raises:
            StudyError: an unknown kind.
        """
        for kind in kinds:
            if kind not in get_args(Kind):
                raise StudyError(
                    f"ablation {kind!r}", expected=f"one of {', '.join(get_args(Kind))}", do="name one of these"
                )
        read = None
        if set(kinds) - {"zero"}:
            blocks = drawn(live.index.n_blocks, max_blocks, (seed,))
            n_sampled = N_RESAMPLED if "resample" in kinds else 0
            read = _z_sums(live, Text.of(live.index), blocks, n_sampled, seed, on_progress)
            if read.counts.sum() == 0:
                raise StudyError("blocks without text", expected="text tokens to take z of", do="read more blocks")
        return {kind: cls._of(live, kind, read, seed) for kind in kinds}

    @classmethod
    def _of(cls, live: LiveIndex, kind: Kind, read: "_ZSums | None", seed: int) -> "Replacement":
        index, spec = live.index, live.model.spec
        size, n_positions = index.block_size, index.n_blocks * index.block_size
        shape = spec.n_heads, spec.d_head
        if read is None or kind == "zero":
            offset = live.model.value_offset(live.sae.site.layer).to(live.sae.W_enc)
            return cls("zero", offset.view(1, *shape), 0, np.zeros(n_positions, np.int32))
        n = int(read.counts.sum())
        mean = read.sums.sum(0) / n
        if kind == "resample":
            row = np.random.default_rng((seed, 1)).integers(0, len(read.sample), n_positions, dtype=np.int32)
            return cls(kind, read.sample.to(live.sae.W_enc).view(-1, *shape), n, row)
        if kind == "mean":
            return cls(kind, mean.to(live.sae.W_enc).view(1, *shape), n, np.zeros(n_positions, np.int32))
        counts = read.counts[:, None]
        by_position = torch.where(counts > 0, read.sums / counts.clamp_min(1), mean)
        row = np.tile(np.arange(size, dtype=np.int32), index.n_blocks)
        return cls(kind, by_position.to(live.sae.W_enc).view(-1, *shape), n, row)

    def contributions(
        self, weights: HeadWeights, latent: int, position: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n head"]:
        """Return R_h, which replaces C_h, at some positions of the corpus."""
        by_row = torch.einsum("rhe,he->rh", self.z - weights.offset, weights.encoder[:, latent])
        return by_row.double().cpu().numpy()[self.row[position]]

    def values(self, blocks: Int[np.ndarray, " block"], size: int) -> Float[Tensor, "block position z"]:
        """Return the replacement for z in some blocks."""
        rows = self.row.reshape(-1, size)[blocks]
        return self.z[torch.from_numpy(rows.astype(np.int64)).to(self.z.device)].flatten(2)

    def edit(self, blocks: Int[np.ndarray, " block"], size: int, heads: Sequence[int]) -> SiteEdit:
        """Make an edit of z for `Model.edit` in a run on some blocks: replaces some heads, at all positions."""
        values = self.values(blocks, size)
        return at(lambda z: values.to(z), heads=list(heads))


@dataclass(frozen=True)
class _ZSums:
    """Sums of z over text tokens."""

    sums: Float[Tensor, "position z"]
    counts: Float[Tensor, " position"]
    sample: Float[Tensor, "sample z"]
    """z at some text tokens."""


def _z_sums(
    live: LiveIndex,
    text: Text,
    blocks: Int[np.ndarray, " block"],
    n_sampled: int,
    seed: int,
    on_progress: Progress | None,
) -> _ZSums:
    size, site = live.index.block_size, live.sae.site
    places = np.flatnonzero(text.is_text[blocks].reshape(-1))
    chosen = places[drawn(len(places), n_sampled, (seed, 2))] if n_sampled else places[:0]
    sums = torch.zeros(size, live.sae.d_in, dtype=torch.float64)
    counts, sample = torch.zeros(size, dtype=torch.float64), [torch.zeros(0, live.sae.d_in, dtype=torch.float64)]
    for start, own in batches(blocks, size):
        is_text = torch.from_numpy(text.is_text[own])
        z = live.model.read(tokens_of(live, text, own), [site])[site].double().cpu()
        sums += (z * is_text[..., None]).sum(0)
        counts += is_text.sum(0)
        low, high = np.searchsorted(chosen, [start * size, (start + len(own)) * size])
        sample.append(z.flatten(0, 1)[torch.from_numpy(chosen[low:high] - start * size)])
        if on_progress is not None:
            on_progress(start + len(own), len(blocks))
    return _ZSums(sums, counts, torch.cat(sample))


def batches(blocks: Int[np.ndarray, " block"], size: int) -> list[tuple[int, Int[np.ndarray, " own"]]]:
    """Yield blocks a few at a time: the number of earlier ones, and their numbers."""
    step = max(1, _BATCH_TOKENS // size)
    return [(start, blocks[start : start + step]) for start in range(0, len(blocks), step)]


def tokens_of(live: LiveIndex, text: Text, blocks: Int[np.ndarray, " block"]) -> Int[Tensor, "block position"]:
    """Return the tokens of some blocks, on the model's device."""
    return torch.from_numpy(text.tokens[blocks].astype(np.int64)).to(live.model.device)
