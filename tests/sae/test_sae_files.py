"""The formats of other programs, by files written by hand; what is not understood is refused by name."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headscope.errors import SAEError
from headscope.models.hf import Model
from headscope.sae.formats import FORMATS, WEIGHTS, is_sae, load_sae, locate, sae_hash, save_sae
from headscope.sae.model import PROCESSED, SAE, TopK
from headscope.site import Site
from sae_files import (
    CASES,
    write_authors,
    write_dictionary_learning,
    write_gemma_scope,
    write_gemma_scope_2,
    write_sparsify,
)
from saes_table import supported

RandomSAE = Callable[..., SAE]


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox")


def refuses(path: Path, match: str, **stated: Any) -> None:
    with pytest.raises(SAEError, match=rf"(?s){match}") as caught:
        load_sae(path, **stated)
    assert caught.value.expected
    assert caught.value.do


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


# ------------------------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("name", CASES)
def test_each_format_reads_as_what_was_written(model: Model, random_sae: RandomSAE, tmp_path: Path, name: str) -> None:
    write, activation, settings = CASES[name]
    site = Site("attn_out", 0) if name == "sparsify" else Site("z", 1)
    sae = random_sae(model, activation=activation, site=site, **settings)
    path = write(sae, tmp_path / "files")
    assert is_sae(path)
    loaded = load_sae(path)
    x = torch.randn(50, sae.d_in, generator=torch.Generator().manual_seed(0))
    assert_close(loaded.encode(x), sae.encode(x), rtol=1e-6, atol=1e-6)
    assert_close(loaded(x), sae(x), rtol=1e-6, atol=1e-5)
    assert loaded.site == site
    assert loaded.apply_b_dec_to_input is sae.apply_b_dec_to_input
    assert loaded.processed == (name == "authors")
    if "gemma" not in name:
        assert loaded.model_name == sae.model_name
    assert locate(path).own
    assert sae_hash(path).startswith("sha256:")
    again = load_sae(save_sae(loaded, tmp_path / "again"))
    assert_close(again.encode(x), loaded.encode(x), rtol=1e-6, atol=1e-6)
    assert again.metadata.items() >= loaded.metadata.items()


@pytest.mark.parametrize(
    ("name", "model_name"), [("gemma-scope", "google/gemma-2-2b"), ("gemma-scope-2", "google/gemma-3-1b-pt")]
)
def test_gemma_scope_names_its_model(
    model: Model, random_sae: RandomSAE, tmp_path: Path, name: str, model_name: str
) -> None:
    write, activation, settings = CASES[name]
    assert (
        load_sae(write(random_sae(model, activation=activation, **settings), tmp_path / "a")).model_name == model_name
    )


def test_the_authors_sae_is_named_by_its_file_its_version_or_its_folder(
    model: Model, random_sae: RandomSAE, tmp_path: Path
) -> None:
    path = write_authors(random_sae(model), tmp_path)
    for name in (path, path.with_suffix(""), tmp_path):
        assert locate(name).weights == path
    assert locate(path).quality.name == "gelu-2l_L1_Hcat_z_v78_quality.json"
    path.with_name("b.pt").write_bytes(path.read_bytes())
    path.with_name("b_cfg.json").write_text("{}")
    refuses(tmp_path, r"holds 2 SAEs.*do: name one: b.pt, gelu-2l")
    assert load_sae(path).d_sae == 48


@pytest.mark.parametrize("site", [Site("mlp_out", 0), Site("resid_pre", 1), Site("attn_out", 1)])
def test_saes_of_other_sites_by_the_authors(model: Model, random_sae: RandomSAE, tmp_path: Path, site: Site) -> None:
    path = write_authors(random_sae(model, site=site), tmp_path, concat_heads=False)
    loaded = load_sae(path)
    assert (loaded.site, loaded.metadata["z_convention"]) == (site, PROCESSED)
    for absent in ("act_name", "act_size", "concat_heads"):  # as in Neel Nanda's files
        edit_json(path.with_name(f"{path.stem}_cfg.json"), **{absent: "absent"})
    assert load_sae(path).site == site


def test_weights_of_half_precision_become_float32(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_authors(random_sae(model), tmp_path)
    torch.save({name: t.bfloat16() for name, t in torch.load(path).items()}, path)
    assert load_sae(path).W_enc.dtype == torch.float32


def test_what_files_do_not_say_can_be_said(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_dictionary_learning(random_sae(model), tmp_path / "a", submodule_name="layer one, the good one")
    refuses(path, "names no site.*do: say it: headscope convert SAE --site z --layer L")
    loaded = load_sae(path, site=Site("z", 1), model_name="pythia")
    assert (loaded.site, loaded.model_name) == (Site("z", 1), "pythia")
    path = write_dictionary_learning(random_sae(model), tmp_path / "b")
    refuses(path, "names the site blocks.1.attn.hook_z.*blocks.0.attn.hook_z, as was said", site=Site("z", 0))


@pytest.mark.parametrize(
    ("name", "layer", "site"),
    [
        ("attn_out_layer_3", 3, Site("attn_out", 3)),
        ("attention_out_layer3", None, Site("attn_out", 3)),
        ("mlp_out_layer0", 0, Site("mlp_out", 0)),
        ("mlp_out", 2, Site("mlp_out", 2)),
        ("blocks.1.attn.hook_z", 1, Site("z", 1)),
    ],
)
def test_sites_that_dictionary_learning_names(
    model: Model, random_sae: RandomSAE, tmp_path: Path, name: str, layer: int | None, site: Site
) -> None:
    assert (
        load_sae(write_dictionary_learning(random_sae(model), tmp_path / "a", submodule_name=name, layer=layer)).site
        == site
    )


def test_a_gemma_scope_file_away_from_its_folders(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    sae = random_sae(model, activation="jumprelu", apply_b_dec_to_input=False)
    alone = tmp_path / "alone" / "params.npz"
    alone.parent.mkdir()
    alone.write_bytes((write_gemma_scope(sae, tmp_path / "a") / "params.npz").read_bytes())
    refuses(alone, "names no site")
    assert load_sae(alone, site=Site("z", 1)).model_name == "unknown"


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"concat_heads": False, "head": 3}, "an SAE of head 3 alone"),
        ({"site": "post"}, "site 'post'"),
        ({"act_name": "blocks.0.attn.hook_z"}, "act_name 'blocks.0.attn.hook_z'"),
        ({"act_name": "blocks.1.attn.hook_v", "site": None}, "hook name 'blocks.1.attn.hook_v'"),
        ({"dict_size": 99}, "W_enc of 32 x 48.*32 x 99"),
        ({"act_size": 64}, "W_enc of 32 x 48.*64 x 48"),
        ({"act_fn": "topk", "k": 3}, "act_fn 'topk'"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input False"),
    ],
)
def test_authors_files_that_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    refuses(write_authors(random_sae(model), tmp_path, **changes), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dict_class": "CrossCoder"}, "'CrossCoder': it reads several"),
        ({"dict_class": "MyDictionary"}, "architecture 'MyDictionary'"),
        ({"dict_class": "GatedAutoEncoder"}, "holds bias, encoder.bias beside"),
        ({"dict_size": 7}, "weights of 32 x 48.*32 x 7"),
        ({"submodule_name": "mlp_out_layer_0"}, "submodule_name 'mlp_out_layer_0'.*layer 1"),
        ({"submodule_name": "blocks.1.hook_mlp_in"}, "blocks.1.hook_mlp_in"),
    ],
)
def test_dictionary_learning_files_that_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    refuses(write_dictionary_learning(random_sae(model), tmp_path / "a", **changes), match)


def rewritten(path: Path, state: dict[str, torch.Tensor], dict_class: str | None = None, **trainer: Any) -> Path:
    """Files of dictionary_learning with other weights, and another class or entries of its configuration."""
    torch.save(state, path / "ae.pt")
    config = json.loads((path / "config.json").read_text())
    named = {} if dict_class is None else {"dict_class": dict_class}
    config["trainer"] = {k: v for k, v in (config["trainer"] | named | trainer).items() if v != "absent"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_topk_of_older_versions_of_dictionary_learning(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    sae = random_sae(model, activation="topk")
    path = write_dictionary_learning(sae, tmp_path / "topk")
    state = torch.load(path / "ae.pt")
    x = torch.randn(7, sae.d_in, generator=torch.Generator().manual_seed(0))
    for left_out in ({"threshold"}, {"threshold", "k"}, {"k"}):
        loaded = load_sae(rewritten(path, {n: t for n, t in state.items() if n not in left_out}))
        assert loaded.activation == TopK(5)
        assert_close(loaded(x), sae(x))
    old = {n: t for n, t in state.items() if n not in ("threshold", "k")}
    refuses(rewritten(path, old, k=2.5), "k = 2.5.*whole number")
    refuses(rewritten(path, old, k="absent"), "cannot read the SAE.*lacks 'k'")


def test_batchtopk_needs_its_threshold_and_not_its_k(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    sae = random_sae(model, activation="topk")
    path = write_dictionary_learning(sae, tmp_path / "batchtopk")
    state = torch.load(path / "ae.pt") | {"threshold": torch.tensor(0.25)}
    x = torch.randn(7, sae.d_in, generator=torch.Generator().manual_seed(0))
    whole = load_sae(rewritten(path, state, "BatchTopKSAE"))
    del state["k"]
    loaded = load_sae(rewritten(path, state))
    assert torch.equal(loaded(x), whole(x))
    assert whole.kind == "BatchTopK (k = 5), applied as JumpReLU"
    pre = sae.pre_activations(x)
    assert_close(loaded.encode(x), torch.where(pre > 0.25, pre, 0.0))
    del state["threshold"]
    refuses(rewritten(path, state), "cannot read the SAE.*lacks 'threshold'")


def test_a_decoder_vector_of_0_cannot_be_given_unit_norm(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_dictionary_learning(random_sae(model), tmp_path / "zero")
    state = torch.load(path / "ae.pt")
    state["decoder.weight"][:, [3, 7]] = 0
    refuses(rewritten(path, state), "decoder of 2 latents is 0: 3, 7.*unit norm")


def test_weights_without_numbers_are_refused_by_name(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    sae = random_sae(model)
    for write in (write_dictionary_learning, write_authors):
        path = write(sae, tmp_path / write.__name__)
        weights = next(file for file in ([path] if path.is_file() else path.iterdir()) if file.suffix == ".pt")
        torch.save({name: tensor.to("meta") for name, tensor in torch.load(weights).items()}, weights)
        refuses(path, "on the device `meta`, shapes without numbers")
    with pytest.raises(SAEError, match="b_dec is on the device `meta`"):
        replace(sae, b_dec=sae.b_dec.to("meta"))


def test_two_values_of_k_are_refused(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    refuses(write_dictionary_learning(random_sae(model, activation="topk"), tmp_path / "a", k=6), "k = 5.*expected: 6")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation": "groupmax"}, "'groupmax': one latent of each group"),
        ({"activation": "gumbel"}, "architecture 'gumbel'"),
        ({"transcode": True}, "'transcode': it predicts another"),
        ({"skip_connection": True}, "'skip_connection': it adds a linear map"),
        ({"signed": True}, "'signed': its features are active in both"),
        ({"num_latents": 0}, "weights of 32 x 48.*32 x 1024"),
    ],
)
def test_sparsify_files_that_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    sae = random_sae(model, activation="topk", site=Site("attn_out", 0))
    refuses(write_sparsify(sae, tmp_path, **changes), match)


def test_a_module_whose_output_is_no_site_is_refused(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_sparsify(random_sae(model, activation="topk", site=Site("attn_out", 0)), tmp_path)
    refuses(
        path.rename(path.with_name("layers.0.norm")), r"the output of layers.0.norm.*layers.L, or layers.L\. and one of"
    )
    whole = load_sae(path.with_name("layers.0.norm").rename(path.with_name("layers.0")))
    assert whole.site == Site("resid_post", 0), "the output of a layer is the stream behind it"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "topk"}, "architecture 'topk'"),
        ({"affine_connection": True}, "'transcoder': it predicts another"),
        ({"hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output"}, "'transcoder'"),
        ({"hf_hook_point_in": "model.layers.1.output"}, "hf_hook_point_in 'model.layers.1.output'"),
    ],
)
def test_gemma_scope_2_files_that_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    sae = random_sae(model, activation="jumprelu", apply_b_dec_to_input=False)
    refuses(write_gemma_scope_2(sae, tmp_path / "a", **changes), match)


def test_gemma_scope_of_the_residual_stream_is_of_that_behind_the_layer(
    model: Model, random_sae: RandomSAE, tmp_path: Path
) -> None:
    path = write_gemma_scope(random_sae(model, activation="jumprelu", apply_b_dec_to_input=False), tmp_path / "a")
    (tmp_path / "a" / "gemma-scope-2b-pt-att").rename(tmp_path / "a" / "gemma-scope-2b-pt-res")
    assert load_sae(Path(str(path).replace("-att", "-res"))).site == Site("resid_post", 1)


def test_gemma_scope_transcoders_are_refused(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_gemma_scope(random_sae(model, activation="jumprelu", apply_b_dec_to_input=False), tmp_path / "a")
    (tmp_path / "a" / "gemma-scope-2b-pt-att").rename(tmp_path / "a" / "gemma-scope-2b-pt-transcoders")
    refuses(Path(str(path).replace("-att", "-transcoders")), "'transcoders': it predicts another activation")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metadata": {"sae_lens_version": "7.0.0", "hook_name": "blocks.1.attn.hook_z"}}, r"SAELens 7.0.0"),
        ({"metadata": {"sae_lens_version": "mine", "hook_name": "blocks.1.attn.hook_z"}}, r"SAELens mine"),
        ({"metadata": {"sae_lens_version": "6.1", "hook_head_index": 3}}, "an SAE of head 3 alone"),
        ({"reshape_activations": "hook_q"}, "reshape_activations 'hook_q'"),
        ({"architecture": "temporal"}, "'temporal': it reads other positions"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm': each input is divided by its own standard deviation"),
        ({"normalize_activations": "my_own"}, "normalize_activations 'my_own'"),
        ({"normalize_activations": "expected_average_only_in"}, "no scaling factor"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input 'false'"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input None"),
        ({"architecture": "topk", "k": 4.7, "rescale_acts_by_decoder_norm": False}, "k = 4.7"),
        ({"architecture": "topk", "k": True, "rescale_acts_by_decoder_norm": False}, "k = True"),
        (
            {
                "metadata": {
                    "sae_lens_version": "6.1",
                    "hook_name": "blocks.1.attn.hook_z",
                    "model_from_pretrained_kwargs": {"fold_value_biases": True},
                }
            },
            "fold_value_biases and without fold_ln",
        ),
    ],
)
def test_saelens_settings_that_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    folder = save_sae(random_sae(model), tmp_path / "sae")
    edit_json(folder / "cfg.json", **changes)
    refuses(folder, match)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"sae_lens_version": "2.1.0"}, "SAELens 2.1.0"),
        ({"hook_point_head_index": 4}, "an SAE of head 4 alone"),
        ({"normalize_activations": True}, "no scaling factor"),
    ],
)
def test_old_saelens_settings_that_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, config: dict[str, Any], match: str
) -> None:
    folder = save_sae(random_sae(model), tmp_path / "sae")
    flat = {"d_in": 32, "d_sae": 48, "dtype": "float32", "hook_point": "blocks.1.attn.hook_z", "model_name": "m"}
    (folder / "cfg.json").write_text(json.dumps(flat))
    assert load_sae(folder).site == Site("z", 1)
    (folder / "cfg.json").write_text(json.dumps(flat | config))
    refuses(folder, match)


@pytest.mark.parametrize(
    ("loaded_with", "site", "processed"),
    [
        ({}, Site("z", 1), False),
        ({"center_writing_weights": True}, Site("z", 1), False),
        ({"fold_ln": True}, Site("z", 1), False),
        ({"fold_ln": True, "fold_value_biases": True}, Site("z", 1), True),
        ({"center_writing_weights": True}, Site("mlp_out", 0), True),
        ({"fold_ln": True, "fold_value_biases": True}, Site("mlp_out", 0), False),
    ],
)
def test_what_saelens_says_of_the_models_weights(
    model: Model, random_sae: RandomSAE, tmp_path: Path, loaded_with: dict[str, bool], site: Site, processed: bool
) -> None:
    sae = random_sae(model, site=site)
    sae.metadata["model_from_pretrained_kwargs"] = loaded_with
    assert load_sae(save_sae(sae, tmp_path / "sae")).processed is processed


def test_tensors_that_are_not_known_are_refused(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_authors(random_sae(model), tmp_path)
    torch.save(torch.load(path) | {"W_skip": torch.zeros(3)}, path)
    refuses(path, "holds W_skip beside")
    torch.save({"W_enc": torch.zeros(32, 48)}, path)
    refuses(path, "cannot read the SAE.*W_dec|cannot read the SAE.*b_dec")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", CASES)
def test_weights_that_are_not_finite_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, name: str, value: float
) -> None:
    write, activation, settings = CASES[name]
    site = Site("attn_out", 0) if name == "sparsify" else Site("z", 1)
    sae = random_sae(model, activation=activation, site=site, **settings)
    sae.b_dec[3] = value
    refuses(write(sae, tmp_path / "files"), "b_dec holds NaN or infinity")


# ------------------------------------------------------------------------------------------------------------- pickles
class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def torch_zip(content: object) -> bytes:
    """A file as torch.save writes it, with any pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


