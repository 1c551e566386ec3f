"""The explorer's server: what it answers, what it refuses, and how it starts and ends."""

import base64
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from explorer_source import D_SAE, FakeSource
from headscope.errors import ExportError, IndexFormatError, OutputError, ServerError
from headscope.explorer.export import MAX_FEATURES, export_folder, export_html
from headscope.explorer.server import DEFINITIONS, TOKEN_HEADER, make_app, serve, static_files
from headscope.index.config import DEFINITIONS as INDEX_DEFINITIONS

BASE = "http://127.0.0.1:8000"


TOKEN = "the token of this start"


@pytest.fixture
def client() -> TestClient:
    return TestClient(make_app(FakeSource(), TOKEN), base_url=BASE)


@pytest.mark.parametrize("path", ["/", "/f/18", "/f/18?w=16", "/f/999999", "/dashboard"])
def test_every_page_is_the_same_shell_with_the_token(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.content == static_files()["index.html"].replace(b"{{token}}", TOKEN.encode())


def test_every_start_has_its_own_token() -> None:
    pages = [TestClient(make_app(FakeSource()), base_url=BASE).get("/").text for _ in range(2)]
    tokens = [re.findall(r'name="headscope-token" content="([^"]*)"', page)[0] for page in pages]
    assert tokens[0] != tokens[1]
    assert min(map(len, tokens)) >= 43, "256 bits"


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content))


def test_json_routes(client: TestClient) -> None:
    source = FakeSource()
    about = client.get("/api/about").json()
    assert about["sae"]["d_sae"] == D_SAE
    assert about["definitions"]["density"] == source.about()["definitions"]["density"], "the source's own words win"
    assert about["definitions"]["histogram"], "a word of the page has a definition too"
    assert not set(DEFINITIONS) & set(INDEX_DEFINITIONS), "each word stands in one place"
    assert client.get("/api/vocab").json() == source.vocab()
    assert client.get("/api/table").json() == source.table()
    assert client.get("/api/feature/3").json() == as_json(source.feature(3))
    assert client.get("/api/context/5").json() == as_json(source.context(5))


@pytest.mark.parametrize(
    "path",
    [
        "feature/200",
        "feature/-1",
        "feature/x",
        "feature/1.0",
        "feature/٣",
        "feature/" + 30 * "9",
        "context/64",
    ],
)
def test_what_is_not_there_is_a_404_that_says_so(client: TestClient, path: str) -> None:
    answer = client.get(f"/api/{path}")
    assert answer.status_code == 404
    assert path.split("/")[0] in answer.json()["error"]


@pytest.mark.parametrize(
    "path", ["../server.py", "..%2fserver.py", "%2e%2e/server.py", "/etc/passwd", "types.d.ts", ""]
)
def test_only_the_pages_own_files_are_served(client: TestClient, path: str) -> None:
    assert client.get(f"/static/{path}").status_code == 404


def test_scripts_and_styles_have_their_types(client: TestClient) -> None:
    assert client.get("/static/app.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/static/style.css").headers["content-type"].startswith("text/css")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8001", 403),
        ("127.0.0.1", 403),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("", 403),
    ],
)
def test_only_this_machines_names_are_answered(client: TestClient, host: str, status: int) -> None:
    assert client.get("/api/about", headers={"host": host}).status_code == status


