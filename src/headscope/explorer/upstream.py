"""The tabs that say how a feature is computed: what they show, and their routes. What needs a model is asked of one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headscope.errors import HeadscopeError, IndexFormatError, ProxyError, StudyError
from headscope.explorer.answers import Json, NothingThereError, failure, number_of
from headscope.explorer.circuit_json import DIGITS, MAX_PATH, CircuitSource, level_json, path_of, qk_json
from headscope.explorer.desk import Desk
from headscope.explorer.numbers import significant
from headscope.explorer.study_json import measure_json
from headscope.index.store import FeatureIndex
from headscope.proxies import parse
from headscope.proxies.families import AfterAny, Induction, WithinAfter
from headscope.studies.how.head_shares import HeadShares, head_shares

_SHARES = {
    "decoder": "||W_dec[j, h]||, normalised (the post's); depends on the basis of z",
    "decoder_out": "||W_dec[j, h] W_O[h]||, normalised: in the residual stream, free of the basis of z",
    "encoder": "||W_enc[h, :, j]||, normalised; depends on the basis of z",
    "encoder_in": "||W_V[h] W_enc[h, :, j]||, normalised: in the residual stream, free of the basis of z",
}
_MEASURED = ("squared", "covariance", "linear")
_LARGE = 0.05  # of the squared DFA: a source token with less is not suggested
MAX_TOKENS = 64
"""Source tokens in a set."""
_STEPS = {"heads": 8, "sources": 5}  # thresholds
COMMAND = "headscope serve --with-model --upstream-sae SAE"
"""What starts a server that has what these tabs need; the SAE of an earlier component may be left out."""


@runtime_checkable
class UpstreamModel(Protocol):
    """The index's model, and SAEs of earlier components; HeadscopeErrors say what was wrong with a question."""

    @property
    def circuits(self) -> CircuitSource:
        """Takes prompts apart."""
        ...

    @property
    def saes(self) -> tuple[str, ...]:
        """SAEs of earlier components, by name."""
        ...

    def sources(self, latent: int, tokens: tuple[int, ...], thresholds: tuple[float, ...]) -> Json:
        """How much of a feature comes from source tokens of a set, and how much attention they are paid."""
        ...

    def compare(self, latent: int, at: int) -> Json:
        """Heads beside each other at one token of the corpus."""
        ...

    def patch(self, latent: int, at: int, how: str, nodes: str) -> Json:
        """Components patched between an example and a corruption of it."""
        ...

    def features(self, latent: int, at: int, how: str, sae: str) -> Json:
        """The features of an earlier SAE patched between an example and a corruption of it."""
        ...


