"""An iterator that is run ahead of its reader, in a thread of its own."""

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_DEPTH = 2  # items: one that is ready, and one being made


@dataclass(frozen=True)
class _Raised:
    """What ended the iterator, in the place of its next item."""

    error: BaseException


def reads_ahead(device: torch.device) -> bool:
    """Whether reading a model beside other work on the same machine is worth a thread.

    It uses what is idle otherwise: a GPU that waits for work, or cores that torch's threads leave free. Where
    those are given all cores, a second team of them has none of its own; `benchmarks/stream.py` times both ways.
    """
    if device.type != "cpu":
        return True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * torch.get_num_threads() <= cores


class ReadAhead(Generic[T]):
    """The items of an iterator, in its order; a thread makes the next one or two while the reader is busy.

    What the iterator raises is raised where its next item is asked for. The thread ends when this object is closed or
    no longer used, at the latest with the process, once the item it is at is made.
    """

    def __init__(self, items: Iterator[T]) -> None:
        """Begin; `items` is the thread's from now on, and must not lead back to this object."""
        self._ready: SimpleQueue[T | _Raised] = SimpleQueue()
        self._room = threading.Semaphore(_DEPTH)
        stopped = threading.Event()
        work = (items, self._ready, self._room, stopped, torch.get_num_threads())
        # A daemon: otherwise the process would wait for it before `finalize` could tell it to stop.
        thread = threading.Thread(target=_work, args=work, name="headscope-read-ahead", daemon=True)
        self.close = weakref.finalize(self, _end, thread, self._room, stopped)
        """End the thread."""
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, _Raised):
            self._ready.put(item)  # for whoever asks again
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
    torch.set_num_threads(n_threads)  # as the caller's: how a sum is divided among threads decides its last bits
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
    if thread is not threading.current_thread():  # whose garbage collection may have been what found this unused
        thread.join()
