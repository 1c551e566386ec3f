"""Work queue of the server: runs computations off the event loop, a few at a time, sharing equal requests."""

import asyncio
import threading
from collections.abc import Callable, Hashable

from starlette.requests import Request
from starlette.responses import Response

from headscope.encode import Json
from headscope.explorer.answers import Kept, Packed, answer, busy, failure, pack_json

_GIVE_WAY_S = 1.0
"""Maximum delay of a computation in favour of those waiting at another desk."""


class BusyError(Exception):
    """Too many computations are queued, or this one has waited too long."""


class TooSlowError(Exception):
    """A computation exceeded its time limit; it may still run, and keeps its place until it ends."""


class _Job:
    """One computation, and all requests waiting for it."""

    def __init__(self, work: Callable[[], Packed]) -> None:
        self.work = work
        self.askers: list[Request] = []
        self.begun = asyncio.Event()  # or cancelled
        self.task: asyncio.Task[Packed]

    async def is_wanted(self) -> bool:
        """Whether any request still waits, including those that join during the check."""
        for asker in self.askers:
            if not await asker.is_disconnected():
                return True
        return False


class Desk:
    """Runs functions in daemon threads, first come, first served.

    A browser has at most six concurrent requests, so first come, first served is fair: no page can starve another. A
    request for a computation in progress waits for the same result; one that no request waits for any longer is not
    started.
    """

    def __init__(
        self,
        *,
        places: int = 2,
        waiting: int = 100,
        patience: float = 60.0,
        seconds: float = 60.0,
        kept: Kept | None = None,
        stamp: Callable[[], Hashable] = lambda: None,
        ahead: "Desk | None" = None,
    ) -> None:
        """Make an empty queue.

        Args:
            places: concurrent computations.
            waiting: maximum queue length; beyond that `BusyError` is raised.
            patience: maximum time in the queue, in seconds; after that `BusyError` is raised.
            seconds: maximum time of a computation.
            kept: cache of responses; several desks may share it if their keys differ.
            stamp: version of the data: when it changes, cached responses are out of date.
            ahead: a desk whose queue has priority; delays a computation here by at most a second.
        """
        self.places, self.waiting, self.patience, self.seconds = places, waiting, patience, seconds
        self._kept, self._stamp, self._ahead = kept or Kept(), stamp, ahead
        self._free = asyncio.Semaphore(places)
        self._jobs: dict[Hashable, _Job] = {}

    async def run(self, key: tuple, work: Callable[[], Packed], request: Request) -> Packed:
        """Run `work`, or return its cached result for the same key.

        Raises:
            BusyError: the queue is full, the time in it has expired, or the client has gone.
            TooSlowError: it exceeded its time limit.
            Exception: what `work` raises.
        """
        own = (self._stamp(), *key)
        kept = self._kept.get(own)
        if kept is not None:
            return kept
        job = self._jobs.get(own) or self._take(own, work)
        job.askers.append(request)
        try:
            async with asyncio.timeout(self.patience):
                await job.begun.wait()
        except TimeoutError as error:
            raise BusyError from error
        try:
            async with asyncio.timeout(self.seconds):
                return await asyncio.shield(job.task)
        except TimeoutError as error:
            raise TooSlowError from error

    async def answered(self, key: tuple, work: Callable[[], Json], request: Request, *, others: str) -> Response:
        """Return the result of `work` as JSON, or a busy response; `others` names the desk's computations.

        Raises:
            Exception: what `work` raises.
        """
        try:
            packed = await self.run(key, lambda: pack_json(work()), request)
        except BusyError:
            return busy(f"the server computes other {others}: ask again in a moment")
        except TooSlowError:
            return failure(504, f"this took more than {self.seconds:g} s and was given up")
        return answer(request, packed)

    def _take(self, key: Hashable, work: Callable[[], Packed]) -> _Job:
        """Queue `work`.

        Raises:
            BusyError: the queue is full.
        """
        if len(self._jobs) >= self.places + self.waiting:
            raise BusyError
        job = self._jobs[key] = _Job(work)
        job.task = asyncio.create_task(self._do(key, job))
        job.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the client may have gone
        return job

    async def _do(self, key: Hashable, job: _Job) -> Packed:
        """Run a job in its turn; its place stays taken until the work ends, whether or not anyone still waits."""
        try:
            async with self._free:
                await self._give_way()
                if not await job.is_wanted():
                    raise BusyError
                job.begun.set()
                packed = await _in_thread(job.work)
            self._kept.put(key, packed)
            return packed
        finally:
            job.begun.set()
            del self._jobs[key]

    async def _give_way(self) -> None:
        """Wait while the desk ahead, with its short computations, has a queue."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _GIVE_WAY_S
        while self._ahead is not None and len(self._ahead._jobs) > self._ahead.places and loop.time() < end:
            await asyncio.sleep(0.01)


def _in_thread(work: Callable[[], Packed]) -> asyncio.Future[Packed]:
    """Start `work` in a thread of its own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Packed] = loop.create_future()

    def end(packed: Packed | None, error: BaseException | None) -> None:
        if future.done():  # cancelled: the server stops
            return
        if packed is None:
            future.set_exception(error or RuntimeError("no answer"))
        else:
            future.set_result(packed)

    def begin() -> None:
        packed, raised = None, None
        try:
            packed = work()
        except BaseException as error:  # passed on to those who wait
            raised = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(end, packed, raised)

    threading.Thread(target=begin, daemon=True).start()
    return future
