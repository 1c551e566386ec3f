"""A `transformers` causal language model: read and edit what it computes, compute losses, know the weights.

The fast path is SDPA and hooks: z is the *input* of the output projection. Only a layer whose queries, keys, values,
scores or pattern are read or edited has its attention function exchanged (`attention.py`).
"""

import copy
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from headscope.errors import ModelError
from headscope.models.attention import Attention, repeat_heads
from headscope.models.families import family_of
from headscope.models.hooks import Hooks, norm_numerator, norm_scale, normed
from headscope.site import Kind, Site

_LOSS_ROWS = 512  # [rows, d_vocab] logits at a time: they stay in the cache and are never held for a whole batch
_TOKEN_ROWS = 4096  # one-token sequences at a time

Edit = Callable[[Tensor], Tensor]
"""Is given the value at a site, shaped as `Site` says, and returns what is to stand in its place, shaped alike."""

# What a configuration says that does not decide what is computed.
_NOT_COMPUTED = {"architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version", "use_cache"}


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
    parallel: bool
    """Attention and MLP both read `resid_pre`; there is no `resid_mid`."""


@dataclass(frozen=True)
class Restart:
    """A run that can be continued from a layer on, again and again: what each block from there was called with."""

    layer: int
    calls: list[tuple[tuple, dict[str, Any]]]


