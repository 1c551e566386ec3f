"""The routes of the pages of families and heads. Each response is also a file of an exported folder (`page_paths`)."""

from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.encode import Json
from headscope.errors import HeadscopeError
from headscope.explorer.answers import failure
from headscope.explorer.desk import Desk

_LONGEST = 40  # characters of a name that is repeated in a response


@runtime_checkable
class FamilySource(Protocol):
    """Data of the family pages, as JSON-able dictionaries (static/types.d.ts has their fields)."""

    def families(self) -> Json:
        """Return every family, with its number of members."""
        ...

    def family(self, name: str, head: str | None = None) -> Json:
        """Return one family, with the rule of one head where the rule has a head.

        Raises:
            KeyError: there is no such family, or no such head for it.
        """
        ...

    def stamp(self) -> Hashable:
        """Return a value that changes when people have labelled a feature; cheap, as every request needs it."""
        ...


@runtime_checkable
class HeadSource(Protocol):
    """Data of the head pages, as JSON-able dictionaries (static/types.d.ts has their fields)."""

    def heads(self) -> Json:
        """Return every head of every layer."""
        ...

    def head(self, name: str) -> Json:
        """Return one head by name, such as `1.6`.

        Raises:
            KeyError: there is no such head.
        """
        ...


class PageRoutes:
    """`/api/families`, `/api/family/induction`, `/api/family/induction/1.6`, `/api/heads`, `/api/head/1.6`."""

    def __init__(self, families: FamilySource, heads: HeadSource) -> None:
        """Answer from these sources."""
        self._families, self._heads = families, heads

    def routes(self, shell: Callable, desk: Desk) -> list[Route]:
        """Return the routes for the application: the pages, answered by `shell`, and their JSON, computed at `desk`."""
        pages = ("/families", "/family/{name}", "/heads", "/head/{name}")
        made: dict[str, Callable[..., Json]] = {
            "/api/families": self._families.families,
            "/api/family/{name}": self._families.family,
            "/api/family/{name}/{head}": self._families.family,
            "/api/heads": self._heads.heads,
            "/api/head/{name}": self._heads.head,
        }
        asked = [Route(path, self._of(method, desk)) for path, method in made.items()]
        return [*(Route(path, shell) for path in pages), *asked]

    def every(self) -> Iterator[tuple[str, Json]]:
        """Return all responses, by their paths below `/api/`, for an export."""
        listed, grid = self._families.families(), self._heads.heads()
        yield "families", listed
        for name in (family["name"] for family in listed["families"]):
            found = self._families.family(name)
            yield f"family/{name}", found
            for head in found.get("heads") or ():
                yield f"family/{name}/{head}", self._families.family(name, head)
        yield "heads", grid
        for name in (head["name"] for layer in grid["layers"] for head in layer):
            yield f"head/{name}", self._heads.head(name)

    def _of(self, method: Callable[..., Json], desk: Desk) -> Callable:
        async def endpoint(request: Request) -> Response:
            asked, key = request.path_params, ("pages", self._families.stamp(), request.url.path)
            try:
                return await desk.answered(key, lambda: method(**asked), request, others="pages")
            except KeyError as error:
                named = ", ".join(value[:_LONGEST] for value in asked.values())
                return failure(404, f"there is no {named}: {error.args[0]}")
            except HeadscopeError as error:
                return failure(500, str(error))

        return endpoint
