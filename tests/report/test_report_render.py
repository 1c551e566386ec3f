"""A report as HTML and Markdown: hostile text stays text, nothing is loaded, every row begins with its id."""

import re
from html.parser import HTMLParser
from xml.etree.ElementTree import tostring

import pytest

from headscope.report.charts import svg
from headscope.report.numbers import interval, said
from headscope.report.records import KINDS, Claim, Exemplar, Figure, Listing
from headscope.report.render_html import html
from headscope.report.render_markdown import markdown
from headscope.report.results import Report, StudyResult, SubjectResult

HOSTILE = "</td></style></script><script>alert(1)</script><img src=//x.example onerror=alert(2)> | `a` *b*\n| M99 |"


def _facts() -> dict:
    return {
        "site": "blocks.1.attn.hook_z",
        "z_convention": "raw",
        "n_alive": 10,
        "model": {"name": HOSTILE, "hash": "sha256:ab", "n_layers": 2, "n_heads": 2},
        "sae": {"name": HOSTILE, "hash": "sha256:cd", "architecture": "standard", "d_sae": 16, "d_in": 8},
        "corpus": {
            "name": HOSTILE,
            "split": "all",
            "hash": "sha256:ef",
            "n_tokens": 100,
            "n_documents": 3,
            "block_size": 16,
        },
    }


def _findings(kind) -> tuple:
    own = {"feature": 3, "kind": kind}
    return (
        Claim(
            "M11", f"precision {HOSTILE}", HOSTILE, post=0.5, ours=0.4, n=30, interval=(0.1, 0.6), unit="share", **own
        ),
        Claim("M14", "loss", "definition", missing=HOSTILE, differs=HOSTILE, **own),
        Figure(HOSTILE, "grouped", (HOSTILE, "b"), {HOSTILE: (1.0, -2.0), "t": (None, 0.5)}, HOSTILE, **own),
        Figure("lines", "lines", tuple("0123"), {"s": (1.0, None, 3.0, 0.0)}, "d", log=True, **own),
        Listing(HOSTILE, ("a", HOSTILE), ((HOSTILE, "x"),), HOSTILE, **own),
    )


@pytest.fixture(scope="module")
def report() -> Report:
    subjects = []
    for name in ("first", "second_sae"):
        studies = [StudyResult("whole", 1.0, (Claim("M2", "L0", "mean", post=12, ours=11.0, null="none"),))]
        studies += [StudyResult(kind, 2.0, _findings(kind)) for kind in KINDS]
        studies.append(StudyResult("broken", 0.1, (Claim("M9", "shares", "-", missing="it broke"),), failed=HOSTILE))
        exemplar = Exemplar("induction", 3, f'induction("{HOSTILE}")', 0.5, 1, (1,), "largest")
        subjects.append(SubjectResult(name, _facts(), (exemplar,), tuple(studies), {1: HOSTILE}))
    return Report("0.1", "2026-01-01", {"name": "quick", "seed": 0}, _facts()["model"], tuple(subjects))


