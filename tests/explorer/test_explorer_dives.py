"""What the deep-dive tabs are given: the numbers against naive ones, the routes, what is refused, the file."""

import base64
import gzip
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from browsing import serving
from dive_index import COMMON, DEAD, N_LATENTS, RARE, built, dense, text_positions
from explorer_source import FakeSource
from headscope import cli, jobs
from headscope.errors import ExportError, IndexFormatError, OutputError, ProxyError
from headscope.explorer import server
from headscope.explorer.cards import IndexCards
from headscope.explorer.desk import Desk
from headscope.explorer.server import make_app
from headscope.explorer.start import start_json
from headscope.index.columns import add_columns
from headscope.index.store import FeatureIndex
from headscope.studies.registry import STUDIES
from headscope.studies.study import FeatureStudy
from headscope.studies.subject import Subject
from headscope.studies.support.on_page import MAX_PROXY, OfProxy
from studied import ask as asked_of
from studied import dived

BASE = "http://127.0.0.1:8000"
PROXY = 'token_in(["a", "b", "c", "d", "e", "f"])'


@pytest.fixture(scope="module")
def index(random_model, random_corpus, random_sae, tmp_path_factory) -> FeatureIndex:
    return built(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("dives") / "an index")


@pytest.fixture(scope="module")
def dives(index: FeatureIndex) -> Subject:
    return Subject(index)


@pytest.fixture(scope="module")
def client(index: FeatureIndex, dives: Subject) -> TestClient:
    return TestClient(make_app(IndexCards(index), subject=dives), base_url=BASE)


def strict(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content, allow_nan=False))


# --- the numbers


def test_a_dive_has_the_naive_numbers(index: FeatureIndex, dives: Subject) -> None:
    dive = strict(dived(dives, COMMON, PROXY))
    f, text = dense(index, COMMON)[text_positions(index)], text_positions(index)
    tokens = np.concatenate([index.tokens_of(block) for block in range(index.n_blocks)])
    true = np.isin(tokens, [index.token_id(letter) for letter in "abcdef"])[text]
    counts = dive["counts"]
    assert (counts["n_tokens"], counts["n_active"]) == (text.sum(), (f > 0).sum())
    assert (counts["n_proxy"], counts["n_both"]) == (true.sum(), (true & (f > 0)).sum())
    assert sum(dive["histogram"]["true"]) == counts["n_both"]
    assert sum(dive["histogram"]["false"]) == counts["n_active"] - counts["n_both"]
    measures = dive["measures"]
    assert measures["precision"]["value"] == pytest.approx(true[f > 0].mean(), rel=1e-5)
    assert measures["recall"]["value"] == pytest.approx((f > 0)[true].mean(), rel=1e-5)
    assert measures["mass_share"]["value"] == pytest.approx(f[true].sum() / f.sum(), rel=1e-5)
    assert measures["pearson"]["value"] == pytest.approx(np.corrcoef(f, true)[0, 1], rel=1e-4)
    joint = dive["expected"]["joint"]
    width = dive["histogram"]["edges"][1]
    assert abs(sum(joint["true"]) + sum(joint["false"]) - f.mean()) < width / 2
    t = dive["by_threshold"]["threshold"][20]
    assert dive["by_threshold"]["n"][20] == pytest.approx((f > t).sum(), abs=1)  # t is rounded
    assert dive["misses"]["n"] == (true & (f == 0)).sum()


