"""The explorer's server under load: answers kept and computed once, turns, refusals, connections of silent clients."""

import asyncio
import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from browsing import serving
from explorer_source import FakeSource
from headscope.explorer import connections
from headscope.explorer.answers import Kept, Packed, dump_json, pack
from headscope.explorer.connections import Crowd
from headscope.explorer.desk import BusyError, Desk, TooSlowError
from headscope.explorer.server import make_app

BASE = "http://127.0.0.1:8000"


# ------------------------------------------------------------------------------------------------------------- answers
def test_an_answer_is_the_same_bytes_fresh_kept_and_uncompressed() -> None:
    source = FakeSource()
    client = TestClient(make_app(source), base_url=BASE)
    for path, content in {"/api/feature/3": source.feature(3), "/api/context/5": source.context(5)}.items():
        expected, answers = dump_json(content), [client.get(path) for _ in range(2)]
        answers.append(client.get(path, headers={"accept-encoding": "identity"}))
        assert [answer.content for answer in answers] == 3 * [expected]
        large = len(expected) >= 1000
        encoding = "gzip" if large else None
        assert [answer.headers.get("content-encoding") for answer in answers] == [encoding, encoding, None]
        assert {answer.headers["etag"] for answer in answers} == {answers[0].headers["etag"]}
        assert {answer.headers.get("vary") for answer in answers} == {"accept-encoding" if large else None}
        assert client.get(path, headers={"if-none-match": answers[0].headers["etag"]}).status_code == 304


def test_what_is_small_stays_as_it_is() -> None:
    for size, compressed in ((0, False), (999, False), (1000, True)):
        packed = pack(size * b"a")
        assert (packed.compressed, packed.content) == (compressed, size * b"a")
        assert packed.body == (packed.content if not compressed else gzip.compress(packed.content, 4, mtime=0))
    assert pack(b"a").tag != pack(b"b").tag


def test_kept_answers_are_bounded_in_bytes_and_the_latest_stay() -> None:
    kept = Kept(most=10)

    def put(key: str, size: int) -> None:
        kept.put(key, Packed(size * b"x", compressed=False, tag=key))

    def held() -> dict[str, int]:
        return {key: len(found.body) for key in "abcde" if (found := kept.get(key))}

    put("a", 4)
    put("b", 4)
    assert kept.get("a"), "asked for, and so later than b"
    put("c", 4)
    assert (held(), kept.size) == ({"a": 4, "c": 4}, 8)
    put("a", 1)
    assert (held(), kept.size) == ({"a": 1, "c": 4}, 5), "replaced"
    put("d", 10)
    assert (held(), kept.size) == ({"d": 10}, 10)
    put("e", 11)
    assert (held(), kept.size) == ({"d": 10}, 10), "what does not fit at all drives nothing out"
    assert kept.get("e") is None


# ------------------------------------------------------------------------------------------------------------ the desk
def request(*, gone: bool = False) -> Request:
    """One whose client waits, or has gone."""

    async def receive() -> dict[str, Any]:
        if not gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "headers": []}, receive)


class Work:
    """What a desk is given; it counts, and lasts until it is let go."""

    def __init__(self) -> None:
        self.go, self.done = threading.Event(), []

    def of(self, name: str) -> Callable[[], Packed]:
        def work() -> Packed:
            assert self.go.wait(20)
            self.done.append(name)
            return pack(name.encode())

        return work


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_many_who_ask_for_the_same_at_once_wait_for_one_computation() -> None:
    async def ask() -> None:
        desk, work = Desk(places=1, waiting=1), Work()
        asked = [asyncio.create_task(desk.run(("a",), work.of("a"), request())) for _ in range(20)]
        asked += [asyncio.create_task(desk.run(("b",), work.of("b"), request())) for _ in range(20)]
        await asyncio.sleep(0.01)
        work.go.set()
        answers = [packed.content for packed in await asyncio.gather(*asked)]
        assert answers == 20 * [b"a"] + 20 * [b"b"]
        assert work.done == ["a", "b"]
        assert (await desk.run(("a",), work.of("a"), request())).content == b"a"
        assert work.done == ["a", "b"], "kept"

    asyncio.run(ask())


def test_turns_come_in_the_order_of_asking() -> None:
    async def ask() -> None:
        desk, work = Desk(places=1), Work()
        asked = []
        for name in "abcdefgh":
            asked.append(asyncio.create_task(desk.run((name,), work.of(name), request())))
            await asyncio.sleep(0)
        work.go.set()
        await asyncio.gather(*asked)
        assert work.done == list("abcdefgh")

    asyncio.run(ask())