class _Elements(HTMLParser):
    """The elements of a page, their addresses and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: set[str] = set()
        self.handlers: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses |= {value for name, value in attrs if name in ("src", "href", "srcset", "action")}
        self.handlers |= {name for name, _ in attrs if name.startswith("on") or name == "style"}

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def parsed(report) -> _Elements:
    parser = _Elements()
    parser.feed(html(report))
    return parser


def test_text_of_a_corpus_is_text_in_the_page(parsed):
    assert not parsed.tags & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert not parsed.handlers
    assert HOSTILE in "".join(parsed.text)


def test_the_page_begins_with_its_contents_and_only_the_first_section_is_open(report):
    page = html(report)
    sections = re.findall(r'<details class="section"( open)?.*?><summary><h2>(.*?)</h2></summary><div id="(.*?)"', page)
    assert [bool(is_open) for is_open, _, _ in sections] == [True] + [False] * (len(sections) - 1)
    contents = page[page.index("<nav") : page.index("</nav>")]
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', contents)
    assert links == [(anchor, title) for _, title, anchor in sections]


def test_the_page_names_no_address_but_its_own_sections(parsed, report):
    assert parsed.addresses
    assert all(address.startswith("#") for address in parsed.addresses)
    ids = set(re.findall(r' id="([^"]+)"', html(report)))
    assert {address[1:] for address in parsed.addresses} <= ids


def test_the_post_is_called_the_post(report):
    assert "the post" in html(report)
    assert "seed claim" not in html(report)


def test_every_row_of_the_table_begins_with_its_id_and_has_all_cells(report):
    lines = markdown(report).splitlines()
    start = lines.index("## Claims")
    table = [line for line in lines[start : lines.index("## Studies")] if line.startswith("|")]
    heading, _, *rows = table
    n_cells = len(re.findall(r"(?<!\\)\|", heading))
    assert "| the post |" in heading
    assert "| first | second\\_sae |" in heading
    assert len(rows) == len(report.rows()) == 8
    for row in rows:
        assert re.match(r"\| M\d+b? \| ", row)
        assert len(re.findall(r"(?<!\\)\|", row)) == n_cells
    assert "<script" not in "\n".join(lines).replace("\\<script", "")


def test_markdown_says_that_it_is_generated(report):
    assert "not edited by hand" in markdown(report)


@pytest.mark.parametrize(
    "figure",
    [
        Figure("empty", "bars", (), {"s": ()}, "d"),
        Figure("none", "bars", ("a",), {"s": (None,)}, "d"),
        Figure("zeros", "stacked", ("a", "b"), {"s": (0, 0), "t": (0, 0)}, "d"),
        Figure("log zeros", "lines", ("a", "b"), {"s": (0, 0)}, "d", log=True),
        Figure("negative", "bars", ("a", "b"), {"s": (-1, -3)}, "d"),
        Figure("large", "bars", ("a", "b"), {"s": (1e12, 1e-9)}, "d"),
        Figure("no series", "lines", ("a",), {}, "d"),
    ],
    ids=lambda figure: figure.title,
)
def test_a_figure_of_little_is_drawn_inside_its_frame(figure):
    drawn = svg(figure)
    width, height = map(float, drawn.attrib["viewBox"].split()[2:])
    assert "nan" not in tostring(drawn, encoding="unicode").lower()
    for bar in drawn.iter("rect"):
        assert -0.5 <= float(bar.attrib["y"]) <= height
        assert 0 <= float(bar.attrib["x"]) <= width
        assert float(bar.attrib["y"]) + float(bar.attrib["height"]) <= height


def test_bars_are_as_high_as_their_values():
    drawn = svg(Figure("f", "bars", ("a", "b", "c"), {"s": (1.0, 2.0, 4.0)}, "d"))
    heights = [float(bar.attrib["height"]) for bar in drawn.iter("rect")]
    assert heights[1] / heights[0] == pytest.approx(2, rel=1e-2)
    assert heights[2] / heights[0] == pytest.approx(4, rel=1e-2)


def test_stacked_bars_stand_on_one_another():
    drawn = svg(Figure("f", "stacked", ("a",), {"s": (1.0,), "t": (3.0,)}, "d"))
    first, second = (bar.attrib for bar in drawn.iter("rect"))
    assert float(second["y"]) + float(second["height"]) == pytest.approx(float(first["y"]), abs=0.02)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.8734, "share", "87.3 %"),
        (0.0, "share", "0.0 %"),
        (0.00002, "share", "0.002 %"),
        (12, "", "12"),
        (0.12346, "nats", "0.1235"),
        (16384, "", "16,384"),
        (12345.6, "", "12,346"),
        ("text", "", "text"),
    ],
)
def test_numbers_are_said_as_they_are(value, unit, shown):
    assert said(value, unit) == shown


def test_an_interval_is_said_with_its_ends():
    claim = Claim("M3", "c", "d", ours=0.5, interval=(0.25, 0.75), unit="share")
    assert interval(claim) == "[25.0, 75.0]"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 800)])
def test_the_page_opens_without_a_network_and_fits_its_window(report, tmp_path, width, height):
    playwright_api = pytest.importorskip("playwright.sync_api")
    from browsing import CHROMIUM, launched, quiet_page

    if CHROMIUM is None:
        pytest.skip("no Chromium")
    path = tmp_path / "report.html"
    path.write_text(html(report), encoding="utf-8")
    with playwright_api.sync_playwright() as playwright:
        browser = launched(playwright)
        with quiet_page(browser, offline=True, viewport={"width": width, "height": height}) as page:
            page.goto(path.as_uri())
            assert page.locator("figure > svg").count() == 4
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            colour = page.evaluate("getComputedStyle(document.querySelector('small')).fontSize")
            assert colour == "12.5px"  # the policy lets its own style through
            page.get_by_role("link", name="induction feature").first.click()
            assert page.locator("#induction").is_visible()
        browser.close()
