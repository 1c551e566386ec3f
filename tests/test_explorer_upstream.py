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
from headscope.explorer.dives import IndexDives, packed
from headscope.explorer.export import export_html
from headscope.explorer.server import make_app, static_files
from headscope.explorer.upstream import MAX_TOKENS, IndexUpstream, UpstreamModel, UpstreamRoutes
from headscope.index.live import LiveIndex
from headscope.live_upstream import NODES, LiveUpstream
from headscope.site import Site
from headscope.stats import Measure
from headscope.studies.how.corruptions import FeatureMetric, pair
from headscope.studies.how.feature_patching import patch_features
from headscope.studies.how.head_shares import head_shares
from headscope.studies.how.patching import Node, interaction, patch
from headscope.studies.how.sources import compare_heads, source_shares

BASE = "http://127.0.0.1:8000"
MLP = "an mlp SAE"


@pytest.fixture(scope="module")
def live(random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    return built_live(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("upstream") / "an index")


@pytest.fixture(scope="module")
def model(live: LiveIndex, random_sae) -> LiveUpstream:
    return LiveUpstream(live, {MLP: random_sae(live.model, 40, site=Site("mlp_out", 0))})


@pytest.fixture(scope="module")
def upstream(live: LiveIndex, model: LiveUpstream) -> IndexUpstream:
    return IndexUpstream(live.index, model)


@pytest.fixture(scope="module")
def client(live: LiveIndex, upstream: IndexUpstream) -> TestClient:
    return TestClient(make_app(IndexCards(live.index), dives=IndexDives(live.index), upstream=upstream), base_url=BASE)


@pytest.fixture(scope="module")
def without(live: LiveIndex) -> TestClient:
    return TestClient(make_app(IndexCards(live.index), upstream=IndexUpstream(live.index)), base_url=BASE)


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
def test_dfa_by_head_is_that_of_the_study(live: LiveIndex, upstream: IndexUpstream, latent: int) -> None:
    found = strict(upstream.heads(latent))
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


def test_sources_and_attention_are_those_of_the_study(live: LiveIndex, upstream: IndexUpstream) -> None:
    tokens = [live.index.token_id(letter) for letter in "abc"]
    found = strict(upstream.sources(COMMON, ",".join(map(str, [*tokens, tokens[0]]))))
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


def test_heads_at_an_example_are_those_of_the_study(live: LiveIndex, upstream: IndexUpstream, at: int) -> None:
    found, record = strict(upstream.compare(RARE, at)), compare_heads(live, at, RARE)
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
def test_patches_are_those_of_the_study(live: LiveIndex, upstream: IndexUpstream, at: int, nodes: str) -> None:
    found = strict(upstream.patch(RARE, at, "sources", nodes))
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


def test_features_as_nodes_are_those_of_the_study(live: LiveIndex, upstream: IndexUpstream, model, at: int) -> None:
    found = strict(upstream.features(RARE, at, "sources", MLP))
    record = patch_features(prompts_of(live, RARE, found), model._saes[MLP])
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


def test_long_prompts_are_cut_where_the_feature_stays(
    live: LiveIndex, model: LiveUpstream, at: int, monkeypatch
) -> None:
    whole = strict(model.patch(RARE, at, "sources", "components"))
    n = at % live.index.block_size + 1
    assert len(whole["clean"]) == n
    monkeypatch.setattr("headscope.live_upstream._WINDOWS", range(2, n))
    cut = strict(model.patch(RARE, at, "sources", "components"))
    assert len(cut["clean"]) < n
    assert cut["clean"][0] == live.model.bos
    assert cut["clean"][1:] == whole["clean"][1 - len(cut["clean"]) :]
    assert cut["on"]["activation"] >= 0.8 * whole["on"]["activation"]


def test_another_draw_is_another_corruption(model: LiveUpstream, at: int, monkeypatch, no_type_checks) -> None:
    monkeypatch.setattr("headscope.live_upstream.pair", lambda metric, clean, corrupted: (clean, corrupted))
    drawn = [[own.tolist() for own in model._pair(RARE, at, how)[0]] for how in ("shuffle", "shuffle.0", "shuffle.1")]
    (clean, first), (_, again), (_, other) = drawn
    assert first == again
    assert sorted(first) == sorted(other) == sorted(clean)
    assert first != other


def test_the_python_of_each_tab_makes_its_numbers_again(
    live: LiveIndex, upstream: IndexUpstream, at: int, monkeypatch, model
) -> None:
    monkeypatch.setattr(jobs, "live", lambda folder: live if folder == str(live.index.folder) else None)
    monkeypatch.setattr("headscope.sae.formats.load_sae", lambda name: model._saes[name])

    def made(found: dict[str, Any]) -> Any:
        *lines, last = found["python"].splitlines()
        names: dict[str, Any] = {}
        exec("\n".join([*lines, f"made = {last}"]), names)
        return names["made"]

    heads, _ = made(found := upstream.heads(COMMON))
    assert [one.n for one in heads] == [one["n"] for one in found["thresholds"]]
    found = upstream.sources(COMMON, "40,41")
    assert made(found)[0].summed.value == pytest.approx(found["thresholds"][0]["summed"]["value"], rel=1e-5)
    found = upstream.compare(RARE, at)
    assert made(found).heads[0].contribution == pytest.approx(found["heads"][0]["contribution"], rel=1e-6)
    for nodes in NODES:
        found = upstream.patch(RARE, at, "sources", nodes)
        again = made(found)
        row = found["rows"][1]
        number = again.number(Node(row["kind"], row["layer"], row["head"]))
        assert again.noising.pre_score[number] == pytest.approx(found["noising"]["pre_score"][1][0], rel=1e-5)
    found = upstream.features(RARE, at, "sources", MLP)
    assert made(found).latents[:5].tolist() == [one["latent"] for one in found["latents"][:5]]
    found = upstream.circuit(RARE, at, "")
    assert {child.name: child.value for child in made(found)} == pytest.approx(
        {child["name"]: child["value"] for child in found["children"]}, rel=1e-6
    )
    found = upstream.qk(RARE, at, 1, 2, at % live.index.block_size, 3)
    largest = made(found)[0]
    rows, columns = ([part["name"] for part in found[side]] for side in ("query_parts", "key_parts"))
    pairs = {(a, b): found["contrast"][i][j] for i, a in enumerate(rows) for j, b in enumerate(columns)}
    assert pairs[largest[0].name, largest[1].name] == pytest.approx(largest[2], rel=1e-5)


def test_sets_of_source_tokens_come_from_the_proxy_and_the_index(live: LiveIndex, upstream: IndexUpstream) -> None:
    def sets(proxy: str) -> dict[str, list[int]]:
        return {one["name"]: one["tokens"] for one in upstream.start(COMMON, proxy)["sets"]}

    a, b = (live.index.token_id(letter) for letter in "ab")
    assert sets('induction("a")')["of the proxy"] == [a]
    assert sets('after_any(["a", "b"])')["of the proxy"] == sorted([a, b])
    for nothing in ("", 'token_in(["a"])', "induction(", 'induction("abc")'):
        assert "of the proxy" not in sets(nothing)
    assert all(0 not in tokens for tokens in sets("").values()), "the special token is told apart"
    assert upstream.start(DEAD, "")["sets"] == []


# --- the routes


def test_routes_answer_what_the_source_does(client: TestClient, upstream: IndexUpstream, model, at: int) -> None:
    assert isinstance(model, UpstreamModel)
    assert client.get("/api/about").json()["upstream"] is True
    asked = {
        "start": {"proxy": 'induction("a")'},
        "heads": {},
        "sources": {"tokens": "40,41"},
        "compare": {"at": at},
        "patch": {"at": at, "how": "sources", "nodes": "heads"},
        "features": {"at": at, "how": "sources", "sae": MLP},
        "circuit": {"at": at, "path": "1.2"},
        "qk": {"at": at, "layer": 1, "head": 2, "query": at % 32, "key": 3},
    }
    for name, parameters in asked.items():
        answer = client.get(f"/api/upstream/{name}/{RARE}", params=parameters)
        assert answer.status_code == 200, name
        assert answer.json() == strict(getattr(upstream, name)(RARE, *parameters.values())), name


def test_a_server_without_a_model_says_what_is_missing(without: TestClient, live: LiveIndex, at: int) -> None:
    assert without.get(f"/api/upstream/heads/{RARE}").status_code == 200
    start = without.get(f"/api/upstream/start/{RARE}").json()
    assert start["live"] is False
    assert f"--index {live.index.folder} --with-model" in start["command"]
    for path in (
        "sources/5?tokens=40",
        f"compare/5?at={at}",
        f"patch/5?at={at}&how=swap&nodes=heads",
        f"circuit/5?at={at}",
    ):
        answer = without.get(f"/api/upstream/{path}")
        assert answer.status_code == 400
        assert "no model" in answer.json()["error"]
        assert "headscope serve --with-model" in answer.json()["do"]
    plain = TestClient(make_app(IndexCards(live.index)), base_url=BASE)
    assert plain.get("/api/about").json()["upstream"] is False
    assert plain.get(f"/api/upstream/heads/{RARE}").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("heads/x", 404, "not the number"),
        (f"heads/{N_LATENTS}", 404, f"no feature {N_LATENTS}"),
        (f"start/{N_LATENTS}", 404, f"no feature {N_LATENTS}"),
        ("heads/5?at=1", 400, "parameter 'at'"),
        ("start/5?proxy=" + "a" * 2001, 400, "2,001 characters of proxy"),
        ("sources/5", 400, "source tokens"),
        ("sources/5?tokens=", 400, "source tokens"),
        ("sources/5?tokens=a", 400, "source tokens"),
        ("sources/5?tokens=-1", 400, "source tokens"),
        ("sources/5?tokens=0", 400, "source tokens"),
        ("sources/5?tokens=98", 400, "source tokens"),
        ("sources/5?tokens=" + ",".join(["7"] * (MAX_TOKENS + 1)), 400, "source tokens"),
        ("sources/5?tokens=" + "7" * 5000, 400, "5,000 characters of tokens"),
        ("sources/5?tokens=1&tokens=2", 400, "characters of tokens in 2"),
        ("compare/5", 400, "at ''"),
        ("compare/5?at=1.5", 400, "at '1.5'"),
        ("compare/5?at=1&at=2", 400, "at '1, 2'"),
        (f"compare/5?at={60 * 32}", 400, f"position {60 * 32}"),
        ("compare/5?at=" + "9" * 400, 400, "at '9"),
        ("circuit/5?at=40&path=9.9", 400, "no node '9.9'"),
        ("circuit/5?at=40&path=<img src=x onerror=alert(1)>", 400, "no node"),
        ("circuit/5?at=40&path=" + "a" * 1001, 400, "1,001 characters of path"),
        ("qk/5?at=40&layer=1&head=9&query=3&key=1", 400, "head 9"),
        ("qk/5?at=40&layer=7&head=1&query=3&key=1", 400, "layer 7"),
        ("qk/5?at=40&layer=1&head=1&query=30&key=1", 400, "query 30"),
        ("qk/5?at=40&layer=1&head=1&query=3&key=4", 400, "key 4"),
        ("patch/5?at=33&how=swap&nodes=heads", 400, "not active"),
        ("patch/5?at=33&how=delete&nodes=heads", 400, "a corruption"),
        ("patch/5?at=33&how=shuffle.x&nodes=heads", 400, "a corruption"),
        ("patch/5?at=33&how=swap&nodes=all", 400, "nodes 'all'"),
        ("features/5?at=33&how=swap&sae=none", 400, "an SAE 'none'"),
    ],
)
def test_what_is_malformed_gets_a_clear_refusal(client: TestClient, path: str, status: int, said: str) -> None:
    answer = client.get(f"/api/upstream/{path}")
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_a_corruption_that_leaves_the_feature_on_is_reported(client: TestClient, live: LiveIndex) -> None:
    """Some shuffle of some example leaves the common feature on: it is refused with both readings."""
    said = []
    for example in live.index.examples(COMMON)[0].examples:
        answer = client.get(
            f"/api/upstream/patch/{COMMON}", params={"at": example.position, "how": "shuffle", "nodes": "heads"}
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


def test_without_an_earlier_copy_there_is_nothing_to_swap(live: LiveIndex, upstream: IndexUpstream) -> None:
    for example in live.index.examples(COMMON)[0].examples:
        block, query = divmod(example.position, live.index.block_size)
        tokens = live.index.tokens_of(block)
        if tokens[query] not in tokens[:query]:
            with pytest.raises(StudyError, match=r"does not stand earlier"):
                upstream.patch(COMMON, example.position, "swap", "heads")
            return
    pytest.fail("every example has an earlier copy")


def test_many_questions_at_once_are_answered_alike(
    client: TestClient, live: LiveIndex, upstream: IndexUpstream, at: int
) -> None:
    paths = [f"/api/upstream/circuit/{RARE}?at={at}&path=1.{head}" for head in range(4)] * 2
    alone = [client.get(path).json() for path in paths[:4]]
    app = make_app(IndexCards(live.index), upstream=upstream)
    with serving(app) as address, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: json.load(urlopen(f"{address}{path}", timeout=30)), paths))
    assert answers == 2 * alone


