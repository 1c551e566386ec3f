"""Head ablation: what is read off the index is what edited runs do, for every kind of ablation."""

from typing import get_args

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from headscope.attribution import HeadWeights
from headscope.errors import StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.interventions import at, replace
from headscope.site import Site
from headscope.studies.heads.ablation import (
    OffRule,
    firing_under_ablation,
    head_effects,
    loss_table,
    other_features,
)
from headscope.studies.support.replacement import Replacement
from induction_index import planted_live
from planted import V

KINDS = ("mean", "position mean", "zero", "resample")
DEAD = 7


def made(random_model, random_corpus, random_sae, folder, activation):
    model = random_model("gpt2", dtype=torch.float64, n_layers=2)
    sae = random_sae(model, 20, activation)
    sae.b_enc[DEAD] = -1e4
    corpus = random_corpus(model, 30, 16)
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], corpus, folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae), corpus


@pytest.fixture(scope="module", params=["relu", "jumprelu"])
def case(request, random_model, random_corpus, random_sae, tmp_path_factory):
    return made(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("ablation") / "i", request.param)


@pytest.fixture(scope="module")
def topk(random_model, random_corpus, random_sae, tmp_path_factory):
    return made(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("ablation") / "i", "topk")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_live(tmp_path_factory.mktemp("ablation") / "i")


def of_runs(live, corpus, replacement, head):
    """f of all tokens, clean and with a head ablated, by an edited run over the whole corpus."""
    tokens = torch.from_numpy(corpus.blocks.astype(np.int64))
    site = live.sae.site
    clean = live.model.read(tokens, [site])[site]
    values = replacement.values(np.arange(len(tokens)), corpus.block_size)
    with live.model.edit({site: at(replace(values), heads=[head])}):
        ablated = live.model.read(tokens, [site])[site]
    text = corpus.offset > 0
    return (live.sae.encode(z).numpy()[text] for z in (clean, ablated))


def test_every_latent_is_read_in_turn(case):
    index = case[0].index
    latents = []
    for latent, active in index.each_latent():
        latents.append(latent)
        own = index.activations(latent)
        for name in ("position", "activation", "heads"):
            assert_array_equal(getattr(active, name), getattr(own, name))
    assert latents == list(range(20))


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_for_a_head_is_what_it_says(case, kind):
    live, corpus = case
    made_of = Replacement.of(live, kind)
    tokens = torch.from_numpy(corpus.blocks.astype(np.int64))
    z = live.model.read(tokens, [live.sae.site])[live.sae.site]
    text = torch.from_numpy(corpus.offset > 0)
    values = made_of.values(np.arange(len(tokens)), corpus.block_size)
    assert made_of.n == (0 if kind == "zero" else int(text.sum()))
    match kind:
        case "mean":
            torch.testing.assert_close(values, z[text].mean(0).expand_as(values))
        case "zero":
            torch.testing.assert_close(values, live.model.value_offset(1).expand_as(values))
        case "position mean":
            for t in range(1, corpus.block_size):
                own = z[:, t][text[:, t]].mean(0)
                torch.testing.assert_close(values[:, t], own.expand_as(values[:, t]))
            torch.testing.assert_close(values[:, 0], z[text].mean(0).expand_as(values[:, 0]))
        case "resample":
            distance = torch.cdist(values.flatten(0, 1), z[text], compute_mode="donot_use_mm_for_euclid_dist")
            assert distance.min(1).values.max() < 1e-12
            assert len(torch.unique(distance.argmin(1))) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_what_turns_off_and_on_is_that_of_edited_runs(case, kind):
    live, corpus = case
    replacement = Replacement.of(live, kind)
    effects, firing = head_effects(live, replacement), firing_under_ablation(live, replacement)
    assert effects.n_off.sum() > 100
    assert firing.n_turned_on.sum() > 100
    for head in range(4):
        clean, ablated = of_runs(live, corpus, replacement, head)
        on, still = clean > 0, ablated > 0
        assert_array_equal(effects.n_active, on.sum(0))
        found = effects.n_off[:, head]
        assert (np.abs(found - (on & ~still).sum(0)) <= effects.n_undecided[:, head]).all()
        alive = on.any(0)
        kept = (ablated * on).sum(0)[alive] / clean.sum(0)[alive]
        assert_allclose(effects.retained[alive, head], kept, rtol=1e-3, atol=1e-3)  # 14 bits of each contribution
        assert np.isnan(effects.retained[DEAD, head])
        assert_array_equal(firing.n_clean, on.sum(0))
        assert_array_equal(firing.n_ablated[:, head], still.sum(0))
        assert_array_equal(firing.n_turned_on[:, head], (still & ~on).sum(0))
        assert_allclose(firing.mass_ablated[:, head], ablated.sum(0), rtol=1e-10)
    assert effects.n_undecided.sum() <= 0.001 * effects.n_active.sum() * 4 + 2


def test_a_head_put_in_its_own_place_changes_nothing(case):
    live, _ = case
    weights = HeadWeights.of(live.sae, live.model)
    tokens = torch.from_numpy(np.stack([live.index.tokens_of(b) for b in range(live.index.n_blocks)]).astype(np.int64))
    z = live.model.read(tokens, [live.sae.site])[live.sae.site]
    rows = z.view(-1, *weights.offset.shape)
    itself = Replacement("resample", rows, len(rows), np.arange(len(rows), dtype=np.int32))
    effects = head_effects(live, itself)
    alive = effects.n_active > 0
    assert (effects.n_off <= effects.n_undecided).all()
    assert_allclose(effects.retained[alive], 1, rtol=1e-3)
    firing = firing_under_ablation(live, itself)
    assert_array_equal(firing.n_ablated, np.tile(firing.n_clean[:, None], 4))


