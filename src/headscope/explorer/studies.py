"""Studies on the page: `/api/study/<name>/<latent>?options`, and their data in an exported file.

Every study of the registry has a URL; the routes refer to none by name.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.encode import Json
from headscope.errors import HeadscopeError, IndexFormatError
from headscope.explorer.answers import failure, number_of
from headscope.explorer.desk import Desk
from headscope.explorer.start import start_json
from headscope.studies.registry import feature_studies
from headscope.studies.study import FeatureStudy, parse_options
from headscope.studies.subject import Subject


def studies_json() -> list[Json]:
    """Return every study available on the page, as the page lists them."""
    return [
        {
            "name": study.name,
            "group": study.group,
            "question": study.question,
            "needs_model": study.needs_model,
            "options": [field.name for field in fields(study.options)],
            "tabs": [asdict(tab) for tab in study.tabs],
        }
        for study in _on_page()
    ]


def _on_page() -> tuple[FeatureStudy, ...]:
    return tuple(study for study in feature_studies() if study.on_page)


class StudyRoutes:
    """`/api/start/18`, and a URL for each study: `/api/study/circuit/18?at=512&path=1.3`."""

    def __init__(self, subject: Subject, desk: Desk | None = None, quick: Desk | None = None) -> None:
        """Answer from `subject`, computing studies at `desk` and look-ups at `quick`."""
        self.subject, self.desk = subject, desk or Desk()
        self.quick = quick or self.desk

    def routes(self) -> list[Route]:
        """Return the routes for the application."""
        asked = [Route(f"/api/study/{study.name}/{{number}}", self._of(study)) for study in _on_page()]
        return [Route("/api/start/{number}", self.start), *asked]

    async def start(self, request: Request) -> Response:
        """Return the initial data of the tabs."""
        return await self._answer(request, "start", self.quick, lambda _request: partial(start_json, self.subject))

    def _of(self, study: FeatureStudy) -> Callable:
        def work(request: Request) -> Callable[[int], Json]:
            query = request.query_params
            options = parse_options(study, {name: query.getlist(name) for name in query})
            return lambda latent: study.answer(self.subject, latent, options)

        async def endpoint(request: Request) -> Response:
            return await self._answer(request, study.name, self.quick if study.quick else self.desk, work)

        return endpoint

    async def _answer(
        self, request: Request, name: str, desk: Desk, work: Callable[[Request], Callable[[int], Json]]
    ) -> Response:
        latent = number_of(request, "feature")
        if isinstance(latent, Response):
            return latent
        if latent >= self.subject.index.n_latents:
            return failure(404, f"there is no feature {latent}: expected 0 to {self.subject.index.n_latents - 1}")
        key = ("study", name, latent, *sorted(request.query_params.multi_items()))
        try:
            return await desk.answered(key, partial(work(request), latent), request, others="studies")
        except IndexFormatError as error:
            return failure(500, str(error))
        except HeadscopeError as error:
            return failure(400, error.got, expected=error.expected, do=error.do, column=_column(error))


def _column(error: HeadscopeError) -> int | None:
    """Return the column of a proxy's syntax error, counted from 1."""
    found = re.match(r"column (\d+):", error.got)
    return int(found[1]) if found else None


# --------------------------------------------------------------------------------------------------------------- a file
def packed(
    subject: Subject, latent: int, proxies: Iterable[str] = (), on_study: Callable[[int, int], None] | None = None
) -> Json:
    """Return the data of one feature's studies for a file: those that it shows, for some proxies only.

    Args:
        subject: the index, with its model where there is one.
        latent: the feature.
        proxies: default: the suggested ones.
        on_study: called with the studies done and the total.

    Raises:
        IndexFormatError, ProxyError: no such feature, or no proxy.
    """
    start = start_json(subject, latent)
    given = list(dict.fromkeys(proxies))
    if given:
        start["proxies"] = [{"proxy": proxy, "why": "of this file"} for proxy in given]
    chosen = [{"proxy": suggested["proxy"]} for suggested in start["proxies"]]
    studies = [study for study in _on_page() if subject.has_model or not study.needs_model]
    asked = [(study, options) for study in studies for options in _askable(study, chosen)]
    told = on_study or (lambda _done, _total: None)
    told(0, len(asked))
    answers = {}
    for done, (study, options) in enumerate(asked, 1):
        answers[_key(study.name, options)] = _given(study, subject, latent, options)
        told(done, len(asked))
    return {"start": start, "studies": answers}


def _askable(study: FeatureStudy, proxies: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the options with which a file includes a study: each proxy, or none; None if it needs others."""
    try:
        parse_options(study, {})
    except HeadscopeError:
        pass
    else:
        return [{}]
    return proxies if set(study.options.__dataclass_fields__) == {"proxy"} else []


def _key(name: str, options: dict[str, Any]) -> str:
    """Return the key of a response in a file, as requested by static/data.js."""
    return f"{name} {json.dumps(options, ensure_ascii=False, separators=(',', ':'))}"


def _given(study: FeatureStudy, subject: Subject, latent: int, options: dict[str, str]) -> Json:
    """Return the result of a study; where the model lacks what it needs, `missing` with the reason."""
    try:
        return study.answer(subject, latent, parse_options(study, {name: [text] for name, text in options.items()}))
    except HeadscopeError as error:
        return {"missing": f"{error.got}; expected: {error.expected}"}
