from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from headscope.corpus import Corpus
from headscope.errors import ModelError, SAEError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.interventions import reconstruction
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.sae.convert import check_fits, fitted
from headscope.sae.formats import load_sae, save_sae
from headscope.sae.model import MODULE_OUTPUT, PROCESSED, SAE
from headscope.sae.quality import evaluate
from headscope.site import Kind, Site
from judging import assert_same_scale, judged_by, random_tokens, run_judge
from sae_files import write_dictionary_learning

RandomSAE = Callable[..., SAE]
RandomModel = Callable[..., Model]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
ACTIVATIONS = ("relu", "jumprelu", "topk", "gated")


def processed(sae: SAE) -> SAE:
    return replace(sae, metadata={"z_convention": PROCESSED})


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_z_less_its_constant_part_is_what_a_converted_sae_was_trained_on(
    random_model: RandomModel, random_sae: RandomSAE, family: str, activation: str, centred: bool
) -> None:
    model = random_model(family, dtype=torch.float64)
    c = model.value_offset(1)
    assert c.abs().max() > 0.1
    sae = processed(random_sae(model, activation=activation, apply_b_dec_to_input=centred))
    converted = fitted(sae, model)
    z = model.read(random_tokens(model, (3, 20)), [sae.site])[sae.site]
    f = sae.encode(z - c)
    assert_close(converted.encode(z), f, **EXACT)
    assert_close(converted.pre_activations(z), sae.pre_activations(z - c), **EXACT)
    assert_close(converted.decode(f), sae.decode(f) + c, **EXACT)
    assert (sae.encode(z) - f).abs().max() > 1e-3


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["mlp_out", "attn_out", "resid_pre", "resid_mid", "resid_post"])
def test_a_centred_stream_is_what_other_saes_were_trained_on(
    random_model: RandomModel, random_sae: RandomSAE, kind: Kind, centred: bool
) -> None:
    model = random_model("gpt2", dtype=torch.float64)
    sae = processed(random_sae(model, site=Site(kind, 1), apply_b_dec_to_input=centred))
    x = model.read(random_tokens(model, (3, 20)), [sae.site])[sae.site]
    less_mean = x - x.mean(-1, keepdim=True)
    assert_close(fitted(sae, model).pre_activations(x), sae.pre_activations(less_mean), **EXACT)
    assert (sae.encode(x) - sae.encode(less_mean)).abs().max() > 1e-3
    llama = random_model("llama", dtype=torch.float64)  # RMSNorm: TransformerLens centres nothing
    sae = processed(random_sae(llama, site=Site(kind, 1), apply_b_dec_to_input=centred))
    assert_close(fitted(sae, llama).W_enc, sae.W_enc, **EXACT)


def test_the_conversion_is_recorded_and_not_done_twice(
    random_model: RandomModel, random_sae: RandomSAE, tmp_path: Path
) -> None:
    model = random_model("gpt2")
    sae = processed(random_sae(model))
    sae.metadata["model_from_pretrained_kwargs"] = {"fold_ln": True, "fold_value_biases": True}
    once = fitted(sae, model)
    assert once.metadata["converted"] == {
        "from": PROCESSED,
        "model": model.spec.name,
        "model_hash": model.fingerprint(),
        "dtype": "float32",
    }
    again = fitted(load_sae(save_sae(once, tmp_path / "sae")), model)
    assert_close(again.b_dec, once.b_dec, rtol=0, atol=0)
    assert again.metadata["z_convention"] == "raw"
    assert not again.processed


