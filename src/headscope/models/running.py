"""Run a `transformers` causal language model: read and edit activations at any site, and compute losses.

The fast path is SDPA and hooks: z is the *input* of the output projection. The attention function is replaced
(`attention.py`) only in layers whose queries, keys, values, scores or pattern are read or edited, and in every layer of
a model that caps its scores, which SDPA cannot.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from headscope.errors import ModelError
from headscope.models.agreement import check_attention, not_plain
from headscope.models.attention import ATTENTION_KINDS, IMPLEMENTATION, Attention, repeat_heads
from headscope.models.families import family_of
from headscope.models.hooks import Hooks
from headscope.models.norms import Norm
from headscope.models.settings import check_settings
from headscope.models.spec import Edit, ModelSpec, Restart, SiteEdit
from headscope.models.tokens import TokenCheck
from headscope.site import Kind, Site, no_layer

_LOSS_ROWS = 512  # [rows, d_vocab] logits at a time: they stay in the cache and are never stored for a whole batch


class Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised by the hook of the deepest requested site: nothing after it is computed."""


class Running:
    """The forward pass of a loaded model; `headscope.models.hf.Model` adds its weights."""

    def __init__(self, module: PreTrainedModel, tokenizer: Tokenizer, bos: int, name: str) -> None:
        """Wrap a loaded model; use `headscope.load_model` to load one.

        Raises:
            ModelError: the family is unknown, a setting is unsupported, or there is no unembedding or output projection
                with weights.
        """
        self.family = family_of(module.config.model_type)
        check_settings(module.config, name)
        self.module, self.tokenizer, self.bos = module.eval(), tokenizer, bos
        self.module.requires_grad_(False)
        unembedding = module.get_output_embeddings()
        if not isinstance(unembedding, nn.Linear):
            found = "no unembedding" if unembedding is None else f"{type(unembedding).__name__} as its unembedding"
            raise ModelError(
                f"{name} has {found}",
                expected="a causal language model with a linear layer there, of which W_U is read",
                do="pass another model, or merge the adapter into its weights (PEFT: merge_and_unload)",
            )
        self._unembedding = unembedding
        self._blocks = [self.family.parts(block) for block in operator.attrgetter(self.family.blocks)(module)]
        for block in self._blocks:
            if not isinstance(getattr(block.output_projection, "weight", None), Tensor):
                raise not_plain(name, "an output projection has no weights", block.output_projection)
        self._final_norm = Norm(operator.attrgetter(self.family.final_norm)(module), self.family.gain_from_one)
        self.spec = ModelSpec.of(module, name, self.family, self._blocks[0])
        self.module.set_attn_implementation(IMPLEMENTATION if self.family.scores_capped else "sdpa")
        self._hooks = Hooks(module, self._blocks, self._final_norm)
        embedding: nn.Module = module.get_input_embeddings()
        n_ids = min(self.spec.d_vocab, len(embedding.weight))  # pyright: ignore[reportArgumentType]
        self.check_tokens = TokenCheck(name, self.spec.context, n_ids)
        """Rejects tokens that the model cannot read; called before each run."""
        self._mixed: set[int] = set()  # layers whose attention was checked against the weights
        self._checking = False  # a run that does so is not the user's

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.module.device

    # ------------------------------------------------------------------------------------------------------- reading
    def check_layer(self, layer: int) -> None:
        """Raise ModelError when the model has no such layer."""
        if not 0 <= layer < self.spec.n_layers:
            raise no_layer(self.spec.name, layer, self.spec.n_layers)

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
        if site.kind not in self.spec.kinds:
            parallel = "whose attention and MLP stand side by side: both read resid_pre and add to it"
            raise ModelError(
                f"{site.kind} of {self.spec.name}, " + (parallel if self.spec.parallel else "which has no MLPs"),
                expected=f"one of its sites: {', '.join(self.spec.kinds)}",
                do="use resid_pre, mlp_in or resid_post" if self.spec.parallel else "use attn_out or resid_post",
            )

    def check_mixed(self) -> None:
        """Raise ModelError where z is not `pattern @ v` with v linear in the normed stream: there is no DFA by source.

        z can still be read there, also by SAEs.
        """
        if self.family.not_mixed:
            raise ModelError(
                f"what the heads of {self.spec.name} move from source to query: {self.family.not_mixed}",
                expected="a family where z is pattern @ v",
                do="train, load and evaluate SAEs of its z; leave out what goes by source token",
            )

    def width(self, site: Site) -> int:
        """Return the width of the vectors at an SAE site.

        Raises:
            ModelError: an unsupported site for SAEs.
        """
        if site.kind not in get_args(Kind):
            raise ModelError(
                f"an SAE of {site.kind}", expected=f"one of {', '.join(get_args(Kind))}", do="pass another --site"
            )
        return self.spec.n_heads * self.spec.d_head if site.kind == "z" else self.spec.d_model

    @torch.no_grad()
    def read(
        self,
        tokens: Int[Tensor, "batch position"],
        sites: Sequence[Site],
        *,
        attended: Bool[Tensor, "batch position"] | None = None,
        restart: Restart | None = None,
    ) -> dict[Site, Float[Tensor, "..."]]:
        """Return activations at some sites, shaped as in `Site`; the run stops after the deepest one.

        Within `edit` blocks an edited site is read after the edit.

        Args:
            tokens: `[batch, position]`.
            sites: any, in any order.
            attended: False where a token is padding, on either side: no query sees it, and positions are counted
                without it. Activations there are meaningless.
            restart: a run on the same tokens, repeated from its layer on, with its `attended`.

        Raises:
            ModelError: a site that the model does not have, one before the layer of `restart`, or tokens outside the
                vocabulary, beyond the context, or missing.
        """
        self.check_tokens(tokens, attended)
        return self._read(tokens, sites, restart, **_padding(attended))

    def attention(
        self,
        tokens: Int[Tensor, "batch position"],
        layer: int,
        *,
        attended: Bool[Tensor, "batch position"] | None = None,
    ) -> Attention:
        """Return pattern, value and z of one layer, computed explicitly; the run stops at z.

        Raises:
            ModelError: a layer that does not exist, or a family where z is not pattern @ value.
        """
        return self.attentions(tokens, [layer], attended=attended)[layer]

    @torch.no_grad()
    def attentions(
        self,
        tokens: Int[Tensor, "batch position"],
        layers: Sequence[int],
        *,
        attended: Bool[Tensor, "batch position"] | None = None,
    ) -> dict[int, Attention]:
        """Return pattern, value and z of several layers in one run, which stops at the last of them.

        Raises:
            ModelError: a layer that does not exist, or a family where z is not pattern @ value.
        """
        self.check_mixed()
        self.check_tokens(tokens, attended)
        sites = [Site(kind, layer) for layer in layers for kind in ("v", "pattern", "z")]
        found = self._read(tokens, sites, None, **_padding(attended))
        return {
            layer: Attention(
                pattern=found[Site("pattern", layer)],
                value=repeat_heads(found[Site("v", layer)], self.spec.n_heads),
                z=found[Site("z", layer)],
            )
            for layer in layers
        }

    def _read(
        self, tokens: Tensor, sites: Sequence[Site], restart: Restart | None = None, **inputs: Tensor
    ) -> dict[Site, Tensor]:
        for site in sites:
            self.check_site(site)
            if restart is not None and site.layer < restart.layer:
                raise ModelError(
                    f"{site.kind} of layer {site.layer} from a run that is continued at layer {restart.layer}",
                    expected=f"sites of layers {restart.layer} and later",
                    do="read it from the tokens",
                )
        self._check_attention({site.layer for site in sites if site.kind in ATTENTION_KINDS})
        found: dict[Site, Tensor] = {}
        deepest = max(sites, key=lambda site: site.depth, default=None)
        if deepest is None:
            return found

        def keep(site: Site) -> Callable[[Tensor], None]:
            def record(value: Tensor) -> None:
                found[site] = value
                if site == deepest:
                    raise Stop

            return record

        with self._hooks.at({site: keep(site) for site in sites}), suppress(Stop):
            if restart is None:
                self._body(tokens, **inputs)
            else:
                self._continue(restart)
        return found

    def _check_attention(self, layers: set[int]) -> None:
        """Check once per layer that z is `pattern @ value`, and that the stepwise computation agrees with the model."""
        missing = set() if self.family.not_mixed else layers - self._mixed
        if not missing:
            return
        self._mixed |= missing
        self._checking = True
        try:
            with self._hooks.suspended():
                for layer in sorted(missing):
                    check_attention(self, layer)
        except ModelError:
            self._mixed -= missing
            raise
        finally:
            self._checking = False

    # ------------------------------------------------------------------------------------------------------- running
    @contextmanager
    def edit(self, edits: Mapping[Site, Edit | SiteEdit]) -> Iterator[None]:
        """Within the block, each run replaces the value at a site by the function of it, which affects later values.

        Blocks nest: at one site the outer block's edit comes first, the inner one is given its result. Edits at
        different sites apply in the order of computation (the order of `AnyKind`). Editing a scale rescales the norm's
        output by the ratio of old and new. Scores are edited after masking: where an edit overwrites minus infinity, a
        query sees its future.

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
    def logits(
        self, tokens: Int[Tensor, "batch position"], *, attended: Bool[Tensor, "batch position"] | None = None
    ) -> Float[Tensor, "batch position d_vocab"]:
        """Return next-token logits; `attended` as in `read`.

        Raises:
            ModelError: tokens that the model cannot read, as in `read`.
        """
        self.check_tokens(tokens, attended)
        return self.module(input_ids=tokens, use_cache=False, **_padding(attended)).logits

    @torch.no_grad()
    def losses(
        self, tokens: Int[Tensor, "batch position"], restart: Restart | None = None
    ) -> Float[Tensor, "batch predicting"]:
        """Return the cross-entropy in nats of predicting token t+1 at t, for all positions but the last.

        With `restart`, from a run on the same tokens, only its layer and later ones are recomputed.

        Raises:
            ModelError: tokens that the model cannot read, as in `read`; losses that are not finite.
        """
        self.check_tokens(tokens)
        return self._next_losses(self._body(tokens) if restart is None else self._continue(restart), tokens)

    def _next_losses(self, normed: Float[Tensor, "batch position d_model"], tokens: Tensor) -> Tensor:
        return self._losses_of(normed[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().long()).view(tokens.shape[0], -1)

    def _losses_of(self, normed: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        chunks = [
            nn.functional.cross_entropy(_precise(self._capped(self._unembedding(h))), t, reduction="none")
            for h, t in zip(normed.split(_LOSS_ROWS), targets.split(_LOSS_ROWS), strict=True)
        ]
        losses = torch.cat(chunks)
        self.check_finite("losses", losses)
        return losses

    def check_finite(self, what: str, values: Tensor) -> None:
        """Raise ModelError where computed numbers are NaN or infinite: the model has overflowed."""
        if not values.isfinite().all():
            raise ModelError(
                f"NaN or infinity in {what} of {self.spec.name}, which computes in {_name(self.module.dtype)}",
                expected=f"finite numbers; {_name(self.module.dtype)} ends at {torch.finfo(self.module.dtype).max:.5g}",
                do="load it with --dtype float32 (or bfloat16, whose numbers go as far); if it is, check its weights",
            )

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.spec.logits_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    def loss_gradient(self, tokens: Int[Tensor, "batch position"], site: Site) -> Float[Tensor, "batch position d"]:
        """Return the gradient of a batch's summed losses with respect to a site of the residual stream, or z.

        At [b, q] it covers the losses at q and all later positions of row b, which are all that the value can affect.

        Raises:
            ModelError: a site that the model does not have, or tokens that it cannot read, as in `read`.
        """
        self.check_tokens(tokens)
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
        """Return the output of a layer's MLP, with the norms before and after it, for given inputs; edits are ignored.

        Args:
            layer: layer of the MLP.
            x: the norm's input: `mlp_in`.
            scale: replaces the norm's scale.

        Raises:
            ModelError: a layer that does not exist, or a model without MLPs.
        """
        self.check_site(Site("mlp_out", layer))
        part = self._blocks[layer]
        with self._hooks.suspended():
            added = part.mlp(part.mlp_norm.apply(x, scale)[None])[0]
            return added if part.mlp_post_norm is None else part.mlp_post_norm.apply(added)

    @torch.no_grad()
    def final_losses(
        self,
        residual: Float[Tensor, "row d_model"],
        targets: Int[Tensor, " row"],
        scale: Float[Tensor, "row 1"] | None = None,
    ) -> Float[Tensor, " row"]:
        """Return the cross-entropy of some next tokens from the final residual stream, `resid_post` of the last layer.

        Args:
            residual: residual stream before the final norm.
            targets: the next token of each.
            scale: replaces the final norm's scale; edits are ignored.
        """
        with self._hooks.suspended():
            return self._losses_of(self._final_norm.apply(residual, scale), targets)

    def final_parts(
        self, residual: Float[Tensor, "row d_model"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row 1"]]:
        """Return (c, sigma): numerator and scale of the final norm.

        `logits = c / sigma @ logit_directions + logit_bias`, up to a constant in each row.

        Raises:
            ModelError: logits that are capped.
        """
        if self.spec.logits_cap is not None:
            raise ModelError(
                f"the logits of {self.spec.name} as a sum of parts: they are capped at {self.spec.logits_cap:g}",
                expected="a model without a cap on its logits",
                do="edit the model and take the losses of its runs instead",
            )
        return self._final_norm.numerator(residual), self._final_norm.scale(residual)

    @contextmanager
    def restartable(self, layer: int) -> Iterator[Restart]:
        """Within the block, record one run so that it can be continued from a layer on afterwards.

        Edits before the layer are retained; at the layer and after it, the edits active on continuation apply.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        restart = Restart(layer, [])

        def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not self._checking:
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
        """Run `_body` from the input of a block on."""
        hidden = restart.calls[0][0][0]
        for part, (args, kwargs) in zip(self._blocks[restart.layer :], restart.calls, strict=True):
            hidden = part.block(hidden, *args[1:], **kwargs)
        return self._final_norm.module(hidden)

    def _body(self, tokens: Tensor, **inputs: Tensor) -> Tensor:
        """Run everything but the unembedding: returns the normed final residual stream."""
        return self.module.base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state


def _padding(attended: Bool[Tensor, "batch position"] | None) -> dict[str, Tensor]:
    """Return the padding arguments for `transformers`: positions are counted from the first non-padding token."""
    if attended is None or bool(attended.all()):
        return {}
    return {"attention_mask": attended, "position_ids": (attended.cumsum(1) - 1).clamp_min(0)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precise(values: Tensor) -> Tensor:
    """Convert to float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
