"""What the prompt explorer is given: the numbers of the studies, strict JSON, and clear refusals."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from browsing import serving
from explorer_source import FakeSource
from headscope import jobs
from headscope.corpus import Corpus
from headscope.errors import IndexFormatError
from headscope.explorer.cards import IndexCards
from headscope.explorer.desk import Desk
from headscope.explorer.prompts import MAX_BODY, MAX_TEXT
from headscope.explorer.server import TOKEN_HEADER, make_app
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.models.load import load_model
from headscope.sae.formats import sae_hash, save_sae
from headscope.studies.prompt.prompts import Prompts
from headscope.studies.prompt.records import parse_ablations
from headscope.studies.subject import Subject

BASE = "http://127.0.0.1:8000"
TOKEN = "the token of this start"
PROMPT = {"text": "def add(one, two):\n    return one"}
QUERY = 9


@pytest.fixture(scope="module")
def live(random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    model = random_model("gpt_neox")
    sae = random_sae(model, 40)
    folder = tmp_path_factory.mktemp("routes") / "an index"
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], random_corpus(model, 30, 24), folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


@pytest.fixture(scope="module")
def subject(live: LiveIndex) -> Subject:
    return Subject(live.index, live)


@pytest.fixture(scope="module")
def source(subject: Subject) -> Prompts:
    return subject.prompts


@pytest.fixture
def client(live: LiveIndex, subject: Subject) -> TestClient:
    app = make_app(IndexCards(live.index), TOKEN, subject=subject)
    return TestClient(app, base_url=BASE, headers={TOKEN_HEADER: TOKEN})


def ask(client: TestClient, name: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(f"/api/prompt/{name}", json={"prompt": PROMPT} | fields)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.content, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


# --- the numbers


def test_what_can_be_asked(client: TestClient) -> None:
    assert client.get("/api/prompt").json() == {"bos": 0, "n_layers": 2, "n_heads": 4, "context": 64}
    assert client.get("/api/about").json()["prompts"] is True
    assert client.get("/prompt?prompt=x").text == client.get("/").text


def test_a_run_has_the_numbers_of_the_study(client: TestClient, source: Prompts) -> None:
    names = ["f3", "h0.1=mean@4"]
    run, tokens = ask(client, "run", ablations=names), source.encode(PROMPT["text"])
    found = source.run(tokens, parse_ablations(names))
    assert run["tokens"] == list(tokens)
    assert run["ablations"] == ["h0.1=mean@4", "f3"]
    assert run["loss"] == pytest.approx(found.loss, rel=1e-6)
    assert run["ablated_loss"] == pytest.approx(found.ablated_loss, rel=1e-6)
    assert run["latent"] == found.latent.tolist()
    assert run["activation"] == pytest.approx(found.activation, rel=1e-6)
    assert run["ablated"] == pytest.approx(found.ablated, rel=1e-6)
    assert run["shown"] == np.bincount(found.position, minlength=len(tokens)).tolist()
    active = found.position[found.activation > 0]
    assert run["active"] == np.bincount(active, minlength=len(tokens)).tolist()
    clean = ask(client, "run", ablations=[])
    assert clean["ablated"] is clean["ablated_loss"] is None
    assert clean["loss"] == run["loss"]


def test_a_token_has_the_numbers_of_the_study(client: TestClient, source: Prompts) -> None:
    tokens = source.encode(PROMPT["text"])
    asked = ask(client, "token", ablations=["h1.2=zero"], query=QUERY, target=7)
    features = source.features(tokens, QUERY, 7)
    for name in ("activation", "by_head", "source_dfa", "effect"):
        assert np.array(asked["features"][name]) == pytest.approx(getattr(features, name), rel=1e-6), name
    assert asked["features"]["latent"] == features.latent.tolist()
    assert asked["features"]["source"] == features.source.tolist()
    assert asked["features"]["target"] == 7
    found = source.next_tokens(tokens, QUERY, parse_ablations(["h1.2=zero"]))
    for name in ("probability", "logit", "ablated_probability", "ablated_logit"):
        assert asked["next"][name] == pytest.approx(getattr(found, name), rel=1e-6), name
    for name in ("token", "rank", "ablated_rank"):
        assert asked["next"][name] == getattr(found, name).tolist()
    assert asked["next"]["actual"] == tokens[QUERY + 1]
    assert ask(client, "token", ablations=[], query=QUERY, target=None)["features"]["target"] == tokens[QUERY + 1]


def test_dfa_closes_with_the_sources_that_are_not_named(client: TestClient, source: Prompts) -> None:
    tokens = source.encode(PROMPT["text"])
    last = len(tokens) - 1
    for query in (3, last):
        asked = ask(client, "dfa", latent=5, query=query)
        found = source.dfa(tokens, 5, query)
        assert asked["pre"] == pytest.approx(found.pre, rel=1e-6)
        assert len(asked["sources"]) + asked["n_rest"] == query + 1
        heads = np.sum([s["heads"] for s in asked["sources"]], axis=0) + asked["rest"]
        assert heads == pytest.approx(found.by_source.sum(1), abs=1e-5)
        assert asked["heads"] == pytest.approx(found.by_source.sum(1), rel=1e-5, abs=1e-6)
        assert sum(asked["heads"]) + asked["bias"] == pytest.approx(asked["pre"], abs=1e-4)
        for one in asked["sources"]:
            assert one["heads"] == pytest.approx(found.by_source[:, one["pos"]], rel=1e-6, abs=1e-9)
            assert one["attention"] == pytest.approx(found.pattern[:, one["pos"]], rel=1e-6, abs=1e-9)
            assert one["dfa"] == pytest.approx(sum(one["heads"]), abs=1e-5)
    assert asked["n_rest"] > 0


def test_the_leaves_of_a_tree_sum_to_the_pre_activation(client: TestClient, source: Prompts) -> None:
    """Every node that is named is opened, down to the parts of the stream before the first layer."""

    def leaves(path: str) -> float:
        level = ask(client, "level", latent=5, query=QUERY, path=path)
        total = level["rest"]["value"]
        for child in level["children"]:
            deeper = f"{path}/{child['name']}".lstrip("/")
            few = child["expands"] and abs(child["value"]) > 0.2 * abs(level["node"]["value"])
            total += leaves(deeper) if few else child["value"]
        return total

    pre = source.dfa(source.encode(PROMPT["text"]), 5, QUERY).pre
    assert leaves("") == pytest.approx(pre, abs=1e-4 * (1 + abs(pre)))
    assert ask(client, "level", latent=5, query=QUERY, path="")["node"]["value"] == pytest.approx(pre, rel=1e-5)


def test_scores_split_over_pairs(client: TestClient) -> None:
    scores = ask(client, "scores", layer=1, head=2, query=QUERY, key=4)
    assert np.sum(scores["contrast"]) == pytest.approx(scores["score"] - scores["mean"], abs=1e-4)
    most = ask(client, "scores", layer=1, head=2, query=QUERY, key=None)
    assert most["key"] == most["keys"][int(np.argmax(most["pattern"]))]


def test_the_python_shown_makes_the_numbers_again(
    client: TestClient, source: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(jobs, "live", lambda folder: asked.append(folder) or source.live)
    run = ask(client, "run", ablations=["f3@4"])
    *lines, last = run["python"].splitlines()
    made: dict[str, Any] = {}
    exec("\n".join([*lines, f"found, after = {last}"]), made)
    assert asked == [str(source.live.index.folder)]
    assert run["ablated_loss"] == pytest.approx(made["found"].ablated_loss, rel=1e-6)
    assert made["after"].query == len(run["tokens"]) - 1


# --- prompts


def test_token_ids_are_a_prompt_with_the_bos_put_in_front(client: TestClient, live: LiveIndex) -> None:
    block = live.index.tokens_of(2).tolist()
    run = ask(client, "run", ablations=[], prompt={"ids": block[1:]})
    assert run["tokens"] == block
    stored = live.index.activations(5)
    here = stored.position // live.index.block_size == 2
    where = np.repeat(np.arange(len(block)), run["shown"])
    own = np.array(run["latent"]) == 5
    text = own & (np.array(block)[where] != 0)
    assert where[text].tolist() == (stored.position[here] % live.index.block_size).tolist()
    assert np.array(run["activation"])[text] == pytest.approx(stored.activation[here], rel=1e-4)


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "<|bos|>", "🦊 שלום \u202e", "\x00\x7f", "a\r\nb", "&amp;"]
)
def test_any_text_is_a_prompt(client: TestClient, text: str) -> None:
    run = ask(client, "run", ablations=[], prompt={"text": text})
    assert run["tokens"][0] == 0
    assert 0 not in run["tokens"][1:], "no text is a special token"


# --- refusals


def refused(client: TestClient, name: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    whole = {"run": {"ablations": []}, "token": {"ablations": [], "query": 3, "target": None}}
    whole |= {"dfa": {"latent": 5, "query": 3}, "level": {"latent": 5, "query": 3, "path": ""}}
    whole |= {"scores": {"layer": 1, "head": 2, "query": 3, "key": None}}
    answer = client.post(f"/api/prompt/{name}", json={"prompt": PROMPT} | whole[name] | fields)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("run", {"prompt": {"text": ""}}, "an empty prompt"),
        ("run", {"prompt": {"ids": []}}, "an empty prompt"),
        ("run", {"prompt": {"text": "x" * 64}}, "a prompt of 65 tokens"),
        ("run", {"prompt": {"text": "x" * (MAX_TEXT + 1)}}, "a text of 100,001 characters"),
        ("run", {"prompt": {"ids": [98]}}, "tokens"),
        ("run", {"prompt": {"ids": [-1]}}, "tokens"),
        ("run", {"prompt": {"ids": [1.5]}}, "no prompt"),
        ("run", {"prompt": {"ids": [True]}}, "no prompt"),
        ("run", {"prompt": {"text": 3}}, "no prompt"),
        ("run", {"prompt": {}}, "no prompt"),
        ("run", {"prompt": {"text": "x", "ids": [5]}}, "no prompt"),
        ("run", {"prompt": "x"}, "prompt of another type"),
        ("run", {"ablations": "f3"}, "ablations of another type"),
        ("run", {"ablations": [3]}, "an ablation that is no text"),
        ("run", {"ablations": ["f40"]}, "feature 40"),
        ("run", {"ablations": ["f3@64"]}, "position 64"),
        ("run", {"ablations": ["h2.0=zero"]}, "layer 2"),
        ("run", {"ablations": ["h1.4=zero"]}, "head 4"),
        ("run", {"ablations": ["h1.1=nothing"]}, "ablation 'h1.1=nothing'"),
        ("run", {"ablations": ["<img src=x onerror=alert(1)>"]}, "ablation '<img"),
        ("run", {"ablations": ["f1", "f2"] * 40}, "80 ablations"),
        ("run", {"ablations": ["h1.1=zero", "h1.1=mean"]}, "head 1.1 ablated as"),
        ("token", {"query": 99}, "position 99"),
        ("token", {"query": -1}, "position -1"),
        ("token", {"query": True}, "query of another type"),
        ("token", {"query": 10**30}, "position 1"),
        ("token", {"target": 98}, "token 98"),
        ("dfa", {"latent": 40}, "feature 40"),
        ("dfa", {"query": 99}, "position 99"),
        ("level", {"latent": 40}, "latent 40"),
        ("level", {"path": "1.9"}, "no node '1.9'"),
        ("level", {"path": "1.1/" * 300}, "a path of 1,200 characters"),
        ("scores", {"layer": 7}, "layer 7"),
        ("scores", {"head": 4}, "head 4"),
        ("scores", {"key": 60}, "key 60"),
    ],
)
def test_what_cannot_be_is_refused_clearly(client: TestClient, name: str, fields: dict[str, Any], said: str) -> None:
    status, answer = refused(client, name, **fields)
    assert status == 400
    assert said in answer["error"]
    assert answer["expected"]
    assert answer["do"]


def test_half_a_character_is_refused(client: TestClient) -> None:
    body = b'{"prompt": {"text": "a\\ud83d"}, "ablations": []}'
    answer = client.post("/api/prompt/run", content=body)
    assert answer.status_code == 400
    assert "half of a character" in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "another object"),
        (b'{"prompt": {"text": "x"}}', 400, "another object"),
        (b'{"prompt": {"text": "x"}, "ablations": [], "more": 1}', 400, "another object"),
        (b'{"prompt": {"text": "' + b"x" * MAX_BODY + b'"}, "ablations": []}', 413, "400,000 bytes"),
    ],
)
def test_malformed_and_huge_requests_are_refused(client: TestClient, body: bytes, status: int, said: str) -> None:
    answer = client.post("/api/prompt/run", content=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_only_the_page_itself_may_ask(client: TestClient) -> None:
    body = {"prompt": PROMPT, "ablations": []}
    assert client.post("/api/prompt/run", json=body, headers={TOKEN_HEADER: "another"}).status_code == 403
    assert client.post("/api/prompt/run", json=body, headers={"origin": "http://elsewhere.org"}).status_code == 403
    assert client.post("/api/prompt/run", json=body, headers={"host": "elsewhere.org"}).status_code == 403
    assert client.get("/api/prompt/run").status_code == 405


def test_without_a_model_there_is_the_page_and_nothing_to_ask() -> None:
    bare = TestClient(make_app(FakeSource(), TOKEN), base_url=BASE, headers={TOKEN_HEADER: TOKEN})
    assert bare.get("/api/about").json()["prompts"] is False
    assert bare.get("/prompt").status_code == 200
    assert bare.post("/api/prompt/run", json={"prompt": PROMPT, "ablations": []}).status_code == 404


def test_a_damaged_index_is_the_servers_failure(client: TestClient, source: Prompts, monkeypatch) -> None:
    def damaged(*_: Any) -> None:
        raise IndexFormatError("tokens.parquet is cut off", expected="a whole file", do="index again")

    monkeypatch.setattr(source, "run", damaged)
    status, answer = refused(client, "run")
    assert status == 500
    assert "cut off" in answer["error"]


def test_no_torch_behind_the_routes() -> None:
    code = "import sys, headscope.explorer.prompts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- many at once


class Slow(Prompts):
    """Runs last until they are let go."""

    def __init__(self, live: LiveIndex) -> None:
        super().__init__(live)
        self.go, self.begun, self.n = threading.Event(), threading.Semaphore(0), 0

    def run(self, *arguments: Any) -> Any:
        self.n += 1
        self.begun.release()
        assert self.go.wait(20)
        return super().run(*arguments)


def posted(address: str, text: str) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"prompt": {"text": text}, "ablations": []}).encode()
    request = Request(f"{address}/api/prompt/run", body, {TOKEN_HEADER: TOKEN, "content-type": "application/json"})
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def app_of(live: LiveIndex, monkeypatch: pytest.MonkeyPatch, prompts: Prompts, **desk: int) -> Starlette:
    monkeypatch.setattr("headscope.explorer.prompts.Desk", partial(Desk, **desk))
    subject = Subject(live.index, live)
    subject.prompts = prompts
    return make_app(IndexCards(live.index), TOKEN, subject=subject)


def test_one_runs_at_a_time_and_those_without_a_place_are_told(live: LiveIndex, monkeypatch) -> None:
    slow = Slow(live)
    app = app_of(live, monkeypatch, slow, waiting=6)
    with serving(app) as address, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(posted, address, f"prompt {i}") for i in range(12)]
        assert slow.begun.acquire(timeout=10)
        deadline = time.monotonic() + 10
        while sum(future.done() for future in asked) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert slow.n == 1, "one run of the model at a time"
        with urlopen(f"{address}/api/feature/3", timeout=10) as card:
            assert card.status == 200, "no card waits for a prompt"
        slow.go.set()
        answers = [future.result(30) for future in asked]
        assert sorted(status for status, _ in answers) == [200] * 8 + [503] * 4
        done = [i for i, (status, _) in enumerate(answers) if status == 200]
        for i in done:
            assert posted(address, f"prompt {i}")[1] == answers[i][1]
        assert slow.n == 8, "what was asked before is not computed again"


def test_answers_of_many_threads_are_those_of_one(live: LiveIndex, source: Prompts, monkeypatch) -> None:
    app = app_of(live, monkeypatch, Prompts(live), places=4, waiting=40)
    texts = [f"def f{i}(x): return {i}" for i in range(20)]
    with serving(app) as address, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: posted(address, text), texts))
    for text, (status, answer) in zip(texts, answers, strict=True):
        assert status == 200
        assert answer["loss"] == pytest.approx(source.run(source.encode(text)).loss, rel=1e-5)


# --- the command


def test_serve_with_a_model_answers_prompts(
    live: LiveIndex, save_model, tmp_path, random_corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(live.model, tmp_path / "model")
    sae = save_sae(live.sae, tmp_path / "sae")
    model = load_model(str(folder))
    corpus: Corpus = random_corpus(model, 6, 24)
    build_index(model, [(live.sae, SAERecord(str(sae), sae_hash(sae)))], corpus, tmp_path / "index")
    served: list[Starlette] = []
    monkeypatch.setattr("headscope.explorer.server.serve", lambda app, **_: served.append(app))
    jobs.serve(tmp_path / "index", model=str(folder))
    page = TestClient(served[0], base_url=BASE).get("/prompt").text
    token = page.split('name="headscope-token" content="')[1].split('"')[0]
    client = TestClient(served[0], base_url=BASE, headers={TOKEN_HEADER: token})
    prompts = Prompts(live)
    expected = prompts.run(prompts.encode("x = 1"), ())
    answer = ask(client, "run", prompt={"text": "x = 1"}, ablations=[])
    assert answer["loss"] == pytest.approx(expected.loss, rel=1e-5)
    jobs.serve(tmp_path / "index")
    assert not TestClient(served[1], base_url=BASE).get("/api/about").json()["prompts"]
