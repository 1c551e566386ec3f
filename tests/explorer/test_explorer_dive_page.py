"""The deep-dive tabs in a browser: what they show, the workbench, hostile proxies, links and keys, the file."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from browsing import CHROMIUM, quiet_page, serving
from dive_index import COMMON, DEAD, HOSTILE_NAME, N_LATENTS, RARE, built
from headscope import jobs
from headscope.explorer.cards import IndexCards
from headscope.explorer.server import make_app
from headscope.explorer.start import start_json
from headscope.index.columns import add_columns
from headscope.index.store import FeatureIndex
from headscope.stats import Estimate, Measure
from headscope.studies.subject import Subject
from headscope.studies.what.downstream import Downstream, PathEffect, logit_effect
from headscope.studies.when.records import PredictionGroup, Predictions
from headscope.studies.when.sensitivity import adjudicate
from headscope.studies.when.specificity import specificity
from studied import ask
from studied import dived as dive_of

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

PROXY = 'token_in(["a", "b", "c", "d", "e", "f"])'
OTHER = '~token_in(["a"])'
NULL = Estimate(0.125, -0.25, 0.5)
HOSTILE = '<img src=x onerror=alert(1)></script>"\u202e'


class FakeEffects:
    """Effects that are known: the loss rises by the activation, or falls where the token is even."""

    def __init__(self, index: FeatureIndex) -> None:
        self.index = index
        self.asked: list[int] = []

    def subject(self, monkeypatch: pytest.MonkeyPatch) -> Subject:
        """Studies that need the model are asked of this."""
        folder = "headscope.studies"
        monkeypatch.setattr(
            f"{folder}.what.ablation.downstream", lambda _live, latents, **_: [self.downstream(*latents)]
        )
        monkeypatch.setattr(f"{folder}.when.predictions.predictions", lambda _i, _m, *of: self.predictions(*of))
        subject = Subject(self.index)
        subject._live = SimpleNamespace(model=None)
        return subject

    def downstream(self, latent: int) -> Downstream:
        self.asked.append(latent)
        active, size = self.index.activations(latent), self.index.block_size
        kept = active.position % size < size - 1
        position, activation = active.position[kept], active.activation[kept].astype(np.float64)
        tokens = np.concatenate([self.index.tokens_of(block) for block in range(self.index.n_blocks)])
        change = np.where(tokens[position] % 2 == 0, -activation, activation)
        mean = Measure("mean change of the loss", len(position), value=float(change.mean()), null=NULL)
        return Downstream(
            latent=latent,
            layer=1,
            baseline="error kept",
            where="everywhere",
            norms="recomputed",
            n_active=len(position),
            position=position,
            activation=activation,
            next_token=tokens[position + 1],
            document=position // size,
            loss=np.full(len(position), 2.0),
            paths={
                name: PathEffect(name, f"the path {name}", change * part, None, mean)
                for name, part in (("total", 1.0), ("direct", 0.7), ("mlp.1", 0.2))
            },
            notes=("what there is to know",),
        )

    def predictions(self, latent: int, proxy: str) -> Predictions:
        groups = [
            PredictionGroup(name, 40, np.arange(2), np.array([0.25, p]), Measure("mean p", 40, value=p))
            for name, p in (("false negatives", 0.125), ("true positives", 0.5), ("elsewhere", 0.0))
        ]
        return Predictions(latent, proxy, (5,), *groups, Measure("which is larger", 80, missing="too few"))


@pytest.fixture(scope="module")
def index(random_model, random_corpus, random_sae, tmp_path_factory) -> FeatureIndex:
    return built(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("pages") / "index")


@pytest.fixture(scope="module")
def dives(index: FeatureIndex) -> Subject:
    return Subject(index)


@pytest.fixture(scope="module")
def address(index: FeatureIndex, dives: Subject) -> Iterator[str]:
    with serving(make_app(IndexCards(index), subject=dives)) as url:
        yield url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which any script error, dialog or request elsewhere fails the test; a refused proxy is no error."""
    with quiet_page(browser, allowed="400 (Bad Request)", viewport={"width": 1280, "height": 800}) as page:
        page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        yield page


def opened(page: Page, tab: str) -> None:
    """Wait for a tab to be drawn."""
    expect(page.locator(f"[data-tab-shown='{tab}']")).to_be_visible()


