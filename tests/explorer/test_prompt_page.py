"""The prompt explorer in a browser: what it shows, ablations, keys, links, hostile prompts, what is saved."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from browsing import CHROMIUM, quiet_page, serving
from explorer_source import FakeSource
from headscope.explorer.cards import IndexCards
from headscope.explorer.export import export_html
from headscope.explorer.server import make_app
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.studies.prompt.prompts import Prompts
from headscope.studies.prompt.records import parse_ablations
from headscope.studies.subject import Subject

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

TEXT = "def add(one, two):\n    return one"
HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
QUERY = 9


@pytest.fixture(scope="module")
def live(random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    model = random_model("gpt_neox", max_position_embeddings=512)
    sae = random_sae(model, 40)
    folder = tmp_path_factory.mktemp("page") / "index"
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], random_corpus(model, 40, 32), folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


@pytest.fixture(scope="module")
def subject(live: LiveIndex) -> Subject:
    return Subject(live.index, live)


@pytest.fixture(scope="module")
def source(subject: Subject) -> Prompts:
    return subject.prompts


@pytest.fixture(scope="module")
def address(live: LiveIndex, subject: Subject) -> Iterator[str]:
    with serving(make_app(IndexCards(live.index), subject=subject)) as url:
        yield url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which any script error, dialog or request elsewhere fails the test; a refused prompt is no error."""
    with quiet_page(browser, allowed="400 (Bad Request)", viewport={"width": 1280, "height": 800}) as page:
        page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        yield page


def opened(page: Page, address: str, **view: object) -> None:
    """Open the explorer with a view, and wait until all of it is there."""
    query = "&".join(f"{name}={quote(str(value))}" for name, value in ({"prompt": TEXT} | view).items())
    page.goto(f"{address}/prompt?{query}")
    settled(page)


def settled(page: Page) -> None:
    expect(page.locator(".prompt-body:not([aria-busy])")).to_be_visible()
    expect(page.locator("[data-features]")).to_be_visible()


def active(source: Prompts, text: str = TEXT, query: int = QUERY) -> list[int]:
    return source.features(source.encode(text), query).latent.tolist()


def numbers(page: Page, selector: str, name: str) -> list[float]:
    values = page.locator(selector).evaluate_all(f"nodes => nodes.map((node) => node.getAttribute('{name}'))")
    return [float(value) for value in values]


# --- what it shows


@pytest.mark.smoke
def test_a_typed_prompt_is_shown_token_by_token(page: Page, address: str, source: Prompts) -> None:
    page.goto(f"{address}/")
    page.click("[data-page=prompt]")
    page.fill("[data-prompt]", TEXT)
    page.keyboard.press("Control+Enter")
    settled(page)
    tokens = source.encode(TEXT)
    strip = page.locator("[data-strip] .tok")
    assert strip.count() == len(tokens)
    expect(strip.first).to_have_class(re.compile("special"))
    expect(page.locator("[data-said]")).to_contain_text(f"{len(tokens)} tokens")
    expect(page.locator("[data-said]")).to_contain_text("was put in front")
    last = len(tokens) - 1
    found = source.features(tokens, last)
    rows = page.locator("[data-feature]")
    assert rows.evaluate_all("rows => rows.map((row) => Number(row.dataset.feature))") == found.latent.tolist()
    assert numbers(page, "[data-effect]", "data-effect") == pytest.approx(found.effect, rel=1e-5)
    following = source.next_tokens(tokens, last)
    shown = page.locator("[data-next]").evaluate_all("rows => rows.map((row) => Number(row.dataset.next))")
    assert shown == following.token.tolist()
    expect(page.locator("[data-next] td").first).to_have_text(f"{following.probability[0]:.1%}".replace("%", "\u202f%"))


def test_the_first_screen_loads_none_of_its_scripts(page: Page, address: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rsplit("/", 1)[-1]))
    page.goto(f"{address}/f/5")
    expect(page.locator("[data-card]")).to_be_visible()
    assert not {"prompt.js", "circuit.js", "prompt.css"} & set(asked)