def test_topk_is_encoded_anew_and_not_read_off_the_index(topk):
    live, corpus = topk
    replacement = Replacement.of(live)
    with pytest.raises(StudyError, match="firing_under_ablation"):
        head_effects(live, replacement)
    firing = firing_under_ablation(live, replacement)
    for head in range(4):
        clean, ablated = of_runs(live, corpus, replacement, head)
        assert_array_equal(firing.n_ablated[:, head], (ablated > 0).sum(0))
        assert_array_equal(firing.n_both[:, head], ((ablated > 0) & (clean > 0)).sum(0))


def test_rules_and_shares(case):
    effects = head_effects(case[0], Replacement.of(case[0]))
    every, most = effects.is_off("every token"), effects.is_off("most tokens")
    assert not (every & ~most).any()
    assert not every[DEAD].any()
    alive = np.flatnonzero(effects.n_active)
    measure = effects.turned_off(range(20), 2, "most tokens")
    assert (measure.n, measure.value) == (len(alive), None)
    assert "at least 30" in measure.missing
    rates = np.delete(most[alive], 2, axis=1).mean(0)
    assert_allclose([measure.null.value, measure.null.low, measure.null.high], [rates.mean(), rates.min(), rates.max()])
    often = effects.turned_off(list(range(20)) * 3, 2, "most tokens")
    assert often.n == 3 * len(alive) > 30
    assert_allclose(often.value, most[alive, 2].mean())
    assert often.low < often.value < often.high or often.value in (0, 1)


def test_the_loss_table_is_that_of_edited_runs(case):
    live, corpus = case
    replacement = Replacement.of(live)
    latents = np.argsort([-live.index.feature(j).n_active for j in range(20)])[[0, 3]].tolist()
    table = loss_table(live, [*latents, DEAD], [1, 2], replacement)
    tokens = torch.from_numpy(corpus.blocks.astype(np.int64))
    clean = live.model.losses(tokens).numpy()
    text = corpus.offset > 0
    counted = text[:, :-1] & text[:, 1:]
    f = live.sae.encode(live.model.read(tokens, [live.sae.site])[live.sae.site]).numpy()[:, :-1]
    values = replacement.values(np.arange(len(tokens)), corpus.block_size)
    counted &= ((f[..., latents] > 0).any(-1) & counted).any(1)[:, None]  # the blocks that are read
    for row in table.rows[:2]:
        on = (f[..., row.latent] > 0) & counted
        assert row.n == on.sum()
        assert_allclose(row.clean.value, clean[on].mean(), rtol=1e-10)
        for head in (1, 2):
            with live.model.edit({Site("z", 1): at(replace(values), heads=[head])}):
                change = live.model.losses(tokens).numpy() - clean
            assert_allclose(row.change[head].value, change[on].mean(), rtol=1e-8)
            assert_allclose(row.change[head].null.value, change[counted].mean(), rtol=1e-8)
            assert row.change[head].null.low < row.change[head].null.high
    assert table.n_tokens == counted.sum()
    assert (table.rows[2].n, table.rows[2].clean.value) == (0, None)


def test_other_features_are_ranked_and_not_of_the_family(case):
    live, _ = case
    firing = firing_under_ablation(live, Replacement.of(live))
    mass = np.stack([np.maximum(a.heads, 0).sum(0) for _, a in live.index.each_latent()])
    family = np.zeros(20, bool)
    family[[0, 3]] = True
    found = other_features(firing, mass, family, 1, 5)
    for latents, score in (
        (found.firing, firing.n_ablated[:, 1]),
        (found.by_dfa, mass[:, 1]),
        (found.lost, firing.n_clean - firing.n_both[:, 1]),
    ):
        assert len(latents) == 5
        assert not set(latents) & {0, 3, DEAD}
        assert score[latents].tolist() == sorted(score[~family], reverse=True)[:5]


def test_the_planted_head_turns_off_all_that_is_planted_in_it(planted):
    replacement = Replacement.of(planted)
    effects, firing = head_effects(planted, replacement), firing_under_ablation(planted, replacement)
    induced, own = np.arange(1, V), np.arange(V + 1, 2 * V)
    for rule in get_args(OffRule):
        off = effects.is_off(rule)
        assert_array_equal(off[induced], np.tile([True, False], (V - 1, 1)))
        assert_array_equal(off[own], np.tile([False, True], (V - 1, 1)))
    twice = effects.turned_off(np.tile(induced, 2), 0, "every token")
    assert (twice.value, twice.null.value) == (1.0, 0.0)
    assert_allclose(effects.retained[induced, 1], 1)
    assert not firing.n_turned_on[1:V].any()
    assert firing.silenced(np.tile(induced, 2), 0).value == 1


def test_what_is_not_there_is_named(case, no_type_checks):
    live, _ = case
    with pytest.raises(StudyError, match="position mean"):
        Replacement.of(live, "median")
    replacement = Replacement.of(live)
    with pytest.raises(StudyError, match="head 4"):
        loss_table(live, [0], [4], replacement)
    with pytest.raises(StudyError, match=r"\[20\]"):
        loss_table(live, [20], [0], replacement)
    effects = head_effects(live, replacement)
    with pytest.raises(StudyError, match="every token"):
        effects.is_off("none")
    with pytest.raises(StudyError, match="head -1"):
        effects.turned_off([0], -1, "every token")
    with pytest.raises(StudyError, match="no latents"):
        effects.turned_off([], 0, "every token")
