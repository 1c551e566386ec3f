"""Responses of the explorer's server: strict JSON, compressed once, with entity tags, and error messages."""

import gzip
import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headscope.encode import Json
from headscope.errors import HeadscopeError

JSON = "application/json"
_LEVEL = 4  # gzip level: a card takes a seventh of the time of level 9, and is 5 % larger
_SMALL = 1000  # bytes below which compression does not pay off


def dump_json(content: Any) -> bytes:
    """Encode as compact, strict JSON: NaN raises here, rather than in the browser."""
    return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


class NothingThereError(IndexError):
    """No feature or block has this number; any other IndexError is a bug."""


@dataclass(frozen=True)
class Packed:
    """A response body as sent, with the entity tag of its content."""

    body: bytes
    compressed: bool
    tag: str

    @property
    def content(self) -> bytes:
        """The body before compression."""
        return gzip.decompress(self.body) if self.compressed else self.body


def pack(content: bytes) -> Packed:
    """Compress a body; small ones are left uncompressed."""
    tag = f'W/"{hashlib.sha256(content).hexdigest()[:20]}"'
    if len(content) < _SMALL:
        return Packed(content, compressed=False, tag=tag)
    return Packed(gzip.compress(content, _LEVEL, mtime=0), compressed=True, tag=tag)


def pack_json(content: Any) -> Packed:
    """Encode and compress; NaN raises."""
    return pack(dump_json(content))


class Kept:
    """LRU cache of packed responses, bounded in bytes.

    Used by one thread only, that of the event loop.
    """

    def __init__(self, most: int = 64 << 20) -> None:
        """Cache at most `most` bytes of bodies."""
        self.most, self.size = most, 0
        self._answers: OrderedDict[Hashable, Packed] = OrderedDict()

    def get(self, key: Hashable) -> Packed | None:
        """Return the cached response of a key, if any."""
        found = self._answers.get(key)
        if found is not None:
            self._answers.move_to_end(key)
        return found

    def put(self, key: Hashable, packed: Packed) -> None:
        """Cache a response, unless it alone is too large."""
        self._drop(key)
        if len(packed.body) > self.most:
            return
        self._answers[key] = packed
        self.size += len(packed.body)
        while self.size > self.most:
            self._drop(next(iter(self._answers)))

    def _drop(self, key: Hashable) -> None:
        old = self._answers.pop(key, None)
        self.size -= len(old.body) if old is not None else 0


def answer(request: Request, packed: Packed, media: str = JSON) -> Response:
    """Return a body in the encoding the browser accepts, or 304 if its copy is current."""
    headers = {"etag": packed.tag, "cache-control": "no-cache"}
    if packed.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    body = packed.body
    if packed.compressed:
        headers["vary"] = "accept-encoding"
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
        else:
            body = packed.content
    return Response(body, media_type=media, headers=headers)


def failure(status: int, message: str, **more: Any) -> Response:
    """Return an error message as JSON."""
    return Response(dump_json({"error": message} | more), status_code=status, media_type=JSON)


def busy(message: str, *, retry_s: int = 1) -> Response:
    """Return that the server is busy; the page retries after a pause."""
    response = failure(503, message)
    response.headers["retry-after"] = str(retry_s)
    return response


def json_object(body: bytes, names: Collection[str], refused: type[HeadscopeError]) -> Json:
    """Parse a request's body, one object with exactly these fields; the caller checks their types.

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
    """Return the number at the end of a path, or raise 404."""
    text = request.path_params["number"]
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    return failure(404, f"{text} is not the number of a {name}: expected 0, 1, 2, ...")
