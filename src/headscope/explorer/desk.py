"""Where the server computes answers: off the event loop, a few at a time, each once however many ask for it."""

import asyncio
import threading
from collections.abc import Callable, Hashable

from starlette.requests import Request
from starlette.responses import Response

from headscope.encode import Json
from headscope.explorer.answers import Kept, Packed, answer, busy, failure, pack_json

_THREAD = "headscope desk"
_GIVE_WAY_S = 1.0
"""The longest that the next computation is held back for what waits at another desk."""


class BusyError(Exception):
    """Too many computations wait already, or this one has waited too long."""


class TooSlowError(Exception):
    """A computation did not end in time; it may still be at work, and keeps its place until it ends."""


class _Job:
    """One computation, and all who wait for it."""

    def __init__(self, work: Callable[[], Packed]) -> None:
        self.work = work
        self.askers: list[Request] = []
        self.begun = asyncio.Event()  # or given up
        self.task: asyncio.Task[Packed]

    async def is_wanted(self) -> bool:
        """Whether anyone still waits; one who joins while the others are looked at is looked at too."""
        for asker in self.askers:
            if not await asker.is_disconnected():
                return True
        return False


class Desk:
    """Runs functions in threads that do not keep the process from ending, in the order in which they are asked for.

    A browser has at most six requests under way, so first come, first served is fair: no page can keep another from
    its turn by asking for much. Who asks for what is being computed already waits for the same result; what nobody
    waits for any longer is not begun.
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
        """Take on work.

        Args:
            places: computations at a time.
            waiting: how many more may wait; beyond that `BusyError` is raised.
            patience: how long one may wait for its turn, in seconds; after that `BusyError` is raised.
            seconds: how long one may take from then on.
            kept: where answers are kept; several desks may share it if their keys differ.
            stamp: of what answers are made from: when it changes, those kept are out of date.
            ahead: what waits at this desk is begun first; nothing here is held back for it by more than a second.
        """
        self.places, self.waiting, self.patience, self.seconds = places, waiting, patience, seconds
        self._kept, self._stamp, self._ahead = kept or Kept(), stamp, ahead
        self._free = asyncio.Semaphore(places)
        self._jobs: dict[Hashable, _Job] = {}

    async def run(self, key: tuple, work: Callable[[], Packed], request: Request) -> Packed:
        """Do `work`, or return what it gave before under the same key.

        Raises:
            BusyError: as many as allowed wait already, its turn has not come in time, or the asker has gone.
            TooSlowError: it did not end in time.
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
        """What `work` gives, as JSON, or that there is no time for it; `others` are what the desk is busy with.

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
        """Let `work` wait for its turn.

        Raises:
            BusyError: too many wait.
        """
        if len(self._jobs) >= self.places + self.waiting:
            raise BusyError
        job = self._jobs[key] = _Job(work)
        job.task = asyncio.create_task(self._do(key, job))
        job.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # who asked may have given up
        return job

    async def _do(self, key: Hashable, job: _Job) -> Packed:
        """Do a job when its turn comes; its place stays taken until the work ends, whoever still waits."""
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
        """Wait while others wait at the desk ahead, whose computations are short."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _GIVE_WAY_S
        while self._ahead is not None and len(self._ahead._jobs) > self._ahead.places and loop.time() < end:
            await asyncio.sleep(0.01)


def _in_thread(work: Callable[[], Packed]) -> asyncio.Future[Packed]:
    """Start `work` in a thread of its own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Packed] = loop.create_future()

    def end(packed: Packed | None, error: BaseException | None) -> None:
        if future.done():  # cancelled: the server ends
            return
        if packed is None:
            future.set_exception(error or RuntimeError("no answer"))
        else:
            future.set_result(packed)

    def begin() -> None:
        packed, raised = None, None
        try:
            packed = work()
        except BaseException as error:  # handed to those who wait
            raised = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(end, packed, raised)

    threading.Thread(target=begin, name=_THREAD, daemon=True).start()
    return future


def at_work() -> bool:
    """Whether a computation goes on, as it may after the server has ended: a thread cannot be stopped."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
