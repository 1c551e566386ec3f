"""Where the server computes what takes long: off the event loop, a few at a time, none of them for ever."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from headscope.explorer.answers import Json, answer, dump_json, failure

_KEPT = 64  # answers


class BusyError(Exception):
    """Too many computations wait already."""


class TooSlowError(Exception):
    """A computation did not end in time; it may still be at work, and keeps its place until it ends."""


class Desk:
    """Runs functions in threads of their own, which do not keep the process from ending."""

    def __init__(self, *, places: int = 2, waiting: int = 6, seconds: float = 60.0) -> None:
        """Take on work.

        Args:
            places: computations at a time.
            waiting: how many more may wait; beyond that `BusyError` is raised.
            seconds: how long one may take, its wait included.
        """
        self.places, self.waiting, self.seconds = places, waiting, seconds
        self._taken = 0
        self._free = asyncio.Semaphore(places)
        self._kept: OrderedDict[tuple, bytes] = OrderedDict()

    async def run(self, key: tuple, work: Callable[[], bytes], request: Request) -> bytes:
        """Do `work`, or return what it gave before under the same key.

        Raises:
            BusyError: as many as allowed wait already, or the asker has gone.
            TooSlowError: it did not end in time.
            Exception: what `work` raises.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._taken >= self.places + self.waiting:
            raise BusyError
        self._taken += 1
        try:
            async with asyncio.timeout(self.seconds):
                await self._free.acquire()
                await self._still_asked(request)
                body = await self._thread(work)
        except TimeoutError as error:
            raise TooSlowError from error
        finally:
            self._taken -= 1
        self._kept[key] = body
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return body

    async def answered(self, key: tuple, work: Callable[[], Json], request: Request, *, others: str) -> Response:
        """What `work` gives, as JSON, or that there is no time for it; `others` are what the desk is busy with.

        Raises:
            Exception: what `work` raises.
        """
        try:
            body = await self.run(key, lambda: dump_json(work()), request)
        except BusyError:
            return failure(503, f"the server computes other {others}: ask again in a moment")
        except TooSlowError:
            return failure(504, f"this took more than {self.seconds:g} s and was given up")
        return answer(request, body, "application/json")

    async def _still_asked(self, request: Request) -> None:
        """Give the place back when nobody waits for the answer: who types asks often, and wants the last one only."""
        gone = True
        try:
            gone = await request.is_disconnected()
        finally:
            if gone:
                self._free.release()
        if gone:
            raise BusyError

    def _thread(self, work: Callable[[], bytes]) -> asyncio.Future[bytes]:
        """Start `work`; its place is free again when it ends, whether or not someone still waits."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes] = loop.create_future()

        def end(body: bytes | None, error: BaseException | None) -> None:
            self._free.release()
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(body or b"")

        def begin() -> None:
            body, raised = None, None
            try:
                body = work()
            except BaseException as error:  # handed to the one who waits
                raised = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(end, body, raised)

        threading.Thread(target=begin, daemon=True).start()
        return future
