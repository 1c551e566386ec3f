"""How the explorer's server holds under load: many clients at once on cards, blocks of text, the table and studies.

`headscope serve` runs in a process of its own; the clients are coroutines of this one, each with one connection that it
keeps open as a browser does. A client asks, waits for the whole answer, checks its status and asks the next: a request
of a kind drawn by `--cards`, `--contexts`, `--tables` and `--studies`, of a feature or block drawn at random. A study
is what opening a tab of a card asks for: proxies to try, then the dive of the first, or shares by head. `--idle` more
sockets are opened before: in equal parts they send nothing, half a head, a head whose body never comes, and a request
for the table whose answer they never read.

Times are from the first byte sent to the last byte received, as the client sees them, and so include its own share of
the processor. "server" is the part of it that the server says it took (`server-timing`), without the wait for the
socket. Every run ends by itself: no request is sent after `--seconds`, and none is waited for longer than 90 s.

    python benchmarks/serve_load.py                      100 clients, 30 s, an index of 2,048 features (written once)
    python benchmarks/serve_load.py --index runs/tiny    on an index of one's own
    python benchmarks/serve_load.py --clients 20 --think 0.2 --contexts 0 --tables 0 --studies 0 --idle 0    cards alone
    python benchmarks/serve_load.py --quick              10 clients, 3 s
"""

import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import tyro

PATIENCE_S = 90.0
"""The longest that a client waits for one answer."""
TARGETS = {("card", 50): 100.0, ("card", 99): 1000.0}
"""Milliseconds, by kind and percentile."""
_MOST_CLIENTS = 1000
_MOST_SECONDS = 600.0
_KEPT = 50  # answers that are looked into afterwards


@dataclass(frozen=True)
class Arguments:
    """Options."""

    index: Path | None = None
    """An index folder; a random one of 2,048 features and 500k tokens when not given (`synthetic_index.py`)."""
    folder: Path = Path("build/benchmarks/serve_load")
    """Where the random index is kept."""
    model: str | None = None
    """Passed on to `headscope serve`."""
    clients: int = 100
    """At most 1,000."""
    seconds: float = 30.0
    """How long they ask; at most 600."""
    think: float = 0.0
    """Mean pause of a client between an answer and its next question, in seconds (exponential)."""
    cards: float = 60.0
    """Relative frequency of cards."""
    contexts: float = 20.0
    """Of whole blocks of the corpus."""
    tables: float = 5.0
    """Of the table of all features."""
    studies: float = 15.0
    """Of studies."""
    features: int | None = None
    """Ask for this many live features only, drawn at random."""
    idle: int = 300
    """Sockets that are opened and then say nothing more."""
    seed: int = 0
    quick: bool = False
    """10 clients, 3 s, 8 idle sockets."""
    json: bool = False
    """One JSON object a line."""

    def __post_init__(self) -> None:
        """Keep the load bounded."""
        if not (0 < self.clients <= _MOST_CLIENTS and 0 < self.seconds <= _MOST_SECONDS):
            sys.exit(f"at most {_MOST_CLIENTS} clients and {_MOST_SECONDS:g} s")


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    target: float | None = None
    """What it has to stay below."""


@dataclass(frozen=True)
class Sample:
    """One request."""

    kind: str
    status: str
    """Of HTTP, or the name of the exception."""
    ms: float
    server_ms: float | None = None


@dataclass
class Tally:
    """All requests, and some of the answers."""

    samples: list[Sample] = field(default_factory=list)
    kept: list[tuple[str, bytes]] = field(default_factory=list)
    """Path and body."""
    received: int = 0
    """Bytes of bodies."""
    seconds: float = 0.0

    def add(self, sample: Sample, path: str, body: bytes) -> None:
        """Count one."""
        self.samples.append(sample)
        self.received += len(body)
        if sample.status == "200" and len(self.kept) < _KEPT:
            self.kept.append((path, body))


# --------------------------------------------------------------------------------------------------------------- client
@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The content."""
        packed = self.headers.get("content-encoding") == "gzip"
        return json.loads(gzip.decompress(self.body) if packed else self.body)

    @property
    def server_ms(self) -> float | None:
        """What the server says it took."""
        found = re.search(r"dur=([\d.]+)", self.headers.get("server-timing", ""))
        return float(found[1]) if found else None


class Client:
    """HTTP/1.1 over one connection, opened anew where the server has closed it."""

    def __init__(self, url: str) -> None:
        """Talk to the server at an address; nothing is opened yet."""
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def head(self, path: str, method: str = "GET") -> bytes:
        """The head of a request, without the empty line that ends it."""
        return f"{method} {path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\naccept-encoding: gzip\r\n".encode()

    async def get(self, path: str) -> Answer:
        """Ask for a path.

        Raises:
            OSError, EOFError: there was no answer.
        """
        fresh = self._streams is None
        try:
            return await self._ask(path)
        except (OSError, EOFError):
            self.close()
            if fresh:
                raise
        return await self._ask(path)  # a connection that was kept may be closed at any time

    async def _ask(self, path: str) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self._streams
        writer.write(self.head(path) + b"\r\n")
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        except BaseException:
            self.close()
            raise
        if headers.get("connection") == "close":
            self.close()
        return Answer(int(first.split()[1]), headers, body)

    def close(self) -> None:
        """End the connection."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None