def link(address: str, tab: str, latent: int = COMMON, proxy: str = PROXY) -> str:
    return f"{address}/f/{latent}?tab={tab}&p={proxy}".replace(" ", "%20").replace("&p=", "&p=").replace('"', "%22")


def downloaded(page: Page) -> list[list[str]]:
    with page.expect_download() as caught:
        page.click("[data-csv]")
    assert caught.value.suggested_filename.endswith(f"-{COMMON}.csv")
    with Path(caught.value.path()).open(newline="") as file:
        return list(csv.reader(file))


# --- what the tabs show


def test_the_first_screen_loads_none_of_their_scripts(page: Page, address: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rsplit("/", 1)[-1]))
    page.goto(f"{address}/f/{COMMON}")
    expect(page.locator("[data-position]")).to_be_visible()
    assert "dive.js" not in asked
    assert "dashboard.js" not in asked
    page.click("[data-tab=specificity]")
    opened(page, "specificity")
    assert "dive.js" in asked


@pytest.mark.smoke
def test_specificity(page: Page, address: str, dives: Subject) -> None:
    dive = dive_of(dives, COMMON, PROXY)
    page.goto(link(address, "specificity"))
    opened(page, "specificity")
    counts = dive["counts"]
    expect(page.locator("[data-said]")).to_contain_text(f"true on {counts['n_proxy']} of {counts['n_tokens']:,} tokens")
    expect(page.locator("[data-definition]")).to_contain_text(f"n = {counts['n_active']:,} active tokens")
    expect(page.locator("[data-definition]")).to_contain_text("random, all")
    bars = page.locator("[data-chart=specificity] .part-inside")
    assert bars.count() == sum(n > 0 for n in dive["histogram"]["true"])
    heights = bars.evaluate_all("bars => bars.map(bar => [bar.dataset.bin, bar.getAttribute('height')])")
    largest = max(heights, key=lambda pair: float(pair[1]))[0]
    assert dive["histogram"]["true"][int(largest)] == max(dive["histogram"]["true"])
    precision = page.locator("[data-measure=precision] td b")
    expect(precision).to_have_text(f"{dive['measures']['precision']['value']:.1%}".replace("%", "\u202f%"))
    some = next(r for r in reversed(dive["ranges"]) if r["rows"])
    first = dive["contexts"][some["rows"][0]]
    shown = page.locator(f"[data-context='{first['block']}.{first['dst']}']").first
    expect(shown.locator(".tok.dst")).to_have_attribute("data-pos", str(first["dst"]))
    proxied = shown.locator(".tok.proxied").evaluate_all("tokens => tokens.map(token => +token.dataset.pos)")
    assert proxied == first["proxy"]
    on = shown.locator(".tok.on").evaluate_all("tokens => tokens.map(token => +token.dataset.pos)")
    assert on == [position for position, _ in first["on"]]


def test_the_threshold_is_read_off_and_kept_in_the_link(page: Page, address: str, dives: Subject) -> None:
    along = dive_of(dives, COMMON, PROXY)["by_threshold"]
    page.goto(link(address, "specificity"))
    opened(page, "specificity")
    expect(page.locator("[data-reading]")).to_contain_text(f"f > 0.00: {along['n'][0]:,} tokens")
    page.focus("[data-threshold]")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(page.locator("[data-reading]")).to_contain_text(f": {along['n'][10]:,} tokens")
    expect(page.locator("[data-threshold]")).to_be_focused()
    assert "at=10" in page.url
    page.reload()
    opened(page, "specificity")
    expect(page.locator("[data-threshold]")).to_have_value("10")


def test_expected_value_has_both_normalisations(page: Page, address: str) -> None:
    page.goto(link(address, "expected"))
    opened(page, "expected")
    expect(page.locator("[data-definition]")).to_contain_text("all text tokens")
    page.click("[data-choice='norm:1']")
    expect(page.locator("[data-definition]")).to_contain_text("the post's code")
    assert "norm=1" in page.url


