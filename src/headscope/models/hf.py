"""A `transformers` causal language model: read z and other sites, edit a run, compute losses, know the weights.

The fast path is SDPA and a pre-hook on the output projection, whose input *is* z. The explicit path swaps one layer's
attention function for one that computes pattern and z step by step, so that they can be read.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from headscope.errors import ModelError
from headscope.models.families import family_of
from headscope.site import Site

_IMPLEMENTATION = "headscope"
_DEPTH = {"resid_pre": 0, "z": 1, "attn_out": 2, "mlp_out": 3}
_LOSS_ROWS = 512  # [rows, d_vocab] logits at a time: they stay in the cache and are never held for a whole batch


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model."""

    name: str
    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    context: int
    """Longest sequence the model was made for, in tokens."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention, step by step: `z[b, q, h] = sum_s pattern[b, h, q, s] value[b, s, h]`."""

    pattern: Float[Tensor, "batch head query source"]
    value: Float[Tensor, "batch source head d_head"]
    """b_V included; shared value heads are repeated for each of their query heads."""
    z: Float[Tensor, "batch query z"]
    """Heads concatenated head-major: the input of the output projection."""


@dataclass(frozen=True)
class Restart:
    """A run that can be continued from a layer on, again and again: what each block from there was called with."""

    layer: int
    calls: list[tuple[tuple, dict[str, Any]]]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised by the hook of the deepest site asked for: nothing after it is computed."""


class Model:
    """One interface for every backend; this one holds a `transformers` model in evaluation mode."""

    def __init__(self, module: PreTrainedModel, tokenizer: Tokenizer, bos: int, name: str) -> None:
        """Wrap a loaded model; use `headscope.load_model` to load one.

        Raises:
            ModelError: the family is not known, or there is no unembedding.
        """
        config = module.config
        self.family = family_of(config.model_type)
        self.module, self.tokenizer, self.bos = module.eval(), tokenizer, bos
        self.module.requires_grad_(False)
        self.module.set_attn_implementation("sdpa")
        unembedding = module.get_output_embeddings()
        if not isinstance(unembedding, nn.Linear):
            raise ModelError(
                f"{name} has no linear unembedding", expected="a causal language model", do="pass another --model"
            )
        self._unembedding = unembedding
        heads = config.num_attention_heads
        self.spec = ModelSpec(
            name=name,
            family=config.model_type,
            n_layers=config.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            d_model=config.hidden_size,
            d_vocab=unembedding.out_features,
            context=config.max_position_embeddings,
        )
        self._blocks = operator.attrgetter(self.family.blocks)(module)
        self._final_norm = operator.attrgetter(self.family.final_norm)(module)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    # ------------------------------------------------------------------------------------------------------- reading
    def check_layer(self, layer: int) -> None:
        """Raise ModelError when the model has no such layer."""
        if not 0 <= layer < self.spec.n_layers:
            raise ModelError(
                f"layer {layer} of {self.spec.name}",
                expected=f"0 to {self.spec.n_layers - 1}: the model has {self.spec.n_layers} layers",
                do="pass another --layer",
            )

    def width(self, site: Site) -> int:
        """Components of a site's vectors."""
        return self.spec.n_heads * self.spec.d_head if site.kind == "z" else self.spec.d_model

    @torch.no_grad()
    def read(
        self, tokens: Int[Tensor, "batch position"], sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "batch position d"]]:
        """Activations at some sites; the run stops after the deepest one.

        Raises:
            ModelError: a layer that does not exist.
        """
        found: dict[Site, Tensor] = {}
        deepest = max(sites, key=lambda s: (s.layer, _DEPTH[s.kind]))

        def keep(site: Site) -> Callable[[Tensor], None]:
            def record(value: Tensor) -> None:
                found[site] = value
                if site == deepest:
                    raise _Stop

            return record

        with self._hooked({site: keep(site) for site in sites}), suppress(_Stop):
            self._body(tokens)
        return found

    @torch.no_grad()
    def attention(self, tokens: Int[Tensor, "batch position"], layer: int) -> Attention:
        """Pattern, value and z of one layer, computed explicitly; the run stops at z.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        module = self._attention(layer)
        self.module.set_attn_implementation(_IMPLEMENTATION)
        _recording[module] = record = {}
        try:
            z = self.read(tokens, [Site("z", layer)])[Site("z", layer)]
        finally:
            del _recording[module]
            self.module.set_attn_implementation("sdpa")
        return Attention(record["pattern"], record["value"], z)

    # ------------------------------------------------------------------------------------------------------- running
    @contextmanager
    def edit(self, edits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Within the block, each run replaces the value `[batch, position, d]` at a site by the function of it.

        The model is bit-identical afterwards, also when the block raised.

        Raises:
            ModelError: a layer that does not exist.
        """
        with self._hooked(edits):
            yield

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_vocab"]:
        """Next-token logits."""
        return self.module(input_ids=tokens, use_cache=False).logits

    @torch.no_grad()
    def losses(
        self, tokens: Int[Tensor, "batch position"], restart: Restart | None = None
    ) -> Float[Tensor, "batch predicting"]:
        """Cross-entropy in nats of predicting token t+1 at t, for all positions but the last.

        With `restart`, from a run on the same tokens, only its layer and later ones are computed again.
        """
        hidden = (self._body(tokens) if restart is None else self._continue(restart))[:, :-1].flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        chunks = [
            nn.functional.cross_entropy(self._unembedding(h), t, reduction="none")
            for h, t in zip(hidden.split(_LOSS_ROWS), targets.split(_LOSS_ROWS), strict=True)
        ]
        return torch.cat(chunks).view(tokens.shape[0], -1)

    @contextmanager
    def restartable(self, layer: int) -> Iterator[Restart]:
        """The one run made within the block can be continued from a layer on afterwards.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        restart = Restart(layer, [])

        def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            restart.calls.append((args, kwargs))

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self._blocks[layer:]]
        try:
            yield restart
        finally:
            for handle in handles:
                handle.remove()

    def _continue(self, restart: Restart) -> Tensor:
        """As `_body`, from the input of a block on."""
        hidden = restart.calls[0][0][0]
        for block, (args, kwargs) in zip(self._blocks[restart.layer :], restart.calls, strict=True):
            output = block(hidden, *args[1:], **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return self._final_norm(hidden)

    def _body(self, tokens: Tensor) -> Tensor:
        """Everything but the unembedding: the normed final residual stream."""
        return self.module.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    # ------------------------------------------------------------------------------------------------------- weights
    def W_O(self, layer: int) -> Float[Tensor, "z d_model"]:  # noqa: N802 - the field's name
        """Output projection of a layer: `attn_out = z @ W_O + b_O`."""
        weight: Tensor = self._output_projection(layer).weight  # pyright: ignore[reportAssignmentType]
        return weight if self.family.transposed else weight.T

    @cached_property
    def logit_directions(self) -> Float[Tensor, "d_model d_vocab"]:
        """What a residual direction adds to the logits when the final norm's scale is 1: `centre(u) * gain @ W_U`.

        The final norm's gain and (for LayerNorm) centring are folded in, its scale is left out, and the result is
        centred over the vocabulary, to which softmax is blind. So TransformerLens' processed `W_U`.
        """
        norm = self._final_norm
        folded = norm.weight[:, None] * self._unembedding.weight.T
        if isinstance(norm, nn.LayerNorm):
            folded = folded - folded.mean(0)
        return folded - folded.mean(1, keepdim=True)

    def value_offset(self, layer: int) -> Float[Tensor, " z"]:
        """The constant part of z: `c = b_V + b_ln1 @ W_V`, one block a head; zero for models without these biases.

        Attention weights sum to 1, so c is part of every z. TransformerLens' processed z is `z - c`. It is read off
        the model itself: the value vector when the norm before attention puts out its own bias.
        """
        self.check_layer(layer)
        norm = operator.attrgetter(self.family.attention_norm)(self._blocks[layer])
        bias = getattr(norm, "bias", None)

        def constant(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return torch.zeros_like(output) if bias is None else bias.expand_as(output)

        handle = norm.register_forward_hook(constant)
        try:
            token = torch.tensor([[self.bos]], device=self.device)
            return self.read(token, [Site("z", layer)])[Site("z", layer)][0, 0]
        finally:
            handle.remove()

    # --------------------------------------------------------------------------------------------------------- hooks
    def _attention(self, layer: int) -> nn.Module:
        return operator.attrgetter(self.family.attention)(self._blocks[layer])

    def _output_projection(self, layer: int) -> nn.Module:
        return operator.attrgetter(self.family.output_projection)(self._attention(layer))

    @contextmanager
    def _hooked(self, functions: Mapping[Site, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """Call each function with the value at its site; what it returns, unless None, replaces the value."""
        for site in functions:
            self.check_layer(site.layer)
        handles = [self._hook(site, function) for site, function in functions.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: Site, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            value = function(args[0])
            return None if value is None else ((value, *args[1:]), kwargs)

        def after(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
            return function(output)

        match site.kind:
            case "z":
                return self._output_projection(site.layer).register_forward_pre_hook(before, with_kwargs=True)
            case "attn_out":
                return self._output_projection(site.layer).register_forward_hook(after)
            case "mlp_out":
                mlp = operator.attrgetter(self.family.mlp)(self._blocks[site.layer])
                return mlp.register_forward_hook(after)
            case "resid_pre":
                return self._blocks[site.layer].register_forward_pre_hook(before, with_kwargs=True)


_recording: dict[nn.Module, dict[str, Tensor]] = {}  # attention modules to record, filled by Model.attention


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`transformers`' attention function: step by step for a module that is recorded, SDPA for all others."""
    record = _recording.get(module)
    if record is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))  # [batch, head, source, d_head]
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, :, : key.shape[2]]
    precise = torch.promote_types(scores.dtype, torch.float32)
    pattern = scores.softmax(-1, dtype=precise).to(query.dtype)
    record["pattern"], record["value"] = pattern, value.transpose(1, 2)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


AttentionInterface.register(_IMPLEMENTATION, _recording_attention)
AttentionMaskInterface.register(_IMPLEMENTATION, eager_mask)
