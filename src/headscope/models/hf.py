"""A `transformers` causal language model: its forward pass (`running.py`) and its weights."""

import copy
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import ModelError
from headscope.models.agreement import check_values
from headscope.models.attention import Attention, repeat_heads
from headscope.models.fingerprint import checksum, earlier_fingerprints, fingerprint
from headscope.models.norms import Norm
from headscope.models.running import Running, Stop
from headscope.models.spec import Edit, ModelSpec, Restart, SiteEdit
from headscope.site import Site

__all__ = ["Attention", "Edit", "Model", "ModelSpec", "Restart", "SiteEdit"]

_TOKEN_ROWS = 4096  # one-token sequences at a time
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class Model(Running):
    """One interface for every backend; this one holds a `transformers` model in evaluation mode."""

    _directions: tuple[Hashable, Tensor] | None = None  # logit directions, and the state of the weights they are of

    def replica(self) -> "Model":
        """Return a model that shares only the weights of this one, to run in another thread."""
        shared = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return Model(copy.deepcopy(self.module, shared), self.tokenizer, self.bos, self.spec.name)

    def fingerprint(self) -> str:
        """`sha256:<hex>` of all that determines the model's function: its settings, BOS and weights."""
        return fingerprint(self.module, self.family, self.spec, self.bos)

    def matches(self, known: str, dtype: str | None = None) -> bool:
        """Whether a fingerprint stored in an artefact is of this model.

        Args:
            known: a `fingerprint`, also of earlier versions of headscope.
            dtype: the precision of the artefact's model, e.g. `bfloat16`; default: this model's own. Weights are
                rounded to a lower precision for comparison; a higher one cannot be compared.
        """
        own = self.module.dtype
        stated = _DTYPES.get(dtype or "", own)
        if torch.promote_types(stated, own) != own:
            return False
        question = known, stated, checksum(*self.module.state_dict(keep_vars=True).values())
        if question not in self._matched:  # reading all weights takes seconds per gigabyte
            rounded = None if stated == own else stated
            current = fingerprint(self.module, self.family, self.spec, self.bos, rounded)
            self._matched[question] = known == current or known in earlier_fingerprints(self.module, self.bos, rounded)
        return self._matched[question]

    @cached_property
    def _matched(self) -> dict[tuple, bool]:
        """Cached results of `matches`, by arguments and state of the weights."""
        return {}

    # ------------------------------------------------------------------------------------------------------- weights
    def W_O(self, layer: int) -> Float[Tensor, "z d_model"]:  # noqa: N802 - the field's name
        """Output projection of a layer: `attn_out = z @ W_O + b_O`.

        Raises:
            ModelError: a layer that does not exist, or a norm between the projection and the stream.
        """
        self.check_layer(layer)
        if self.spec.post_norm:
            raise ModelError(
                f"what {self.spec.name} adds to its stream, as a sum over heads: a norm after the output projection "
                "divides by the size of the whole",
                expected="a family whose attn_out is linear in z",
                do="edit z and run the model instead; `output_directions` leaves that norm's scale out",
            )
        return self._output_weight(layer)

    @property
    def no_direct_path(self) -> str | None:
        """Reason why the direct effect of a direction of z on the logits is not linear; None where it is."""
        if self.spec.post_norm:
            return "a norm after the output projection divides by the size of all that attention adds"
        if self.spec.logits_cap is not None:
            return f"logits are capped at {self.spec.logits_cap:g}"
        return None

    def check_direct_path(self) -> None:
        """Raise an error, before any work, unless the model has a linear direct path from z to the logits.

        Raises:
            ModelError: it has none.
        """
        if self.no_direct_path is not None:
            raise ModelError(
                f"the direct path from z to the logits of {self.spec.name}: {self.no_direct_path}",
                expected="a family where it is linear in z (docs/models.md)",
                do="edit z and run the model instead",
            )

    def output_directions(self, layer: int) -> Float[Tensor, "z d_model"]:
        """Return what each direction of z adds to the residual stream, at scale 1 of a norm after W_O.

        W_O where there is no such norm. Otherwise `W_O * gain`; its token-dependent scale is omitted, like that of the
        final norm in `logit_directions`. So ratios of one token's parts are exact, but their sizes are not.
        """
        self.check_layer(layer)
        norm, weight = self._blocks[layer].attention_post_norm, self._output_weight(layer)
        return weight if norm is None or norm.gain is None else weight * norm.gain

    def _output_weight(self, layer: int) -> Float[Tensor, "z d_model"]:
        weight: Tensor = self._blocks[layer].output_projection.weight  # pyright: ignore[reportAssignmentType]
        return weight if self.family.transposed else weight.T

    @property
    def logit_directions(self) -> Float[Tensor, "d_model d_vocab"]:
        """Return effects of residual directions on logits at scale 1 of the final norm: `centre(u) * gain @ W_U`.

        The final norm's gain and (for LayerNorm) centring are folded in, its scale is omitted, and the result is
        centred over the vocabulary, which does not change the softmax. Equals TransformerLens' processed `W_U`. For a
        model that caps its logits, the effect is before the cap. Cached until the weights change.
        """
        norm = self._final_norm
        read = (t for t in (self._unembedding.weight, getattr(norm.module, "weight", None)) if t is not None)
        state, kept = checksum(*read), self._directions
        if kept is None or kept[0] != state:
            kept = self._directions = state, self._folded(norm)
        return kept[1]

    def _folded(self, norm: Norm) -> Float[Tensor, "d_model d_vocab"]:
        folded = self._unembedding.weight.T if norm.gain is None else norm.gain[:, None] * self._unembedding.weight.T
        if norm.centres:
            folded = folded - folded.mean(0)
        return folded - folded.mean(1, keepdim=True)

    @property
    def logit_bias(self) -> Float[Tensor, " d_vocab"]:
        """Return the logits' part independent of the residual stream: the final norm's bias through W_U, and b_U."""
        bias = torch.zeros(self.spec.d_vocab, dtype=self.module.dtype, device=self.device)
        norm_bias = self._final_norm.bias
        if norm_bias is not None:
            bias = bias + norm_bias @ self._unembedding.weight.T
        return bias if self._unembedding.bias is None else bias + self._unembedding.bias

    def b_O(self, layer: int) -> Float[Tensor, " d_model"]:  # noqa: N802 - the field's name
        """Return the bias of the output projection of a layer; zero for models without one."""
        self.check_layer(layer)
        bias = getattr(self._blocks[layer].output_projection, "bias", None)
        return torch.zeros(self.spec.d_model, dtype=self.module.dtype, device=self.device) if bias is None else bias

    def value_offset(self, layer: int) -> Float[Tensor, " z"]:
        """Return the constant part of z: `c = b_V + b_ln1 @ W_V`, one block per head; zero without these biases.

        Attention weights sum to 1, so c is part of every z. TransformerLens' processed z is `z - c`. It is computed by
        the model itself: the value vector for the bias of the norm before attention as input. Edits are ignored.

        Raises:
            ModelError: a layer that does not exist.
        """
        self.check_layer(layer)
        bias = self._blocks[layer].attention_norm.bias
        return self._value_of(layer, torch.zeros(self.spec.d_model) if bias is None else bias)

    def W_V(self, layer: int) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802 - the field's name
        """Return the value weights of each query head, with the gain of the norm before attention folded in.

        `value = centre(resid_pre) / ln1_scale @ W_V + c`, c as in `value_offset`; RMSNorm does not centre. Query
        heads that share a value head have the same weights. Computed by the model itself; edits are ignored.

        Raises:
            ModelError: a layer that does not exist, or a family whose z is not pattern @ v.
        """
        self.check_layer(layer)
        self.check_mixed()
        gain = self._blocks[layer].attention_norm.gain
        width, dtype = self.spec.d_model, self.module.dtype
        basis = torch.diag(torch.ones(width, dtype=dtype, device=self.device) if gain is None else gain)
        values = self._value_of(layer, basis) - self._value_of(layer, torch.zeros_like(basis[0]))
        check_values(self, layer, values)
        return values.view(width, self.spec.n_heads, self.spec.d_head).transpose(0, 1)

    def centred(self, layer: int, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the numerator of the norm before attention: x minus its mean for LayerNorm, x itself for RMSNorm.

        In float32 at least. It is a symmetric projection, so it also maps a direction read after the norm to one before
        it.
        """
        self.check_layer(layer)
        return self._blocks[layer].attention_norm.numerator(x)

    @torch.no_grad()
    def queries_and_keys(
        self,
        tokens: Int[Tensor, " position"],
        layer: int,
        parts: Float[Tensor, "part position d_model"],
        scale: Float[Tensor, "position 1"],
    ) -> tuple[Float[Tensor, "rows position head d_head"], Float[Tensor, "rows position head d_head"]]:
        """Return contributions of parts of `resid_pre` to a layer's queries and keys, at a fixed norm scale.

        Each part goes through the model's own projections and rotation, without their biases; the last row is from the
        biases (the norm's and the projection's, rotated). The sums over rows are the queries and keys. Shared keys are
        repeated for each of their query heads. Edits are ignored.

        Args:
            tokens: a sequence, for its positions only.
            layer: layer of the queries and keys.
            parts: parts of its input.
            scale: `ln1_scale` of the layer.

        Raises:
            ModelError: a layer that does not exist, tokens that the model cannot read, normalised queries and keys, or
                capped scores.
        """
        self.check_layer(layer)
        self.check_tokens(tokens[None])
        self._check_bilinear()
        norm = self._blocks[layer].attention_norm
        gain, bias = norm.gain, norm.bias
        normed = self.centred(layer, parts) / scale
        normed = normed.to(self.module.dtype) if gain is None else (normed * gain).to(self.module.dtype)
        rows = torch.cat([normed, torch.zeros_like(normed[:1])])
        rows = rows if bias is None else rows + bias
        found: dict[Site, Tensor] = {}
        sites = Site("q", layer), Site("k", layer)

        def stop(value: Tensor) -> None:
            found[sites[1]] = value
            raise Stop

        with self._hooks.suspended():
            with self.restartable(layer) as restart:
                self._read(tokens[None], [Site("resid_pre", layer)])
            handle = norm.module.register_forward_hook(lambda _module, _args, _output: rows)
            try:
                args, kwargs = restart.calls[0]
                functions = {sites[0]: lambda value: found.update({sites[0]: value}), sites[1]: stop}
                with self._hooks.at(functions), suppress(Stop):
                    self._blocks[layer].block(rows, *args[1:], **kwargs)
            finally:
                handle.remove()
        q, k = found[sites[0]], repeat_heads(found[sites[1]], self.spec.n_heads)
        q, k = (torch.cat([value[:-1] - value[-1], value[-1:]]) for value in (q, k))
        return q, k

    def _check_bilinear(self) -> None:
        if self.spec.qk_norm or self.spec.scores_cap is not None:
            why = "queries and keys are normed" if self.spec.qk_norm else "scores are capped"
            raise ModelError(
                f"the scores of {self.spec.name} as a sum over parts of what queries and keys are made of: {why}",
                expected="scores that are bilinear in the normed stream",
                do="leave this study out for this model, or patch q and k instead",
            )

    @torch.no_grad()
    def _value_of(self, layer: int, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch z"]:
        """Return the values of a layer for an output of the norm before it: z where a token sees only itself."""
        rows = normed.view(-1, self.spec.d_model).to(self.device, self.module.dtype)
        norm = self._blocks[layer].attention_norm.module
        handle = norm.register_forward_hook(lambda _module, _args, _output: rows[:, None])
        try:
            with self._hooks.suspended():
                tokens = torch.full((len(rows), 1), self.bos, device=self.device)
                return self._read(tokens, [Site("z", layer)])[Site("z", layer)].view(*normed.shape[:-1], -1)
        finally:
            handle.remove()

    @torch.no_grad()
    def token_values(
        self,
        layer: int,
        tokens: Int[Tensor, " token"] | None = None,
        on_tokens: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "token head d_head"]:
        """Return the value vector of each token alone, for each query head, as required by a static copying table.

        Each token is a separate sequence, run through the layers before this one at a position in the middle of the
        context (a learned embedding of position 0 is atypical), so it attends only to itself. Includes b_V. Edits are
        ignored.

        Args:
            layer: layer of the values.
            tokens: the tokens; default: the whole vocabulary.
            on_tokens: called with the tokens done and the total; a large vocabulary takes minutes.

        Raises:
            ModelError: a layer that does not exist, a family whose z is not pattern @ v, or ids outside the vocabulary.
        """
        self.check_layer(layer)
        self.check_mixed()
        tokens = torch.arange(self.spec.d_vocab) if tokens is None else tokens
        self.check_tokens(tokens[:, None])
        site, shape = Site("z", layer), (len(tokens), self.spec.n_heads, self.spec.d_head)
        values = torch.empty(shape, dtype=self.module.dtype, device=self.device)
        with self._hooks.suspended():
            for start in range(0, len(tokens), _TOKEN_ROWS):
                alone = tokens[start : start + _TOKEN_ROWS, None].to(self.device)
                middle = torch.full_like(alone, self.spec.context // 2)
                z = self._read(alone, [site], position_ids=middle)[site]  # z is v where s = q only
                values[start : start + len(alone)] = z.view(-1, *shape[1:])
                if on_tokens is not None:
                    on_tokens(start + len(alone), len(tokens))
        return values
