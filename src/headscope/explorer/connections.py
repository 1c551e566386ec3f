"""Connections of the explorer's server whose clients stop talking: none is held for ever, and there are not too many.

uvicorn closes a connection that is quiet after an answer. Here also one is closed that never sends a whole request, or
does not take its answer; and where there are many, the one that has waited for its client longest makes room.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from headscope.explorer.answers import busy, failure

CLIENT_S = 30.0
"""Seconds that a connection waits for its client: for the whole of a request to come, or for an answer to be taken."""
MOST_CONNECTIONS = 200
"""Open at a time: well below the files that a process may have open (256 on macOS)."""
MOST_REQUESTS = 128
"""Under way at a time; fewer than connections, so that there is always one to close."""
_LOOK = 6  # how often CLIENT_S is looked after, in its parts


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with an end to a client's silence."""

    _since: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look after a new connection; an older one may have to go for it."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > MOST_CONNECTIONS:
            _make_room(self.connections)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """End looking after it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """It is the client's turn from here on."""
        self._since = self.loop.time()
        super().on_response_complete()

    def waits_since(self) -> float | None:
        """Since when the connection waits for its client, by the loop's clock; None while the server is at work."""
        at_work = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        return None if at_work and not self.transport.get_write_buffer_size() else self._since

    def _look(self) -> None:
        now, since = self.loop.time(), self.waits_since()
        if since is None:
            self._since = now
        elif now - since >= CLIENT_S:
            self.transport.abort()  # not close(), which first waits until all is taken
            return
        self._timer = self.loop.call_later(CLIENT_S / _LOOK, self._look)


def _make_room(connections: set[Any]) -> None:
    """Close the connection that has waited for its client longest."""
    waiting = [(since, id(own), own) for own in connections if (since := own.waits_since()) is not None]
    if waiting:
        min(waiting)[2].transport.abort()


class Crowd:
    """Answer so many requests at a time; those beyond are told to ask again, and their connections closed.

    Those that wait when the server ends are told so.
    """

    def __init__(self, app: ASGIApp, most: int = MOST_REQUESTS) -> None:
        """Let `most` requests at a time through to `app`."""
        self.app, self.most, self._n = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._n >= self.most:
            refusal = busy(f"the server answers {self.most} other requests: ask again in a moment")
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return
        self._n += 1
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends, and waits no longer for what is computed
            await failure(503, "the server has ended")(scope, receive, send)
        finally:
            self._n -= 1
