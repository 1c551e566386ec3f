"""The whole dictionary's direct effects: exact, whatever the work is cut into, and honest about what is missing."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from headscope import cli
from headscope.errors import StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.columns import read_columns
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.sae.formats import save_sae
from headscope.site import Site
from headscope.studies.what import direct_path, effects
from headscope.studies.what.ablation import downstream
from headscope.studies.what.effects import DEFINITIONS, direct_effects, write_effects

D_SAE = 20
DEAD, RARE = 7, 11
NUMBERS = [name for name in DEFINITIONS if name not in ("n", "sampled", "top_token")]


@pytest.fixture(scope="module", params=["gpt_neox 1", "gpt_neox 0", "parallel 1"])
def live(request, random_model, random_corpus, random_sae, tmp_path_factory):
    family, layer = request.param.split()
    model = random_model("gpt_neox", dtype=torch.float64, use_parallel_residual=family == "parallel")
    sae = random_sae(model, D_SAE, site=Site("z", int(layer)))
    sae.b_enc[DEAD] = -1e4
    sae.b_enc[RARE] = -1.9
    folder = tmp_path_factory.mktemp("effects") / "index"
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], random_corpus(model, 40, 16), folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


@pytest.fixture(scope="module")
def found(live):
    return direct_effects(live)


@pytest.fixture(scope="module")
def records(live):
    """The same by rows through the model's own norm and unembedding."""
    return downstream(live, range(D_SAE), where="one")


def test_means_and_sums_are_those_of_every_active_token(live, found, records):
    n_tokens = live.index.manifest["corpus"]["n_tokens"]
    assert found.most is None
    assert found.n.tolist() == found.sampled.tolist() == [record.n for record in records]
    assert found.n_pairs == found.n.sum()
    assert 0 < found.n[RARE] < 30 < found.n.max()
    for j, record in enumerate(records):
        change = record.paths["direct"].change  # activations in the index are float32
        own = {name: found.values[name][j] for name in NUMBERS}
        if not record.n:
            assert np.isnan(list(own.values())).all()
            continue
        assert_allclose(own["mean"], change.mean(), atol=1e-6)
        assert_allclose(own["total"], change.sum(), atol=1e-5)
        assert_allclose(own["importance"], change.sum() / n_tokens, atol=1e-7)
        assert_allclose(own["increase"], change.clip(min=0).sum(), atol=1e-5)
        assert found.top_token[j] == live.index.feature(j).logit_top[0][0]


def test_shares_are_those_of_the_record(live, found, records):
    shares = 0
    for j, record in enumerate(records):
        own = {name: found.values[name][j] for name in NUMBERS}
        expected = record.share("direct", record.next_is(int(found.top_token[j])))
        assert (own["top_share"] == own["top_share"]) == (record.n >= 30)
        if record.n >= 30:
            assert_allclose(own["top_share"], expected.positive.value, atol=1e-5)
            assert_allclose(own["top_share_net"], expected.net.value, rtol=1e-4, atol=1e-4)
            assert_allclose(own["top_rate"], expected.positive.null.value, atol=1e-12)
            shares += own["top_share"] > 0
    assert shares > 3


