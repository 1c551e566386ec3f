"""What the pages of families and heads are told: columns and tables of an index as JSON, and the routes to it."""

import gzip
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from starlette.testclient import TestClient

from browsing import serving
from dive_index import DEAD
from headscope.explorer.cards import IndexCards
from headscope.explorer.export import export_folder, export_html
from headscope.explorer.families import IndexFamilies
from headscope.explorer.head_pages import CONTRIBUTES, IndexHeads
from headscope.explorer.page_routes import FamilySource, HeadSource
from headscope.explorer.server import make_app
from headscope.index.labels import Judgement, LabelStore
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.stats import wilson
from headscope.studies.heads import superposition
from headscope.studies.induction.behaviour import Reading, compare_rule, head_share
from headscope.studies.induction.composite import Criteria, induction_features
from headscope.studies.induction.store import save_columns
from headscope.studies.subject import Subject
from role_index import HOSTILE, LABELLED, MEMBERS, add_induction, add_kinds, live_latents, pages_of, score_of, studied

BASE = "http://127.0.0.1:8000"
PATHS = ("families", "family/induction", "family/induction/1.1", "family/token", "heads", "head/0.0", "head/1.2")


@pytest.fixture(scope="module")
def index(random_model, random_corpus, random_sae, tmp_path_factory) -> FeatureIndex:
    return studied(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("roles") / "index")


@pytest.fixture
def bare(index: FeatureIndex, tmp_path: Path) -> FeatureIndex:
    """The same index before any study."""
    shutil.copytree(index.folder, tmp_path / "bare")
    for name in ("columns", "heads"):
        shutil.rmtree(tmp_path / "bare" / name)
    return FeatureIndex.open(tmp_path / "bare")


@pytest.fixture(scope="module")
def client(index: FeatureIndex) -> TestClient:
    return TestClient(make_app(IndexCards(index), roles=pages_of(index)), base_url=BASE)


# ------------------------------------------------------------------------------------------------------------ families
def test_the_sources_are_what_the_routes_ask_for(index: FeatureIndex) -> None:
    assert isinstance(IndexFamilies(index), FamilySource)
    assert isinstance(IndexHeads(index), HeadSource)


def test_every_live_feature_is_judged_and_members_are_those_of_the_study(index: FeatureIndex) -> None:
    found = IndexFamilies(index).family("induction")
    rows = found["rows"]
    assert rows["latent"] == live_latents(index)
    assert DEAD not in rows["latent"]
    assert [j for j, member in zip(rows["latent"], rows["verdict"], strict=True) if member] == list(MEMBERS)
    assert all(len(values) == len(rows["latent"]) for values in rows.values())
    assert {column["name"] for column in found["columns"]} <= set(rows)


def test_the_tests_are_those_that_made_the_verdict(index: FeatureIndex) -> None:
    rows = IndexFamilies(index).family("induction")["rows"]
    tests = dict(zip(rows["latent"], rows["tests"], strict=True))
    assert all(all(made is True for made in own) == (latent in MEMBERS) for latent, own in tests.items())
    assert tests[5] == [False, True, True, None], "a rate of just 0.6 is not above 0.6; the last test was not made"
    assert tests[2] == [True, False, True, None]
    assert tests[7] == [True, True, False, None]
    assert tests[12] == [True, True, True, False]
    assert tests[14] == [True, None, None, None], "no active later A: nothing to test"


def test_a_test_that_was_not_asked_is_not_shown(bare: FeatureIndex) -> None:
    add_induction(bare, members=(*MEMBERS, 12), off=None)
    found = IndexFamilies(bare).family("induction")
    assert [test["name"] for test in found["tests"]] == ["behaviour", "sources", "copying"]
    tests = dict(zip(found["rows"]["latent"], found["rows"]["tests"], strict=True))
    assert tests[12] == [True, True, True]