def test_a_question_that_takes_too_long_is_given_up(live: LiveIndex) -> None:
    go = threading.Event()
    slow = IndexUpstream(live.index)
    slow.compare = lambda latent, at: {"waited": go.wait(20)}
    routes = UpstreamRoutes(slow, Desk(places=1, waiting=0, seconds=0.2))
    app = make_app(IndexCards(live.index))
    app.router.routes.extend(routes.routes())
    own = TestClient(app, base_url=BASE)
    try:
        assert own.get("/api/upstream/compare/5?at=3").status_code == 504
    finally:
        go.set()


def test_saes_that_do_not_stand_before_are_refused(live: LiveIndex, random_sae) -> None:
    for sites in ([Site("mlp_out", 1)], [Site("z", 1)], [Site("mlp_out", 0), Site("mlp_out", 0)]):
        with pytest.raises(SAEError):
            LiveUpstream(live, {str(i): random_sae(live.model, 8, site=site) for i, site in enumerate(sites)})


# --- the file


def test_a_file_holds_what_needs_no_model(live: LiveIndex, upstream: IndexUpstream, tmp_path) -> None:
    held = strict(upstream.packed(RARE))
    assert held["start"]["live"] is False
    assert held["heads"] == strict(upstream.heads(RARE))
    dives = packed(IndexDives(live.index), RARE)
    dives[RARE]["upstream"] = held
    page = export_html(IndexCards(live.index), tmp_path / "page.html", [RARE], dives=dives).read_text()
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
