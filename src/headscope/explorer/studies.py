"""The routes of the deep-dive tabs: what a proxy says of a feature, and what the feature does downstream."""

import re
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.errors import HeadscopeError, ProxyError, StudyError
from headscope.explorer.answers import Json, NothingThereError, failure, number_of
from headscope.explorer.desk import Desk

_STUDIES = ("start", "dive", "effects", "predictions")
MAX_PROXY = 2000
"""Characters of a proxy that the server reads."""


@runtime_checkable
class DiveSource(Protocol):
    """What the deep-dive tabs show, as JSON-able dictionaries (static/types.d.ts has their fields)."""

    def start(self, latent: int) -> Json:
        """What a dive into one feature begins with: proxies to try, and what studies added to the index.

        Raises:
            NothingThereError: there is no such latent.
        """
        ...

    def dive(self, latent: int, proxy: str) -> Json:
        """Specificity and sensitivity of a feature for a proxy.

        Raises:
            NothingThereError: there is no such latent.
            ProxyError: the text is no proxy, or it cannot be evaluated.
        """
        ...

    def effects(self, latent: int, proxy: str) -> Json:
        """What ablating the feature does to the loss; needs a model.

        Raises:
            NothingThereError: there is no such latent.
            ProxyError: the text is no proxy, or it cannot be evaluated.
        """
        ...

    def predictions(self, latent: int, proxy: str) -> Json:
        """What the model predicts where the feature misses the proxy, against where it fires; needs a model.

        Raises:
            NothingThereError: there is no such latent.
            ProxyError: the text is no proxy, or it cannot be evaluated.
        """
        ...


class StudyRoutes:
    """`/api/start/18`, and with `?proxy=...`: `/api/dive/18`, `/api/effects/18`, `/api/predictions/18`."""

    def __init__(self, source: DiveSource, desk: Desk | None = None, quick: Desk | None = None) -> None:
        """Answer from `source`, computing studies at `desk` and what only looks something up at `quick`."""
        self.source, self.desk = source, desk or Desk()
        self.quick = quick or self.desk

    def routes(self) -> list[Route]:
        """For the application."""
        return [Route(f"/api/{name}/{{number}}", self._of(name)) for name in _STUDIES]

    def _of(self, name: str) -> Callable:
        method = getattr(self.source, name)

        async def endpoint(request: Request) -> Response:
            latent = number_of(request, "feature")
            if isinstance(latent, Response):
                return latent
            arguments = [] if name == "start" else request.query_params.getlist("proxy")
            if name != "start" and len(arguments) != 1:
                return failure(400, f"{len(arguments)} proxies given: expected one, as in ?proxy=token_in([...])")
            if name != "start" and not arguments[0].strip():
                return failure(400, "the proxy is empty: expected one, as in ?proxy=token_in([...])")
            if len("".join(arguments)) > MAX_PROXY:
                return failure(400, f"a proxy of {len(arguments[0]):,} characters: expected at most {MAX_PROXY:,}")
            return await self._answer(request, ("study", name, latent, *arguments), lambda: method(latent, *arguments))

        return endpoint

    async def _answer(self, request: Request, key: tuple, work: Callable[[], Json]) -> Response:
        try:
            desk = self.quick if key[1] == "start" else self.desk
            return await desk.answered(key, work, request, others="studies")
        except NothingThereError as error:
            return failure(404, f"there is no feature {key[2]}: {error}")
        except (ProxyError, StudyError) as error:
            return failure(400, error.got, expected=error.expected, do=error.do, column=_column(error))
        except HeadscopeError as error:
            return failure(500, str(error))


def _column(error: HeadscopeError) -> int | None:
    """Where a proxy cannot be read, counted from 1."""
    found = re.match(r"column (\d+):", error.got)
    return int(found[1]) if found else None
