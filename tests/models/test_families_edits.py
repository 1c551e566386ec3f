"""Each row of the table of families: reads and edits are those of torch's own hooks on the modules it names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.hooks import RemovableHandle

from cases import each
from headscope.interventions import at
from headscope.models.families import FAMILIES
from headscope.models.hf import Model
from headscope.site import AnyKind, Site


def turned(value: Tensor) -> Tensor:
    return 1.5 * value.roll(1, 1) + 0.3


def hooked(model: Model, kind: AnyKind, layer: int, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """The same edit by hooks of torch."""
    part = model.family.parts(model.module.get_submodule(f"{model.family.blocks}.{layer}"))

    def before(_module: nn.Module, args: tuple) -> tuple:
        return (edit(args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return edit(output)

    return {
        "resid_pre": lambda: part.block.register_forward_pre_hook(before),
        "z": lambda: part.output_projection.register_forward_pre_hook(before),
        "attn_out": lambda: part.attention_out.register_forward_hook(after),
        "mlp_out": lambda: part.mlp_out.register_forward_hook(after),
        "resid_post": lambda: part.block.register_forward_hook(after),
    }[kind]()


@pytest.mark.parametrize("family", FAMILIES)
@each("kind", ["resid_pre", "z", "attn_out", "mlp_out", "resid_post"])
@each("layer", [0, 1])
def test_an_edit_is_what_a_hook_of_torch_does(
    shared_model: Callable[..., Model], family: str, kind: AnyKind, layer: int
) -> None:
    model = shared_model(family, dtype=torch.float64)
    tokens = torch.randint(1, model.spec.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(3, 9, 1, dtype=torch.bool)
    chosen[1, 4] = True
    clean = model.logits(tokens)
    handle = hooked(model, kind, layer, lambda value: torch.where(chosen, turned(value), value))
    expected = model.logits(tokens)
    handle.remove()
    with model.edit({Site(kind, layer): at(turned, rows=1, positions=4)}):
        assert_close(model.logits(tokens), expected, atol=1e-10, rtol=1e-10)
    assert (expected - clean)[1, 4:].abs().max() > 1e-3
    assert torch.equal(expected[[0, 2]], clean[[0, 2]])
    assert torch.equal(model.logits(tokens), clean)