def test_sensitivity_and_verdicts(page: Page, address: str, index: FeatureIndex, dives: Subject) -> None:
    dive = dive_of(dives, COMMON, PROXY)
    page.goto(link(address, "sensitivity"))
    opened(page, "sensitivity")
    for chart in ("pr", "roc"):
        expect(page.locator(f"[data-chart={chart}] .curve")).to_have_attribute("d", re.compile("^M"))
    expect(page.locator("[data-measure]")).to_have_count(6)
    expect(page.locator("[data-subtypes] tr")).to_have_count(1 + len(dive["subtypes"]))
    first, second = dive["misses"]["rows"][:2]
    page.click(f"[data-choice='verdict-{first}:miss']")
    page.click(f"[data-choice='verdict-{second}:proxy wrong']")
    expect(page.locator("[data-verdicts]")).to_have_text("2 judged: 1 miss, 1 proxy wrong, 0 unclear")
    page.reload()
    opened(page, "sensitivity")
    expect(page.locator(f"[data-choice='verdict-{first}:miss']")).to_have_attribute("aria-pressed", "true")
    rows = downloaded(page)
    at = next(i for i, row in enumerate(rows) if row[:2] == ["verdict", "corpus_position"])
    given: Any = {int(row[1]): row[0] for row in rows[at + 1 :] if row[0]}
    found = specificity(index, COMMON, PROXY).sensitivity
    assert given == {int(found.sample[0]): "miss", int(found.sample[1]): "proxy wrong"}
    judged = adjudicate(found, given)
    assert (judged.n_judged, judged.misses and judged.misses.value) == (2, 0.5)


def test_every_tab_states_what_it_is_and_gives_its_data_and_its_call(page: Page, address: str) -> None:
    for tab in ("specificity", "expected", "sensitivity", "logits"):
        page.goto(link(address, tab))
        opened(page, tab)
        assert page.locator("[data-definition]").inner_text().strip()
        page.click("[data-show-python]")
        code = page.locator("[data-python-text]").inner_text()
        exec(code, {})
        rows = downloaded(page)
        assert len(rows) > 5
        assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row), "no formula to a spreadsheet"


def test_the_file_of_a_tab_has_its_numbers(page: Page, address: str, dives: Subject) -> None:
    page.goto(link(address, "specificity"))
    opened(page, "specificity")
    dive, rows = dive_of(dives, COMMON, PROXY), downloaded(page)
    assert [int(row[2]) for row in rows[1:101]] == dive["histogram"]["true"]
    texts = [row for row in rows if len(row) == 9 and row[2].startswith('"')]
    assert texts
    assert all(json.loads(row[2]).startswith(HOSTILE_NAME) for row in texts)


def test_logits_are_listed_whole(page: Page, address: str, index: FeatureIndex) -> None:
    page.goto(link(address, "logits"))
    opened(page, "logits")
    expect(page.locator("[data-logit-list=positive] li")).to_have_count(20)
    expect(page.locator("[data-proxy]")).to_be_hidden()
    effect = logit_effect(index, COMMON)
    expect(page.locator("[data-prominence]")).to_have_text(f"{effect.prominence:.3f}")
    expect(page.locator("[data-copied-source]")).to_have_attribute("data-copied-source", str(effect.copied).lower())
    expect(page.locator("[data-copied-source]")).to_contain_text("Copied: " if effect.copied else "Not copied: ")
    rows = downloaded(page)
    said = {row[0]: row[1] for row in rows if row}
    assert (said["copied"], said["top_source"]) == (str(effect.copied).lower(), str(effect.top_source))
    assert float(said["prominence"]) == pytest.approx(effect.prominence, rel=1e-5)
    assert [float(row[3]) for row in rows[1:21]] == pytest.approx(
        [value for _, value in index.feature(COMMON).logit_top], rel=1e-3
    )


@pytest.mark.parametrize(
    ("copied", "source", "said"),
    [(True, 5, "Copied: "), (False, 6, "Not copied: "), (None, None, "No source tokens are known")],
)
def test_whether_the_top_logit_is_copied_is_said(
    page: Page, address: str, copied: bool | None, source: int | None, said: str
) -> None:
    def changed(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"copied": copied, "top_source": source})

    page.route(re.compile("/api/study/logits/"), changed)
    page.goto(link(address, "logits"))
    opened(page, "logits")
    expect(page.locator("[data-copied-source]")).to_have_text(re.compile(f"^{said}"))
    assert len(downloaded(page)) > 40


# --- ablation


def test_without_a_model_the_tab_says_how_to_get_one(page: Page, address: str) -> None:
    page.goto(link(address, "ablation"))
    opened(page, "ablation")
    expect(page.locator("[data-nothing]")).to_contain_text("no loss effects yet")
    expect(page.locator("[data-advice]")).to_contain_text("headscope study effects")
    expect(page.locator("[data-advice]")).to_contain_text("serve --with-model")


