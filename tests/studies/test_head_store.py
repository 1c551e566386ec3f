"""What `families` and `heads` keep beside an index: the planted answers as records, and no member where none is."""

from dataclasses import replace

import numpy as np
import pytest

from columns_index import D_SAE, built
from headscope import jobs
from headscope.errors import IndexFormatError
from headscope.index.head_records import HeadTables
from headscope.index.head_table import SCHEMAS
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.site import Site
from headscope.studies.heads.ablation import head_effects
from headscope.studies.support.replacement import Replacement
from induction_index import planted_live
from planted import V


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_live(tmp_path_factory.mktemp("store") / "index", 120)


@pytest.fixture(scope="module")
def found(planted):
    """Both commands, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headscope.jobs.studies.live", lambda *_args, **_named: planted)
        seen = []
        family = jobs.study("families", planted.index.folder, on_progress=lambda stage, *_: seen.append(stage))
        tables = jobs.study(
            "heads", planted.index.folder, n_shuffles=3, on_progress=lambda stage, *_: seen.append(stage)
        )
    return family, tables, set(seen)


def test_every_table_is_there_and_progress_was_told(found):
    family, tables, stages = found
    assert set(tables.tables) == set(SCHEMAS)
    assert {"sources", "corruption", "roles", "mean of z", "ablation", "firing", "catalogue"} <= stages
    assert any("1.0" in line for line in family.lines())
    assert any(line.startswith("several heads") for line in tables.lines())
    assert tables.provenance("scores")["settings"]["n_shuffles"] == 3


def test_the_family_is_that_of_the_planted_head(planted, found):
    family, tables, _ = found
    verdict = planted.index.columns("induction")["verdict"].to_pylist()
    members = [latent for latent, yes in enumerate(verdict) if yes]
    assert members == family.judged.found.tolist()
    assert members
    assert max(members) < V  # those of L1H0
    assert family.head == 0
    (rule,) = tables.rules()
    assert (rule.head, rule.n_true) == (0, len(members))
    assert tables.measures("induction")["induction features"].value == family.judged.share().value


def test_records_are_what_the_studies_say(planted, found):
    _, tables, _ = found
    assert (tables.score(0, 0).layer, len(tables.scores)) == (0, 4)
    scores = {of.role: of for of in tables.score(0, 0).scores}
    assert scores["previous_token"].value == pytest.approx(1.0)
    assert scores["previous_token"].p == 0.25  # the first of 1 + 3: no role at 1 %
    assert tables.score(0, 0).roles == ()
    assert len(tables.score(1, 0).prefix.attention) == len(tables.score(1, 0).prefix.null)
    effects = head_effects(planted, Replacement.of(planted, "zero"))
    matrix = tables.ablation_matrix("zero", "off")
    live = effects.n_active > 0
    np.testing.assert_allclose(matrix[live], effects.fraction_off[live])
    assert np.isnan(matrix[~live]).all()
    (zero,) = (own for own in tables.ablation(5) if own.kind == "zero")
    assert zero.off == (1.0, 0.0)  # token 5 by induction is made by head 0 alone
    off = {(of.kind, of.rule, of.family): of.off for of in tables.turned_off(0)}
    assert off["zero", "every token", "induction"].n > 0
    assert tables.ablated(0).family == "induction"
    assert not set(tables.ablated(0).by_dfa) & set(np.flatnonzero(planted.index.columns("induction")["verdict"]))
    card = tables.card(1)
    assert card.clusters
    assert sum(own.share for own in card.clusters) == pytest.approx(1.0)


def test_columns_by_latent(planted, found):
    assert found
    columns = planted.index.columns("heads")
    assert columns["top_dfa"][V + 5].as_py() == pytest.approx(1.0)
    assert columns["participation_dfa"][V + 5].as_py() == pytest.approx(1.0)


def test_a_family_without_a_member_and_other_weights(random_model, random_corpus, random_sae, tmp_path, monkeypatch):
    index = built(random_model, random_corpus, random_sae, tmp_path / "index")
    model = random_model("gpt_neox")
    live = LiveIndex(FeatureIndex.open(index), model, random_sae(model, D_SAE))
    monkeypatch.setattr("headscope.jobs.studies.live", lambda *_args, **_named: live)
    family = jobs.study("families", index)
    assert family.head is None
    assert "none: no feature passes all tests" in family.lines()[-1]
    assert HeadTables(index).rules() == ()
    with pytest.raises(IndexFormatError, match="'elsewhere'"):
        HeadTables(index).measures("elsewhere")
    with pytest.raises(IndexFormatError, match="model sha256"):
        LiveIndex(FeatureIndex.open(index), random_model("gpt_neox", seed=1), random_sae(model, D_SAE))
    other_layer = replace(random_sae(model, D_SAE), site=Site("z", 0))
    with pytest.raises(IndexFormatError, match=r"blocks\.0\.attn\.hook_z"):
        LiveIndex(FeatureIndex.open(index), model, other_layer)
