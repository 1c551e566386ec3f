"""Reading an index: what it says as records and SQL, and what is refused of a folder that is not what it says."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from cases import each
from headscope.artefact import file_hash
from headscope.errors import HeadscopeError, IndexFormatError
from headscope.explorer.answers import dump_json
from headscope.explorer.cards import IndexCards
from headscope.explorer.server import about_of
from headscope.index import reading
from headscope.index.build import SAERecord, build_index
from headscope.index.config import IndexPlan
from headscope.index.schema import COLUMNS
from headscope.index.store import TABLES, FeatureIndex

D_SAE = 20
THRESHOLDS = (0.0, 0.5)


@pytest.fixture(scope="module")
def index(random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model("gpt2", dtype=torch.float64)
    sae = random_sae(model, D_SAE)
    sae.b_enc[7] = -1e4
    folder = tmp_path_factory.mktemp("store") / "index"
    plan = IndexPlan(thresholds=THRESHOLDS, top=3, part_tokens=100)
    build_index(model, [(sae, SAERecord("s", "sha256:s"))], random_corpus(model, 12, 16), folder, plan=plan)
    return FeatureIndex.open(folder)


@pytest.fixture
def fresh(index, tmp_path):
    """`fresh()`: another copy, for a case that changes it."""

    def another():
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "copy"
        shutil.copytree(index.folder, folder)
        return folder

    return another


@pytest.fixture
def copy(fresh):
    """A copy that may be changed."""
    return fresh()


def change(folder, **entries):
    """Write the manifest anew with some entries changed; `a__b` is `b` of `a`."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in entries.items():
        *outer, last = name.split("__")
        place = manifest
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(manifest))


def flip(path, at=0.5):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)


def refused(folder, match=None):
    with pytest.raises(IndexFormatError, match=match) as error:
        FeatureIndex.open(folder)
    return error.value


# ------------------------------------------------------------------------------------------------------------- opening
def test_no_index(tmp_path):
    refused(tmp_path / "none", "headscope index")
    refused(tmp_path, "headscope index")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file")


def test_the_folder_itself_can_be_the_current_one(index, monkeypatch):
    monkeypatch.chdir(index.folder)
    assert FeatureIndex.open(".").feature(0) is not None
    monkeypatch.chdir("/")
    refused(".")
    refused("/")


def test_an_interrupted_build_is_said_to_be_one(tmp_path):
    (tmp_path / "index.partial").mkdir()
    refused(tmp_path / "index", "not finished")


def test_several_indexes_are_named(index, tmp_path):
    shutil.copytree(index.folder, tmp_path / "all" / "one")
    (tmp_path / "all" / "manifest.json").write_text('{"indexes": ["one"]}')
    refused(tmp_path / "all", "one")
    FeatureIndex.open(tmp_path / "all" / "one")