def test_the_rule_is_that_of_the_head_and_agrees_with_the_study(index: FeatureIndex) -> None:
    families = IndexFamilies(index)
    for head in range(index.n_heads):
        found = families.family("induction", f"1.{head}")
        rows = found["rows"]
        verdict, latents = np.array(rows["verdict"]), np.array(rows["latent"])
        share = head_share(index, head)[latents]
        np.testing.assert_allclose(rows["score"], share, rtol=1e-5)
        compared = compare_rule(share.astype(np.float64), verdict)
        assert found["rule"]["auc"]["value"] == pytest.approx(compared.auc.value, rel=1e-5)
        assert (found["rule"]["n"], found["rule"]["n_true"], found["rule"]["at"]) == (len(share), len(MEMBERS), 0.6)
        apart = [None if s is None else d - s for d, s in zip(share, rows["source_share"], strict=True)]
        assert [a is None for a in rows["apart"]] == [a is None for a in apart]
        known = [a for a in apart if a is not None]
        assert [a for a in rows["apart"] if a is not None] == pytest.approx(known, rel=1e-3)


def test_the_head_shown_first_brings_most_members(index: FeatureIndex) -> None:
    found = IndexFamilies(index).family("induction")
    expected = np.bincount([j % index.n_heads for j in MEMBERS], minlength=index.n_heads)
    assert found["by_head"] == expected.tolist()
    assert found["head"] == f"1.{expected.argmax()}"


def test_columns_that_the_study_itself_wrote(bare: FeatureIndex, random_model, random_sae) -> None:
    """Loose criteria let some of a random model pass; the page's tests are the study's, feature by feature."""
    model = random_model("gpt_neox")
    live = LiveIndex(bare, model, random_sae(model, bare.n_latents))
    reading = Reading(expected="every A")
    asked = Criteria(rate=0.3, reading=reading, least=1, source_share=0.0, copy_rank=0.5, off=None)
    judged = induction_features(live, criteria=asked, null=False)
    save_columns(bare, judged)
    found = IndexFamilies(bare).family("induction")
    assert any(0 < passed.sum() < len(passed) for passed in judged.tests.values()), "or this shows nothing"
    for i, test in enumerate(found["tests"]):
        own = [tests[i] is True for tests in found["rows"]["tests"]]
        assert own == judged.tests[test["name"]].tolist()
    assert found["rows"]["verdict"] == judged.verdict.tolist()


def test_a_family_of_proxies_is_held_against_its_best_proxy(index: FeatureIndex) -> None:
    found = IndexFamilies(index).family("token")
    rows = found["rows"]
    assert rows["latent"] == [j for j in live_latents(index) if j != 1], "without a score there is nothing to hold"
    assert rows["verdict"] == [j % 3 == 0 for j in rows["latent"]]
    assert rows["score"] == pytest.approx([0.9 - 0.3 * (j % 3) - j / 1000 for j in rows["latent"]], rel=1e-5)
    assert found["rule"]["at"] == 0.3
    assert found["heads"] is None


def test_the_list_has_shares_with_intervals(index: FeatureIndex) -> None:
    listed = {family["name"]: family for family in IndexFamilies(index).families()["families"]}
    n = len(live_latents(index))
    interval = wilson(len(MEMBERS), n)
    assert listed["induction"]["share"] == pytest.approx([interval.value, interval.low, interval.high], rel=1e-3)
    assert (listed["induction"]["members"], listed["induction"]["n"]) == (len(MEMBERS), n)
    assert (listed["high-level-context"]["members"], listed["high-level-context"]["missing"]) == (0, None)


def test_without_columns_the_command_is_named(bare: FeatureIndex) -> None:
    families = IndexFamilies(bare)
    for name, command in (("induction", "headscope study families INDEX"), ("token", "headscope study proxies INDEX")):
        found = families.family(name)
        assert found["command"].startswith(command)
        assert "no columns" in found["missing"]
        assert "rows" not in found
    assert all(family["missing"] for family in families.families()["families"])
    add_induction(bare)
    assert families.family("induction")["missing"] is None, "what is added while the server runs is seen"


def test_a_family_without_members_is_a_family(bare: FeatureIndex) -> None:
    add_induction(bare, members=())
    found = IndexFamilies(bare).family("induction")
    assert found["rule"]["n_true"] == 0
    assert found["rule"]["auc"]["value"] is None
    assert "0 of" in found["rule"]["auc"]["missing"]
    assert found["head"] in found["heads"]