def test_a_selected_feature_shows_who_makes_it(page: Page, address: str, source: Prompts) -> None:
    latent = active(source)[0]
    opened(page, address, token=QUERY, feature=latent)
    dfa = source.dfa(source.encode(TEXT), latent, QUERY)
    expect(page.locator("[data-part=one] [data-closes]").first).to_have_attribute("data-closes", "true")
    cells = page.locator(".grid-map.DFA .map-cell.sum").evaluate_all(
        "cells => cells.map((cell) => Number(cell.dataset.value))"
    )
    assert cells[: len(dfa.by_source)] == pytest.approx(dfa.by_source.sum(1), abs=1e-4)
    assert cells[-1] == pytest.approx(dfa.by_source.sum(), abs=1e-4), "of all heads and sources"
    marked = page.locator("[data-strip] .tok.on").evaluate_all(
        "nodes => nodes.map((node) => [Number(node.dataset.pos), Number(node.dataset.act)])"
    )
    run = source.run(source.encode(TEXT))
    own = run.latent == latent
    assert dict(marked) == pytest.approx(
        dict(zip(run.position[own].tolist(), run.activation[own], strict=True)), rel=1e-5
    )
    tree = page.locator("[data-circuit]")
    assert float(tree.locator("[data-value]").first.get_attribute("data-value") or 0) == pytest.approx(
        dfa.pre, rel=1e-5
    )
    tree.locator("[data-node='1.2']").click()
    expect(page.locator("[data-path='1.2'][aria-expanded=true]")).to_be_visible()
    assert page.locator("[data-closes=false]").count() == 0
    assert "tree=1.2" in page.url
    page.locator("[data-path^='1.2/source'] [data-why]").first.click()
    expect(page.locator("[data-qk='1.2']")).to_be_visible()
    assert "scores=1.2" in page.url
    settled(page)
    before = page.locator("[data-part=one]").inner_text()
    page.reload()
    settled(page)
    expect(page.locator("[data-qk='1.2']")).to_be_visible()
    assert page.locator("[data-part=one]").inner_text() == before


# --- ablations


def test_ablations_change_the_table_as_they_change_the_model(page: Page, address: str, source: Prompts) -> None:
    tokens = source.encode(TEXT)
    latent = active(source)[0]
    opened(page, address, token=QUERY, feature=latent)
    page.locator(f"[data-feature='{latent}'] [data-ablate='{latent}']").click()
    expect(page.locator(f"[data-pin='f{latent}@{QUERY}']")).to_be_visible()
    page.select_option("[data-head-select]", "0.3")
    page.select_option("[data-by]", "mean")
    page.click("[data-add-head]")
    expect(page.locator("[data-pin='h0.3=mean']")).to_be_visible()
    settled(page)
    names = [f"f{latent}@{QUERY}", "h0.3=mean"]
    found, run = source.next_tokens(tokens, QUERY, parse_ablations(names)), source.run(tokens, parse_ablations(names))
    change = found.ablated_logit - found.logit
    assert numbers(page, "[data-logit-change]", "data-logit-change") == pytest.approx(change, abs=1e-5)
    losses = run.ablated_loss - run.loss
    assert numbers(page, "[data-strip] [data-change]", "data-change") == pytest.approx(losses, abs=1e-5)
    assert numbers(page, "[data-mean-change]", "data-mean-change") == pytest.approx([losses.mean()], abs=1e-6)
    here = dict(zip(run.latent[run.position == QUERY].tolist(), run.ablated[run.position == QUERY], strict=True))
    for row in page.locator("[data-feature]").all():
        own = int(row.get_attribute("data-feature") or 0)
        assert float(row.locator("[data-now]").get_attribute("data-now") or -1) == pytest.approx(here[own], abs=1e-5)
    page.click("[data-remove='h0.3=mean']")
    expect(page.locator("[data-pin]")).to_have_count(1)
    page.click(f"[data-remove='f{latent}@{QUERY}']")
    expect(page.locator("[data-pin]")).to_have_count(0)
    expect(page.locator("[data-logit-change]")).to_have_count(0)


