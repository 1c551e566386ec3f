"""The explorer as a local web page: a shell, its scripts, and JSON from a `CardSource`.

It binds 127.0.0.1 only, answers only requests to a local host name from no other site's page, rejects writing requests
without the token of this run, and depends on a source of cards, not on a model: no torch.
"""

import errno
import logging
import secrets
import socket
import sys
import time
import webbrowser
from collections.abc import Callable, Hashable
from functools import partial
from importlib import resources
from typing import Protocol, runtime_checkable

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headscope.encode import Json
from headscope.errors import HeadscopeError, ServerError
from headscope.explorer.answers import Kept, NothingThereError, answer, failure, number_of, pack
from headscope.explorer.connections import MOST_REQUESTS, Connection, Crowd
from headscope.explorer.desk import Desk
from headscope.explorer.labelling import LabelRoutes
from headscope.explorer.page_routes import PageRoutes
from headscope.explorer.prompts import PromptRoutes
from headscope.explorer.studies import StudyRoutes, studies_json
from headscope.studies.subject import Subject

TOKEN_HEADER = "x-headscope-token"
"""Header in which a writing request passes the page's token."""

_HOST = "127.0.0.1"
_SWITCH_S = 0.0005  # switch interval after which a computing thread yields to the event loop; default 5 ms
_TOKEN_MARK = b"{{token}}"
_MEDIA = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_SAFETY = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}

DEFINITIONS = {
    "alive": "Active on at least one token of the corpus.",
    "L0": "Active latents on a token, on average.",
    "density_interval": "95 % Wilson interval; tokens of a document are not independent, so the true one is wider.",
    "density_upper95": "95 % upper bound on the density of a feature never seen active: 3/N (rule of three).",
    "max": "Largest activation in the corpus.",
    "mean": "Mean activation over the tokens on which the feature is active.",
    "std": "Standard deviation of the activation over active tokens.",
    "quantiles": "Quantile of the activation over active tokens.",
    "top_head": "The head with the largest share of the feature's squared DFA.",
    "histogram": "Activations above 0 in equal bins; by mass, a bin holds the sum of its activations.",
    "heads": "How much of the feature each head computes.",
    "kept": "Share of the squared DFA at the sources that the index keeps: the largest of each active token.",
    "base rate": "Share of this token among the tokens of the corpus.",
    "top": "The largest activations in the corpus.",
    "random": "Active tokens drawn at random.",
    "quantile": "Examples from equal shares of the active tokens.",
    "interval": "Examples from equal widths of activation, from 0 to the maximum; zeros excluded.",
    "map": "The example head by head (rows) and source by source (columns).",
    "density histogram": "Live features by the logarithm of their density.",
    "top head histogram": "Live features by their top head's share of squared DFA, beside the null.",
}
"""Terms used only by the page; those of the index are defined in its manifest, and take precedence."""


@runtime_checkable
class CardSource(Protocol):
    """Data of the page, as JSON-able dictionaries (static/types.d.ts has their fields)."""

    def about(self) -> Json:
        """Return model, SAE, corpus, quality numbers and one-line definitions."""
        ...

    def vocab(self) -> Json:
        """Return the bytes of every token (as latin-1 text), and the special ids."""
        ...

    def table(self) -> Json:
        """Return one row per latent, by columns, and the token lists used by the search."""
        ...

    def feature(self, latent: int, *, lean: bool = False) -> Json:
        """Return the card of one latent; a lean one is smaller, for an export.

        Raises:
            NothingThereError: there is no such latent.
        """
        ...

    def context(self, block: int) -> Json:
        """Return all tokens of one block of the corpus.

        Raises:
            NothingThereError: there is no such block.
        """
        ...

    def stamp(self) -> Hashable:
        """Return a value that changes when any of the responses may have changed; cheap, as every request needs it."""
        ...


def about_of(
    source: CardSource, *, studies: bool = False, labels: bool = False, pages: bool = False, prompts: bool = False
) -> Json:
    """Return the description of `source`, definitions of every term on the page, and the page's other features."""
    about = source.about()
    definitions = DEFINITIONS | about.get("definitions", {})
    parts = {"studies": studies_json() if studies else [], "labels": labels, "pages": pages, "prompts": prompts}
    return about | {"definitions": definitions} | parts


def static_files() -> dict[str, bytes]:
    """Read the page's own files, by name."""
    folder = resources.files("headscope.explorer") / "static"
    return {item.name: item.read_bytes() for item in folder.iterdir() if _suffix(item.name) in _MEDIA}


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]