def test_contexts_show_what_is_there(index: FeatureIndex, dives: Subject) -> None:
    dive = strict(dived(dives, COMMON, PROXY))
    f, size = dense(index, COMMON), index.block_size
    letters = [index.token_id(letter) for letter in "abcdef"]
    shown = {(block, start + i): token for block, start, ids in dive["text"] for i, token in enumerate(ids)}
    rows = {row for r in dive["ranges"] for row in r["rows"]}
    assert rows.isdisjoint(dive["misses"]["rows"])
    assert rows | set(dive["misses"]["rows"]) == set(range(len(dive["contexts"])))
    for i, context in enumerate(dive["contexts"]):
        base = context["block"] * size
        at = range(max(0, context["dst"] - 16), min(size, context["dst"] + 17))
        assert [shown[context["block"], p] for p in at] == index.tokens_of(context["block"])[
            at.start : at.stop
        ].tolist()
        assert dict(context["on"]) == pytest.approx({p: f[base + p] for p in at if f[base + p] > 0}, rel=1e-3)
        assert context["proxy"] == [p for p in at if shown[context["block"], p] in letters]
        if i in rows:
            assert context["act"] == pytest.approx(f[base + context["dst"]], rel=1e-3)
            assert context["dst"] not in context["proxy"], "a false positive"
        else:
            assert context["act"] == 0
            assert context["dst"] in context["proxy"], "a false negative"


