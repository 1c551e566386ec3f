"""A model whose modules compute something else than what is read off its weights is refused."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headscope.errors import ModelError
from headscope.models.agreement import check_agreement
from headscope.models.families import FAMILIES
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.models.norms import Norm
from headscope.site import Site


class Adapted(nn.Module):
    """An adapter that is not merged: it adds to what the module computes, and shows the module's weights as its own."""

    def __init__(self, base: nn.Module, size: float = 0.05) -> None:
        super().__init__()
        self.base, self.size = base, size

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + self.size * out.flip(-1)


class AdaptedLinear(nn.Linear):
    """The same by inheritance."""

    @classmethod
    def of(cls, base: nn.Linear) -> "AdaptedLinear":
        made = cls(base.in_features, base.out_features, bias=base.bias is not None, dtype=base.weight.dtype)
        made.load_state_dict(base.state_dict())
        return made

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.02


class Rounded(nn.Linear):
    """A weight in four bits that shows another one."""

    def forward(self, input: Tensor) -> Tensor:
        step = self.weight.abs().max() / 7
        return nn.functional.linear(input, (self.weight / step).round() * step, self.bias)


class Magnitude(nn.Module):
    """A parametrisation: `weight` is what is computed."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def wrap(path: str, wrapper: Callable[[Any], nn.Module] = Adapted) -> Callable[[nn.Module], None]:
    return lambda module: module.set_submodule(path, wrapper(module.get_submodule(path)))


def hook(path: str, *, before: bool = False) -> Callable[[nn.Module], None]:
    def changed(module: nn.Module) -> None:
        part = module.get_submodule(path)
        if before:
            part.register_forward_pre_hook(lambda _m, args: (args[0] * 1.02, *args[1:]))
        else:
            part.register_forward_hook(
                lambda _m, _a, out: (out[0] * 1.02, *out[1:]) if isinstance(out, tuple) else out * 1.02
            )

    return changed


def another_forward(path: str) -> Callable[[nn.Module], None]:
    def changed(module: nn.Module) -> None:
        part = module.get_submodule(path)
        own = part.forward
        part.forward = MethodType(lambda _self, x: own(x) * 1.02, part)

    return changed


def looks_ahead(module: nn.Module) -> None:
    module.model.layers[1].self_attn.is_causal = False


def another_state(_module: nn.Module, _args: tuple, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * 1.02
    return output


LAYER = "model.layers.1"
CHANGED: dict[str, list[tuple[str, Callable[[nn.Module], None], str]]] = {
    "llama": [
        ("adapter of W_O", wrap(f"{LAYER}.self_attn.o_proj"), r"W_O \+ b_O of layer 1 .*Adapted"),
        ("the same by inheritance", wrap(f"{LAYER}.self_attn.o_proj", AdaptedLinear.of), "W_O.*AdaptedLinear"),
        ("hook of W_O", hook(f"{LAYER}.self_attn.o_proj"), "W_O .*a hook"),
        ("hook of attention", hook(f"{LAYER}.self_attn"), "what attention adds of layer 1 .*a hook at self_attn"),
        ("another forward", another_forward(f"{LAYER}.self_attn.o_proj"), "W_O .*another forward"),
        ("norm before attention", wrap(f"{LAYER}.input_layernorm"), "the norm before attention of layer 1"),
        ("norm before the MLP", wrap("model.layers.0.post_attention_layernorm"), "the norm before the MLP of layer 0"),
        ("hook before a norm", hook(f"{LAYER}.input_layernorm", before=True), "the input of the norm before attention"),
        ("the final norm", wrap("model.norm"), "the final norm"),
        ("hook of the final norm", hook("model.norm"), "the final norm .*a hook"),
        ("hook of a block", hook(LAYER), "what the layer adds of layer 1"),
        ("hook before a block", hook(LAYER, before=True), "the input of layer 1"),
        ("hook of the body", lambda module: module.model.register_forward_hook(another_state), "hidden state"),
        ("W_U by inheritance", wrap("lm_head", AdaptedLinear.of), r"W_U \+ b_U .*AdaptedLinear"),
        ("adapter of W_U", wrap("lm_head"), "Adapted as its unembedding"),
        ("hook of W_U", hook("lm_head"), "W_U"),
        ("attention without a mask", looks_ahead, "z of layer 1, before tokens that it must not see"),
    ],
    "gpt2": [
        ("adapter of W_O", wrap("transformer.h.0.attn.c_proj"), "W_O .*Adapted"),
        ("norm with weights of its own", wrap("transformer.h.1.ln_1"), "the norm before attention of layer 1"),
        ("no weights", wrap("transformer.h.0.attn.c_proj", lambda _m: nn.Identity()), "has no weights"),
    ],
    "gpt_neox": [("adapter of W_O", wrap("gpt_neox.layers.1.attention.dense"), "W_O .*Adapted")],
    "gemma2": [
        ("norm after attention", wrap(f"{LAYER}.post_attention_layernorm"), "the norm after attention of layer 1"),
        ("norm after the MLP", wrap(f"{LAYER}.post_feedforward_layernorm"), "the norm after the MLP of layer 1"),
        ("adapter of W_O", wrap(f"{LAYER}.self_attn.o_proj"), "W_O .*Adapted"),
    ],
}


def changed(model: Model, change: Callable[[nn.Module], None]) -> Model:
    module = copy.deepcopy(model.module)
    change(module)
    return Model(module, model.tokenizer, model.bos, model.spec.name)


def test_models_as_transformers_makes_them_agree_in_each_precision(random_model):
    for family in FAMILIES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            model = random_model(family, dtype=dtype)
            check_agreement(model)
            if not model.family.not_mixed:
                model.attention(torch.arange(8)[None], 1)
                model.W_V(1)
    check_agreement(random_model("gpt_neox", use_parallel_residual=True))


def test_what_is_not_what_its_weights_say_is_refused_by_name(random_model):
    for family, cases in CHANGED.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(family, dtype=dtype)
            for what, change, message in cases:
                with pytest.raises(ModelError, match=rf"(?s){message}.*merge the adapter"):  # noqa: PT012
                    check_agreement(changed(model, change))
                    pytest.fail(f"{what} of {family} in {dtype}")


def test_a_large_component_hides_no_other_in_half_precision(random_model):
    model = random_model("llama", dtype=torch.bfloat16)

    def outlier(path: str, module: nn.Module) -> None:
        module.get_submodule(path).weight[3] *= 1000

    def doubled(path: str, module: nn.Module) -> None:
        outlier(path, module)
        others = torch.ones(model.spec.d_model, dtype=torch.bfloat16)
        others[5] = 2
        module.get_submodule(path).register_forward_hook(lambda _m, _a, out: out * others)

    for path, what in (("model.norm", "the final norm"), (f"{LAYER}.self_attn.o_proj", r"z @ W_O \+ b_O of layer 1")):
        check_agreement(changed(model, partial(outlier, path)))
        with pytest.raises(ModelError, match=rf"component \d+ of {what} misses .*a hook"):
            check_agreement(changed(model, partial(doubled, path)))


def test_what_begins_after_some_tokens_is_refused(random_model):
    def later(module: nn.Module) -> None:
        def scale(_m: nn.Module, _a: tuple, out: Tensor) -> Tensor:
            return torch.cat([out[:, :6], 1.5 * out[:, 6:]], dim=1)

        module.get_submodule(f"{LAYER}.self_attn.o_proj").register_forward_hook(scale)

    with pytest.raises(ModelError, match=r"z @ W_O \+ b_O of layer 1 misses"):
        check_agreement(changed(random_model("llama"), later))


def test_a_mask_that_adds_to_the_scores_is_refused(random_model):
    def sloped(module: nn.Module) -> None:
        def slope(_m: nn.Module, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            n = named["hidden_states"].shape[1] if "hidden_states" in named else args[0].shape[1]
            mask = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
            return args, named | {"attention_mask": mask}

        module.get_submodule(f"{LAYER}.self_attn").register_forward_pre_hook(slope, with_kwargs=True)

    own = changed(random_model("llama"), sloped)
    with pytest.raises(ModelError, match=r"a mask of torch.float32|an attention mask of torch.float32"):
        own.attention(torch.arange(8)[None], 1)


def test_a_weight_in_four_bits_that_shows_another_is_refused(random_model):
    model = random_model("llama")
    for path in ("model.layers.0.self_attn.o_proj", "lm_head"):

        def quantise(module: nn.Module, path: str = path) -> None:
            module.get_submodule(path).__class__ = Rounded

        with pytest.raises(ModelError, match=r"Rounded"):
            check_agreement(changed(model, quantise))


class Later(nn.Module):
    """An adapter that adds nothing until it is trained."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.b = base, nn.Parameter(torch.zeros(1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b * x.mean(-1, keepdim=True)


