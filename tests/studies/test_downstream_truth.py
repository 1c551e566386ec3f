"""Ablation where the answer is known: on paper for the planted transformer, by TransformerLens' hooks for `tiny`."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from headscope.corpus import Corpus
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.models.load import load_model
from headscope.sae.formats import load_sae
from headscope.site import Site
from headscope.studies.what.ablation import downstream
from headscope.studies.what.direct_path import Pairs, direct_loss_changes
from headscope.studies.what.downstream import logit_effect
from headscope.studies.what.paths import BaselineRun
from judging import TINY, assert_same_scale, judged_by, random_tokens, run_judge
from planted import BOS, V, induction_sequences, planted_model, planted_sae

N = 900


# ------------------------------------------------------------------------------------------------------------- planted
@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """`BOS ... A B ... A B`: latent B is 0.5 at the last A, and its token comes next; each block is a document."""
    model, sae = planted_model(), planted_sae()
    tokens, _, second = induction_sequences(N)
    blocks = torch.cat([tokens, second[:, None]], dim=1).numpy().astype(np.int32)
    number = np.broadcast_to(np.arange(N, dtype=np.int32)[:, None], blocks.shape).copy()
    offset = np.broadcast_to(np.arange(blocks.shape[1], dtype=np.int32), blocks.shape).copy()
    names = tuple(f"document {i}" for i in range(N))
    corpus = Corpus("planted", "all", blocks, names, number, offset, BOS)
    folder = tmp_path_factory.mktemp("planted") / "index"
    build_index(model, [(sae, SAERecord("planted", "none"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae), second


def loss(own: float, current: float) -> float:
    """Of the copied token, when its logit is `own`, that of the current one `current`, and all others 0."""
    return math.log(math.exp(own) + math.exp(current) + V - 2) - own


def test_ablating_an_induction_feature_costs_what_it_does_on_paper(planted):
    live, second = planted
    records = downstream(live, range(1, V))  # latent 0 is on wherever nothing is copied
    last = live.index.block_size - 2
    assert sum(record.n for record in records) == N
    for b, record in enumerate(records, start=1):
        assert record.n == int((second == b).sum())
        if not record.n:
            continue
        assert (record.position % live.index.block_size == last).all()
        assert_allclose(record.activation, 0.5, rtol=1e-12)
        assert record.next_is(b).all()
        for path in ("total", "direct"):
            assert_allclose(record.paths[path].change, loss(0.5, 0.5) - loss(1.0, 0.5), rtol=1e-10)
        assert_allclose(record.paths["mlp.1"].change, 0, atol=1e-12)
        assert_allclose(record.interaction, 0, atol=1e-12)
        assert_allclose(record.loss, loss(1.0, 0.5), rtol=1e-10)


def test_inside_the_reconstruction_the_baseline_is_the_spliced_loss(planted):
    """The two features there reconstruct half of each head's z: the logits are 0.5 and 0.25, and 0 and 0.25 ablated."""
    live, second = planted
    b = int(torch.bincount(second, minlength=V).argmax())
    [record] = downstream(live, [b], baseline="reconstruction")
    assert_allclose(record.loss, loss(0.5, 0.25), rtol=1e-10)
    assert_allclose(record.paths["total"].change, loss(0.0, 0.25) - loss(0.5, 0.25), rtol=1e-10)


def test_the_share_on_the_copied_token_is_the_whole_and_on_others_nothing(planted):
    live, second = planted
    b = int(torch.bincount(second, minlength=V).argmax())
    [record] = downstream(live, [b])
    assert record.n >= 30
    own, other = (record.share("total", record.next_is(token)) for token in (b, b % (V - 1) + 1))
    for part, value in ((own, 1.0), (other, 0.0)):
        for share in (part.positive, part.net):
            assert share.value == pytest.approx(value, abs=1e-12)
            assert share.low is None  # all documents are alike
            assert "not all alike" in share.missing
            assert share.null.value == value
    [misled] = downstream(live, [V + b])  # "the current token is b", which never comes next: ablating it only helps
    share = misled.share("total", misled.next_is(b))
    assert share.positive.value is None
    assert "nothing to take a share of" in share.positive.missing
    assert share.net.value == 0


def test_an_induction_features_top_logit_is_the_token_it_copies(planted):
    live, second = planted
    b = int(torch.bincount(second, minlength=V).argmax())
    effect = logit_effect(live.index, b)
    assert effect.top[0] == (b, pytest.approx(1 - 1 / V))
    assert effect.copied
    assert effect.top_source == b
    assert effect.prominence == pytest.approx((V - 1) ** 0.5)
    dead = logit_effect(live.index, 2 * V) if live.index.feature(2 * V).n_active == 0 else None
    assert dead is None or (dead.top_source, dead.copied) == (None, None)


# ----------------------------------------------------------------------------------------------------- TransformerLens
@judged_by("transformer_lens")
def test_each_path_is_what_transformerlens_hooks_compute(tmp_path):
    model, sae = load_model(str(TINY)), load_sae("tiny-z1")
    tokens = random_tokens(model, (4, 40))
    f = sae.encode(model.read(tokens, [sae.site])[sae.site])
    active = f[:, :-1].nonzero()
    block, query, latent = active[:: len(active) // 25].unbind(1)
    activation, directions = f[block, query, latent], sae.W_dec @ model.W_O(1)
    write = -activation[:, None] * directions[latent]
    arrays = {"tokens": tokens, "block": block, "query": query, "write": write}
    np.savez(tmp_path / "case.npz", **{name: value.numpy() for name, value in arrays.items()})
    run_judge("transformer_lens_paths.py", TINY, tmp_path / "case.npz", tmp_path / "out.npz")
    judged = {name: torch.from_numpy(value).float() for name, value in np.load(tmp_path / "out.npz").items()}
    run = BaselineRun(model, 1, tokens, {}, frozen=False)
    ours = run.changes(block, query, write)
    for path, theirs in (("total", "total"), ("direct", "direct"), ("mlp.1", "mlp")):
        assert judged[theirs].abs().max() > 0.01
        assert_same_scale(ours[path], judged[theirs], 1e-4)
    residual = model.read(tokens, [Site("resid_post", 1)])[Site("resid_post", 1)][block, query]
    pairs = Pairs(torch.arange(len(block)), latent, activation)
    closed = direct_loss_changes(model, directions, residual, tokens[block, query + 1], pairs)
    assert_same_scale(closed, judged["direct"], 1e-4)