@each("text", ["", "{", "[]", "3", "null", '"text"', "{}", "[1, 2]", '{"indexes": 3}', "\xff"])
def test_a_manifest_that_is_none(fresh, text):
    copy = fresh()
    (copy / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(copy)


@each("text", ["[" * 100_000, '{"a":' * 100_000, '{"format_version": 2, "files": ' + "[" * 100_000])
def test_a_manifest_nested_without_end(fresh, text):
    copy = fresh()
    (copy / "manifest.json").write_text(text)
    refused(copy, "nested too deep")


def test_a_manifest_that_is_a_link_or_no_file(copy):
    (copy / "manifest.json").rename(copy.parent / "elsewhere")
    (copy / "manifest.json").symlink_to(copy.parent / "elsewhere")
    refused(copy, "no manifest.json of its own")
    (copy / "manifest.json").unlink()
    os.mkfifo(copy / "manifest.json")
    refused(copy, "no manifest.json of its own")


def fields(value, path=()):
    """The place of every value of a manifest but the manifest itself."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, name)
        yield from fields(inner, (*path, name))


_RARE = [pytest.param(bad, marks=pytest.mark.slow) for bad in (None, "text", {"a": {}}, 0.5, "\ud800", float("nan"))]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [-1, *_RARE])
def test_a_field_of_the_manifest_that_is_something_else_is_an_error_or_not_read(index, copy, bad):
    n_refused = 0
    for place in fields(index.manifest):
        change(copy, **{"__".join(place): bad})
        try:
            cards = IndexCards(FeatureIndex.open(copy))
            dump_json([about_of(cards), cards.table(), cards.feature(0)])
        except IndexFormatError:
            n_refused += 1
        shutil.copy(index.folder / "manifest.json", copy)
    assert n_refused > 30


@each("version", [1, 99, "2", None, True])
def test_another_version(fresh, version):
    copy = fresh()
    change(copy, format_version=version)
    refused(copy, "index format")


@each("table", TABLES)
def test_a_missing_or_cut_table_is_named(fresh, table):
    copy = fresh()
    path = copy / f"{table}.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(copy, rf"{table}\.parquet")
    path.unlink()
    refused(copy, rf"{table}\.parquet")
    path.write_bytes(whole)
    FeatureIndex.open(copy)


def test_activations_that_are_missing_or_too_many(copy):
    part = copy / "activations" / "part-0000.parquet"
    shutil.copy(part, copy / "activations" / "part-0001.parquet")
    refused(copy, "part-0001")
    (copy / "activations" / "part-0001.parquet").unlink()
    part.unlink()
    refused(copy, "part-0000")


def test_activations_that_neither_stand_nor_are_named(copy):
    files = json.loads((copy / "manifest.json").read_text())["files"]
    del files["activations/part-0000.parquet"]
    change(copy, files=files)
    (copy / "activations" / "part-0000.parquet").unlink()
    refused(copy)


@each("name", ["../secret", "/etc/hostname", "activations/../../secret", "a\0b", "", ".", "tokens.parquet/x"])
def test_a_file_outside_the_folder_is_not_read(fresh, name):
    copy = fresh()
    secret = copy.parent / "secret"
    secret.write_text("secret")
    files = json.loads((copy / "manifest.json").read_text())["files"]
    path = copy / name if "\0" not in name else secret
    size = path.stat().st_size if path.exists() else 6
    change(copy, files=files | {name: [size, "sha256:0"]})
    refused(copy)


@each("name", ["sources.parquet", "activations/part-0000.parquet"])
def test_a_link_is_not_followed(fresh, name):
    copy = fresh()
    outside = copy.parent / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    refused(copy, name.split("/")[-1])


def test_a_folder_of_activations_that_is_a_link(copy):
    (copy / "activations").rename(copy.parent / "elsewhere")
    (copy / "activations").symlink_to(copy.parent / "elsewhere")
    refused(copy, "activations")


@each("entry", [None, 3, [], [1], "x", {"size": 3}, ["9", "sha256:0"], [-1, None]])
def test_a_file_entry_that_is_none(fresh, entry):
    copy = fresh()
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change(copy, files=files | {"nulls.parquet": entry})
    refused(copy)


@each("bad", [10**30, -1, 0, 1.5, "20", None, [], True, {}])
@each(
    "entry",
    [
        "sae__d_sae",
        "model__n_heads",
        "model__d_vocab",
        "corpus__n_blocks",
        "corpus__block_size",
        "corpus__n_tokens",
        "n_pairs",
    ],
)
def test_a_count_that_is_not_the_tables(fresh, entry, bad):
    copy = fresh()
    change(copy, **{entry: bad})
    refused(copy)


def test_blocks_of_another_size_with_the_same_product(copy):
    change(copy, corpus__n_blocks=24, corpus__block_size=8)
    refused(copy)


@each("entry", ["sae", "model", "corpus", "thresholds", "files"])
@each("bad", [None, 3, "text", [], {}])
def test_a_part_of_the_manifest_that_is_none(fresh, entry, bad):
    copy = fresh()
    change(copy, **{entry: bad})
    refused(copy)


@each("bad", [[0.0], [0.0, 0.5, 1.0], [0.0, "0.5"], [0.5, 0.0]])
def test_thresholds_that_are_not_the_tables(fresh, bad):
    copy = fresh()
    change(copy, thresholds=bad)
    refused(copy)


# ------------------------------------------------------------------------------------------------------------- hostile
def rewrite(folder, name, make):
    """Write a table anew as `make` makes it, and let the manifest say its size."""
    path = folder / f"{name}.parquet"
    pq.write_table(make(pq.read_table(path)), path, row_group_size=1 << 30, write_page_checksum=True)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files=files | {f"{name}.parquet": [path.stat().st_size, "sha256:0"]})


def with_value(column, value, row=-1):
    """Put one value into a column, or into the first list of a column of lists that is not empty."""

    def make(table):
        values = table[column].to_pylist()
        if pa.types.is_list(table[column].type):
            at = next(i for i, own in enumerate(values) if own)
            values[at] = [value, *values[at][1:]]
        else:
            values[row] = value
        kind = table[column].type
        return table.set_column(table.column_names.index(column), column, pa.array(values, kind))

    return make


def read_all(folder) -> None:
    """Open an index and ask everything of it, as the page does."""
    found = FeatureIndex.open(folder)
    ask_everything(found)
    cards = IndexCards(found)
    about_of(cards), cards.vocab(), cards.table()
    for j in range(found.n_latents):
        dump_json(cards.feature(j))
    for block in range(found.n_blocks):
        dump_json(cards.context(block))


POINTERS = [
    ("tokens", "token"),
    ("tokens", "document"),
    ("vocabulary", "token"),
    ("documents", "document"),
    ("features", "latent"),
    ("features", "n_active"),
    ("features", "logit_top_tokens"),
    ("features", "logit_bottom_tokens"),
    ("features", "copy_tokens"),
    ("features", "correlated_latents"),
    ("features", "example_tokens"),
    ("sources", "latent"),
    ("sources", "token"),
    ("source_totals", "latent"),
    ("groups", "latent"),
    ("groups", "positions"),
    ("examples", "latent"),
    ("examples", "position"),
    ("examples", "source"),
    ("examples", "active_at"),
    ("nulls", "latent"),
    ("activations/part-0000", "latent"),
    ("activations/part-0000", "position"),
]


@pytest.mark.slow
@each(("table", "column"), POINTERS)
def test_a_number_that_points_nowhere(fresh, table, column):
    copy = fresh()
    whole = (copy / f"{table}.parquet").read_bytes()
    for value in (-1, 2**31 - 1):
        (copy / f"{table}.parquet").write_bytes(whole)
        rewrite(copy, table, with_value(column, value))
        with pytest.raises(IndexFormatError, match="damaged"):
            read_all(copy)


def test_every_column_that_is_written_is_known(index):
    known = set()
    for path in index.folder.rglob("*.parquet"):
        names = [name for name in pq.read_schema(path).names if not name.startswith("head_")]
        assert set(names) <= set(COLUMNS), path
        known |= set(names)
    assert known == set(COLUMNS) - {"loss"}  # which a build without losses does not write


@each("name", COLUMNS)
def test_a_column_of_another_type(fresh, name):
    copy = fresh()
    for table in (*TABLES, "activations/part-0000"):
        if name in pq.read_schema(copy / f"{table}.parquet").names:
            found = pq.read_table(copy / f"{table}.parquet")
            other = pa.nulls(len(found), pa.int64() if COLUMNS[name] in ("string", "binary", "bool") else pa.string())
            changed = found.set_column(found.column_names.index(name), name, other)
            rewrite(copy, table, partial(lambda changed, _: changed, changed))
            refused(copy, name)
            return
    assert name == "loss"


@each(
    ("table", "column"),
    [
        ("features", "decoder_share"),
        ("features", "logit_top_values"),
        ("features", "correlated_pearson"),
        ("features", "histogram"),
        ("examples", "heads"),
        ("examples", "source_heads"),
        ("examples", "source_pattern"),
        ("examples", "active_value"),
        ("sources", "attention"),
        ("source_totals", "kept_by_head"),
        ("groups", "duplicates"),
    ],
)
def test_ragged_lists(fresh, table, column):
    copy = fresh()

    def make(found):
        values = found[column].to_pylist()
        at = next(i for i, own in enumerate(values) if own)
        values[at] = values[at][:-1]
        return found.set_column(found.column_names.index(column), column, pa.array(values, found[column].type))

    rewrite(copy, table, make)
    with pytest.raises(IndexFormatError, match="damaged"):
        read_all(copy)


@each(("table", "column"), [("documents", "name"), ("vocabulary", "bytes"), ("groups", "kind")])
def test_what_is_missing_though_it_never_is(fresh, table, column):
    copy = fresh()
    rewrite(copy, table, with_value(column, None))
    with pytest.raises(IndexFormatError, match=f"{column} is missing"):
        read_all(copy)


def test_groups_of_examples_that_are_not_there(index, copy):
    latent = index.search()[0]
    rewrite(copy, "examples", lambda table: table.filter(pc.not_equal(table["latent"], latent)))
    with pytest.raises(IndexFormatError, match=f"groups of latent {latent} .* lack examples"):
        FeatureIndex.open(copy).examples(latent)


def test_a_group_of_no_known_kind(copy):
    rewrite(copy, "groups", with_value("kind", "best"))
    with pytest.raises(IndexFormatError, match="no known kind"):
        read_all(copy)


@each("table", ["sources", "groups", "examples"])
def test_rows_that_are_not_sorted(fresh, table):
    copy = fresh()
    rewrite(copy, table, lambda found: found.take(list(range(len(found)))[::-1]))
    with pytest.raises(IndexFormatError, match="not sorted"):
        read_all(copy)


@each("table", ["features", "tokens", "vocabulary", "documents", "source_totals"])
def test_rows_that_the_manifest_does_not_know_of(fresh, table):
    copy = fresh()
    rewrite(copy, table, lambda found: pa.concat_tables([found, found.slice(0, 1)]))
    refused(copy, f"{table} in the tables")


def bomb(path, n, **columns):
    """A small file of n equal rows."""
    table = pa.table({name: pa.repeat(pa.scalar(value), n) for name, value in columns.items()})
    pq.write_table(table, path, row_group_size=n, compression="zstd", write_page_checksum=True)
    return [path.stat().st_size, "sha256:0"]


@pytest.mark.slow
@each("table", TABLES)
def test_a_small_file_of_very_many_rows_is_refused_before_it_is_read(fresh, table, monkeypatch):
    copy = fresh()
    n = 30_000_000
    entry = bomb(copy / f"{table}.parquet", n, latent=0)
    assert entry[0] < 300_000
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change(copy, files=files | {f"{table}.parquet": entry})
    counts = {"features": "sae__d_sae", "vocabulary": "model__d_vocab", "documents": "corpus__n_documents"}
    if table in counts:
        change(copy, **{counts[table]: n})

    def read(*_args, **_kwargs):
        raise AssertionError("it was read")

    monkeypatch.setattr(pq, "read_table", read)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    refused(copy, rf"{table}\.parquet would unpack to")


@pytest.mark.slow
def test_lists_in_a_small_file_count_too(copy):
    lists = pa.array([np.zeros(40_000_000, np.float32)], pa.list_(pa.float32()))
    pq.write_table(pa.table({"dfa_share": lists}), copy / "nulls.parquet", write_page_checksum=True)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change(copy, files=files | {"nulls.parquet": [(copy / "nulls.parquet").stat().st_size, "sha256:0"]})
    refused(copy, r"nulls\.parquet would unpack to")


def test_what_else_stands_in_the_folder_does_not_keep_it_from_opening(index, copy):
    (copy / "columns").mkdir()
    (copy / "columns" / "study.parquet").write_bytes(b"PAR1 nonsense PAR1")
    (copy / "columns" / "link.parquet").symlink_to("/etc/hostname")
    (copy / "labels.jsonl").write_text("[" * 100_000)
    found = FeatureIndex.open(copy)
    found.verify()
    assert snapshot(found) == snapshot(index)


# ------------------------------------------------------------------------------------------------------------- damaged
def test_verify_names_what_changed(copy):
    found = FeatureIndex.open(copy)
    flip(copy / "sources.parquet")
    flip(copy / "activations" / "part-0000.parquet")
    with pytest.raises(IndexFormatError, match=r"activations/part-0000\.parquet.*sources\.parquet"):
        found.verify()


def test_verify_accepts_what_was_written(index):
    index.verify()


def with_hashes(folder):
    """Let the manifest have the checksums of the tables as they are now."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    hashes = {name: [(folder / name).stat().st_size, file_hash(folder / name)] for name in files}
    change(folder, files=hashes)


NO_NUMBERS = [
    ("features", "maximum", math.inf),
    ("features", "mean", math.nan),
    ("features", "dfa_share", 9.0),
    ("features", "dfa_share", math.nan),
    ("features", "decoder_share", -0.5),
    ("features", "density", math.nan),
    ("features", "copy_rank", 2.0),
    ("features", "logit_top_values", math.inf),
    ("features", "correlated_pearson", math.nan),
    ("features", "quantiles", math.inf),
    ("features", "bias", math.nan),
    ("activations/part-0000", "activation", math.inf),
    ("activations/part-0000", "head_0", math.nan),
    ("sources", "share", 9.0),
    ("sources", "attention", 1.5),
    ("sources", "share_by_head", 9.0),
    ("source_totals", "kept", 1.5),
    ("groups", "low", math.nan),
    ("examples", "source_pattern", 1.5),
    ("examples", "heads", math.nan),
    ("examples", "active_value", math.inf),
    ("nulls", "dfa_share", 9.0),
]


def test_numbers_that_are_not_finite_and_shares_that_are_none_are_refused_where_they_are_read(fresh):
    for table, column, value in NO_NUMBERS:
        rewrite(copy := fresh(), table, with_value(column, value, 0))
        with pytest.raises(IndexFormatError, match=rf"damaged: {column} "):
            read_all(copy)


DISAGREEING = [
    ("features", "maximum", 1e6, "maximum and mean"),
    ("features", "mean", 1e6, "maximum and mean"),
    ("features", "histogram", 100, "histogram and mass"),
    ("features", "mass", 1e9, "histogram and mass"),
    ("features", "dfa_share", 0.9999, "shares of heads"),
    ("source_totals", "n_active", 1, "n_active in source_totals"),
    ("groups", "n", 10**6, "groups and n_active"),
    ("groups", "share_active", 9.0, "groups and n_active"),
    ("groups", "share_mass", 9.0, "groups and n_active"),
    ("examples", "activation", 1e6, "examples and activations"),
]


def test_verify_finds_tables_that_disagree_whatever_their_checksums(fresh):
    for table, column, value, what in DISAGREEING:
        rewrite(copy := fresh(), table, with_value(column, value, 0))
        with_hashes(copy)
        with pytest.raises(IndexFormatError, match=rf"{what}.* disagree \(latent 0"):
            FeatureIndex.open(copy).verify()
    for entry, value in (("n_alive", 1), ("l0", 0.5)):
        change(copy := fresh(), **{entry: value})
        with pytest.raises(IndexFormatError, match="n_alive or l0 in manifest"):
            FeatureIndex.open(copy).verify()


def ask_everything(index) -> None:
    """Every reader of an index."""
    for j in range(index.n_latents):
        index.feature(j), index.examples(j), index.activations(j), index.sources(j)
    for block in range(index.n_blocks):
        index.tokens_of(block), index.documents_of(block)
    index.table(), index.nulls(), index.search(token=5), index.documents, index.vocabulary
    for name in ("activations", *TABLES):
        index.sql(f"SELECT * FROM {name}")


_SLOW_TABLES = [pytest.param(name, marks=pytest.mark.slow) for name in TABLES if name not in ("sources", "examples")]


@pytest.mark.parametrize("table", ["sources", "examples", "activations/part-0000", *_SLOW_TABLES])
def test_a_flipped_byte_is_an_error_or_changes_nothing(index, copy, table):
    """Never another number: each byte stands under a checksum, or in a footer that then does not parse."""
    path, wrong = copy / f"{table}.parquet", 0
    whole = path.read_bytes()
    said = snapshot(index)
    for at in (0.05, 0.3, 0.5, 0.7):
        path.write_bytes(whole)
        flip(path, at)
        try:
            found = FeatureIndex.open(copy)
            ask_everything(found)
            assert snapshot(found) == said, at
        except HeadscopeError:
            wrong += 1
    assert wrong


def snapshot(index) -> list:
    return [said_of(index, j) for j in range(index.n_latents)]


def said_of(index, latent):
    return plain([index.feature(latent), index.examples(latent), index.sources(latent)])


def plain(value):
    """Records and arrays as what `==` compares, to the last bit; printing them would round and be slower."""
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------------------- reading
def test_another_model_or_sae_is_refused(index):
    class Known:
        def __init__(self, known: str) -> None:
            self.known = known

        def fingerprint(self) -> str:
            return self.known

        def matches(self, known: str) -> bool:
            return known == self.known

    model, sae = Known(index.manifest["model"]["hash"]), index.manifest["sae"]["hash"]
    index.check_same(model=model, sae_hash=sae)
    index.check_same()
    with pytest.raises(IndexFormatError, match="model sha256:other"):
        index.check_same(model=Known("sha256:other"), sae_hash=sae)
    with pytest.raises(IndexFormatError, match=rf"SAE sha256:other\n.*with which .* was built: .*{sae}"):
        index.check_same(model=model, sae_hash="sha256:other")
    with pytest.raises(IndexFormatError, match=r"SAE runs/other \(sha256:other\)"):
        index.check_same(sae_hash="sha256:other", sae_name="runs/other")


@each("latent", [-1, D_SAE, 10**20])
def test_a_latent_that_does_not_exist(index, latent):
    for call in (index.feature, index.examples, index.activations, index.sources):
        with pytest.raises(IndexFormatError, match=f"latent {latent}"):
            call(latent)


@each("latent", [None, "0", 0.0, [0]])
def test_a_latent_that_is_no_number(index, no_type_checks, latent):
    for call in (index.feature, index.examples, index.activations, index.sources):
        with pytest.raises(IndexFormatError, match="whole number"):
            call(latent)


@each("threshold", [0.25, float("nan"), "0.5"])
def test_a_threshold_that_was_not_built(index, no_type_checks, threshold):
    with pytest.raises(IndexFormatError, match=r"0\.0, 0\.5"):
        index.sources(0, threshold)


@each("block", [-1, 12, 10**20])
def test_a_block_that_does_not_exist(index, block):
    for call in (index.tokens_of, index.documents_of):
        with pytest.raises(IndexFormatError, match=f"block {block}"):
            call(block)


def test_the_table_is_what_the_features_say(index):
    rows = index.table().to_pylist()
    assert [row["latent"] for row in rows] == list(range(D_SAE))
    for row in rows:
        feature, sources = index.feature(row["latent"]), index.sources(row["latent"])
        for name in ("n_active", "density", "mean", "std", "maximum", "skew", "kurtosis", "copy_rank", "bias"):
            assert row[name] == getattr(feature, name)
        shares = feature.shares
        assert row["decoder_head"] == int(np.argmax(shares.decoder))
        assert row["decoder_share"] == pytest.approx(shares.decoder.max())
        assert (row["top_logit"], row["top_logit_value"]) == feature.logit_top[0]
        assert row["logit_tokens"] == [t for t, _ in feature.logit_top[:10]]
        if not feature.alive:
            live = ("top_head", "top_head_share", "participation", "disagreement", "top_source", "top_source_share")
            assert all(row[name] is None for name in live)
            assert row["example_tokens"] == []
            continue
        assert row["top_head"] == shares.top_head
        assert row["top_head_share"] == pytest.approx(shares.dfa.max())
        assert row["participation"] == pytest.approx(shares.participation)
        assert row["disagreement"] == pytest.approx(shares.disagreement, abs=1e-6)
        assert (row["top_source"], row["top_source_share"]) == (sources.tokens[0].token, sources.tokens[0].share)
        top = index.examples(row["latent"])[0].examples
        tokens = [int(index.tokens_of(e.position // 16)[e.position % 16]) for e in top]
        assert row["example_tokens"] == tokens


def test_search_is_the_naive_filter(index):
    features = [index.feature(j) for j in range(D_SAE)]
    live = [f for f in features if f.alive]
    assert set(index.search()) == {f.latent for f in live}
    tops = [f.shares.dfa.max() for f in live]
    assert list(index.search()) == [live[i].latent for i in np.argsort(-np.array(tops), kind="stable")]
    for head in range(4):
        expected = [f for f in live if f.shares.dfa[head] >= 0.2]
        expected.sort(key=lambda f: -f.shares.dfa[head])
        assert list(index.search(head=head, min_share=0.2)) == [f.latent for f in expected]
    middle = sorted(f.density for f in live)[len(live) // 2]
    assert set(index.search(max_density=middle)) == {f.latent for f in live if f.density <= middle}
    assert set(index.search(min_density=middle)) == {f.latent for f in live if f.density >= middle}
    rows = index.table().to_pylist()
    for token in (5, 40, 41):
        expected = {
            f.latent
            for f in live
            if token in [t for t, _ in f.logit_top[:10]]
            or any(
                token == t.token
                for threshold in THRESHOLDS
                if (s := index.sources(f.latent, threshold))
                for t in s.tokens
            )
            or token in rows[f.latent]["example_tokens"]
        }
        assert set(index.search(token=token)) == expected
    text = index.vocabulary[0][40].decode()
    assert index.search(token=text) == index.search(token=40)
    with pytest.raises(IndexFormatError, match="not one token"):
        index.search(token="two words")
    for head in (-1, 4):
        with pytest.raises(IndexFormatError, match=f"head {head}"):
            index.search(head=head)
    for token in (-1, 98, 10**9):
        with pytest.raises(IndexFormatError, match=f"token {token}"):
            index.search(token=token)


def test_sql_is_read_with_parameters(index):
    table = index.sql("SELECT count(*) AS n FROM activations WHERE latent = ?", [3])
    assert table["n"].to_pylist() == [index.feature(3).n_active]
    total = index.sql("SELECT sum(n_active) AS n FROM features")["n"].to_pylist()
    assert total == [index.manifest["n_pairs"]] == index.sql("SELECT count(*) AS n FROM activations")["n"].to_pylist()


@each(
    ("query", "why"),
    [
        ("SELECT", "Parser Error"),
        ("SELECT nothing FROM features", "Binder Error.*nothing"),
        ("SELECT * FROM nowhere", "Catalog Error"),
        ("SELECT 1 / 'x'", "Conversion Error"),
        ("SELECT ?", "Invalid Input Error|parameter"),
        ("", "0 statements"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("DROP VIEW features", "DROP"),
        ("CREATE OR REPLACE VIEW features AS SELECT 1", "CREATE"),
        ("COPY features TO '{folder}/features.parquet' (USE_TMP_FILE false)", "COPY"),
        ("EXPLAIN ANALYZE SELECT 1", "EXPLAIN"),
        ("SET enable_external_access = true", "SET"),
        ("INSTALL httpfs", "LOAD"),
        ("ATTACH '{folder}/x.db'", "ATTACH"),
    ],
)
def test_a_query_that_cannot_be_run(index, query, why):
    before = sorted(path.name for path in index.folder.rglob("*"))
    with pytest.raises(IndexFormatError, match=rf"(?s)({why}).*one SELECT"):
        index.sql(query.format(folder=index.folder))
    assert sorted(path.name for path in index.folder.rglob("*")) == before
    assert index.sql("SELECT count(*) AS n FROM features")["n"].to_pylist() == [D_SAE]


def test_a_query_without_end_is_interrupted_and_the_next_one_runs(index):
    endless = "SELECT count(*) FROM range(1000000000) a, range(1000) b"
    with pytest.raises(IndexFormatError, match=r"range\(1000\) b: not finished after 0.2 seconds"):
        index.sql(endless, seconds=0.2)
    assert index.sql("SELECT count(*) AS n FROM features", seconds=30.0)["n"].to_pylist() == [D_SAE]


def test_what_duckdb_says_is_the_cause(index):
    with pytest.raises(IndexFormatError) as error:
        index.sql("SELECT nothing FROM features")
    assert isinstance(error.value.__cause__, duckdb.BinderException)


@each(
    "table",
    [
        "read_csv('{outside}')",
        "read_text('{outside}')",
        "read_blob('{outside}')",
        "'{outside}'",
        "read_text('{folder}/../outside.csv')",
        "read_text('{folder}/manifest.json')",
        "glob('/*')",
        "read_parquet('https://example.org/x.parquet')",
        "read_text('.tmp/*')",
        "a_local_table",
    ],
)
def test_a_query_reads_this_index_and_nothing_else(index, tmp_path, table):
    outside = tmp_path / "outside.csv"
    outside.write_text("a,b\n1,2\n")
    a_local_table = pa.table({"a": [1]})
    assert len(a_local_table) == 1
    with pytest.raises(IndexFormatError, match=r"Permission Error|does not exist"):
        index.sql(f"SELECT * FROM {table.format(outside=outside, folder=index.folder)}")


def test_an_index_in_a_folder_with_an_odd_name_is_queried(index, tmp_path, monkeypatch):
    for name in ("it's [a] *", "ü?"):
        shutil.copytree(index.folder, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        found = FeatureIndex.open(name)
        monkeypatch.chdir("/")
        assert found.sql("SELECT count(*) AS n FROM activations")["n"].to_pylist() == [index.manifest["n_pairs"]]


def test_special_tokens_are_marked(index):
    content, special = index.vocabulary
    assert special == [0]
    assert content[0] == b"<|bos|>"
    assert index.token_id(" ") == content.index(b" ")


def test_many_threads_read_at_once(index):
    expected = snapshot(index)
    fresh = FeatureIndex.open(index.folder)

    def ask(i: int) -> bool:
        j = (i * 7) % D_SAE
        said = said_of(fresh, j) == expected[j]
        own = fresh.activations(j)
        rows = fresh.sql("SELECT count(*) AS n FROM activations WHERE latent = ?", [j])["n"][0].as_py()
        block = i % 12
        return (
            said
            and rows == len(own.position)
            and fresh.tokens_of(block).tolist() == index.tokens_of(block).tolist()
            and fresh.table().num_rows == D_SAE
            and fresh.search() == index.search()
            and fresh.documents == index.documents
        )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))


def test_what_is_read_ahead_is_bounded_and_changes_nothing(index, fresh, monkeypatch):
    copy = fresh()
    for name in ("examples", "groups", "sources", "source_totals"):
        pq.write_table(pq.read_table(copy / f"{name}.parquet"), copy / f"{name}.parquet", row_group_size=7)
    with_hashes(copy)
    expected = snapshot(index)
    for most in (reading._HELD_BYTES, 2000, 0):
        monkeypatch.setattr(reading, "_HELD_BYTES", most)
        found = FeatureIndex.open(copy)
        found.preload()
        assert snapshot(found) == expected
        rows = found._examples
        assert rows._n_bytes == sum(table.nbytes for table in rows._held.values())
        assert rows._n_bytes <= most or len(rows._held) == 1


def test_rows_in_many_groups_are_found(index, random_model, tmp_path):
    """Tables written anew in groups of a few rows say the same."""
    copy = tmp_path / "copy"
    shutil.copytree(index.folder, copy)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    for name in ("examples", "groups", "sources", "source_totals"):
        path = copy / f"{name}.parquet"
        pq.write_table(pq.read_table(path), path, row_group_size=3, write_page_checksum=True)
        files[path.name] = [path.stat().st_size, "sha256:0"]
    change(copy, files=files)
    assert snapshot(FeatureIndex.open(copy)) == snapshot(index)


def test_an_index_is_read_without_torch(index):
    code = f"""
import sys
from headscope.index.store import FeatureIndex
index = FeatureIndex.open({str(index.folder)!r})
index.verify(), index.feature(0), index.examples(0), index.sources(0), index.activations(0)
index.table(), index.nulls()
index.search(token=5), index.tokens_of(0), index.documents, index.vocabulary
assert not {{"torch", "transformers"}} & set(sys.modules), "torch was imported"
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_records_are_frozen(index):
    with pytest.raises(dataclasses.FrozenInstanceError):
        index.feature(0).density = 1.0


@each(
    "bad",
    [
        {"intervals": 1.5},
        {"top": True},
        {"per_quantile": "3"},
        {"n_sources": 2.0},
        {"part_tokens": None},
        {"losses": 1},
        {"thresholds": None},
        {"thresholds": (0, "high")},
    ],
)
def test_a_plan_of_other_than_whole_numbers(no_type_checks, bad):
    with pytest.raises(IndexFormatError, match=next(iter(bad))):
        IndexPlan(**bad)