class _Guard:
    """Accept requests of this page only; add security headers to all responses.

    Rejected are: another host name (DNS rebinding), another origin (a foreign page in the same browser), and every
    method but GET and HEAD without the token, which only the page itself has.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                took = f"total;dur={(time.perf_counter() - start) * 1e3:.3f}"  # browsers show it with the request
                message["headers"] = [*message["headers"], *_SAFETY.items(), (b"server-timing", took.encode())]
            await send(message)

        refusal = self._refusal(scope)
        answer = self.app if refusal is None else PlainTextResponse(f"{refusal}\n", status_code=403)
        await answer(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> str | None:
        port = (scope.get("server") or (_HOST, None))[1]
        names = {f"{name}:{port}" for name in (_HOST, "localhost")} | ({_HOST, "localhost"} if port == 80 else set())
        headers = Headers(scope=scope)
        if headers.get("host", "").lower() not in names:
            return f"this page answers only at http://{_HOST}:{port}"
        if any(origin.lower() not in {f"http://{name}" for name in names} for origin in headers.getlist("origin")):
            return "this page answers only itself, not another site"
        given = headers.get(TOKEN_HEADER, "").encode()
        if scope["method"] not in ("GET", "HEAD") and not secrets.compare_digest(given, self.token.encode()):
            return f"writing needs the page's own token in {TOKEN_HEADER}"
        return None


class _Pages:
    """The response of each route; data of the source is computed at a desk."""

    def __init__(self, source: CardSource, token: str, desk: Desk, **parts: bool) -> None:
        self.source, self.desk, self.about = source, desk, partial(about_of, source, **parts)
        files = static_files()
        self.page = pack(files["index.html"].replace(_TOKEN_MARK, token.encode()))
        self.files = {name: pack(body) for name, body in files.items()}

    async def shell(self, request: Request) -> Response:
        return answer(request, self.page, "text/html")

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.files:
            return failure(404, f"no file {name}")
        return answer(request, self.files[name], _MEDIA[_suffix(name)])

    async def whole(self, request: Request, *, name: str) -> Response:
        """Answer `/api/about`, `/api/vocab`, `/api/table`."""
        made = self.about if name == "about" else getattr(self.source, name)
        try:
            return await self.desk.answered((name,), made, request, others="cards")
        except HeadscopeError as error:
            return failure(500, str(error))

    async def one(self, request: Request, *, name: str) -> Response:
        """Answer `/api/feature/{number}` and `/api/context/{number}`."""
        number = number_of(request, name)
        if isinstance(number, Response):
            return number
        made = partial(getattr(self.source, name), number)
        try:
            return await self.desk.answered((name, number), made, request, others="cards")
        except NothingThereError as error:
            return failure(404, f"there is no {name} {number}: {error}")
        except HeadscopeError as error:
            return failure(500, str(error))


async def _gone(_request: Request, _error: Exception) -> Response:
    """Ignore a client that disconnected before its request was complete; it is not an error of the server."""
    return failure(400, "the request was not whole")


def make_app(
    source: CardSource,
    token: str | None = None,
    *,
    subject: Subject | None = None,
    labels: LabelRoutes | None = None,
    roles: PageRoutes | None = None,
) -> Starlette:
    """Make the web application: the page, its scripts, and the JSON of `source`.

    The page has `token` (a new random one when None) in its `headscope-token` meta element. With `subject`, its cards
    have the tabs of studies, and where that has a model, the prompt explorer answers; with `labels`, it has the
    labelling queue; with `roles`, the pages of families and heads.

    Args:
        source: the cards to show.
        token: token required of writing requests.
        subject: subject of the studies.
        labels: routes of the labelling queue.
        roles: routes of the pages of families and heads.
    """
    token = token or secrets.token_urlsafe(32)
    prompts = PromptRoutes(subject) if subject is not None and subject.has_model else None
    parts = {"studies": subject, "labels": labels, "pages": roles, "prompts": prompts}
    kept = Kept()
    quick = Desk(waiting=MOST_REQUESTS, kept=kept, stamp=source.stamp)  # cards do not wait for studies
    # one for all studies, since the limit is the machine's, not a tab's
    desk = Desk(kept=kept, stamp=source.stamp, ahead=quick)
    pages = _Pages(source, token, quick, **{name: part is not None for name, part in parts.items()})
    wholes = [Route(f"/api/{name}", partial(pages.whole, name=name)) for name in ("about", "vocab", "table")]
    ones = [Route(f"/api/{name}/{{number}}", partial(pages.one, name=name)) for name in ("feature", "context")]
    return Starlette(
        routes=[
            Route("/", pages.shell),
            Route("/f/{number}", pages.shell),
            Route("/dashboard", pages.shell),
            Route("/prompt", pages.shell),
            Route("/static/{name}", pages.static),
            *wholes,
            *ones,
            *(StudyRoutes(subject, desk, quick).routes() if subject else []),
            *([Route("/label", pages.shell), *labels.routes()] if labels else []),
            *(roles.routes(pages.shell, quick) if roles else []),
            *(prompts.routes() if prompts else []),
        ],
        middleware=[Middleware(_Guard, token=token), Middleware(Crowd)],
        exception_handlers={ClientDisconnect: _gone},
    )


class _Server(uvicorn.Server):
    """A uvicorn server with a callback when it listens."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self.listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.listening()


def serve(
    app: Starlette,
    *,
    port: int | None = None,
    open_browser: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the explorer on 127.0.0.1 until Ctrl-C.

    Args:
        app: from `make_app`.
        port: port to listen on; None takes a free port.
        open_browser: open the page in the default browser.
        ready: called with the URL once the page can be opened.

    Raises:
        ServerError: the port is not available.
    """
    listener = _listen(port)
    url = f"http://{_HOST}:{listener.getsockname()[1]}/"

    def listening() -> None:
        sys.stdout.write(f"headscope explorer: {url}  (Ctrl-C ends it)\n")
        sys.stdout.flush()
        if open_browser:
            webbrowser.open(url)
        if ready is not None:
            ready(url)

    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        http=Connection,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    # it reports the number of requests in progress when Ctrl-C stopped it
    logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith("Cancel "))
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        _Server(config, listening).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # the way to stop it
    finally:
        sys.setswitchinterval(before)
        listener.close()


def _listen(port: int | None) -> socket.socket:
    """Bind 127.0.0.1 at `port`, or at a free port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if sys.platform != "win32":  # there, this would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port or 0))
    except (OSError, OverflowError) as error:
        listener.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise ServerError(
            f"port {port} of {_HOST} is {'in use' if taken else f'not to be had: {error}'}",
            expected="a free port between 1024 and 65535",
            do="choose another port, or none at all to take a free one",
        ) from error
    return listener