def test_keys_move_select_and_ablate(page: Page, address: str, source: Prompts) -> None:
    opened(page, address, token=QUERY - 1)
    page.keyboard.press("ArrowRight")
    expect(page.locator(f"[data-features='{QUERY}']")).to_be_visible()
    first, second = active(source)[:2]
    page.keyboard.press("ArrowDown")
    expect(page.locator(f"[data-feature='{first}'][aria-current=true]")).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(page.locator(f"[data-feature='{second}'][aria-current=true]")).to_be_visible()
    page.keyboard.press("ArrowUp")
    expect(page.locator(f"[data-feature='{first}'][aria-current=true]")).to_be_visible()
    settled(page)
    page.keyboard.press("a")
    expect(page.locator(f"[data-pin='f{first}@{QUERY}']")).to_be_visible()
    page.keyboard.press("A")
    expect(page.locator(f"[data-pin='f{first}']")).to_be_visible()
    page.keyboard.press("x")
    expect(page.locator("[data-pin]")).to_have_count(1)
    settled(page)
    page.keyboard.press("a")
    expect(page.locator("[data-pin]")).to_have_count(0)
    settled(page)
    page.keyboard.press("e")
    expect(page.locator("[data-prompt]")).to_be_focused()
    page.keyboard.type("xaA")
    expect(page.locator("[data-pin]")).to_have_count(0)
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.locator("[data-part=one]")).to_be_hidden()
    page.locator("[data-strip] .tok.dst").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("[data-strip] .tok.dst")).to_be_focused()
    assert page.locator("[data-strip] .tok.dst").get_attribute("data-pos") == str(QUERY - 1)


def test_what_does_not_exist_is_said_and_can_be_taken_back(page: Page, address: str) -> None:
    opened(page, address, token=QUERY)
    page.fill("[data-feature-number]", "40")
    page.click("[data-add-feature]")
    expect(page.locator("[data-wrong]")).to_contain_text("feature 40")
    expect(page.locator("[data-wrong]")).to_contain_text("0 to 39")
    page.click("[data-clear-wrong]")
    expect(page.locator("[data-wrong]")).to_be_hidden()
    page.fill("[data-feature-number]", "<img>")
    page.click("[data-add-feature]")
    expect(page.locator("[data-wrong]")).to_contain_text("<img>")
    for view, said in (
        ({"edits": "h9.9=zero"}, "layer 9"),
        ({"edits": "nonsense"}, "nonsense"),
        ({"feature": 40}, "feature 40"),
    ):
        page.goto(f"{address}/prompt?" + "&".join(f"{k}={quote(str(v))}" for k, v in ({"prompt": TEXT} | view).items()))
        expect(page.locator("[data-wrong]")).to_contain_text(said)


def test_prompts_that_cannot_be_read_are_said(page: Page, address: str) -> None:
    page.goto(f"{address}/prompt")
    page.click("[data-run]")
    expect(page.locator("[data-wrong]")).to_contain_text("The prompt is empty")
    page.fill("[data-prompt]", "x" * 600)
    page.click("[data-run]")
    expect(page.locator("[data-wrong]")).to_contain_text("601 tokens")
    expect(page.locator("[data-wrong]")).to_contain_text("512")
    page.fill("[data-prompt]", "y")
    page.click("[data-run]")
    expect(page.locator("[data-strip] .tok")).to_have_count(2)
    expect(page.locator("[data-wrong]")).to_be_hidden()


@pytest.mark.parametrize("text", [HOSTILE, "🦊 ש\u202e😀", "<|bos|> &lt;b&gt;", "\t \r x"])
def test_any_prompt_is_text(page: Page, address: str, text: str) -> None:
    opened(page, address, prompt=text, token=3, feature=4, edits="f4,h1.1=zero")
    expect(page.locator("[data-strip] .tok").first).to_be_visible()
    assert page.locator("[data-prompting] img, [data-prompting] script, [data-prompting] b > img").count() == 0
    expect(page.locator("[data-part=one] [data-circuit]")).to_be_visible()
    if text == HOSTILE:
        shown = page.locator("[data-strip] .tok:not(.special)").evaluate_all(
            "nodes => nodes.map((node) => node.textContent).join('')"
        )
        assert shown == HOSTILE
    saved = saved_page(page)
    assert "<img" not in re.sub(r"&lt;img", "", saved)
    assert "<script" not in saved