def test_columns_of_effects_say_the_n_of_this_feature(page: Page, index: FeatureIndex, tmp_path: Path) -> None:
    copy = FeatureIndex.open(shutil.copytree(index.folder, tmp_path / "copy"))
    own = {
        "n": [1234 + latent for latent in range(N_LATENTS)],
        "sampled": [500] * N_LATENTS,
        "mean": [0.25] * N_LATENTS,
        "mean_low": [0.125] * N_LATENTS,
        "mean_high": [0.5] * N_LATENTS,
    }
    table = pa.table({"latent": pa.array(range(N_LATENTS), pa.int32()), **own})
    add_columns(copy, "effects", table, {"settings": {}, "definitions": dict.fromkeys(own, "-"), "n": 15_491_274})
    corpus = copy.manifest["corpus"]
    with serving(make_app(IndexCards(copy), subject=Subject(copy))) as address:
        page.goto(link(address, "ablation"))
        opened(page, "ablation")
        said = f"n = 500 of {1234 + COMMON:,} active tokens of {corpus['name']}, {corpus['split']}."
        expect(page.locator("[data-definition]")).to_contain_text(said)
        expect(page.locator("[data-definition]")).not_to_contain_text("15")
        expect(page.locator("[data-provenance=effects]")).to_contain_text("n over all features = 15,491,274;")
        names = page.locator("[data-columns=effects] th").all_inner_texts()
        assert names == ["active tokens with a next one", "of these, looked at", "mean loss change"]
        expect(page.locator("[data-column=mean] td").first).to_have_text("0.25000 [0.125, 0.500]")


