"""Tables of heads: they come back as written, belong to one index, and anything else is refused by name."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from columns_index import built
from headscope.errors import IndexFormatError
from headscope.index.head_records import HeadTables, in_words, measure_of
from headscope.index.head_table import SCHEMAS, add_head_table, head_tables, measure_row, read_head_table
from headscope.index.store import FeatureIndex
from headscope.stats import Estimate, Measure
from headscope.studies.heads import superposition

SAID = {"settings": {"seed": 0}, "n": "90 text tokens"}
MEASURES = (
    Measure("d", 40, 0.5, 0.4, 0.6, "Wilson 95 %", null=Estimate(0.1, 0.0, 0.2)),
    Measure("d", 40, 0.5, missing="no interval: all alike"),
    Measure("d", 3, missing="3 features; at least 30 are needed", null=Estimate(0.1, 0.1, 0.1)),
)


@pytest.fixture(scope="module")
def original(random_model, random_corpus, random_sae, tmp_path_factory):
    return built(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("heads") / "index")


@pytest.fixture
def index(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    return FeatureIndex.open(tmp_path / "copy")


def ablation(latent=3, **changes):
    row = {"kind": "mean", "latent": latent, "n_active": 4}
    return row | {"off": [0.0, 0.5, 1.0, 0.0], "retained": [1.0, 0.5, 0.0, 1.2], "undecided": [0.0] * 4} | changes


def cluster(share, family="word > word", **changes):
    row = {"layer": 1, "head": 2, "weights": "dfa", "family": family, "n": 2, "share": share, "latents": [4, 3]}
    return row | changes


def test_a_table_comes_back_with_its_provenance(index):
    assert head_tables(index.folder) == ()
    path = add_head_table(index, "ablation", [ablation(), ablation(5)], SAID)
    assert path == index.folder / "heads" / "ablation.parquet"
    table, said = read_head_table(index.folder, "ablation")
    assert table.to_pylist() == [ablation(), ablation(5)]
    assert {name: said[name] for name in SAID} == SAID
    assert set(said["definitions"]) == set(table.column_names)
    assert head_tables(index.folder) == ("ablation",)
    add_head_table(index, "ablation", [ablation(7)], SAID)
    tables = HeadTables(index.folder)
    assert tables.tables == ("ablation",)
    assert tables.ablation(3) == ()
    (found,) = tables.ablation(7)
    assert (found.kind, found.retained) == ("mean", (1.0, 0.5, 0.0, 1.2))
    assert tables.ablation_matrix()[7].tolist() == [1.0, 0.5, 0.0, 1.2]
    assert [path.name for path in (index.folder / "heads").iterdir()] == ["ablation.parquet"]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_read_as_it_was_written(measure):
    assert measure_of(measure_row("x", measure), "x", "d") == measure


def test_cards_hold_their_clusters_largest_first(index):
    measured = {n: MEASURES[0] for n in ("effective_features", "effective_families", "largest")}
    row = {"layer": 1, "head": 2, "weights": "dfa", "n_features": 5, "top": [4, 3], "top_in_one": 2}
    row |= {key: value for name, of in measured.items() for key, value in measure_row(name, of).items()}
    add_head_table(index, "catalogue", [row], SAID)
    add_head_table(index, "clusters", [cluster(0.3), cluster(0.7, "copies word")], SAID)
    tables = HeadTables(index.folder)
    card = tables.card(2)
    assert [own.family for own in card.clusters] == ["copies word", "word > word"]
    assert card.largest.value == 0.5
    assert card.top == (4, 3)
    with pytest.raises(IndexFormatError, match=r"(?s)head 1\.9.*another head"):
        tables.card(9)
    with pytest.raises(IndexFormatError, match="weights 'x'"):
        tables.cards("x")
    with pytest.raises(IndexFormatError, match=r"(?s)no table .scores..*headscope study heads"):
        tables.score(0, 0)


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        ("nothing", [], "a table 'nothing'"),
        ("ablation", [ablation(), ablation()], "a row twice"),
        ("ablation", [ablation(latent=None)], "without its key"),
        ("ablation", [ablation(latent=20)], "out of range"),
        ("ablation", [ablation(off=[0.0] * 3)], "of other heads"),
        ("ablation", [ablation(retained=[0.0, 1.0, float("nan"), 1.0])], "NaN or infinity"),
        ("ablation", [ablation(n_active="many")], "ablation: "),
        ("clusters", [cluster(float("inf"))], "NaN or infinity"),
        ("clusters", [cluster(0.5, head=4)], "out of range"),
        ("clusters", [cluster(0.5, layer=2)], "out of range"),
        ("clusters", [cluster(0.5, latents=[-1])], "out of range"),
        ("clusters", [cluster(0.5, latents=[None])], "holds a null"),
    ],
)
def test_what_is_not_as_said_is_refused(index, name, rows, match):
    with pytest.raises(IndexFormatError, match=match):
        add_head_table(index, name, rows, SAID)
    assert head_tables(index.folder) == ()


def test_a_table_of_another_index_or_of_another_shape_is_refused(
    index, random_model, random_corpus, random_sae, tmp_path
):
    other = built(random_model, random_corpus, random_sae, tmp_path / "other", seed=1)
    path = add_head_table(index, "ablation", [ablation()], SAID)
    (other / "heads").mkdir()
    shutil.copy(path, other / "heads" / "ablation.parquet")
    with pytest.raises(IndexFormatError, match="another sae, corpus"):
        HeadTables(other).ablation(3)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["off"]).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(IndexFormatError, match="ablation with columns"):
        read_head_table(index.folder, "ablation")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IndexFormatError, match="damaged"):
        read_head_table(index.folder, "ablation")


def test_every_column_has_a_definition_and_every_key_is_a_column():
    for schema in SCHEMAS.values():
        assert all(said for _, said in schema.columns.values())
        assert not set(schema.key) & set(schema.values)


def test_the_format_names_every_table_and_column():
    text = (Path(__file__).parents[2] / "docs" / "index-format.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, schema in SCHEMAS.items():
        (row,) = (line for line in rows if f"`{name}`" in line.split("|")[1])
        stems = {c for c in schema.columns if not any(c.startswith(f"{other}_") for other in schema.columns)}
        assert not {c for c in stems if f"`{c}`" not in row}, name


def test_measures_of_superposition_are_told_in_words() -> None:
    assert in_words("several heads by decoder_out") == "several heads by decoder norm in the residual stream"
    assert "ablated" in in_words("and")
    assert in_words("divergence of sources") == "divergence of sources"
    names = [f"several heads by {by}" for by in superposition.DEFINITIONS] + list(superposition.OUTCOMES)
    assert all("_" not in in_words(name) and in_words(name) != name for name in names)