class IndexUpstream:
    """What the upstream tabs show of the features of an index, as JSON-able dictionaries (static/types.d.ts)."""

    def __init__(self, index: FeatureIndex, model: UpstreamModel | None = None) -> None:
        """Read off an index; ask a model for the rest where there is one."""
        self._index, self._model = index, model

    def start(self, latent: int, proxy: str = "") -> Json:
        """What there is: whether a model, which SAEs, and sets of source tokens to look at."""
        self._check(latent)
        return {
            "live": self._model is not None,
            "saes": [] if self._model is None else list(self._model.saes),
            "command": f"headscope serve --index {self._index.folder} --with-model",
            "sets": self._sets(latent, proxy),
            "corpus": self._corpus(),
        }

    def heads(self, latent: int) -> Json:
        """DFA by head above thresholds, and the shares by weight norms."""
        self._check(latent)
        feature = self._index.feature(latent)
        records = head_shares(self._index, latent, self._thresholds(latent, _STEPS["heads"]))
        shares = {name: getattr(feature.shares, name) for name in _SHARES}
        folder = str(self._index.folder)
        return {
            "latent": latent,
            "corpus": self._corpus(),
            "thresholds": [head_shares_json(record) for record in records],
            "weights": {
                name: {"definition": definition, "shares": significant(shares[name], DIGITS)}
                for name, definition in _SHARES.items()
            },
            "python": (
                "from headscope import FeatureIndex\nfrom headscope.studies.how.head_shares import head_shares\n\n"
                f"index = FeatureIndex.open({folder!r})\n"
                f"head_shares(index, {latent}, {[r.threshold for r in records]}), index.feature({latent}).shares"
            ),
        }

    def sources(self, latent: int, tokens: str) -> Json:
        """DFA by source for a set of tokens, given by their ids, and the attention paid to them."""
        self._check(latent)
        chosen = _tokens_of(tokens)
        found = self._need().sources(latent, chosen, self._thresholds(latent, _STEPS["sources"]))
        return found | {"latent": latent, "corpus": self._corpus()}

    def compare(self, latent: int, at: int) -> Json:
        """Heads beside each other at one token of the corpus."""
        self._check(latent, at)
        return self._need().compare(latent, at)

    def patch(self, latent: int, at: int, how: str, nodes: str) -> Json:
        """Activation patching of components, with the feature as the metric."""
        self._check(latent, at)
        return self._need().patch(latent, at, how, nodes)

    def features(self, latent: int, at: int, how: str, sae: str) -> Json:
        """Activation patching of the features of an earlier SAE."""
        self._check(latent, at)
        return self._need().features(latent, at, how, sae)

    def circuit(self, latent: int, at: int, path: str) -> Json:
        """One level of the recursive DFA of a feature at a token of the corpus."""
        tokens, query = self._prompt(latent, at)
        found = self._need().circuits.level(tokens, latent, query, path_of(path))
        return level_json(found) | {"latent": latent, "at": at, "path": path, "python": self._python(latent, at)}

    def qk(self, latent: int, at: int, layer: int, head: int, query: int, key: int) -> Json:
        """Why a head attends from one token of an example to another."""
        tokens, _ = self._prompt(latent, at)
        found = qk_json(self._need().circuits, tokens, layer, head, query, key)
        return found | {"python": self._python(latent, at, (layer, head, query, key))}

    def packed(self, latent: int) -> Json:
        """What a file holds of these tabs: what needs no model."""
        live = {"live": False, "saes": []}
        return {"start": self.start(latent) | live, "heads": self.heads(latent)}

    # ----------------------------------------------------------------------------------------------------------- parts
    def _check(self, latent: int, at: int = 0) -> None:
        try:
            self._index.check_latent(latent)
        except IndexFormatError as error:
            raise NothingThereError(str(error)) from error
        n = self._index.n_blocks * self._index.block_size
        if not at < n:
            raise StudyError(f"position {at}", expected=f"0 to {n - 1}", do="name a token of this corpus")

    def _need(self) -> UpstreamModel:
        if self._model is None:
            raise StudyError("no model to run", expected="a server with the index's model", do=f"start it: {COMMAND}")
        return self._model

    def _corpus(self) -> str:
        corpus = self._index.manifest["corpus"]
        return f"{corpus['name']}, {corpus['split']}"

    def _prompt(self, latent: int, at: int) -> tuple[tuple[int, ...], int]:
        """The block up to a token, and where that is in it."""
        self._check(latent, at)
        block, query = divmod(at, self._index.block_size)
        return tuple(self._index.tokens_of(block)[: query + 1].tolist()), query

    def _thresholds(self, latent: int, n: int) -> tuple[float, ...]:
        """0 and equal steps of the largest activation."""
        maximum = self._index.feature(latent).maximum or 0.0
        return tuple(float(f"{maximum * k / n:.3g}") for k in range(n)) if maximum > 0 else (0.0,)

    def _sets(self, latent: int, proxy: str) -> list[Json]:
        """Source tokens that a proxy names; those with the largest shares; the one that the feature writes."""
        found: list[tuple[str, Sequence[int]]] = [("of the proxy", self._of_proxy(proxy))]
        sources, feature = self._index.sources(latent), self._index.feature(latent)
        special = set(self._index.vocabulary[1])
        if sources is not None:
            top = [t for t in sources.tokens if t.token not in special]
            found.append(("top source token", [t.token for t in top[:1]]))
            found.append(("source tokens of 5 % or more", [t.token for t in top[:8] if t.share >= _LARGE]))
        if feature.alive:
            found.append(("top logit token", [feature.logit_top[0][0]]))
        unique = {tuple(sorted(set(tokens))): name for name, tokens in reversed(found) if tokens}
        return [{"name": name, "tokens": list(tokens)} for tokens, name in reversed(unique.items())]

    def _of_proxy(self, text: str) -> list[int]:
        """The tokens that a proxy expects at the source, if it is of a kind that names them."""
        try:
            proxy = parse(text) if text else None
            match proxy:
                case Induction(token=token):
                    return [self._id(token)]
                case AfterAny() | WithinAfter():
                    return [self._id(token) for token in proxy.tokens][:MAX_TOKENS]
        except (ProxyError, IndexFormatError):
            pass  # a proxy that cannot be read suggests nothing; the tabs of proxies say why
        return []

    def _id(self, token: str | int) -> int:
        return token if isinstance(token, int) else self._index.token_id(token)

    def _python(self, latent: int, at: int, scores: tuple[int, int, int, int] | None = None) -> str:
        block, query = divmod(at, self._index.block_size)
        saes = [] if self._model is None else list(self._model.saes)
        if scores is None:
            study = "from headscope.studies.how.circuit import PromptCircuit"
            calls = (
                "circuit = PromptCircuit(live.model, live.sae, tokens, saes=saes)\n"
                f"circuit.expand(circuit.root({latent}, {query}))"
            )
        else:
            layer, head, at_query, key = scores
            study = "from headscope.studies.how.qk import PromptScores"
            before = f"[sae for sae in saes if sae.site.layer < {layer}]"
            calls = f"PromptScores(live.model, {layer}, tokens, saes={before}).split({head}, {at_query}).top({key})"
        return (
            f"import torch\nfrom headscope import jobs\nfrom headscope.sae.formats import load_sae\n{study}\n\n"
            f"live = jobs.live({str(self._index.folder)!r})\n"
            f"saes = [load_sae(name) for name in {saes!r}]\n"
            f"tokens = torch.tensor(live.index.tokens_of({block})[:{query + 1}].astype(int))\n{calls}"
        )


