"""Prefetch the items of an iterator in a thread."""

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_DEPTH = 2  # items: one that is ready, and one in preparation


@dataclass(frozen=True)
class _Raised:
    """The exception that ended the iterator, in place of its next item."""

    error: BaseException


def reads_ahead(device: torch.device) -> bool:
    """Whether prefetching model activations in a thread pays off on this machine.

    It uses idle resources: a GPU that waits for work, or cores that torch's threads leave free. Where torch uses all
    cores, a second set of threads has none of its own; `benchmarks/stream.py` times both ways.
    """
    if device.type != "cpu":
        return True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * torch.get_num_threads() <= cores


class ReadAhead(Generic[T]):
    """The items of an iterator, in its order; a thread prepares the next one or two while the consumer is busy.

    An exception of the iterator is raised where its next item is requested. The thread ends when this object is closed
    or garbage-collected, at the latest with the process, after its current item.
    """

    def __init__(self, items: Iterator[T]) -> None:
        """Start; the thread owns `items`, which must not reference this object."""
        self._ready: SimpleQueue[T | _Raised] = SimpleQueue()
        self._room = threading.Semaphore(_DEPTH)
        stopped = threading.Event()
        work = (items, self._ready, self._room, stopped, torch.get_num_threads())
        # A daemon: otherwise the process would wait for it before `finalize` could stop it.
        thread = threading.Thread(target=_work, args=work, name="headscope-read-ahead", daemon=True)
        self.close = weakref.finalize(self, _end, thread, self._room, stopped)
        """End the thread."""
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, _Raised):
            self._ready.put(item)  # for further calls
            raise item.error
        self._room.release()
        return item


def _work(
    items: Iterator[T],
    ready: "SimpleQueue[T | _Raised]",
    room: threading.Semaphore,
    stopped: threading.Event,
    n_threads: int,
) -> None:
    torch.set_num_threads(n_threads)  # the caller's setting: how a sum is divided among threads affects its last bits
    while True:
        room.acquire()
        if stopped.is_set():
            return
        try:
            ready.put(next(items))
        except BaseException as error:
            ready.put(_Raised(error))
            return


def _end(thread: threading.Thread, room: threading.Semaphore, stopped: threading.Event) -> None:
    stopped.set()
    room.release()
    if thread is not threading.current_thread():  # whose garbage collection may have collected this object
        thread.join()
