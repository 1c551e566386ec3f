"""Attention-only models: what has no MLP in it is refused by name, and everything else is as in any model."""

import pytest
import torch
from torch.testing import assert_close

from headscope.cli import main
from headscope.decomposition import Upstream
from headscope.errors import ModelError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.interventions import at, constant
from headscope.models.load import load_model
from headscope.sae.formats import save_sae
from headscope.site import KINDS, Site
from headscope.studies.what.ablation import downstream
from headscope.studies.what.paths import path_names
from tl_files import configuration, write_checkpoint

LACKS = ("resid_mid", "mlp_in", "ln2_scale", "mlp_out")
HAS = "resid_pre, ln1_scale, q, k, v, scores, pattern, z, attn_out, resid_post, ln_final_scale"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("m") / "checkpoint", tokenizer, config=configuration("attn_only"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder))


def tokens_of(model):
    return torch.randint(0, model.spec.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


def test_the_sites_it_has_are_listed_and_read(model):
    assert model.spec.attention_only
    assert HAS.split(", ") == [kind for kind in KINDS if kind not in LACKS] == list(model.spec.kinds)
    found = model.read(tokens_of(model), [Site(kind, 1) for kind in model.spec.kinds])
    assert_close(found[Site("resid_post", 1)], found[Site("resid_pre", 1)] + found[Site("attn_out", 1)])


@pytest.mark.parametrize("kind", LACKS)
def test_sites_around_an_mlp_are_refused_with_those_it_has(model, kind):
    message = rf"{kind} of .*no MLPs[\s\S]*one of its sites: {HAS}[\s\S]*attn_out or resid_post"
    with pytest.raises(ModelError, match=message):
        model.read(tokens_of(model), [Site(kind, 1)])
    with pytest.raises(ModelError, match=message), model.edit({Site(kind, 0): at(constant(torch.zeros(16)))}):
        pass


def test_it_has_no_mlp_to_run(model):
    with pytest.raises(ModelError, match="no MLPs"):
        model.mlp(0, torch.zeros(2, 16))


@pytest.mark.parametrize(
    ("command", "kind"),
    [*((command, kind) for command in ("eval", "index") for kind in ("mlp_out", "resid_mid")), ("train", "mlp_out")],
)
def test_so_do_the_commands(model, folder, random_sae, tmp_path, capsys, command, kind):
    text = tmp_path / "text.txt"
    text.write_text("some words of text " * 40)
    choice = ["--model", folder, "--corpus", text, "--split", "all", "--block-size", "16"]
    if command == "train":
        own = ["--site", kind, "--layer", 1, "--out", tmp_path / "out"]
        choice = [*choice[:4], *choice[6:]]
    else:
        own = ["--sae", save_sae(random_sae(model, site=Site(kind, 1)), tmp_path / "sae")]
        own += ["--out", tmp_path / "out"] if command == "index" else []
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in (command, *own, *choice)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    if command == "index":  # an index is of z alone
        assert "expected: " in said
        return
    assert "no MLPs" in said
    assert "attn_out, resid_post" in " ".join(said.split())


def test_its_stream_is_taken_apart_without_mlps(model, random_sae):
    stream = Upstream(model, 1).run(tokens_of(model))
    parts = stream.parts()
    assert "mlp" not in {part.kind for part in parts}
    total = torch.stack([stream.vector(part) for part in parts]).sum(0)
    site = Site("resid_pre", 1)
    assert_close(total, model.read(tokens_of(model), [site])[site], rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="no MLPs"):
        Upstream(model, 1, [random_sae(model, site=Site("mlp_out", 0))])


def test_no_path_leads_through_an_mlp(model):
    assert path_names(model.spec, 0) == ("total", "direct", "attn.1")
    assert path_names(model.spec, 1) == ("total", "direct")


def test_in_the_last_layer_an_ablation_is_seen_by_the_direct_path_alone(model, random_sae, random_corpus, tmp_path):
    sae = random_sae(model)
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], random_corpus(model), tmp_path / "index")
    live = LiveIndex(FeatureIndex.open(tmp_path / "index"), model, sae)
    latent = int(live.index.table()["n_active"].to_numpy().argmax())
    (found,) = downstream(live, [latent])
    assert found.n > 5
    assert_close(found.paths["total"].change, found.paths["direct"].change)
    assert abs(found.paths["total"].change).max() > 1e-4
    assert "no MLPs" in " ".join(found.notes)