def test_the_python_of_each_tab_makes_its_numbers_again(dives: Subject) -> None:
    dive = dived(dives, COMMON, PROXY)
    for name, code in dive["python"].items():
        *lines, last = code.splitlines()
        made: dict[str, Any] = {}
        exec("\n".join([*lines, f"shown = {last}"]), made)
        found = made["found"]
        assert found.counts.n_both == dive["counts"]["n_both"], name
        assert found.histogram.true.tolist() == dive["histogram"]["true"], name
        assert [s.name for s in found.sensitivity.subtypes] == (
            [s["name"] for s in dive["subtypes"]] if name == "sensitivity" else []
        )
    assert made["shown"][2].value == pytest.approx(dive["measures"]["auc"]["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("proxy", "parts"),
    [
        ('token_in(["a", "b"])', ['token_in(["a"])', 'token_in(["b"])']),
        ('token_in(["a"])', []),
        ('token_in(["a"]) | induction("b")', ['token_in(["a"])', 'induction("b")']),
        ('induction("b", fuzzy=True)', ['induction("b")']),
        ('within_after(["a", "b"], n=3)', ['within_after(["a"], n=3)', 'within_after(["b"], n=3)']),
        ('within_after(["a"], n=3)', []),
        ('~token_in(["a"])', []),
    ],
)
def test_recall_is_told_apart_by_parts_of_the_proxy(dives: Subject, proxy: str, parts: list[str]) -> None:
    found = [part["name"] for part in dived(dives, COMMON, proxy)["subtypes"]]
    assert found[: len(parts)] == parts
    assert set(found[len(parts) :]) <= {"none of these"}


def test_what_is_empty_says_so_and_has_no_nan(dives: Subject) -> None:
    dead = strict(dived(dives, DEAD, PROXY))
    assert dead["counts"]["n_active"] == 0
    assert any("never active" in note for note in dead["notes"])
    assert all(m["value"] is None and m["missing"] for name, m in dead["measures"].items() if name != "recall")
    never = strict(dived(dives, COMMON, 'document("no such document")'))
    assert never["counts"]["n_proxy"] == 0
    assert any("never true" in note for note in never["notes"])
    assert never["curve"] is None
    always = strict(dived(dives, COMMON, 'token_in(["a"]) | ~token_in(["a"])'))
    assert any("every token" in note for note in always["notes"])
    assert strict(dived(dives, DEAD, 'document("no such document")'))["misses"] == {"n": 0, "rows": []}


def test_the_logits_say_whether_the_top_one_is_copied(index: FeatureIndex, dives: Subject) -> None:
    for latent in (COMMON, DEAD):
        said, feature, sources = strict(asked_of(dives, "logits", latent)), index.feature(latent), index.sources(latent)
        top, value = feature.logit_top[0]
        source = sources.tokens[0].token if sources and sources.tokens else None
        assert said["prominence"] == pytest.approx((value - feature.logit_mean) / feature.logit_std, rel=1e-5)
        assert (said["top_source"], said["copied"]) == (source, None if source is None else source == top)
        if feature.copy_rank is None:
            assert said["copy_rank"] is None
        else:
            assert said["copy_rank"] == pytest.approx(feature.copy_rank, rel=1e-5)
        *lines, last = said["python"].splitlines()
        made: dict[str, Any] = {}
        exec("\n".join([*lines, f"shown = {last}"]), made)
        assert made["shown"][0] == feature.logit_top
        assert made["shown"][3:5] == (said["copied"], source)
    assert strict(asked_of(dives, "logits", DEAD))["copied"] is None


def test_too_few_activations_name_the_minimum(dives: Subject) -> None:
    precision = strict(dived(dives, RARE, PROXY))["measures"]["precision"]
    assert (precision["value"], precision["n"]) == (None, 12)
    assert "30" in precision["missing"]


@pytest.mark.slow
def test_suggested_proxies_are_proxies(index: FeatureIndex, dives: Subject) -> None:
    for latent in range(N_LATENTS):
        suggested = start_json(dives, latent)["proxies"]
        assert (suggested == []) != index.feature(latent).alive
        for one in suggested:
            assert dived(dives, latent, one["proxy"])["proxy"] == one["proxy"], "in its canonical form"


def test_columns_of_studies_come_with_their_definitions(index: FeatureIndex, tmp_path: Path) -> None:
    copy = FeatureIndex.open(shutil.copytree(index.folder, tmp_path / "copy"))
    table = pa.table({"latent": pa.array(range(N_LATENTS), pa.int32()), "share": [None, *[0.5] * (N_LATENTS - 1)]})
    said = {"settings": {}, "definitions": {"share": "half of it"}, "n": 1860}
    add_columns(copy, "effects", table, said)
    columns = strict(start_json(Subject(copy), 4))["columns"]["effects"]
    assert (columns["values"], columns["definitions"], columns["n"]) == (
        {"share": 0.5},
        {"share": "half of it"},
        "1860",
    )
    (copy.folder / "columns" / "effects.parquet").write_bytes(b"no table")
    with pytest.warns(UserWarning, match="effects are left out"):
        assert "damaged" in start_json(Subject(copy), 4)["columns"]["effects"]["refused"]


def test_the_table_shows_the_main_columns_of_studies(index: FeatureIndex, tmp_path: Path) -> None:
    copy = FeatureIndex.open(shutil.copytree(index.folder, tmp_path / "copy"))
    kinds = ["token", None] * (N_LATENTS // 2)
    columns = {"kind": kinds, "auc": [0.5] * N_LATENTS, "recall": [0.25] * N_LATENTS}
    table = pa.table({"latent": pa.array(range(N_LATENTS), pa.int32()), **columns})
    said = {"settings": {}, "definitions": {name: f"what {name} is" for name in columns}, "n": 1}
    add_columns(copy, "proxies", table, said)
    shown = strict(IndexCards(copy).table())
    by_name = {column["name"]: column for column in shown["columns"]}
    assert [column["name"] for column in shown["columns"]][:2] == ["latent", "proxies.kind"]
    assert by_name["proxies.kind"]["definition"] == "what kind is"
    assert not by_name["proxies.recall"]["listed"]
    assert shown["rows"]["proxies.kind"] == kinds
    assert "proxies.auc" not in shown["rows"], "it would be sent with every page; the card has it"
    found = strict(start_json(Subject(copy), COMMON))["columns"]["proxies"]["values"]
    assert found == {"kind": None, "auc": 0.5, "recall": 0.25}


def test_the_list_opens_on_the_largest_effects_where_a_study_has_measured_them(
    index: FeatureIndex, tmp_path: Path
) -> None:
    copy = FeatureIndex.open(shutil.copytree(index.folder, tmp_path / "copy"))
    assert IndexCards(copy).table()["sort"] == "-n_active"
    table = pa.table({"latent": pa.array(range(N_LATENTS), pa.int32()), "importance": [0.5] * N_LATENTS})
    add_columns(copy, "effects", table, {"settings": {}, "definitions": {"importance": "-"}, "n": 1})
    shown = strict(IndexCards(copy).table())
    assert shown["sort"] == "-effects.importance"
    assert {c["name"] for c in shown["columns"] if c["listed"]} >= {"effects.importance"}


def test_proxies_that_a_search_found_come_first(index: FeatureIndex, tmp_path: Path) -> None:
    copy = FeatureIndex.open(shutil.copytree(index.folder, tmp_path / "copy"))
    found = {
        "kind": "token",
        "proxy": 'token_in(["b"])',
        "induction_proxy": 'induction("b")',
        "token_proxy": 'token_in(["b"])',
    }
    table = {
        name: [value if latent == COMMON else None for latent in range(N_LATENTS)] for name, value in found.items()
    }
    said = {"settings": {}, "definitions": {name: "-" for name in found}, "n": 1}
    add_columns(copy, "proxies", pa.table({"latent": pa.array(range(N_LATENTS), pa.int32()), **table}), said)
    suggested = start_json(Subject(copy), COMMON)["proxies"]
    assert [one["proxy"] for one in suggested] == ['token_in(["b"])', 'induction("b")']
    assert "kind: token" in suggested[0]["why"]
    assert len(start_json(Subject(copy), RARE)["proxies"]) > 2, "where a search found none, the card suggests some"


# --- the routes


def test_routes_answer_what_the_source_does(client: TestClient, dives: Subject) -> None:
    listed = {study["name"]: study for study in client.get("/api/about").json()["studies"]}
    assert [tab["name"] for tab in listed["specificity"]["tabs"]] == ["specificity", "expected", "sensitivity"]
    assert client.get(f"/api/start/{COMMON}").json() == strict(start_json(dives, COMMON))
    assert client.get(f"/api/study/specificity/{COMMON}", params={"proxy": PROXY}).json() == strict(
        dived(dives, COMMON, PROXY)
    )


def test_a_server_without_dives_has_no_such_routes() -> None:
    client = TestClient(make_app(FakeSource()), base_url=BASE)
    assert client.get("/api/about").json()["studies"] == []
    assert client.get("/api/study/specificity/3", params={"proxy": PROXY}).status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("study/specificity/7", 400, "no proxy"),
        ("study/specificity/7?proxy=", 400, "proxy = ''"),
        ("study/specificity/7?proxy=%20", 400, "proxy = ' '"),
        (f"study/specificity/7?proxy={PROXY}&proxy={PROXY}", 400, "2 values of proxy"),
        (f"study/specificity/7?proxy={PROXY}&more=1", 400, "parameter 'more'"),
        (f"study/specificity/7?proxy={'a' * (MAX_PROXY + 1)}", 400, f"{MAX_PROXY + 1:,} characters"),
        ("study/specificity/7?proxy=induction(1)", 400, "column 11"),
        ("study/specificity/7?proxy=%ff%fe", 400, "column 1"),
        ("study/specificity/7?proxy=__import__(%22os%22)", 400, "__import__"),
        ('study/specificity/7?proxy=token_in(["ab"])', 400, "pieces"),
        (f"study/specificity/{N_LATENTS}?proxy={PROXY}", 404, f"no feature {N_LATENTS}"),
        (f"study/specificity/-1?proxy={PROXY}", 404, "not the number"),
        ("start/x", 404, "not the number"),
        (f"study/ablation/7?proxy={PROXY}", 400, "no model"),
    ],
)
def test_what_is_malformed_gets_a_clear_refusal(client: TestClient, path: str, status: int, said: str) -> None:
    answer = client.get(f"/api/{path}")
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_a_refused_proxy_says_where_and_what_was_expected(client: TestClient) -> None:
    said = client.get(
        "/api/study/specificity/7", params={"proxy": 'token_in(["a"]) & <img src=x onerror=alert(1)>'}
    ).json()
    assert said["column"] == 19
    assert set(said) == {"error", "expected", "do", "column"}


