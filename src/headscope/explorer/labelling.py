"""The routes of the labelling queue: features to label, their labels, and summary statistics."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.encode import Json
from headscope.errors import HeadscopeError, LabelError
from headscope.explorer.answers import answer, failure, json_object, number_of, pack_json
from headscope.index.labels import (
    CONFIDENCES,
    FAMILIES,
    LONGEST,
    MAX_LINE,
    VERDICTS,
    Judgement,
    Label,
    LabelStore,
    Retraction,
    card_hash,
)
from headscope.index.store import FeatureIndex
from headscope.studies.survey import Sample, draw, survey

_JUDGED: dict[str, type] = {
    "latent": int,
    "annotator": str,
    "blind": bool,
    "queue": str,
    "verdict": str,
    "confidence": int,
    "family": str,
    "text": str,
    "notes": str,
}
_RETRACTED: dict[str, type] = {"annotator": str, "label": str}


class LabelRoutes:
    """`/api/queue`, `/api/labels`, `/api/retractions` and `/api/survey` of an index."""

    def __init__(self, index: FeatureIndex) -> None:
        """Labels are written to the folder of `index`."""
        self.index, self.store = index, LabelStore(index)
        self._cards: dict[tuple[int, bool], str] = {}  # hashes: the index does not change while it is served

    def routes(self) -> list[Route]:
        """Return the routes for the application, whose guard requires the page's token for writing."""
        return [
            Route("/api/queue", self._asked(self.queue)),
            Route("/api/survey", self._asked(self.survey)),
            Route("/api/labels/{number}", self._of),
            Route("/api/labels", self._told(_JUDGED, self.add), methods=["POST"]),
            Route("/api/retractions", self._told(_RETRACTED, self.retract), methods=["POST"]),
        ]

    def queue(self, sample: str = "", latent: str = "", annotator: str = "") -> Json:
        """Return the features of a sample, or a given one, and the annotator's current labels of them.

        Raises:
            LabelError: no such sample, latent or file of labels.
        """
        if sample:
            drawn = draw(self.index, Sample.parse(sample))
            latents, alive, definition = list(drawn.latents), list(drawn.alive), drawn.definition
        else:
            own = self._number(latent)
            latents, alive, definition = [own], [self.index.feature(own).alive], "one feature"
        labels = self.store.read()
        latest = labels.latest()
        given = [latest[annotator, own] for own in latents if (annotator, own) in latest]
        return {
            "sample": sample,
            "definition": definition,
            "latents": latents,
            "alive": alive,
            "labels": [self._json(label) for label in given],
            "torn": labels.torn,
            "verdicts": VERDICTS,
            "confidences": list(CONFIDENCES.items()),
            "families": FAMILIES,
            "longest": LONGEST,
        }

    def survey(self, sample: str = "") -> Json:
        """Return the statistics of a sample's labels.

        Raises:
            LabelError: no such sample or file of labels.
        """
        result = survey(self.index, self.store.read(), Sample.parse(sample))
        rows = [vars(row) for row in result.rows()]
        return {"definition": result.drawn.definition, "rows": rows, "notes": result.notes}

    def add(self, *, latent: int, annotator: str, blind: bool, queue: str, **said: Any) -> Label:
        """Append a label.

        Raises:
            LabelError: it is invalid, or the feature is dead.
            OutputError: it cannot be written.
        """
        if queue:
            Sample.parse(queue)
        judgement = Judgement(**said)
        if not self.index.feature(self._number(str(latent))).alive:
            raise LabelError(f"feature {latent} is dead", expected="a live feature", do="go on to the next")
        return self.store.add(latent, annotator, judgement, blind=blind, queue=queue)

    def retract(self, *, annotator: str, label: str) -> Retraction:
        """Retract a label.

        Raises:
            LabelError: it is not a current label of this annotator.
            OutputError: it cannot be written.
        """
        return self.store.retract(annotator, label)

    def _json(self, label: Label) -> Json:
        seen = (label.latent, label.blind)
        if seen not in self._cards:
            self._cards[seen] = card_hash(self.index, label.latent, blind=label.blind)
        return asdict(label) | {"stale": self._cards[seen] != label.card}

    def _number(self, text: str) -> int:
        """Parse a latent of the index."""
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < self.index.n_latents):
            raise LabelError(
                f"feature {text[:80]!a}", expected=f"0 to {self.index.n_latents - 1}", do="ask for another"
            )
        return int(text)

    def _asked(self, ask: Callable[..., Json]) -> Callable:
        """Make a GET endpoint; the URL parameters are the parameters of `ask`."""
        words = set(ask.__annotations__) - {"return"}

        async def endpoint(request: Request) -> Response:
            given = request.query_params.multi_items()
            if len(dict(given)) < len(given) or not words >= dict(given).keys():
                return failure(400, f"{', '.join(name for name, _ in given)}: expected {', '.join(words)}, each once")
            return await _answered(request, lambda: ask(**dict(given)))

        return endpoint

    async def _of(self, request: Request) -> Response:
        """Answer `/api/labels/18`: all annotators' current labels of one feature."""
        number = number_of(request, "feature")
        if isinstance(number, Response):
            return number
        return await _answered(request, lambda: {"labels": [self._json(own) for own in self.store.read().of(number)]})

    def _told(self, types: dict[str, type], tell: Callable[..., Label | Retraction]) -> Callable:
        """Make an endpoint that takes a JSON object with exactly the fields of `types`."""

        async def endpoint(request: Request) -> Response:
            body = b""
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_LINE:
                    return failure(413, f"more than {MAX_LINE:,} bytes: expected one label")
            try:
                told = _object(body, types)
            except LabelError as error:
                return failure(400, error.got, expected=error.expected, do=error.do)
            return await _answered(request, lambda: self._written(tell(**told)))

        return endpoint

    def _written(self, record: Label | Retraction) -> Json:
        return self._json(record) if isinstance(record, Label) else asdict(record)


async def _answered(request: Request, work: Callable[[], Json]) -> Response:
    """Return the result of `work`, or an error response."""
    try:
        packed = await run_in_threadpool(lambda: pack_json(work()))
    except LabelError as error:
        return failure(400, error.got, expected=error.expected, do=error.do)
    except HeadscopeError as error:
        return failure(500, error.got, expected=error.expected, do=error.do)
    return answer(request, packed)


def _object(body: bytes, types: dict[str, type]) -> Json:
    """Parse the fields of a request's body.

    Raises:
        LabelError: it is not an object of exactly these fields and types.
    """
    told = json_object(body, types, LabelError)
    for name, expected in types.items():
        if type(told[name]) is not expected:
            raise LabelError(f"{name} is no {expected.__name__}", expected=expected.__name__, do="correct it")
    return told
