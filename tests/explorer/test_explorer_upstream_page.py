"""The tabs upstream in a browser: each shows the numbers of its study, keeps its link, and says what is missing."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from browsing import CHROMIUM, quiet_page, serving
from dive_index import COMMON, DEAD, RARE, built_live
from headscope.errors import HeadscopeError
from headscope.explorer.cards import IndexCards
from headscope.explorer.export import export_html
from headscope.explorer.server import make_app
from headscope.explorer.studies import packed
from headscope.index.live import LiveIndex
from headscope.site import Site
from headscope.studies.subject import Subject
from studied import ask

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

MLP = "<img src=x onerror=alert(1)>"
TABS = ("heads", "source", "attention", "upstream", "circuit")


@pytest.fixture(scope="module")
def live(random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    return built_live(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("upstream") / "index")


@pytest.fixture(scope="module")
def subject(live: LiveIndex, random_sae) -> Subject:
    return Subject(live.index, live, saes={MLP: random_sae(live.model, 40, site=Site("mlp_out", 0))})


@pytest.fixture(scope="module")
def address(live: LiveIndex, subject: Subject) -> Iterator[str]:
    with serving(make_app(IndexCards(live.index), subject=subject)) as url:
        yield url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with quiet_page(browser, allowed="400 (Bad Request)", viewport={"width": 1280, "height": 800}) as page:
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        yield page


@pytest.fixture(scope="module")
def at(live: LiveIndex) -> int:
    return live.index.examples(RARE)[0].examples[0].position


def shown(page: Page, tab: str) -> None:
    expect(page.locator(f"[data-up-body][data-tab-shown='{tab}']")).to_be_visible()
    expect(page.locator("[data-up-body]")).not_to_have_attribute("aria-busy", "true")


def downloaded(page: Page) -> list[list[str]]:
    with page.expect_download() as caught:
        page.locator("[data-upstream] [data-csv]").first.click()
    with Path(caught.value.path()).open(newline="") as file:
        return list(csv.reader(file))


def fits(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


# --- what the tabs show


def test_the_first_screen_and_other_tabs_load_none_of_their_scripts(page: Page, address: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rsplit("/", 1)[-1]))
    page.goto(f"{address}/f/{COMMON}")
    expect(page.locator("[data-position]")).to_be_visible()
    own = {"upstream.js", "headshares.js", "upsources.js", "patchmap.js", "circuit.js", "qk.js"}
    assert own.isdisjoint(asked)
    page.click("[data-tab=heads]")
    shown(page, "heads")
    assert own & set(asked) == {"upstream.js", "headshares.js"}


@pytest.mark.smoke
def test_dfa_by_head_shows_all_definitions_at_a_threshold(page: Page, address: str, subject: Subject) -> None:
    found = ask(subject, "head_shares", COMMON)
    page.goto(f"{address}/f/{COMMON}?tab=heads")
    shown(page, "heads")
    bars = ("squared", "covariance", "linear", "decoder", "decoder_out", "encoder", "encoder_in")
    for name in bars:
        values = page.locator(f"[data-bars={name}] [data-row]").evaluate_all(
            "rows => rows.map((row) => Number(row.dataset.value))"
        )
        weights = found["weights"].get(name)
        expected = weights["shares"] if weights else [head[name]["value"] for head in found["thresholds"][0]["heads"]]
        assert values == pytest.approx(expected)
    assert page.locator("[data-bars=squared] .whisker").count() == 4
    assert page.locator("[data-bars=squared] .chance").count() == 4
    page.locator("[data-upstream] [data-threshold]").fill("3")
    expect(page.locator("[data-upstream] [data-reading]")).to_contain_text(f"{found['thresholds'][3]['n']:,} active")
    page.locator("[data-upstream] [data-threshold]").dispatch_event("change")
    expect(page).to_have_url(f"{address}/f/{COMMON}?tab=heads&at=3")
    page.reload()
    shown(page, "heads")
    assert page.locator("[data-upstream] [data-threshold]").input_value() == "3"
    rows = downloaded(page)
    assert sum(row[:1] == ["squared 1.0"] for row in rows) == 8
    page.click("[data-upstream] [data-show-python]")
    expect(page.locator("[data-upstream] [data-python-text]")).to_contain_text("head_shares(index, 7")


def test_dfa_by_source_is_of_a_set_that_can_be_edited(
    page: Page, address: str, live: LiveIndex, subject: Subject
) -> None:
    a, b = (live.index.token_id(letter) for letter in "ab")
    page.goto(f"{address}/f/{COMMON}?tab=source&src={a}")
    shown(page, "source")
    expect(page.locator("[data-set-token]")).to_have_count(1)
    page.fill("[data-set-add]", "no such token")
    page.press("[data-set-add]", "Enter")
    expect(page.locator("[data-set-add]")).to_have_attribute("aria-invalid", "true")
    page.fill("[data-set-add]", "b")
    page.press("[data-set-add]", "Enter")
    expect(page.locator("[data-set-token]")).to_have_count(2)
    expect(page).to_have_url(f"{address}/f/{COMMON}?tab=source&src={a}%2C{b}")
    shown(page, "source")
    value = ask(subject, "sources", COMMON, tokens=(a, b))["thresholds"][0]["summed"]["value"]
    text = page.locator("[data-measure=summed] b").inner_text()
    assert float(text.split("\u202f")[0]) == pytest.approx(100 * value, abs=0.06)
    expect(page.locator("[data-measure=bos]")).to_be_visible()
    assert page.locator("[data-source-tables] [data-measure^=squared]").count() == 4
    page.locator("[data-set-token]").first.click()
    expect(page.locator("[data-set-token]")).to_have_count(1)


def test_dfa_by_source_says_what_the_card_says_and_what_its_own_sample_is(
    page: Page, address: str, live: LiveIndex, subject: Subject
) -> None:
    on_card = live.index.sources(COMMON)
    assert on_card is not None
    chosen = [source for source in on_card.tokens if source.token != live.model.bos][:2]
    ids = ",".join(str(source.token) for source in chosen)
    sample = ask(subject, "sources", COMMON, tokens=tuple(map(int, ids.split(","))))["thresholds"][0]
    page.goto(f"{address}/f/{COMMON}?tab=source&src={ids}")
    shown(page, "source")
    whole = page.locator("[data-samples] [data-whole]")
    assert float(whole.inner_text().split("\u202f")[0]) == pytest.approx(100 * sum(s.share for s in chosen), abs=0.1)
    said = page.locator("[data-samples]")
    expect(said).to_contain_text(f"over all {sample['n_active']:,} active tokens".replace(",", "\u202f"))
    expect(said).to_contain_text("drawn evenly" if sample["n"] < sample["n_active"] else f"the same {sample['n']}")
    elsewhere = {source.token for source in on_card.tokens} | {live.model.bos}
    other = next(token for token in range(live.model.spec.d_vocab) if token not in elsewhere)
    page.goto(f"{address}/f/{COMMON}?tab=source&src={other}")
    shown(page, "source")
    expect(said).to_contain_text("the card does not list all of these tokens")
    expect(whole).to_have_count(0)


def test_attention_has_its_baselines_and_heads_side_by_side(
    page: Page, address: str, subject: Subject, at: int
) -> None:
    page.goto(f"{address}/f/{RARE}?tab=attention")
    shown(page, "attention")
    assert page.locator("[data-bars=attention] [data-row]").count() == 16
    assert page.locator("[data-attended-head]").count() == 4
    first = ask(subject, "compare_heads", RARE, at=at)["heads"][0]
    row = page.locator("[data-comparison] [data-head-row]").first
    expect(row).to_have_attribute("data-head-row", f"1.{first['head']}")
    expect(row.locator("b")).to_have_text(f"{first['contribution']:+.3f}".replace("-", "\u2212"))
    page.select_option("[data-example]", "top.1")
    expect(page).to_have_url(f"{address}/f/{RARE}?tab=attention&ex=top.1")


def test_patches_are_drawn_both_ways_and_before_and_after_the_relu(
    page: Page, address: str, subject: Subject, at: int
) -> None:
    found = ask(subject, "patching", RARE, at=at, how="sources.0", nodes="heads")
    page.goto(f"{address}/f/{RARE}?tab=upstream&how=sources&nodes=heads")
    shown(page, "upstream")

    def scores() -> list[float]:
        return page.locator("[data-matrix] [data-score]").evaluate_all(
            "cells => cells.map((cell) => Number(cell.dataset.score))"
        )

    flat = lambda rows: [value for row in rows for value in row]  # noqa: E731
    assert scores() == pytest.approx(flat(found["noising"]["pre_score"]))
    page.click("[data-choice='direction:denoising']")
    expect(page.locator("[data-matrix=denoising]")).to_be_visible()
    page.click("[data-choice='metric:post']")
    expect(page).to_have_url(f"{address}/f/{RARE}?tab=upstream&how=sources&nodes=heads&by=denoising-post")
    expect(page.locator("[data-choice='metric:post']")).to_have_attribute("aria-pressed", "true")
    assert scores() == pytest.approx(flat(found["denoising"]["activation_score"]))
    assert page.locator("[data-prompt=clean] .changed").count() == len(found["changed"])
    assert page.locator("[data-joint]").get_attribute("data-joint") == found["joint"]["kind"]
    nodes = ask(subject, "feature_patching", RARE, at=at, how="sources.0", features_of=MLP)
    bars = page.locator("[data-bars=features-denoising] [data-row]")
    expect(bars.nth(2)).to_have_attribute("data-row", "error alone")
    assert float(bars.nth(2).get_attribute("data-value") or "nan") == pytest.approx(
        nodes["bars"][2]["denoising"]["activation_score"]
    )
    assert any(row[:2] == ["denoising", "pre_score"] for row in downloaded(page))


def test_a_corruption_that_leaves_it_on_is_said_and_not_drawn(
    page: Page, address: str, subject: Subject, live: LiveIndex
) -> None:
    def stays(position: int) -> bool:
        try:
            ask(subject, "patching", COMMON, at=position, how="shuffle.0", nodes="components")
        except HeadscopeError as error:
            return "still on" in error.got
        return False

    i = next(i for i, e in enumerate(live.index.examples(COMMON)[0].examples) if stays(e.position))
    page.goto(f"{address}/f/{COMMON}?tab=upstream&how=shuffle&ex=top.{i}")
    expect(page.locator("[data-upstream] [data-wrong]")).to_contain_text("still on in the corrupted prompt")
    assert page.locator("[data-matrix]").count() == 0
    expect(page.locator("[data-choice='corruption:sources']")).to_be_visible()
    page.click("[data-again]")
    page.wait_for_url("**how=shuffle.1**")


def test_recursive_dfa_opens_node_by_node_beside_qk(page: Page, address: str, subject: Subject, at: int) -> None:
    page.goto(f"{address}/f/{RARE}?tab=circuit")
    shown(page, "circuit")
    root = ask(subject, "circuit", RARE, at=at, path="")
    top = next(child["name"] for child in root["children"] if child["kind"] == "head")
    source = ask(subject, "circuit", RARE, at=at, path=top)["children"][0]
    expect(page.locator(f"[data-path='{top}/{source['name']}']")).to_have_attribute("aria-expanded", "true")
    assert page.locator("[data-sum]").count() == 3
    assert page.locator("[data-closes=false]").count() == 0
    attended = source["attended"]
    expect(page.locator("[data-qk]")).to_have_attribute("data-qk", f"1.{attended['head']}")
    expect(page.locator("[data-qk]")).to_have_attribute("data-key", str(attended["key"]))
    found = ask(
        subject, "qk", RARE, at=at, layer=1, head=attended["head"], query=attended["query"], key=attended["key"]
    )
    cells = page.locator("[data-pairs=contrast] .map-cell:not(.sum)").evaluate_all(
        "cells => cells.map((cell) => Number(cell.dataset.value))"
    )
    assert cells == pytest.approx([value for row in found["contrast"] for value in row])
    earlier = page.locator(f"[data-path^='{top}/{source['name']}/0.']").first
    path = earlier.get_attribute("data-path")
    earlier.locator(".circuit-node").first.focus()
    page.keyboard.press("ArrowRight")
    expect(earlier).to_have_attribute("aria-expanded", "true")
    level = ask(subject, "circuit", RARE, at=at, path=path or "")
    shown_values = earlier.locator(":scope > ul > li [data-value]").evaluate_all(
        "found => found.map((one) => Number(one.dataset.value))"
    )
    assert shown_values == pytest.approx([child["value"] for child in level["children"]])
    page.locator("[data-why]").last.click()
    page.wait_for_url("**why=**")
    page.reload()
    shown(page, "circuit")
    expect(page.locator(f"[data-path='{path}']")).to_have_attribute("aria-expanded", "true")
    expect(page.locator("[data-qk]")).to_be_visible()
    page.click("[data-choice='qk:attention']")
    expect(page.locator("[data-pairs=attention]")).to_be_visible()
    key = page.locator("[data-qk]").get_attribute("data-key") or ""
    page.locator("[data-keys] button").first.click()
    expect(page.locator("[data-qk]")).not_to_have_attribute("data-key", key)


# --- everywhere


@pytest.mark.parametrize("tab", TABS)
def test_tabs_fit_a_phone(browser: Browser, address: str, tab: str) -> None:
    with quiet_page(browser, viewport={"width": 390, "height": 844}) as page:
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        page.goto(f"{address}/f/{RARE}?tab={tab}&how=sources")
        shown(page, tab)
        assert fits(page)


def test_u_goes_through_the_tabs_and_a_dead_feature_has_none(page: Page, address: str) -> None:
    page.goto(f"{address}/f/{RARE}?how=sources")
    expect(page.locator("[data-position]")).to_be_visible()
    for tab in TABS:
        page.keyboard.press("u")
        shown(page, tab)
        assert fits(page)
        expect(page.locator(f"[data-tab={tab}]")).to_have_attribute("aria-selected", "true")
    page.click("[data-tab=logits]")
    expect(page.locator("[data-study] [data-tab-shown=logits]")).to_be_visible()
    expect(page.locator("[data-upstream]")).to_be_hidden()
    page.goto(f"{address}/f/{DEAD}?tab=circuit")
    expect(page.locator("[data-dead]")).to_be_visible()


def test_without_a_model_the_tabs_say_what_is_missing(page: Page, live: LiveIndex) -> None:
    with serving(make_app(IndexCards(live.index), subject=Subject(live.index))) as url:
        for tab in TABS[1:]:
            page.goto(f"{url}/f/{RARE}?tab={tab}")
            expect(page.locator("[data-missing-model]")).to_contain_text("headscope serve --index")
        page.click("[data-tab=heads]")
        shown(page, "heads")


def test_a_file_has_dfa_by_head_and_says_what_is_missing(page: Page, live: LiveIndex, tmp_path: Path) -> None:
    studies = {COMMON: packed(Subject(live.index), COMMON)}
    file = export_html(IndexCards(live.index), tmp_path / "page.html", [COMMON], studies=studies)
    page.goto(f"file://{file}#/f/{COMMON}?tab=heads")
    shown(page, "heads")
    assert page.locator("[data-bars]").count() == 7
    page.click("[data-tab=circuit]")
    expect(page.locator("[data-missing-model]")).to_be_visible()
