"""Answers of the explorer's server: strict JSON, entity tags, and failures that say what is wrong."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headscope.errors import HeadscopeError

Json = dict[str, Any]


def dump_json(content: Any) -> bytes:
    """Encode as compact, strict JSON: a NaN is an error here, not in the reader's browser."""
    return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def answer(request: Request, body: bytes, media: str) -> Response:
    """Return `body`, or 304 when the browser holds the same bytes already."""
    tag = f'W/"{hashlib.sha256(body).hexdigest()[:20]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media, headers=headers)


def failure(status: int, message: str, **more: Any) -> Response:
    """Say what is wrong, as JSON."""
    return Response(dump_json({"error": message} | more), status_code=status, media_type="application/json")


def json_object(body: bytes, names: Collection[str], refused: type[HeadscopeError]) -> Json:
    """A request's body, one object with exactly these fields; their types are for the caller to look at.

    Raises:
        HeadscopeError: of the kind `refused`: it is not.
    """
    try:
        told = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise refused("not JSON", expected="one JSON object", do="send one") from error
    if not isinstance(told, dict) or told.keys() != set(names):
        raise refused("another object", expected=f"one with {', '.join(names)}", do="send these")
    return told


def number_of(request: Request, name: str) -> int | Response:
    """The number at the end of a path, or the 404 that says there is none."""
    text = request.path_params["number"]
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    return failure(404, f"{text} is not the number of a {name}: expected 0, 1, 2, ...")