def test_an_unconverted_sae_is_refused_wherever_it_would_give_a_wrong_number(
    random_model: RandomModel, random_sae: RandomSAE, random_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    model = random_model("gpt2")
    sae = processed(random_sae(model))
    kept = load_sae(save_sae(sae, tmp_path / "sae"))
    assert kept.processed
    for attempt in (
        lambda: check_fits(kept, model),
        lambda: reconstruction(kept),
        lambda: evaluate(model, kept, random_corpus(model)),
    ):
        with pytest.raises(SAEError, match=r"(?s)TransformerLens processed.*do: convert it"):
            attempt()


def test_an_sae_of_another_model_is_refused_with_both_shapes(random_model: RandomModel, random_sae: RandomSAE) -> None:
    model, llama = random_model("gpt_neox"), random_model("llama")
    with pytest.raises(SAEError, match=r"(?s)vectors of 32 \(blocks.1.attn.hook_z.*expected: 48 \(4 heads x 12\)"):
        fitted(random_sae(model), llama)
    with pytest.raises(ModelError, match="layer 5"):
        fitted(random_sae(model, site=Site("z", 5)), model)
    beside = random_model("gpt_neox", use_parallel_residual=True)
    with pytest.raises(ModelError, match=r"(?s)resid_mid.*side by side.*use resid_pre"):
        fitted(random_sae(model, site=Site("resid_mid", 0)), beside)


def test_an_sae_of_other_weights_is_refused_wherever_it_would_give_a_wrong_number(
    random_model: RandomModel, random_sae: RandomSAE, random_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    model, other = random_model("gpt2"), random_model("gpt2", seed=1)
    plain = random_sae(model)
    trained = replace(plain, metadata={"model_hash": model.fingerprint(), "dtype": "float32"})
    corpus, record = random_corpus(model), SAERecord("random", "sha256:0")
    for sae in (trained, fitted(processed(plain), model)):
        for attempt in (
            lambda sae=sae: check_fits(sae, other),
            lambda sae=sae: fitted(sae, other),
            lambda sae=sae: evaluate(other, sae, corpus),
            lambda sae=sae: build_index(other, [(sae, record)], corpus, tmp_path / "index"),
        ):
            with pytest.raises(SAEError, match=r"(?s)whose weights are not those of random gpt2 in float32.*--force"):
                attempt()
        check_fits(sae, model)
    build_index(model, [(trained, record)], corpus, tmp_path / "index")
    index = FeatureIndex.open(tmp_path / "index")
    LiveIndex(index, model, trained)
    with pytest.raises(SAEError, match="whose weights are not"):
        LiveIndex(index, model, replace(trained, metadata={"model_hash": other.fingerprint()}))


def test_an_sae_of_half_precision_is_of_the_same_weights_in_a_higher_one(
    random_model: RandomModel, random_sae: RandomSAE
) -> None:
    model, half = random_model("gpt2"), random_model("gpt2", dtype=torch.bfloat16)
    sae = random_sae(model)
    check_fits(replace(sae, metadata={"model_hash": half.fingerprint(), "dtype": "bfloat16"}), model)
    trained = replace(sae, metadata={"model_hash": model.fingerprint(), "dtype": "float32"})
    with pytest.raises(
        SAEError, match=r"(?s)trained on random gpt2 in float32 .* random gpt2 in bfloat16.*or a higher one"
    ):
        check_fits(trained, half)


def test_an_sae_that_is_forced_to_other_weights_says_so(
    random_model: RandomModel, random_sae: RandomSAE, random_corpus: Callable[..., Corpus], tmp_path: Path
) -> None:
    model, other = random_model("gpt2"), random_model("gpt2", seed=1)
    known = model.fingerprint()
    trained = replace(random_sae(model), metadata={"model_hash": known, "dtype": "float32"})
    assert fitted(trained, model, force=True) is trained
    forced = fitted(trained, other, force=True)
    assert forced.metadata["forced_from"] == known
    check_fits(forced, other)
    with pytest.raises(SAEError, match="whose weights are not"):
        check_fits(forced, model)
    out = tmp_path / "index"
    build_index(other, [(forced, SAERecord("random", "sha256:0"))], random_corpus(other), out)
    assert FeatureIndex.open(out).manifest["sae"]["forced_from"] == known


def test_a_modules_output_is_not_what_a_model_with_norms_behind_it_adds(
    random_model: RandomModel, random_sae: RandomSAE
) -> None:
    gemma, llama = random_model("gemma2"), random_model("llama")
    site = Site("attn_out", 0)
    sae = replace(random_sae(gemma, site=site), metadata={"reads": MODULE_OUTPUT})
    with pytest.raises(SAEError, match="has a norm after the module"):
        check_fits(sae, gemma)
    check_fits(random_sae(gemma, site=site), gemma)
    check_fits(replace(random_sae(llama, site=site), metadata={"reads": MODULE_OUTPUT}), llama)


def test_dictionary_learning_reads_a_modules_output_unless_it_names_a_hook(
    random_model: RandomModel, random_sae: RandomSAE, tmp_path: Path
) -> None:
    gemma, site = random_model("gemma2"), Site("attn_out", 0)
    sae = random_sae(gemma, site=site)
    with pytest.raises(SAEError, match="has a norm after the module"):
        check_fits(load_sae(write_dictionary_learning(sae, tmp_path / "module")), gemma)
    hook = {"submodule_name": "blocks.0.hook_attn_out"}
    check_fits(load_sae(write_dictionary_learning(sae, tmp_path / "hook", **hook)), gemma)


# ------------------------------------------------------------------------------------------------- TransformerLens 3.9
HF: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt2": ("gpt2", {}),
}


@pytest.fixture(scope="module")
def judged(
    random_model: RandomModel,
    save_model: Callable[[Model, Path], Path],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Models, and what TransformerLens computes with them once it has processed their weights."""
    root = tmp_path_factory.mktemp("processed")
    for name, (family, changes) in HF.items():
        save_model(random_model(family, **changes), root / "hf" / name)
    np.savez(root / "tokens.npz", tokens=random_tokens(random_model("gpt2"), (3, 40)).numpy())
    run_judge("transformer_lens_processed.py", root / "tokens.npz", root)
    copied = Tokenizer.from_str(tokenizer.to_str())
    PreTrainedTokenizerFast(tokenizer_object=copied, bos_token="<|bos|>").save_pretrained(root / "tl" / "gelu")
    return root


@judged_by("transformer_lens")
@pytest.mark.parametrize("kind", ["z", "attn_out", "mlp_out", "resid_pre", "resid_post"])
@pytest.mark.parametrize("name", ["tl/gelu", *(f"hf/{name}" for name in HF)])
def test_activations_on_processed_weights_are_those_of_the_converted_sae_on_the_model(
    judged: Path, random_sae: RandomSAE, name: str, kind: Kind
) -> None:
    model = load_model(str(judged / name))
    tokens = torch.from_numpy(np.load(judged / "tokens.npz")["tokens"])
    theirs = np.load(judged / f"{name}.npz")
    for layer in range(model.spec.n_layers):
        site = Site(kind, layer)
        x = torch.from_numpy(theirs[site.hook_name])
        x = x.flatten(2) if kind == "z" else x
        raw = model.read(tokens, [site])[site]
        for activation in ("relu", "jumprelu", "gated"):
            for centred in (True, False):
                sae = processed(
                    random_sae(model, activation=activation, site=site, apply_b_dec_to_input=centred, seed=layer)
                )
                f = sae.encode(x)
                assert 0 < int((f > 0).sum()) < f.numel()
                pre = fitted(sae, model).pre_activations(raw)
                assert_same_scale(pre, sae.pre_activations(x), 1e-5)
                assert_same_scale(fitted(sae, model).encode(raw), f, 1e-5)
                assert (sae.pre_activations(raw) - sae.pre_activations(x)).abs().max() > 1e-2