@pytest.mark.parametrize("packed", [pickle.dumps, torch_zip])
@pytest.mark.parametrize("name", ["authors", "dictionary-learning-topk"])
def test_a_pickle_with_code_is_refused_and_not_run(
    model: Model, random_sae: RandomSAE, tmp_path: Path, name: str, packed: Callable[[object], bytes]
) -> None:
    write, activation, _ = CASES[name]
    path = write(random_sae(model, activation=activation), tmp_path / "files")
    mark = tmp_path / "executed"
    bomb = packed({"W_enc": Bomb(mark)})
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb works"
    mark.unlink()
    locate(path).weights.write_bytes(bomb)
    refuses(path, "a pickle with more in it than tensors.*nothing of it was executed|cannot read the SAE")
    assert not mark.exists()


def test_an_array_file_with_objects_is_refused_and_not_run(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_gemma_scope(random_sae(model, activation="jumprelu", apply_b_dec_to_input=False), tmp_path / "a")
    mark = tmp_path / "executed"
    np.savez(path / "params.npz", W_enc=np.array([Bomb(mark)], dtype=object))
    refuses(path, "cannot read the SAE")
    (path / "params.npz").write_bytes(pickle.dumps(Bomb(mark)))
    refuses(path, "cannot read the SAE")
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"W_enc": [1.0, 2.0]}, torch.zeros(3)])
def test_a_pickle_of_something_else_is_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, content: object
) -> None:
    path = write_authors(random_sae(model), tmp_path)
    torch.save(content, path)
    refuses(path, "other things than tensors|more in it than tensors")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("left", [0, 40, -60])
