"""The index against naive loops over the same corpus, on random models of three families."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from headscope.attribution import HeadWeights
from headscope.errors import IndexFormatError, OutputError, SAEError
from headscope.index.build import build_index
from headscope.index.config import DEFINITIONS, ExamplePlan
from headscope.index.store import FeatureIndex
from headscope.index.summary import choose_examples, summarise
from headscope.index.tables import SAERecord
from headscope.site import Site

RECORD = SAERecord("random", "sha256:0")
D_SAE = 40


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2", "llama"])
def built(request, random_model, random_corpus, random_sae, tmp_path_factory):
    """Model, SAE, corpus and the index of one family; latent 7 is dead."""
    model = random_model(request.param)
    sae = random_sae(model, D_SAE, "jumprelu")
    sae.b_enc[7] = -1e3
    corpus = random_corpus(model, n_blocks=30, block_size=24)
    folder = tmp_path_factory.mktemp("index") / request.param
    build_index(model, sae, corpus, folder, RECORD)
    return model, sae, corpus, FeatureIndex.open(folder)


@pytest.fixture(scope="module")
def naive(built):
    """{latent: [(position, activation, pre, contribution of each head)]} by loops over blocks, positions and heads."""
    model, sae, corpus, _ = built
    weights = HeadWeights.of(sae, model)
    d_head = model.spec.d_head
    found = {j: [] for j in range(D_SAE)}
    for b, row in enumerate(corpus.blocks):
        tokens = torch.from_numpy(row.astype(np.int64))[None]
        z = model.read(tokens, [sae.site])[sae.site][0]
        f, pre = sae.encode(z), sae.pre_activations(z)
        for q in range(len(row)):
            if row[q] == corpus.bos:
                continue
            for j in f[q].nonzero()[:, 0].tolist():
                heads = [
                    float((z[q, h * d_head : (h + 1) * d_head] - weights.offset[h]) @ weights.encoder[j, h])
                    for h in range(model.spec.n_heads)
                ]
                found[j].append((b * len(row) + q, f[q, j].item(), pre[q, j].item(), heads))
    return found


def test_every_active_pair_is_there_and_no_other(built, naive):
    index = built[-1]
    for j in range(D_SAE):
        own = index.activations(j)
        assert own.position.tolist() == [p for p, *_ in naive[j]]
        np.testing.assert_allclose(own.activation, [a for _, a, *_ in naive[j]], rtol=1e-4, atol=1e-6)
        if naive[j]:
            expected = np.array([heads for *_, heads in naive[j]])
            np.testing.assert_allclose(own.heads, expected, rtol=2e-4, atol=1e-4)


def test_statistics_are_those_of_the_naive_loop(built, naive):
    _, _, corpus, index = built
    n_tokens = int((corpus.blocks != corpus.bos).sum())
    for j in range(D_SAE):
        row, pairs = index.feature(j), naive[j]
        assert row["n_active"] == len(pairs)
        assert row["density"] == pytest.approx(len(pairs) / n_tokens)
        if not pairs:
            assert row["maximum"] is None
            continue
        values = np.array([a for _, a, *_ in pairs])
        pre = np.array([p for _, _, p, _ in pairs])
        heads = np.array([h for *_, h in pairs])
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-4)
        assert row["maximum"] == pytest.approx(values.max(), rel=1e-4)
        assert row["dfa_share"] == pytest.approx((heads**2).sum(0) / (heads**2).sum(), rel=1e-3, abs=1e-5)
        if len(pairs) > 2:
            covariance = [np.cov(heads[:, h], pre, bias=True)[0, 1] / pre.var() for h in range(heads.shape[1])]
            assert row["dfa_covariance"] == pytest.approx(covariance, rel=1e-2, abs=1e-3)
            assert sum(row["dfa_covariance"]) == pytest.approx(1, abs=1e-3)
        assert sum(row["dfa_share"]) == pytest.approx(1)
        assert sum(row["histogram"]) == len(pairs)
        assert sum(row["mass"]) == pytest.approx(values.sum(), rel=1e-4)


def test_densities_sum_to_the_l0(built):
    index = built[-1]
    assert sum(index.features["density"]) == pytest.approx(index.manifest["l0"])


def test_examples_close_their_sums_and_name_the_right_sources(built, naive):
    model, sae, corpus, index = built
    weights = HeadWeights.of(sae, model)
    for j in range(0, D_SAE, 3):
        known = {p: (a, pre, heads) for p, a, pre, heads in naive[j]}
        for group in index.examples(j):
            for example in group.examples:
                activation, pre, heads = known[example.position]
                assert example.activation == pytest.approx(activation, rel=1e-4, abs=1e-5)
                assert example.pre == pytest.approx(pre, rel=1e-4, abs=1e-4)
                kept = sum((s.heads for s in example.sources), np.zeros(model.spec.n_heads))
                np.testing.assert_allclose(kept + example.rest, example.heads, atol=1e-5)
                np.testing.assert_allclose(example.heads, heads, rtol=1e-3, atol=1e-4)
                assert example.heads.sum() + example.bias + example.residual == pytest.approx(example.pre, abs=1e-5)
        if index.examples(j):
            _check_sources(model, weights, corpus, j, index.examples(j)[0].examples[0])


def _check_sources(model, weights, corpus, latent, example):
    """The kept sources are the largest, and their contributions those of the explicit product."""
    block, query = divmod(example.position, corpus.block_size)
    attention = model.attention(torch.from_numpy(corpus.blocks[block].astype(np.int64))[None], 1)
    value = attention.value[0] - weights.offset
    dfa = attention.pattern[0, :, query] * torch.einsum("she,he->hs", value, weights.encoder[latent])
    order = dfa.abs().sum(0).argsort(descending=True)[: len(example.sources)]
    assert [s.position for s in example.sources] == order.tolist()
    for source in example.sources:
        np.testing.assert_allclose(source.heads, dfa[:, source.position], rtol=1e-3, atol=1e-5)


def test_groups_hold_what_they_say(built, naive):
    index = built[-1]
    for j in range(D_SAE):
        groups = index.examples(j)
        assert bool(groups) == bool(naive[j])
        values = np.array([a for _, a, *_ in naive[j]])
        for group in groups:
            assert all(e.activation > 0 for e in group.examples)
            assert all(group.low - 1e-5 <= e.activation <= group.high + 1e-5 for e in group.examples)
            ordered = [e.activation for e in group.examples]
            assert ordered == sorted(ordered, reverse=True)
        for kind in ("quantile", "interval"):
            own = [g for g in groups if g.kind == kind]
            if own:
                assert sum(g.share_active for g in own) == pytest.approx(1)
                assert sum(g.share_mass for g in own) == pytest.approx(1)
                assert sum(g.n for g in own) == len(values)


def test_first_and_last_positions_can_be_examples(built):
    _, _, corpus, index = built
    positions = index.sql("SELECT DISTINCT position % ? AS p FROM examples", [corpus.block_size])["p"].to_pylist()
    assert {1, corpus.block_size - 1} <= set(positions)


def test_a_dead_feature_is_honestly_empty(built):
    index = built[-1]
    assert index.feature(7)["n_active"] == 0
    assert index.examples(7) == ()
    assert len(index.activations(7).position) == 0
    assert index.manifest["n_alive"] == sum(n > 0 for n in index.features["n_active"]) < D_SAE


def test_bos_is_in_no_statistic(built):
    _, _, corpus, index = built
    positions = index.sql("SELECT DISTINCT position FROM activations")["position"].to_numpy()
    assert (corpus.blocks.reshape(-1)[positions] != corpus.bos).all()


def test_the_index_does_not_depend_on_the_batch_size(built, tmp_path, monkeypatch):
    model, sae, corpus, index = built
    monkeypatch.setattr("headscope.capture.BATCH_TOKENS", 1)
    monkeypatch.setattr("headscope.index.build._EXAMPLE_TOKENS", 1)
    again = FeatureIndex.open(build_index(model, sae, corpus, tmp_path / "again", RECORD))
    assert again.features["n_active"] == index.features["n_active"]
    assert again.sql("SELECT latent, position FROM examples") == index.sql("SELECT latent, position FROM examples")
    for name in ("mean", "dfa_share", "source_shares"):
        for a, b in zip(again.features[name], index.features[name], strict=True):
            assert (a is None and b is None) or a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_building_twice_gives_the_same_bytes(built, tmp_path):
    model, sae, corpus, index = built
    again = build_index(model, sae, corpus, tmp_path / "again", RECORD)
    for name in ("features", "groups", "examples", "tokens"):
        assert (again / f"{name}.parquet").read_bytes() == (index.folder / f"{name}.parquet").read_bytes()


def test_definitions_travel_with_the_numbers(built):
    assert built[-1].manifest["definitions"] == DEFINITIONS


def test_an_index_of_another_site_is_refused(random_model, random_sae, random_corpus, tmp_path):
    model = random_model("gpt2")
    sae = random_sae(model, 8, site=Site("mlp_out", 0))
    with pytest.raises(SAEError, match="mlp_out"):
        build_index(model, sae, random_corpus(model), tmp_path / "index", RECORD)


def test_a_folder_that_holds_something_is_kept(built, tmp_path):
    model, sae, corpus, _ = built
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        build_index(model, sae, corpus, tmp_path / "index", RECORD)
    assert (tmp_path / "index" / "mine.txt").read_text() == "mine"


def test_a_build_that_fails_leaves_nothing(built, tmp_path):
    model, sae, corpus, _ = built

    def fail(stage, _done, _total):
        if stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(model, sae, corpus, tmp_path / "index", RECORD, on_progress=fail)
    assert not list(tmp_path.iterdir())


def test_an_incomplete_or_foreign_index_is_refused(built, tmp_path):
    index = built[-1]
    with pytest.raises(IndexFormatError, match="headscope index"):
        FeatureIndex.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(index.folder, copy)
    (copy / "examples.parquet").unlink()
    with pytest.raises(IndexFormatError, match=r"examples\.parquet"):
        FeatureIndex.open(copy)
    manifest = json.loads((copy / "manifest.json").read_text()) | {"format_version": 99}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexFormatError, match="99"):
        FeatureIndex.open(copy)
    shutil.copytree(index.folder, copy, dirs_exist_ok=True)
    (copy / "features.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(IndexFormatError, match="damaged"):
        FeatureIndex.open(copy)


def test_a_latent_that_does_not_exist_is_named(built):
    for call in (built[-1].feature, built[-1].examples, built[-1].activations):
        with pytest.raises(IndexFormatError, match="latent 40"):
            call(40)


def test_the_files_read_without_headscope(built):
    index = built[-1]
    table = pq.read_table(index.folder / "features.parquet").to_pydict()
    assert table["n_active"] == index.features["n_active"]


def test_the_same_text_is_one_top_example():
    rng = np.random.default_rng(0)
    phrase = rng.integers(1, 50, 20)
    tokens = np.concatenate(
        [phrase] * 5
        + [rng.permutation(phrase)]  # the same bag of words is another text
        + [rng.integers(1, 50, 20)]
    ).astype(np.int32)
    position = np.array([14, 34, 54, 74, 114, 134])
    activation = np.array([3.0, 3.0, 3.0, 2.9, 2.8, 1.0])
    top = choose_examples(activation, position, tokens[None], ExamplePlan(), np.random.default_rng(0))[0]
    assert position[top.chosen].tolist() == [14, 114, 134]
    assert top.duplicates.tolist() == [3, 0, 0]


def test_a_constant_feature_has_no_covariance_share():
    summary = summarise(np.full(4, 2.0), np.full(4, 2.0), np.full((4, 2), 1.0))
    assert np.isnan(summary.dfa_covariance).all()
    assert summary.dfa_share == pytest.approx([0.5, 0.5])
