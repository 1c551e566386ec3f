"""What the documents say of the index holds, and their examples run."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headscope.artefact import file_hash, read_json
from headscope.corpus import load_corpus
from headscope.index import passes, sweep
from headscope.index.build import SAERecord, build_index
from headscope.index.config import N_BINS, QUANTILES, IndexPlan
from headscope.index.store import TABLES, FeatureIndex
from headscope.models.load import load_model
from headscope.sae.formats import load_sae, sae_hash

pytestmark = pytest.mark.slow  # the bundled model's index is built

ROOT = Path(__file__).parents[1]
FORMAT = (ROOT / "docs" / "index-format.md").read_text(encoding="utf-8")
DIVES = (ROOT / "docs" / "deep-dives.md").read_text(encoding="utf-8")
PROMPTS = (ROOT / "docs" / "prompt-explorer.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
LATENT = int(re.findall(r"WHERE latent = (\d+)", FORMAT)[0])  # the feature that the examples are about
BLOCK = 256


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


QUERIES = fenced(FORMAT, "sql")
SNIPPETS = [s for page in (FORMAT, DIVES, PROMPTS, README) for s in fenced(page, "python") if "runs/tiny" in s]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> FeatureIndex:
    """What the documents' command writes, of less text."""
    model, sae = load_model("tiny"), load_sae("tiny-z1")
    whole = load_corpus("python", model.tokenizer, bos=model.bos, split="heldout", block_size=BLOCK, max_tokens=400_000)
    few = {name: getattr(whole, name)[::60] for name in ("blocks", "document", "offset")}  # of many documents
    corpus = dataclasses.replace(whole, **few)
    folder = tmp_path_factory.mktemp("docs") / "index"
    plan = IndexPlan(losses=True, part_tokens=2_048)
    [folder] = build_index(model, [(sae, SAERecord("tiny-z1", sae_hash("tiny-z1")))], corpus, folder, plan=plan)
    return FeatureIndex.open(folder)


@pytest.fixture(scope="module")
def naive(index) -> dict:
    """Everything the queries ask about, as plain arrays and lists."""
    tokens = pq.read_table(index.folder / "tokens.parquet").to_pydict()
    parts = sorted((index.folder / "activations").glob("*.parquet"))
    pairs = pa.concat_tables([pq.read_table(part) for part in parts]).to_pydict()
    own = {p: f for j, p, f in zip(pairs["latent"], pairs["position"], pairs["activation"], strict=True) if j == LATENT}
    assert own
    return {
        "tokens": tokens,
        "pairs": pairs,
        "own": own,
        "features": pq.read_table(index.folder / "features.parquet").to_pylist(),
        "sources": pq.read_table(index.folder / "sources.parquet").to_pylist(),
        "bytes": pq.read_table(index.folder / "vocabulary.parquet")["bytes"].to_pylist(),
    }


def run_snippet(code: str, index: FeatureIndex) -> dict:
    names: dict = {}
    exec(code.replace("runs/tiny", str(index.folder)), names)
    return names


# -------------------------------------------------------------------------------------------------------------- queries
@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_each_query_says_the_same_in_plain_duckdb(index, query):
    duckdb = next(run_snippet(s, index)["db"] for s in SNIPPETS if "duckdb.connect" in s)
    rows = index.sql(query).to_pylist()
    assert rows
    assert duckdb.sql(query).to_arrow_table().to_pylist() == rows


def rows_of(index: FeatureIndex, word: str) -> list[dict]:
    [query] = [q for q in QUERIES if word in q]
    return index.sql(query).to_pylist()


def test_copiers(index, naive):
    expected = {}
    for f in naive["features"]:
        share = {s["token"]: s["share"] for s in naive["sources"] if s["latent"] == f["latent"]}
        own = share.get(f["logit_top_tokens"][0], 0)
        if f["dfa_share"] and max(f["dfa_share"]) >= 0.6 and own >= 0.5:
            expected[f["latent"]] = (int(np.argmax(f["dfa_share"])), own, f["n_active"])
    found = rows_of(index, "head_share")
    assert {r["latent"]: (r["head"], r["source_share"], r["n_active"]) for r in found} == expected
    assert [r["source_share"] for r in found] == sorted((e[1] for e in expected.values()), reverse=True)


