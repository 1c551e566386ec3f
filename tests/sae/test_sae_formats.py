import ast
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from headscope.artefact import file_hash
from headscope.errors import HeadscopeError, OutputError, SAEError
from headscope.models.hf import Model
from headscope.sae.formats import WEIGHTS, load_sae, locate, sae_hash, save_sae
from headscope.sae.formats.saelens_settings import KNOWN
from headscope.sae.model import SAE, JumpReLU, TopK
from headscope.site import Site

RandomSAE = Callable[..., SAE]
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox")


@pytest.fixture
def saved(model: Model, random_sae: RandomSAE, tmp_path: Path) -> Path:
    return save_sae(random_sae(model), tmp_path / "sae")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | changes, folder / WEIGHTS)


def drop(folder: Path, name: str) -> None:
    save_file({k: t for k, t in load_file(folder / WEIGHTS).items() if k != name}, folder / WEIGHTS)


# ---------------------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "gated"])
def test_what_is_saved_is_loaded_bit_for_bit(
    model: Model, random_sae: RandomSAE, tmp_path: Path, activation: str, apply_b_dec_to_input: bool
) -> None:
    sae = random_sae(model, activation=activation, apply_b_dec_to_input=apply_b_dec_to_input)
    sae.metadata.update(z_convention="raw", note="🦊", nested={"epochs": 1.5})
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    for name in NAMES:
        assert_close(getattr(loaded, name), getattr(sae, name), rtol=0, atol=0)
    exact = 1e-6 if activation == "gated" else 0  # its threshold is kept as the two paths' biases
    assert type(loaded.activation) is type(sae.activation)
    if isinstance(sae.activation, TopK):
        assert loaded.activation == sae.activation
    if isinstance(sae.activation, JumpReLU):
        assert_close(loaded.activation.threshold, sae.activation.threshold, rtol=exact, atol=exact)
    assert (loaded.site, loaded.model_name) == (sae.site, sae.model_name)
    assert loaded.apply_b_dec_to_input is apply_b_dec_to_input
    assert loaded.metadata.items() >= sae.metadata.items()


