"""Threads that process parts in parallel, each with its own model, which shares the weights."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Barrier, Event, Lock

import torch

from headscope.models.hf import Model

OnBatch = Callable[[int], None]
"""Progress callback: called with the number of blocks of each batch; an exception ends the reading."""

_MOST = 8  # each holds a part in memory: more cores than this work together instead


class _StoppedError(Exception):
    """Another thread failed."""


class Readers:
    """A pool with torch's number of threads; on a GPU one, the caller's."""

    def __init__(self, model: Model) -> None:
        """Copy the model, except for its weights, for all threads but the first."""
        self._cores = torch.get_num_threads() if model.device.type == "cpu" else 1
        self._models = [model, *(model.replica() for _ in range(min(self._cores, _MOST) - 1))]

    def each(
        self, parts: Sequence[int], read: Callable[[Model, int, OnBatch], None], report: Callable[[int], None]
    ) -> None:
        """Call `read(model, part, on_batch)` for each part; the first error, or Ctrl-C, stops all threads.

        Args:
            parts: the parts.
            read: must call `on_batch`.
            report: called with the total of blocks so far.
        """
        stopped, lock, waiting, done = Event(), Lock(), iter(parts), 0

        def on_batch(n: int) -> None:
            nonlocal done
            if stopped.is_set():
                raise _StoppedError
            with lock:
                done += n
                report(done)

        def work(model: Model) -> None:
            for part in waiting:
                read(model, part, on_batch)

        models = self._models[: max(1, len(parts))]
        if len(models) == 1:
            work(models[0])
            return
        with self._pool(len(models)) as pool:
            futures = [pool.submit(work, model) for model in models]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stopped.set()
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def _pool(self, n: int) -> ThreadPoolExecutor:
        """Make threads that share the cores."""
        together = Barrier(n)

        def alone() -> None:
            torch.get_num_threads()  # reading it makes it this thread's own
            torch.set_num_threads(max(1, self._cores // n))
            together.wait()

        pool = ThreadPoolExecutor(n, initializer=alone)
        list(pool.map(int, range(n)))
        torch.set_num_threads(self._cores)  # the last of them also sets it for future threads
        return pool