def test_where_a_feature_is_strongest(index, naive):
    order = sorted(naive["own"], key=lambda p: (-naive["own"][p], p))[:10]
    found = rows_of(index, "string_agg")
    assert [r["position"] for r in found] == order
    for row in found:
        start = max(row["position"] - 12, row["position"] // BLOCK * BLOCK)
        end = min(row["position"] + 5, (row["position"] // BLOCK + 1) * BLOCK)
        text = b"".join(naive["bytes"][t] for t in naive["tokens"]["token"][start:end])
        assert row["around"].encode().decode("unicode_escape").encode("latin-1") == text


def test_features_active_together(index, naive):
    pairs = zip(naive["pairs"]["latent"], naive["pairs"]["position"], strict=True)
    both = Counter(j for j, p in pairs if p in naive["own"] and j != LATENT)
    expected = sorted(both.items(), key=lambda item: (-item[1], item[0]))[:10]
    found = rows_of(index, "n_both")
    assert [(r["latent"], r["n_both"]) for r in found] == expected
    for row in found:
        assert row["share_of_other"] == row["n_both"] / naive["features"][row["latent"]]["n_active"]


def test_loss_where_a_feature_is_active(index, naive):
    losses: dict[bool, list[float]] = {True: [], False: []}
    for position, (is_text, loss) in enumerate(zip(naive["tokens"]["is_text"], naive["tokens"]["loss"], strict=True)):
        if is_text and loss is not None:
            losses[position in naive["own"]].append(loss)
    for row in rows_of(index, "avg(t.loss)"):
        assert row["n"] == len(losses[row["active"]])
        assert row["loss"] == pytest.approx(np.mean(losses[row["active"]]), rel=1e-9)


def test_precision_by_activation(index, naive):
    feature = naive["features"][LATENT]
    hits: dict[float, list[bool]] = {}
    for position, f in naive["own"].items():
        following = naive["tokens"]["next_token"][position]
        if following is not None:
            hit = following == feature["logit_top_tokens"][0]
            hits.setdefault(min(np.floor(10 * f / feature["maximum"]), 9), []).append(hit)
    found = rows_of(index, "AS precision")
    assert {r["tenth"]: r["n"] for r in found} == {tenth: len(hit) for tenth, hit in hits.items()}
    for row in found:
        assert row["precision"] == pytest.approx(np.mean(hits[row["tenth"]]))


# ------------------------------------------------------------------------------------------------------------- snippets
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[0])
def test_each_snippet_runs(index, naive, snippet):
    for module in re.findall(r"^import (pandas|polars)", snippet, re.MULTILINE):
        pytest.importorskip(module)
    active = run_snippet(snippet, index).get("active")
    assert active is None or list(active["position"]) == list(naive["own"])


# ------------------------------------------------------------------------------------------------------------- the page
def described() -> dict[str, list[list[str]]]:
    """The column tables of the page, by file."""
    found = {}
    for section in re.split(r"^### ", FORMAT, flags=re.MULTILINE)[1:]:
        table = re.search(r"^\| column \| type \| null .*?\n\n", section + "\n\n", re.DOTALL | re.MULTILINE)
        if table:
            rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table[0].strip().splitlines()[2:]]
            found[section.split("\n")[0]] = [[cell.strip() for cell in row] for row in rows]
    return found


@pytest.mark.parametrize("name", described())
def test_the_page_lists_the_columns_as_they_are(index, name):
    path = index.folder / name.replace("NNNN", "0000")
    table = pq.read_table(path)
    columns = {}
    for column, kind, null, _ in described()[name]:
        heads = range(index.manifest["model"]["n_heads"]) if "head_0" in column else [None]
        for head in heads:
            columns[column.strip("`") if head is None else f"head_{head}"] = kind.replace("\\", ""), null
    kinds = {c.name: re.sub(r"list<\w+: (\w+)>", r"list<\1>", str(c.type)) for c in table.schema}
    assert {column: kind for column, (kind, _) in columns.items()} == kinds
    assert list(columns) == table.column_names
    assert {c for c, (_, null) in columns.items() if null == "no" and table[c].null_count} == set()


def test_the_page_describes_every_table():
    names = {f"{name}.parquet" for name in TABLES} | {"activations/part-NNNN.parquet"}
    assert set(described()) == names


def test_the_page_lists_the_fields_of_the_manifest(index):
    section = FORMAT.split("## manifest.json")[1].split("##")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(index.manifest)


def test_numbers_of_the_page_are_those_of_the_code(index):
    plan = IndexPlan()
    sampled, held = f"({plan.range_rows:,})", f"({plan.part_tokens:,} positions"
    bins, kept = f"{N_BINS} equal bins", f"the {plan.n_sources} sources with the largest"
    rows, tokens = f"{passes._KEPT_ROWS:,} (latent, threshold, token)", f"at least {passes._KEPT_TOKENS} ("
    calibration, batch = f"the first {passes._CALIBRATION_TOKENS:,} positions", f"({passes.BATCH_TOKENS:,} positions)"
    text = f"{sweep._CONTEXT[0]} tokens before and {sweep._CONTEXT[1]} after"
    searched = f"The {plan.top * sweep._CANDIDATES} strongest are searched"
    for words in (sampled, held, bins, kept, rows, tokens, calibration, batch, text, searched):
        assert words in " ".join(FORMAT.split())
    assert ", ".join(map(str, QUANTILES)) in FORMAT
    assert f"# The index, format {index.manifest['format_version']}\n" in FORMAT


def test_rows_lie_where_the_page_says(index, naive):
    latent, position = np.array(naive["pairs"]["latent"]), np.array(naive["pairs"]["position"])
    counts = [f["n_active"] for f in naive["features"]]
    np.testing.assert_array_equal(latent, np.repeat(np.arange(len(counts)), counts))
    assert (np.diff(position)[np.diff(latent) == 0] > 0).all()
    assert [f["latent"] for f in naive["features"]] == list(range(len(counts)))
    order = {
        "sources": lambda r: (r["latent"], r["threshold"], -r["share"], r["token"]),
        "source_totals": lambda r: (r["latent"], r["threshold"]),
        "examples": lambda r: (r["latent"], r["position"]),
        "groups": lambda r: r["latent"],
    }
    for name, key in order.items():
        rows = pq.read_table(index.folder / f"{name}.parquet").to_pylist()
        assert rows == sorted(rows, key=key)


def test_blocks_do_not_straddle_row_groups(index):
    metadata = pq.read_metadata(index.folder / "tokens.parquet")
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert all(n % BLOCK == 0 for n in rows)
    assert len(set(rows[:-1])) <= 1


def test_text_tokens_are_as_the_page_says(index, naive):
    tokens = naive["tokens"]
    special = set(index.vocabulary[1])
    columns = zip(tokens["is_text"], tokens["offset"], tokens["token"], strict=True)
    assert all(is_text == (offset > 0 and token not in special) for is_text, offset, token in columns)
    assert sum(tokens["is_text"]) == index.manifest["corpus"]["n_tokens"]
    assert all(tokens["is_text"][p] for p in naive["pairs"]["position"])


def test_lists_of_an_example_lie_as_the_page_says(index):
    n_heads = index.manifest["model"]["n_heads"]
    for row in pq.read_table(index.folder / "examples.parquet").slice(0, 50).to_pylist():
        dfa = np.array(row["source_heads"]).reshape(-1, n_heads)
        np.testing.assert_allclose(dfa.sum(0) + row["rest"], row["heads"], atol=1e-5)
        assert sum(row["heads"]) + row["bias"] + row["residual"] == pytest.approx(row["pre"], abs=1e-5)
        size = np.abs(dfa.sum(1))
        assert (np.diff(size) <= 1e-6).all()
        query = row["position"] % BLOCK
        assert max(row["source"]) <= query
        assert dict(zip(row["active_at"], row["active_value"], strict=True))[query] == row["activation"]


def test_files_of_the_manifest_are_all_files(index):
    on_disk = {str(p.relative_to(index.folder)) for p in index.folder.rglob("*") if p.is_file()}
    files = read_json(index.folder / "manifest.json")["files"]
    assert set(files) == on_disk - {"manifest.json", "sae/cfg.json", "sae/sae_weights.safetensors"}
    for name, (size, digest) in files.items():
        assert (index.folder / name).stat().st_size == size
        assert file_hash(index.folder / name) == digest


def test_copies_of_the_index_table_are_named_in_the_folder_table(index):
    section = FORMAT.split("## The folder")[1].split("##")[0]
    named = set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))
    built = {re.sub(r"part-\d+", "part-NNNN", name) for name in index.manifest["files"]} | {"manifest.json"}
    assert named == built | {"columns/<study>.parquet", "labels.jsonl", "sae/", "model/"}, "and what is added later"