def test_effects_of_a_model_by_path(page: Page, index: FeatureIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = FakeEffects(index)
    dives = effects.subject(monkeypatch)
    with serving(make_app(IndexCards(index), subject=dives)) as address:
        page.goto(link(address, "ablation"))
        opened(page, "ablation")
        expect(page.locator("[data-path]")).to_have_count(3)
        expect(page.locator("[data-series=mlp\\.1]")).to_be_visible()
        expect(page.locator("[data-interaction]")).to_be_visible()
        record, found = effects.downstream(COMMON), ask(dives, "ablation", COMMON, proxy=PROXY)
        worst = found["contexts"][found["worst"]["rows"][0]]
        assert (
            worst["block"] * index.block_size + worst["dst"] == record.position[np.argmax(record.paths["total"].change)]
        )
        row = page.locator(f"[data-context='{worst['block']}.{worst['dst']}']").first
        red = row.locator(".tok.worse").evaluate_all("tokens => tokens.map(token => +token.dataset.pos)")
        blue = row.locator(".tok.better").evaluate_all("tokens => tokens.map(token => +token.dataset.pos)")
        assert red == [p + 1 for p, change in worst["change"] if change > 0 and p < worst["dst"] + 16]
        assert blue == [p + 1 for p, change in worst["change"] if change < 0 and p < worst["dst"] + 16]
        rows = downloaded(page)
        assert rows[0][6:9] == ["null", "null_low", "null_high"]
        total = next(row for row in rows if row[:2] == ["total", "mean change"])
        assert [float(value) for value in total[6:9]] == [NULL.value, NULL.low, NULL.high]
        page.click("[data-tab=sensitivity]")
        expect(page.locator("[data-predictions] [data-measure='true positives'] td b")).to_have_text("50.0\u202f%")
        expect(page.locator("[data-predictions] [data-measure=auc] [data-missing]")).to_have_text("too few")
        page.click("[data-tab=ablation]")
        page.fill("[data-proxy]", OTHER)
        expect(page.locator("[data-paths] th[scope=col]").last).to_contain_text("proxy true")
        expect(page).to_have_url(re.compile(r"[?&].*%7E"))
        assert effects.asked.count(COMMON) == 2, "the model was run once, whatever the proxy; once more by this test"


# --- the workbench


def test_a_proxy_is_shown_as_it_is_typed(page: Page, address: str, dives: Subject) -> None:
    page.goto(link(address, "specificity"))
    opened(page, "specificity")
    page.keyboard.press("p")
    expect(page.locator("[data-proxy]")).to_be_focused()
    page.keyboard.type('token_in( ["b"] )')
    n = dive_of(dives, COMMON, 'token_in(["b"])')["counts"]["n_proxy"]
    expect(page.locator("[data-said]")).to_contain_text(f"true on {n} of")
    expect(page.locator("[data-canonical]")).to_have_text('read as token_in(["b"])')
    expect(page.locator("[data-proxy]")).to_be_focused()
    expect(page.locator("[data-proxy]")).to_have_value('token_in( ["b"] )')


def test_a_suggested_proxy_is_taken_with_a_press(page: Page, address: str, dives: Subject) -> None:
    page.goto(f"{address}/f/{COMMON}?tab=sensitivity")
    opened(page, "sensitivity")
    suggested = [one["proxy"] for one in start_json(dives, COMMON)["proxies"]]
    assert page.locator("[data-suggest]").all_inner_texts() == suggested
    expect(page.locator("[data-proxy]")).to_have_value(suggested[0])
    page.locator("[data-suggest]").nth(1).click()
    expect(page.locator("[data-proxy]")).to_have_value(suggested[1])
    expect(page.locator("[data-suggest]").nth(1)).to_have_attribute("aria-pressed", "true")
    opened(page, "sensitivity")


def test_what_is_wrong_with_a_proxy_is_said_with_its_place(page: Page, address: str) -> None:
    page.goto(link(address, "specificity"))
    opened(page, "specificity")
    page.fill("[data-proxy]", "induction(1)")
    expect(page.locator("[data-wrong]")).to_contain_text("column 11")
    expect(page.locator("[data-wrong] mark")).to_have_text("1")
    expect(page.locator("[data-wrong]")).to_contain_text("expected: ")
    expect(page.locator("[data-proxy]")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("[data-tab-shown]")).to_have_count(0)
    page.fill("[data-proxy]", 'token_in(["ab"])')
    expect(page.locator("[data-wrong]")).to_contain_text("2 pieces")
    page.fill("[data-proxy]", PROXY)
    opened(page, "specificity")
    expect(page.locator("[data-wrong]")).to_have_count(0)
    expect(page.locator("[data-proxy]")).not_to_have_attribute("aria-invalid", "true")


@pytest.mark.parametrize(
    "proxy",
    [
        HOSTILE,
        f'regex("{HOSTILE[:-2]}")',
        "__import__('os').system('true')",
        "((((" * 400,
        "\x00\ud7ff",
        "'; DROP TABLE",
    ],
)
def test_hostile_proxies_are_harmless(page: Page, address: str, proxy: str) -> None:
    page.goto(f"{address}/f/{COMMON}?tab=specificity")
    opened(page, "specificity")
    page.fill("[data-proxy]", proxy)
    expect(page.locator("[data-wrong], [data-note]").first).to_be_visible()
    assert page.locator("img").count() == 0
    expect(page.locator("[data-tab=specificity]")).to_be_visible()
    page.reload()
    expect(page.locator("[data-wrong], [data-note]").first).to_be_visible()
    assert page.locator("img").count() == 0


def test_hostile_names_of_documents_stay_text(page: Page, address: str) -> None:
    page.goto(link(address, "sensitivity"))
    opened(page, "sensitivity")
    expect(page.locator(".context .where").first).to_contain_text(HOSTILE_NAME)
    assert page.locator("img").count() == 0


def test_a_slow_answer_does_not_overtake_a_later_one(page: Page, address: str) -> None:
    def late(route: Route) -> None:
        page.wait_for_timeout(700)
        route.continue_()

    page.goto(link(address, "specificity"))
    opened(page, "specificity")
    page.route(re.compile("proxy=token_in.*%22b%22"), late)
    page.fill("[data-proxy]", 'token_in(["b"])')
    expect(page).to_have_url(re.compile(r"%22b%22"))
    page.fill("[data-proxy]", OTHER)
    expect(page.locator("[data-suggested] ~ [data-said]")).to_contain_text("proxy true on 1,7")
    page.wait_for_timeout(900)
    expect(page.locator("[data-said]")).to_contain_text("proxy true on 1,7")


# --- empties


def test_a_dead_feature_has_no_tabs_and_a_rare_one_names_the_minimum(page: Page, address: str) -> None:
    page.goto(link(address, "specificity", DEAD))
    expect(page.locator("[data-dead]")).to_be_visible()
    expect(page.locator("[data-tab]")).to_have_count(0)
    page.goto(link(address, "specificity", RARE))
    opened(page, "specificity")
    expect(page.locator("[data-measure=precision] [data-missing]")).to_contain_text("at least 30")
    assert "NaN" not in page.locator("body").inner_text()


@pytest.mark.parametrize("tab", ["specificity", "expected", "sensitivity"])
@pytest.mark.parametrize(("proxy", "note"), [('document("nothing")', "never true"), ('~document("nothing")', "every")])
def test_a_proxy_that_is_never_or_always_true_is_honest(
    page: Page, address: str, tab: str, proxy: str, note: str
) -> None:
    page.goto(link(address, tab, proxy=proxy))
    opened(page, tab)
    expect(page.locator("[data-note]").first).to_contain_text(note)
    text = page.locator("body").inner_text()
    assert "NaN" not in text
    assert "undefined" not in text
    assert "Infinity" not in text


# --- links, keys, sizes


def test_keys_and_tabs(page: Page, address: str) -> None:
    page.goto(f"{address}/f/{COMMON}")
    expect(page.locator("[data-position]")).to_be_visible()
    for key, tab in zip("56789", ("specificity", "expected", "sensitivity", "logits", "ablation"), strict=True):
        page.keyboard.press(key)
        opened(page, tab)
        expect(page.locator(f"[data-tab={tab}]")).to_have_attribute("aria-selected", "true")
        assert f"tab={tab}" in page.url
    page.focus("[data-tab=ablation]")
    page.keyboard.press("ArrowLeft")
    opened(page, "logits")
    expect(page.locator("[data-tab=logits]")).to_be_focused()
    page.keyboard.press("1")
    expect(page.locator("[data-group=top]")).to_be_visible()
    expect(page.locator("[data-study-body]")).to_be_hidden()
    page.keyboard.press("?")
    expect(page.locator("[data-help]")).to_contain_text("specificity, expected value, sensitivity, logits, ablation")


def test_a_link_brings_the_dive_back(page: Page, address: str) -> None:
    page.goto(f"{address}/f/{COMMON}")
    expect(page.locator("[data-position]")).to_be_visible()
    page.keyboard.press("7")
    opened(page, "sensitivity")
    page.fill("[data-proxy]", PROXY)
    expect(page).to_have_url(re.compile(r"[?&].*p="))
    url = page.url
    page.goto("about:blank")
    page.goto(url)
    opened(page, "sensitivity")
    expect(page.locator("[data-proxy]")).to_have_value(PROXY)
    page.click("[data-step=next]")
    expect(page.locator(f"[data-card='{COMMON}']")).to_have_count(0)
    assert "tab=sensitivity" in page.url
    assert "p=" not in page.url, "a proxy is of one feature"


@pytest.mark.parametrize("size", [{"width": 1280, "height": 800}, {"width": 390, "height": 844}])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_laptop_and_a_phone(browser: Browser, address: str, size: dict[str, int], scheme: Any) -> None:
    with quiet_page(browser, viewport=size, color_scheme=scheme) as page:
        expect.set_options(timeout=20_000)
        for tab in ("specificity", "sensitivity", "logits", "ablation"):
            page.goto(link(address, tab))
            opened(page, tab)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], tab


