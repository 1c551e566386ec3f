"""Source of activations: groups of blocks, from the model or from a cache.

A group is the input of one run of the model. Its blocks are drawn once per corpus, whatever the training seed: the last
bits of an activation may depend on the rest of its batch, and so activations read again, in a later pass, by a resumed
training or from a cache, are identical bit for bit.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor

from headscope.artefact import atomic_write
from headscope.capture import BATCH_TOKENS, check_corpus, is_text
from headscope.corpus import PADDING, Corpus
from headscope.errors import OutputError, TrainingError
from headscope.models.hf import Model
from headscope.sae.training.cache import ActivationCache
from headscope.site import Site

_LEAST_GROUPS = 64  # groups of a small corpus: enough to shuffle, and to divide among ranks
_GROUPS, _ORDER = 1, 2  # distinguish these uses of a seed from others
_VERSION = 1  # version of the cache content: raised when the same identity would give other rows


class Place(NamedTuple):
    """A row among all that are read; determines all that is read after it."""

    epoch: int
    """The pass over the corpus; the first is 1."""
    nth: int
    """Index among the groups of that pass that this rank reads."""
    row: int
    """Index among the counted activations of that group."""


@dataclass(frozen=True)
class Source:
    """The activations of a site over a corpus, read by groups of blocks, rounded to bfloat16."""

    model: Model
    corpus: Corpus
    site: Site
    exclude_bos: bool
    """Exclude BOS positions and other special tokens; padding is always excluded."""
    cache: ActivationCache | None = None

    @property
    def n_available(self) -> int:
        """Activations in one pass over the corpus."""
        return self.corpus.n_text_tokens if self.exclude_bos else self.corpus.n_tokens - self.corpus.n_padding

    @property
    def n_groups(self) -> int:
        """Number of groups of blocks; the last may be smaller."""
        return -(-len(self.corpus.blocks) // self.group_size)

    @property
    def group_size(self) -> int:
        """Blocks per group: one batch of the model, or fewer for a small corpus."""
        most = len(self.corpus.blocks) // _LEAST_GROUPS
        return max(1, min(BATCH_TOKENS // self.corpus.block_size, most))

    @cached_property
    def _blocks(self) -> Int[np.ndarray, " block"]:
        """Numbers of all blocks, group after group."""
        return np.random.default_rng(_GROUPS).permutation(len(self.corpus.blocks))

    def identity(self) -> dict[str, object]:
        """The determinants of every group's rows, for a cache."""
        return {
            "version": _VERSION,
            "model": self.model.fingerprint(),
            "site": self.site.hook_name,
            "corpus": self.corpus.fingerprint(),
            "exclude_bos": self.exclude_bos,
            "special": sorted(self.corpus.special | {self.corpus.bos}),
            "group_size": self.group_size,
            "dtype": "bfloat16",
        }

    def order(self, seed: int, epoch: int) -> Int[np.ndarray, " group"]:
        """Return the order of all groups in a pass."""
        return np.random.default_rng([_ORDER, seed, epoch]).permutation(self.n_groups)

    def chunks(
        self, seed: int, start: Place, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Place, BFloat16[Tensor, "n d_in"]]]:
        """Yield rows of group after group without end, each with the place of its first row.

        Args:
            seed: seed of the order of the groups.
            start: the first row to read.
            rank: of the processes that read together, each its own groups of each pass.
            ranks: number of those.
        """
        epoch, nth, row = start
        while True:
            part = self.order(seed, epoch)[rank::ranks]
            for n in range(nth, len(part)):
                yield Place(epoch, n, row), self.read(int(part[n]))[row:]
                row = 0
            epoch, nth = epoch + 1, 0

    def read(self, group: int) -> BFloat16[Tensor, "n d_in"]:
        """Read the counted activations of a group, block by block, on the model's device.

        Raises:
            TrainingError: they are not finite, or the cache is damaged.
            OutputError: the cache cannot be written.
        """
        kept = self.cache.read(group) if self.cache is not None else None
        if kept is not None:
            return kept.to(self.model.device)
        rows = self._compute(self._blocks[group * self.group_size : (group + 1) * self.group_size])
        if self.cache is not None:
            self.cache.write(group, rows)
        return rows

    @torch.no_grad()
    def _compute(self, numbers: Int[np.ndarray, " block"]) -> BFloat16[Tensor, "n d_in"]:
        tokens = torch.from_numpy(self.corpus.blocks[numbers].astype(np.int64)).to(self.model.device)
        values = self.model.read(tokens, [self.site])[self.site]
        rows = values.to(torch.bfloat16)[self._counted(numbers, tokens)]
        # A finite sum has only finite terms; it costs a fraction of checking each.
        if not rows.sum(dtype=torch.float32).isfinite() and not rows.isfinite().all():
            raise self._not_finite(numbers, tokens, values)
        return rows

    def _counted(
        self, numbers: Int[np.ndarray, " block"], tokens: Int[Tensor, "block position"]
    ) -> Bool[Tensor, "block position"]:
        if self.exclude_bos:
            return is_text(self.corpus, numbers, tokens.device)
        return torch.from_numpy(self.corpus.offset[numbers] != PADDING).to(tokens.device)

    def _not_finite(
        self,
        numbers: Int[np.ndarray, " block"],
        tokens: Int[Tensor, "block position"],
        values: Float[Tensor, "block position d_in"],
    ) -> TrainingError:
        path = Path(tempfile.mkdtemp(prefix="headscope-")) / "not-finite.safetensors"
        kept = {"blocks": torch.from_numpy(numbers), "tokens": tokens.cpu(), "activations": values.cpu().contiguous()}
        try:
            with atomic_write(path) as file:
                file.write(safetensors.torch.save(kept))
            where = f"the blocks, their tokens and activations are in {path}"
        except OutputError as error:
            where = f"they could not be kept for a look: {error.got}"
        return TrainingError(
            f"NaN or infinity in {self.site.hook_name} of {self.model.spec.name} ({where})",
            expected="finite activations",
            do="check the model's weights and dtype",
        )


def open_source(model: Model, corpus: Corpus, site: Site, *, exclude_bos: bool, cache: str | None) -> Source:
    """Open a source, with a cache where its folder is given.

    Raises:
        CorpusError: the model cannot read the corpus.
        ModelError: the site is unsupported for SAEs, or the layer does not exist.
        OutputError: the cache cannot be written, or does not fit the disk.
    """
    check_corpus(model, corpus)
    model.check_site(site)
    d_in = model.width(site)
    source = Source(model, corpus, site, exclude_bos)
    if cache is None:
        return source
    n_bytes = 2 * d_in * source.n_available
    kept = ActivationCache(cache, source.identity(), n_groups=source.n_groups, n_bytes=n_bytes)
    return replace(source, cache=kept)
