"""Columns of studies: they come back as written, belong to one index, and anything else is refused by name."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from columns_index import D_SAE, built
from headscope.errors import IndexFormatError, OutputError
from headscope.index.columns import add_columns, read_columns, studies
from headscope.index.store import FeatureIndex

SAID = {"settings": {"k": 3}, "definitions": {"score": "a number", "count": "how many"}, "n": 90}


@pytest.fixture(scope="module")
def original(random_model, random_corpus, random_sae, tmp_path_factory):
    return built(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("columns") / "index")


@pytest.fixture
def index(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    return FeatureIndex.open(tmp_path / "copy")


def table(n=D_SAE, **changes):
    columns = {
        "latent": pa.array(range(n), pa.int32()),
        "score": pa.array([None, *np.linspace(0, 1, n - 1)]),
        "count": pa.array(range(n), pa.int64()),
    }
    return pa.table(columns | changes)


def test_columns_come_back_with_their_provenance(index):
    path = add_columns(index, "effects", table(), SAID)
    assert path == index.folder / "columns" / "effects.parquet"
    found, said = read_columns(index.folder, "effects")
    assert found.to_pydict() == table().to_pydict()
    assert {name: said[name] for name in SAID} == SAID
    assert set(said) == {*SAID, "index", "created", "headscope"}
    assert said["index"]["sae"] == "sha256:0"
    assert index.columns("effects").to_pydict() == table().to_pydict()
    assert studies(index.folder) == ("effects",)


def test_the_table_shows_them_under_the_name_of_their_study(index):
    before = index.table()
    assert studies(index.folder) == ()
    add_columns(index, "effects", table(), SAID)
    add_columns(index, "a_study", table(), SAID)
    after = index.table()
    assert after.column_names == [
        *before.column_names,
        *("a_study.score", "a_study.count", "effects.score", "effects.count"),
    ]
    assert after["effects.score"].to_pylist() == table()["score"].to_pylist()
    assert after.select(before.column_names) == before


def test_a_study_made_again_replaces_its_columns(index):
    add_columns(index, "effects", table(), SAID)
    again = table(score=pa.array(np.full(D_SAE, 7.0)))
    add_columns(index, "effects", again, SAID)
    assert index.columns("effects")["score"].to_pylist() == [7.0] * D_SAE
    assert [path.name for path in (index.folder / "columns").iterdir()] == ["effects.parquet"]


def test_an_index_with_columns_opens_verifies_and_answers_in_sql(index):
    again = FeatureIndex.open(index.folder)
    add_columns(index, "effects", table(), SAID)
    again.verify()
    query = "SELECT count(score) FROM features JOIN effects_columns USING (latent)"
    assert again.sql(query).to_pydict() == {"count(score)": [D_SAE - 1]}


@pytest.mark.parametrize("seed", [0, 1])
def test_columns_of_another_index_are_refused_and_what_differs_is_named(
    index, random_model, random_corpus, random_sae, tmp_path, seed
):
    path = add_columns(index, "effects", table(), SAID)
    other = built(random_model, random_corpus, random_sae, tmp_path / "other", seed=seed)
    (other / "columns").mkdir()
    shutil.copy(path, other / "columns")
    if seed == 0:  # the same index built again, at another place
        assert read_columns(other, "effects")[0].to_pydict() == table().to_pydict()
        return
    with pytest.raises(IndexFormatError, match="another sae, corpus, activations"):
        read_columns(other, "effects")
    opened = FeatureIndex.open(other)
    with pytest.warns(UserWarning, match="effects are left out.*\n?.*another sae, corpus, activations"):
        assert "effects.score" not in opened.table().column_names
    with pytest.warns(UserWarning, match="effects are left out"):
        assert len(opened.sql("SELECT 1")) == 1


def test_a_study_that_was_not_made_is_named(index):
    with pytest.raises(IndexFormatError, match="no columns of 'effects'"):
        index.columns("effects")
    add_columns(index, "proxies", table(), SAID)
    with pytest.raises(IndexFormatError, match="one of proxies"):
        index.columns("effects")


@pytest.mark.parametrize("name", ["", "Effects", "../effects", "a/b", "a.b", "1a", "a b", "a\n"])
def test_a_name_that_is_none_is_refused(index, name):
    for do in (lambda: add_columns(index, name, table(), SAID), lambda: index.columns(name)):
        with pytest.raises(IndexFormatError, match="lower-case"):
            do()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latent": pa.array(range(1, D_SAE + 1), pa.int32())}, "latent first"),
        ({"score": pa.array([np.nan] * D_SAE)}, "effects.score holds NaN"),
        ({"score": pa.array([np.inf] * D_SAE)}, "effects.score holds NaN"),
        ({"Bad name": pa.array(range(D_SAE))}, "Bad name"),
    ],
)
def test_a_table_that_is_not_one_row_a_latent_of_numbers_is_refused(index, changes, match):
    said = SAID | {"definitions": SAID["definitions"] | {"Bad name": ""}}
    with pytest.raises(IndexFormatError, match=match):
        add_columns(index, "effects", table(**changes), said)
    assert not (index.folder / "columns").exists()


def test_too_few_rows_or_no_latent_are_refused(index):
    for wrong in (table(D_SAE - 1), table().select(["score", "count"]), table().select([])):
        with pytest.raises(IndexFormatError, match="latent first"):
            add_columns(index, "effects", wrong, SAID)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"definitions": {"score": "", "count": ""}}, "settings, n"),
        (SAID | {"definitions": {"score": ""}}, "a definition of count"),
        ({}, "settings, definitions, n, a definition of score"),
        (SAID | {"n": float("nan")}, "strict JSON"),
        (SAID | {"settings": {"a": {1, 2}}}, "strict JSON"),
    ],
)
def test_provenance_that_says_too_little_is_refused(index, said, match):
    with pytest.raises(IndexFormatError, match=match):
        add_columns(index, "effects", table(), said)


def test_a_file_that_others_wrote_or_that_is_damaged_is_refused(index):
    path = add_columns(index, "effects", table(), SAID)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IndexFormatError, match="damaged"):
        index.columns("effects")
    for metadata in (None, {b"headscope": b"{"}, {b"headscope": b"[]"}, {b"headscope": json.dumps({}).encode()}):
        pq.write_table(table().replace_schema_metadata(metadata), path)
        with pytest.raises(IndexFormatError, match="where it comes from"):
            index.columns("effects")


def test_a_link_out_of_the_folder_is_not_followed(index, tmp_path):
    path = add_columns(index, "effects", table(), SAID)
    path.rename(tmp_path / "outside.parquet")
    path.symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(IndexFormatError, match="no columns"):
        index.columns("effects")


def test_a_folder_that_cannot_be_written_is_said(index):
    (index.folder / "columns").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        add_columns(index, "effects", table(), SAID)
