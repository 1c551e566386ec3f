"""Our numbers against those of other people's programs; those that patch transformers run in a process of their own."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from cases import each
from headscope.interventions import at
from headscope.models.hf import Model
from headscope.site import KINDS, AnyKind, Site
from judging import LIKE_LLAMA, assert_same_scale, judged_by, named, of_transformerlens, random_tokens  # noqa: F401 - a fixture
from naive_model import hidden

FAMILIES = ("gpt_neox", "gpt2", *LIKE_LLAMA, "gemma3")


# ------------------------------------------------------------------------------------------------- TransformerLens 3.9
@judged_by("transformer_lens")
def test_every_site_is_that_of_transformerlens(judged: tuple[Model, Tensor, dict[str, Tensor]]) -> None:
    model, tokens, theirs = judged
    compared = set()
    for layer in range(model.spec.n_layers):
        for kind in KINDS:
            site = Site(kind, layer)
            expected = named(site, model, theirs)
            if expected is None or (kind == "ln_final_scale" and layer < model.spec.n_layers - 1):
                continue
            ours = model.read(tokens, [site])[site]
            expected = expected.flatten(2) if kind == "z" else expected
            if kind == "scores":
                unseen = hidden(model, layer, expected.shape[-1])
                assert (ours[..., unseen] == -torch.inf).all()
                ours, expected = ours[..., ~unseen], expected[..., ~unseen]
            assert_same_scale(ours, expected, 1e-5)
            compared.add(kind)
    missing = {"resid_mid"} if model.spec.parallel else set()
    missing |= {"q", "k"} if model.spec.family == "gpt_neox" else set()  # its Bridge has them unrotated only
    assert compared == set(KINDS) - missing
    assert_same_scale(model.logits(tokens), theirs["logits"], 1e-5)


def moved(value: Tensor) -> Tensor:
    return value + torch.linspace(-1, 2, value.shape[-1])


EDITS: dict[AnyKind, Any] = {
    "z": at(torch.zeros_like, positions=[3], heads=[1]),
    "pattern": lambda pattern: 0.5 * pattern + 0.1,
    **dict.fromkeys(("v", "mlp_in", "resid_pre", "attn_out", "mlp_out", "resid_post"), moved),
}


@judged_by("transformer_lens")
@each("kind", EDITS)
def test_an_edit_does_what_it_does_in_transformerlens(
    judged: tuple[Model, Tensor, dict[str, Tensor]], kind: AnyKind
) -> None:
    model, tokens, theirs = judged
    site = Site(kind, 0)
    with model.edit({site: EDITS[kind]}):
        ours = model.logits(tokens)
    assert (ours - model.logits(tokens)).abs().max() > 1e-3
    assert_same_scale(ours, theirs["edited " + site.hook_name.removeprefix("blocks.0.")], 1e-5)


# ------------------------------------------------------------------------------------------------- plain transformers
def eager(model: Model, tokens: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """z and pattern of every layer, and the logits, of a copy of the model with eager attention and torch's hooks."""
    module = copy.deepcopy(model.module)
    module.set_attn_implementation("eager")
    zs: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple) -> None:
        zs.append(args[0])

    path = {
        "gpt_neox": ("gpt_neox.layers", "attention.dense"),
        "gpt2": ("transformer.h", "attn.c_proj"),
        "gemma3": ("model.language_model.layers", "self_attn.o_proj"),
    }.get(model.spec.family, ("model.layers", "self_attn.o_proj"))
    for block in operator.attrgetter(path[0])(module):
        operator.attrgetter(path[1])(block).register_forward_pre_hook(keep)
    with torch.no_grad():
        out = module(input_ids=tokens, output_attentions=True)
    return zs, list(out.attentions), out.logits


@pytest.mark.parametrize("family", FAMILIES)
@each("shape", [(1, 1), (3, 17), (2, 64)])
def test_z_pattern_and_logits_are_those_of_plain_transformers(
    shared_model: Callable[..., Model], family: str, shape: tuple[int, int]
) -> None:
    model = shared_model(family)
    tokens = random_tokens(model, shape)
    zs, patterns, logits = eager(model, tokens)
    for layer in range(model.spec.n_layers):
        attention = model.attention(tokens, layer)
        assert_same_scale(attention.pattern, patterns[layer], 1e-5)
        assert_same_scale(attention.z, zs[layer], 1e-5)
        assert_same_scale(model.read(tokens, [Site("z", layer)])[Site("z", layer)], zs[layer], 1e-5)
    assert_same_scale(model.logits(tokens), logits, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_is_of_the_models_own_precision(random_model: Callable[..., Model], family: str) -> None:
    model = random_model(family, dtype=torch.float64)
    tokens = random_tokens(model, (2, 20))
    for layer in range(model.spec.n_layers):
        attention = model.attention(tokens, layer)
        fast = model.read(tokens, [Site("z", layer)])[Site("z", layer)]
        assert_close(attention.pattern.sum(-1), torch.ones(2, 4, 20, dtype=torch.float64), rtol=1e-10, atol=1e-10)
        mixed = torch.einsum("bhqs,bshd->bqhd", attention.pattern, attention.value).flatten(2)
        assert_close(mixed, fast, rtol=1e-10, atol=1e-10)