def test_damaged_columns_are_refused_in_words(bare: FeatureIndex) -> None:
    add_induction(bare)
    path = bare.folder / "columns" / "induction.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    found = IndexFamilies(bare).family("induction")
    assert "refused" in found["missing"]


def test_labels_are_in_the_rows_and_a_broken_file_of_them_is_none(bare: FeatureIndex, index: FeatureIndex) -> None:
    rows = IndexFamilies(index).family("induction")["rows"]
    assert dict(zip(rows["latent"], rows["label"], strict=True))[LABELLED] == HOSTILE
    add_induction(bare)
    (bare.folder / "labels.jsonl").write_text("no label\n" * 3)
    assert set(IndexFamilies(bare).family("induction")["rows"]["label"]) == {None}


def test_cards_name_the_families_of_a_feature(index: FeatureIndex) -> None:
    cards = IndexCards(index)
    assert cards.feature(6)["families"] == ["induction", "token"]
    assert cards.feature(7)["families"] == ["local-context"]
    assert cards.feature(5)["families"] == []


def test_what_studies_and_people_add_is_shown_by_a_server_that_runs(bare: FeatureIndex) -> None:
    app = make_app(IndexCards(bare), subject=Subject(bare), roles=pages_of(bare))
    client = TestClient(app, base_url=BASE)

    def asked() -> dict[str, Any]:
        return {path: client.get(f"/api/{path}").json() for path in ("feature/6", "table", "start/6", *PATHS)}

    before = asked()
    assert before["feature/6"]["families"] == []
    assert before["start/6"]["columns"] == {}
    add_induction(bare)
    add_kinds(bare)
    after = asked()
    assert after["feature/6"]["families"] == ["induction", "token"]
    assert set(after["table"]["rows"]) - set(before["table"]["rows"]) == {"proxies.kind"}
    assert set(after["start/6"]["columns"]) == {"induction", "proxies"}
    assert after["family/induction"]["missing"] is None
    assert before["head/1.2"]["families"] != after["head/1.2"]["families"]
    add_induction(bare, members=(4, 8, 10))
    assert asked()["feature/6"]["families"] == ["token"], "columns that are written anew"
    LabelStore(bare).add(4, "a", Judgement(verdict="interpretable", text="a text"))
    labels = [
        dict(zip(rows["latent"], rows["label"], strict=True))[4]
        for rows in (found["family/induction"]["rows"] for found in (after, asked()))
    ]
    assert labels == [None, "a text"]
    shutil.rmtree(bare.folder / "columns")
    assert asked()["feature/6"] == before["feature/6"]


# --------------------------------------------------------------------------------------------------------------- heads
def test_the_grid_has_every_head_and_its_scores(index: FeatureIndex) -> None:
    found = IndexHeads(index).heads()
    model = index.manifest["model"]
    assert [len(layer) for layer in found["layers"]] == [model["n_heads"]] * model["n_layers"]
    for layer, heads in enumerate(found["layers"]):
        for h, head in enumerate(heads):
            assert head["name"] == f"{layer}.{h}"
            assert head["scores"]["induction"] == {"value": score_of(layer, h, "induction"), "p": 0.01}
            assert head["roles"] == (["induction", "copying"] if h == 1 else [])
            assert (head["made"] is None) == (layer != 1)
    made = sum(head["made"]["dfa"] for head in found["layers"][1])
    assert made == found["n_features"] == len(live_latents(index))


def test_a_head_has_its_features_by_both_weights(index: FeatureIndex) -> None:
    for h in range(index.n_heads):
        found = IndexHeads(index).head(f"1.{h}")["features"]
        for by in ("dfa", "decoder"):
            own = found["lists"][by]
            live = live_latents(index)
            shares = index.shares[by][live, h]
            expected = [live[i] for i in np.argsort(-shares, kind="stable")[:25]]
            assert own["latent"] == expected
            assert own[by] == pytest.approx(np.sort(shares)[::-1][:25].tolist(), rel=1e-3)
            assert sum(own["histogram"]) == len(live)
            assert own["n"] == int((index.shares[by][live].argmax(1) == h).sum())