def test_saving_what_was_loaded_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = save_sae(load_sae(saved), tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert (again / "cfg.json").read_bytes() == (saved / "cfg.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_of_half_precision_reads_as_the_rounded_float32(
    model: Model, random_sae: RandomSAE, tmp_path: Path, dtype: torch.dtype
) -> None:
    sae = random_sae(model, activation="jumprelu")
    folder = save_sae(sae, tmp_path / "half", dtype=dtype)
    loaded = load_sae(folder)
    for name in NAMES:
        assert getattr(loaded, name).dtype == torch.float32
        assert_close(getattr(loaded, name), getattr(sae, name).to(dtype).float(), rtol=0, atol=0)
    assert_close(loaded.activation.threshold, sae.activation.threshold.to(dtype).float(), rtol=0, atol=0)
    full = save_sae(sae, tmp_path / "full")
    assert (folder / WEIGHTS).stat().st_size < 0.6 * (full / WEIGHTS).stat().st_size


def test_weights_that_are_views_or_want_gradients_can_be_saved(
    model: Model, random_sae: RandomSAE, tmp_path: Path
) -> None:
    sae = random_sae(model)
    sae.W_enc.requires_grad_(True)
    folder = save_sae(SAE(**(vars(sae) | {"W_dec": sae.W_enc.T, "b_dec": sae.b_dec.expand(32)})), tmp_path / "sae")
    assert_close(load_sae(folder).W_dec, sae.W_enc.detach().T)


def test_a_z_sae_says_so_in_the_words_of_saelens(saved: Path) -> None:
    config = json.loads((saved / "cfg.json").read_text())
    assert config["architecture"] == "standard"
    assert config["reshape_activations"] == "hook_z"
    assert config["normalize_activations"] == "none"
    assert config["metadata"]["hook_name"] == "blocks.1.attn.hook_z"
    assert config["metadata"]["sae_lens_version"].startswith("6.")


def test_the_hash_is_that_of_the_weights(saved: Path) -> None:
    assert sae_hash(saved) == sae_hash(str(saved)) == file_hash(saved / WEIGHTS)
    change_weights(saved, b_dec=torch.zeros(32))
    assert sae_hash(saved) == file_hash(saved / WEIGHTS)


# ------------------------------------------------------------------------------------------------- written by SAELens
def test_rescaling_by_the_decoder_norm_is_folded_into_the_weights(
    model: Model, random_sae: RandomSAE, tmp_path: Path
) -> None:
    sae = random_sae(model, activation="topk", dtype=torch.float64)
    folder = save_sae(sae, tmp_path / "sae", dtype=torch.float64)
    change_config(folder, rescale_acts_by_decoder_norm=True)
    loaded = load_sae(folder).to(torch.float64)
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = sae.W_dec.norm(dim=1)
    f = sae.activation(sae.pre_activations(x) * norms)
    assert_close(loaded.encode(x), f, rtol=1e-4, atol=1e-5)
    assert_close(loaded(x), (f / norms) @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-5)
    assert_close(loaded.W_dec.norm(dim=1), torch.ones_like(norms), rtol=1e-6, atol=1e-6)


def fields_of_saelens() -> set[str]:
    """What SAELens' own classes of configurations have, read off its files; it is not imported."""
    package = importlib.util.find_spec("sae_lens")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("sae-lens is not installed")
    root, found = Path(package.submodule_search_locations[0]), set()
    own = [root / "saes" / f"{name}_sae.py" for name in ("standard", "jumprelu", "topk", "gated", "batchtopk")]
    for file in (*own, root / "saes" / "matryoshka_batchtopk_sae.py", root / "saes" / "sae.py", root / "config.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            name = node.name if isinstance(node, ast.ClassDef) else ""
            if name.endswith(("SAEConfig", "LoggingConfig", "LanguageModelSAERunnerConfig")):
                found |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return found


def test_whatever_saelens_itself_writes_is_known(saved: Path) -> None:
    fields = fields_of_saelens()
    assert {"d_sae", "l1_coefficient", "matryoshka_widths", "train_batch_size_tokens", "wandb_id"} < fields
    assert fields - KNOWN == set()
    change_config(saved, lr=1e-3, l1_coefficient=5.0, l1_warm_up_steps=100, autocast_lm=True, wandb_project="saes")
    assert load_sae(saved).d_sae == 48


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_setting_that_is_off_changes_nothing(saved: Path, value: Any) -> None:
    change_config(saved, from_the_future=value)
    assert load_sae(saved).d_sae == 48


# -------------------------------------------------------------------------------------------------------- what is wrong
def refuses(folder: Path, match: str) -> None:
    with pytest.raises(SAEError, match=rf"(?s){match}.*expected: "):
        load_sae(folder)


@pytest.mark.parametrize("name", ["cfg.json", WEIGHTS])
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refuses(saved, "no SAE at")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "none", "no SAE at .*none")
    with pytest.raises(SAEError, match="no SAE at 'not-bundled'"):
        locate("not-bundled")


@pytest.mark.parametrize("left", [0, 4, 60, -5])
def test_truncated_weights_are_refused(saved: Path, left: int) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:left])
    refuses(saved, "cannot read the SAE")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\x00\x01"])
def test_a_damaged_config_is_refused(saved: Path, content: str) -> None:
    (saved / "cfg.json").write_text(content)
    refuses(saved, "cannot read the SAE")


def test_a_config_that_is_not_utf8_is_refused(saved: Path) -> None:
    (saved / "cfg.json").write_bytes(b'{"architecture": "\xff"}')
    refuses(saved, "cannot read the SAE")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_refused(saved: Path, name: str) -> None:
    drop(saved, name)
    refuses(saved, f"cannot read the SAE.*{name}")


@pytest.mark.parametrize("changes", [{"d_sae": 47}, {"d_in": 31}, {"d_sae": None}])
def test_sizes_other_than_the_config_says_are_refused(saved: Path, changes: dict[str, Any]) -> None:
    change_config(saved, **changes)
    refuses(saved, "weights of 32 x 48")


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    "changes", [{"b_enc": torch.zeros(47)}, {"W_dec": torch.zeros(48, 31)}, {"W_enc": torch.zeros(48)}]
)
def test_tensors_that_do_not_fit_one_another_are_refused(saved: Path, changes: dict[str, torch.Tensor]) -> None:
    change_weights(saved, **changes)
    with pytest.raises(SAEError, match="expected: "):
        load_sae(saved)