# --- links


def test_a_link_brings_everything_back(page: Page, address: str, source: Prompts, browser: Browser) -> None:
    latent = active(source)[1]
    opened(
        page,
        address,
        token=QUERY,
        feature=latent,
        edits=f"f{latent}@{QUERY},h1.3=zero",
        tree="1.3",
        paint="loss",
        target=7,
    )
    expect(page.locator("[data-path='1.3'][aria-expanded=true]")).to_be_visible()
    with quiet_page(browser, viewport={"width": 1280, "height": 800}) as other:
        other.goto(page.url)
        settled(other)
        expect(other.locator("[data-path='1.3'][aria-expanded=true]")).to_be_visible()
        assert other.locator("[data-prompting]").inner_text() == page.locator("[data-prompting]").inner_text()
    assert page.locator("[data-strip=loss]").count() == 1
    expect(page.locator("[data-next='7'][aria-current=true], th .label[data-token='7']").first).to_be_visible()


def test_a_long_prompt_is_packed_into_its_link(page: Page, address: str) -> None:
    page.goto(f"{address}/prompt")
    text = "".join(f"line {i} <b>\n" for i in range(38))[:450]
    page.fill("[data-prompt]", text)
    page.click("[data-run]")
    settled(page)
    assert "packed=" in page.url
    assert "line" not in page.url
    assert len(page.url) < 400
    page.reload()
    settled(page)
    assert page.input_value("[data-prompt]") == text
    page.goto(page.url.replace("packed=", "packed=AAAA"))
    expect(page.locator("[data-wrong]")).to_contain_text("cannot be unpacked")


def test_a_link_that_unpacks_to_too_much_is_refused(page: Page, address: str) -> None:
    page.goto(f"{address}/prompt")
    bomb = page.evaluate("""async () => {
      const content = new Blob([JSON.stringify({text: "x".repeat(20_000_000)})]);
      const packed = content.stream().pipeThrough(new CompressionStream("gzip"));
      const bytes = new Uint8Array(await new Response(packed).arrayBuffer());
      const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
      return text.replaceAll("+", "-").replaceAll("/", "_");
    }""")
    assert len(bomb) < 60_000
    page.goto(f"{address}/prompt?packed={bomb}")
    expect(page.locator("[data-wrong]")).to_contain_text("cannot be unpacked")


def test_an_example_of_a_card_opens_with_its_context(page: Page, address: str, live: LiveIndex) -> None:
    latent = 5
    example = live.index.examples(latent)[0].examples[0]
    page.goto(f"{address}/f/{latent}?w=16")
    page.locator("[data-ex='top.0'] [data-explore]").click()
    settled(page)
    block, query = divmod(example.position, live.index.block_size)
    chosen = page.locator("[data-strip] .tok.dst")
    assert chosen.get_attribute("data-pos") == str(query)
    assert float(chosen.get_attribute("data-act") or 0) == pytest.approx(example.activation, rel=1e-4)
    expect(page.locator(f"[data-feature='{latent}'][aria-current=true]")).to_be_visible()
    shown = page.locator("[data-strip] .tok").count()
    assert shown == min(query + 5, live.index.block_size)
    page.go_back()
    expect(page.locator(f"[data-card='{latent}']")).to_be_visible()
    page.keyboard.press("e")
    settled(page)
    assert f"block={block}" in page.url


# --- what is saved


def saved_page(page: Page) -> str:
    with page.expect_download() as caught:
        page.click("[data-tool=html]")
    return Path(caught.value.path()).read_text(encoding="utf-8")


