"""A report as one HTML file that needs no script, no server and no network.

The page is built as elements, never as text, so that corpus and model text cannot become markup. A content security
policy allows its own style and nothing else.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from headscope.report.charts import COLOURS, svg
from headscope.report.numbers import DASH, beside, duration, interval, number, said
from headscope.report.records import KINDS, Claim, Exemplar, Figure, Kind, Listing
from headscope.report.results import Report, Row, SubjectResult

_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
_TITLES: dict[Kind, str] = {
    "induction": "The induction feature",
    "local context": "The local-context feature",
    "high-level context": "The high-level-context feature",
}
_POST_FEATURE: dict[Kind, str] = {
    "induction": "In the post: “board” is next by induction.",
    "local context": "In the post: in a question that starts with “Which”.",
    "high-level context": "In the post: in a text about pets.",
}


def html(report: Report) -> str:
    """Render the whole report."""
    page = Element("html", lang="en")
    _head(SubElement(page, "head"), f"Replication report: {', '.join(s.name for s in report.subjects)}")
    body = SubElement(page, "body")
    main = SubElement(body, "main")
    _top(main, report)
    rows = report.rows()
    names = [subject.name for subject in report.subjects]
    section = _section(main, "claims", "The SAE, its dictionary and its heads", is_open=True)
    _table(section, [row for row in rows if row.said.kind is None], names)
    for subject in report.subjects:
        _drawn(section, subject, None)
    for kind in KINDS:
        section = _section(main, _anchor(kind), _TITLES[kind])
        _add(section, "p", _POST_FEATURE[kind], "soft")
        _table(section, [row for row in rows if row.said.kind == kind], names)
        for subject in report.subjects:
            _exemplar(section, subject, kind)
    _provenance(_section(main, "provenance", "Where this comes from"), report)
    return f"<!doctype html>\n{tostring(page, encoding='unicode', method='html')}\n"


def _head(head: Element, title: str) -> None:
    style = _STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY.format(digest)})
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _add(head, "title", title)
    _add(head, "style", style)


def _top(main: Element, report: Report) -> None:
    _add(main, "h1", "Sparse autoencoders on attention outputs: the post's claims, measured")
    measured = sum(claim.ours is not None for s in report.subjects for claim in s.claims)
    total = sum(len(s.claims) for s in report.subjects)
    settings = report.settings["name"]
    _add(
        main,
        "p",
        f"{measured:,} of {total:,} numbers could be measured on {report.model['name']} with "
        f"{', '.join(s.name for s in report.subjects)} ({settings} settings). “The post” is Kissane et al. (2024), of "
        "gelu-2l layer 1 on C4 and code: another model and another corpus, so a number may differ for either reason. "
        "Brackets are 95 % intervals; null is the same number where there is nothing to find.",
    )
    if settings == "quick":
        _add(main, "p", "Quick settings show that everything works; the numbers mean little.")
    rows = report.rows()
    contents = SubElement(SubElement(main, "nav", {"aria-label": "Contents"}), "ol")
    for anchor, title, kind in (
        ("claims", "The SAE, its dictionary and its heads", None),
        *((_anchor(kind), _TITLES[kind], kind) for kind in KINDS),
    ):
        entry = SubElement(contents, "li")
        _add(entry, "a", title).set("href", f"#{anchor}")
        _add(entry, "small", f"{sum(row.said.kind == kind for row in rows):,} claims")
    _add(SubElement(contents, "li"), "a", "Where this comes from").set("href", "#provenance")


# --------------------------------------------------------------------------------------------------------------- claims
def _table(main: Element, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Add the claims of all SAEs side by side."""
    if not rows:
        _add(main, "p", "No claims.", "missing")
        return
    table = SubElement(main, "table", {"class": "claims"})
    head = SubElement(SubElement(table, "thead"), "tr")
    _add(head, "th", "id", "id")
    _add(head, "th", "claim")
    _add(head, "th", "the post", "post")
    for name in names:
        _add(head, "th", name, "value")
    _add(head, "th", "what differs", "differs")
    body = SubElement(table, "tbody")
    for row in rows:
        _claim_row(SubElement(body, "tr"), row, names)


def _claim_row(line: Element, row: Row, names: Sequence[str]) -> None:
    claim = row.said
    _add(line, "td", claim.id, "id")
    words = _add(line, "td", claim.claim)
    _add(words, "small", claim.definition)
    post = _add(line, "td", said(claim.post, claim.unit), "post")
    post.set("data-label", "the post")
    for name in names:
        _value(SubElement(line, "td", {"class": "value", "data-label": name}), row.by_sae.get(name))
    differs = SubElement(line, "td", {"class": "differs"})
    told = {n: c.differs for n, c in row.by_sae.items() if c.differs}
    alike = len(set(told.values())) == 1
    for name, text in list(told.items())[: 1 if alike else None]:
        _add(differs, "small", text if alike else f"{name}: {text}")


def _value(cell: Element, claim: Claim | None) -> None:
    if claim is None:
        _add(cell, "span", DASH, "missing")
        return
    if claim.ours is None:
        _add(cell, "span", number(claim), "missing")
    else:
        _add(cell, "span", number(claim), "number").tail = f" {interval(claim)}"
    notes = [beside(claim)] if beside(claim) else []
    if claim.feature is not None:
        notes.append(f"feature {claim.feature}")
    if notes:
        _add(cell, "small", "; ".join(notes))


