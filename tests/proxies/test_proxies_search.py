import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from headscope import cli
from headscope.corpus import Corpus
from headscope.errors import IndexFormatError, ProxyError, StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.columns import read_columns
from headscope.index.records import Activations
from headscope.index.store import FeatureIndex
from headscope.proxies import (
    Proxy,
    after_any,
    bigram,
    evaluate,
    induction_of,
    next_token_in,
    parse,
    read_blocks,
    text_mask,
    token_in,
    within_after,
)
from headscope.proxies.search import in_fitting_half, search
from headscope.proxies.search_records import STATISTICS, FeatureProxies, SearchPlan
from headscope.proxies.search_table import add_proxies
from headscope.proxies.token_sets import Activation, best_set
from naive_proxies import holds
from planted import BOS, V, induction_sequences, planted_model, planted_sae

N_BLOCKS, SIZE, D_VOCAB = 300, 64, 60
NAMES = tuple(f"document {i}" for i in range(30))


# ------------------------------------------------------------------------------------------------- an index by hand
class HandMade(FeatureIndex):
    """An index of given tokens and activations, as far as a search looks at one."""

    def __init__(
        self, folder: Path, activations: Sequence[np.ndarray], logits: Sequence[int], sources: Sequence[list]
    ) -> None:
        rng = np.random.default_rng(0)
        weights = 1 / np.arange(1, D_VOCAB) ** 0.7
        tokens = rng.choice(np.arange(1, D_VOCAB), (N_BLOCKS, SIZE), p=weights / weights.sum()).astype(np.int32)
        tokens[:, 0] = 0
        document = np.repeat(np.arange(N_BLOCKS) * len(NAMES) // N_BLOCKS, SIZE).astype(np.int32)
        starts = np.zeros(tokens.shape, dtype=bool)
        self.corpus = {"token": tokens, "document": document.reshape(-1, SIZE), "is_text": tokens > 0, "starts": starts}
        self.folder = folder
        self.manifest = {
            "corpus": {"n_blocks": N_BLOCKS, "block_size": SIZE, "n_tokens": N_BLOCKS * (SIZE - 1)},
            "sae": {"d_sae": len(activations)},
        }
        self.dense, self.logits, self.by_source = activations, logits, sources
        vocabulary = [f"t{i}".encode() for i in range(D_VOCAB)], [0]
        self.token_texts = SimpleNamespace(vocabulary=vocabulary, byte_tokens=[], prefix=b"", pieces=list)
        self.documents = list(NAMES)

    def each_blocks(self) -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, N_BLOCKS, 100):
            yield {name: values[first : first + 100] for name, values in self.corpus.items()}

    def table(self) -> pa.Table:
        counts = [int((f > 0).sum()) for f in self.dense]
        return pa.table({"top_logit": pa.array(self.logits), "n_active": counts})

    def activations(self, latent: int) -> Activations:
        position = np.flatnonzero(self.dense[latent])
        return Activations(position, self.dense[latent][position].astype(np.float32), np.zeros((len(position), 1)))

    def feature(self, latent: int) -> SimpleNamespace:
        return SimpleNamespace(logit_top=((self.logits[latent], 1.0),))

    def sources(self, latent: int) -> SimpleNamespace:
        return SimpleNamespace(tokens=[SimpleNamespace(token=t) for t in self.by_source[latent]])


