"""Timeouts and a limit for connections of the explorer's server whose clients are silent.

uvicorn closes idle keep-alive connections. This module also closes those that never send a complete request, or do not
read the response; and at the limit, the one that has waited longest for its client.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from headscope.explorer.answers import busy, failure

CLIENT_S = 30.0
"""Seconds that a connection waits for its client, to send a complete request or to read a response."""
MOST_CONNECTIONS = 200
"""Maximum number of open connections: well below the files that a process may open (256 on macOS)."""
MOST_REQUESTS = 128
"""Maximum number of concurrent requests; fewer than connections, so that there is always one to close."""
_LOOK = 6  # checks per CLIENT_S


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a timeout for silent clients."""

    _since: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register a new connection; at the limit, close an older one."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > MOST_CONNECTIONS:
            _make_room(self.connections)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the connection."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start waiting for the client's next request."""
        self._since = self.loop.time()
        super().on_response_complete()

    def waits_since(self) -> float | None:
        """Time since which the connection waits for its client, by the loop's clock; None while the server works."""
        at_work = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        return None if at_work and not self.transport.get_write_buffer_size() else self._since

    def _look(self) -> None:
        now, since = self.loop.time(), self.waits_since()
        if since is None:
            self._since = now
        elif now - since >= CLIENT_S:
            self.transport.abort()  # not close(), which first waits until everything is sent
            return
        self._timer = self.loop.call_later(CLIENT_S / _LOOK, self._look)


def _make_room(connections: set[Any]) -> None:
    """Close the connection that has waited longest for its client."""
    waiting = [(since, id(own), own) for own in connections if (since := own.waits_since()) is not None]
    if waiting:
        min(waiting)[2].transport.abort()


class Crowd:
    """Limit concurrent requests; others get a retry response, and their connections are closed.

    So do requests that are waiting when the server stops.
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
        except asyncio.CancelledError:  # the server stops, and no longer waits for computations
            await failure(503, "the server has ended")(scope, receive, send)
        finally:
            self._n -= 1
