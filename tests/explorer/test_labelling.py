"""The routes of the labelling queue: what they give, what they take, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from explorer_source import D_SAE, DEAD_LATENT, FakeIndex, FakeSource
from headscope.explorer.export import export_html
from headscope.explorer.labelling import LabelRoutes
from headscope.explorer.server import TOKEN_HEADER, make_app
from headscope.index.labels import MAX_LINE, Judgement, LabelStore

BASE, TOKEN = "http://127.0.0.1:8000", "the token of this start"
SAID = {
    "latent": 3,
    "annotator": "ann",
    "blind": False,
    "queue": "first:50",
    "verdict": "interpretable",
    "confidence": 3,
    "family": "induction",
    "text": "def",
    "notes": "",
}


@pytest.fixture
def index(tmp_path: Path) -> FakeIndex:
    made = FakeIndex()
    made.folder = tmp_path
    return made


@pytest.fixture
def client(index: FakeIndex) -> TestClient:
    return TestClient(make_app(FakeSource(), TOKEN, labels=LabelRoutes(index)), base_url=BASE)


def post(client: TestClient, path: str, content: Any, token: str | None = TOKEN) -> Any:
    headers = {} if token is None else {TOKEN_HEADER: token}
    return client.post(f"/api/{path}", json=content, headers=headers)


def test_a_page_without_labels_has_no_queue() -> None:
    client = TestClient(make_app(FakeSource(), TOKEN), base_url=BASE)
    assert client.get("/api/about").json()["labels"] is False
    for path in ("/label", "/api/queue?sample=first:5", "/api/survey?sample=first:5"):
        assert client.get(path).status_code == 404
    assert post(client, "labels", SAID).status_code == 404


def test_an_export_has_no_queue(tmp_path: Path) -> None:
    """It has no server to write to."""
    page = export_html(FakeSource(), tmp_path / "page.html", range(3)).read_text()
    assert "/api/retractions" not in page
    assert "Labelling(" in page, "but where the page would open it"


def test_a_queue_has_its_features_and_ones_own_labels(client: TestClient, index: FakeIndex) -> None:
    assert client.get("/api/about").json()["labels"] is True
    assert client.get("/label?s=first:50").status_code == 200
    mine = LabelStore(index).add(3, "ann", Judgement(verdict="unsure"))
    LabelStore(index).add(4, "bob", Judgement(verdict="unsure"))
    queue = client.get("/api/queue?sample=first:10&annotator=ann").json()
    assert queue["latents"] == list(range(10))
    assert [i for i, alive in enumerate(queue["alive"]) if not alive] == [DEAD_LATENT]
    assert [label["id"] for label in queue["labels"]] == [mine.id]
    assert client.get("/api/queue?latent=5&annotator=ann").json()["latents"] == [5]
    assert (
        client.get("/api/queue?sample=random:10:2").json()["latents"]
        == client.get("/api/queue?sample=random:10:2&annotator=x").json()["latents"]
    )


def test_what_is_told_is_kept_and_tallied(client: TestClient, index: FakeIndex) -> None:
    told = post(client, "labels", SAID)
    assert told.status_code == 200
    label = told.json()
    assert {name: label[name] for name in SAID} == SAID
    assert label["stale"] is False
    (kept,) = LabelStore(index).read().standing
    assert kept.id == label["id"]
    assert client.get("/api/labels/3").json()["labels"] == [label]
    rows = {row["name"]: row["value"] for row in client.get("/api/survey?sample=first:50").json()["rows"]}
    assert rows["alive in the sample"] == "96.0 % [86.5, 98.9], 48 of 50"
    assert rows["interpretable, ann"].endswith(", 1 of 1")
    retracted = post(client, "retractions", {"annotator": "ann", "label": label["id"]})
    assert retracted.status_code == 200
    assert client.get("/api/labels/3").json() == {"labels": []}


def test_a_label_of_another_card_is_stale(client: TestClient, index: FakeIndex) -> None:
    post(client, "labels", SAID)
    index.manifest["sae"]["hash"] = "sha256:another"
    client = TestClient(make_app(FakeSource(), TOKEN, labels=LabelRoutes(index)), base_url=BASE)
    (label,) = client.get("/api/queue?sample=first:10&annotator=ann").json()["labels"]
    assert label["stale"] is True
    notes = client.get("/api/survey?sample=first:50").json()["notes"]
    assert any("1 stale" in note for note in notes)


@pytest.mark.parametrize("path", ["labels", "retractions"])
@pytest.mark.parametrize("token", [None, "another"])
def test_writing_needs_the_token(client: TestClient, index: FakeIndex, path: str, token: str | None) -> None:
    assert post(client, path, SAID, token).status_code == 403
    assert not LabelStore(index).path.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"latent": D_SAE},
        {"latent": -1},
        {"latent": 10**30},
        {"latent": "3"},
        {"latent": 3.0},
        {"latent": True},
        {"latent": DEAD_LATENT},
        {"annotator": ""},
        {"annotator": "a\nb"},
        {"annotator": "x" * 1000},
        {"verdict": "yes"},
        {"verdict": None},
        {"confidence": 7},
        {"family": "x"},
        {"text": "x" * 501},
        {"text": "\ud800"},
        {"blind": "1"},
        {"queue": "everything"},
        {"queue": "first:0"},
        {"card": "sha256:mine"},
        {"time": "2020"},
        {"verdict": ...},
    ],
)
def test_what_no_label_can_say_is_a_400_that_says_why(
    client: TestClient, index: FakeIndex, no_type_checks: None, changes: dict[str, Any]
) -> None:
    told = {name: value for name, value in (SAID | changes).items() if value is not ...}
    headers = {TOKEN_HEADER: TOKEN, "content-type": "application/json"}
    answer = client.post("/api/labels", content=json.dumps(told), headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "expected", "do"}
    assert len(answer.text) < 1000
    assert not LabelStore(index).path.exists()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 30000, b'{"latent": NaN}'])
@pytest.mark.parametrize("path", ["labels", "retractions"])
def test_a_body_that_is_no_label_is_refused(client: TestClient, path: str, body: bytes) -> None:
    assert client.post(f"/api/{path}", content=body, headers={TOKEN_HEADER: TOKEN}).status_code == 400


def test_a_huge_body_is_refused(client: TestClient) -> None:
    assert client.post("/api/labels", content=b"x" * (MAX_LINE + 1), headers={TOKEN_HEADER: TOKEN}).status_code == 413


@pytest.mark.parametrize(
    "query",
    [
        "queue",
        "queue?sample=first",
        "queue?sample=first:999",
        "queue?latent=x",
        "queue?latent=200",
        "queue?latent=%D9%A3",
        "queue?sample=first:5&sample=first:6",
        "queue?sample=first:5&self=1",
        "queue?verdict=1",
        "queue?latent=" + 99 * "9",
        "survey",
        "survey?sample=",
        "survey?sample=random:5",
        "survey?latent=3",
    ],
)
def test_a_question_that_makes_no_sense_is_a_400(client: TestClient, query: str) -> None:
    answer = client.get(f"/api/{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_anothers_label_cannot_be_retracted(client: TestClient, index: FakeIndex) -> None:
    label = post(client, "labels", SAID).json()
    assert post(client, "retractions", {"annotator": "bob", "label": label["id"]}).status_code == 400
    assert len(LabelStore(index).read().standing) == 1


def test_a_damaged_file_is_said_with_its_line(client: TestClient, index: FakeIndex) -> None:
    post(client, "labels", SAID)
    with LabelStore(index).path.open("a") as file:
        file.write("<script>\n")
    for path in ("queue?sample=first:10&annotator=ann", "survey?sample=first:10", "labels/3"):
        answer = client.get(f"/api/{path}")
        assert answer.status_code == 400
        assert "labels.jsonl line 2" in answer.json()["error"]


def test_a_folder_that_cannot_be_written_is_said(client: TestClient, index: FakeIndex, tmp_path: Path) -> None:
    index.folder = tmp_path / "gone"
    client = TestClient(make_app(FakeSource(), TOKEN, labels=LabelRoutes(index)), base_url=BASE)
    answer = post(client, "labels", SAID)
    assert answer.status_code == 500
    assert "cannot write" in answer.json()["error"]
