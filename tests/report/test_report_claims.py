"""Claims M16 to M32: on a planted model the planted answers, on random weights nothing, and never an exception."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.report import (
    claims_ablation,
    claims_families,
    claims_heads,
    claims_patching,
    claims_upstream,
    induction_family,
)
from headscope.report.records import KINDS, QUICK, Claim, Exemplar
from headscope.report.subject import Subject
from induction_index import planted_live
from planted import V
from planted_circuit import circuit_model, circuit_sae

SECTIONS = (
    *claims_upstream.SECTIONS,
    *claims_heads.SECTIONS,
    *claims_patching.SECTIONS,
    *claims_families.SECTIONS,
    *claims_ablation.SECTIONS,
)
BY_NAME = {study.name: study for study in SECTIONS}


def claims(subject, name):
    """Claims of a study by their words; an exemplar's also by its kind."""
    found = [part for part in BY_NAME[name].run(subject) if isinstance(part, Claim)]
    return {(part.kind, part.claim) if part.kind else part.claim: part for part in found}


def exemplar(kind, latent, token, sources):
    return Exemplar(kind, latent, "made up", 0.9, token, tuple(sources), "by the test")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    live = planted_live(tmp_path_factory.mktemp("claims") / "index", 1000, circuit_model(), circuit_sae())
    features = live.index.table()["n_active"].to_numpy()
    b = 1 + int(features[1:V].argmax())
    settings = replace(QUICK, prompts=12, sequences=1000)
    return Subject("planted", live, (exemplar("induction", b, b, [b]),), settings)