def test_weights_that_are_not_read_are_refused_though_they_add_nothing_yet(random_model):
    model = random_model("llama")
    cases: list[tuple[Callable[[nn.Module], Any], str]] = [
        (wrap(f"{LAYER}.self_attn.o_proj", Later), "the output projection of layer 1 has weights .*Later"),
        (wrap("model.layers.0.input_layernorm", Later), "a norm of layer 0 has weights that are not read"),
        (wrap("model.norm", Later), r"the final norm has weights that are not read \(b"),
        (lambda module: spectral_norm(module.model.layers[0].self_attn.o_proj), r"\(weight_orig\)"),
        (lambda module: prune.l1_unstructured(module.lm_head, "weight", 0.2), r"the unembedding .*\(weight_orig\)"),
    ]
    for change, message in cases:
        with torch.no_grad(), pytest.raises(ModelError, match=rf"(?s){message}.*merge the adapter"):
            check_agreement(changed(model, change))
    own = changed(model, wrap("model.layers.1.self_attn.v_proj", Later))  # W_V is read off runs
    check_agreement(own)
    before = own.W_V(1).clone()
    own.module.model.layers[1].self_attn.v_proj.b.data.add_(1)
    assert not torch.equal(own.W_V(1), before)


def test_changes_that_the_weights_show_are_read_as_they_are(random_model):
    """A parametrised weight, a hook that only looks, tied weights, an adapter of what is never read as weights."""
    model = random_model("llama")
    plain = model.W_O(1).clone()
    seen: list[Tensor] = []

    def watched(module: nn.Module) -> None:
        parametrize.register_parametrization(module.model.layers[1].self_attn.o_proj, "weight", Magnitude())
        module.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
        module.lm_head.weight = module.model.embed_tokens.weight
        module.model.layers[0].mlp.down_proj = Adapted(module.model.layers[0].mlp.down_proj)
        module.model.layers[1].self_attn.v_proj = Adapted(module.model.layers[1].self_attn.v_proj)
        module.model.layers[0].self_attn.o_proj = Adapted(module.model.layers[0].self_attn.o_proj, 0)

    own = changed(model, watched)
    check_agreement(own)
    assert seen
    torch.testing.assert_close(own.W_O(1), 1.5 * plain)
    assert not torch.equal(own.W_V(1), model.W_V(1))  # of the values as they are computed
    own.attention(torch.arange(8)[None], 1)