def test_truncated_weights_are_refused(
    model: Model, random_sae: RandomSAE, tmp_path: Path, name: str, left: int
) -> None:
    write, activation, settings = CASES[name]
    site = Site("attn_out", 0) if name == "sparsify" else Site("z", 1)
    path = write(random_sae(model, activation=activation, site=site, **settings), tmp_path / "files")
    file = locate(path).weights
    file.write_bytes(file.read_bytes()[:left])
    refuses(path, "cannot read the SAE|more in it than tensors, or damaged")


def test_the_documents_list_of_formats_is_current() -> None:
    page = (Path(__file__).parents[2] / "docs" / "saes.md").read_text(encoding="utf-8")
    listed = page.split("<!-- formats -->\n")[1].split("\n<!-- end of formats -->")[0]
    assert listed == supported(), "run: python scripts/saes_table.py"


def test_every_format_says_what_it_is() -> None:
    assert len({f.name for f in FORMATS}) == len(FORMATS)
    for format_ in FORMATS:
        assert format_.architectures
        assert not set(format_.architectures) & set(format_.refused)


def test_the_readers_formats_are_tried_on_what_is_another(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    folder = save_sae(replace(random_sae(model), model_name="m"), tmp_path / "sae")
    (folder / WEIGHTS).rename(folder / "sae.safetensors")
    refuses(folder, "holds W_enc, b_enc beside .* in a file of sparsify")


def test_z_of_weights_in_another_basis_is_refused(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = save_sae(random_sae(model), tmp_path / "sae")
    loaded_with = {"fold_ln": True, "fold_value_biases": True, "refactor_factored_attn_matrices": True}
    metadata = json.loads((path / "cfg.json").read_text())["metadata"]
    edit_json(path / "cfg.json", metadata=metadata | {"model_from_pretrained_kwargs": loaded_with})
    refuses(path, "refactor_factored_attn_matrices")


def test_saes_of_inputs_are_refused(model: Model, random_sae: RandomSAE, tmp_path: Path) -> None:
    path = write_dictionary_learning(random_sae(model), tmp_path / "dictionary")
    edit_json(path / "config.json", buffer={"ctx_len": 128, "io": "in"})
    refuses(path, "buffer.io 'in'")
    path = write_sparsify(random_sae(model, activation="topk", site=Site("attn_out", 0)), tmp_path / "sparsify")
    edit_json(path.parent / "config.json", hook_mode="input")
    refuses(path, "hook_mode 'input'")