@pytest.fixture(scope="module")
def random(random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model("gpt2", vocab_size=20)
    folder = tmp_path_factory.mktemp("claims") / "index"
    sae = random_sae(model, 100)
    build_index(model, [(sae, SAERecord("random", "none"))], random_corpus(model, 150, 48), folder)
    live = LiveIndex(FeatureIndex.open(folder), model, sae)
    busiest = np.argsort(-live.index.table()["n_active"].to_numpy())
    named = tuple(exemplar(kind, int(busiest[20 + i]), 3, [3, 4]) for i, kind in enumerate(KINDS))
    return Subject("random", live, named, replace(QUICK, prompts=4))


@pytest.mark.slow
def test_every_row_has_a_number_or_a_reason_and_an_id_of_its_study(planted, random):
    for subject in (planted, random):
        for study in SECTIONS:
            found = [part for part in study.run(subject) if isinstance(part, Claim)]
            assert {claim.id for claim in found} == set(study.ids)
            assert all((claim.ours is None) == (claim.missing is not None) for claim in found)
            keys = [(claim.id, claim.claim, claim.kind) for claim in found]
            assert len(keys) == len(set(keys))


# -------------------------------------------------------------------------------------------------------------- planted
def test_the_planted_feature_is_made_by_its_head_from_its_token(planted):
    heads = claims(planted, "shares_by_head")
    assert_allclose(heads["induction", "share of variance of the top head"].ours, 1)
    assert "head 1.0" in heads["induction", "share of variance of the top head"].differs
    assert_allclose(heads["induction", "heads that make the feature: effective number"].ours, 1)
    assert heads["local context", "share of variance of the top head"].ours is None
    sources = claims(planted, "sources")
    whole = "share of variance of all heads from the feature's source tokens, heads summed before squaring"
    assert_allclose(sources["induction", whole].ours, 1)
    attention = sources["induction", "attention of the top head to the feature's source tokens where it is active"]
    assert_allclose(attention.ours, 1, atol=1e-6)
    assert attention.null < 0.2
    table = claims(planted, "static_table")
    words = "tokens that would raise the feature more than its source tokens do, read alone through its top head"
    assert table["induction", words].ours == 0


def test_the_planted_heads_have_their_roles(planted):
    found = claims(planted, "head_scores")
    score = found["induction score of the best head of the layer"]
    assert score.ours > 0.5 > score.null
    assert "head 1.0" in score.differs
    assert found["induction heads in the layer"].ours == 1
    previous = found["previous-token score of the best head before the layer"]
    assert_allclose(previous.ours, 1, atol=1e-6)
    assert "head 0.0" in previous.differs
    assert found["previous-token heads before the layer"].ours == 1
    one = found["attention of the best induction head at a prefix of one token"]
    assert_allclose(one.ours, 1, atol=1e-6)
    assert_allclose(one.null, 0, atol=1e-6)


def test_the_planted_previous_token_head_is_necessary_and_sufficient(planted):
    found = claims(planted, "head_patching")
    assert found["induction", "prompts in which replacing the first A turns the feature off"].ours == 1
    assert found["induction", "prompts in which replacing the first A turns the feature off"].null == 0
    head = "the best previous-token head at B"
    for name in ("pre-activation", "activation"):
        left = found["induction", f"what is left of the feature without {head}, by the {name}"]
        back = found["induction", f"what is brought back of the feature by {head}, by the {name}"]
        assert_allclose([left.ours, left.null], [0, 1], atol=1e-6)
        assert_allclose([back.ours, back.null], [1, 0], atol=1e-6)
    first = found["induction", "prompts in which the best previous-token head matters most of all earlier heads"]
    assert first.ours == 1 > first.null


def test_the_planted_family_is_found_by_both_rules(planted):
    selection = claims(planted, "selection")
    share = selection["features selected by their share in the induction head: decoder"]
    live = int((planted.index.table()["n_active"].to_numpy() > 0).sum())
    assert_allclose(share.ours * live, V)  # with that of the BOS, on which the head rests
    behaviour = claims(planted, "behaviour")
    assert_allclose(behaviour["selected features that behave like induction"].ours, (V - 1) / V)
    assert behaviour["control features that behave like induction"].ours == 0
    composite = claims(planted, "composite")
    judged = induction_family.composite(planted)
    seen = judged.latents[judged.behaviour.n_expected() >= judged.criteria.least]
    members = seen[(seen > 0) & (seen < V)]  # those of a B that is seen often enough
    assert len(members) > 5
    assert_array_equal(judged.found, members)
    assert composite["induction features by the composite rule: how many"].ours == len(members)
    assert composite["induction features by the composite rule, no head named"].null == 0
    assert composite["induction features made by the induction head"].ours == 1
    assert composite["induction features by the composite rule that are selected"].ours == 1
    off = composite["features that behave, source and copy like induction: share off when the first A is replaced"]
    assert (off.ours, off.null) == (1, 0)


def test_ablating_the_planted_head_turns_the_family_off_and_no_other_does(planted, monkeypatch):
    monkeypatch.setattr(claims_ablation, "_LOSS_BLOCKS", 1000)  # each has one active token of one feature
    found = claims(planted, "head_ablation")
    for words in (
        "induction features that fire nowhere with the induction head ablated",
        "induction features turned off by ablating the induction head: every token",
        "induction features turned off by ablating the induction head: most activation",
    ):
        assert (found[words].ours, found[words].null) == (1, 0)
    kept = found["activation that induction features keep with the induction head ablated"]
    assert_allclose([kept.ours, kept.null], [0, 1], atol=1e-6)
    assert found["control features turned off by ablating the induction head: most tokens"].ours == 0
    losses = claims(planted, "loss_table")
    hurt = losses["induction features: loss added where they are active by ablating the induction head"]
    spared = losses["induction features: loss added where they are active by ablating a control head"]
    assert hurt.ours > 0.1
    assert hurt.ours > hurt.null
    assert hurt.ours > spared.ours


@pytest.mark.slow
# --------------------------------------------------------------------------------------------------------------- random
def test_random_weights_have_no_induction_nor_copying_nor_roles(random):
    scores = claims(random, "head_scores")
    assert scores["induction heads in the layer"].ours == 0
    assert scores["previous-token heads before the layer"].ours == 0
    composite = claims(random, "composite")
    assert composite["induction features by the composite rule: how many"].ours == 0
    table = claims(random, "static_table")
    copying = table["features that copy: their top logit token raises them most through their top head"]
    assert copying.interval[0] <= copying.null + 0.05
    for name in ("selection", "behaviour", "head_ablation", "loss_table"):
        for claim in claims(random, name).values():
            assert claim.ours is None
            assert "no induction head" in claim.missing
    patching = claims(random, "head_patching")
    words = "what is left of the feature without the best previous-token head at B, by the activation"
    assert patching["induction", words].ours is None


def test_a_model_of_one_layer_has_rows_with_reasons(random_model, random_corpus, random_sae, tmp_path):
    model = random_model("gpt2", n_layers=1)
    sae = random_sae(model, 40)
    build_index(model, [(sae, SAERecord("random", "none"))], random_corpus(model, 40, 32), tmp_path / "i")
    live = LiveIndex(FeatureIndex.open(tmp_path / "i"), model, sae)
    latent = int(live.index.table()["n_active"].to_numpy().argmax())
    named = tuple(exemplar(kind, latent, 3, [3, 4]) for kind in KINDS)
    subject = Subject("one layer", live, named, replace(QUICK, prompts=4))
    for name in ("head_patching", "components"):
        found = claims(subject, name)
        assert all(claim.ours is None and "first layer" in claim.missing for claim in found.values())
    previous = claims(subject, "head_scores")["previous-token score of the best head before the layer"]
    assert "no layer before" in previous.missing


def test_without_an_upstream_sae_the_rows_say_so(random):
    for claim in claims(random, "upstream_features").values():
        assert "no SAE of an earlier component" in claim.missing
        assert "--upstream" in claim.missing
