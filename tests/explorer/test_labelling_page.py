"""The labelling queue in a browser: by keyboard, blind, on a phone, by two annotators, with hostile text."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from browsing import CHROMIUM, quiet_page, serving
from explorer_source import DEAD_LATENT, HOSTILE, FakeIndex, FakeSource
from headscope.explorer.labelling import LabelRoutes
from headscope.explorer.server import make_app
from headscope.index.labels import Judgement, LabelStore

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

SOURCE = FakeSource()
ATTACK = "</script><img src=x onerror=alert(1)><b>bold</b>"


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    index = FakeIndex()
    index.folder = tmp_path
    return LabelStore(index)


@pytest.fixture
def address(store: LabelStore) -> Iterator[str]:
    with serving(make_app(SOURCE, labels=LabelRoutes(store.index))) as url:
        yield url


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """`open_page(width, height)`: a page on which any script error, dialog or request elsewhere fails the test."""
    with ExitStack() as stack:
        yield lambda width=1280, height=800: stack.enter_context(
            quiet_page(browser, allowed="(Bad Request)", viewport={"width": width, "height": height})
        )


def queue(page: Page, address: str, sample: str = "first:10", who: str = "ann", more: str = "") -> None:
    page.goto(f"{address}/label?s={sample}&who={who}{more}")
    expect(page.locator("[data-progress]")).to_be_visible()


def at(page: Page, latent: int) -> None:
    """Wait until the queue shows a feature."""
    expect(page.locator(f"[data-card='{latent}']")).to_be_visible()
    expect(page.locator(f"[data-dot='{latent}']")).to_have_attribute("aria-current", "true")


def said(store: LabelStore) -> list[tuple[str, int, str, int]]:
    return [(own.annotator, own.latent, own.verdict, own.confidence) for own in store.read().standing]


@pytest.mark.smoke
def test_the_form_starts_a_queue_and_the_link_brings_it_back(
    open_page: Callable[..., Page], address: str, store: LabelStore
) -> None:
    page = open_page()
    page.goto(address)
    expect(page.locator("[data-table] a.row").first).to_be_visible()
    page.keyboard.press("n")
    page.fill("[name=who]", "Ann é")
    page.select_option("[name=design]", "random")
    page.fill("[name=size]", "7")
    page.fill("[name=seed]", "3")
    page.check("[name=blind]")
    page.keyboard.press("Enter")
    expect(page.locator("[data-progress]")).to_have_text("0 of 7 labelled")
    assert "s=random%3A7%3A3" in page.url
    assert "blind=1" in page.url
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    expect(page.locator("[data-progress]")).to_have_text("1 of 7 labelled")
    page.reload()
    expect(page.locator("[data-progress]")).to_have_text("1 of 7 labelled")
    (label,) = store.read().standing
    assert (label.annotator, label.verdict, label.blind, label.queue) == ("Ann é", "unsure", True, "random:7:3")
    page.click("[data-change]")
    expect(page.locator("[name=who]")).to_have_value("")


def test_a_queue_by_keyboard_alone(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    """Verdict, confidence, text and notes; dead features are passed over; the end is said."""
    page = open_page()
    queue(page, address)
    at(page, 0)
    expect(page.locator("[data-progress]")).to_have_text("0 of 9 labelled")
    for key in ("1", "e", "t"):
        page.keyboard.press(key)
    page.keyboard.type("just 1 u and ? or 3")
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    page.keyboard.type("two\nlines")
    page.keyboard.press("Control+Enter")
    at(page, 1)
    page.keyboard.press("3")
    page.keyboard.press("q")
    page.keyboard.press("Enter")
    at(page, 2)
    page.keyboard.press("j")
    at(page, 3)
    page.keyboard.press("k")
    at(page, 2)
    for latent in (2, 3, 4, 5, 6, 8):
        at(page, latent)
        page.keyboard.press("2")
        page.keyboard.press("Enter")
    at(page, 9)
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    expect(page.locator("[data-progress]")).to_have_text("9 of 9 labelled")
    expect(page.locator("[data-said]")).to_contain_text("all are labelled")
    assert said(store)[:2] == [("ann", 0, "interpretable", 3), ("ann", 1, "not interpretable", 1)]
    assert {latent for _, latent, _, _ in said(store)} == set(range(10)) - {DEAD_LATENT}
    first = store.read().standing[0]
    assert (first.text, first.notes) == ("just 1 u and ? or 3", "two\nlines")


def test_keys_that_come_too_fast_are_said_of_no_feature(
    open_page: Callable[..., Page], address: str, store: LabelStore
) -> None:
    """Between a save and the next card, what is pressed would be of the old feature."""
    page = open_page()
    queue(page, address)
    page.route("**/api/feature/*", lambda route: None)  # the next card does not come
    for key in ("1", "Enter", "3", "Enter", "3", "Enter"):
        page.keyboard.press(key)
        page.wait_for_timeout(100)
    assert said(store) == [("ann", 0, "interpretable", 2)]


def test_nothing_is_saved_without_a_verdict(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    page = open_page()
    queue(page, address)
    page.keyboard.press("Enter")
    expect(page.locator("[data-error]")).to_contain_text("Choose a verdict")
    assert not store.path.exists()


def test_undo_retracts_and_keeps_what_was_said_for_mending(
    open_page: Callable[..., Page], address: str, store: LabelStore
) -> None:
    page = open_page()
    queue(page, address)
    for latent, verdict in enumerate("13"):
        at(page, latent)
        page.keyboard.press(verdict)
        page.keyboard.press("Enter")
    at(page, 2)
    before = store.path.read_bytes()
    page.keyboard.press("u")
    at(page, 1)
    expect(page.locator("[data-progress]")).to_have_text("1 of 9 labelled")
    expect(page.locator("[data-verdict='not interpretable']")).to_have_attribute("aria-pressed", "true")
    assert store.path.read_bytes().startswith(before), "appended"
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    at(page, 2)
    page.keyboard.press("u")
    at(page, 1)
    page.keyboard.press("u")
    at(page, 0)
    expect(page.locator("[data-progress]")).to_have_text("0 of 9 labelled")
    assert said(store) == []


def test_a_label_given_anew_counts_instead_and_undo_brings_the_old_one_back(
    open_page: Callable[..., Page], address: str, store: LabelStore
) -> None:
    store.add(0, "ann", Judgement(verdict="interpretable", text="before"))
    page = open_page()
    queue(page, address, more="&n=0")
    at(page, 0)
    expect(page.locator("[name=text]")).to_have_value("before")
    page.keyboard.press("3")
    page.keyboard.press("Enter")
    at(page, 1)
    assert store.read().latest()["ann", 0].verdict == "not interpretable"
    page.keyboard.press("u")
    at(page, 0)
    expect(page.locator("[data-said]")).to_contain_text("saved: interpretable")
    assert store.read().latest()["ann", 0].verdict == "interpretable"


def test_what_is_typed_is_kept_while_one_looks_elsewhere(open_page: Callable[..., Page], address: str) -> None:
    page = open_page()
    queue(page, address)
    page.fill("[name=text]", "half a thought")
    page.select_option("[name=family]", "induction")
    page.click("[data-step=next]")
    at(page, 1)
    expect(page.locator("[name=text]")).to_have_value("")
    page.click("[data-dot='0']")
    at(page, 0)
    expect(page.locator("[name=text]")).to_have_value("half a thought")
    expect(page.locator("[name=family]")).to_have_value("induction")


def test_blind_hides_attribution_logits_and_others_and_says_so(
    open_page: Callable[..., Page], address: str, store: LabelStore
) -> None:
    store.add(3, "bob", Judgement(verdict="not interpretable", text="bob's word"))
    page = open_page()
    queue(page, address, more="&n=3&blind=1")
    at(page, 3)
    for hidden in (
        "[data-stat=top_head]",
        "svg.heads",
        "[data-logits]",
        "[data-sources]",
        "[data-copying]",
        "[data-correlated]",
        "[data-chip]",
        ".tok.src",
        "[data-others]",
        "[data-null]",
    ):
        assert page.locator(hidden).count() == 0, hidden
    assert page.locator(".tok.on").count() > 0, "the activations are there"
    assert page.locator("svg.histogram .bar").count() > 0
    assert page.locator(".open-map").first.is_hidden()
    expect(page.locator("[data-blind]")).to_contain_text("DFA, logits")
    assert "bob" not in page.locator("body").inner_text()
    page.locator(".tok.dst").first.hover()
    assert page.locator("[data-tip]").is_hidden(), "its numbers are of DFA"
    page.locator("[data-tab=interval]").click()
    expect(page.locator("[data-group='interval-9']")).to_be_visible()
    assert page.locator(".tok.src").count() == 0
    page.click("[data-results]")
    expect(page.locator("[data-error]")).to_contain_text("once all")
    queue(page, address, more="&n=3")
    expect(page.locator("[data-others]")).to_contain_text("bob: not interpretable")
    assert page.locator("svg.heads").count() == 1
    assert page.locator(".tok.src").count() > 0


def test_two_annotators_at_once(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    """Their pages do not disturb each other; the survey has both and their agreement."""
    pages = {who: open_page() for who in ("ann", "bob")}
    for who, page in pages.items():
        queue(page, address, "first:4", who)
    for latent in range(4):
        for who, page in pages.items():
            at(page, latent)
            page.keyboard.press("3" if who == "bob" and latent == 2 else "1")
            page.keyboard.press("Enter")
    for page in pages.values():
        expect(page.locator("[data-progress]")).to_have_text("4 of 4 labelled")
    assert len(said(store)) == 8
    pages["ann"].click("[data-results]")
    expect(pages["ann"].locator("[data-survey]")).to_be_visible()
    rows = [row.split("\t") for row in pages["ann"].locator("[data-survey] tr").all_inner_texts()]
    table = {row[0]: row[1] for row in rows}
    assert table["interpretable, ann"] == "100.0 % [51.0, 100.0], 4 of 4"
    assert table["interpretable, bob"].endswith("3 of 4")
    assert table["agreement, ann and bob"].endswith("3 of 4")
    assert table["kappa, ann and bob"].startswith("0.00")


def test_a_stale_label_is_shown_as_such(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    store.add(1, "ann", Judgement(verdict="interpretable"))
    store.index.manifest["sae"]["hash"] = "sha256:another"
    page = open_page()
    queue(page, address, more="&n=1")
    at(page, 1)
    expect(page.locator("[data-said]")).to_contain_text("stale")
    expect(page.locator("[data-dot='1']")).to_have_class("dot stale")


def test_hostile_text_is_text(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    """Names, labels and notes of others, and the tokens of a card; the fixture fails on any script that runs."""
    store.add(HOSTILE, ATTACK, Judgement(verdict="unsure", text=ATTACK, notes=ATTACK, family="other"))
    page = open_page()
    page.goto(f"{address}/label?n={HOSTILE}&who=%3Cimg%20src=x%20onerror=alert(1)%3E")
    expect(page.locator("[data-others]")).to_contain_text(ATTACK)
    page.fill("[name=text]", ATTACK)
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    expect(page.locator("[data-said]")).to_contain_text("saved: interpretable")
    queue(page, address, "first:10", ATTACK)
    page.click("[data-results]")
    expect(page.locator("[data-survey]")).to_contain_text(f"interpretable, {ATTACK}")
    assert page.locator("img, [data-survey] b").count() == 0


def test_one_feature_from_its_card(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    page = open_page()
    page.goto(f"{address}/f/5")
    expect(page.locator("[data-card='5']")).to_be_visible()
    page.keyboard.press("n")
    page.fill("[name=who]", "ann")
    page.click("[data-start]")
    at_card = page.locator("[data-card='5']")
    expect(at_card).to_be_visible()
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    expect(page.locator("[data-said]")).to_contain_text("saved: interpretable")
    assert store.read().standing[0].queue == ""
    page.go_back()
    expect(page.locator("[data-card='5'] [data-position]")).to_be_visible()


@pytest.mark.parametrize(
    ("query", "says"), [("s=first:999", "1 to 200"), ("s=nonsense", "first:N"), ("n=7", "alive"), ("n=x", "0 to 199")]
)
def test_a_queue_that_cannot_be_says_why(open_page: Callable[..., Page], address: str, query: str, says: str) -> None:
    page = open_page()
    page.goto(f"{address}/label?{query}&who=ann")
    expect(page.locator("[data-error]")).to_contain_text(says)
    expect(page.locator("[data-start]")).to_be_visible()


def test_a_damaged_file_is_named(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    store.path.write_text("{}\n")
    page = open_page()
    page.goto(f"{address}/label?s=first:10&who=ann")
    expect(page.locator("[data-error]")).to_contain_text("labels.jsonl line 1")


def test_a_label_that_cannot_be_kept_is_not_lost(
    open_page: Callable[..., Page], address: str, store: LabelStore
) -> None:
    page = open_page()
    queue(page, address)
    page.route("**/api/labels", lambda route: route.fulfill(status=400, json={"error": "no room", "do": "make some"}))
    page.fill("[name=text]", "a thought")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    expect(page.locator("[data-error]")).to_contain_text("no room · make some")
    expect(page.locator("[name=text]")).to_have_value("a thought")
    page.unroute("**/api/labels")
    page.keyboard.press("Enter")
    at(page, 1)
    assert store.read().standing[0].text == "a thought"


def test_on_a_phone(open_page: Callable[..., Page], address: str, store: LabelStore) -> None:
    page = open_page(390, 844)
    queue(page, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("[data-verdict='interpretable']")
    page.click("[data-confidence='3']")
    page.click("[data-save]")
    expect(page.locator("[data-card='1']")).to_be_visible()
    panel = page.locator("[data-label-panel]").bounding_box()
    assert panel is not None
    assert panel["y"] + panel["height"] <= 845, "in sight without scrolling"
    assert panel["height"] < 0.4 * 844, "and leaves room for the card"
    assert said(store) == [("ann", 0, "interpretable", 3)]


def test_the_first_screen_does_not_load_the_queue(open_page: Callable[..., Page], address: str) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/f/3")
    expect(page.locator("[data-card='3']")).to_be_visible()
    assert not any("labels" in url for url in asked)