def test_shared_features_are_those_that_two_heads_make(index: FeatureIndex) -> None:
    assert CONTRIBUTES == superposition.CONTRIBUTES
    live = live_latents(index)
    makes = index.shares["dfa"][live] >= CONTRIBUTES
    for h in range(index.n_heads):
        found = IndexHeads(index).head(f"1.{h}")["shared"]
        assert found["n"] == makes[:, h].sum()
        assert found["alone"] == (makes[:, h] & (makes.sum(1) == 1)).sum()
        for other in found["others"]:
            o = int(other["head"].split(".")[1])
            both = {live[i] for i in np.flatnonzero(makes[:, h] & makes[:, o])}
            assert other["n"] == len(both)
            assert set(other["latents"]) <= both


def test_what_was_stored_of_a_head_is_shown_as_it_is(index: FeatureIndex) -> None:
    found = IndexHeads(index).head("1.2")
    scores = {row["role"]: row for row in found["scores"]["rows"]}
    assert scores["copying"]["value"] == score_of(1, 2, "copying")
    assert found["scores"]["prefix"]["attention"] == [0.1, 0.4, 0.6]
    card = found["catalogue"]["by"]["dfa"]
    assert card["measures"]["largest"]["null"] == {"value": 0.25, "low": 0.2, "high": 0.3}
    assert [cluster["share"] for cluster in card["clusters"]] == [0.5, 0.25, 0.125]
    lost = found["ablation"]["lost"]["mean"]
    left = {j: (j + 6) % 10 / 10 for j in live_latents(index)}
    n_active = index.table()["n_active"].to_numpy()
    assert lost["latent"] == sorted(left, key=lambda j: (left[j], -n_active[j], j))[:25]
    assert lost["retained"] == pytest.approx([left[j] for j in lost["latent"]])
    assert found["ablation"]["fires"]["readings"]["by_dfa"]["latent"] == []


def test_measures_of_all_features_are_beside_their_nulls(index: FeatureIndex, bare: FeatureIndex) -> None:
    found = IndexFamilies(index).family("induction")["measures"]
    assert found["induction features"]["null"] == {"value": 0.05, "low": 0.0, "high": 0.1}
    grid = IndexHeads(index).heads()["superposition"]
    assert grid["measures"]["made by several heads"]["value"] == 0.75
    add_induction(bare)
    assert IndexFamilies(bare).family("induction")["measures"] == {}
    assert IndexHeads(bare).heads()["superposition"]["missing"]


def test_a_head_of_another_layer_has_scores_only(index: FeatureIndex) -> None:
    found = IndexHeads(index).head("0.1")
    assert found["features"] is None
    assert found["scores"]["roles"] == ["induction", "copying"]


def test_without_tables_the_index_alone_is_shown_and_the_command_named(bare: FeatureIndex) -> None:
    heads = IndexHeads(bare)
    grid = heads.heads()
    assert grid["scores"]["command"] == "headscope study heads INDEX"
    assert {head["scores"] for layer in grid["layers"] for head in layer} == {None}
    found = heads.head("1.0")
    assert all("no table" in found[part]["missing"] for part in ("scores", "catalogue", "ablation"))
    assert found["features"]["lists"]["dfa"]["latent"]
    assert found["families"] == {"n": found["features"]["lists"]["dfa"]["n"], "verdicts": {}, "kinds": {}}


def test_a_damaged_table_is_refused_in_words_and_the_rest_is_shown(index: FeatureIndex, tmp_path: Path) -> None:
    shutil.copytree(index.folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "heads" / "scores.parquet").write_bytes(b"PAR1")
    found = IndexHeads(FeatureIndex.open(tmp_path / "damaged")).head("1.0")
    assert "refused" in found["scores"]["missing"]
    assert found["catalogue"]["missing"] is None