# --- the file


@pytest.fixture(scope="module")
def dived(index: FeatureIndex, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("dived") / "a dive.html"
    return jobs.dive(index.folder, COMMON, out, proxies=[PROXY, OTHER]).as_uri()


def test_the_dive_file_works_with_the_network_refused(page: Page, dived: str, dives: Subject) -> None:
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
    page.goto(dived)
    opened(page, "specificity")
    n = dive_of(dives, COMMON, PROXY)["counts"]["n_proxy"]
    expect(page.locator("[data-said]")).to_contain_text(f"true on {n} of")
    expect(page.locator(".context .tok.dst").first).to_be_visible()
    expect(page.locator("[data-proxy]")).to_have_attribute("readonly", "")
    page.locator("[data-suggest]").nth(1).click()
    expect(page.locator("[data-proxy]")).to_have_value(OTHER)
    opened(page, "specificity")
    for tab in ("expected", "sensitivity", "logits", "ablation"):
        page.click(f"[data-tab={tab}]")
        opened(page, tab)
    assert page.locator("img").count() == 0
    page.click("[data-tab=sensitivity]")
    opened(page, "sensitivity")
    assert len(downloaded(page)) > 50
    page.click(".brand")
    expect(page.locator("[data-table] a.row")).to_have_count(1)


def test_a_proxy_that_the_file_does_not_hold_is_said(page: Page, dived: str) -> None:
    page.goto(f"{dived}#/f/{COMMON}?tab=specificity&p=induction(%22a%22)")
    expect(page.locator("[data-wrong]")).to_contain_text("headscope serve")
