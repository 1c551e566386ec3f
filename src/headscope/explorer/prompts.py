"""The routes of the prompt explorer: active features of a prompt, their attribution, and the effects of ablations.

Each takes a JSON object by POST, with the page's token, and is computed at a separate desk; responses are cached. A
prompt is `{"text": "..."}` or `{"ids": [...]}`; the BOS is prepended here, as in an index.
"""

import json
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.encode import Json, encode
from headscope.errors import HeadscopeError, IndexFormatError, StudyError
from headscope.explorer.answers import answer, failure, json_object, pack_json
from headscope.explorer.desk import Desk
from headscope.explorer.prompt_json import dfa_json, run_json
from headscope.studies.how.levels import Level, path_of, why_attended
from headscope.studies.prompt.records import parse_ablations
from headscope.studies.subject import Subject

MAX_BODY = 400_000
"""Maximum number of bytes of a request."""
MAX_TEXT = 100_000
"""Maximum number of characters of a prompt."""

_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "run": {"prompt": (dict,), "ablations": (list,)},
    "token": {"prompt": (dict,), "ablations": (list,), "query": (int,), "target": (int, type(None))},
    "dfa": {"prompt": (dict,), "latent": (int,), "query": (int,)},
    "level": {"prompt": (dict,), "latent": (int,), "query": (int,), "path": (str,)},
    "scores": {"prompt": (dict,), "layer": (int,), "head": (int,), "query": (int,), "key": (int, type(None))},
}


class PromptRoutes:
    """`/api/prompt`, the available options, and `/api/prompt/run`, `token`, `dfa`, `level` and `scores`."""

    def __init__(self, subject: Subject, desk: Desk | None = None) -> None:
        """Answer from the model of `subject`, computing at `desk`."""
        self.subject, self.desk = subject, desk or Desk()

    def routes(self) -> list[Route]:
        """Return the routes for the application, whose guard requires the page's token."""
        asked = [Route(f"/api/prompt/{name}", self._endpoint(name), methods=["POST"]) for name in _FIELDS]
        return [Route("/api/prompt", self.start), *asked]

    async def start(self, request: Request) -> Response:
        """Return the available options."""
        model = self.subject.live.model
        names = ("n_layers", "n_heads", "context")
        return answer(request, pack_json({"bos": model.bos} | {name: getattr(model.spec, name) for name in names}))

    # --------------------------------------------------------------------------------------------------------- answers
    def run(self, *, prompt: Json, ablations: list[str]) -> Json:
        """Return the whole prompt.

        Raises:
            HeadscopeError: no such prompt, or an impossible ablation.
        """
        found = self.subject.prompts.run(self._tokens(prompt), parse_ablations(ablations))
        return run_json(found, str(self.subject.index.folder))

    def token(self, *, prompt: Json, ablations: list[str], query: int, target: int | None) -> Json:
        """Return one token: its features, and the next-token prediction.

        Raises:
            HeadscopeError: no such prompt, position or target, or an impossible ablation.
        """
        prompts, tokens = self.subject.prompts, self._tokens(prompt)
        found = prompts.next_tokens(tokens, query, parse_ablations(ablations))
        return {"features": encode(prompts.features(tokens, query, target)), "next": encode(found)}

    def dfa(self, *, prompt: Json, latent: int, query: int) -> Json:
        """Return a feature's DFA at one token by head and source.

        Raises:
            HeadscopeError: no such prompt, feature or position.
        """
        return dfa_json(self.subject.prompts.dfa(self._tokens(prompt), latent, query))

    def level(self, *, prompt: Json, latent: int, query: int, path: str) -> Json:
        """Return one level of its recursive DFA.

        Raises:
            HeadscopeError: no such prompt, feature, position or node.
        """
        return encode(Level.of(self.subject.circuits.level(self._tokens(prompt), latent, query, path_of(path))))

    def scores(self, *, prompt: Json, layer: int, head: int, query: int, key: int | None) -> Json:
        """Return the attribution of a head's attention score for a key.

        Raises:
            HeadscopeError: no such prompt, head or position, or a model without an exact split.
        """
        return encode(why_attended(self.subject.circuits, self._tokens(prompt), layer, head, query, key))

    # ----------------------------------------------------------------------------------------------------------- steps
    def _tokens(self, prompt: Json) -> tuple[int, ...]:
        match prompt:
            case {"text": str(text)} if len(prompt) == 1:
                _check_text(text)
                return self.subject.prompts.encode(text)
            case {"ids": list(ids)} if len(prompt) == 1 and all(type(token) is int for token in ids):
                return (self.subject.live.model.bos, *ids)
        raise StudyError("no prompt", expected='{"text": "..."} or {"ids": [5, 6]}, no BOS in it', do="send one")

    def _endpoint(self, name: str) -> Callable:
        method = getattr(self, name)

        async def endpoint(request: Request) -> Response:
            body = b""
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    return failure(413, f"a request of more than {MAX_BODY:,} bytes: expected a shorter prompt")
            try:
                asked = _object(body, _FIELDS[name])
            except StudyError as error:
                return _refused(400, error)
            key = (name, json.dumps(asked, sort_keys=True))
            return await self._answer(request, key, lambda: self._alone(method, asked))

        return endpoint

    def _alone(self, method: Callable[..., Json], asked: dict[str, Any]) -> Json:
        with self.subject.lock:
            return method(**asked)

    async def _answer(self, request: Request, key: tuple, work: Callable[[], Json]) -> Response:
        try:
            return await self.desk.answered(key, work, request, others="prompts")
        except IndexFormatError as error:
            return _refused(500, error)
        except HeadscopeError as error:
            return _refused(400, error)


def _refused(status: int, error: HeadscopeError) -> Response:
    return failure(status, error.got, expected=error.expected, do=error.do)


def _check_text(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise StudyError(f"a text of {len(text):,} characters", expected=f"at most {MAX_TEXT:,}", do="shorten it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise StudyError("a text with half of a character in it", expected="valid Unicode", do="remove it")


def _object(body: bytes, fields: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """Parse the fields of a request's body.

    Raises:
        StudyError: it is not an object of exactly these fields and types.
    """
    asked = json_object(body, fields, StudyError)
    for name, types in fields.items():
        if type(asked[name]) not in types:
            raise StudyError(f"{name} of another type", expected=types[0].__name__, do="correct it")
    if not all(isinstance(text, str) for text in asked.get("ablations", ())):
        raise StudyError(
            "an ablation that is no text", expected="f7, f7@12, h1.3=zero or h1.3=mean@12", do="correct it"
        )
    return asked
