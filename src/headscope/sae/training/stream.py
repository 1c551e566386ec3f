"""An endless stream of shuffled activations.

A preallocated buffer is filled once. Then, round after round, half of it is handed out in random order, batch by batch,
and the rows of a batch are replaced in place by the next rows of the source when the following batch is requested:

    buffer   [ . . . . . . . . . . . . . . . . ]      a new permutation of all slots each round
    round    [ batch | batch | batch | batch ]        its first half, in that order
               ^ refilled      ^ handed out

So the model runs steadily, ahead of the training in a thread where that is faster (`read_ahead.py`), and all changes to
the buffer happen in the caller's thread: the batches do not depend on timing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from headscope.corpus import Corpus
from headscope.errors import TrainingError
from headscope.models.hf import Model
from headscope.sae.training.read_ahead import ReadAhead, reads_ahead
from headscope.sae.training.source import Place, Source, open_source
from headscope.site import Site

_SLOTS = 3  # distinguishes this use of the seed from others

OnRows = Callable[[int, int], None]
"""Progress callback: called with the activations read so far and their total; an exception ends the reading."""


@runtime_checkable
class StreamConfig(Protocol):
    """The parts of a training recipe used by a stream (`headscope.sae.config.TrainConfig`)."""

    @property
    def batch(self) -> int:
        """Activations per step, of all ranks together."""
        ...

    @property
    def buffer(self) -> int:
        """Activations in the shuffle buffers of all ranks."""
        ...

    @property
    def exclude_bos(self) -> bool:
        """Exclude BOS positions."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the order of activations."""
        ...

    @property
    def cache(self) -> str | None:
        """Folder of the activation cache."""
        ...


@dataclass(frozen=True)
class _Progress:
    """State of the stream besides the buffer; replaced as a whole once a batch is ready."""

    round: int
    """Number of buffer permutations started; 0 while it is not filled."""
    handed: int
    """Rows of the round that were handed out; those of the last batch are not refilled yet."""
    read: Place
    """The first row that is not in the buffer yet."""