def test_studies_cannot_be_written_to(client: TestClient) -> None:
    assert client.post("/api/study/specificity/7", params={"proxy": PROXY}).status_code == 403


class Slow:
    """A source whose studies last until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Semaphore(0)
        self.n = 0
        study = FeatureStudy(name="slow", group="when", question="how long?", run=self.run, options=OfProxy)
        monkeypatch.setitem(STUDIES, "slow", study)
        self.source = FakeSource()
        self.subject = Subject(self.source.index)

    def run(self, _subject: Subject, _latent: int, options: OfProxy) -> OfProxy:
        self.n += 1
        self.begun.release()
        assert self.go.wait(20)
        return options

    def app(self) -> Any:
        return make_app(self.source, subject=self.subject)


def ask(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with urlopen(url, timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def test_a_long_study_holds_up_no_card_and_few_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    monkeypatch.setattr(server, "Desk", partial(Desk, waiting=6))
    with serving(slow.app()) as address, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, f"{address}/api/study/slow/3?proxy=p{i}") for i in range(12)]
        assert slow.begun.acquire(timeout=10)
        assert slow.begun.acquire(timeout=10)
        assert ask(f"{address}/api/feature/3")[0] == 200
        deadline = time.monotonic() + 10
        while sum(future.done() for future in asked) < 4:
            assert time.monotonic() < deadline, "those that find no place are told at once"
            time.sleep(0.01)
        assert slow.n == 2, "two at a time"
        slow.go.set()
        codes = sorted(future.result(20)[0] for future in asked)
    assert codes == [200] * 8 + [503] * 4
    assert slow.n == 8


def test_a_study_that_takes_too_long_is_given_up_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    monkeypatch.setattr(server, "Desk", partial(Desk, seconds=0.2, patience=0.2))
    with serving(slow.app()) as address:
        for i in range(2):
            status, said = ask(f"{address}/api/study/slow/3?proxy=p{i}")
            assert status == 504
            assert "0.2 s" in said["error"]
        assert ask(f"{address}/api/study/slow/3?proxy=p2")[0] == 503
        assert slow.n == 2, "the third found both places taken by the first two"
        slow.go.set()
        deadline = time.monotonic() + 10
        while ask(f"{address}/api/study/slow/3?proxy=again")[0] != 200:
            assert time.monotonic() < deadline, "places are free again when the work ends"


def test_who_has_gone_is_not_computed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with serving(slow.app()) as address, ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(ask, f"{address}/api/study/slow/3?proxy=p{i}") for i in range(2)]
        for _ in taken:
            assert slow.begun.acquire(timeout=10)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(f"GET /api/study/slow/3?proxy=gone HTTP/1.1\r\nhost: {host}:{port}\r\n\r\n".encode())
            time.sleep(0.3)  # it is read, and waits
        time.sleep(0.3)  # its end is seen
        slow.go.set()
        assert [future.result(20)[0] for future in taken] == [200, 200]
        assert ask(f"{address}/api/study/slow/3?proxy=last")[0] == 200
    assert slow.n == 3


def test_what_was_asked_before_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    slow.go.set()
    with serving(slow.app()) as address:
        for _ in range(3):
            assert ask(f"{address}/api/study/slow/3?proxy=p")[0] == 200
    assert slow.n == 1


def test_no_torch_behind_the_studies() -> None:
    code = "import sys, headscope.explorer.studies; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the file


def held_as(study: str, proxy: str) -> str:
    """What static/data.js looks for in a file."""
    return f'{study} {{"proxy":{json.dumps(proxy, ensure_ascii=False)}}}'


def unpacked(page: Path, block: str) -> Any:
    packed = re.findall(rf'<script type="application/octet-stream" id="{block}">([^<]*)</script>', page.read_text())
    return json.loads(gzip.decompress(base64.b64decode(packed[0])))


def test_a_dive_file_holds_the_studies_of_its_proxies(index: FeatureIndex, dives: Subject, tmp_path: Path) -> None:
    page = jobs.dive(index.folder, COMMON, tmp_path / "dive.html", proxies=[PROXY, 'induction("a")', PROXY])
    held = unpacked(page, "data-studies")
    assert set(held) == {str(COMMON)}
    own = held[str(COMMON)]
    proxies = (PROXY, 'induction("a")')
    by_proxy = {name: found for name, found in own["studies"].items() if name.startswith("specificity ")}
    assert by_proxy == strict({held_as("specificity", proxy): dived(dives, COMMON, proxy) for proxy in proxies})
    assert own["studies"]["logits {}"] == strict(asked_of(dives, "logits", COMMON))
    assert not any(name.startswith(("ablation ", "patching ")) for name in own["studies"]), "there is no model"
    assert [one["proxy"] for one in own["start"]["proxies"]] == [PROXY, 'induction("a")']
    assert unpacked(page, "data-core")["about"]["studies"]
    with pytest.raises(OutputError):
        jobs.dive(index.folder, COMMON, page, proxies=[PROXY])
    suggested = jobs.dive(index.folder, COMMON, page, overwrite=True)
    held = unpacked(suggested, "data-studies")[str(COMMON)]["studies"]
    expected = {held_as("specificity", one["proxy"]) for one in start_json(dives, COMMON)["proxies"]}
    assert {name for name in held if name.startswith("specificity ")} == expected


def test_a_dive_says_how_far_it_is(index: FeatureIndex, tmp_path: Path) -> None:
    told = []
    proxies = [PROXY, 'induction("a")']
    jobs.dive(index.folder, COMMON, tmp_path / "dive.html", proxies=proxies, on_progress=lambda *at: told.append(at))
    total = told[-1][2]
    assert total >= len(proxies)
    assert told == [(f"feature {COMMON}", done, total) for done in range(total + 1)]


@pytest.mark.parametrize("proxy", ["induction(1)", 'token_in(["no such token"])'])
def test_proxies_of_a_dive_are_checked_before_a_model_is_loaded(
    index: FeatureIndex, tmp_path: Path, proxy: str
) -> None:
    with pytest.raises(ProxyError):
        jobs.dive(index.folder, COMMON, tmp_path / "dive.html", proxies=[proxy], model="./no-such-model")


def test_a_dive_that_cannot_be_leaves_nothing(index: FeatureIndex, tmp_path: Path) -> None:
    with pytest.raises(ProxyError, match="column 11"):
        jobs.dive(index.folder, COMMON, tmp_path / "dive.html", proxies=["induction(1)"])
    with pytest.raises(IndexFormatError, match=f"latent {N_LATENTS}"):
        jobs.dive(index.folder, N_LATENTS, tmp_path / "dive.html", proxies=[PROXY])
    with pytest.raises(ExportError, match=r"\.html"):
        jobs.dive(index.folder, COMMON, tmp_path / "dive", proxies=[PROXY])
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_file_and_says_what_is_wrong(
    index: FeatureIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dive.html"
    cli.main(["dive", str(index.folder), str(COMMON), "--proxy", PROXY, "--out", str(out)])
    assert set(unpacked(out, "data-studies")) == {str(COMMON)}
    assert str(out) in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["dive", str(index.folder), str(COMMON), "--proxy", "a b", "--out", str(tmp_path / "other.html")])
    assert ended.value.code == 2
    assert "column" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dive_with_the_model_holds_its_effects(tmp_path: Path) -> None:
    [index] = jobs.index(["tiny-z1"], tmp_path / "index", text=jobs.CorpusChoice(max_tokens=8_000))
    latent = int(np.argmax(index.table()["n_active"].to_numpy() * (index.table()["density"].to_numpy() < 0.2)))
    shutil.rmtree(index.folder / "sae")
    assert {index.manifest[what]["relative"] for what in ("model", "sae")} == {None}, "both are bundled"
    page = jobs.dive(index.folder, latent, tmp_path / "dive.html", proxies=['token_in([" "])'], with_model=True)
    held = unpacked(page, "data-studies")[str(latent)]["studies"]
    effects, predictions = (held[held_as(study, 'token_in([" "])')] for study in ("ablation", "predictions"))
    assert effects["n"] > 30
    assert [path["path"] for path in effects["paths"]] == ["total", "direct", "mlp.1"]
    assert {group["name"] for group in predictions["groups"]} == {"false negatives", "true positives", "elsewhere"}
    made: dict[str, Any] = {}
    exec(effects["python"]["ablation"], made)
    assert made["found"].n == effects["n"]
    mean = made["found"].paths["total"].mean.value
    assert mean == pytest.approx(effects["paths"][0]["mean"]["value"], rel=1e-5)
    exec(predictions["python"], {})
