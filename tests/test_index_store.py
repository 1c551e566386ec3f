"""Reading an index: what it says as records and SQL, and what is refused of a folder that is not what it says."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from headscope.errors import HeadscopeError, IndexFormatError
from headscope.index.build import SAERecord, build_index
from headscope.index.config import IndexPlan
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
def copy(index, tmp_path):
    """A copy that may be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(index.folder, folder)
    return folder


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


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"', "{}", "[1, 2]", '{"indexes": 3}', "\xff"])
def test_a_manifest_that_is_none(copy, text):
    (copy / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(copy)


@pytest.mark.parametrize("version", [1, 99, "2", None, True])
def test_another_version(copy, version):
    change(copy, format_version=version)
    refused(copy, "index format")


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_or_cut_table_is_named(copy, table):
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


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "activations/../../secret", "a\0b", "", ".", "tokens.parquet/x"]
)
def test_a_file_outside_the_folder_is_not_read(copy, name):
    secret = copy.parent / "secret"
    secret.write_text("secret")
    files = json.loads((copy / "manifest.json").read_text())["files"]
    path = copy / name if "\0" not in name else secret
    size = path.stat().st_size if path.exists() else 6
    change(copy, files=files | {name: [size, "sha256:0"]})
    refused(copy)


@pytest.mark.parametrize("name", ["sources.parquet", "activations/part-0000.parquet"])
def test_a_link_is_not_followed(copy, name):
    outside = copy.parent / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    refused(copy, name.split("/")[-1])


def test_a_folder_of_activations_that_is_a_link(copy):
    (copy / "activations").rename(copy.parent / "elsewhere")
    (copy / "activations").symlink_to(copy.parent / "elsewhere")
    refused(copy, "activations")


@pytest.mark.parametrize("entry", [None, 3, [], [1], "x", {"size": 3}, ["9", "sha256:0"], [-1, None]])
def test_a_file_entry_that_is_none(copy, entry):
    files = json.loads((copy / "manifest.json").read_text())["files"]
    change(copy, files=files | {"nulls.parquet": entry})
    refused(copy)


@pytest.mark.parametrize("bad", [10**30, -1, 0, 1.5, "20", None, [], True, {}])
@pytest.mark.parametrize(
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
def test_a_count_that_is_not_the_tables(copy, entry, bad):
    change(copy, **{entry: bad})
    refused(copy)


def test_blocks_of_another_size_with_the_same_product(copy):
    change(copy, corpus__n_blocks=24, corpus__block_size=8)
    refused(copy)


@pytest.mark.parametrize("entry", ["sae", "model", "corpus", "thresholds", "files"])
@pytest.mark.parametrize("bad", [None, 3, "text", [], {}])
def test_a_part_of_the_manifest_that_is_none(copy, entry, bad):
    change(copy, **{entry: bad})
    refused(copy)


@pytest.mark.parametrize("bad", [[0.0], [0.0, 0.5, 1.0], [0.0, "0.5"], [0.5, 0.0]])
def test_thresholds_that_are_not_the_tables(copy, bad):
    change(copy, thresholds=bad)
    refused(copy)


# ------------------------------------------------------------------------------------------------------------- damaged
def test_verify_names_what_changed(copy):
    found = FeatureIndex.open(copy)
    flip(copy / "sources.parquet")
    flip(copy / "activations" / "part-0000.parquet")
    with pytest.raises(IndexFormatError, match=r"activations/part-0000\.parquet.*sources\.parquet"):
        found.verify()


def test_verify_accepts_what_was_written(index):
    index.verify()


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
    return [repr(index.feature(j)) + repr(index.examples(j)) + repr(index.sources(j)) for j in range(index.n_latents)]


# ------------------------------------------------------------------------------------------------------------- reading
def test_another_model_or_sae_is_refused(index):
    model, sae = index.manifest["model"]["hash"], index.manifest["sae"]["hash"]
    index.check_same(model_hash=model, sae_hash=sae)
    index.check_same()
    with pytest.raises(IndexFormatError, match="model sha256:other"):
        index.check_same(model_hash="sha256:other", sae_hash=sae)
    with pytest.raises(IndexFormatError, match="sae sha256:other"):
        index.check_same(model_hash=model, sae_hash="sha256:other")


@pytest.mark.parametrize("latent", [-1, D_SAE, 10**20])
def test_a_latent_that_does_not_exist(index, latent):
    for call in (index.feature, index.examples, index.activations, index.sources):
        with pytest.raises(IndexFormatError, match=f"latent {latent}"):
            call(latent)


def test_a_threshold_that_was_not_built(index):
    with pytest.raises(IndexFormatError, match=r"0\.0, 0\.5"):
        index.sources(0, 0.25)


@pytest.mark.parametrize("block", [-1, 12, 10**20])
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


def test_sql_is_read_with_parameters(index):
    table = index.sql("SELECT count(*) AS n FROM activations WHERE latent = ?", [3])
    assert table["n"].to_pylist() == [index.feature(3).n_active]
    total = index.sql("SELECT sum(n_active) AS n FROM features")["n"].to_pylist()
    assert total == [index.manifest["n_pairs"]] == index.sql("SELECT count(*) AS n FROM activations")["n"].to_pylist()


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
        said = repr(fresh.feature(j)) + repr(fresh.examples(j)) + repr(fresh.sources(j)) == expected[j]
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