def test_what_nobody_waits_for_is_not_begun_and_one_who_still_waits_gets_it() -> None:
    async def ask() -> None:
        desk, work = Desk(places=1), Work()
        first = asyncio.create_task(desk.run(("first",), work.of("first"), request()))
        await asyncio.sleep(0.01)
        gone = [asyncio.create_task(desk.run(("gone",), work.of("gone"), request(gone=True))) for _ in range(2)]
        both = [asyncio.create_task(desk.run(("both",), work.of("both"), request(gone=g))) for g in (True, False)]
        await asyncio.sleep(0.01)
        work.go.set()
        assert (await first).content == b"first"
        assert [type(e) for e in await asyncio.gather(*gone, return_exceptions=True)] == 2 * [BusyError]
        assert [packed.content for packed in await asyncio.gather(*both)] == 2 * [b"both"]
        assert work.done == ["first", "both"]

    asyncio.run(ask())


def test_a_wait_for_a_turn_is_bounded_in_length_and_in_number() -> None:
    async def ask() -> None:
        desk, work = Desk(places=1, waiting=1, patience=0.05), Work()
        first = asyncio.create_task(desk.run(("first",), work.of("first"), request()))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(desk.run(("second",), work.of("second"), request()))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await desk.run(("third",), work.of("third"), request())
        with pytest.raises(BusyError):
            await second
        again = asyncio.create_task(desk.run(("second",), work.of("second"), request()))  # as the page does
        await asyncio.sleep(0)
        work.go.set()
        assert [(await one).content for one in (first, again)] == [b"first", b"second"]
        assert work.done == ["first", "second"], "it kept its turn"

    asyncio.run(ask())