def test_attention_that_mixes_otherwise_is_refused_when_it_is_read_step_by_step(random_model):
    model = random_model("llama")

    def gated(module: nn.Module) -> None:
        hook("model.layers.1.self_attn.o_proj", before=True)(module)

    own = changed(model, gated)
    check_agreement(own)  # z is what the output projection reads
    tokens = torch.arange(8)[None]
    own.read(tokens, [Site("z", 1)])
    for _ in range(2):
        with pytest.raises(ModelError, match=r"(?s)z of layer 1, as pattern @ value, misses .*a hook at o_proj"):
            own.attention(tokens, 1)
        with pytest.raises(ModelError, match="z of layer 1, as pattern @ value,"):
            own.read(tokens, [Site("v", 1), Site("pattern", 1), Site("z", 1)])
    own.attention(tokens, 0)


def test_values_that_are_not_linear_are_refused(random_model):
    def squashed(module: nn.Module) -> None:
        module.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _a, out: out.tanh())

    own = changed(random_model("llama"), squashed)
    own.attention(torch.arange(8)[None], 1)
    own.W_V(0)
    with pytest.raises(ModelError, match="values of layer 1 misses"):
        own.W_V(1)


def test_values_that_differ_where_a_token_is_alone_are_refused(random_model):
    """As of a hook that steers while a model generates, a token at a time."""

    def steered(module: nn.Module) -> None:
        projection = module.model.layers[1].self_attn.v_proj
        projection.register_forward_hook(lambda _m, _a, out: out + 1 if out.shape[1] == 1 else None)

    own = changed(random_model("llama"), steered)
    own.W_V(0)
    with pytest.raises(ModelError, match=r"values of layer 1 in a sequence misses .*a hook at v_proj"):
        own.W_V(1)