def test_a_saved_page_needs_no_script_and_no_server(
    page: Page, address: str, source: Prompts, browser: Browser, tmp_path: Path
) -> None:
    latent = active(source)[0]
    opened(page, address, token=QUERY, feature=latent, edits=f"f{latent}", tree="1.2")
    expect(page.locator("[data-path='1.2'][aria-expanded=true]")).to_be_visible()
    (tmp_path / "saved.html").write_text(saved_page(page), encoding="utf-8")
    asked: list[str] = []
    with quiet_page(browser, java_script_enabled=False, offline=True, viewport={"width": 1280, "height": 800}) as saved:
        saved.on("request", lambda request: asked.append(request.url))
        saved.goto(f"file://{tmp_path}/saved.html")
        for part in ("[data-features]", "[data-next-of]", "[data-circuit]", "[data-strip]"):
            live_text, saved_text = page.locator(part).inner_text(), saved.locator(part).inner_text()
            for word in ("why?", "ablate", "here · all", " · "):
                live_text, saved_text = live_text.replace(word, ""), saved_text.replace(word, "")
            assert saved_text.split() == live_text.split(), part
        expect(saved.locator("[data-path='1.2'] [data-path]").first).to_be_visible()
        expect(saved.locator(".saved-prompt")).to_have_text(TEXT)
        expect(saved.locator(".saved-head")).to_contain_text("headscope serve --index INDEX --with-model")
        assert saved.locator("button, a, form, script, input").count() == 0
    assert [url for url in asked if not url.startswith("file:")] == []


def test_saved_json_has_all_numbers(page: Page, address: str, source: Prompts) -> None:
    tokens, latent = source.encode(TEXT), active(source)[0]
    opened(page, address, token=QUERY, feature=latent, edits="h0.2=zero", tree="1.2", scores=f"1.2,{QUERY},3")
    expect(page.locator("[data-qk]")).to_be_visible()
    with page.expect_download() as caught:
        page.click("[data-tool=json]")
    found = json.loads(Path(caught.value.path()).read_text(encoding="utf-8"))
    assert [token["id"] for token in found["tokens"]] == list(tokens)
    assert found["prompt"] == {"text": TEXT}
    assert found["view"]["edits"] == "h0.2=zero"
    run = source.run(tokens, parse_ablations(["h0.2=zero"]))
    assert found["run"]["ablated_loss"] == pytest.approx(run.ablated_loss, rel=1e-6)
    assert found["dfa"]["pre"] == pytest.approx(source.dfa(tokens, latent, QUERY).pre, rel=1e-6)
    assert set(found["levels"]) == {"", "1.2"}
    assert found["scores"]["key"] == 3
    assert np.sum(found["scores"]["contrast"]) == pytest.approx(
        found["scores"]["score"] - found["scores"]["mean"], abs=1e-4
    )


# --- without a model, and small screens


def test_without_a_model_the_page_says_what_it_takes(page: Page) -> None:
    with serving(make_app(FakeSource())) as address:
        page.goto(f"{address}/prompt?prompt=x")
        expect(page.locator("[data-no-model]")).to_contain_text("headscope serve --index INDEX --with-model")
        page.goto(f"{address}/f/18?w=16")
        expect(page.locator(".example .tok").first).to_be_visible()
        assert page.locator("[data-explore]").count() == 0
        expect(page.locator("[data-position]")).to_be_visible()
        page.goto("about:blank")  # asks nothing of a server that has ended


def test_an_export_says_so_too(page: Page, tmp_path: Path) -> None:
    export_html(FakeSource(), tmp_path / "page.html", [18])
    page.goto(f"file://{tmp_path}/page.html#/prompt?prompt=x")
    expect(page.locator("[data-no-model]")).to_contain_text("This is an export")
    expect(page.locator("[data-no-model]")).to_contain_text("headscope serve --index INDEX --with-model")


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen(browser: Browser, address: str, source: Prompts, width: int) -> None:
    with quiet_page(browser, viewport={"width": width, "height": 800}) as page:
        opened(
            page,
            address,
            token=QUERY,
            feature=active(source)[0],
            edits="f3,f5,f7@2,h1.1=mean,h0.0=zero@3",
            tree="1.2",
            scores=f"1.2,{QUERY}",
        )
        expect(page.locator("[data-qk]")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