def head_shares_json(found: HeadShares) -> Json:
    """What each head contributes above one threshold."""
    return {
        "threshold": found.threshold,
        "n": found.n,
        "heads": [{name: measure_json(getattr(share, name)) for name in _MEASURED} for share in found.heads],
    }


def _tokens_of(text: str) -> tuple[int, ...]:
    """Ids as they stand in a link: 12,407.

    Raises:
        StudyError: they are not ids, or too many.
    """
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts) or len(parts) > MAX_TOKENS:
        raise StudyError(
            f"source tokens {text[:80]!r}", expected=f"1 to {MAX_TOKENS} ids, as 12,407", do="name some tokens"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


# -------------------------------------------------------------------------------------------------------------- routes
_MAX_TEXT = {"proxy": 2000, "tokens": 10 * MAX_TOKENS, "how": 400, "nodes": 20, "sae": 400, "path": MAX_PATH}
_STUDIES: dict[str, tuple[str, ...]] = {
    "start": ("proxy",),
    "heads": (),
    "sources": ("tokens",),
    "compare": ("at",),
    "patch": ("at", "how", "nodes"),
    "features": ("at", "how", "sae"),
    "circuit": ("at", "path"),
    "qk": ("at", "layer", "head", "query", "key"),
}


class UpstreamRoutes:
    """`/api/upstream/heads/18`, `/api/upstream/circuit/18?at=512&path=1.3`, ...: each study of `IndexUpstream`."""

    def __init__(self, source: IndexUpstream, desk: Desk | None = None, quick: Desk | None = None) -> None:
        """Answer from `source`, computing studies at `desk` and what only looks something up at `quick`."""
        self.source, self.desk = source, desk or Desk()
        self.quick = quick or self.desk

    def routes(self) -> list[Route]:
        """For the application."""
        return [Route(f"/api/upstream/{name}/{{number}}", self._of(name)) for name in _STUDIES]

    def _of(self, name: str) -> Callable:
        method, desk = getattr(self.source, name), self.quick if name == "start" else self.desk

        async def endpoint(request: Request) -> Response:
            latent = number_of(request, "feature")
            if isinstance(latent, Response):
                return latent
            try:
                given = [_parameter(request, each) for each in _STUDIES[name]]
                unknown = set(request.query_params) - set(_STUDIES[name])
                if unknown:
                    expected = f"{', '.join(_STUDIES[name]) or 'none'}"
                    raise StudyError(f"parameter {min(unknown)[:80]!r}", expected=expected, do="leave it out")
                key = ("upstream", name, latent, *given)
                return await desk.answered(key, lambda: method(latent, *given), request, others="studies")
            except NothingThereError as error:
                return failure(404, f"there is no feature {latent}: {error}")
            except IndexFormatError as error:
                return failure(500, str(error))
            except HeadscopeError as error:
                return failure(400, error.got, expected=error.expected, do=error.do)

        return endpoint


def _parameter(request: Request, name: str) -> Any:
    """One parameter of a question: a number, or text of a length that can be read.

    Raises:
        StudyError: it is missing where it is needed, given twice, or neither.
    """
    given = request.query_params.getlist(name)
    if name in _MAX_TEXT:
        if len(given) > 1 or len("".join(given)) > _MAX_TEXT[name]:
            raise StudyError(
                f"{len(''.join(given)):,} characters of {name} in {len(given)}",
                expected=f"one of at most {_MAX_TEXT[name]:,}",
                do="shorten it",
            )
        return given[0] if given else ""
    if len(given) != 1 or not (given[0].isascii() and given[0].isdigit() and len(given[0]) < 15):
        raise StudyError(f"{name} {', '.join(given)[:80]!r}", expected="one whole number", do=f"give ?{name}=0")
    return int(given[0])