def test_numbers_that_overflow_in_half_precision_are_not_held_against_a_model(random_model):
    model = random_model("llama", dtype=torch.float16)

    def large(module: nn.Module) -> None:
        module.model.layers[0].mlp.down_proj.weight.mul_(2e4)

    check_agreement(changed(model, large))
    with pytest.raises(ModelError, match="W_O"):
        check_agreement(changed(changed(model, large), wrap("model.layers.0.self_attn.o_proj")))


# ------------------------------------------------------------------------------------------------------------- loading
def test_a_wrapped_model_is_refused_where_it_is_loaded(random_model, save_model, tmp_path: Path):
    model = random_model("llama")
    folder = save_model(model, tmp_path / "model")
    fast = AutoTokenizer.from_pretrained(folder)
    load_model(model.module, tokenizer=fast)
    own = changed(model, wrap("model.layers.1.self_attn.o_proj")).module
    with pytest.raises(ModelError, match=r"(?s)z @ W_O \+ b_O of layer 1 misses .*Adapted.*merge_and_unload"):
        load_model(own, tokenizer=fast)
    load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"(?s)with an adapter, adapter_config.json.*merge the adapter first"):
        load_model(folder)


def test_attention_of_the_users_own_is_refused(random_model, save_model, tmp_path: Path):
    model = random_model("llama")
    fast = AutoTokenizer.from_pretrained(save_model(model, tmp_path / "model"))

    def halved(module, query, key, value, mask, scaling, **kwargs):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling / 2, **kwargs)

    AttentionInterface.register("halved", halved)
    AttentionMaskInterface.register("halved", sdpa_mask)
    try:
        own = copy.deepcopy(model.module)
        own.set_attn_implementation("halved")
        with pytest.raises(ModelError, match=r"(?s)attention is computed by 'halved'.*set_attn_implementation"):
            load_model(own, tokenizer=fast)
    finally:
        del AttentionInterface._global_mapping["halved"], AttentionMaskInterface._global_mapping["halved"]
    for known in ("eager", "sdpa"):
        own.set_attn_implementation(known)
        load_model(own, tokenizer=fast)
        assert own.config._attn_implementation == known


def test_a_model_of_peft_is_told_to_be_merged():
    class PeftModel(nn.Module):
        peft_config = None

    with pytest.raises(ModelError, match=r"(?s)a PeftModel.*merge the adapter first"):
        load_model(PeftModel())


def test_the_formula_of_a_norm_is_what_it_computes(random_model):
    for family in ("gpt2", "llama", "gemma2"):
        norm: Norm = random_model(family, dtype=torch.float64)._final_norm
        x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
        torch.testing.assert_close(norm.formula(x), norm.module(x), rtol=1e-6, atol=1e-6)