class ActivationStream:
    """An endless stream of shuffled activations; each new iteration continues where the last one stopped.

    Activations are held in bfloat16: rounding moves a vector by about 0.2 % of its length, far less than the error of
    an SAE, and a buffer twice as large mixes better.
    """

    def __init__(
        self, model: Model, corpus: Corpus, site: Site, config: StreamConfig, *, rank: int = 0, ranks: int = 1
    ) -> None:
        """Prepare the stream; the model first runs when a batch or a sample is requested.

        Args:
            model: the model to read.
            corpus: its training documents.
            site: site to read.
            config: batch, buffer, exclude_bos, seed and cache.
            rank: of the processes that train together. Each reads its own groups of blocks of each pass over the
                corpus, all of them once, and holds and hands out its share of `buffer` and `batch`.
            ranks: number of those.

        Raises:
            CorpusError: the model cannot read the corpus.
            ModelError: the site is unsupported for SAEs.
            OutputError: the cache cannot be written, or does not fit the disk.
            TrainingError: the corpus holds fewer activations than two batches, or too few blocks for the ranks;
                or a batch cannot be divided among them.
        """
        self._source = open_source(model, corpus, site, exclude_bos=config.exclude_bos, cache=config.cache)
        self._seed, self._rank, self._ranks = config.seed, rank, ranks
        self.d_in = model.width(site)
        """Width of an activation."""
        self.n_available = self._source.n_available
        """Activations in one pass over the corpus, of all ranks together."""
        self._check(config)
        n, capacity = config.batch // ranks, min(config.buffer, self.n_available) // ranks
        self._per_round = capacity // 2 // n * n
        device = model.device
        self._buffer = torch.empty(capacity, self.d_in, dtype=torch.bfloat16, device=device)
        self._rounded = torch.empty(n, self.d_in, dtype=torch.bfloat16, device=device)
        self._batch = torch.empty(n, self.d_in, device=device)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # rows per round
        self._progress = _Progress(round=0, handed=0, read=Place(1, 0, 0))
        self._inlet: _Inlet | None = None

    def _check(self, config: StreamConfig) -> None:
        if config.batch % self._ranks:
            raise TrainingError(
                f"a batch of {config.batch} for {self._ranks} ranks",
                expected="a batch that can be divided among them",
                do="change --batch or the number of processes",
            )
        if min(config.buffer, self.n_available) < 2 * config.batch:
            raise TrainingError(
                f"a corpus of {self.n_available:,} activations",
                expected=f"at least two batches of {config.batch}",
                do="use a larger corpus or a smaller --batch",
            )
        if self._source.n_groups < self._ranks:
            raise TrainingError(
                f"a corpus of {len(self._source.corpus.blocks):,} blocks, read {self._source.group_size} at a time",
                expected=f"at least one reading for each of {self._ranks} ranks",
                do="use a larger corpus or fewer processes",
            )

    @property
    def epochs(self) -> int:
        """Number of passes over the corpus that were started."""
        return self._progress.read.epoch if self._progress.round else 0

    # ------------------------------------------------------------------------------------------------------- batches
    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Yield batches without end, in float32, on the model's device; each is valid until the next is requested.

        Raises:
            TrainingError: activations that are not finite; or a file of the cache is damaged.
            OutputError: the cache cannot be written.
        """
        while True:
            yield self._next()

    def fill(self, on_rows: OnRows | None = None) -> None:
        """Fill the buffer unless it is full; the first batch does this too, which may take minutes.

        Raises:
            TrainingError: as from iterating.
            OutputError: as from iterating.
        """
        if self._progress.round == 0:
            with self._all_or_nothing():
                self._progress = _Progress(1, 0, self._refill(self._slots(0), on_rows))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Restore the reading position if the block raises, so that progress and buffer stay consistent."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    @torch.no_grad()
    def _next(self) -> Float[Tensor, "batch d_in"]:
        self.fill()
        done, n = self._progress, len(self._batch)
        with self._all_or_nothing():
            read = self._refill(self._slots(done.round)[max(0, done.handed - n) : done.handed])
            begun = replace(done, read=read)
            if done.handed == self._per_round:
                begun = _Progress(done.round + 1, 0, read)
            torch.index_select(self._buffer, 0, self._slots(begun.round)[begun.handed :][:n], out=self._rounded)
            self._batch.copy_(self._rounded)
            self._progress = replace(begun, handed=begun.handed + n)
        return self._batch

    def _slots(self, number: int) -> Int[Tensor, " capacity"]:
        """Return the order of a round; that of round 0 is the buffer's own."""
        if self._order[0] != number:
            rng = np.random.default_rng([_SLOTS, self._seed, number, self._rank])
            order = rng.permutation(len(self._buffer)) if number else np.arange(len(self._buffer))
            self._order = number, torch.from_numpy(order).to(self._buffer.device)
        return self._order[1]

    def _refill(self, slots: Int[Tensor, " slot"], on_rows: OnRows | None = None) -> Place:
        if self._inlet is None:
            self._inlet = _Inlet(self._source, self._seed, self._progress.read, self._rank, self._ranks)
        return self._inlet.into(self._buffer, slots, on_rows)

    def sample(self, n: int, on_rows: OnRows | None = None) -> Float[Tensor, "n d_in"]:
        """Return the same activations at any time and on any rank; the stream is not advanced.

        They come from random groups of blocks, in an order determined by the seed and distinct from that of any pass.

        Args:
            n: number of activations; all of the corpus if it has fewer.
            on_rows: called as they are read.

        Raises:
            TrainingError: as from iterating.
            OutputError: as from iterating.
        """
        parts: list[Tensor] = []
        n, done = min(n, self.n_available), 0
        for group in self._source.order(self._seed, 0).tolist():
            parts.append(self._source.read(group))
            done += len(parts[-1])
            if on_rows is not None:
                on_rows(min(done, n), n)
            if done >= n:
                break
        return torch.cat(parts)[:n].float()

    # ---------------------------------------------------------------------------------------------------- to resume
    def state(self) -> dict[str, Tensor | int]:
        """Return the complete state, as a copy on the CPU.

        The buffer is included. Half of it outlives each round, so reading it again would take about log2(capacity) / 2
        times its size in activations: minutes of the model for what a disk holds in a second.
        """
        done = self._progress
        filled = self._buffer if done.round else self._buffer[:0]
        place = {"round": done.round, "handed": done.handed} | done.read._asdict()
        return {"buffer": filled.cpu().clone(), **place, **self._identity()}

    def restore(self, state: Mapping[str, Tensor | int]) -> None:
        """Resume where a stream with the same arguments returned `state`, bit for bit.

        Raises:
            TrainingError: the state is of a stream with other arguments.
        """
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise TrainingError(
                    f"the state of a stream with {name} {state.get(name)}",
                    expected=f"{own}, as the training that is to go on",
                    do="resume with the model, corpus and options that it was started with",
                )
        self.close()
        filled = state["buffer"]
        assert isinstance(filled, Tensor)
        self._buffer[: len(filled)] = filled.to(self._buffer.device)
        number = {name: int(value) for name, value in state.items() if name != "buffer"}
        read = Place(number["epoch"], number["nth"], number["row"])
        self._progress = _Progress(number["round"], number["handed"], read)

    def _identity(self) -> dict[str, int]:
        """Return what the streams before and after an interruption must share."""
        return {
            "seed": self._seed,
            "rank": self._rank,
            "ranks": self._ranks,
            "batch": len(self._batch),
            "capacity": len(self._buffer),
            "d_in": self.d_in,
            "n_available": self.n_available,
        }

    def close(self) -> None:
        """Stop the prefetching, if any, and discard its items; the next batch restarts it."""
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None


class _Inlet:
    """Consecutive rows of a source, from a given place on."""

    def __init__(self, source: Source, seed: int, start: Place, rank: int, ranks: int) -> None:
        self._ahead: ReadAhead[Any] | None = None
        if reads_ahead(source.model.device):
            own = replace(source, model=source.model.replica())  # the caller may run the model in between
            self._ahead = ReadAhead(own.chunks(seed, start, rank, ranks))
        self._chunks = self._ahead or source.chunks(seed, start, rank, ranks)
        self._place, self._rows = start, torch.empty(0, 0)

    def into(
        self,
        buffer: BFloat16[Tensor, "capacity d_in"],
        slots: Int[Tensor, " slot"],
        on_rows: OnRows | None = None,
    ) -> Place:
        """Write the next rows to some slots of a buffer; return the place of the row after them."""
        filled = 0
        while filled < len(slots):
            if len(self._rows) == 0:
                self._place, self._rows = next(self._chunks)
            n = min(len(self._rows), len(slots) - filled)
            buffer.index_copy_(0, slots[filled : filled + n], self._rows[:n])
            self._place, self._rows = self._place._replace(row=self._place.row + n), self._rows[n:]
            filled += n
            if on_rows is not None:
                on_rows(filled, len(slots))
        return self._place

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
