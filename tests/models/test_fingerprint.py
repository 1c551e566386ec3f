"""The hash that names a model is of what it computes, and not of how `transformers` spells it."""

import copy
import hashlib
import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headscope.errors import ModelError
from headscope.models.families import FAMILIES
from headscope.models.fingerprint import checksum
from headscope.models.hf import Model
from headscope.models.settings import check_settings, computed, unjudged

FAMILIES_WITH_A_MODEL = [name for name in FAMILIES if name != "deepseek_v3"]


def changed(model: Model, **settings: Any) -> Model:
    """The same model, some keys of its configuration set to other values."""
    module = copy.deepcopy(model.module)
    for name, value in settings.items():
        setattr(module.config.get_text_config(), name, value)
    return Model(module, model.tokenizer, model.bos, model.spec.name)


def earlier(model: Model, rename: tuple[str, str] = ("", ""), **config: Any) -> str:
    """The hash that earlier versions of headscope gave, under a version of transformers that names things so."""
    own = {k: v for k, v in model.module.config.to_dict().items() if k[0] != "_"} | config
    for name in ("architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version", "use_cache"):
        own.pop(name, None)
    digest = hashlib.sha256(json.dumps([own, model.bos], sort_keys=True, default=str).encode())
    state = {name.replace(*rename): tensor for name, tensor in model.module.state_dict().items()}
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + tensor.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def test_what_does_not_decide_the_function_leaves_the_hash_alone(random_model):
    for family in FAMILIES_WITH_A_MODEL:
        model = random_model(family)
        known, config = model.fingerprint(), model.module.config.get_text_config()
        assert random_model(family).fingerprint() == known
        inert = {"pad_token_id": 5, "eos_token_id": 7, "initializer_range": 0.5, "output_hidden_states": True}
        inert |= {"use_cache": True, "a_note_of_mine": "x", "attention_dropout": 0.1, "transformers_version": "5.0"}
        inert |= {"architectures": ["Other"], "tie_word_embeddings": not config.tie_word_embeddings}
        for name, value in inert.items():
            assert changed(model, **{name: value}).fingerprint() == known, (family, name)


def test_what_decides_the_function_changes_the_hash(random_model):
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    for family, settings in {
        "gpt_neox": {"layer_norm_eps": 1e-3, "rope_parameters": rope, "hidden_act": "relu"},
        "gpt2": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
        "llama": {"rope_parameters": scaled, "rms_norm_eps": 1e-3, "hidden_act": "relu"},
        "mistral": {"sliding_window": 3},
        "qwen2": {"layer_types": ["full_attention"] * 2, "sliding_window": 3},
        "gemma2": {"query_pre_attn_scalar": 7, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0},
        "afmoe": {"num_experts_per_tok": 2, "route_scale": 2.0},
    }.items():
        model = random_model(family)
        found = [model, random_model(family, seed=1), random_model(family, dtype=torch.float64)]
        found += [Model(model.module, model.tokenizer, 1, "other BOS")]
        found += [changed(model, **{name: value}) for name, value in settings.items()]
        assert len({m.fingerprint() for m in found}) == len(found), family


def test_each_weight_has_its_part(random_model):
    """Also where two of the same shape change places."""
    for family in FAMILIES_WITH_A_MODEL:
        model = random_model(family)
        known, state = model.fingerprint(), model.module.state_dict()
        for name, tensor in state.items():
            if "vision" in name or "multi_modal" in name:  # which text does not reach
                continue
            before = tensor.clone()
            tensor.view(-1)[-1] += 1
            assert model.fingerprint() != known, name
            tensor.copy_(before)
        q, v = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        attention = model.module.get_submodule(FAMILIES[family].blocks)[0]
        attention.first, attention.second = q, v
        one = model.fingerprint()
        attention.first, attention.second = v, q
        assert len({known, one, model.fingerprint()}) == 3


def test_names_of_modules_and_spellings_of_numbers_play_no_role(random_model):
    model = random_model("gpt_neox")
    module = copy.deepcopy(model.module)
    module.embed_out = module.lm_head
    del module.lm_head
    module.get_output_embeddings = lambda: module.embed_out
    renamed = Model(module, model.tokenizer, model.bos, "renamed")
    assert "embed_out.weight" in module.state_dict()
    assert renamed.fingerprint() == model.fingerprint()
    for family, rope in {
        "llama": [{"rope_theta": 10_000}, {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, "factor": None}],
        "gemma3_text": [
            {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()} | more
            for thetas in [{"sliding_attention": 10_000, "full_attention": 1_000_000}]
            for more in ({}, {"rope_theta": None, "rope_type": "default"})
        ],
    }.items():
        own = random_model(family)
        spelled = [{"rope_type": "default"} | r if family == "llama" else r for r in rope]
        found = {changed(own, rope_parameters=r).fingerprint() for r in spelled}
        assert found == {own.fingerprint()}, family


