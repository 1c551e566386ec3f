"""The explorer in a browser: table, cards, keys, links, hostile tokens, the single file without a network."""

import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from browsing import CHROMIUM, quiet_page
from browsing import serving as serving_app
from explorer_source import BLOCK, DEAD_LATENT, EMOJI, HOSTILE, LONE, N_BLOCKS, NEWLINE, TWIN_LATENT, FakeSource
from headscope.explorer.export import export_folder, export_html
from headscope.explorer.server import make_app, static_files
from headscope.index.records import Example

SOURCE = FakeSource()
MINUS = "\u2212"
SCRIPT_BUDGET = 112_000  # bytes of JavaScript that a page loads before it shows anything, comments counted
# the same of what comes when first needed: dashboard, deep-dive tabs, labelling queue, pages of families and heads
LATER_BUDGET = 230_000
EXPORTED_SCRIPT_BUDGET = 103_000  # in an export without deep-dive tabs, comments and indentation left out

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


def serving(source: FakeSource) -> AbstractContextManager[str]:
    return serving_app(make_app(source))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(SOURCE) as url:
        yield url


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    features = [*range(70), 150]
    return export_html(SOURCE, tmp_path_factory.mktemp("export") / "a page.html", features).as_uri()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which any script error, dialog or request elsewhere fails the test."""
    with quiet_page(browser) as page:
        yield page


def example_of(latent: int, group: int, i: int) -> Example:
    return SOURCE.records(latent)[group].examples[i]


def dst_of(example: Example) -> int:
    return example.position % BLOCK


def number(text: str | None) -> float:
    return float(str(text).replace(MINUS, "-"))


def card(page: Page, latent: int) -> None:
    """Wait for a card, and for its place in the list."""
    expect(page.locator(f"[data-card='{latent}'] [data-position]")).to_be_visible()


def shown_ids(page: Page, n: int = 5) -> list[int]:
    return [int(str(row.get_attribute("data-latent"))) for row in page.locator("[data-table] a.row").all()[:n]]


# --- a busy server


def test_a_server_that_is_busy_is_asked_again_and_one_that_stays_so_is_said(browser: Browser, address: str) -> None:
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        if asked.count(route.request.url) > 2 and not route.request.url.endswith("/5"):
            route.continue_()
        else:
            route.fulfill(status=503, headers={"retry-after": "0.01"}, json={"error": "ask again in a moment"})

    with quiet_page(browser, allowed="503") as page:
        page.route("**/api/feature/*", refuse)
        page.goto(f"{address}/f/3")
        card(page, 3)
        assert asked.count(f"{address}/api/feature/3") == 3
        page.goto(f"{address}/f/5")
        expect(page.locator("[data-error]")).to_contain_text("ask again in a moment")
        assert asked.count(f"{address}/api/feature/5") == 5


# --- the table


@pytest.mark.smoke
def test_the_table_lists_live_features_and_the_quality_of_the_sae(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("[data-count] b")).to_have_text("192")
    expect(page.locator("[data-count]")).to_contain_text("8 dead hidden")
    n_active = SOURCE.rows["n_active"]
    most = sorted(range(200), key=lambda latent: (-n_active[latent], latent))
    assert shown_ids(page, 8) == most[:8], "the most active first, where no study has measured effects"
    expect(page.locator("[role=columnheader][aria-sort=descending]")).to_have_text("tokens")
    quality = page.locator("[data-quality] tr").all_inner_texts()
    assert quality[0].split() == ["here", "post"]
    assert quality[2].split() == ["loss_recovered", "91.0", "%", "[90.5,", "91.4]", "87", "%"]
    assert (
        page.locator("[data-quality] .term").nth(1).get_attribute("title") == "Active latents on a token, on average."
    )


def test_only_rows_in_sight_are_in_the_page(page: Page, address: str) -> None:
    page.goto(f"{address}/#sort=latent")
    expect(page.locator("[data-table] a.row").first).to_be_visible()
    assert page.locator("[data-table] a.row").count() < 60
    page.locator("[data-table]").evaluate("view => { view.scrollTop = view.scrollHeight; }")
    expect(page.locator("[data-table] a.row[data-latent='199']")).to_be_visible()


def test_a_column_sorts_both_ways_and_blanks_come_last(page: Page, address: str) -> None:
    page.goto(f"{address}/#dead=1")
    page.click("[data-sort=maximum]")
    expect(page.locator("[role=columnheader][aria-sort=descending]")).to_have_text("max")
    best = max(range(200), key=lambda latent: (SOURCE.rows["maximum"][latent] or 0, -latent))
    assert shown_ids(page, 1) == [best]
    page.click("[data-sort=maximum]")
    expect(page.locator("[role=columnheader][aria-sort=ascending]")).to_have_text("max")
    first = shown_ids(page, 1)[0]
    assert first % 25 != DEAD_LATENT, "dead latents have no maximum and come last"
    assert "sort=maximum" in page.url


def test_filters_narrow_the_table_and_clear(page: Page, address: str) -> None:
    rows = SOURCE.rows
    page.goto(f"{address}/#sort=latent")
    page.select_option("[data-filter=in]", "1.6")
    page.fill("[data-filter=share]", "70")
    expected = [i for i in range(200) if rows["top_head"][i] == "1.6" and rows["top_head_share"][i] >= 0.7]
    expect(page.locator("[data-count] b")).to_have_text(str(len(expected)))
    assert shown_ids(page, 3) == expected[:3]
    page.click("[data-reset]")
    expect(page.locator("[data-count] b")).to_have_text("192")
    page.check("[data-filter=dead]")
    expect(page.locator("[data-count] b")).to_have_text("200")
    page.fill("[data-filter=dmin]", "5")
    n = sum(density >= 0.05 for density in rows["density"])
    expect(page.locator("[data-count] b")).to_have_text(str(n))


def test_search_finds_tokens_and_numbers(page: Page, address: str) -> None:
    page.goto(f"{address}/#sort=latent")
    expect(page.locator("[data-table] a.row").first).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type("onerror")
    expect(page.locator("[data-count]")).to_contain_text("by logit")
    rows = SOURCE.rows
    hits = [
        i
        for i in range(200)
        if HOSTILE in rows["logit_tokens"][i] + rows["example_tokens"][i] or rows["top_source"][i] == HOSTILE
        if rows["alive"][i]
    ]
    # of the whole word, not of what is typed so far
    expect(page.locator("[data-count] b")).to_have_text(str(len(hits)))
    page.fill("[data-search]", "example:onerror")
    expect(page.locator("[data-count]")).not_to_contain_text("by logit")
    assert shown_ids(page) == [i for i in range(200) if HOSTILE in rows["example_tokens"][i]][:5]
    page.fill("[data-search]", "id:42")
    expect(page.locator("[data-count] b")).to_have_text("1")
    page.keyboard.press("Enter")
    card(page, 42)


def test_search_for_an_exact_token(page: Page, address: str) -> None:
    page.goto(address)
    page.fill("[data-search]", 'source:" in"')
    expect(page.locator("[data-table] a.row").first).to_be_visible()
    expect(page.locator("[data-count]")).to_contain_text("by source")
    assert set(page.locator("[data-table] a.row [data-col=top_source]").all_inner_texts()) == {"·in"}
    page.fill("[data-search]", '"no such token"')
    expect(page.locator("[data-empty]")).to_be_visible()


@pytest.mark.smoke
def test_the_cursor_moves_and_opens(page: Page, address: str) -> None:
    page.goto(f"{address}/#sort=latent")
    expect(page.locator("a.row.cursor[data-latent='0']")).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    page.keyboard.press("k")
    expect(page.locator("a.row.cursor[data-latent='1']")).to_be_visible()
    page.keyboard.press("Enter")
    card(page, 1)


# --- the card


@pytest.mark.smoke
def test_the_first_screen_of_a_card(page: Page, address: str) -> None:
    page.goto(f"{address}/f/15")
    card(page, 15)
    stats = SOURCE.feature(15)["stats"]
    expect(page.locator("[data-stat=max] b")).to_have_text(f"{stats['max']:.3f}")
    expect(page.locator("[data-stat=density]")).to_contain_text(f"{stats['n_active']} of 16,384 tokens")
    expect(page.locator("[data-stat=density]")).to_contain_text(re.compile(r"\[\d"))
    expect(page.locator("[data-stat=top_head] b")).to_have_text("1.7")
    low, _, high = SOURCE.about()["nulls"][1]["range"]
    expect(page.locator("[data-null]")).to_have_text(f" · null {low:.1%} to {high:.1%}".replace("%", "\u202f%"))
    expect(page.locator(".head")).to_have_count(8)
    expect(page.locator("[data-logits=positive] li:visible")).to_have_count(10)
    expect(page.locator("[data-source]:visible")).to_have_count(6)
    expect(page.locator("[data-kept]")).to_contain_text("93.0\u202f% kept · BOS apart: 12.0\u202f%")
    expect(page.locator("[data-group=top] .example")).to_have_count(12)
    expect(page.locator("[data-group=random] .example")).to_have_count(8)
    expect(page.locator("[data-group=top] [data-shares]")).to_contain_text("of activation mass")
    assert page.locator(".example .tok.dst").count() == 20, "every example shows its destination"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for part in (".side", "[data-group=random]"):
        box = page.locator(part).bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 900, f"{part} is on the first screen"
    page.click("[data-more=logits]")
    expect(page.locator("[data-logits=positive] li:visible")).to_have_count(20)


def test_every_statistic_has_a_definition(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    assert [term.inner_text() for term in page.locator(".term:not([title])").all()] == []
    title = page.locator("[data-stat=mean] .term").get_attribute("title")
    assert title is not None
    assert "n = 631" in title


def test_a_card_is_light_and_quick(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18?tab=interval&w=16")
    card(page, 18)
    expect(page.locator(".example .tok").first).to_be_visible()
    assert page.evaluate("document.querySelectorAll('*').length") <= 4000
    page.evaluate("scrollTo(0, 600)")
    expect(page.locator("[data-ex='interval-5.0'] .tok").first).to_be_visible()
    assert page.evaluate("document.querySelectorAll('*').length") <= 4000


def test_scripts_stay_in_their_budget(exported: str) -> None:
    files = {name: body.decode() for name, body in static_files().items() if name.endswith(".js")}
    first, found = set(), ["app.js"]
    while found:
        name = found.pop()
        first.add(name)
        found += [n for n in re.findall(r'^import .* from "\./(\w+\.js)"', files[name], re.MULTILINE) if n not in first]
    assert sum(len(files[name].encode()) for name in first) <= SCRIPT_BUDGET
    assert sum(len(body.encode()) for name, body in files.items() if name not in first) <= LATER_BUDGET
    page = Path(unquote(exported.removeprefix("file://"))).read_text()
    script = re.findall(r'<script type="module">(.*?)</script>', page, re.DOTALL)[0]
    assert len(script.encode()) <= EXPORTED_SCRIPT_BUDGET
    assert all(line.count("`") % 2 == 0 for line in script.splitlines()), "no text spans lines"


def test_activation_colour_is_relative_to_the_features_maximum(page: Page, address: str) -> None:
    for latent in (18, 50):  # maxima 7.16 and 9.0
        page.goto(f"{address}/f/{latent}?tab=interval")
        card(page, latent)
        example = next(g for g in SOURCE.records(latent) if (g.kind, g.number) == ("interval", 4)).examples[0]
        share = example.activation / SOURCE.feature(latent)["stats"]["max"]
        token = page.locator("[data-ex='interval-4.0'] .tok.dst")
        shown = float(token.evaluate("token => token.style.getPropertyValue('--a')"))
        assert shown == pytest.approx(share, abs=1e-3)


def test_the_dfa_check_is_shown_and_right(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    example = example_of(18, 0, 3)
    page.hover("[data-check='top.3']")
    text = page.locator("[data-tip] [data-equation=holds]").inner_text()
    dfa, bias, total, pre = (number(x) for x in re.findall(rf"{MINUS}?\d+\.\d+", text)[:4])
    assert dfa == pytest.approx(example.heads.sum(), abs=1.1e-3)
    assert bias == pytest.approx(example.bias)
    assert total == pytest.approx(dfa + bias, abs=1.1e-3)
    assert pre == pytest.approx(example.pre, abs=1.1e-3)
    rows = page.locator("[data-tip] [data-head-value]").all()
    shown = {row.get_attribute("data-head-value"): number(row.locator("td").first.inner_text()) for row in rows}
    assert shown == pytest.approx({f"1.{h}": dfa for h, dfa in enumerate(example.heads)}, abs=1.6e-3)


def test_a_dfa_that_does_not_add_up_is_said(page: Page) -> None:
    class Wrong(FakeSource):
        def feature(self, latent: int, *, lean: bool = False) -> dict[str, Any]:
            return super().feature(latent, lean=lean) | {"bias": -0.5}

    with serving(Wrong()) as address:
        page.goto(f"{address}/f/18")
        card(page, 18)
        page.hover("[data-check='top.0']")
        expect(page.locator("[data-tip] [data-equation=fails]")).to_contain_text("≠ pre-activation")


def test_token_tooltip_pins_and_marks_the_example(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    dst = dst_of(example_of(18, 0, 3))
    page.hover("[data-ex='top.3'] .tok.dst")
    expect(page.locator("[data-tip]")).to_contain_text(f"{dst}, destination")
    expect(page.locator("[data-tip] .from-sources tr")).to_have_count(len(example_of(18, 0, 3).sources))
    expect(page.locator(".histogram .marker")).to_have_attribute("visibility", "visible")
    page.click("[data-ex='top.3'] .tok.dst")
    page.hover("h1")
    expect(page.locator("[data-tip]")).to_contain_text("pinned")
    expect(page.locator("[data-ex='top.3'].current")).to_be_visible()
    assert f"ex=top.3&dst={dst}" in page.url
    page.keyboard.press("Escape")
    expect(page.locator("[data-tip]")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator(".example.current")).to_have_count(0)


def test_a_source_says_its_dfa_and_attention_by_head(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    source = example_of(18, 0, 1).sources[0]
    page.hover(f"[data-ex='top.1'] .tok[data-pos='{source.position}']")
    row = page.locator("[data-tip] [data-head-value='1.2'] td")
    assert number(row.nth(0).inner_text()) == pytest.approx(source.heads[2], abs=1.1e-3)
    assert row.nth(1).inner_text() == f"{round(100 * source.pattern[2])}.0\u202f%".replace("0.0", "0")


def test_the_map_has_every_head_and_source_and_adds_up(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    page.click("[data-map='top.1']")
    expect(page.locator("[data-map-open='top.1'] [data-equation=holds]")).to_be_visible()
    assert "d=1" in page.url
    example = example_of(18, 0, 1)
    columns = sorted(source.position for source in example.sources)
    values = page.locator(".DFA .map-cell").evaluate_all("cells => cells.map(cell => Number(cell.dataset.value))")
    dfa = np.array(values).reshape(9, len(columns) + 2)
    by_position = {source.position: source.heads for source in example.sources}
    exact = np.stack([by_position[position] for position in columns], axis=1)
    np.testing.assert_allclose(dfa[:8, :-2], exact, atol=0.005 * example.pre)
    np.testing.assert_allclose(dfa[:8, :-1].sum(1), example.heads, atol=1.1e-3)
    np.testing.assert_allclose(dfa[:, -1], dfa[:, :-1].sum(1), atol=1e-9)
    assert dfa[-1, -1] + example.bias == pytest.approx(example.pre, abs=1.1e-3)
    attention = page.locator(".attention .map-cell").evaluate_all("cells => cells.map(cell => +cell.dataset.value)")
    np.testing.assert_allclose(np.array(attention).reshape(8, -1).sum(1), 1, atol=0.03)
    page.keyboard.press("d")
    expect(page.locator("[data-map-open]")).to_have_count(0)


def test_source_tokens_have_attention_a_base_rate_and_thresholds(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    cells = page.locator("[data-source='18'] td").all_inner_texts()
    assert cells == ["50.0\u202f%", "65.0\u202f% / 4.0\u202f%", "0.20\u202f%"]
    page.hover("[data-source='18']")
    expect(page.locator("[data-tip] [data-by-head] tr")).to_have_count(9)
    expect(page.locator("[data-kept]")).to_contain_text("400 active")
    page.click("[data-choice='threshold:1']")
    expect(page.locator("[data-kept]")).to_contain_text("200 active")
    assert "t=1" in page.url
    page.click(".head[data-head='1.5']")
    expect(page.locator("[data-source='18'] td").nth(1)).to_have_text("5.0\u202f% / 1.0\u202f%")


def test_correlated_features_of_anywhere_are_links(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    expect(page.locator("[data-correlated]")).to_have_count(4)
    page.click("[data-correlated='153']")
    card(page, 153)
    assert 153 // 64 != 18 // 64, "of another batch of features"


def test_a_copier_is_named_from_the_data(page: Page) -> None:
    class Copier(FakeSource):
        def feature(self, latent: int, *, lean: bool = False) -> dict[str, Any]:
            made = super().feature(latent, lean=lean)
            made["logits"]["top"][0][0] = made["sources"][0]["token"][0]
            return made

    with serving(Copier()) as address:
        page.goto(f"{address}/f/18")
        card(page, 18)
        expect(page.locator("[data-chip]")).to_have_text("copies &amp;")
        page.goto(f"{address}/f/19")
        card(page, 19)
        expect(page.locator("[data-chip]")).to_have_text("reads <b>")


def test_negative_dfa_is_visible_and_unlike_positive(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    for token in page.locator("[data-group=top] .tok.src").all()[:40]:
        negative = float(str(token.get_attribute("data-dfa"))) < 0
        image = token.evaluate("token => getComputedStyle(token).backgroundImage")
        assert image.startswith("repeating-linear-gradient" if negative else "linear-gradient")
    assert page.locator("[data-group=top] .tok.src.minus").count() > 0
    assert page.locator("[data-group=top] .tok.src:not(.minus)").count() > 0


def test_the_next_token_is_bold_and_only_it(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    weights = page.locator("[data-ex='top.0'] .tok").evaluate_all(
        "tokens => tokens.map(token => [token.matches('.next'), getComputedStyle(token).fontWeight])"
    )
    assert {weight for is_next, weight in weights if is_next} == {"700"}
    assert {weight for is_next, weight in weights if not is_next} == {"400"}


def test_the_last_position_of_a_block_can_be_a_destination(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    expect(page.locator("[data-ex='top.2'] .tok.dst")).to_have_attribute("data-pos", "255")
    expect(page.locator("[data-ex='top.2'] .tok.next")).to_have_count(0)


def test_a_far_source_has_its_own_window(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    seen = set()
    for i in range(12):
        example = example_of(18, 0, i)
        dst, source = dst_of(example), example.sources[0].position
        row = page.locator(f"[data-ex='top.{i}'] .line")
        split = "split" in str(row.get_attribute("class"))
        seen.add(split)
        assert split == (dst - source > 11)
        at = row.locator(".tok").evaluate_all("tokens => tokens.map(token => Number(token.dataset.pos))")
        assert {source, dst} <= set(at)
        if split:
            assert row.locator(".gap").get_attribute("data-gap") == str(dst - 5 - (source + 3) - 1)
            assert at == [*range(source - 3, source + 4), *range(dst - 5, min(dst + 6, BLOCK))]
        lines = row.locator(".tok").evaluate_all("tokens => tokens.map(token => token.getBoundingClientRect().height)")
        assert max(lines) < 26, "one line"
    assert seen == {True, False}


def test_two_windows_with_the_same_tokens_in_another_order_are_both_shown(page: Page, address: str) -> None:
    page.goto(f"{address}/f/{TWIN_LATENT}?w=16")
    card(page, TWIN_LATENT)
    near = "tokens => tokens.filter(token => Math.abs(token.dataset.pos - 33) <= 5).map(token => token.textContent)"
    expect(page.locator("[data-ex='top.1'] .tok.dst")).to_be_visible()
    first, second = (page.locator(f"[data-ex='top.{i}'] .tok").evaluate_all(near) for i in range(2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_head_filters_the_sources(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18?w=16")
    card(page, 18)
    source = example_of(18, 0, 0).sources[0]
    token = page.locator(f"[data-ex='top.0'] .tok[data-pos='{source.position}']")
    every, one = pytest.approx(source.heads.sum(), abs=2e-3), pytest.approx(source.heads[2], abs=2e-3)
    assert number(token.get_attribute("data-dfa")) == every
    page.hover(".head[data-head='1.2']")
    assert number(token.get_attribute("data-dfa")) == one
    page.hover("h1")
    assert number(token.get_attribute("data-dfa")) == every
    page.click(".head[data-head='1.2']")
    page.hover("h1")
    expect(page.locator("[data-head-filter]")).to_contain_text("1.2")
    assert number(token.get_attribute("data-dfa")) == one
    assert "head=1.2" in page.url
    page.click("[data-head-filter]")
    expect(page.locator("[data-head-filter]")).to_be_hidden()


def test_disagreeing_heads_are_flagged(page: Page, address: str) -> None:
    page.goto(f"{address}/f/15")
    card(page, 15)
    apart = SOURCE.rows["disagreement"][15]
    expect(page.locator("[data-flag=heads]")).to_contain_text("DFA names 1.7, the decoder 1.0")
    expect(page.locator("[data-flag=heads]")).to_contain_text(f"{apart:.1%}".replace("%", "\u202f%"))
    far = next(i for i in range(200) if (SOURCE.rows["disagreement"][i] or 0) > 0.3 and i % 5)
    page.goto(f"{address}/f/{far}")
    card(page, far)
    expect(page.locator("[data-flag=heads]")).to_contain_text("both name")
    page.goto(f"{address}/f/18")
    card(page, 18)
    expect(page.locator("[data-flag=heads]")).to_have_count(0)


def test_histogram_scales_and_weights(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    assert page.locator(".histogram .bar").count() == 50
    page.click("[data-choice='weight:1']")
    expect(page.locator(".histogram")).to_have_attribute("data-weight", "mass")
    page.click("[data-choice='scale:1']")
    expect(page.locator(".histogram")).to_have_attribute("data-scale", "log")
    heights = page.locator(".histogram .bar").evaluate_all(
        "bars => bars.map(bar => Number(bar.getAttribute('height')))"
    )
    assert all(0 < height <= 90 for height in heights)


def test_windows_and_gaps(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    example = example_of(18, 0, 0)
    positions = "tokens => tokens.map(token => Number(token.dataset.pos))"
    row = page.locator("[data-ex='top.0']")
    short = row.locator(".tok").evaluate_all(positions)
    assert max(short) == dst_of(example) + 5
    page.keyboard.press("w")
    expect(row).to_have_attribute("data-window", "16")
    medium = row.locator(".tok").evaluate_all(positions)
    near = [(dst_of(example), 16), *((s.position, 5 if i == 0 else 1) for i, s in enumerate(example.sources))]
    assert set(short) < set(medium)
    assert set(medium) >= {p for at, reach in near for p in range(max(at - reach, 0), at + reach + 1)}
    gaps = row.locator("[data-gap]").all_inner_texts()
    assert sum(int(re.findall(r"\d+", gap)[0]) for gap in gaps) == max(medium) - min(medium) + 1 - len(medium)
    page.keyboard.press("w")
    expect(row.locator(".tok")).to_have_count(256)
    newline = row.locator(".tok").nth(int(np.flatnonzero(SOURCE.index.blocks[example.position // BLOCK] == NEWLINE)[0]))
    assert newline.evaluate("token => token.textContent") == "↵\n"
    row.locator(".tok.unstored").first.hover()
    expect(page.locator("[data-tip]")).to_contain_text("not stored here")


def test_a_dead_feature_is_honest(page: Page, address: str) -> None:
    page.goto(f"{address}/f/{DEAD_LATENT}")
    card(page, DEAD_LATENT)
    expect(page.locator("[data-dead]")).to_contain_text("Never active on 16,384 tokens")
    expect(page.locator("[data-dead]")).to_contain_text("3/N = 1.8e-4")
    expect(page.locator(".example")).to_have_count(0)
    page.keyboard.press("w")
    page.keyboard.press("h")
    page.keyboard.press("l")
    expect(page.locator("[data-dead]")).to_be_visible()


def test_a_feature_that_does_not_exist_is_said(page: Page, address: str) -> None:
    page.goto(f"{address}/f/200")
    expect(page.locator("[data-error]")).to_contain_text("0 to 199")
    page.goto(f"{address}/f/abc")
    expect(page.locator("[data-error]")).to_contain_text("abc is not the number of a feature")
    expect(page.locator("[data-table]")).to_have_count(0)


# --- keys and links


def test_j_and_k_follow_the_list_and_capitals_the_numbers(page: Page, address: str) -> None:
    page.goto(f"{address}/#in=1.6&sort=-maximum")
    rows = SOURCE.rows
    listed = [i for i in range(200) if rows["top_head"][i] == "1.6" and rows["alive"][i]]
    listed.sort(key=lambda i: (-rows["maximum"][i], i))
    page.click(f"a.row[data-latent='{listed[0]}']")
    card(page, listed[0])
    expect(page.locator("[data-position]")).to_have_text(f"1 of {len(listed)}")
    page.keyboard.press("j")
    card(page, listed[1])
    page.keyboard.press("j")
    card(page, listed[2])
    page.keyboard.press("k")
    card(page, listed[1])
    page.keyboard.press("J")
    card(page, listed[1] + 1)
    expect(page.locator("[data-position]")).to_contain_text("not among")
    page.keyboard.press("K")
    card(page, listed[1])
    page.go_back()
    card(page, listed[1] + 1)
    page.go_forward()
    card(page, listed[1])


def test_the_other_keys(page: Page, address: str) -> None:
    page.goto(f"{address}/f/18")
    card(page, 18)
    page.keyboard.press("h")
    expect(page.locator("[data-card]")).to_have_attribute("data-head", "1.2")
    page.keyboard.press("Escape")
    expect(page.locator("[data-card]")).to_have_attribute("data-head", "")
    page.keyboard.press("l")
    expect(page.locator(".histogram")).to_have_attribute("data-scale", "log")
    page.keyboard.press("d")
    expect(page.locator("[data-map-open='top.0']")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("[data-map-open]")).to_have_count(0)
    page.keyboard.press("4")
    expect(page.locator("[data-group=threshold] .example")).to_have_count(4)
    page.keyboard.press("2")
    expect(page.locator("[data-tab=quantile]")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("?")
    expect(page.locator("[data-help]")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("[data-help]")).to_be_hidden()
    page.keyboard.press("y")
    expect(page.locator("[data-toast]")).to_contain_text("/f/18?")
    page.keyboard.press("g")
    page.fill("[data-goto]", "999")
    page.keyboard.press("Enter")
    expect(page.locator("[data-goto]")).to_have_attribute("aria-invalid", "true")
    page.fill("[data-goto]", "61")
    page.keyboard.press("Enter")
    card(page, 61)
    page.keyboard.press("r")
    expect(page.locator("[data-card='61']")).to_have_count(0)
    expect(page.locator("[data-card]")).to_have_attribute("data-alive", "true")
    page.keyboard.press("/")
    expect(page.locator("[data-search]")).to_be_focused()


def test_a_link_brings_the_view_back(page: Page, address: str) -> None:
    dst = dst_of(next(g for g in SOURCE.records(18) if (g.kind, g.number) == ("quantile", 4)).examples[2])
    page.goto(f"{address}/f/18?ex=quantile-4.2&dst={dst}&w=16&head=6&log=1#in=1.2&q=def")
    card(page, 18)
    expect(page.locator("[data-tip]")).to_contain_text(f"{dst}, destination")
    expect(page.locator("[data-tip]")).to_contain_text("pinned")
    expect(page.locator("[data-ex='quantile-4.2'].current")).to_be_in_viewport()
    expect(page.locator("[data-ex='quantile-4.2']")).to_have_attribute("data-window", "16")
    expect(page.locator("[data-card]")).to_have_attribute("data-head", "1.6")
    expect(page.locator(".histogram")).to_have_attribute("data-scale", "log")
    page.click(".brand")
    expect(page.locator("[data-search]")).to_have_value("def")
    expect(page.locator("[data-filter=in]")).to_have_value("1.2")
    page.go_back()
    card(page, 18)
    expect(page.locator("[data-ex='quantile-4.2'].current")).to_be_visible()


# --- tokens


@pytest.mark.smoke
def test_hostile_tokens_stay_text(page: Page, address: str) -> None:
    page.goto(f"{address}/f/{HOSTILE}?w=16&d=1")
    card(page, HOSTILE)
    expect(page.locator("[data-ex='top.0'] .tok.dst")).to_have_text("</script><img src=x onerror=alert(1)>")
    expect(page.locator("[data-logits=positive] li").first).to_contain_text("<img src=x onerror=alert(1)>")
    page.hover("[data-ex='top.0'] .tok.dst")
    expect(page.locator("[data-tip]")).to_contain_text("onerror")
    page.goto(address)
    page.fill("[data-search]", "<img")
    expect(page.locator("[data-count]")).to_contain_text("by logit")
    assert page.locator("img").count() == 0
    assert page.evaluate("window.__xss") is None


def test_bytes_become_characters_once(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("[data-table] a.row").first).to_be_visible()
    shown = page.evaluate(
        """async (runs) => {
          const { Vocab } = await import("/static/vocab.js");
          const vocab = new Vocab(await (await fetch("/api/vocab")).json());
          return runs.map((ids) => vocab.decode(ids).map((piece) =>
            [piece.kind, piece.bits.map((bit) => bit.text ?? bit.mark ?? bit.byte).join("|")]));
        }""",
        [
            list(EMOJI),
            list(EMOJI[:2]),
            list(LONE),
            [EMOJI[0], 0, EMOJI[1]],
            [7, 8, 9],
            [14, 15],
            [10, 11, 12, 13],
            [6, 5, 15],
        ],
    )
    assert shown[0] == [["text", "🦊"], ["part", ""], ["part", ""]]
    assert shown[1] == [["text", r"\xF0|\x9F"], ["text", r"\xA6"]]
    assert shown[2] == [["text", r"\xFF"], ["text", r"\xC3"]]
    assert shown[3] == [["text", r"\xF0|\x9F"], ["special", "<|bos|>"], ["text", r"\xA6"]]
    assert shown[4] == [["text", "↵"], ["text", "⇥"], ["text", "↵|↵"]]
    assert shown[5] == [["text", "U+202E"], ["text", "…"]]
    assert [text for _, text in shown[6]] == [" שלום", " مرحبا", "漢字", " 東京"]
    assert shown[7] == [["text", r"\xC3"], ["text", r"\xFF"], ["text", "…"]]


def test_characters_that_draw_nothing_are_escapes(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("[data-table] a.row").first).to_be_visible()
    shown = page.evaluate(
        """async (texts) => {
          const { Vocab } = await import("/static/vocab.js");
          const bytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));
          const vocab = new Vocab({ tokens: texts.map(bytes), special: [] });
          return texts.map((_, id) => vocab.decode([id])[0].bits.map((bit) => bit.text ?? bit.byte));
        }""",
        ["\u2764\ufe0f", "a\u00a0b", "\u3164", "\U000e0041", "\u200d", "\u2800", "e\u0301 \u6771"],
    )
    hidden = [["\u2764", "U+FE0F"], ["a", "U+00A0", "b"], ["U+3164"], ["U+E0041"], ["U+200D"], ["U+2800"]]
    assert shown == [*hidden, ["e\u0301 \u6771"]]


# --- widths


def test_the_whole_table_is_in_sight_at_a_desk(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("[data-table] a.row").first).to_be_visible()
    assert page.locator("[data-table]").evaluate("(table) => table.scrollWidth <= table.clientWidth")
    assert page.locator("[data-table] [data-sort]").evaluate_all(
        "(heads) => heads.every((head) => head.scrollWidth <= head.clientWidth)"
    )


def test_on_a_phone_what_a_card_shows_comes_first_and_nothing_is_out_of_reach(browser: Browser, address: str) -> None:
    with quiet_page(browser, viewport={"width": 390, "height": 844}) as page:
        page.goto(f"{address}/f/18")
        card(page, 18)
        top = "(element) => element.getBoundingClientRect().top"
        assert page.locator("[data-groups]").evaluate(top) < page.locator(".side").evaluate(top)
        box = "t.getBoundingClientRect()"
        inside = f"(tabs) => tabs.every((t) => {box}.left >= 0 && {box}.right <= 390)"
        assert page.locator("[role=tab]").evaluate_all(inside)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.goto(address)
        rows = page.locator("[data-table]")
        expect(page.locator("[data-table] a.row").first).to_be_visible()
        assert rows.evaluate(top) < page.locator("[data-about]").evaluate(top)
        rows.evaluate("(table) => { table.scrollLeft = 300; }")
        number = page.locator("[data-table] a.row [data-col=latent]").first
        assert number.evaluate("(cell) => cell.getBoundingClientRect().left") >= 0, "the number of a row stays in sight"


# --- the single file


@pytest.mark.smoke
def test_the_file_opens_with_the_network_refused(page: Page, exported: str) -> None:
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            route.abort()

    page.route("**/*", refuse)
    page.goto(f"{exported}#/?sort=latent")
    expect(page.locator("[data-count] b")).to_have_text("68")
    expect(page.locator(".facts")).to_contain_text("71 of its features in this file")
    page.click("a.row[data-latent='18']")
    card(page, 18)
    expect(page.locator("[data-group=top] .example")).to_have_count(12)
    expect(page.locator("[data-tab]")).to_have_count(4)  # no deep-dive tabs: nothing computes them here
    assert page.url.endswith("#/f/18?sort=latent")
    page.keyboard.press("j")
    card(page, 19)
    page.keyboard.press("w")
    page.keyboard.press("w")
    expect(page.locator("[data-partial]")).to_be_visible()
    page.go_back()
    card(page, 18)
    page.keyboard.press("o")
    expect(page.locator("[data-scatter][data-points='68']")).to_be_visible()
    assert page.url.endswith("#/dashboard?sort=latent")
    assert [url for url in asked if not re.match(r"file:|data:|blob:", url)] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1


def test_links_work_on_the_file(page: Page, exported: str) -> None:
    page.goto(f"{exported}#/f/18?ex=top.3&dst={dst_of(example_of(18, 0, 3))}&w=16&head=6&sort=-maximum")
    card(page, 18)
    expect(page.locator("[data-ex='top.3'].current")).to_have_attribute("data-window", "16")
    expect(page.locator("[data-card]")).to_have_attribute("data-head", "1.6")
    expect(page.locator("[data-tip]")).to_contain_text("destination")
    page.keyboard.press("Escape")
    page.hover("[data-check='top.3']")
    expect(page.locator("[data-tip] [data-equation=holds]")).to_be_visible()
    page.evaluate("location.hash = '#/f/150'")
    card(page, 150)
    page.evaluate("location.hash = '#/f/100'")
    expect(page.locator("[data-error]")).to_contain_text("71 of 200 features")


def test_hostile_tokens_stay_text_in_the_file(page: Page, exported: str) -> None:
    page.goto(f"{exported}#/f/{HOSTILE}")
    card(page, HOSTILE)
    expect(page.locator("[data-ex='top.0'] .tok.dst")).to_have_text("</script><img src=x onerror=alert(1)>")
    assert page.locator("img").count() == 0


def test_the_file_keeps_attention_for_the_first_examples(page: Page, exported: str) -> None:
    page.goto(f"{exported}#/f/18?ex=random.1&d=1")
    card(page, 18)
    expect(page.locator("[data-map-open='random.1'] .attention")).to_be_visible()
    page.goto(f"{exported}#/f/18?ex=interval-3.1&d=1")
    expect(page.locator("[data-map-open='interval-3.1']")).to_contain_text("top and random examples")


def test_a_folder_opens_on_any_static_host(page: Page, tmp_path: Path) -> None:
    folder = export_folder(SOURCE, tmp_path / "site", range(70))
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder))) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url.rsplit("/", 1)[-1]))
        page.goto(f"http://127.0.0.1:{host.server_port}/#/f/66?ex=top.3&w=16&sort=latent")
        card(page, 66)
        expect(page.locator("[data-ex='top.3'].current .tok.dst")).to_be_visible()
        assert asked[1:] == ["core.json.gz", "1.json.gz"], "one pack of features, not both"
        page.hover("[data-check='top.3']")
        expect(page.locator("[data-tip] [data-equation=holds]")).to_be_visible()
        host.shutdown()


# --- the dashboard


def test_the_dashboard_shows_the_sae_and_the_null(page: Page, address: str) -> None:
    page.goto(f"{address}/dashboard")
    expect(page.locator("[data-scatter][data-points='192']")).to_be_visible()
    expect(page.locator("[data-quality]")).to_contain_text("loss_recovered")
    expect(page.locator("[data-series]")).to_have_count(2)
    for chart in ("density", "top-head"):
        shares = page.locator(f"[data-chart={chart}] .bar").evaluate_all("bars => bars.map(bar => +bar.dataset.share)")
        assert sum(shares) == pytest.approx(1), "of live features"
    page.select_option("[data-axis=x]", "maximum")
    page.uncheck("[data-log=x]")
    assert "x=maximum&lx=0" in page.url.replace("lx=0&x=maximum", "x=maximum&lx=0")


def test_a_rectangle_filters_the_list(page: Page, address: str) -> None:
    page.goto(f"{address}/dashboard?lx=0&x=maximum#sort=latent")
    expect(page.locator("[data-scatter][data-points='192']")).to_be_visible()
    box = page.locator("[data-scatter]").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.6 * box["height"], steps=3)
    page.mouse.up()
    expect(page).to_have_url(re.compile("box="))
    bounds = re.search(r"box=([^&]*)", unquote(page.url))
    assert bounds is not None
    x, x0, x1, y, y0, y1 = bounds[1].split(",")
    assert (x, y) == ("maximum", "top_head_share")
    inside = [
        i
        for i in range(200)
        if SOURCE.rows["alive"][i]
        and float(x0) <= SOURCE.rows[x][i] <= float(x1)
        and float(y0) <= SOURCE.rows[y][i] <= float(y1)
    ]
    assert 5 < len(inside) < 150
    expect(page.locator("[data-found] b")).to_have_text(str(len(inside)))
    page.click("[data-found] [data-page=table]")
    expect(page.locator("[data-count] b")).to_have_text(str(len(inside)))
    assert shown_ids(page, 3) == inside[:3]
    page.keyboard.press("Enter")
    card(page, inside[0])
    page.keyboard.press("j")
    card(page, inside[1])
    page.go_back()
    page.go_back()
    page.click("[data-box]")
    expect(page.locator("[data-count] b")).to_have_text("192")


def test_a_point_opens_its_feature(page: Page, address: str) -> None:
    page.goto(f"{address}/dashboard?x=latent&lx=0&y=maximum")
    expect(page.locator("[data-scatter][data-points='192']")).to_be_visible()
    box = page.locator("[data-scatter]").bounding_box()
    assert box is not None
    top = max(SOURCE.rows["maximum"][i] or 0 for i in range(200))
    bottom = min(m for m in SOURCE.rows["maximum"] if m is not None)
    at = (SOURCE.rows["maximum"][18] - bottom) / (top - bottom)
    page.mouse.click(box["x"] + 62 + 18 / 199 * (box["width"] - 72), box["y"] + 10 + (1 - at) * (box["height"] - 44))
    card(page, 18)


def test_a_large_dictionary_stays_smooth(page: Page) -> None:
    class Large(FakeSource):
        def table(self) -> dict[str, Any]:
            table, times = super().table(), 24_576 // N_BLOCKS
            rows = {name: (values[:N_BLOCKS] * times) for name, values in table["rows"].items()}
            rows["latent"] = list(range(N_BLOCKS * times))
            return table | {"rows": rows}

    with serving(Large()) as address:
        page.goto(address)
        expect(page.locator("[data-count]")).to_contain_text("of 24,576")
        spent = page.evaluate(
            """async () => {
              const input = document.querySelector("[data-search]");
              const start = performance.now();
              input.value = "def";
              input.dispatchEvent(new Event("input"));
              const count = document.querySelector("[data-count]");
              while (!count.textContent.includes("by")) await new Promise(requestAnimationFrame);
              return performance.now() - start;
            }"""
        )
        assert spent < 2000, "milliseconds; some 200 on an idle laptop, 120 of which wait for the next letter"
        page.fill("[data-search]", "")
        page.keyboard.press("Escape")
        page.keyboard.press("o")
        expect(page.locator("[data-scatter][data-points]")).to_be_visible()
        assert int(str(page.locator("[data-scatter]").get_attribute("data-points"))) > 20_000
