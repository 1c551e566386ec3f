"""The main job, end to end, as a newcomer runs it: small, offline, on the bundled model."""

import re

import pytest

from headscope.cli import main
from headscope.index.store import FeatureIndex
from headscope.jobs import demo
from headscope.sae.formats import load_sae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, demo.run(out, quick=True)


def test_it_leaves_an_sae_its_quality_and_an_index(finished):
    out, result = finished
    assert load_sae(out / "sae").site.layer == 1
    index = FeatureIndex.open(out / "index")
    assert index.manifest["quality"] == result.quality
    assert result.quality["n_tokens"] > 55_000
    assert result.n_alive == index.manifest["n_alive"] > 300
    assert index.manifest["l0"] == pytest.approx(result.quality["l0"]["value"], rel=1e-6)  # counted twice, one L0


def test_the_index_and_the_evaluation_agree_on_what_is_dead(finished):
    _, result = finished
    assert result.quality["dead"]["value"] == pytest.approx(1 - result.n_alive / 512)


def test_a_second_run_does_nothing_again(finished):
    out, result = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    said = []
    assert demo.run(out, quick=True, say=said.append) == result
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert "found a trained SAE" in said[0]


def test_the_command_prints_the_quality_beside_the_post(finished, capsys):
    out, _ = finished
    main(["demo", "--out", str(out), "--quick", "--no-serve"])
    printed = capsys.readouterr().out
    assert "loss_recovered" in printed
    assert "87 %" in printed
    assert re.search(r"\d+ of [\d,]+ live features look like 'X is next by induction'", printed)


def test_the_page_of_the_demo_is_one_file(finished, tmp_path, capsys):
    out, _ = finished
    main(["export", "--index", str(out / "index"), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size > 100_000
    assert "page.html" in capsys.readouterr().out