@runtime_checkable
class SiteEdit(Protocol):
    """An edit that must know where it is to be made; `Model.edit` asks it for the edit of its site."""

    def bind(self, site: Site, spec: ModelSpec) -> Edit:
        """The edit for this site of a model of these sizes."""
        ...


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
            parallel=getattr(config, "use_parallel_residual", False),
        )
        self._blocks = [self.family.parts(block) for block in operator.attrgetter(self.family.blocks)(module)]
        self._final_norm = operator.attrgetter(self.family.final_norm)(module)
        self._hooks = Hooks(module, self._blocks, self._final_norm)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    def replica(self) -> "Model":
        """A model that shares the weights of this one and nothing else: for another thread to run at the same time."""
        shared = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return Model(copy.deepcopy(self.module, shared), self.tokenizer, self.bos, self.spec.name)

    def fingerprint(self) -> str:
        """`sha256:<hex>` of all that decides what the model computes: its configuration, BOS, weights and buffers."""
        config = {k: v for k, v in self.module.config.to_dict().items() if k not in _NOT_COMPUTED and k[0] != "_"}
        digest = hashlib.sha256(json.dumps([config, self.bos], sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(raw.numpy())
        return f"sha256:{digest.hexdigest()}"

    # ------------------------------------------------------------------------------------------------------- reading
    def check_layer(self, layer: int) -> None:
        """Raise ModelError when the model has no such layer."""
        if not 0 <= layer < self.spec.n_layers:
            raise ModelError(
                f"layer {layer} of {self.spec.name}",
                expected=f"0 to {self.spec.n_layers - 1}: the model has {self.spec.n_layers} layers",
                do="pass another --layer",
            )

    def check_site(self, site: Site) -> None:
        """Raise ModelError when the model has no such site."""
        self.check_layer(site.layer)
        last = self.spec.n_layers - 1
        if site.kind == "ln_final_scale" and site.layer != last:
            raise ModelError(
                f"the final norm's scale in layer {site.layer} of {self.spec.name}",
                expected=f"layer {last}, the last, after which that norm stands",
                do=f"name Site('ln_final_scale', {last})",
            )
        if site.kind == "resid_mid" and self.spec.parallel:
            raise ModelError(
                f"resid_mid of {self.spec.name}, whose attention and MLP stand side by side",
                expected="a site that parallel blocks have: both read resid_pre and add to it",
                do="use resid_pre, mlp_in or resid_post",
            )

    def width(self, site: Site) -> int:
        """Components of the vectors at a site of SAEs.

        Raises:
            ModelError: a site where no SAE can sit.
        """
        if site.kind not in get_args(Kind):
            raise ModelError(
                f"an SAE of {site.kind}", expected=f"one of {', '.join(get_args(Kind))}", do="pass another --site"
            )
        return self.spec.n_heads * self.spec.d_head if site.kind == "z" else self.spec.d_model

    @torch.no_grad()
    def read(self, tokens: Int[Tensor, "batch position"], sites: Sequence[Site]) -> dict[Site, Float[Tensor, "..."]]:
        """Activations at some sites, shaped as `Site` says; the run stops after the deepest one.

        Within `edit` blocks a site that is edited is read as edited.

        Raises:
            ModelError: a site that the model does not have.
        """
        return self._read(tokens, sites)

    def attention(self, tokens: Int[Tensor, "batch position"], layer: int) -> Attention:
        """Pattern, value and z of one layer, computed explicitly; the run stops at z.

        Raises:
            ModelError: a layer that does not exist.
        """
        return self.attentions(tokens, [layer])[layer]

    @torch.no_grad()
    def attentions(self, tokens: Int[Tensor, "batch position"], layers: Sequence[int]) -> dict[int, Attention]:
        """Pattern, value and z of several layers in one run, which stops at the last of them.

        Raises:
            ModelError: a layer that does not exist.
        """
        found = self._read(tokens, [Site(kind, layer) for layer in layers for kind in ("v", "pattern", "z")])
        return {
            layer: Attention(
                pattern=found[Site("pattern", layer)],
                value=repeat_heads(found[Site("v", layer)], self.spec.n_heads),
                z=found[Site("z", layer)],
            )
            for layer in layers
        }

    def _read(self, tokens: Tensor, sites: Sequence[Site], **inputs: Tensor) -> dict[Site, Tensor]:
        for site in sites:
            self.check_site(site)
        found: dict[Site, Tensor] = {}
        deepest = max(sites, key=lambda site: site.depth, default=None)
        if deepest is None:
            return found

        def keep(site: Site) -> Callable[[Tensor], None]:
            def record(value: Tensor) -> None:
                found[site] = value
                if site == deepest:
                    raise _Stop

            return record

        with self._hooks.at({site: keep(site) for site in sites}), suppress(_Stop):
            self._body(tokens, **inputs)
        return found

    # ------------------------------------------------------------------------------------------------------- running
    @contextmanager
    def edit(self, edits: Mapping[Site, Edit | SiteEdit]) -> Iterator[None]:
        """Within the block, each run replaces the value at a site by the function of it; what follows is changed too.

        Blocks nest: at one site the outer block's edit comes first, the inner one is given its result. Of edits at
        different sites the one that is computed first comes first (`AnyKind` is in that order). A scale is edited by
        dividing the norm's output by the one and multiplying it by the other. Scores are edited with the mask in
        them: where an edit writes over minus infinity, a query sees its future.

        The model is bit-identical afterwards, also when the block raised.

        Raises:
            ModelError: a site that the model does not have; in a run, an edit that returns another shape or type.
        """
        for site in edits:
            self.check_site(site)
        functions = {s: e.bind(s, self.spec) if isinstance(e, SiteEdit) else e for s, e in edits.items()}
        with self._hooks.at(functions):
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
        return self._next_losses(self._body(tokens) if restart is None else self._continue(restart), tokens)

    def _next_losses(self, normed: Float[Tensor, "batch position d_model"], tokens: Tensor) -> Tensor:
        return self._losses_of(normed[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).view(tokens.shape[0], -1)

    def _losses_of(self, normed: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        chunks = [
            nn.functional.cross_entropy(self._unembedding(h), t, reduction="none")
            for h, t in zip(normed.split(_LOSS_ROWS), targets.split(_LOSS_ROWS), strict=True)
        ]
        return torch.cat(chunks)

    def loss_gradient(self, tokens: Int[Tensor, "batch position"], site: Site) -> Float[Tensor, "batch position d"]:
        """Gradient of the summed losses of a batch by the value at a site of the residual stream, or by z.

        At [b, q] it is of the losses at q and all later positions of row b, which are all that the value can reach.

        Raises:
            ModelError: a site that the model does not have.
        """
        leaves: list[Tensor] = []

        def watch(value: Tensor) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad(), self.edit({site: watch}):
            total = self._next_losses(self._body(tokens), tokens).sum()
            return torch.autograd.grad(total, leaves[0])[0]

    # --------------------------------------------------------------------------------------- the end of a run, by rows
    @torch.no_grad()
    def mlp(
        self, layer: int, x: Float[Tensor, "row d_model"], scale: Float[Tensor, "row 1"] | None = None
    ) -> Float[Tensor, "row d_model"]:
        """What a layer's MLP, with the norm before it, puts out for given inputs; edits play no part.

        Args:
            layer: whose MLP.
            x: what the norm reads: `mlp_in`.
            scale: what the norm divides by, instead of what it would.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        part = self._blocks[layer]
        with self._hooks.suspended():
            return part.mlp(normed(part.mlp_norm, x, scale)[None])[0]

    @torch.no_grad()
    def final_losses(
        self,
        residual: Float[Tensor, "row d_model"],
        targets: Int[Tensor, " row"],
        scale: Float[Tensor, "row 1"] | None = None,
    ) -> Float[Tensor, " row"]:
        """Cross-entropy of predicting some tokens from the final residual stream, `resid_post` of the last layer.

        Args:
            residual: before the final norm.
            targets: the token that follows each.
            scale: what the final norm divides by, instead of what it would; edits play no part.
        """
        with self._hooks.suspended():
            return self._losses_of(normed(self._final_norm, residual, scale), targets)

    def final_parts(
        self, residual: Float[Tensor, "row d_model"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row 1"]]:
        """(c, sigma): what the final norm divides, and by what.

        `logits = c / sigma @ logit_directions + logit_bias`, but for a constant in each row.
        """
        return norm_numerator(self._final_norm, residual), norm_scale(self._final_norm, residual)

    @contextmanager
    def restartable(self, layer: int) -> Iterator[Restart]:
        """The one run made within the block can be continued from a layer on afterwards.

        What was edited before the layer stays edited; at the layer and after it, the edits that hold when it is
        continued are made.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        restart = Restart(layer, [])

        def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            restart.calls.append((args, kwargs))

        handles = [
            part.block.register_forward_pre_hook(keep, with_kwargs=True, prepend=True) for part in self._blocks[layer:]
        ]
        try:
            yield restart
        finally:
            for handle in handles:
                handle.remove()

    def _continue(self, restart: Restart) -> Tensor:
        """As `_body`, from the input of a block on."""
        hidden = restart.calls[0][0][0]
        for part, (args, kwargs) in zip(self._blocks[restart.layer :], restart.calls, strict=True):
            hidden = part.block(hidden, *args[1:], **kwargs)
        return self._final_norm(hidden)

    def _body(self, tokens: Tensor, **inputs: Tensor) -> Tensor:
        """Everything but the unembedding: the normed final residual stream."""
        return self.module.base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state

    # ------------------------------------------------------------------------------------------------------- weights
    def W_O(self, layer: int) -> Float[Tensor, "z d_model"]:  # noqa: N802 - the field's name
        """Output projection of a layer: `attn_out = z @ W_O + b_O`."""
        self.check_layer(layer)
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

    @cached_property
    def logit_bias(self) -> Float[Tensor, " d_vocab"]:
        """The part of the logits that no residual stream makes: the final norm's bias through W_U, and b_U."""
        bias = torch.zeros(self.spec.d_vocab, dtype=self.module.dtype, device=self.device)
        norm_bias = getattr(self._final_norm, "bias", None)
        if norm_bias is not None:
            bias = bias + norm_bias @ self._unembedding.weight.T
        return bias if self._unembedding.bias is None else bias + self._unembedding.bias

    def _output_projection(self, layer: int) -> nn.Module:
        return self._blocks[layer].output_projection

    def b_O(self, layer: int) -> Float[Tensor, " d_model"]:  # noqa: N802 - the field's name
        """Bias of the output projection of a layer; zero for models without one."""
        self.check_layer(layer)
        bias = getattr(self._output_projection(layer), "bias", None)
        return torch.zeros(self.spec.d_model, dtype=self.module.dtype, device=self.device) if bias is None else bias

    def value_offset(self, layer: int) -> Float[Tensor, " z"]:
        """The constant part of z: `c = b_V + b_ln1 @ W_V`, one block a head; zero for models without these biases.

        Attention weights sum to 1, so c is part of every z. TransformerLens' processed z is `z - c`. It is read off
        the model itself: the value vector when the norm before attention puts out its own bias. Edits play no part.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        bias = getattr(self._blocks[layer].attention_norm, "bias", None)
        return self._value_of(layer, torch.zeros(self.spec.d_model) if bias is None else bias)

    def W_V(self, layer: int) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802 - the field's name
        """Value weights of each query head, the gain of the norm before attention folded in.

        `value = centre(resid_pre) / ln1_scale @ W_V + c`, c as `value_offset` has it; RMSNorm does not centre. Query
        heads that share a value head have the same weights. Read off the model itself; edits play no part.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        gain = getattr(self._blocks[layer].attention_norm, "weight", None)
        width, dtype = self.spec.d_model, self.module.dtype
        basis = torch.diag(torch.ones(width, dtype=dtype, device=self.device) if gain is None else gain)
        values = self._value_of(layer, basis) - self._value_of(layer, torch.zeros_like(basis[0]))
        return values.view(width, self.spec.n_heads, self.spec.d_head).transpose(0, 1)

    def centred(self, layer: int, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the norm before a layer's attention divides: x less its mean for LayerNorm, x itself for RMSNorm.

        In float32 at least. It is a symmetric projection, so it also carries a direction that is read behind the norm
        back to before it.
        """
        self.check_layer(layer)
        return norm_numerator(self._blocks[layer].attention_norm, x)

    @torch.no_grad()
    def queries_and_keys(
        self,
        tokens: Int[Tensor, " position"],
        layer: int,
        parts: Float[Tensor, "part position d_model"],
        scale: Float[Tensor, "position 1"],
    ) -> tuple[Float[Tensor, "rows position head d_head"], Float[Tensor, "rows position head d_head"]]:
        """What the queries and keys of a layer owe to parts of `resid_pre`, what the norm divides by held.

        Each part goes through the model's own projections and rotation, without their biases; the last row is what
        biases make (the norm's and the projection's, rotated). Queries and keys that are linear in what the norm puts
        out are the sums over rows. Shared keys are repeated for each of their query heads. Edits play no part.

        Args:
            tokens: a sequence, for its positions alone.
            layer: whose queries and keys.
            parts: of its input.
            scale: `ln1_scale` of the layer.

        Raises:
            ModelError: a layer that does not exist.
        """
        norm = self._blocks[layer].attention_norm
        gain, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        normed = self.centred(layer, parts) / scale
        normed = normed.to(self.module.dtype) if gain is None else (normed * gain).to(self.module.dtype)
        rows = torch.cat([normed, torch.zeros_like(normed[:1])])
        rows = rows if bias is None else rows + bias
        found: dict[Site, Tensor] = {}
        sites = Site("q", layer), Site("k", layer)

        def stop(value: Tensor) -> None:
            found[sites[1]] = value
            raise _Stop

        with self._hooks.suspended():
            with self.restartable(layer) as restart:
                self._read(tokens[None], [Site("resid_pre", layer)])
            handle = norm.register_forward_hook(lambda _module, _args, _output: rows)
            try:
                args, kwargs = restart.calls[0]
                functions = {sites[0]: lambda value: found.update({sites[0]: value}), sites[1]: stop}
                with self._hooks.at(functions), suppress(_Stop):
                    self._blocks[layer].block(rows, *args[1:], **kwargs)
            finally:
                handle.remove()
        q, k = found[sites[0]], repeat_heads(found[sites[1]], self.spec.n_heads)
        q, k = (torch.cat([value[:-1] - value[-1], value[-1:]]) for value in (q, k))
        return q, k

    @torch.no_grad()
    def _value_of(self, layer: int, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch z"]:
        """The values that a layer makes of what the norm before it puts out: z where a token sees only itself."""
        rows = normed.view(-1, self.spec.d_model).to(self.device, self.module.dtype)
        norm = self._blocks[layer].attention_norm
        handle = norm.register_forward_hook(lambda _module, _args, _output: rows[:, None])
        try:
            with self._hooks.suspended():
                tokens = torch.full((len(rows), 1), self.bos, device=self.device)
                return self._read(tokens, [Site("z", layer)])[Site("z", layer)].view(*normed.shape[:-1], -1)
        finally:
            handle.remove()

    @torch.no_grad()
    def token_values(
        self, layer: int, tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "token head d_head"]:
        """The value vector that each token alone makes, for each query head: what a static copying table needs.

        Each token is a sequence of its own, run through the layers before this one at a position in the middle of
        the context (a learned embedding of position 0 is another thing), so its attention is all to itself. b_V
        included. Edits play no part.

        Args:
            layer: whose values.
            tokens: which tokens; the whole vocabulary if None.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        tokens = torch.arange(self.spec.d_vocab) if tokens is None else tokens
        site, parts = Site("z", layer), []
        with self._hooks.suspended():
            for chunk in tokens.to(self.device).split(_TOKEN_ROWS):
                alone = chunk[:, None]
                middle = torch.full_like(alone, self.spec.context // 2)
                parts.append(self._read(alone, [site], position_ids=middle)[site])  # z is v where s = q alone
        return torch.cat(parts).view(-1, self.spec.n_heads, self.spec.d_head)