# ----------------------------------------------------------------------------------------------------------------- load
@dataclass(frozen=True)
class Subject:
    """What can be asked for."""

    latents: list[int]
    n_blocks: int


async def subject_of(url: str, arguments: Arguments) -> Subject:
    """The live features and the blocks of the index that is served."""
    client = Client(url)
    rows = (await client.get("/api/table")).json()["rows"]
    about = (await client.get("/api/about")).json()
    client.close()
    live = [latent for latent, n in zip(rows["latent"], rows["n_active"], strict=True) if n]
    if arguments.features is not None:
        live = random.Random(arguments.seed).sample(live, min(arguments.features, len(live)))
    return Subject(live, about["corpus"]["n_blocks"])


async def load(url: str, subject: Subject, arguments: Arguments) -> Tally:
    """Let all clients ask until the time is over."""
    tally, start = Tally(), time.perf_counter()
    end = start + arguments.seconds
    await asyncio.gather(*(_client(url, subject, arguments, tally, end, i) for i in range(arguments.clients)))
    tally.seconds = time.perf_counter() - start
    return tally


async def _client(url: str, subject: Subject, arguments: Arguments, tally: Tally, end: float, number: int) -> None:
    asker, rng = _Asker(Client(url), tally), random.Random(f"{arguments.seed} {number}")
    weights = (arguments.cards, arguments.contexts, arguments.tables, arguments.studies)
    while time.perf_counter() < end:
        (what,) = rng.choices((_card, _context, _table, _study), weights)
        await what(asker, subject, rng)
        if arguments.think:
            await asyncio.sleep(min(rng.expovariate(1 / arguments.think), max(0.0, end - time.perf_counter())))
    asker.client.close()


@dataclass(frozen=True)
class _Asker:
    """A client whose requests are counted."""

    client: Client
    tally: Tally

    async def ask(self, kind: str, path: str) -> Answer | None:
        """The answer, if there is one; after a refusal the client pauses as long as it is told to."""
        start, answer = time.perf_counter(), None
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self.client.get(path)
            status = str(answer.status)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self.client.close()
            status = type(error).__name__
        ms = (time.perf_counter() - start) * 1e3
        self.tally.add(Sample(kind, status, ms, answer and answer.server_ms), path, answer.body if answer else b"")
        if answer is None or answer.status == 503:
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)) if answer else 1.0)
        return answer


async def _card(asker: _Asker, subject: Subject, rng: random.Random) -> None:
    await asker.ask("card", f"/api/feature/{rng.choice(subject.latents)}")


async def _context(asker: _Asker, subject: Subject, rng: random.Random) -> None:
    await asker.ask("context", f"/api/context/{rng.randrange(subject.n_blocks)}")


async def _table(asker: _Asker, _subject: Subject, _rng: random.Random) -> None:
    await asker.ask("table", "/api/table")


async def _study(asker: _Asker, subject: Subject, rng: random.Random) -> None:
    latent = rng.choice(subject.latents)
    if rng.random() < 1 / 3:
        await asker.ask("heads", f"/api/study/head_shares/{latent}")
        return
    start = await asker.ask("start", f"/api/start/{latent}")
    if start is not None and start.status == 200 and (proxies := start.json()["proxies"]):
        await asker.ask("dive", f"/api/study/specificity/{latent}?proxy={quote(proxies[0]['proxy'])}")


@contextmanager
def idle_sockets(url: str, n: int) -> Iterator[None]:
    """Sockets that are opened and then say nothing more, for as long as the context lasts."""
    client = Client(url)
    table = client.head("/api/table") + b"\r\n"
    posted = client.head("/api/labels", "POST") + b"content-length: 100\r\n\r\n{"
    begun = (b"", client.head("/api/about"), posted, table)
    with contextlib.ExitStack() as opened:
        for i in range(n):
            idle = opened.enter_context(socket.socket())
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read soon blocks the server
            idle.connect((client.host, client.port))
            idle.sendall(begun[i % len(begun)])
        yield