def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    async def ask() -> None:
        desk, n = Desk(), [0]

        def fails() -> Packed:
            n[0] += 1
            raise KeyError("no such thing")

        found = await asyncio.gather(*(desk.run(("a",), fails, request()) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == 3 * [KeyError]
        with pytest.raises(KeyError):
            await desk.run(("a",), fails, request())
        assert n == [2]

    asyncio.run(ask())


def test_what_is_given_up_keeps_its_place_and_its_result() -> None:
    async def ask() -> None:
        desk, work = Desk(places=1, seconds=0.05, patience=0.05), Work()
        with pytest.raises(TooSlowError):
            await desk.run(("slow",), work.of("slow"), request())
        with pytest.raises(BusyError):
            await desk.run(("other",), work.of("other"), request())
        work.go.set()
        await until(lambda: not desk._jobs)
        assert (await desk.run(("slow",), work.of("slow"), request())).content == b"slow"
        assert work.done.count("slow") == 1

    asyncio.run(ask())


def test_a_new_stamp_makes_kept_answers_old() -> None:
    async def ask() -> None:
        stamp, work = [1], Work()
        desk = Desk(stamp=lambda: stamp[0])
        work.go.set()
        for stamp[0] in (1, 1, 2, 2):
            await desk.run(("a",), work.of("a"), request())
        assert work.done == ["a", "a"]

    asyncio.run(ask())


def test_a_busy_server_says_when_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(*_: object) -> Packed:
        raise BusyError

    monkeypatch.setattr(Desk, "run", busy)
    answer = TestClient(make_app(FakeSource()), base_url=BASE).get("/api/feature/3")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "ask again" in answer.json()["error"]


# ------------------------------------------------------------------------------------------------------- many requests
def test_requests_beyond_the_most_and_at_the_end_are_told_so() -> None:
    async def ask() -> None:
        go, sent = asyncio.Event(), {i: [] for i in range(4)}

        async def app(scope: dict[str, Any], receive: Callable, send: Callable[..., Awaitable[None]]) -> None:
            await go.wait()
            await PlainTextResponse("done")(scope, receive, send)

        crowd, scope = Crowd(app, most=1), {"type": "http", "method": "GET", "headers": []}

        def asked(i: int) -> asyncio.Task[None]:
            async def send(message: Any) -> None:
                sent[i].append(message)

            return asyncio.create_task(crowd(scope, request().receive, send))

        first = asked(0)
        await asyncio.sleep(0)
        await asked(1)
        go.set()
        await first
        await asked(2)
        assert [sent[i][0]["status"] for i in range(3)] == [200, 503, 200]
        assert {(b"retry-after", b"1"), (b"connection", b"close")} <= set(sent[1][0]["headers"])
        assert "ask again" in json.loads(sent[1][1]["body"])["error"]
        go.clear()
        ended = asked(3)
        await asyncio.sleep(0)
        ended.cancel()
        await ended
        assert sent[3][0]["status"] == 503
        assert "ended" in json.loads(sent[3][1]["body"])["error"]

    asyncio.run(ask())


# --------------------------------------------------------------------------------------------------------- connections
@contextmanager
def connected(address: str, begun: bytes = b"") -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect((host, int(port)))
        client.sendall(begun.replace(b"HOST", f"{host}:{port}".encode()))
        yield client


def received(client: socket.socket) -> bytes:
    """All until the server closes the connection; it fails if it does not."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def slow_app(seconds: float, begun: threading.Event | None = None) -> Starlette:
    async def slow(_request: Request) -> Response:
        if begun is not None:
            begun.set()
        await asyncio.sleep(seconds)
        return PlainTextResponse("done")

    async def large(_request: Request) -> Response:
        return Response(bytes(30_000_000))

    async def read(request: Request) -> Response:
        return Response(await request.body())

    return Starlette(routes=[Route("/slow", slow), Route("/large", large), Route("/read", read, methods=["POST"])])


def test_a_client_that_falls_silent_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_S", 0.4)
    silent = {
        "nothing": b"",
        "half a head": b"GET /slow HTTP/1.1\r\nhost: HO",
        "half a body": b"POST /read HTTP/1.1\r\nhost: HOST\r\ncontent-length: 10\r\n\r\nhalf",
    }
    with serving(slow_app(0)) as address:
        for name, begun in silent.items():
            with connected(address, begun) as client:
                assert b" 200 " not in received(client), name
        with connected(address, b"GET /large HTTP/1.1\r\nhost: HOST\r\n\r\n") as client:
            time.sleep(1.0)  # the answer is not taken
            assert 0 < len(received(client)) < 30_000_000


def test_a_client_that_trickles_is_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_S", 0.4)
    with serving(slow_app(0)) as address, connected(address, b"GET /slow HTTP/1.1\r\nx: ") as client:
        closed = threading.Thread(target=received, args=(client,), daemon=True)
        closed.start()
        deadline = time.monotonic() + 20
        while closed.is_alive() and time.monotonic() < deadline:
            with suppress(ConnectionError):
                client.sendall(b"a")
            closed.join(0.05)
        assert not closed.is_alive()


def test_who_waits_for_the_server_and_who_asks_on_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_S", 0.4)
    asked = b"GET /slow HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with serving(slow_app(1.0)) as address, connected(address, asked) as client:
        assert b" 200 " in client.recv(1000)
    with serving(slow_app(0)) as address, connected(address, asked) as client:
        for _ in range(10):
            answer = b""
            while not answer.endswith(b"done"):
                part = client.recv(1000)
                assert part, "still open"
                answer += part
            time.sleep(0.1)
            client.sendall(asked)


def test_among_too_many_connections_the_one_that_waits_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    asked, begun = b"GET /slow HTTP/1.1\r\nhost: HOST\r\nconnection: close\r\n\r\n", threading.Event()
    with serving(slow_app(0.5, begun)) as address, connected(address, asked) as at_work:
        assert begun.wait(20)
        with connected(address) as oldest, connected(address) as older, connected(address, asked) as last:
            assert received(oldest) == b""
            assert b" 200 " in received(at_work)
            assert b" 200 " in received(last)
            older.settimeout(0.1)
            with pytest.raises(TimeoutError):
                older.recv(1)


def test_a_client_that_leaves_in_the_middle_of_a_request_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    source = FakeSource()
    app = make_app(source, "a token")

    async def read(request: Request) -> Response:
        return Response(await request.body())

    app.router.routes.append(Route("/read", read, methods=["POST"]))
    begun = b"POST /read HTTP/1.1\r\nhost: HOST\r\nx-headscope-token: a token\r\ncontent-length: 10\r\n\r\nhalf"
    with serving(app) as address:
        with connected(address, begun):
            pass
        with connected(address, b"GET /api/about HTTP/1.1\r\nhost: HOST\r\nconnection: close\r\n\r\n") as client:
            assert b" 200 " in received(client)
    assert "Traceback" not in capfd.readouterr().err


def test_many_clients_at_once_get_what_one_gets() -> None:
    source = FakeSource()
    expected = {f"/api/context/{i}": dump_json(source.context(i)) for i in (3, 4, 5)}

    def ask(address: str, path: str) -> tuple[str, bytes]:
        with connected(address, f"GET {path} HTTP/1.1\r\nhost: HOST\r\nconnection: close\r\n\r\n".encode()) as client:
            return path, received(client).partition(b"\r\n\r\n")[2]

    with serving(make_app(FakeSource())) as address, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda path: ask(address, path), 12 * list(expected)))
    assert all(content == expected[path] for path, content in answers)


def test_a_fault_of_the_program_is_not_called_a_feature_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource()
    client = TestClient(make_app(source), base_url=BASE, raise_server_exceptions=False)
    assert client.get("/api/feature/100000").status_code == 404
    monkeypatch.setattr(source, "feature", lambda _latent: [][0])
    assert client.get("/api/feature/3").status_code == 500


_LEFT = """
import asyncio, sys, threading, time
from headscope import cli, jobs
from headscope.explorer.desk import _in_thread

begun = threading.Event()

def work():
    begun.set()
    time.sleep(60)

async def ask():
    _in_thread(work)

def serve(*_args, **_named):
    asyncio.run(ask())
    begun.wait()
    print("served", end="")

jobs.serve = serve
sys.argv = ["headscope", "serve", "--index", "x"]
cli.main()
print("never")
"""


def test_a_process_ends_although_a_computation_that_nobody_waits_for_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", _LEFT], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "served", "")
