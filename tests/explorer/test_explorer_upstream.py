"""What the tabs upstream are given: the numbers of the studies' records, the routes, what is refused, the file."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from browsing import serving
from dive_index import COMMON, DEAD, N_LATENTS, RARE, built_live
from headscope import jobs
from headscope.errors import SAEError, StudyError
from headscope.explorer.cards import IndexCards
from headscope.explorer.desk import Desk
from headscope.explorer.export import export_html
from headscope.explorer.server import make_app, static_files
from headscope.explorer.start import start_json
from headscope.explorer.studies import StudyRoutes, packed
from headscope.index.live import LiveIndex
from headscope.site import Site
from headscope.stats import Measure
from headscope.studies.how.corruptions import FeatureMetric, pair
from headscope.studies.how.example_patching import NODES, example_pair
from headscope.studies.how.feature_patching import patch_features
from headscope.studies.how.head_shares import head_shares
from headscope.studies.how.patching import Node, interaction, patch
from headscope.studies.how.sources import compare_heads, source_shares
from headscope.studies.how.sources_study import MAX_TOKENS
from headscope.studies.registry import STUDIES
from headscope.studies.study import FeatureStudy
from headscope.studies.subject import Subject
from headscope.studies.support.on_page import AtToken
from studied import ask

BASE = "http://127.0.0.1:8000"
MLP = "an mlp SAE"


@pytest.fixture(scope="module")
def live(random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    return built_live(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("upstream") / "an index")


@pytest.fixture(scope="module")
def subject(live: LiveIndex, random_sae) -> Subject:
    return Subject(live.index, live, saes={MLP: random_sae(live.model, 40, site=Site("mlp_out", 0))})


@pytest.fixture(scope="module")
def client(live: LiveIndex, subject: Subject) -> TestClient:
    return TestClient(make_app(IndexCards(live.index), subject=subject), base_url=BASE)


@pytest.fixture(scope="module")
def without(live: LiveIndex) -> TestClient:
    return TestClient(make_app(IndexCards(live.index), subject=Subject(live.index)), base_url=BASE)


@pytest.fixture(scope="module")
def at(live: LiveIndex) -> int:
    """The strongest example of the rare feature."""
    return live.index.examples(RARE)[0].examples[0].position


def strict(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content, allow_nan=False))


def assert_measure(found: dict[str, Any], measure: Measure) -> None:
    for name in ("value", "low", "high"):
        expected = getattr(measure, name)
        assert found[name] == (None if expected is None else pytest.approx(expected, rel=1e-5))
    assert (found["n"], found["definition"], found["missing"]) == (measure.n, measure.definition, measure.missing)
    if measure.null is not None:
        null = [measure.null.value, measure.null.low, measure.null.high]
        assert [found["null"][name] for name in ("value", "low", "high")] == pytest.approx(null, rel=1e-5)


# --- the numbers


@pytest.mark.parametrize("latent", [COMMON, RARE, DEAD])
def test_dfa_by_head_is_that_of_the_study(live: LiveIndex, subject: Subject, latent: int) -> None:
    found = strict(ask(subject, "head_shares", latent))
    thresholds = [one["threshold"] for one in found["thresholds"]]
    assert thresholds[0] == 0
    assert thresholds == sorted(set(thresholds))
    assert len(thresholds) == (1 if latent == DEAD else 8)
    for one, record in zip(found["thresholds"], head_shares(live.index, latent, thresholds), strict=True):
        assert one["n"] == record.n
        for own, share in zip(one["heads"], record.heads, strict=True):
            for name in ("squared", "covariance", "linear"):
                assert_measure(own[name], getattr(share, name))
    shares = live.index.feature(latent).shares
    for name, weights in found["weights"].items():
        assert weights["shares"] == pytest.approx(getattr(shares, name).tolist(), rel=1e-6)
        assert weights["definition"]


def test_sources_and_attention_are_those_of_the_study(live: LiveIndex, subject: Subject) -> None:
    tokens = [live.index.token_id(letter) for letter in "abc"]
    found = strict(ask(subject, "sources", COMMON, tokens=tuple(tokens)))
    assert found["tokens"] == tokens
    thresholds = [one["threshold"] for one in found["thresholds"]]
    records = source_shares(live, COMMON, tokens, thresholds=thresholds, max_blocks=24)
    for one, record in zip(found["thresholds"], records, strict=True):
        assert (one["n"], one["n_active"]) == (record.n, record.n_active)
        for name in ("summed", "separate", "linear", "bos", "frequency"):
            assert_measure(one[name], getattr(record, name))
        for own, head in zip(one["heads"], record.heads, strict=True):
            assert_measure(own["squared"], head.squared)
            assert_measure(own["linear"], head.linear)
            for name in ("active", "visible", "inactive", "elsewhere"):
                assert_measure(own["attention"][name], getattr(head.attention, name))
        assert [row[0] for row in one["top"]] == [t.token for t in record.top[:12]]


def test_heads_at_an_example_are_those_of_the_study(live: LiveIndex, subject: Subject, at: int) -> None:
    found, record = strict(ask(subject, "compare_heads", RARE, at=at)), compare_heads(live, at, RARE)
    assert [one["head"] for one in found["heads"]] == [one.head for one in record.heads]
    for own, head in zip(found["heads"], record.heads, strict=True):
        assert own["contribution"] == pytest.approx(head.contribution, rel=1e-6)
        assert own["share"] == pytest.approx(head.share, rel=1e-6)
        rows = np.column_stack([head.sources, head.dfa, head.attention])
        np.testing.assert_allclose(own["sources"], rows, rtol=1e-6)
    np.testing.assert_allclose(found["agreement"], record.agreement, rtol=1e-5, atol=1e-7)
    assert sum(one["contribution"] for one in found["heads"]) + found["bias"] == pytest.approx(found["pre"], abs=1e-5)


def prompts_of(live: LiveIndex, latent: int, found: dict[str, Any]):
    metric = FeatureMetric(live.model, live.sae, latent)
    return pair(metric, torch.tensor(found["clean"]), torch.tensor(found["corrupted"]))


@pytest.mark.parametrize("nodes", NODES)
def test_patches_are_those_of_the_study(live: LiveIndex, subject: Subject, at: int, nodes: str) -> None:
    found = strict(ask(subject, "patching", RARE, at=at, how="sources", nodes=nodes))
    prompts = prompts_of(live, RARE, found)
    assert found["changed"] == [
        p for p, (a, b) in enumerate(zip(found["clean"], found["corrupted"], strict=True)) if a != b
    ]
    assert found["columns"] == list(range(found["changed"][0], len(found["clean"]))), "what precedes cannot matter"
    assert (found["on"]["activation"], found["off"]["activation"]) == (
        pytest.approx(prompts.on.activation, rel=1e-6),
        0,
    )
    places = [None, *found["columns"]]
    wanted = [Node(row["kind"], row["layer"], row["head"], place) for row in found["rows"] for place in places]
    record = patch(prompts, wanted)
    for direction in ("noising", "denoising"):
        for name in ("pre_score", "activation_score"):
            expected = getattr(getattr(record, direction), name).reshape(len(found["rows"]), len(places))
            np.testing.assert_allclose(found[direction][name], expected, rtol=1e-5, atol=1e-6)
    for row, said in zip(found["rows"], found["roles"], strict=True):
        assert said["role"] == record.roles()[record.number(Node(row["kind"], row["layer"], row["head"]))]
    names = {row["name"]: Node(row["kind"], row["layer"], row["head"]) for row in found["rows"]}
    joint = interaction(prompts, names[found["joint"]["first"]], names[found["joint"]["second"]])
    assert joint.first[0].layer == joint.second[0].layer, "beside each other, not in a row"
    assert found["joint"]["kind"] == joint.kind
    assert found["joint"]["excess"] == pytest.approx(list(joint.excess), rel=1e-5, abs=1e-6)


def test_features_as_nodes_are_those_of_the_study(live: LiveIndex, subject: Subject, at: int) -> None:
    found = strict(ask(subject, "feature_patching", RARE, at=at, features_of=MLP))
    record = patch_features(prompts_of(live, RARE, found), subject.saes[MLP])
    for bar in found["bars"]:
        scores = (bar["noising"]["pre_score"], bar["denoising"]["pre_score"])
        assert scores == pytest.approx(record.bar(bar["name"]), rel=1e-5, abs=1e-6)
    assert [bar["name"] for bar in found["bars"]] == ["site", "features", "error"]
    assert found["n_latents"] == len(record.latents)
    assert found["few"] == record.few
    for i, one in enumerate(found["latents"]):
        assert one["latent"] == record.latents[i]
        assert one["noising"]["pre_score"] == pytest.approx(record.noising.pre_score[i], rel=1e-5, abs=1e-6)
        together = record.together_denoising.activation_score[i]
        assert one["denoising_together"]["activation_score"] == pytest.approx(together, rel=1e-5, abs=1e-6)


def test_long_prompts_are_cut_where_the_feature_stays(live: LiveIndex, subject: Subject, at: int, monkeypatch) -> None:
    whole = strict(ask(subject, "patching", RARE, at=at, how="sources", nodes="components"))
    n = at % live.index.block_size + 1
    assert len(whole["clean"]) == n
    monkeypatch.setattr("headscope.studies.how.example_patching._WINDOWS", range(2, n))
    cut = strict(ask(subject, "patching", RARE, at=at, how="sources", nodes="components"))
    assert len(cut["clean"]) < n
    assert cut["clean"][0] == live.model.bos
    assert cut["clean"][1:] == whole["clean"][1 - len(cut["clean"]) :]
    assert cut["on"]["activation"] >= 0.8 * whole["on"]["activation"]


def test_another_draw_is_another_corruption(subject: Subject, at: int, monkeypatch, no_type_checks) -> None:
    monkeypatch.setattr(
        "headscope.studies.how.example_patching.pair", lambda metric, clean, corrupted: (clean, corrupted)
    )
    drawn = [
        [own.tolist() for own in example_pair(subject, RARE, at, how)] for how in ("shuffle", "shuffle.0", "shuffle.1")
    ]
    (clean, first), (_, again), (_, other) = drawn
    assert first == again
    assert sorted(first) == sorted(other) == sorted(clean)
    assert first != other


def test_the_python_of_each_tab_makes_its_numbers_again(
    live: LiveIndex, subject: Subject, at: int, monkeypatch
) -> None:
    monkeypatch.setattr(jobs, "live", lambda folder: live if folder == str(live.index.folder) else None)
    monkeypatch.setattr("headscope.sae.formats.load_sae", lambda name: subject.saes[name])

    def made(found: dict[str, Any]) -> Any:
        *lines, last = found["python"].splitlines()
        names: dict[str, Any] = {}
        exec("\n".join([*lines, f"made = {last}"]), names)
        return names["made"]

    heads, _ = made(found := ask(subject, "head_shares", COMMON))
    assert [one.n for one in heads] == [one["n"] for one in found["thresholds"]]
    found = ask(subject, "sources", COMMON, tokens=(40, 41))
    assert made(found)[0].summed.value == pytest.approx(found["thresholds"][0]["summed"]["value"], rel=1e-5)
    found = ask(subject, "compare_heads", RARE, at=at)
    assert made(found).heads[0].contribution == pytest.approx(found["heads"][0]["contribution"], rel=1e-6)
    for nodes in NODES:
        found = ask(subject, "patching", RARE, at=at, how="sources", nodes=nodes)
        again = made(found)
        row = found["rows"][1]
        number = again.number(Node(row["kind"], row["layer"], row["head"]))
        assert again.noising.pre_score[number] == pytest.approx(found["noising"]["pre_score"][1][0], rel=1e-5)
    found = ask(subject, "feature_patching", RARE, at=at, features_of=MLP)
    assert made(found).latents[:5].tolist() == [one["latent"] for one in found["latents"][:5]]
    found = ask(subject, "circuit", RARE, at=at)
    assert {child.name: child.value for child in made(found)} == pytest.approx(
        {child["name"]: child["value"] for child in found["children"]}, rel=1e-6
    )
    found = ask(subject, "qk", RARE, at=at, layer=1, head=2, query=at % live.index.block_size, key=3)
    largest = made(found)[0]
    rows, columns = ([part["name"] for part in found[side]] for side in ("query_parts", "key_parts"))
    pairs = {(a, b): found["contrast"][i][j] for i, a in enumerate(rows) for j, b in enumerate(columns)}
    assert pairs[largest[0].name, largest[1].name] == pytest.approx(largest[2], rel=1e-5)


def test_sets_of_source_tokens_come_from_the_proxy_and_the_index(live: LiveIndex, subject: Subject) -> None:
    def sets(proxy: str) -> dict[str, list[int]]:
        return {one["name"]: one["tokens"] for one in ask(subject, "source_sets", COMMON, proxy=proxy)["sets"]}

    a, b = (live.index.token_id(letter) for letter in "ab")
    assert sets('induction("a")')["of the proxy"] == [a]
    assert sets('after_any(["a", "b"])')["of the proxy"] == sorted([a, b])
    for nothing in ("", 'token_in(["a"])', "induction(", 'induction("abc")'):
        assert "of the proxy" not in sets(nothing)
    assert all(0 not in tokens for tokens in sets("").values()), "the special token is told apart"
    assert ask(subject, "source_sets", DEAD)["sets"] == []


# --- the routes


def test_routes_answer_what_the_study_does(client: TestClient, subject: Subject, at: int) -> None:
    asked = {
        "source_sets": {"proxy": 'induction("a")'},
        "head_shares": {},
        "sources": {"tokens": "40,41"},
        "compare_heads": {"at": at},
        "patching": {"at": at, "how": "sources", "nodes": "heads"},
        "feature_patching": {"at": at, "how": "sources", "features_of": MLP},
        "circuit": {"at": at, "path": "1.2"},
        "qk": {"at": at, "layer": 1, "head": 2, "query": at % 32, "key": 3},
    }
    listed = {study["name"] for study in client.get("/api/about").json()["studies"]}
    assert set(asked) <= listed
    for name, parameters in asked.items():
        answer = client.get(f"/api/study/{name}/{RARE}", params=parameters)
        assert answer.status_code == 200, name
        options = parameters | ({"tokens": (40, 41)} if name == "sources" else {})
        assert answer.json() == strict(ask(subject, name, RARE, **options)), name
    tokens = {"tokens": "40,41,40"}
    assert client.get(f"/api/study/sources/{RARE}", params=tokens).json()["tokens"] == [40, 41], "each token once"


def test_a_server_without_a_model_says_what_is_missing(without: TestClient, live: LiveIndex, at: int) -> None:
    assert without.get(f"/api/study/head_shares/{RARE}").status_code == 200
    start = without.get(f"/api/start/{RARE}").json()
    assert start["live"] is False
    assert f"--index {live.index.folder} --with-model" in start["command"]
    for path in (
        "sources/5?tokens=40",
        f"compare_heads/5?at={at}",
        f"patching/5?at={at}&how=swap&nodes=heads",
        f"circuit/5?at={at}",
    ):
        answer = without.get(f"/api/study/{path}")
        assert answer.status_code == 400
        assert "no model" in answer.json()["error"]
        assert "headscope serve --with-model" in answer.json()["do"]
    plain = TestClient(make_app(IndexCards(live.index)), base_url=BASE)
    assert plain.get("/api/about").json()["studies"] == []
    assert plain.get(f"/api/study/head_shares/{RARE}").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("head_shares/x", 404, "not the number"),
        (f"head_shares/{N_LATENTS}", 404, f"no feature {N_LATENTS}"),
        (f"source_sets/{N_LATENTS}", 404, f"no feature {N_LATENTS}"),
        ("head_shares/5?at=1", 400, "parameter 'at'"),
        ("source_sets/5?proxy=" + "a" * 2001, 400, "2,001 characters"),
        ("sources/5", 400, "no tokens"),
        ("sources/5?tokens=", 400, "0 source tokens"),
        ("sources/5?tokens=a", 400, "tokens 'a'"),
        ("sources/5?tokens=-1", 400, "tokens '-1'"),
        ("sources/5?tokens=0", 400, "source tokens"),
        ("sources/5?tokens=98", 400, "source tokens"),
        ("sources/5?tokens=" + ",".join(map(str, range(1, MAX_TOKENS + 2))), 400, f"{MAX_TOKENS + 1} source tokens"),
        ("sources/5?tokens=" + "7" * 5000, 400, "tokens '777"),
        ("sources/5?tokens=99999999999999", 400, "tokens = 99999999999999"),
        ("sources/5?tokens=1&tokens=2", 400, "2 values of tokens"),
        ("compare_heads/5", 400, "no at"),
        ("compare_heads/5?at=1.5", 400, "at '1.5'"),
        ("compare_heads/5?at=1&at=2", 400, "2 values of at"),
        (f"compare_heads/5?at={60 * 32}", 400, f"position {60 * 32}"),
        ("compare_heads/5?at=" + "9" * 400, 400, "at '9"),
        ("circuit/5?at=40&path=9.9", 400, "no node '9.9'"),
        ("circuit/5?at=40&path=<img src=x onerror=alert(1)>", 400, "no node"),
        ("circuit/5?at=40&path=" + "a" * 1001, 400, "1,001 characters"),
        ("qk/5?at=40&layer=1&head=9&query=3&key=1", 400, "head 9"),
        ("qk/5?at=40&layer=7&head=1&query=3&key=1", 400, "layer 7"),
        ("qk/5?at=40&layer=1&head=1&query=30&key=1", 400, "query 30"),
        ("qk/5?at=40&layer=1&head=1&query=3&key=4", 400, "key 4"),
        ("patching/5?at=33&how=swap&nodes=heads", 400, "not active"),
        ("patching/5?at=33&how=delete&nodes=heads", 400, "a corruption"),
        ("patching/5?at=33&how=shuffle.x&nodes=heads", 400, "a corruption"),
        ("patching/5?at=33&how=swap&nodes=all", 400, "nodes 'all'"),
        ("feature_patching/5?at=33&how=swap&features_of=none", 400, "an SAE 'none'"),
    ],
)
def test_what_is_malformed_gets_a_clear_refusal(client: TestClient, path: str, status: int, said: str) -> None:
    answer = client.get(f"/api/study/{path}")
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_a_corruption_that_leaves_the_feature_on_is_reported(client: TestClient, live: LiveIndex) -> None:
    """Some shuffle of some example leaves the common feature on: it is refused with both readings."""
    said = []
    for example in live.index.examples(COMMON)[0].examples:
        answer = client.get(
            f"/api/study/patching/{COMMON}", params={"at": example.position, "how": "shuffle", "nodes": "heads"}
        )
        if answer.status_code == 200:
            assert answer.json()["off"]["activation"] == 0
        else:
            said.append(answer.json())
    still = [one for one in said if "still on" in one["error"]]
    assert still
    assert re.search(r"still on in the corrupted prompt: [\d.]+ against [\d.]+", still[0]["error"])
    assert still[0]["expected"] == "a corruption that turns it off"
    assert still[0]["do"]


def test_without_an_earlier_copy_there_is_nothing_to_swap(live: LiveIndex, subject: Subject) -> None:
    for example in live.index.examples(COMMON)[0].examples:
        block, query = divmod(example.position, live.index.block_size)
        tokens = live.index.tokens_of(block)
        if tokens[query] not in tokens[:query]:
            with pytest.raises(StudyError, match=r"does not stand earlier"):
                ask(subject, "patching", COMMON, at=example.position, how="swap", nodes="heads")
            return
    pytest.fail("every example has an earlier copy")


def test_many_questions_at_once_are_answered_alike(
    client: TestClient, live: LiveIndex, subject: Subject, at: int
) -> None:
    paths = [f"/api/study/circuit/{RARE}?at={at}&path=1.{head}" for head in range(4)] * 2
    alone = [client.get(path).json() for path in paths[:4]]
    app = make_app(IndexCards(live.index), subject=subject)
    with serving(app) as address, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: json.load(urlopen(f"{address}{path}", timeout=30)), paths))
    assert answers == 2 * alone


def test_a_question_that_takes_too_long_is_given_up(live: LiveIndex, monkeypatch) -> None:
    go = threading.Event()
    waits = FeatureStudy(
        name="waits", group="how", question="?", run=lambda *_: {"waited": go.wait(20)}, options=AtToken
    )
    monkeypatch.setitem(STUDIES, "waits", waits)
    routes = StudyRoutes(Subject(live.index), Desk(places=1, waiting=0, seconds=0.2))
    app = make_app(IndexCards(live.index))
    app.router.routes.extend(routes.routes())
    own = TestClient(app, base_url=BASE)
    try:
        assert own.get("/api/study/waits/5?at=3").status_code == 504
    finally:
        go.set()


def test_saes_that_do_not_stand_before_are_refused(live: LiveIndex, random_sae) -> None:
    for sites in ([Site("mlp_out", 1)], [Site("z", 1)], [Site("mlp_out", 0), Site("mlp_out", 0)]):
        with pytest.raises(SAEError):
            Subject(
                live.index, live, saes={str(i): random_sae(live.model, 8, site=site) for i, site in enumerate(sites)}
            )


# --- the file


def test_a_file_holds_what_needs_no_model(live: LiveIndex, tmp_path) -> None:
    subject = Subject(live.index)
    held = strict(packed(subject, RARE))
    assert held["start"] == strict(start_json(subject, RARE))
    assert held["start"]["live"] is False
    assert held["studies"]["head_shares {}"] == strict(ask(subject, "head_shares", RARE))
    assert held["studies"]["source_sets {}"] == strict(ask(subject, "source_sets", RARE))
    page = export_html(IndexCards(live.index), tmp_path / "page.html", [RARE], studies={RARE: held}).read_text()
    for name in ("class Upstream ", "class CircuitTree ", "function drawQk("):
        assert page.count(name) == 1


def test_modules_that_one_script_holds_share_no_name() -> None:
    declared: dict[str, str] = {}
    for module, body in static_files().items():
        if module.endswith(".js") and module != "labels.js":  # it writes, and so is in no file
            found = re.findall(
                r"^(?:export )?(?:const|class|(?:async )?function) (?:\[(.+?)\] =|(\w+))", body.decode(), re.M
            )
            for name in (name for many, one in found for name in (one or many).split(", ")):
                assert declared.setdefault(name, module) == module, name
