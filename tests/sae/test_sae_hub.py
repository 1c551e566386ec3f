"""SAEs by name: releases of a registry and repositories, from a cache made here; the network is never asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from torch.testing import assert_close

from headscope.errors import SAEError
from headscope.models.hf import Model
from headscope.sae.formats import hub, is_sae, load_sae, locate, sae_hash, save_sae
from headscope.sae.formats.hub import entry_of
from headscope.sae.model import SAE
from headscope.site import Site
from judging import needs
from sae_files import write_authors, write_dictionary_learning, write_gemma_scope, write_sparsify

RandomSAE = Callable[..., SAE]
KK = "gpt2-small-hook-z-kk/blocks.5.hook_z"
REGISTRY = {
    "our-release": {
        "repo_id": "us/saes",
        "model": "gpt2-small",
        "conversion_func": None,
        "config_overrides": {"dataset_path": "prose", "device": "cuda"},
        "saes": [
            {"id": "layer 1", "path": "z/one"},
            {"id": "scaled", "path": "z/scaled", "norm_scaling_factor": 1.7},
        ],
    },
    "theirs": {"repo_id": "them/saes", "conversion_func": "goodfire", "saes": [{"id": "a", "path": "a"}]},
}


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_registry", lambda: REGISTRY)


def repository(cache: Path, name: str) -> Path:
    """The folder of a downloaded repository's files."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("0" * 40)
    return root / "snapshots" / ("0" * 40)


def test_a_folder_of_a_repository(model: Model, random_sae: RandomSAE, cache: Path) -> None:
    sae = random_sae(model)
    folder = save_sae(sae, repository(cache, "us/saes") / "z" / "one")
    assert_close(load_sae("us/saes/z/one").W_enc, sae.W_enc)
    assert is_sae("us/saes/z/one")
    assert sae_hash("us/saes/z/one") == sae_hash(folder)
    assert not locate("us/saes/z/one").own


def test_files_of_other_formats_in_repositories(model: Model, random_sae: RandomSAE, cache: Path) -> None:
    jumprelu = random_sae(model, activation="jumprelu", apply_b_dec_to_input=False)
    write_gemma_scope(jumprelu, repository(cache, "google/gemma-scope-2b-pt-att").parent / "made")
    made = repository(cache, "google/gemma-scope-2b-pt-att").parent / "made" / "gemma-scope-2b-pt-att"
    made.rename(repository(cache, "google/gemma-scope-2b-pt-att"))
    loaded = load_sae("google/gemma-scope-2b-pt-att/layer_1/width_16k/average_l0_85")
    assert (loaded.site, loaded.model_name) == (Site("z", 1), "google/gemma-2-2b")
    write_dictionary_learning(random_sae(model), repository(cache, "us/dictionaries") / "a" / "b")
    assert load_sae("us/dictionaries/a/b").site == Site("z", 1)
    write_sparsify(random_sae(model, activation="topk", site=Site("mlp_out", 0)), repository(cache, "us/sparse"))
    assert load_sae("us/sparse/layers.0.mlp").model_name == model.spec.name


def test_an_sae_of_a_release(model: Model, random_sae: RandomSAE, cache: Path, registry: None) -> None:
    save_sae(random_sae(model), repository(cache, "us/saes") / "z" / "one")
    loaded = load_sae("our-release/layer 1")
    assert loaded.metadata["dataset_path"] == "prose"
    assert "device" not in loaded.metadata


def test_the_scaling_of_a_release_is_folded(model: Model, random_sae: RandomSAE, cache: Path, registry: None) -> None:
    sae = random_sae(model)
    folder = save_sae(sae, repository(cache, "us/saes") / "z" / "scaled")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "expected_average_only_in"}))
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0))
    loaded = load_sae("our-release/scaled")
    assert_close(loaded.encode(x), sae.encode(1.7 * x), rtol=1e-5, atol=1e-5)
    assert_close(loaded(x), sae(1.7 * x) / 1.7, rtol=1e-5, atol=1e-5)
    with pytest.raises(SAEError, match=r"no scaling factor[\s\S]*name the SAE by its release"):
        load_sae("us/saes/z/scaled")


def test_names_that_a_registry_does_not_have(registry: None) -> None:
    with pytest.raises(SAEError, match=r"no SAE 'layer 9' in the release our-release[\s\S]*layer 1, scaled"):
        load_sae("our-release/layer 9")
    with pytest.raises(SAEError, match=r"whose files SAELens reads by 'goodfire'[\s\S]*load it with SAELens, save it"):
        load_sae("theirs/a")
    with pytest.raises(SAEError, match="no SAE at 'no-release/a'"):
        load_sae("no-release/a")