# --------------------------------------------------------------------------------------------------------------- server
class Process:
    """A process of the machine, as /proc tells of it."""

    def __init__(self, pid: int) -> None:
        """Look at the process with this number."""
        self._folder = Path("/proc") / str(pid)

    def memory(self, name: str = "VmRSS") -> float:
        """Resident memory in MB; its peak is `VmHWM`."""
        (line,) = (line for line in (self._folder / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024 / 1e6

    def sockets(self) -> int:
        """Sockets that it has open."""
        n = 0
        for item in (self._folder / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed in between
                n += str(item.readlink()).startswith("socket:")
        return n

    def busy_s(self) -> float:
        """Seconds of the processor."""
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(index: Path, model: str | None) -> Iterator[tuple[str, Process]]:
    """`headscope serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "headscope", "serve", "--index", str(index)]
    command += ["--model", model] if model else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}")
        yield found[0], Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -------------------------------------------------------------------------------------------------------------- figures
async def measure(url: str, process: Process, arguments: Arguments) -> list[Row]:
    """All figures of one load."""
    subject = await subject_of(url, arguments)
    await asyncio.sleep(0.5)
    before, busy, sockets = process.memory(), process.busy_s(), process.sockets()
    own = time.process_time()
    with idle_sockets(url, arguments.idle):
        tally = await load(url, subject, arguments)
        own, busy = time.process_time() - own, process.busy_s() - busy
        await asyncio.sleep(1)
        left = process.sockets() - sockets
    return [
        *figures(tally),
        Row("requests, by the server's processor", len(tally.samples) / busy, "/s"),
        Row("server's processor", busy / tally.seconds, "cores"),
        Row("clients' processor", own / tally.seconds, "cores"),
        Row("memory before", before, "MB"),
        Row("memory after", process.memory(), "MB"),
        Row("memory at most", process.memory("VmHWM"), "MB"),
        Row(f"sockets still open, of {arguments.idle} idle", left, ""),
    ]


def figures(tally: Tally) -> list[Row]:
    """What the requests amount to."""
    rows = [Row("requests", len(tally.samples) / tally.seconds, "/s"), Row("received", tally.received / 1e6, "MB")]
    for kind in dict.fromkeys(sorted(sample.kind for sample in tally.samples)):
        own = [sample for sample in tally.samples if sample.kind == kind]
        rows.append(Row(f"{kind}: answered", sum(sample.status == "200" for sample in own), ""))
        times = {"": [s.ms for s in own], "server ": [s.server_ms for s in own if s.server_ms is not None]}
        rows += [
            Row(f"{kind}: {by}p{q}", float(np.percentile(values, q)), "ms", None if by else TARGETS.get((kind, q)))
            for by, values in times.items()
            if values
            for q in (50, 99)
        ]
    failed = Counter((sample.kind, sample.status) for sample in tally.samples if sample.status != "200")
    rows += [Row(f"{kind}: {status}", n, "") for (kind, status), n in sorted(failed.items())]
    return [*rows, Row("answers that are wrong", sum(not right(*kept) for kept in tally.kept), f"of {len(tally.kept)}")]


def right(path: str, body: bytes) -> bool:
    """Whether an answer is of what was asked."""
    content = json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    asked = re.fullmatch(r"/api/(feature|context)/(\d+)", path)
    if asked is None:
        return isinstance(content, dict)
    return int(asked[2]) == (content["latent"] if asked[1] == "feature" else content["text"][0][0])


# ----------------------------------------------------------------------------------------------------------------- main
def main(arguments: Arguments) -> None:
    """Write the index if need be, serve it, ask, and print."""
    if arguments.quick:
        arguments = replace(arguments, clients=10, seconds=3.0, idle=8)
    index = arguments.index or _random_index(arguments.folder)
    with served(index, arguments.model) as (url, process):
        rows = asyncio.run(measure(url, process, arguments))
    for row in rows:
        if arguments.json:
            print(json.dumps(vars(row)))
        else:
            aim = "" if row.target is None else f"   below {row.target:g}"
            print(f"{row.name:<36}{row.value:>12,.1f} {row.unit:<5}{aim}".rstrip())


def _random_index(folder: Path) -> Path:
    """The random index, written in a process of its own: it imports torch."""
    script = "import sys; from pathlib import Path; from synthetic_index import Shape, write_index; "
    script += "write_index(Path(sys.argv[1]), Shape(features=2048, tokens=500_000))"
    subprocess.run([sys.executable, "-c", script, str(folder.absolute())], check=True, cwd=Path(__file__).parent)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
