"""The pages of families and heads in a browser: numbers beside Python's, links, keys, hostile text, phone, exports."""

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from browsing import CHROMIUM, quiet_page, serving
from headscope.explorer.cards import IndexCards
from headscope.explorer.export import export_folder, export_html
from headscope.explorer.families import IndexFamilies
from headscope.explorer.head_pages import IndexHeads
from headscope.explorer.labelling import LabelRoutes
from headscope.explorer.server import make_app
from headscope.index.store import FeatureIndex
from headscope.studies.induction.behaviour import compare_rule, head_share
from role_index import HOSTILE, LABELLED, MEMBERS, add_induction, live_latents, pages_of, score_of, studied

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
EVERY = ("/families", "/family/induction", "/family/token", "/heads", "/head/1.2", "/head/0.1")


@pytest.fixture(scope="module")
def index(random_model, random_corpus, random_sae, tmp_path_factory) -> FeatureIndex:
    return studied(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("roles") / "index")


@pytest.fixture(scope="module")
def address(index: FeatureIndex) -> Iterator[str]:
    with serving(app(index)) as url:
        yield url


@pytest.fixture(scope="module")
def bare(index: FeatureIndex, tmp_path_factory) -> FeatureIndex:
    """The index before any study of heads, and with a family nobody belongs to."""
    folder = tmp_path_factory.mktemp("bare") / "index"
    shutil.copytree(index.folder, folder)
    for name in ("columns", "heads"):
        shutil.rmtree(folder / name)
    opened = FeatureIndex.open(folder)
    add_induction(opened, members=())
    return opened


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which any script error, dialog or request elsewhere fails the test."""
    with quiet_page(browser, viewport=DESK) as page:
        page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        yield page


def app(index: FeatureIndex) -> Any:
    return make_app(IndexCards(index), labels=LabelRoutes(index), roles=pages_of(index))


def shown(page: Page) -> list[int]:
    return [int(str(row.get_attribute("data-latent"))) for row in page.locator(".family [data-latent]").all()]


def rate(page: Page, name: str) -> list[str]:
    return [text.replace("\u202f", "") for text in page.locator(f"[data-rate={name}] td").all_inner_texts()]


def percent(text: str) -> float:
    return float(text.replace("%", "")) / 100


def opened(page: Page, address: str, path: str) -> None:
    page.goto(address + path)
    expect(page.locator("[data-families], [data-family-page], [data-heads], [data-head-page]")).to_be_visible()


# ------------------------------------------------------------------------------------------------------------ families
@pytest.mark.smoke
def test_the_list_of_families_leads_to_each(page: Page, address: str) -> None:
    opened(page, address, "/families")
    expect(page.locator("[data-family]")).to_have_count(4)
    expect(page.locator("[data-family=induction]")).to_contain_text(f"{len(MEMBERS)} of")
    definitions = page.locator("[data-family] .definition").all_inner_texts()
    assert len(set(definitions)) == 4, "each says what its features are"
    assert not any("_" in definition for definition in definitions)
    expect(page.locator("nav.pages [aria-current=page]")).to_have_text("families")
    page.click("[data-family=induction] a")
    expect(page.locator("[data-family-measures] td b")).to_have_text("20.0\u202f%")
    page.go_back()
    page.click("[data-family=high-level-context] a")
    expect(page.locator("[data-no-member]")).to_be_visible()
    expect(page.locator("[data-chart=roc]")).to_have_count(0)
    page.go_back()
    expect(page.locator("[data-families]")).to_be_visible()


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.6])
def test_precision_and_recall_are_those_of_python_at_any_threshold(
    page: Page, address: str, index: FeatureIndex, threshold: float
) -> None:
    opened(page, address, f"/family/induction?head=1.2&t={threshold}")
    latents = live_latents(index)
    share = head_share(index, 2)[latents].astype(np.float64)
    compared = compare_rule(share, np.isin(latents, MEMBERS), at=threshold)
    for name in ("precision", "recall"):
        measure = getattr(compared, name)
        value, interval, null, _n = rate(page, name)
        if measure.value is None:
            assert value == "none"
            continue
        low, high = interval.split(" to ")
        assert [percent(text) for text in (value, low, high)] == pytest.approx(
            [measure.value, measure.low, measure.high], abs=6e-4
        )
        assert measure.null is not None
        assert percent(null) == pytest.approx(measure.null.value, abs=6e-4)
    chosen = int((share >= threshold).sum())
    expect(page.locator("[data-choice='show:chosen']")).to_have_text(f"chosen {chosen}")
    auc = page.locator("[data-auc] b").inner_text()
    assert float(auc) == pytest.approx(compared.auc.value, abs=6e-4)


def test_the_slider_recomputes_live_and_goes_into_the_link(page: Page, address: str, index: FeatureIndex) -> None:
    opened(page, address, "/family/induction?head=1.2")
    slider = page.locator("[data-threshold]")
    slider.focus()
    before = rate(page, "recall")
    for _ in range(45):
        page.keyboard.press("ArrowLeft")
    assert rate(page, "recall") != before, "at once, not when the link follows"
    expect(page).to_have_url(re.compile(r"[?&]t=0\.15"))
    expect(page.locator("[data-threshold-number]")).to_have_value("0.15")
    both = int((head_share(index, 2)[list(MEMBERS)] >= 0.15).sum())
    assert rate(page, "recall")[3] == f"{both} of {len(MEMBERS)}"
    page.fill("[data-threshold-number]", "0.4")
    expect(page).to_have_url(re.compile(r"[?&]t=0\.4"))
    page.click("[data-threshold-reset]")
    expect(page).not_to_have_url(re.compile(r"[?&]t="))
    expect(slider).to_have_value("0.6")


def test_a_link_brings_back_threshold_head_sort_and_filter(page: Page, address: str, index: FeatureIndex) -> None:
    opened(page, address, "/family/induction")
    page.select_option("[data-rule-head]", "1.1")
    expect(page.locator("[data-family-page] h2").first).to_contain_text("head 1.1")
    page.click("[data-sort=apart]")
    expect(page.locator("[aria-sort=descending]")).to_have_text("apart")
    page.click("[data-choice='show:missed']")
    page.fill("[data-threshold-number]", "0.33")
    expect(page).to_have_url(re.compile("t=0.33"))
    url, rows = page.url, shown(page)
    assert all(part in url for part in ("head=1.1", "sort=-apart", "show=missed"))
    score = head_share(index, 1)
    assert set(rows) == {j for j in MEMBERS if score[j] < 0.33}
    page.goto("about:blank")
    page.goto(url)
    expect(page.locator("[data-family-page]")).to_be_visible()
    assert shown(page) == rows
    expect(page.locator("[data-rule-head]")).to_have_value("1.1")
    expect(page.locator("[data-choice='show:missed']")).to_have_attribute("aria-pressed", "true")


def test_a_family_opens_on_its_members_where_it_has_any(page: Page, address: str, index: FeatureIndex) -> None:
    opened(page, address, "/family/induction")
    assert set(shown(page)) == set(MEMBERS)
    expect(page.locator("[data-choice='show:members']")).to_have_attribute("aria-pressed", "true")
    page.click("[data-choice='show:all']")
    expect(page.locator("[data-count] b")).to_have_text(str(len(live_latents(index))))
    opened(page, address, "/family/high-level-context")
    expect(page.locator("[data-choice='show:all']")).to_have_attribute("aria-pressed", "true")


def test_disagreement_sorts_by_its_size_and_what_has_none_comes_last(
    page: Page, address: str, index: FeatureIndex
) -> None:
    rows = IndexFamilies(index).family("induction", "1.1")["rows"]
    apart = dict(zip(rows["latent"], rows["apart"], strict=True))
    order = sorted(apart, key=lambda j: (apart[j] is None, -abs(apart[j] or 0), j))
    opened(page, address, "/family/induction?head=1.1&sort=-apart&show=all")
    assert shown(page) == order[: len(shown(page))]
    assert apart[order[-1]] is None


def test_the_parts_of_the_verdict_are_shown_without_colour_alone(page: Page, address: str) -> None:
    opened(page, address, "/family/induction?sort=latent&show=all")
    parts = {
        latent: page.locator(f".family [data-latent='{latent}'] [data-col=tests]").inner_text() for latent in (4, 5, 14)
    }
    assert parts == {4: "✓✓✓✓", 5: "✗✓✓·", 14: "✓···"}
    expect(page.locator(".family [data-latent='4'] [data-col=verdict]")).to_have_text("member")
    expect(page.locator(".family [data-latent='5'] [data-col=verdict]")).to_have_text("no")


def test_keys_move_open_and_come_back(page: Page, address: str) -> None:
    opened(page, address, "/family/induction?sort=latent")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    latent = shown(page)[1]
    expect(page.locator(".family .row.cursor")).to_have_attribute("data-latent", str(latent))
    page.keyboard.press("Enter")
    expect(page.locator(f"[data-card='{latent}']")).to_be_visible()
    page.go_back()
    expect(page.locator("[data-family-page]")).to_be_visible()
    expect(page).to_have_url(re.compile("sort=latent"))
    page.keyboard.press("f")
    expect(page.locator("[data-families]")).to_be_visible()
    page.keyboard.press("H")
    expect(page.locator("[data-heads]")).to_be_visible()


def test_search_finds_an_id_and_a_token(page: Page, address: str, index: FeatureIndex) -> None:
    opened(page, address, "/family/induction?sort=latent&show=all")
    page.fill("[data-family-search]", "8")
    expect(page).to_have_url(re.compile("q=8"))
    assert 8 in shown(page)
    vocabulary, _ = index.vocabulary
    rows = IndexFamilies(index).family("induction")["rows"]
    token = vocabulary[rows["token"][0]].decode()
    page.fill("[data-family-search]", f'"{token}"')
    expect(page.locator("[data-count] b")).to_have_text(str(rows["token"].count(rows["token"][0])))


def test_hostile_labels_and_proxies_are_text(page: Page, address: str) -> None:
    opened(page, address, "/family/induction?show=members")
    label = page.locator(f".family [data-latent='{LABELLED}'] [data-col=label]")
    assert label.inner_text() == HOSTILE
    opened(page, address, "/family/token?sort=latent")
    assert page.locator(".family [data-col=proxy]").first.inner_text() == HOSTILE
    opened(page, address, "/head/1.2")
    assert HOSTILE in page.locator("[data-cluster]").first.inner_text()
    assert page.locator("img").count() == 0


def test_a_card_links_to_its_family_and_its_head(page: Page, address: str) -> None:
    page.goto(f"{address}/f/6")
    expect(page.locator("[data-family-chip]")).to_have_text(["induction", "token"])
    head = page.locator("[data-stat=top_head] a")
    name = head.inner_text()
    head.click()
    expect(page.locator(f"[data-head-page='{name}']")).to_be_visible()
    page.go_back()
    page.click("[data-family-chip=induction]")
    expect(page.locator("[data-family-page=induction]")).to_be_visible()


def test_a_blind_label_is_not_led_by_the_family(page: Page, address: str) -> None:
    page.goto(f"{address}/label?n=6&who=me&blind=1")
    expect(page.locator("[data-card='6']")).to_be_visible()
    assert page.locator("[data-family-chip]").count() == 0


# --------------------------------------------------------------------------------------------------------------- heads
def test_the_grid_shows_scores_and_the_keyboard_walks_it(page: Page, address: str, index: FeatureIndex) -> None:
    opened(page, address, "/heads")
    n_heads, n_layers = index.n_heads, index.manifest["model"]["n_layers"]
    cells = page.locator("[data-cell]")
    expect(cells).to_have_count(n_heads * n_layers)
    values = [float(str(cell.get_attribute("data-value"))) for cell in cells.all()]
    assert values == [score_of(layer, h, "induction") for layer in range(n_layers) for h in range(n_heads)]
    page.click("[data-choice='score:previous_token']")
    expect(page).to_have_url(re.compile("score=previous_token"))
    expect(cells.first).to_have_attribute("data-value", str(score_of(0, 0, "previous_token")))
    expect(page.locator("[data-cell='0.1'] small")).to_have_text("IC")
    expect(page.locator("[data-superposition] td b")).to_have_text("0.750")
    assert "_" not in page.locator("[data-superposition]").inner_text()
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-cell='1.1']")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("[data-head-page='1.1']")).to_be_visible()
    expect(page.locator("[data-role]")).to_have_count(2)


def test_darker_is_more_and_the_number_stands_in_the_cell(page: Page, address: str) -> None:
    opened(page, address, "/heads?score=copying")
    found = page.locator("[data-cell]").evaluate_all(
        "cells => cells.map(cell => [Number(cell.dataset.value), cell.innerText.split('\\n')[0], "
        "getComputedStyle(cell).backgroundColor.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)])"
    )
    lightness = [light for _, _, light in sorted(found, key=lambda cell: cell[0])]
    assert lightness == sorted(lightness, reverse=True)
    assert all(float(text) == pytest.approx(value, abs=0.006) for value, text, _ in found)


def test_a_head_page_shows_all_that_was_stored(page: Page, address: str, index: FeatureIndex) -> None:
    found = IndexHeads(index).head("1.2")
    opened(page, address, "/head/1.2")
    for name in ("previous_token", "induction", "duplicate_token", "copying"):
        expect(page.locator(f"[data-score={name}] b")).to_have_text(f"{score_of(1, 2, name):.3f}")
    expect(page.locator("[data-chart=prefix]")).to_be_visible()
    for by in ("dfa", "decoder"):
        rows = page.locator(f"[data-list={by}] [data-feature]")
        ids = [int(str(row.get_attribute("data-feature"))) for row in rows.all()]
        assert ids == found["features"]["lists"][by]["latent"][: len(ids)]
        assert len(ids) == 12
    expect(page.locator("[data-catalogue=dfa] [data-cluster]")).to_have_count(3)
    expect(page.locator("[data-catalogue=dfa] [data-measure=largest] td").first).to_have_text("50.0\u202f%")
    expect(page.locator("[data-catalogue=dfa] [data-measure=effective_features] td").first).to_have_text("6.50")
    assert page.locator("[data-shared]").count() == len(found["shared"]["others"])
    expect(page.locator("[data-measure='induction-every token'] [data-missing]")).to_contain_text("at least 30")
    first = page.locator("[data-lost] [data-feature]").first
    assert first.get_attribute("data-feature") == str(found["ablation"]["lost"]["mean"]["latent"][0])
    expect(page.locator("[data-reading=by_dfa]")).to_contain_text("none")
    page.click("[data-choice='ablation:zero']")
    expect(page).to_have_url(re.compile("by=zero"))
    expect(page.locator("[data-lost] [data-feature] td.bar-cell").first).to_have_text("1.0\u202f%")


def test_heads_are_a_catalogue_that_keys_and_links_walk(page: Page, address: str, index: FeatureIndex) -> None:
    opened(page, address, "/head/0.0")
    expect(page.locator("[data-other-layer]")).to_contain_text("layer 1")
    expect(page.locator("span[data-step=previous]")).to_be_visible()
    n_heads, n_layers = index.n_heads, index.manifest["model"]["n_layers"]
    names = [f"{layer}.{h}" for layer in range(n_layers) for h in range(n_heads)]
    for name in names[1:]:
        page.keyboard.press("j")
        expect(page.locator(f"[data-head-page='{name}']")).to_be_visible()
    page.keyboard.press("j")
    expect(page.locator("span[data-step=next]")).to_be_visible()
    page.keyboard.press("k")
    expect(page.locator(f"[data-head-page='{names[-2]}']")).to_be_visible()
    page.click("[data-step=next]")
    expect(page.locator(f"[data-head-page='{names[-1]}']")).to_be_visible()
    expect(page).to_have_url(re.compile(rf"/head/{re.escape(names[-1])}$"))
    page.locator("[data-list=dfa] [data-feature] a").first.click()
    expect(page.locator("[data-card]")).to_be_visible()


def test_a_head_or_family_that_there_is_not_says_so(page: Page, address: str) -> None:
    for path, words in (("/head/9.9", "there is no 9.9"), ("/family/nonsense", "there is no nonsense")):
        page.goto(address + path)
        expect(page.locator("[data-error]")).to_contain_text(words)
        page.click("[data-error] a")
        expect(page.locator("[data-count]").first).to_be_visible()


def test_what_was_not_studied_names_its_command(page: Page, bare: FeatureIndex) -> None:
    with serving(app(bare)) as address:
        opened(page, address, "/family/induction")
        expect(page.locator("[data-no-member]")).to_be_visible()
        assert rate(page, "recall")[0] == "none"
        page.goto(f"{address}/family/token")
        expect(page.locator("[data-command]")).to_have_text("headscope study proxies INDEX")
        opened(page, address, "/heads")
        expect(page.locator("[data-scores-missing] [data-command]")).to_have_text("headscope study heads INDEX")
        expect(page.locator("[data-cell='1.0']")).to_be_visible()
        opened(page, address, "/head/1.0")
        expect(page.locator("[data-command]")).to_have_count(3)
        expect(page.locator("[data-list=dfa] [data-feature]").first).to_be_visible()


# ------------------------------------------------------------------------------------------------------ size, exports
@pytest.mark.parametrize("path", EVERY)
def test_a_phone_shows_each_page_without_scrolling_sideways(browser: Browser, address: str, path: str) -> None:
    with quiet_page(browser, viewport=PHONE) as page:
        opened(page, address, path)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for link in page.locator("nav.pages a").all():
            box = link.bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= PHONE["width"]


def test_a_desk_shows_the_family_without_scrolling_the_page(page: Page, address: str) -> None:
    opened(page, address, "/family/induction")
    assert page.evaluate("document.documentElement.scrollHeight") <= DESK["height"] + 1
    for name in ("token", "score", "source_share", "verdict", "tests", "head", "label"):
        box = page.locator(f"[data-sort={name}]").bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= DESK["width"], name


@contextmanager
def hosted(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_exported_folder_has_the_pages_and_links_only_to_what_it_holds(
    page: Page, index: FeatureIndex, tmp_path: Path
) -> None:
    site = export_folder(IndexCards(index), tmp_path / "site", range(9), roles=pages_of(index))
    with hosted(site) as address:
        opened(page, address, "/index.html#/family/induction?head=1.2&sort=latent&t=0.3&show=all")
        assert shown(page) == live_latents(index)
        expect(page.locator("[data-threshold-number]")).to_have_value("0.3")
        assert page.locator(".family a[data-latent='8']").count() == 1
        assert page.locator(".family a[data-latent='10']").count() == 0
        page.click("nav.pages [data-page=heads]")
        page.click("[data-cell='1.2']")
        expect(page.locator("[data-head-page='1.2']")).to_be_visible()
        links = page.locator("[data-feature] a").evaluate_all("links => links.map(link => Number(link.dataset.nav))")
        assert links
        assert max(links) < 9
        page.locator("[data-feature] a").first.click()
        expect(page.locator("[data-card]")).to_be_visible()


def test_a_file_says_that_it_lacks_the_pages(page: Page, index: FeatureIndex, tmp_path: Path) -> None:
    file = export_html(IndexCards(index), tmp_path / "page.html", range(9)).as_uri()
    page.goto(f"{file}#/family/induction")
    expect(page.locator("[data-error]")).to_contain_text("does not hold")
    names = page.locator("nav.pages a").evaluate_all("links => links.map((link) => link.dataset.page)")
    assert names == ["table", "prompt"]  # the second says what it needs
    page.goto(f"{file}#/f/6")
    expect(page.locator("[data-card='6']")).to_be_visible()
    assert page.locator("[data-stat=top_head] a, a[data-family-chip]").count() == 0