@needs("sae_lens")
def test_the_posts_gpt2_saes_by_their_release(model: Model, random_sae: RandomSAE, cache: Path) -> None:
    entry = entry_of(KK)
    assert entry is not None
    assert (entry.repository, entry.model) == ("ckkissane/attn-saes-gpt2-small-all-layers", "gpt2-small")
    assert entry.path.startswith("gpt2-small_L5_Hcat_z_")
    assert entry.path.endswith(".pt")
    sae = random_sae(model)
    files = repository(cache, entry.repository)
    written = write_authors(sae, files, layer=1)
    written.rename(files / entry.path)
    written.with_name(f"{written.stem}_cfg.json").rename(files / f"{entry.path.removesuffix('.pt')}_cfg.json")
    loaded = load_sae(KK)
    assert loaded.processed
    assert_close(loaded.W_dec, sae.W_dec)


@needs("sae_lens")
@pytest.mark.parametrize(
    ("name", "repository", "path"),
    [
        ("gemma-scope-2b-pt-att-canonical/layer_3/width_16k/canonical", "google/gemma-scope-2b-pt-att", "layer_3/"),
        ("gpt2-small-attn-out-v5-32k/blocks.2.hook_attn_out", "jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs", "v5_32k"),
    ],
)
def test_other_attention_releases_of_the_registry(name: str, repository: str, path: str) -> None:
    entry = entry_of(name)
    assert entry is not None
    assert entry.repository == repository
    assert entry.path.startswith(path)


# ---------------------------------------------------------------------------------------------------- what goes wrong
def test_without_a_network_it_says_how_to_bring_the_files(cache: Path) -> None:
    for name in ("them/saes/z/one", "them/saes/a.pt"):
        with pytest.raises(
            SAEError, match=r"the hub cannot be reached[\s\S]*do: where there is a network, run: hf down"
        ):
            load_sae(name)


def test_a_mistyped_path_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SAEError, match="no SAE at 'runs/mine/sae'"):
        load_sae("runs/mine/sae")
    assert not is_sae("runs/mine/sae")


def raising(error: Exception) -> Callable[..., Any]:
    def attempt(*_: object, **__: object) -> None:
        raise error

    return attempt


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/google/x"))


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (GatedRepoError("gated", response=RESPONSE), r"asks for a login[\s\S]*accept the terms at .*hf auth login"),
        (RepositoryNotFoundError("none", response=RESPONSE), r"no such repository[\s\S]*hf auth login"),
        (RemoteEntryNotFoundError("none", response=RESPONSE), r"no z/one in the repository"),
        (ConnectionError("no route"), r"the hub cannot be reached"),
        (httpx.ConnectError("no route"), r"the hub cannot be reached"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, error: Exception, match: str) -> None:
    monkeypatch.setattr(hub, "snapshot_download", raising(error))
    with pytest.raises(SAEError, match=match):
        load_sae("google/x/z/one")


def test_a_repository_of_which_other_files_are_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(SAEError, match=r"z/one of google/x is not in the cache, and is not [\s\S]*hf download"):
        load_sae("google/x/z/one")


@pytest.mark.network
def test_the_posts_gelu_2l_sae() -> None:
    name = "gelu-2l_L1_Hcat_z_lr1.00e-03_l12.00e+00_ds16384_bs4096_dc1.00e-07_rie50000_nr4_v78.pt"
    sae = load_sae(f"ckkissane/tinystories-1M-SAES/concat-z-gelu-21-l1-lr-sweep-3/{name}")
    assert (sae.d_in, sae.d_sae, sae.site, sae.model_name) == (512, 16_384, Site("z", 1), "gelu-2l")
    assert sae.processed


@pytest.mark.network
@pytest.mark.parametrize(("name", "layer"), [("gelu-2l_L0_16384_mlp_out_51", 0), ("gelu-2l_L1_16384_mlp_out_50", 1)])
def test_the_mlp_out_saes_of_gelu_2l(name: str, layer: int) -> None:
    sae = load_sae(f"NeelNanda/sparse_autoencoder/{name}.pt")
    assert (sae.d_in, sae.d_sae, sae.site) == (512, 16_384, Site("mlp_out", layer))