# -------------------------------------------------------------------------------------------------------------- routes
def test_pages_are_the_shell_and_their_json_is_strict(client: TestClient, index: FeatureIndex) -> None:
    shell = client.get("/").content
    for path in ("/families", "/family/induction?t=0.4&head=1.1", "/heads", "/head/1.2", "/head/nonsense"):
        assert client.get(path).content == shell
    assert client.get("/api/about").json()["pages"] is True
    families, heads = IndexFamilies(index), IndexHeads(index)
    assert client.get("/api/family/induction/1.1").json() == json.loads(
        json.dumps(families.family("induction", "1.1"), allow_nan=False)
    )
    assert client.get("/api/head/1.2").json() == json.loads(json.dumps(heads.head("1.2"), allow_nan=False))


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bytes_are_not_sent_twice(client: TestClient, path: str) -> None:
    first = client.get(f"/api/{path}")
    assert first.status_code == 200
    assert client.get(f"/api/{path}", headers={"if-none-match": first.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    "path",
    [
        "family/nonsense",
        "family/" + 5000 * "x",
        "family/induction/9.9",
        "family/induction/6",
        "family/token/1.1",
        "family/%3Cimg%20src=x%3E",
        "head/1.99",
        "head/2.0",
        "head/-1.0",
        "head/1",
        "head/01.0",
        "head/1.٣",
        "head/1.0.0",
        "head/" + 5000 * "9" + ".0",
    ],
)
def test_what_there_is_not_is_a_404_in_words(client: TestClient, path: str) -> None:
    answer = client.get(f"/api/{path}")
    assert answer.status_code == 404
    assert "there is no" in answer.json()["error"]
    assert len(answer.json()["error"]) < 300
    assert answer.headers["content-type"] == "application/json"


def test_writing_and_other_sites_are_refused(client: TestClient) -> None:
    for path in PATHS:
        assert client.post(f"/api/{path}").status_code in (403, 405)
        assert client.get(f"/api/{path}", headers={"origin": "http://evil.example"}).status_code == 403


def test_many_at_once_get_the_same(client: TestClient, index: FeatureIndex) -> None:
    alone = {path: client.get(f"/api/{path}").content for path in PATHS}
    with serving(make_app(IndexCards(index), roles=pages_of(index))) as address, ThreadPoolExecutor(12) as pool:
        found = pool.map(lambda path: (path, urlopen(f"{address}/api/{path}", timeout=30).read()), 8 * PATHS)
        assert all(content == alone[path] for path, content in found)


def test_a_server_without_pages_has_none_of_the_routes(index: FeatureIndex) -> None:
    client = TestClient(make_app(IndexCards(index)), base_url=BASE)
    assert client.get("/api/about").json()["pages"] is False
    assert client.get("/families").status_code == 404
    assert client.get("/api/heads").status_code == 404


# -------------------------------------------------------------------------------------------------------------- export
def unpacked(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


def test_an_exported_folder_holds_what_the_server_answers(
    index: FeatureIndex, client: TestClient, tmp_path: Path
) -> None:
    site = export_folder(IndexCards(index), tmp_path / "site", range(10), roles=pages_of(index))
    for path in PATHS:
        assert unpacked(site / "pages" / f"{path}.json.gz") == client.get(f"/api/{path}").json()
    n_heads, n_layers = index.n_heads, index.manifest["model"]["n_layers"]
    assert len(list((site / "pages").rglob("*.json.gz"))) == 2 + 4 + n_heads + n_heads * n_layers
    page = (site / "index.html").read_text()
    assert "class FamilyPages" in page
    assert "class HeadPages" in page
    assert ".grid-cell" in page
    assert str(index.folder) not in page
    assert unpacked(site / "core.json.gz")["about"]["pages"] is True


def test_an_export_without_pages_has_none_of_their_scripts(index: FeatureIndex, tmp_path: Path) -> None:
    file = export_html(IndexCards(index), tmp_path / "page.html", range(3)).read_text()
    folder = export_folder(IndexCards(index), tmp_path / "site", range(3))
    for page in (file, (folder / "index.html").read_text()):
        assert "class FamilyPages" not in page
        assert ".grid-cell" not in page
    assert not (folder / "pages").exists()
    assert unpacked(folder / "core.json.gz")["about"]["pages"] is False
