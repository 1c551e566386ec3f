"""A study is one value: what is registered is found by the page, the command line, `study all` and the report."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from browsing import CHROMIUM, quiet_page, serving
from dive_index import COMMON, DEAD, N_LATENTS, built_live
from headscope import cli, jobs
from headscope.encode import encode
from headscope.errors import IndexFormatError, OptionError, StudyError
from headscope.explorer.cards import IndexCards
from headscope.explorer.export import export_html
from headscope.explorer.server import make_app
from headscope.explorer.studies import packed
from headscope.index.columns import add_columns, studies
from headscope.index.head_records import HeadTables
from headscope.index.live import LiveIndex
from headscope.limits import Count, Share
from headscope.proxies.search_table import Summary
from headscope.report.records import QUICK, Exemplar
from headscope.report.registry import sections
from headscope.report.subject import Subject as ReportSubject
from headscope.stats import Measure
from headscope.studies.induction.store import InductionFamily
from headscope.studies.registry import STUDIES, dictionary_studies, feature_studies, register
from headscope.studies.study import DictionaryStudy, FeatureStudy, NoOptions, Tab, parse_options
from headscope.studies.subject import Subject
from headscope.studies.what.effects import DirectEffects

BASE = "http://127.0.0.1:8000"
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "headscope"
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    least: Count = 1
    """Tokens."""


@dataclass(frozen=True)
class Toy:
    latent: int
    largest: Measure
    histogram: np.ndarray
    notes: tuple[str, ...] = field(default=("a note",))


def run_toy(subject: Subject, latent: int, options: ToyOptions) -> Toy:
    feature = subject.index.feature(latent)
    measure = Measure("the largest activation", options.least, value=feature.maximum, missing="it never fires")
    return Toy(latent, measure, np.array([1.0, np.nan, 0.1 + 0.2]))


TOY = FeatureStudy(
    name="toy",
    group="what",
    question="how large is it?",
    run=run_toy,
    options=ToyOptions,
    tabs=(Tab("toy", "Toy"),),
    in_report=True,
)


def run_all(subject: Subject, _options: NoOptions) -> Toy:
    table = pa.table({"latent": pa.array(range(N_LATENTS), pa.int32()), "size": [1.0] * N_LATENTS})
    add_columns(subject.index, "toys", table, {"settings": {}, "definitions": {"size": "1"}, "n": N_LATENTS})
    subject.progress("toys", 1, 1)
    return Toy(0, Measure("all of them", N_LATENTS, value=1.0), np.zeros(1))


TOYS = DictionaryStudy(name="toys", group="what", question="how large are they?", run=run_all, columns="toys")


@pytest.fixture(scope="module")
def live(random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    return built_live(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("studies") / "index")


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two studies, registered as a package's are; no study of headscope needs a model meanwhile."""
    monkeypatch.setattr("headscope.studies.registry.STUDIES", STUDIES)  # put back as it was
    before = dict(STUDIES)
    for name in [study.name for study in dictionary_studies()]:
        STUDIES.pop(name)
    register(TOY)
    register(TOYS)
    yield
    STUDIES.clear()
    STUDIES.update(before)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    cli.main(["study", *map(str, arguments)])
    return capsys.readouterr().out


def test_the_page_has_its_address_and_its_tab(live: LiveIndex, toys: None) -> None:
    client = TestClient(make_app(IndexCards(live.index), subject=Subject(live.index)), base_url=BASE)
    [listed] = [study for study in client.get("/api/about").json()["studies"] if study["name"] == "toy"]
    assert listed["tabs"] == [{"name": "toy", "label": "Toy"}]
    answer = client.get(f"/api/study/toy/{COMMON}?least=7").json()
    assert answer["largest"]["value"] == pytest.approx(live.index.feature(COMMON).maximum, rel=1e-6)
    assert answer["largest"]["n"] == 7
    assert answer["histogram"] == [1.0, None, 0.3]
    assert (answer["latent"], answer["notes"]) == (COMMON, ["a note"])
    assert client.get(f"/api/study/toy/{COMMON}?least=0").status_code == 400
    assert client.get(f"/api/study/toys/{COMMON}").status_code == 404, "it is of no single feature"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_its_tab_is_drawn_from_its_record(browser: Browser, live: LiveIndex, toys: None, tmp_path: Path) -> None:
    subject = Subject(live.index)
    studies = {COMMON: packed(subject, COMMON)}
    file = export_html(IndexCards(live.index), tmp_path / "page.html", [COMMON], studies=studies)
    with (
        serving(make_app(IndexCards(live.index), subject=subject)) as url,
        quiet_page(browser, viewport={"width": 1280, "height": 800}) as page,
    ):
        for address in (f"{url}/f/{COMMON}?tab=toy", f"file://{file}#/f/{COMMON}?tab=toy"):
            page.goto(address)
            expect(page.locator("[data-tab=toy]")).to_have_attribute("aria-selected", "true")
            expect(page.locator("[data-record] [data-definition]")).to_contain_text("how large is it?")
            expect(page.locator("[data-record] [data-measure=largest]")).to_be_visible()
            expect(page.locator("[data-record] [data-values]")).to_contain_text("a note")
            page.click("[data-tab=logits]")
            expect(page.locator("[data-record]")).to_be_hidden()