@pytest.mark.parametrize("path", ["/", "/api/about", "/api/feature/x", "/static/app.js", "/nothing"])
def test_safety_headers_are_on_every_answer(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1:8000", 200),
        ("http://localhost:8000", 200),
        ("http://127.0.0.1:8001", 403),
        ("https://127.0.0.1:8000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_another_sites_page_is_refused(client: TestClient, origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    assert client.get("/api/about", headers=headers).status_code == status


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize(
    ("given", "status"), [(None, 403), ("", 403), ("another token", 403), (TOKEN, 200), (TOKEN + "x", 403)]
)
def test_whatever_could_write_needs_the_token(method: str, given: str | None, status: int) -> None:
    written: list[str] = []

    async def write(request: Request) -> Response:
        written.append(request.method)
        return Response("done")

    app = make_app(FakeSource(), TOKEN)
    app.router.routes.append(Route("/write", write, methods=[method]))
    headers = {} if given is None else {TOKEN_HEADER: given}
    answer = TestClient(app, base_url=BASE).request(method, "/write", headers=headers)
    assert answer.status_code == status
    assert written == ([method] if status == 200 else [])
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_token_does_not_help_another_site(client: TestClient) -> None:
    headers = {TOKEN_HEADER: TOKEN, "origin": "https://evil.example"}
    assert client.post("/api/feature/3", headers=headers).status_code == 403


def test_nothing_can_be_written(client: TestClient) -> None:
    assert client.post("/api/feature/3", headers={TOKEN_HEADER: TOKEN}).status_code == 405


def test_json_is_compressed(client: TestClient) -> None:
    assert client.get("/api/feature/3").headers["content-encoding"] == "gzip"


def test_a_browser_that_holds_the_answer_is_not_sent_it_again(client: TestClient) -> None:
    tag = client.get("/api/feature/3").headers["etag"]
    assert client.get("/api/feature/3", headers={"if-none-match": tag}).status_code == 304
    assert client.get("/api/feature/4", headers={"if-none-match": tag}).status_code == 200


def test_a_number_that_is_not_finite_is_an_error_not_bad_json() -> None:
    class Broken(FakeSource):
        def feature(self, latent: int, *, lean: bool = False) -> dict[str, object]:
            return {"latent": latent, "max": float("nan")}

    client = TestClient(make_app(Broken()), base_url=BASE)
    with pytest.raises(ValueError, match="JSON"):
        client.get("/api/feature/3")


def test_a_damaged_index_is_said_to_the_page() -> None:
    class Damaged(FakeSource):
        def feature(self, latent: int, *, lean: bool = False) -> dict[str, object]:
            raise IndexFormatError("examples.parquet is truncated", expected="whole tables", do="build the index again")

    answer = TestClient(make_app(Damaged()), base_url=BASE).get("/api/feature/3")
    assert answer.status_code == 500
    assert "truncated" in answer.json()["error"]


def test_the_page_asks_for_no_foreign_address() -> None:
    for name, body in static_files().items():
        text = body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, name
        assert "https:" not in text, name
        assert "innerHTML" not in text, name


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} .*in use"):
            serve(make_app(FakeSource()), port=port)


def test_a_port_that_cannot_be_is_a_clear_error() -> None:
    with pytest.raises(ServerError, match="port 70000"):
        serve(make_app(FakeSource()), port=70000)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_it_prints_one_line_and_ends_quietly_on_ctrl_c() -> None:
    code = "import explorer_source as s, headscope.explorer.server as e; e.serve(e.make_app(s.FakeSource()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert "http://127.0.0.1:" in line
    assert (rest, errors, process.returncode) == ("", "", 0)


def test_no_torch_behind_the_server() -> None:
    code = "import sys, headscope.explorer.server, headscope.explorer.export; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_export_refuses_too_many_features(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="pass fewer"):
        export_html(FakeSource(MAX_FEATURES + 1), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("features", [[], [3, D_SAE], [-1]])
def test_export_refuses_features_that_are_not_there(tmp_path: Path, features: list[int]) -> None:
    with pytest.raises(ExportError):
        export_html(FakeSource(), tmp_path / "page.html", features)


def test_export_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    class Broken(FakeSource):
        def feature(self, latent: int, *, lean: bool = False) -> dict[str, object]:
            raise OSError(28, "No space left on device")

    page = tmp_path / "page.html"
    page.write_text("the old page")
    with pytest.raises(OutputError):
        export_html(Broken(), page)
    assert page.read_text() == "the old page"
    assert list(tmp_path.iterdir()) == [page]


def unpacked(page: Path, block: str) -> bytes:
    packed = re.findall(rf'<script type="application/octet-stream" id="{block}">([^<]*)</script>', page.read_text())
    return gzip.decompress(base64.b64decode(packed[0]))


@pytest.mark.slow
def test_export_is_deterministic(tmp_path: Path) -> None:
    pages = [export_html(FakeSource(), tmp_path / f"{i}.html", range(10)).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]
    assert b'<meta name="headscope-token"' not in pages[0]
    assert b"{{" not in pages[0].split(b"<script")[0]


@pytest.mark.slow
def test_an_export_holds_each_token_of_the_corpus_once(tmp_path: Path) -> None:
    source = FakeSource()
    page = export_html(source, tmp_path / "page.html", range(20))
    text = json.loads(unpacked(page, "data-text"))
    ids = np.frombuffer(unpacked(page, "data-ids"), dtype="<u2")
    assert text["bytes"] == 2
    runs = np.array(text["runs"]).reshape(-1, 3)
    assert runs[:, 2].sum() == len(ids)
    at, seen = 0, set()
    for block, start, n in runs.tolist():
        np.testing.assert_array_equal(ids[at : at + n], source.index.blocks[block, start : start + n])
        seen |= {(block, start + i) for i in range(n)}
        at += n
    assert len(seen) == len(ids)
    for latent in (0, 19):
        assert all((b, s + i) in seen for b, s, own in source.feature(latent)["text"] for i in range(len(own)))
    cards = json.loads(unpacked(page, "data-pack-0"))
    assert "text" not in cards["3"]
    assert cards["3"]["groups"] == as_json(source.feature(3, lean=True)["groups"])


@pytest.mark.slow
def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    class Broken(FakeSource):
        def feature(self, latent: int, *, lean: bool = False) -> dict[str, Any]:
            if latent == 1:
                raise OSError(28, "No space left on device")
            return super().feature(latent, lean=lean)

    with pytest.raises(OutputError):
        export_folder(Broken(), tmp_path / "site", range(3))
    assert list(tmp_path.iterdir()) == []
    export_folder(FakeSource(), tmp_path / "site", range(3))
    with pytest.raises(OutputError, match="already exists"):
        export_folder(FakeSource(), tmp_path / "site", range(3))
    with pytest.raises(ExportError):
        export_folder(FakeSource(), tmp_path / "other", [])
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