TRUTH: dict[str, tuple[Proxy, float]] = {
    "induction": (induction_of("t5"), 0.9),
    "local context": (within_after(["t30"], 10), 0.8),
    "high-level context": (after_any(["t40", "t50", "t55"]), 0.6),
    "token": (token_in(["t7", "t20", "t33"]), 0.9),
}
SOURCES = {"local context": [30, 31], "high-level context": [40, 50, 55], "induction": [5]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    """Latents 0-3 are `TRUTH`; 4 next tokens, 5 bigrams, 6-25 noise of any density, 26 a rare one, 27 dead."""
    index = HandMade(tmp_path_factory.mktemp("planted"), [], [], [])
    rng = np.random.default_rng(1)
    truths = [*TRUTH.values(), (next_token_in(["t6", "t9"]), 0.9), (bigram("t1", "t2") | bigram("t3", "t1"), 0.9)]
    text = text_mask(index)
    dense = []
    for proxy, recall in truths:
        active = evaluate(proxy, index) & (rng.random(text.size) < recall)
        active |= text & (rng.random(text.size) < 0.002)
        dense.append(active * rng.gamma(4, 0.5, text.size))
    for density in np.geomspace(0.006, 0.5, 20):
        dense.append((text & (rng.random(text.size) < density)) * rng.gamma(4, 0.5, text.size))
    few = np.zeros(text.size)
    few[np.flatnonzero(text)[::1500]] = 1.0
    index.dense = [*dense, few, np.zeros(text.size)]
    index.manifest["sae"]["d_sae"] = len(index.dense)
    index.logits = [5] * len(index.dense)
    index.by_source = [SOURCES.get(kind, []) for kind in TRUTH] + [[8, 0, 3]] * (len(index.dense) - len(TRUTH))
    return index


@pytest.fixture(scope="module")
def found(planted: HandMade) -> list[FeatureProxies]:
    return list(search(planted, range(28)))


@pytest.mark.parametrize("latent", range(4))
def test_what_was_planted_is_found(found: list[FeatureProxies], latent: int) -> None:
    kind, (proxy, recall) = list(TRUTH.items())[latent]
    best = found[latent].families[0]
    assert found[latent].kind == kind
    assert best.proxy == proxy
    assert best.scores["recall"].value == pytest.approx(recall, abs=0.04)
    active = best.n_both + 0.002 * (found[latent].n - best.n_proxy * recall)
    assert best.scores["precision"].value == pytest.approx(best.n_both / active, abs=0.05)


def test_next_tokens_and_bigrams_are_found(found: list[FeatureProxies]) -> None:
    assert found[4].kind == found[5].kind == "token"
    assert found[4].families[0].proxy == next_token_in(["t6", "t9"])
    assert {str(p) for p in found[5].families[0].proxy.parts} == {'bigram("t1", "t2")', 'bigram("t3", "t1")'}


def test_noise_stays_unexplained_and_its_scores_are_its_null(found: list[FeatureProxies]) -> None:
    assert {f.kind for f in found[6:26]} == {"unexplained"}
    for feature in found[6:26]:
        for family in feature.families:
            assert abs(family.scores["pearson"].value) < 0.05
            assert abs(family.scores["auc"].value - 0.5) < 0.05


def test_the_null_has_little_of_what_was_planted(found: list[FeatureProxies]) -> None:
    for feature in found[:6]:
        scores = feature.families[0].scores
        # blocks are moved whole: what only holds late in a block goes a little with activations late in others
        late = 0.15 if feature.kind == "high-level context" else 0.03
        assert abs(scores["pearson"].null) < late
        assert abs(scores["auc"].null - 0.5) < late
        assert feature.null_high < late + 0.05 < scores["pearson"].low
        assert scores["precision"].null < scores["precision"].value


def test_rare_and_dead_features_are_not_classified(found: list[FeatureProxies]) -> None:
    assert found[26].kind is None
    assert 0 < min(found[26].n_active, found[26].n_active_fit) < 30
    assert (found[27].kind, found[27].families, found[27].n_active) == (None, (), 0)


# --------------------------------------------------------------------------------------------------------- the halves
def halves(index: FeatureIndex) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text positions to fit on, to score on, and the document of each position."""
    document = np.concatenate([b.document.ravel() for b in read_blocks(index)])
    fit = np.array([in_fitting_half(name) for name in index.documents])[document]
    text = text_mask(index)
    return text & fit, text & ~fit, document


def test_the_halves_are_of_documents_and_about_equal() -> None:
    share = np.mean([in_fitting_half(f"name {i}") for i in range(4000)])
    assert abs(share - 0.5) < 0.03


def test_nothing_is_chosen_on_the_scoring_half(planted: HandMade, found: list[FeatureProxies]) -> None:
    _, scored, _ = halves(planted)
    original = planted.dense
    try:
        planted.dense = [np.where(scored, np.random.default_rng(i).permutation(f), f) for i, f in enumerate(original)]
        again = list(search(planted, range(6)))
    finally:
        planted.dense = original
    for before, after in zip(found[:6], again, strict=True):
        assert [f.proxy for f in before.families] == [f.proxy for f in after.families]
        assert [f.fit_pearson for f in before.families] == [f.fit_pearson for f in after.families]
        assert before.families[0].scores["pearson"] != after.families[0].scores["pearson"]


def brute_force(f: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """All statistics from dense arrays."""
    active, both = f > 0, (f > 0) & y
    above = sum(
        ((f[y] > v).sum() + ((f[y] == v).sum() / 2)) * n
        for v, n in zip(*np.unique(f[~y], return_counts=True), strict=True)
    )
    return {
        "precision": both.sum() / active.sum(),
        "recall": both.sum() / y.sum(),
        "f1": 2 * both.sum() / (active.sum() + y.sum()),
        "auc": above / (y.sum() * (~y).sum()),
        "pearson": np.corrcoef(f, y)[0, 1],
        "phi": np.corrcoef(active, y)[0, 1],
    }


@pytest.mark.parametrize("latent", [0, 1, 2, 3, 4, 5, 10, 20])
def test_every_score_is_that_of_dense_arrays(planted: HandMade, found: list[FeatureProxies], latent: int) -> None:
    fit, scored, _ = halves(planted)
    f = planted.dense[latent].astype(np.float32).astype(np.float64)
    for family in found[latent].families:
        mask = evaluate(family.proxy, planted)
        assert (family.n_proxy, family.n_both) == (mask[scored].sum(), (mask & (f > 0))[scored].sum())
        expected = brute_force(f[scored], mask[scored])
        for name in STATISTICS:
            score = family.scores[name]
            assert score.value == pytest.approx(expected[name], rel=1e-10, abs=1e-12), name
            assert latent > 5 or score.low <= score.value <= score.high, name
        assert family.fit_pearson == pytest.approx(brute_force(f[fit], mask[fit])["pearson"], rel=1e-10)


@pytest.mark.slow
def test_the_null_is_that_of_activations_rolled_by_whole_blocks(planted: HandMade) -> None:
    plan = SearchPlan(n_rotations=N_BLOCKS - 1)  # all of them
    feature = next(search(planted, [0], plan))
    best, text = feature.families[0], text_mask(planted)
    f, mask = planted.dense[0].astype(np.float32).astype(np.float64), evaluate(best.proxy, planted)
    nulls = [brute_force(np.roll(f, k * SIZE)[text], mask[text]) for k in range(1, N_BLOCKS)]
    for name in STATISTICS:
        assert best.scores[name].null == pytest.approx(np.mean([n[name] for n in nulls]), rel=1e-9), name
    assert feature.null_high == pytest.approx(max(n["pearson"] for n in nulls), rel=1e-9)


def test_features_do_not_depend_on_which_others_are_searched(planted: HandMade, found: list[FeatureProxies]) -> None:
    assert list(search(planted, [5, 0, 26])) == [found[5], found[0], found[26]]


def test_a_latent_that_does_not_exist(planted: HandMade) -> None:
    with pytest.raises(IndexFormatError, match="latent 28"):
        next(search(planted, [0, 28]))


# --------------------------------------------------------------------------------------------------------------- sets
@pytest.mark.parametrize("seed", range(10))
def test_the_best_set_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    key = rng.integers(0, 7, 300)
    f = rng.gamma(1, 1, 300) * (rng.random(300) < (np.arange(7) / 9)[key])
    active = f > 0
    counts = np.bincount(key, minlength=7).astype(np.float64)
    of = Activation(300, float(f.sum()), float((f**2).sum()))
    allowed = np.ones(7, dtype=bool)
    allowed[seed % 3] = False
    chosen, pearson = best_set(key[active], f[active], counts, allowed, of, 7)
    subsets = [s for n in range(1, 8) for s in itertools.combinations(np.flatnonzero(allowed), n)]
    best = max(np.nan_to_num(np.corrcoef(np.isin(key, s), f)[0, 1], nan=-1) for s in subsets)
    assert pearson == pytest.approx(best, rel=1e-10)
    assert pearson == pytest.approx(np.corrcoef(np.isin(key, chosen), f)[0, 1], rel=1e-10)
    few, of_few = best_set(key[active], f[active], counts, allowed, of, 2)
    best_two = max(np.corrcoef(np.isin(key, s), f)[0, 1] for s in subsets if len(s) <= 2)
    assert len(few) <= 2
    assert 0.95 * best_two <= of_few <= best_two + 1e-12


def test_no_set_where_nothing_is_allowed() -> None:
    none = np.zeros(2, dtype=bool)
    chosen, pearson = best_set(np.array([0, 1]), np.ones(2), np.ones(2), none, Activation(9, 2.0, 2.0), 3)
    assert (len(chosen), pearson) == (0, -1.0)


# ------------------------------------------------------------------------------------------------ a model built by hand
@pytest.fixture(scope="module")
def transformer_index(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    """The planted transformer on 2,400 blocks `BOS ... A B ... A`, in 80 documents of 30 blocks."""
    blocks = induction_sequences(2400)[0].numpy().astype(np.int32)
    document = np.repeat(np.arange(80, dtype=np.int32), 30)[:, None] + np.zeros_like(blocks)
    corpus = Corpus(
        name="planted",
        split="all",
        blocks=blocks,
        documents=tuple(f"part {i}" for i in range(80)),
        document=document,
        offset=np.where(blocks == BOS, -1, 1).astype(np.int32),
        bos=BOS,
    )
    out = tmp_path_factory.mktemp("transformer") / "index"
    with torch.no_grad():
        build_index(planted_model(), [(planted_sae(), SAERecord("planted", "none"))], corpus, out)
    return FeatureIndex.open(out)


def test_induction_features_of_the_planted_transformer_are_found(transformer_index: FeatureIndex) -> None:
    plan = SearchPlan(min_active=5)
    for feature in search(transformer_index, range(1, V), plan):
        best = feature.families[0]
        assert (feature.kind, best.proxy) == ("induction", induction_of(f" w{feature.latent}"))
        for name in STATISTICS:
            assert best.scores[name].value == pytest.approx(1.0), name
        assert best.n_both == best.n_proxy == feature.n_active >= 5


def test_its_features_of_the_present_token_are_tokens(transformer_index: FeatureIndex) -> None:
    for feature in search(transformer_index, range(V + 1, 2 * V)):
        best = feature.families[0]
        assert (feature.kind, best.proxy) == ("token", token_in([f" w{feature.latent - V}"]))
        assert best.scores["pearson"].value == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------- evaluation, columns
@pytest.fixture(scope="module")
def index(random_model, random_corpus, random_sae, tmp_path_factory) -> FeatureIndex:
    model = random_model("gpt2")
    folder = tmp_path_factory.mktemp("search") / "index"
    build_index(model, [(random_sae(model, 70), SAERecord("s", "sha256:s"))], random_corpus(model, 60, 32), folder)
    return FeatureIndex.open(folder)


@pytest.mark.parametrize(
    "text", ['induction("a", fuzzy=True)', 'within_after([" "], n=4)', 'regex("[a-m]{2}")', 'document("* 1?")']
)
def test_a_proxy_over_an_index_is_that_over_its_blocks(index: FeatureIndex, text: str, monkeypatch) -> None:
    mask = evaluate(text, index)
    assert mask.shape == (index.n_blocks * index.block_size,)
    assert 0 < mask.sum() < mask.size
    expected = np.concatenate([holds(parse(text), blocks).ravel() for blocks in read_blocks(index)])
    np.testing.assert_array_equal(mask, expected)
    assert not mask[~text_mask(index)].any()


def test_however_the_corpus_is_cut_a_mask_is_the_same(planted: HandMade, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = within_after(["t3"]) | induction_of("t2")
    whole = np.concatenate([proxy.holds(b).ravel() for b in read_blocks(planted)])
    monkeypatch.setattr("headscope.proxies.masks._CHUNK", 1)
    assert len(list(read_blocks(planted))) == 3
    np.testing.assert_array_equal(np.concatenate([proxy.holds(b).ravel() for b in read_blocks(planted)]), whole)
    assert text_mask(planted).sum() == N_BLOCKS * (SIZE - 1)


def test_masks_are_kept_and_a_changed_one_changes_no_other(
    index: FeatureIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[FeatureIndex] = []
    monkeypatch.setattr("headscope.proxies.masks.read_blocks", lambda own: read.append(own) or read_blocks(own))
    first = evaluate('token_in(["x"])', index)
    expected, n_read = first.copy(), len(read)
    first[:] = True
    again = evaluate(token_in(["x"]), index)
    np.testing.assert_array_equal(again, expected)
    assert (again.dtype, len(read)) == (bool, n_read)
    monkeypatch.setattr("headscope.proxies.masks._CACHED", first.size // 8)  # room for one, at a bit a position
    evaluate('token_in(["y"])', index)
    evaluate(token_in(["x"]), index)
    assert len(read) == n_read + 2


def test_the_tokenizer_says_what_a_text_is_cut_into(index: FeatureIndex) -> None:
    with pytest.raises(ProxyError, match="'ab c' is no token but 4 pieces: 'a', 'b', ' ', 'c'"):
        evaluate('token_in(["ab c"])', index)


def columns_of(index: FeatureIndex) -> pa.Table:
    return read_columns(index.folder, "proxies")[0]


def test_columns_are_of_every_latent_and_defined(index: FeatureIndex) -> None:
    plan = SearchPlan(min_active=10)
    summary = add_proxies(index, plan)
    table, provenance = read_columns(index.folder, "proxies")
    assert table["latent"].to_pylist() == list(range(70))
    assert set(provenance["definitions"]) == set(table.column_names[1:])
    assert provenance["settings"]["min_active"] == 10
    live = index.table()["n_active"].to_numpy() > 0
    assert summary.n_alive == live.sum() == sum(summary.kinds.values())
    rows = table.to_pylist()
    assert all(
        row["kind"] is None and row["proxy"] is None and row["n"] is None for row in rows if not live[row["latent"]]
    )
    for feature in search(index, [int(i) for i in np.flatnonzero(live)[:5]], plan):
        row, best = rows[feature.latent], feature.families[0]
        assert (row["kind"], row["proxy"], row["n_active"]) == (feature.kind, best.proxy.name, feature.n_active)
        assert (row["pearson"], row["auc_low"], row["f1_null"]) == (
            best.scores["pearson"].value,
            best.scores["auc"].low,
            best.scores["f1"].null,
        )
        assert parse(row["proxy"]) == best.proxy
    assert not list((index.folder / "columns").glob(".*"))


@pytest.mark.slow
def test_an_interrupted_search_goes_on(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    add_proxies(index)
    expected = columns_of(index)
    monkeypatch.setattr("headscope.proxies.search_table._PART", 16)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_proxies(index, on_progress=stop)
    parts = sorted((index.folder / "columns").glob(".proxies-*/*.parquet"))
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:-40])  # a damaged part is made again
    seen: list[int] = []
    add_proxies(index, on_progress=lambda stage, done, total: seen.append(done))
    n_alive = int((index.table()["n_active"].to_numpy() > 0).sum())
    assert seen == list(range(17, n_alive + 1))
    assert columns_of(index).equals(expected)
    assert not list((index.folder / "columns").glob(".*"))


@pytest.mark.slow
def test_another_plan_does_not_go_on_with_the_parts_of_this_one(index: FeatureIndex, monkeypatch) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headscope.proxies.search_table._PART", 1)
    with pytest.raises(KeyboardInterrupt):
        add_proxies(index, on_progress=stop)
    seen: list[int] = []
    add_proxies(index, SearchPlan(seed=3), on_progress=lambda stage, done, total: seen.append(done))
    assert seen[0] == 1


def test_the_command_writes_the_columns(index: FeatureIndex, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["proxies", str(index.folder)])
    shown = capsys.readouterr().out
    assert "too rare" in shown
    assert str(index.folder / "columns" / "proxies.parquet").replace("\n", "") in shown.replace("\n", "")
    assert "proxies.kind" in FeatureIndex.open(index.folder).table().column_names


def test_the_command_prints_single_features(index: FeatureIndex, capsys: pytest.CaptureFixture[str]) -> None:
    before = columns_of(index)
    for latent in ("3", "5"):
        cli.main(["study", "best-proxies", str(index.folder), latent])
        assert f"feature {latent}: " in capsys.readouterr().out
    assert columns_of(index).equals(before)


def test_the_command_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["proxies", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "headscope index" in capsys.readouterr().err


def test_text_of_one_document_is_refused(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2")
    corpus = dataclasses.replace(random_corpus(model, n_blocks=9, block_size=12), documents=("all of it",))
    corpus.document[:] = 0
    [folder] = build_index(
        model, [(random_sae(model, 10, "relu"), SAERecord("any", "none"))], corpus, tmp_path / "index"
    )
    with pytest.raises(StudyError, match="1 documents, of which none is in the half"):
        next(search(FeatureIndex.open(folder)))
