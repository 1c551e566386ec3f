"""Functions at the sites of a running model.

One table holds the functions of every site; torch's hooks only look it up. So functions run in a fixed order, however
they were added: the outer block's before the inner block's, and of two sites in one module the one that is computed
first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from headscope.errors import ModelError
from headscope.models.attention import ATTENTION_KINDS, Steps, watching
from headscope.models.families import Block
from headscope.models.norms import Norm
from headscope.site import AnyKind, Site

Function = Callable[[Tensor], Tensor | None]
"""Takes the value at a site; its result, unless None, replaces the value."""

_Point = Literal["block in", "norm 1", "z", "attention", "norm 2 in", "norm 2", "mlp", "block out", "final norm"]

_POINTS: dict[AnyKind, tuple[_Point, ...]] = {
    "resid_pre": ("block in",),
    "ln1_scale": ("norm 1",),
    "z": ("z",),
    "attn_out": ("attention",),
    "resid_mid": ("norm 2 in", "mlp", "block out"),
    "mlp_in": ("norm 2 in",),
    "ln2_scale": ("norm 2",),
    "mlp_out": ("mlp",),
    "resid_post": ("block out",),
    "ln_final_scale": ("final norm",),
}
"""The module inputs and outputs to hook for a kind; kinds inside the attention function need none."""


class Hooks:
    """The hooked sites of one model, with their current functions."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], final_norm: Norm) -> None:
        """Start without functions."""
        self._model, self._blocks, self._final_norm = model, blocks, final_norm
        self._functions: dict[Site, tuple[Function, ...]] = {}
        self._hooked: set[tuple[_Point, int]] = set()
        self._after_edited_mid: dict[int, Tensor] = {}  # by layer: the residual stream after an edit of resid_mid

    @contextmanager
    def at(self, functions: Mapping[Site, Function]) -> Iterator[None]:
        """Within the block, each run calls these functions, after those of enclosing blocks.

        All hooks are removed afterwards, also when the block raised.
        """
        outer, hooked, after = self._functions, self._hooked, self._after_edited_mid
        points: set[tuple[_Point, int]] = {(p, site.layer) for site in functions for p in _POINTS.get(site.kind, ())}
        points -= hooked
        with ExitStack() as stack:
            stack.callback(self._set, outer, hooked, after)
            for point, layer in points:
                stack.callback(self._hook(point, layer).remove)
            self._set(outer | {s: (*outer.get(s, ()), f) for s, f in functions.items()}, hooked | points, {})
            stack.enter_context(watching(self._model, self._steps(functions)))
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block no function is called."""
        outer, self._functions = self._functions, {}
        try:
            yield
        finally:
            self._functions = outer

    def _set(
        self, functions: dict[Site, tuple[Function, ...]], hooked: set[tuple[_Point, int]], after: dict[int, Tensor]
    ) -> None:
        self._functions, self._hooked, self._after_edited_mid = functions, hooked, after

    def _steps(self, functions: Mapping[Site, Function]) -> dict[nn.Module, Steps]:
        """Return the functions for attention modules, for the layers of these functions."""
        layers = {site.layer for site in functions if site.kind in ATTENTION_KINDS}
        return {
            self._blocks[layer].attention: {
                kind: partial(self._run, Site(kind, layer))
                for kind in ATTENTION_KINDS
                if Site(kind, layer) in self._functions
            }
            for layer in layers
        }

    def _run(self, site: Site, value: Tensor) -> Tensor:
        """Return the value at a site, or its replacement."""
        for function in self._functions.get(site, ()):
            edited = function(value)
            if edited is not None:
                check_like(edited, value, site)
                value = edited
        return value

    # ------------------------------------------------------------------------------------------------ torch's hooks
    def _hook(self, point: _Point, layer: int) -> RemovableHandle:
        block = self._blocks[layer]
        match point:
            case "block in":
                return block.block.register_forward_pre_hook(self._first_argument("resid_pre", layer))
            case "norm 1":
                return self._norm(block.attention_norm, "ln1_scale", layer)
            case "z":
                return block.output_projection.register_forward_pre_hook(self._first_argument("z", layer))
            case "attention":
                return block.attention_out.register_forward_hook(self._output("attn_out", layer))
            case "norm 2 in":
                return block.mlp_norm.module.register_forward_pre_hook(self._into_mlp(layer))
            case "norm 2":
                return self._norm(block.mlp_norm, "ln2_scale", layer)
            case "mlp":
                return block.mlp_out.register_forward_hook(self._mlp(layer))
            case "block out":
                return block.block.register_forward_hook(self._block(layer))
            case "final norm":
                return self._norm(self._final_norm, "ln_final_scale", layer)

    def _first_argument(self, kind: AnyKind, layer: int) -> Callable[..., tuple]:
        site = Site(kind, layer)

        def hook(_module: nn.Module, args: tuple) -> tuple:
            return self._run(site, args[0]), *args[1:]

        return hook

    def _output(self, kind: AnyKind, layer: int) -> Callable[..., Tensor]:
        site = Site(kind, layer)

        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            return self._run(site, output)

        return hook

    def _norm(self, norm: Norm, kind: AnyKind, layer: int) -> RemovableHandle:
        site = Site(kind, layer)

        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            scale = norm.scale(args[0])
            edited = self._run(site, scale)
            return output if edited is scale else norm.rescaled(output, scale / edited)

        return norm.module.register_forward_hook(hook)

    def _into_mlp(self, layer: int) -> Callable[..., tuple]:
        """Handle resid_mid and mlp_in: one tensor of the model, to which the MLP's output is also added."""
        mid_site, in_site = Site("resid_mid", layer), Site("mlp_in", layer)

        def hook(_module: nn.Module, args: tuple) -> tuple:
            mid = self._run(mid_site, args[0])
            self._after_edited_mid.pop(layer, None)
            if mid is not args[0]:
                self._after_edited_mid[layer] = mid  # to which the MLP's output is still to be added
            return self._run(in_site, mid), *args[1:]

        return hook

    def _mlp(self, layer: int) -> Callable[..., Tensor]:
        site = Site("mlp_out", layer)

        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            output = self._run(site, output)
            if layer in self._after_edited_mid:
                self._after_edited_mid[layer] = self._after_edited_mid[layer] + output
            return output

        return hook

    def _block(self, layer: int) -> Callable[..., Tensor]:
        site = Site("resid_post", layer)

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return self._run(site, self._after_edited_mid.pop(layer, output))

        return hook


def check_like(edited: Tensor, value: Tensor, site: Site) -> None:
    """Reject the result of an edit unless its shape and type match its input.

    Raises:
        ModelError: they do not.
    """
    if edited.shape != value.shape or edited.dtype != value.dtype:
        raise ModelError(
            f"an edit of {site.kind} of layer {site.layer} that returns {edited.dtype} {tuple(edited.shape)}",
            expected=f"{value.dtype} {tuple(value.shape)}, as the value it was given",
            do="return a value of that shape and type",
        )