def test_intervals_hold_their_value_and_are_those_of_a_plain_bootstrap(live, found, records):
    j = int(found.n.argmax())
    own = {name: found.values[name][j] for name in NUMBERS}
    assert own["mean_low"] < own["mean"] < own["mean_high"]
    change, document = records[j].paths["direct"].change, records[j].document
    by_document = {d: change[document == d] for d in np.unique(document)}
    rng, means = np.random.default_rng(1), []
    names = np.arange(len(live.index.documents))
    for _ in range(2000):
        drawn = [by_document[d] for d in rng.choice(names, len(names)) if d in by_document]
        means.append(np.concatenate(drawn).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    width = high - low
    assert_allclose([own["mean_low"], own["mean_high"]], [low, high], atol=0.15 * width)


def test_any_cut_of_the_work_gives_the_same(live, found, monkeypatch):
    monkeypatch.setattr(effects, "_PART_POSITIONS", 37)
    monkeypatch.setattr(effects, "_BATCH_TOKENS", 16)
    monkeypatch.setattr(direct_path, "_TABLE", 4_096)
    seen = []
    again = direct_effects(live, on_progress=lambda done, total: seen.append((done, total)))
    for name in NUMBERS:
        assert_allclose(again.values[name], found.values[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_sample_is_weighted_and_rare_features_are_whole(live, found):
    budget = found.n_pairs // 2
    part = direct_effects(live, max_work=float(budget * live.model.spec.d_vocab))
    assert part.most is not None
    assert part.n_pairs <= budget
    assert part.n.tolist() == found.n.tolist()
    assert part.sampled.tolist() == np.minimum(found.n, part.sampled.max()).tolist()
    assert part.sampled[RARE] == found.n[RARE]
    assert_allclose(part.values["total"], part.n * part.values["mean"])
    whole = part.sampled == part.n
    assert 0 < whole.sum() < D_SAE
    assert_allclose(part.values["mean"][whole], found.values["mean"][whole], rtol=1e-9)
    assert not np.allclose(part.values["mean"][~whole], found.values["mean"][~whole], rtol=1e-3)
    again = direct_effects(live, max_work=float(budget * live.model.spec.d_vocab))
    assert_allclose(again.values["mean"], part.values["mean"], rtol=1e-12)
    least = direct_effects(live, max_work=1.0)
    assert least.sampled.tolist() == np.minimum(found.n, 1).tolist()


def test_no_more_tokens_of_a_feature_are_looked_at_than_asked_for(live, found):
    few = direct_effects(live, max_tokens=7)
    assert few.most == 7
    assert few.sampled.tolist() == np.minimum(found.n, 7).tolist()
    assert few.n.tolist() == found.n.tolist()
    densest = int(live.index.table()["n_active"].to_numpy().max())
    assert direct_effects(live, max_tokens=densest).most is None


def test_columns_come_back_with_null_where_there_is_no_number(live, found):
    write_effects(live, found)
    table, said = read_columns(live.index.folder, "effects")
    assert table.column_names == ["latent", *DEFINITIONS]
    assert table["mean"].to_pylist()[DEAD] is None
    assert table["top_share"].to_pylist()[RARE] is None
    assert table["n"].to_pylist() == found.n.tolist()
    assert_allclose(table["mean"].to_numpy(), found.values["mean"])
    assert said["n"] == found.n_pairs
    assert said["settings"]["most"] is None
    assert "effects.importance" in live.index.table().column_names


def test_the_null_has_a_number_wherever_the_feature_has_one(live, found):
    assert (np.isnan(found.values["null_mean"]) == (found.n == 0)).all()
    alive = found.n > 0
    assert not np.allclose(found.values["null_mean"][alive], found.values["mean"][alive], rtol=0.1)


def test_the_command_adds_columns_and_refuses_other_weights(random_model, random_sae, save_model, tmp_path, capsys):
    model = random_model("gpt_neox")
    folder = save_model(model, tmp_path / "model")
    save_sae(random_sae(model, D_SAE), tmp_path / "sae")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    text = ["--corpus", str(tmp_path / "text.txt"), "--split", "all", "--block-size", "32"]
    index = tmp_path / "index"
    cli.main(["index", "--sae", str(tmp_path / "sae"), "--model", str(folder), "--out", str(index), *text])
    cli.main(["effects", str(index), "--model", str(folder)])
    assert "active tokens (all)" in capsys.readouterr().out
    opened = FeatureIndex.open(index)
    total = opened.columns("effects")["total"].to_numpy()
    assert np.isfinite(total).any()
    cli.main(["effects", str(index), "--model", str(folder), "--max-work", "4000"])
    assert "at most" in capsys.readouterr().out
    other = save_model(random_model("gpt_neox", seed=1), tmp_path / "other")
    with pytest.raises(SystemExit):
        cli.main(["effects", str(index), "--model", str(other)])
    assert "with which" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["effects", str(tmp_path / "none"), "--model", str(folder)])


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("max_work", [0.0, -5.0, np.nan, np.inf])
def test_a_limit_that_is_none_is_refused_before_anything_is_computed(max_work):
    with pytest.raises(StudyError, match="max_work = "):
        direct_effects(None, max_work=max_work)
    with pytest.raises(StudyError, match="max_tokens = 0"):
        direct_effects(None, max_tokens=0)