def test_the_command_line_runs_it(live: LiveIndex, toys: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "largest: " in printed(capsys, "toy", live.index.folder, COMMON)
    told = json.loads(printed(capsys, "toy", live.index.folder, COMMON, "--json", "--least", 3))
    assert told["largest"]["n"] == 3
    assert jobs.study("toy", live.index.folder, COMMON, least=5).largest.n == 5


def test_all_studies_of_a_dictionary_are_run_once(
    live: LiveIndex, toys: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "toys" not in studies(live.index.folder)
    assert "toys:" in printed(capsys, "all", live.index.folder)
    assert "toys" in studies(live.index.folder)
    assert jobs.study_all(live.index.folder) == {}, "it was run"
    assert set(jobs.study_all(live.index.folder, again=True)) == {"toys"}
    Path(live.index.folder, "columns", "toys.parquet").unlink()


def test_a_file_of_a_feature_holds_it(live: LiveIndex, toys: None) -> None:
    held = packed(Subject(live.index), COMMON)["studies"]
    assert held["toy {}"] == TOY.answer(Subject(live.index), COMMON)


def test_the_report_has_a_row_for_each_of_its_measures(live: LiveIndex, toys: None) -> None:
    section = next(section for section in sections() if section.name == "toy")
    exemplar = Exemplar("induction", COMMON, "token_in([#5])", 0.5, 5, (), "chosen")
    [claim] = section.run(ReportSubject("random", live, (exemplar,), QUICK))
    assert claim.ours == pytest.approx(live.index.feature(COMMON).maximum)
    assert (claim.definition, claim.n, claim.feature) == ("the largest activation", 1, COMMON)
    assert "how large is it?" in claim.claim


def test_a_name_is_given_once(toys: None) -> None:
    with pytest.raises(StudyError, match="two studies called 'toy'"):
        register(TOY)


@pytest.mark.parametrize("record", [InductionFamily, DirectEffects, HeadTables, Summary])
def test_studies_of_a_dictionary_end_with_a_summary_in_words(record: type) -> None:
    assert callable(record.lines)


def test_what_cannot_be_asked_is_refused(live: LiveIndex, toys: None) -> None:
    folder = live.index.folder
    with pytest.raises(StudyError, match=r"(?s)no study 'tyo'.*did you mean toy"):
        jobs.study("tyo", folder, COMMON)
    with pytest.raises(StudyError, match="no feature for toy"):
        jobs.study("toy", folder)
    with pytest.raises(OptionError, match=r"(?s)options of toy.*most"):
        jobs.study("toy", folder, COMMON, most=3)
    with pytest.raises(IndexFormatError, match=f"latent {N_LATENTS}"):
        jobs.study("toy", folder, N_LATENTS)
    with pytest.raises(StudyError, match="no model to run"):
        STUDIES["compare_heads"].record(Subject(live.index), DEAD, STUDIES["compare_heads"].options(at=3))


def test_every_study_asks_a_question_and_every_tab_has_a_name_of_its_own() -> None:
    tabs = [tab.name for study in feature_studies() for tab in study.tabs]
    assert len(set(tabs)) == len(tabs)
    for study in STUDIES.values():
        assert study.question.rstrip(".").endswith(("?", "rest"))
        assert study.name.isidentifier()


def test_records_become_json_with_every_float_short_and_none_that_is_not_finite() -> None:
    record = Toy(np.int64(3), Measure("a share", 2, value=float("nan"), by_document=(0.1, 1 / 3)), np.ones((2, 2)))
    told: Any = encode(record)
    assert told["latent"] == 3
    assert told["largest"]["value"] is None
    assert told["largest"]["by_document"] == [0.1, 0.3333333]
    assert told["histogram"] == [[1.0, 1.0], [1.0, 1.0]]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    with pytest.raises(TypeError, match="a set has no form in JSON"):
        encode({1})


def test_the_study_of_the_document_works_as_it_says(
    live: LiveIndex, toys: None, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", EXTENDING, re.DOTALL | re.MULTILINE)
    exec(code, {"__name__": "early"})
    position = live.index.activations(COMMON).position % live.index.block_size
    share = (position < 16).mean()
    assert f"share: {share:.4g} [" in printed(capsys, "early", live.index.folder, COMMON, "--tokens", 16)
    found = jobs.study("early", live.index.folder, COMMON, tokens=16)
    assert (found.share.value, found.share.n) == (pytest.approx(share), len(position))
    client = TestClient(make_app(IndexCards(live.index), subject=Subject(live.index)), base_url=BASE)
    assert client.get(f"/api/study/early/{COMMON}?tokens=16").json()["share"]["value"] == pytest.approx(share, rel=1e-6)
    assert any(section.name == "early" for section in sections())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:[\w]+/)*[\w]+\.(?:py|js|md))`", EXTENDING))))
def test_the_files_that_the_document_names_exist(path: str) -> None:
    rooms = [ROOT, SOURCE, SOURCE / "index", SOURCE / "explorer", SOURCE / "explorer" / "static"]
    assert any((room / path).is_file() for room in rooms), path


@dataclass(frozen=True, kw_only=True)
class Odd:
    share: Share = 0.5
    flag: bool = False
    maybe: Count | None = None
    names: tuple[str, ...] = ()
    more: tuple[Count, ...] = field(default_factory=tuple)


def odd(name: str, record: Any, **more: Any) -> FeatureStudy:
    return FeatureStudy(name=name, group="what", question="?", run=lambda *_: record, options=Odd, **more)


def test_options_of_every_type_are_read_from_an_address() -> None:
    given = {"share": ["0.3"], "flag": ["true"], "maybe": ["4"], "names": ["a,b,a"], "more": ["1,2"]}
    assert parse_options(odd("x", 1), given) == Odd(share=0.3, flag=True, maybe=4, names=("a", "b"), more=(1, 2))
    assert parse_options(odd("x", 1), {}) == Odd()
    for name, said in (("share", "a number"), ("flag", "true or false"), ("maybe", "a whole number")):
        with pytest.raises(StudyError, match=said):
            parse_options(odd("x", 1), {name: ["no"]})


@pytest.mark.parametrize(
    "record",
    [None, 3, (1, 2), {1, 2}, {"of": {1}}, {"of": np.array([1j])}, {"of": np.array([object()])}, {"corpus": "mine"}],
    ids=range(8),
)
def test_a_record_that_a_page_cannot_have_is_refused_by_the_name_of_its_study(live: LiveIndex, record: Any) -> None:
    with pytest.raises(StudyError, match="strange found"):
        odd("strange", record).answer(Subject(live.index), COMMON)


def test_an_option_with_a_name_of_the_command_is_refused(toys: None) -> None:
    options = make_dataclass("Options", [("model", str, "x")], frozen=True, kw_only=True)
    with pytest.raises(StudyError, match="an option called 'model' of taken"):
        register(FeatureStudy(name="taken", group="what", question="?", run=run_toy, options=options))


def test_one_study_that_fails_loses_no_other(live: LiveIndex, toys: None) -> None:
    def fails(*_: Any) -> None:
        raise StudyError("nothing to see", expected="something", do="look elsewhere")

    register(FeatureStudy(name="fails", group="what", question="why?", run=fails, in_report=True))
    held = packed(Subject(live.index), COMMON)["studies"]
    assert held["fails {}"] == {"missing": "nothing to see; expected: something"}
    assert held["toy {}"]["latent"] == COMMON
    section = next(section for section in sections() if section.name == "fails")
    exemplars = tuple(Exemplar("induction", latent, "token_in([#5])", 0.5, 5, (), "-") for latent in (COMMON, DEAD))
    claims = section.run(ReportSubject("random", live, exemplars, QUICK))
    assert [(claim.feature, claim.missing) for claim in claims] == [
        (latent, "nothing to see; expected: something") for latent in (COMMON, DEAD)
    ]


def test_text_shows_what_is_missing_and_numbers_of_numpy(live: LiveIndex, toys: None, capsys) -> None:
    register(odd("numbers", {"none": None, "single": np.float32(0.5), "whole": np.int64(3)}))
    shown = printed(capsys, "numbers", live.index.folder, COMMON)
    assert {"none: none", "single: 0.5", "whole: 3"} <= set(shown.splitlines())


def test_a_package_whose_study_cannot_be_loaded_is_left_out_by_name(tmp_path: Path) -> None:
    package = tmp_path / "broken-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[headscope.studies]\nbroken = no_such_module:STUDY\n")
    code = "from headscope.studies.registry import STUDIES; print(len(STUDIES))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == len(STUDIES)
    assert "the study no_such_module:STUDY is left out: ModuleNotFoundError" in done.stderr
