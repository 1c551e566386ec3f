"""The routes of the pages of families and heads. Each answer is a file of an exported folder too (`page_paths`)."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.errors import HeadscopeError
from headscope.explorer.answers import Json, answer, dump_json, failure

_LONGEST = 40  # characters of a name that is repeated in an answer


@runtime_checkable
class FamilySource(Protocol):
    """What the family pages show, as JSON-able dictionaries (static/types.d.ts has their fields)."""

    def families(self) -> Json:
        """Every family, and how many belong to it."""
        ...

    def family(self, name: str, head: str | None = None) -> Json:
        """One family, with the rule of one head where the rule names one.

        Raises:
            KeyError: there is no such family, or no such head for it.
        """
        ...


@runtime_checkable
class HeadSource(Protocol):
    """What the head pages show, as JSON-able dictionaries (static/types.d.ts has their fields)."""

    def heads(self) -> Json:
        """Every head of every layer."""
        ...

    def head(self, name: str) -> Json:
        """One head, as `1.6`.

        Raises:
            KeyError: there is no such head.
        """
        ...


class PageRoutes:
    """`/api/families`, `/api/family/induction`, `/api/family/induction/1.6`, `/api/heads`, `/api/head/1.6`."""

    def __init__(self, families: FamilySource, heads: HeadSource) -> None:
        """Answer from these."""
        self._families, self._heads = families, heads

    def routes(self, shell: Callable) -> list[Route]:
        """For the application: the addresses of the pages, which `shell` answers, and their JSON."""
        pages = ("/families", "/family/{name}", "/heads", "/head/{name}")
        made: dict[str, Callable[..., Json]] = {
            "/api/families": self._families.families,
            "/api/family/{name}": self._families.family,
            "/api/family/{name}/{head}": self._families.family,
            "/api/heads": self._heads.heads,
            "/api/head/{name}": self._heads.head,
        }
        return [*(Route(path, shell) for path in pages), *(Route(path, _of(method)) for path, method in made.items())]

    def every(self) -> Iterator[tuple[str, Json]]:
        """All answers, by the path of each below `/api/`: what an export holds."""
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


def _of(method: Callable[..., Json]) -> Callable:
    async def endpoint(request: Request) -> Response:
        try:
            body = await run_in_threadpool(lambda: dump_json(method(**request.path_params)))
        except KeyError as error:
            asked = ", ".join(value[:_LONGEST] for value in request.path_params.values())
            return failure(404, f"there is no {asked}: {error.args[0]}")
        except HeadscopeError as error:
            return failure(500, str(error))
        return answer(request, body, "application/json")

    return endpoint
