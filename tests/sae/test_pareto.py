"""pareto.json, the figure, and the page and drawing that are made of it."""

import itertools
import math
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from headscope import figures
from headscope.errors import FigureError, SAEError
from headscope.sae.config import TrainConfig
from headscope.sae.pareto import HEADINGS, MEASURES, Pareto, Point
from headscope.stats import Estimate
from pareto_page import nice_ticks, page, svg

DOCS = Path(__file__).parents[2] / "docs"


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.01, value + 0.02)


def point(variant: str, target: float, l0: float, **changes: Estimate) -> Point:
    values = {
        "ce_loss_score": estimate(0.9),
        "loss_recovered": estimate(0.8 + l0 / 100),
        "explained_variance": estimate(0.7),
        "dead": estimate(0.05),
        "reconstruction_bias": estimate(0.98),
        "loss_recovered_by_mean": estimate(0.4),
    }
    recipe = {**TrainConfig(cache="/somewhere").as_dict(), "variant": variant, "target_l0": target}
    return Point(
        name=f"{variant}-l0-{target:g}",
        variant=variant,
        target_l0=target,
        n_tokens=5000,
        n_blocks=20,
        d_sae=2048,
        l0=estimate(l0),
        recipe={name: value for name, value in recipe.items() if name != "cache"},
        **{**values, **changes},
    )


@pytest.fixture
def found() -> Pareto:
    points = (point("relu", 8.0, 8.5), point("relu", 4.0, 4.25), point("topk", 4.0, 4.0), point("topk", 8.0, 8.0))
    return Pareto("tiny", "blocks.1.attn.hook_z", {"name": "python", "split": "heldout"}, points)


def test_what_is_written_is_read(found: Pareto, tmp_path: Path) -> None:
    found.write(tmp_path / "pareto.json")
    assert Pareto.read(tmp_path / "pareto.json") == found


def test_what_is_not_a_number_survives_a_file(found: Pareto, tmp_path: Path) -> None:
    nothing = replace(found.points[0], ce_loss_score=Estimate(math.nan, math.nan, math.nan))
    replace(found, points=(nothing,)).write(tmp_path / "pareto.json")
    [read] = Pareto.read(tmp_path / "pareto.json").points
    assert math.isnan(read.ce_loss_score.value)
    assert read.cells()[3] == "not defined"
    assert "not defined" in svg(replace(found, points=(nothing,)))


@pytest.mark.parametrize("content", [None, "{", "{}", '{"saes": [{}]}'])
def test_a_file_that_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "pareto.json").write_text(content)
    with pytest.raises(SAEError, match="headscope sweep"):
        Pareto.read(tmp_path / "pareto.json")


def test_curves_are_by_variant_and_l0(found: Pareto) -> None:
    curves = {variant: [p.l0.value for p in points] for variant, points in found.curves().items()}
    assert curves == {"relu": [4.25, 8.5], "topk": [4.0, 8.0]}


def test_the_figure_holds_the_numbers(found: Pareto) -> None:
    figure = figures.pareto(found)
    assert len(figure.data) == 2 * len(MEASURES)
    for trace, name in zip(figure.data[: len(MEASURES)], MEASURES, strict=True):
        curve = found.curves()["relu"]
        assert list(trace.x) == [p.l0.value for p in curve]
        assert list(trace.y) == [getattr(p, name).value for p in curve]
        assert list(trace.error_y.array) == pytest.approx([0.02, 0.02])
        assert list(trace.error_y.arrayminus) == pytest.approx([0.01, 0.01])
    assert figure.layout.xaxis.type == figure.layout.xaxis4.type == "log"