def test_hashes_of_earlier_versions_are_recognised(random_model):
    neox, gemma = random_model("gpt_neox"), random_model("gemma3_text")
    for known in (earlier(neox), earlier(neox, ("lm_head", "embed_out")), neox.fingerprint()):
        assert neox.matches(known)
        assert not random_model("gpt_neox", seed=1).matches(known)
    rope = gemma.module.config.rope_parameters | {"rope_theta": None, "rope_type": "default"}
    assert gemma.matches(earlier(gemma))
    assert gemma.matches(earlier(gemma, rope_parameters=rope))
    assert not gemma.matches(earlier(gemma, rope_parameters={}))


def test_weights_are_the_same_in_a_lower_precision_and_cannot_be_told_in_a_higher(random_model):
    model, half = (random_model("llama", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert model.matches(half.fingerprint(), "bfloat16")
    assert not model.matches(half.fingerprint(), "float16")
    assert not model.matches(half.fingerprint())
    assert not half.matches(model.fingerprint(), "float32")
    assert model.matches(model.fingerprint(), "float32")
    assert model.matches(model.fingerprint(), "what is that")


def edits(model):
    """Ways to change the unembedding and the final norm after a model is loaded."""

    def doubled():
        model._unembedding.weight.data.mul_(2)

    def permuted():
        weight = model._unembedding.weight.data
        weight.copy_(weight.roll(1, 0).clone())

    def gain():
        model._final_norm.module.weight.data[3] += 0.5

    def exchanged():
        model._unembedding.weight = torch.nn.Parameter(model._unembedding.weight * 3, requires_grad=False)

    def trained():
        weight = torch.nn.Parameter(model._unembedding.weight.detach())
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()

    return doubled, permuted, gain, exchanged, trained


def test_nothing_of_weights_that_were_changed_is_kept(random_model):
    for family in ("gpt2", "llama"):
        model = random_model(family)
        module = copy.deepcopy(model.module)
        model = Model(module, model.tokenizer, model.bos, model.spec.name)
        final = torch.randn(5, model.spec.d_model, generator=torch.Generator().manual_seed(1))
        known = model.fingerprint()
        assert model.logit_directions is model.logit_directions
        for edit in (lambda: None, *edits(model)):
            before = model.logit_directions.clone(), model.logit_bias.clone()
            assert model.matches(known)
            edit()
            assert model.matches(known) == (edit.__name__ == "<lambda>"), edit.__name__
            known = model.fingerprint()
            logits = module.lm_head(model._final_norm.module(final))
            c, sigma = model.final_parts(final)
            ours = c / sigma @ model.logit_directions + model.logit_bias
            torch.testing.assert_close(ours - ours.mean(1, keepdim=True), logits - logits.mean(1, keepdim=True))
            assert torch.equal(before[0], model.logit_directions) == (edit.__name__ == "<lambda>"), edit.__name__


def test_a_checksum_knows_values_of_every_type_and_shape():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool):
        for shape in ((), (0,), (0, 3), (5,), (3, 5), (4, 8), (2, 3, 4)):
            value = torch.arange(1, 1 + int(torch.tensor(shape).prod())).reshape(shape).to(dtype)
            assert checksum(value) == checksum(value.clone())
            if value.numel():
                assert checksum(value) != checksum(torch.zeros_like(value)), (dtype, shape)
            if value.ndim == 2:
                assert checksum(value.T) == checksum(value.T.contiguous())


# ------------------------------------------------------------------------------------------------------------ settings
def test_every_key_that_a_family_declares_is_judged():
    for family in FAMILIES:
        assert not unjudged(CONFIG_MAPPING[family]().get_text_config()), family


def test_a_setting_that_nobody_has_judged_is_refused_unless_it_is_at_its_default():
    class Newer(PreTrainedConfig):
        model_type = "llama"
        attention_sinks: int = 0

    check_settings(Newer(), "m")
    with pytest.raises(ModelError, match=r"attention_sinks = 4 in the configuration of m[\s\S]*default, 0"):
        check_settings(Newer(attention_sinks=4), "m")


def test_settings_that_let_attention_see_later_tokens_are_refused(random_model, tokenizer):
    for family, key, value in [
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma3", "use_bidirectional_attention", True),
        ("llama", "is_causal", False),
        ("gpt2", "add_cross_attention", True),
        ("qwen2", "layer_types", ["chunked_attention", "full_attention"]),
    ]:
        config = random_model(family).module.config
        check_settings(config, family)
        setattr(config.get_text_config(), key, value)
        with pytest.raises(ModelError, match=key if "types" not in key else "chunked_attention"):
            Model(AutoModelForCausalLM.from_config(config), tokenizer, 0, family)


def test_windows_and_rotations_that_play_no_role_are_not_there(random_model):
    qwen = random_model("qwen2", use_sliding_window=False, sliding_window=5, layer_types=None)
    assert computed(qwen.module.config, qwen.spec)["windows"] is None
    gpt2 = random_model("gpt2")
    assert computed(gpt2.module.config, gpt2.spec)["rotation"] is None