@pytest.mark.parametrize("threshold", [torch.zeros(47), torch.full((48,), torch.nan)])
def test_a_threshold_that_does_not_fit_is_refused(saved: Path, threshold: torch.Tensor) -> None:
    change_config(saved, architecture="jumprelu")
    change_weights(saved, threshold=threshold)
    refuses(saved, "threshold")


def test_weights_that_are_not_finite_are_refused(saved: Path) -> None:
    change_weights(saved, W_enc=torch.full((32, 48), torch.nan))
    refuses(saved, "W_enc holds NaN")


@pytest.mark.parametrize("architecture", ["abstopk", "transcoder", "temporal", None, 3])
def test_an_architecture_not_read_here_is_refused(saved: Path, architecture: Any) -> None:
    change_config(saved, architecture=architecture)
    refuses(saved, f"architecture {architecture!r}")


@pytest.mark.parametrize("how", ["expected_average_only_in", "layer_norm", "constant_norm_rescale"])
def test_an_sae_of_normalised_activations_is_refused(saved: Path, how: str) -> None:
    change_config(saved, normalize_activations=how)
    refuses(saved, f"normalize_activations '{how}'")


@pytest.mark.parametrize("name", ["post_scale", "from_the_future", "is_transcoder", "use_error_term"])
@pytest.mark.parametrize("version", ["6.1.0", "4.3.0"])
def test_an_unknown_setting_is_refused_by_name(saved: Path, name: str, version: str) -> None:
    config = json.loads((saved / "cfg.json").read_text())
    metadata = config["metadata"] | {"sae_lens_version": version}
    change_config(saved, **{"metadata": metadata, name: 1.5})
    refuses(saved, rf"cfg.json says {name} 1.5")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 4}}, "activation_fn 'topk'"),
        ({"activation_fn_kwargs": {"slope": 2}}, "activation_fn_kwargs {'slope': 2}"),
        ({"d_out": 16}, "d_out 16, a transcoder"),
    ],
)
def test_another_activation_than_the_architectures_is_refused(saved: Path, changes: dict, match: str) -> None:
    change_config(saved, activation_fn="relu", activation_fn_kwargs={}, d_out=32)
    assert load_sae(saved).d_sae == 48
    change_config(saved, **changes)
    refuses(saved, match)


@pytest.mark.parametrize("name", ["hook_name_out", "hook_head_index_out"])
def test_an_sae_that_reconstructs_another_activation_is_refused(saved: Path, name: str) -> None:
    metadata = json.loads((saved / "cfg.json").read_text())["metadata"]
    change_config(saved, metadata=metadata | {"hook_name_out": metadata["hook_name"], "hook_head_index_out": None})
    assert load_sae(saved).site == Site("z", 1)
    change_config(saved, metadata=metadata | {name: "blocks.1.hook_mlp_out"})
    refuses(saved, f"{name} 'blocks.1.hook_mlp_out', a transcoder")


@pytest.mark.parametrize("metadata", [None, {}, {"hook_name": "blocks.1.attn.hook_q"}])
def test_an_sae_of_no_known_site_is_refused(saved: Path, metadata: dict[str, Any] | None) -> None:
    change_config(saved, metadata=metadata)
    with pytest.raises(HeadscopeError, match=r"(?s)hook_name|hook name.*expected: "):
        load_sae(saved)


def test_an_existing_folder_is_not_overwritten_unless_asked(model: Model, random_sae: RandomSAE, saved: Path) -> None:
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        save_sae(random_sae(model, seed=1), saved)
    assert (saved / WEIGHTS).read_bytes() == before
    save_sae(random_sae(model, seed=1), saved, overwrite=True)
    assert (saved / WEIGHTS).read_bytes() != before
    assert sorted(p.name for p in saved.iterdir()) == ["cfg.json", WEIGHTS]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("name", ["sae_weights.pt", "sae.pkl", "model.pt"])
def test_nothing_is_unpickled(saved: Path, name: str) -> None:
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    assert load_sae(saved).d_sae == 48
    (saved / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    refuses(saved, "cannot read the SAE")