def test_the_figure_without_plotly_names_the_extra(found: Pareto, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(FigureError, match=r"headscope\[plots\]"):
        figures.pareto(found)


def test_the_page_holds_the_numbers_and_no_paths(found: Pareto) -> None:
    text = page(found, "pareto.svg")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == f"| {' | '.join(['curve', *HEADINGS[1:]])} |"
    assert rows[2:] == [f"| {' | '.join(p.cells())} |" for points in found.curves().values() for p in points]
    assert "| relu | 8 | 8.50 [8.49, 8.52] | 0.900 [0.890, 0.920] | 0.885 [0.875, 0.905] |" in text
    assert "5,000 held-out tokens in 20 blocks" in text
    assert "![Pareto curves](pareto.svg)" in text
    assert "somewhere" not in text


def circles(drawing: str) -> list[tuple[float, float]]:
    root = ET.fromstring(drawing)
    return [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("{http://www.w3.org/2000/svg}circle")]


def test_the_drawing_puts_points_where_they_are(found: Pareto) -> None:
    drawing = svg(found)
    assert len(circles(drawing)) == len(MEASURES) * len(found.points)
    (x0, y0), (x1, y1) = circles(drawing)[4:6]  # relu, loss_recovered: 0.8425 at 4.25, 0.885 at 8.5
    (x2, y2), (x3, y3) = circles(drawing)[6:8]  # topk: 0.84 at 4, 0.88 at 8
    assert x1 - x0 == pytest.approx(x3 - x2, abs=0.2), "a factor of two is as wide everywhere"
    assert (y0 - y1) / (y2 - y3) == pytest.approx(0.0425 / 0.04, abs=0.02)
    assert x2 < x0 < x3 < x1
    assert y2 > y0 > y3 > y1, "larger values are higher up"


def test_lines_are_told_apart_without_colour(found: Pareto) -> None:
    points = tuple(point(f"kind {i}", t, t) for i in range(8) for t in (4.0, 8.0))
    lines = re.findall(
        r'<polyline[^>]*stroke="(#\w{6})"[^>]*?(?:stroke-dasharray="([^"]*)")?/>', svg(replace(found, points=points))
    )
    legend = lines[:8]
    assert len({colour for colour, _ in legend}) == len({dash for _, dash in legend}) == 8


def test_more_curves_than_colours_are_other_pairs_of_colour_and_dashes(found: Pareto) -> None:
    points = tuple(point(f"kind {i}", 4.0, 4.0) for i in range(40))
    lines = re.findall(
        r'<polyline[^>]*stroke="(#\w{6})"[^>]*?(?:stroke-dasharray="([^"]*)")?/>', svg(replace(found, points=points))
    )
    assert len(set(lines[:40])) == 40


@pytest.mark.parametrize("length", [5, 30, 61, 250])
def test_the_legend_fits(found: Pareto, length: int) -> None:
    names = [f"{i} " + "word " * (length // 5) for i in range(8)]
    root = ET.fromstring(svg(replace(found, points=tuple(point(name, 4.0, 4.0) for name in names))))
    legend = [t for t in root.findall("{*}text") if t.text]
    assert " ".join(t.text or "" for t in legend).split() == " ".join(names).split()
    ends = [(float(t.get("x", "")), float(t.get("y", "")), len(t.text or "")) for t in legend]
    assert all(x + 6.5 * letters < float(root.get("width", "")) for x, _, letters in ends)
    for (x, y, letters), (following, lower, _) in itertools.pairwise(ends):
        assert (lower == y and following > x + 6.5 * letters) or lower >= y + 14
    panel = min(float(re.findall(r"[\d.]+", g.get("transform", ""))[1]) for g in root.findall("{*}g"))
    assert max(y for _, y, _ in ends) < panel + 10  # above a panel's own title


def test_names_are_escaped(found: Pareto) -> None:
    ET.fromstring(svg(replace(found, points=(replace(found.points[0], variant="<b>&"),))))


def test_an_sae_that_never_fires_is_left_out_of_the_drawing(found: Pareto) -> None:
    silent = replace(found.points[0], l0=Estimate(0.0, 0.0, 0.0))
    assert len(circles(svg(replace(found, points=(silent, *found.points[1:]))))) == len(MEASURES) * 3


@pytest.mark.parametrize(
    ("low", "high"), [(0.81, 0.93), (0.0, 1.0), (-3.0, 240.0), (0.5, 0.5), (0.0, 0.0), (1e-5, 3e-5)]
)
def test_ticks_are_round_and_hold_all(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert len(ticks) <= 8
    steps = {round(b - a, 10) for a, b in itertools.pairwise(ticks)}
    assert all(f"{step:e}"[0] in "125" for step in steps)


def test_the_script_writes_what_the_code_says(found: Pareto, tmp_path: Path, monkeypatch) -> None:
    found.write(tmp_path / "pareto.json")
    script = tmp_path / "scripts" / "pareto.py"
    script.parent.mkdir()
    (tmp_path / "docs").mkdir()
    script.write_text((DOCS.parent / "scripts" / "pareto.py").read_text())
    for arguments in ([str(tmp_path / "pareto.json")], []):
        monkeypatch.setattr(sys, "argv", ["pareto.py", *arguments])
        runpy.run_path(str(script), run_name="__main__")
        assert (tmp_path / "docs" / "pareto.md").read_text() == page(found, "pareto.svg")
        assert (tmp_path / "docs" / "pareto.svg").read_text() == svg(found)
        assert Pareto.read(tmp_path / "docs" / "pareto.json") == found


# --------------------------------------------------------------------------------------------------------------- joined
def changed(found: Pareto, **recipe: object) -> Pareto:
    """Another sweep: of SAEs whose recipe differs."""
    return replace(found, points=tuple(replace(p, recipe={**p.recipe, **recipe}) for p in found.points))


def test_sweeps_are_joined_and_curves_named_by_what_differs(found: Pareto) -> None:
    sweeps = [found, changed(found, prefixes=[64, 512]), changed(found, decoder="free", lr=5e-5)]
    joined = Pareto.joined(sweeps)
    assert joined.points == tuple(p for sweep in sweeps for p in sweep.points)
    assert (joined.model, joined.site, joined.corpus) == (found.model, found.site, found.corpus)
    own = ["", ", prefixes 64 512", ", decoder free, lr 5e-05"]
    assert list(joined.curves()) == [f"{variant}{options}" for options in own for variant in ("relu", "topk")]
    assert [[p.target_l0 for p in points] for points in joined.curves().values()] == [[4.0, 8.0]] * 6


def test_all_that_differs_is_said_and_all_that_does_not(found: Pareto) -> None:
    joined = Pareto.joined([found, changed(found, prefixes=[64, 512], betas=[0.5, 0.9])])
    assert joined.own()["topk"] == {"prefixes": [], "betas": [0.9, 0.999]}
    assert joined.own()["topk, prefixes 64 512, betas 0.5 0.9"] == {"prefixes": [64, 512], "betas": [0.5, 0.9]}
    everything = joined.common().keys() | joined.own()["relu"].keys() | {"variant", "target_l0"}
    assert everything == found.points[0].recipe.keys()
    text = page(joined, "pareto.svg")
    assert "* relu: `prefixes` none, `betas` 0.9 0.999\n" in text
    assert "* relu, prefixes 64 512, betas 0.5 0.9: `prefixes` 64 512, `betas` 0.5 0.9\n" in text
    assert "\n| relu, prefixes 64 512, betas 0.5 0.9 | 4 | 4.25 " in text
    common = next(line for line in text.splitlines() if line.startswith("Of all"))
    assert "`decoder` unit" in common
    assert "`prefixes`" not in common
    assert "Of each curve" not in page(found, "pareto.svg")


def test_an_option_that_older_saes_did_not_have_is_not_said_to_be_theirs(found: Pareto) -> None:
    joined = Pareto.joined([found, changed(found, newer=3)])
    assert list(joined.curves()) == ["relu", "topk", "relu, newer 3", "topk, newer 3"]
    assert joined.own()["relu"] == {"newer": None}


def test_widths_of_all_are_said(found: Pareto) -> None:
    wide = replace(changed(found, d_sae=4096), points=tuple(replace(p, d_sae=4096) for p in found.points))
    wide = changed(wide, d_sae=4096)
    assert "n = 2,048 or 4,096 latents" in page(Pareto.joined([found, wide]), "pareto.svg")


def test_sweeps_that_were_measured_on_something_else_are_refused(found: Pareto) -> None:
    text = {**found.corpus, "split": "train"}
    for what, other in {"model": "gpt2", "site": "blocks.0.attn.hook_z", "corpus": text}.items():
        sweep = replace(changed(found, lr=1.0), **{what: other})
        name = {"corpus": "split"}.get(what, what)
        with pytest.raises(SAEError, match=rf"(?s)something else: {name} .*expected: SAEs of one .*do: leave one out"):
            Pareto.joined([found, sweep])


def test_a_recipe_that_was_swept_twice_is_refused(found: Pareto) -> None:
    with pytest.raises(SAEError, match=r"(?s)relu-l0-8 is in two sweeps.*expected: each.*do: leave one out"):
        Pareto.joined([found, changed(found, lr=1.0), found])


def test_the_script_joins_sweeps(found: Pareto, tmp_path: Path, monkeypatch) -> None:
    sweeps = {"one": found, "two": changed(found, decoder="free")}
    for name, sweep in sweeps.items():
        sweep.write(tmp_path / f"{name}.json")
    script = tmp_path / "scripts" / "pareto.py"
    script.parent.mkdir()
    (tmp_path / "docs").mkdir()
    script.write_text((DOCS.parent / "scripts" / "pareto.py").read_text())
    for arguments in ([str(tmp_path / f"{name}.json") for name in sweeps], []):
        monkeypatch.setattr(sys, "argv", ["pareto.py", *arguments])
        runpy.run_path(str(script), run_name="__main__")
        joined = Pareto.joined(list(sweeps.values()))
        assert (tmp_path / "docs" / "pareto.md").read_text() == page(joined, "pareto.svg")
        assert (tmp_path / "docs" / "pareto.svg").read_text() == svg(joined)
        assert Pareto.read(tmp_path / "docs" / "pareto.json") == joined


# ------------------------------------------------------------------------------------------------------------ committed
@pytest.mark.skipif(not (DOCS / "pareto.json").is_file(), reason="no sweep was kept")
def test_the_committed_page_is_that_of_the_committed_sweep() -> None:
    kept = Pareto.read(DOCS / "pareto.json")
    assert (DOCS / "pareto.md").read_text(encoding="utf-8") == page(kept, "pareto.svg"), "run python scripts/pareto.py"
    assert (DOCS / "pareto.svg").read_text(encoding="utf-8") == svg(kept)