# ------------------------------------------------------------------------------------------------------------ exemplars
def _exemplar(main: Element, subject: SubjectResult, kind: Kind) -> None:
    chosen = next((e for e in subject.exemplars if e.kind == kind), None)
    if chosen is None:
        _add(main, "h3", subject.name)
        _add(main, "p", "No feature of this kind was found.", "missing")
        return
    _add(main, "h3", f"{subject.name}: feature {chosen.latent}")
    _facts(main, _exemplar_facts(subject, chosen))
    _drawn(main, subject, kind)


def _exemplar_facts(subject: SubjectResult, chosen: Exemplar) -> dict[str, str]:
    return {
        "fires, it is said, where": chosen.proxy,
        "correlation": f"{chosen.pearson:.3f}, on the half of the documents that the proxy was not chosen on",
        "top logit": subject.tokens[chosen.token],
        "tokens the proxy names": ", ".join(subject.tokens[token] for token in chosen.sources),
        "chosen as": chosen.why,
    }


def _drawn(main: Element, subject: SubjectResult, kind: Kind | None) -> None:
    """Add figures and listings of one SAE: of an exemplar, or of the whole."""
    found = [f for study in subject.studies for f in study.findings if not isinstance(f, Claim) and f.kind == kind]
    if not found:
        return
    if kind is None:
        _add(main, "h3", subject.name)
    for listing in (f for f in found if isinstance(f, Listing)):
        _listing(main, listing)
    grid = SubElement(main, "div", {"class": "figures"})
    for figure in (f for f in found if isinstance(f, Figure)):
        _figure(grid, figure)


def _listing(main: Element, listing: Listing) -> None:
    frame = SubElement(main, "div", {"class": "listing"})
    _add(frame, "h4", listing.title)
    _add(frame, "small", listing.definition)
    _plain_table(frame, listing.headings, listing.rows, "text")


def _figure(grid: Element, figure: Figure) -> None:
    frame = SubElement(grid, "figure")
    caption = SubElement(frame, "figcaption")
    _add(caption, "h4", figure.title)
    _add(caption, "small", figure.definition)
    if len(figure.series) > 1:
        legend = SubElement(frame, "ul", {"class": "legend"})
        for place, name in enumerate(figure.series):
            item = SubElement(legend, "li")
            swatch = SubElement(item, "svg", {"aria-hidden": "true"}, viewBox="0 0 11 11")
            SubElement(swatch, "rect", width="11", height="11", fill=COLOURS[place % len(COLOURS)])
            swatch.tail = name
    frame.append(svg(figure))
    numbers = SubElement(frame, "details")
    _add(numbers, "summary", "numbers")
    rows = [
        (label, *(said(values[place]) for values in figure.series.values()))
        for place, label in enumerate(figure.labels)
    ]
    _plain_table(numbers, (figure.x, *figure.series), rows)


# ----------------------------------------------------------------------------------------------------------- provenance
def _provenance(main: Element, report: Report) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None)
    _facts(
        main,
        {
            "headscope": report.version,
            "written": report.created,
            "model": f"{report.model['name']}, {report.model['hash']}",
            "settings": settings,
            "studies took": duration(report.seconds),
        },
    )
    for subject in report.subjects:
        sae, corpus = subject.facts["sae"], subject.facts["corpus"]
        _add(main, "h3", subject.name)
        _facts(
            main,
            {
                "SAE": f"{sae['name']}: {sae.get('kind', sae['architecture'])}; {sae['d_sae']:,} latents on "
                f"{subject.facts['site']}",
                "its hash": str(sae["hash"]),
                "trained on": str(sae.get("trained_on") or "not said"),
                "corpus": f"{corpus['name']} ({corpus['split']}), {corpus['n_tokens']:,} text tokens of "
                f"{corpus['n_documents']:,} documents in blocks of {corpus['block_size']}",
                "its hash ": str(corpus["hash"]),
                "z": str(subject.facts["z_convention"]),
                "failed": ", ".join(s.study for s in subject.studies if s.failed) or "no study",
            },
        )
        rows = [(s.study, duration(s.seconds), s.failed or "") for s in subject.studies]
        details = SubElement(main, "details")
        _add(details, "summary", "time of each study")
        _plain_table(details, ("study", "time", "failure"), rows)


# ------------------------------------------------------------------------------------------------------------- elements
def _section(main: Element, anchor: str, title: str, *, is_open: bool = False) -> Element:
    """Add a section under a heading that folds it; a link to folded content opens it."""
    frame = SubElement(main, "details", {"class": "section"} | ({"open": "open"} if is_open else {}))
    _add(SubElement(frame, "summary"), "h2", title)
    return SubElement(frame, "div", {"id": anchor})


def _anchor(kind: Kind) -> str:
    return kind.replace(" ", "-")


def _facts(main: Element, facts: dict[str, str]) -> None:
    listed = SubElement(main, "dl", {"class": "facts"})
    for name, value in facts.items():
        _add(listed, "dt", name)
        _add(listed, "dd", value)


def _plain_table(
    parent: Element, headings: Sequence[str], rows: Sequence[Sequence[str]], style: str | None = None
) -> None:
    table = SubElement(parent, "table")
    head = SubElement(SubElement(table, "thead"), "tr")
    for heading in headings:
        _add(head, "th", heading)
    body = SubElement(table, "tbody")
    for row in rows:
        line = SubElement(body, "tr")
        for cell in row:
            _add(line, "td", cell, style)


def _add(parent: Element, tag: str, text: str, style: str | None = None) -> Element:
    own = SubElement(parent, tag, {"class": style} if style else {})
    own.text = text
    return own
