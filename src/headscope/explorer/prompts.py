"""The routes of the prompt explorer: a prompt, what is active in it and why, and what ablations change there.

Each takes a JSON object by POST, with the page's token, and is computed at a desk of its own; answers are kept. A
prompt is `{"text": "..."}` or `{"ids": [...]}`; the BOS that stands in front of it is added here, as an index does.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.errors import HeadscopeError, IndexFormatError, StudyError
from headscope.explorer.answers import Json, answer, failure, json_object, pack_json
from headscope.explorer.circuit_json import CircuitSource, level_json, path_of, qk_json
from headscope.explorer.desk import Desk
from headscope.explorer.prompt_json import dfa_json, features_json, next_json, run_json
from headscope.studies.prompt.records import (
    Ablation,
    ActiveFeatures,
    NextTokens,
    PromptDFA,
    PromptRun,
    parse_ablations,
)

MAX_BODY = 400_000
"""Bytes of a request."""
MOST_CHILDREN = 12
"""Nodes of a level of recursive DFA that are named; the others are summed."""
MAX_TEXT = 100_000
"""Characters of a prompt that are given to the tokenizer."""

_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "run": {"prompt": (dict,), "ablations": (list,)},
    "token": {"prompt": (dict,), "ablations": (list,), "query": (int,), "target": (int, type(None))},
    "dfa": {"prompt": (dict,), "latent": (int,), "query": (int,)},
    "level": {"prompt": (dict,), "latent": (int,), "query": (int,), "path": (str,)},
    "scores": {"prompt": (dict,), "layer": (int,), "head": (int,), "query": (int,), "key": (int, type(None))},
}


@runtime_checkable
class PromptSource(Protocol):
    """An object with the index's model behind it; `headscope.studies.prompt.prompts.Prompts` is one."""

    @property
    def bos(self) -> int:
        """The token that stands in front of every prompt."""
        ...

    @property
    def heads(self) -> tuple[int, int]:
        """Layers, and heads of each."""
        ...

    @property
    def context(self) -> int:
        """Tokens of the longest prompt, BOS included."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, BOS in front.

        Raises:
            HeadscopeError: no text, or too much of it.
        """
        ...

    def run(self, tokens: Sequence[int], ablations: Sequence[Ablation] = ()) -> PromptRun:
        """Where features are active and what each next token costs, with and without ablations.

        Raises:
            HeadscopeError: no such prompt, or an ablation of what there is not.
        """
        ...

    def features(self, tokens: Sequence[int], query: int, target: int | None = None) -> ActiveFeatures:
        """The active features at one token, with their effect on the logit of one.

        Raises:
            HeadscopeError: no such prompt, position or target.
        """
        ...

    def next_tokens(self, tokens: Sequence[int], query: int, ablations: Sequence[Ablation] = ()) -> NextTokens:
        """What the model predicts after one token, with and without ablations.

        Raises:
            HeadscopeError: no such prompt or position, or an ablation of what there is not.
        """
        ...

    def dfa(self, tokens: Sequence[int], latent: int, query: int) -> PromptDFA:
        """The pre-activation of a feature at one token by head and source.

        Raises:
            HeadscopeError: no such prompt, feature or position.
        """
        ...


class PromptRoutes:
    """`/api/prompt`, what can be asked, and `/api/prompt/run`, `token`, `dfa`, `level` and `scores`."""

    def __init__(
        self, source: PromptSource, circuits: CircuitSource, *, folder: str = "", desk: Desk | None = None
    ) -> None:
        """Answer from `source` and `circuits`, computing at `desk`; `folder` is the index's, for the Python shown."""
        self.source, self.circuits, self.folder = source, circuits, folder
        self.desk = desk or Desk()

    def routes(self) -> list[Route]:
        """For the application, whose guard asks for the page's token."""
        asked = [Route(f"/api/prompt/{name}", self._endpoint(name), methods=["POST"]) for name in _FIELDS]
        return [Route("/api/prompt", self.start), *asked]

    async def start(self, request: Request) -> Response:
        """What can be asked."""
        n_layers, n_heads = self.source.heads
        said = {"bos": self.source.bos, "n_layers": n_layers, "n_heads": n_heads, "context": self.source.context}
        return answer(request, pack_json(said))

    # --------------------------------------------------------------------------------------------------------- answers
    def run(self, *, prompt: Json, ablations: list[str]) -> Json:
        """The whole prompt.

        Raises:
            HeadscopeError: no such prompt, or an ablation that cannot be.
        """
        tokens = self._tokens(prompt)
        return run_json(self.source.run(tokens, parse_ablations(ablations)), self.folder)

    def token(self, *, prompt: Json, ablations: list[str], query: int, target: int | None) -> Json:
        """One token of it: its features, and what comes next.

        Raises:
            HeadscopeError: no such prompt, position or target, or an ablation that cannot be.
        """
        tokens = self._tokens(prompt)
        found = self.source.next_tokens(tokens, query, parse_ablations(ablations))
        return {"features": features_json(self.source.features(tokens, query, target)), "next": next_json(found)}

    def dfa(self, *, prompt: Json, latent: int, query: int) -> Json:
        """A feature at one token by head and source.

        Raises:
            HeadscopeError: no such prompt, feature or position.
        """
        return dfa_json(self.source.dfa(self._tokens(prompt), latent, query))

    def level(self, *, prompt: Json, latent: int, query: int, path: str) -> Json:
        """One level of its recursive DFA.

        Raises:
            HeadscopeError: no such prompt, feature, position or node.
        """
        return level_json(self.circuits.level(self._tokens(prompt), latent, query, path_of(path)), most=MOST_CHILDREN)

    def scores(self, *, prompt: Json, layer: int, head: int, query: int, key: int | None) -> Json:
        """Why a head attends to a key.

        Raises:
            HeadscopeError: no such prompt, head or position, or a model without an exact split.
        """
        return qk_json(self.circuits, self._tokens(prompt), layer, head, query, key)

    # ----------------------------------------------------------------------------------------------------------- steps
    def _tokens(self, prompt: Json) -> tuple[int, ...]:
        match prompt:
            case {"text": str(text)} if len(prompt) == 1:
                _check_text(text)
                return self.source.encode(text)
            case {"ids": list(ids)} if len(prompt) == 1 and all(type(token) is int for token in ids):
                return (self.source.bos, *ids)
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
            return await self._answer(request, key, lambda: method(**asked))

        return endpoint

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
    """The fields of a request's body.

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
