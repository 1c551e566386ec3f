"""From records to the page's JSON: nothing is lost that the page shows, and sums close after rounding."""

import gzip
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from explorer_source import BIAS, BLOCK, D_SAE, DEAD_LATENT, N_HEADS, N_TOKENS, FakeSource
from headscope.encode import short, significant
from headscope.explorer.examples import join_runs, windows
from headscope.explorer.export import export_folder, export_html
from headscope.explorer.server import CardSource
from headscope.index.records import Example

SOURCE = FakeSource()


def unpack(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples of a card, as the page unpacks them."""
    at = {"src": 0, "dfa": 0, "att": 0, "on": 0}

    def take(kind: str, n: int) -> range:
        at[kind] += n
        return range(at[kind] - n, at[kind])

    def dense(kind: str, n: int, size: float) -> np.ndarray:
        values = np.zeros(N_HEADS)
        for i in take(kind, n):
            values[columns[f"{kind}_head"][i]] = columns[kind][i] * size
        return values

    made = []
    for i, (block, dst) in enumerate(zip(columns["block"], columns["dst"], strict=True)):
        size = 10.0 ** columns["unit"][i]
        sources = [
            {
                "pos": dst - columns["offset"][row],
                "heads": dense("dfa", columns["n_dfa"][row], size),
                "attention": dense("att", columns["n_att"][row], 0.01),
                "other": columns["other"][row] * size,
            }
            for row in take("src", columns["n_src"][i])
        ]
        made.append(
            {
                "position": block * BLOCK + dst,
                "size": size,
                "activation": columns["act"][i] * size,
                "sources": sources,
                "rest": np.array(columns["rest"][i * N_HEADS : (i + 1) * N_HEADS]) * size,
                "on": {dst - columns["on_offset"][r]: columns["on"][r] * size for r in take("on", columns["n_on"][i])},
            }
        )
    assert {kind: len(columns[{"src": "offset"}.get(kind, kind)]) for kind in at} == at, "every column is used up"
    return made


def records(latent: int) -> dict[int, Example]:
    return {e.position: e for group in SOURCE.records(latent) for e in group.examples}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("latent", [0, 18, 199])
def test_the_dfa_of_every_example_adds_up_after_rounding(latent: int, lean: bool) -> None:
    card, exact = SOURCE.feature(latent, lean=lean), records(latent)
    shown = unpack(card["examples"])
    assert [e["position"] for e in shown] == list(exact)
    for example in shown:
        whole, size = exact[example["position"]], example["size"]
        heads = example["rest"] + sum(source["heads"] for source in example["sources"])
        np.testing.assert_allclose(heads, whole.heads, atol=1.0001 * size)
        assert heads.sum() + card["bias"] == pytest.approx(whole.pre, abs=0.5001 * size)
        assert example["activation"] == pytest.approx(whole.activation, abs=0.5001 * size)
        digits = 2 if lean else 3
        assert size == pytest.approx(10.0 ** (math.floor(math.log10(whole.pre)) - digits))


@pytest.mark.parametrize("lean", [False, True])
def test_a_source_keeps_its_total_and_its_large_heads(lean: bool) -> None:
    exact = records(18)
    for example in unpack(SOURCE.feature(18, lean=lean)["examples"]):
        whole, size = exact[example["position"]], example["size"]
        by_position = {source.position: source for source in whole.sources}
        for source in example["sources"]:
            own = by_position[source["pos"]]
            assert source["heads"].sum() + source["other"] == pytest.approx(own.heads.sum(), abs=0.5001 * size)
            large = np.abs(own.heads) >= 0.01 * whole.pre
            np.testing.assert_allclose(source["heads"][large], own.heads[large], atol=0.5001 * size)
            if source["attention"].any():
                np.testing.assert_allclose(source["attention"], own.pattern, atol=0.05 if lean else 0.01)


def test_a_lean_card_keeps_top_and_random_examples_in_full() -> None:
    card = SOURCE.feature(18, lean=True)
    first = {i for group in card["groups"] if group["kind"] in ("top", "random") for i in group["examples"]}
    for i, example in enumerate(unpack(card["examples"])):
        assert card["examples"]["brief"][i] == (i not in first)
        assert len(example["sources"]) <= (8 if i in first else 3)
        assert any(source["attention"].any() for source in example["sources"]) == (i in first)
    assert set(SOURCE.feature(18)["examples"]["brief"]) == {0}


def test_the_text_of_a_card_holds_every_window_once() -> None:
    card, exact = SOURCE.feature(18), records(18)
    known = [(block, start + i) for block, start, ids in card["text"] for i in range(len(ids))]
    assert len(known) == len(set(known))
    for block, start, ids in card["text"]:
        np.testing.assert_array_equal(ids, SOURCE.index.blocks[block, start : start + len(ids)])
    for example in exact.values():
        block, dst = divmod(example.position, BLOCK)
        window = range(max(0, dst - 16), min(BLOCK, dst + 17))
        assert {(block, pos) for pos in [*window, *(s.position for s in example.sources)]} <= set(known)
        names = card["documents"]
        assert names[[d for start, d in card["document_at"][block] if start <= dst][-1]].startswith("package/file")


def test_activations_near_an_example_are_kept() -> None:
    exact = records(20)
    for example in unpack(SOURCE.feature(20)["examples"]):
        whole = exact[example["position"]]
        shown = windows(whole.position % BLOCK, [source.position for source in whole.sources], BLOCK)
        near = {p for start, end in shown for p in range(start, end)}
        expected = {
            int(p): v
            for p, v in zip(whole.active_at, whole.active_value, strict=True)
            if p in near and p != whole.position % BLOCK
        }
        assert example["on"] == pytest.approx(expected, abs=example["size"])


def test_groups_refer_to_examples_and_are_never_empty_of_activation() -> None:
    card = SOURCE.feature(18)
    shown = unpack(card["examples"])
    for group, record in zip(card["groups"], SOURCE.records(18), strict=True):
        assert [shown[i]["position"] for i in group["examples"]] == [e.position for e in record.examples]
        assert all(shown[i]["activation"] > 0 for i in group["examples"])
    intervals = [group for group in card["groups"] if group["kind"] == "interval"]
    assert sum(group["share_active"] for group in intervals) == pytest.approx(1, abs=1e-3)
    assert sum(group["share_mass"] for group in intervals) == pytest.approx(1, abs=1e-3)
    once = card["groups"][0]["examples"][0]
    assert once in card["groups"][2]["examples"], "an example in two groups is there once"


def test_counts_add_up() -> None:
    for latent in (0, 18):
        card = SOURCE.feature(latent)
        assert sum(card["histogram"]["counts"]) == card["stats"]["n_active"]
        assert card["stats"]["density"] == pytest.approx(card["stats"]["n_active"] / N_TOKENS, rel=1e-3)


def test_a_dead_latent_has_an_honest_card() -> None:
    card = SOURCE.feature(DEAD_LATENT)
    assert (card["alive"], card["groups"], card["examples"], card["sources"]) == (False, [], {}, [])
    assert card["histogram"] is None
    assert card["heads"]["dfa"] is None
    assert card["stats"]["density_upper95"] == 3 / N_TOKENS
    json.dumps(card, allow_nan=False)


def test_source_tokens_for_every_threshold() -> None:
    sources = SOURCE.feature(18)["sources"]
    record = SOURCE.index.sources(18)
    assert record is not None
    assert [s["threshold"] for s in sources] == [0.0, 1.5]
    assert sources[0]["token"] == [t.token for t in record.tokens]
    by_head = np.stack([t.share_by_head for t in record.tokens])
    np.testing.assert_allclose(np.array(sources[0]["by_head"]), by_head, rtol=5.001e-3)
    assert (sources[0]["kept"], sources[0]["bos"]) == (0.93, 0.12)


def test_the_table_has_a_row_for_every_latent_and_names_heads() -> None:
    table = SOURCE.table()
    assert {len(values) for values in table["rows"].values()} == {D_SAE}
    assert {column["name"] for column in table["columns"]} <= set(table["rows"])
    assert table["rows"]["top_head"][18] == "1.2"
    assert table["rows"]["maximum"][DEAD_LATENT] is None
    definitions = {column["name"]: column["definition"] for column in table["columns"]}
    assert definitions["density"] == SOURCE.index.manifest["definitions"]["density"], "the index's own words win"
    json.dumps(table, allow_nan=False)


def test_the_null_is_a_range_of_top_shares() -> None:
    for null in SOURCE.about()["nulls"]:
        shares = [n.dfa.max() for n in SOURCE.index.nulls() if n.kind == null["kind"]]
        assert null["range"] == pytest.approx(np.quantile(shares, [0.05, 0.5, 0.95]), rel=1e-2)
        assert len(null["top_head_share"]) == 50


@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False)), st.integers(1, 6))
def test_significant_digits(values: list[float], digits: int) -> None:
    for value, rounded in zip(values, significant(values, digits), strict=True):
        assert rounded == pytest.approx(value, rel=0.5001 * 10.0 ** (1 - digits), abs=1e-18)
        assert abs(value) < 1e-15 or len(f"{abs(rounded):e}".split("e")[0].replace(".", "").rstrip("0")) <= digits


def test_what_is_not_finite_is_none() -> None:
    assert significant([1.23456, math.nan, -math.inf, 0.0], 3) == [1.23, None, None, 0.0]
    assert significant([[0.123456, 2.0]], 2) == [[0.12, 2.0]]
    assert (short(None), short(1234.5678, 6)) == (None, 1234.57)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1))
def test_joined_runs_cover_the_same_text(pairs: list[tuple[int, int]]) -> None:
    runs = [(start, start + n) for start, n in pairs]
    joined = join_runs(runs)
    covered = {p for start, end in joined for p in range(start, end)}
    wanted = {p for start, end in runs for p in range(start, end)}
    assert wanted <= covered
    assert all({p - 1, p + 1} <= wanted for p in covered - wanted), "only single tokens are filled in"
    assert all(a[1] + 1 < b[0] for a, b in pairwise(joined))


def test_cards_are_a_card_source() -> None:
    assert isinstance(SOURCE, CardSource)
    with pytest.raises(IndexError, match="0 to 199"):
        SOURCE.feature(D_SAE)
    with pytest.raises(IndexError):
        SOURCE.context(-1)


@pytest.mark.slow
def test_an_export_of_many_features_is_small(tmp_path: Path) -> None:
    """1,000 features have to fit 8 MB. Random numbers compress worse than any real index."""
    few, many = (len(export_html(SOURCE, tmp_path / f"{n}.html", range(20, 20 + n)).read_bytes()) for n in (5, 20))
    per_feature = (many - few) / 15
    assert per_feature < 8_000, "bytes"


@pytest.mark.slow
def test_a_folder_holds_the_page_the_core_and_packs(tmp_path: Path) -> None:
    folder = export_folder(SOURCE, tmp_path / "site", range(70))
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "0.json.gz",
        "1.json.gz",
        "core.json.gz",
        "index.html",
    ]
    core = json.loads(gzip.decompress((folder / "core.json.gz").read_bytes()))
    assert core["about"]["exported"] == 70
    assert core["pack_of"]["69"] == 1
    pack = json.loads(gzip.decompress((folder / "packs" / "1.json.gz").read_bytes()))
    assert list(pack["cards"]) == [str(i) for i in range(64, 70)]
    known = {(block, start + i) for block, start, ids in pack["text"] for i in range(len(ids))}
    for example in unpack(pack["cards"]["64"]["examples"]):
        assert divmod(example["position"], BLOCK) in known
    assert pack["cards"]["64"]["bias"] == BIAS
