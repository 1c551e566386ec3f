"""Exact decomposition of the residual stream before a layer into parts that sum to it.

    resid_pre_L = embedding [+ position] + sum over l < L of (sum_h (z_h - c_h) W_O[h]  +  bias_l  +  mlp_out_l)

with `bias_l = b_O + c W_O`: the constant c of z (`Model.value_offset`) is independent of the text and belongs to no
head. Models with rotary embeddings have no position in the stream. An SAE replaces its site by its features, its
`b_dec` and its error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import HeadscopeError, ModelError, SAEError
from headscope.models.attention import Attention, repeat_heads
from headscope.models.hf import Model
from headscope.sae.model import SAE
from headscope.site import AnyKind, Site

PartKind = Literal["embedding", "position", "head", "bias", "mlp", "feature", "features", "error", "b_dec", "constant"]

_TOLERANCE = 1e-4  # in float64 too: transformers' RMSNorm computes in float32
_COARSE = 0.05  # of models in half precision
_SPLIT: dict[AnyKind, tuple[PartKind, ...]] = {"z": ("head",), "attn_out": ("head", "bias"), "mlp_out": ("mlp",)}


@dataclass(frozen=True)
class Part:
    """One part of the residual stream."""

    kind: PartKind
    """`features` are all of an SAE's together except for those listed separately; `constant` is not a part of the
    stream: it comes from the biases of the components that read it."""
    layer: int | None = None
    """None for embedding and position."""
    head: int | None = None
    site: AnyKind | None = None
    """Site of the SAE, for a feature, its error and its b_dec."""
    latent: int | None = None

    @property
    def name(self) -> str:
        """`embedding`, `0.2` (a head), `bias 0`, `mlp 0`, `mlp_out 0 feature 17`, `mlp_out 0 error`."""
        match self.kind:
            case "embedding" | "position" | "constant":
                return self.kind
            case "head":
                return f"{self.layer}.{self.head}"
            case "bias" | "mlp":
                return f"{self.kind} {self.layer}"
            case "feature":
                return f"{self.site} {self.layer} feature {self.latent}"
            case _:
                return f"{self.site} {self.layer} {self.kind}"


@dataclass(frozen=True)
class Written:
    """Parts of an SAE's site, as written to the residual stream."""

    site: Site
    f: Float[Tensor, "batch position d_sae"]
    directions: Float[Tensor, "d_sae d_model"]
    """Output of each latent at activation 1."""
    constant: Float[Tensor, " d_model"]
    """`b_dec` without the constant part of z."""
    error: Float[Tensor, "batch position d_model"]

    def vector(self, kind: PartKind, latent: int | None = None) -> Float[Tensor, "batch position d_model"]:
        """Return one of its parts at each token."""
        match kind:
            case "b_dec":
                return self.constant.expand_as(self.error)
            case "error":
                return self.error
            case "feature":
                return self.f[..., latent, None] * self.directions[latent]
            case _:
                return self.f @ self.directions

    def largest(self, most: int) -> list[tuple[Part, Float[Tensor, "position d_model"]]]:
        """Return the features of the first row that write the longest vectors anywhere, and all others as one part."""
        f, layer = self.f[0], self.site.layer
        kind: AnyKind = self.site.kind
        sizes = f.amax(0) * self.directions.norm(dim=1)
        chosen = sizes.topk(min(most, int((sizes > 0).sum()))).indices
        named = [
            (Part("feature", layer, site=kind, latent=latent), f[:, latent, None] * self.directions[latent])
            for latent in chosen.tolist()
        ]
        others = f.clone()
        others[:, chosen] = 0
        return [*named, (Part("features", layer, site=kind), others @ self.directions)]

    def active(self, row: int) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Return (position, latent, activation) of all active latents in a row."""
        position, latent = self.f[row].nonzero(as_tuple=True)
        return position, latent, self.f[row, position, latent]


class Upstream:
    """Weights for the decomposition of the residual stream before a layer, with the SAEs used."""

    def __init__(self, model: Model, layer: int, saes: Sequence[SAE] = ()) -> None:
        """Read the weights.

        Args:
            model: the model.
            layer: the layer before which to decompose.
            saes: SAEs of z, attn_out or mlp_out of earlier layers, at most one per layer's attention and MLP.

        Raises:
            ModelError: no such layer, or a model without the site of an SAE.
            SAEError: an SAE of another kind of site, of this layer or a later one, of another width, or two of one
                component.
        """
        model.check_layer(layer)
        check_saes(model, layer, saes)
        self.model, self.layer = model, layer
        self.saes = [sae.to(model.device).to(model.module.dtype) for sae in saes]
        heads = model.spec.n_heads, model.spec.d_head
        layers = range(layer + 1)
        self.offset = [model.value_offset(l).view(heads) for l in layers]
        """c by layer, `[head, d_head]`."""
        self.value = [model.W_V(l) for l in layers]
        """W_V by layer, `[head, d_model, d_head]`."""
        self.output = [model.W_O(l).unflatten(0, heads) for l in layers]
        """W_O by layer, `[head, d_head, d_model]`."""
        self.bias = [model.b_O(l) + self.offset[l].flatten() @ model.W_O(l) for l in layers]

    def run(self, tokens: Int[Tensor, "batch position"]) -> "Stream":
        """Run the model once, up to z of the layer; within an `edit` block, the edited one.

        Raises:
            HeadscopeError: no tokens, or more than the context.
            ModelError: the stream is not the sum of its parts, as in a run edited in between.
        """
        return Stream(self, tokens)

    def read_by(
        self, layer: int, head: int, of_z: Float[Tensor, "*direction d_head"]
    ) -> Float[Tensor, "*direction d_model"]:
        """Return the input directions that a head's values map to directions of its z, up to the norm's scale.

        `(v_s - c) . w = x_s . read / scale_s`, with `read = centre(W_V w)`.
        """
        return self.model.centred(layer, of_z @ self.value[layer][head].T).to(of_z.dtype)


class Stream:
    """A batch of token sequences: the parts of the residual stream before a layer, and the attention that reads it."""

    def __init__(self, upstream: Upstream, tokens: Int[Tensor, "batch position"]) -> None:
        """Run the model; for errors see `Upstream.run`."""
        model, layer = upstream.model, upstream.layer
        _check_tokens(model, tokens)
        self.upstream, self.tokens = upstream, tokens.to(model.device)
        kinds: tuple[AnyKind, ...] = ("v", "pattern", "z", "ln1_scale")
        layers = range(layer + 1)
        sites = [Site(kind, l) for l in layers for kind in kinds] + [Site("resid_pre", l) for l in {0, layer}]
        mlps = [] if model.spec.attention_only else [Site("mlp_out", l) for l in range(layer)]
        found = model.read(self.tokens, [*sites, *mlps])
        self.attention = [
            Attention(
                pattern=found[Site("pattern", l)],
                value=repeat_heads(found[Site("v", l)], model.spec.n_heads),
                z=found[Site("z", l)],
            )
            for l in layers
        ]
        self.scale = [found[Site("ln1_scale", l)].to(model.module.dtype) for l in layers]
        """`ln1_scale` by layer, `[batch, position, 1]`."""
        self._mlp_out = [found[site] for site in mlps]
        self._embedding: Tensor = model.module.get_input_embeddings()(self.tokens)
        position = found[Site("resid_pre", 0)] - self._embedding
        self._position = position if position.any() else None
        self._check(found[Site("resid_pre", layer)])
        self.written = {sae.site: self._read_by_sae(sae) for sae in upstream.saes}

    def parts(self, before: int | None = None) -> tuple[Part, ...]:
        """Return the parts of `resid_pre` of layers up to this one, without single features."""
        found = [Part("embedding")] + ([Part("position")] if self._position is not None else [])
        for l in range(self.upstream.layer if before is None else before):
            gone = {kind for site in self.written if site.layer == l for kind in _SPLIT[site.kind]}
            whole = [Part("head", l, head) for head in range(self.upstream.model.spec.n_heads)]
            whole += [Part("bias", l)] + ([Part("mlp", l)] if self._mlp_out else [])
            found += [part for part in whole if part.kind not in gone]
            for site in (site for site in self.written if site.layer == l):
                found += [Part("b_dec", l, site=site.kind), Part("error", l, site=site.kind)]
        return tuple(found)

    def vector(self, part: Part) -> Float[Tensor, "batch position d_model"]:
        """Return the vector of a part at each token."""
        match part:
            case Part("embedding"):
                return self._embedding
            case Part("position") if self._position is not None:
                return self._position
            case Part("head", int(l), int(head)):
                return self.z(l)[:, :, head] @ self.upstream.output[l][head]
            case Part("bias", int(l)):
                return self.upstream.bias[l].expand_as(self._embedding)
            case Part("mlp", int(l)):
                return self._mlp_out[l]
            case Part(kind, int(l), _, site, latent) if site is not None:
                return self.written[Site(site, l)].vector(kind, latent)
            case _:
                pass
        raise HeadscopeError(f"part {part.name}", expected="one of `parts`, or a feature", do="name one of these")

    def along(
        self, directions: Float[Tensor, "direction d_model"], before: int | None = None
    ) -> Float[Tensor, "part batch position direction"]:
        """Return the dot products of each of `parts` with some directions."""
        found = []
        for part in self.parts(before):
            match part:
                case Part("head", int(l), int(head)):  # through z: a head's output is never computed for all directions
                    found.append(self.z(l)[:, :, head] @ (self.upstream.output[l][head] @ directions.T))
                case Part("bias" | "b_dec"):
                    one = self.vector(part)[:1, :1] @ directions.T
                    found.append(one.expand(*self.tokens.shape, len(directions)))
                case _:
                    found.append(self.vector(part) @ directions.T)
        return torch.stack(found)

    # ------------------------------------------------------------------------------------------------------- attention
    def z(self, layer: int) -> Float[Tensor, "batch position head d_head"]:
        """Return z without its constant part."""
        offset = self.upstream.offset[layer]
        return self.attention[layer].z.unflatten(-1, offset.shape) - offset

    def value(self, layer: int) -> Float[Tensor, "batch source head d_head"]:
        """Return the values of a layer without their constant part."""
        return self.attention[layer].value - self.upstream.offset[layer]

    # ----------------------------------------------------------------------------------------------------------- steps
    def _read_by_sae(self, sae: SAE) -> Written:
        """Return the parts of an SAE's site, mapped to the residual stream."""
        l, upstream = sae.site.layer, self.upstream
        z, output = self.attention[l].z, upstream.model.W_O(l)
        if sae.site.kind == "z":
            f = sae.encode(z)
            constant = sae.b_dec - upstream.offset[l].flatten()
            return Written(sae.site, f, sae.W_dec @ output, constant @ output, (z - sae.decode(f)) @ output)
        x = z @ output + upstream.model.b_O(l) if sae.site.kind == "attn_out" else self._mlp_out[l]
        f = sae.encode(x)
        return Written(sae.site, f, sae.W_dec, sae.b_dec, x - sae.decode(f))

    def _check(self, stream: Float[Tensor, "batch position d_model"]) -> None:
        """Raise ModelError unless the parts sum to the stream."""
        model, total = self.upstream.model, self._embedding
        total = total if self._position is None else total + self._position
        for l in range(self.upstream.layer):
            total = total + self.attention[l].z @ model.W_O(l) + model.b_O(l)
        for added in self._mlp_out:
            total = total + added
        check_closes(
            stream,
            total,
            what="a residual stream",
            do="leave out edits between the layers, or take a model of a family of headscope/models/families.py",
        )


def check_closes(total: Tensor, parts: Tensor, *, what: str, do: str) -> None:
    """Raise ModelError where a sum of parts misses a total, which may be infinite, by over 1e-4 of 1 + its size."""
    finite = total.isfinite()
    if not finite.any():
        return
    miss, size = (total - parts)[finite].abs().max().item(), 1 + total[finite].abs().max().item()
    tolerance = _COARSE if total.dtype in (torch.float16, torch.bfloat16) else _TOLERANCE
    if not miss <= tolerance * size:
        raise ModelError(
            f"{what} that {'are' if what[-1] == 's' else 'is'} not the sum of parts: they miss by {miss:.3g}",
            expected=f"at most {tolerance * size:.3g}: blocks add to the stream, and is read linearly",
            do=do,
        )


def _check_tokens(model: Model, tokens: Tensor) -> None:
    if not 1 <= tokens.shape[1] <= model.spec.context or not len(tokens):
        raise HeadscopeError(
            f"{len(tokens)} sequences of {tokens.shape[1]} tokens",
            expected=f"1 to {model.spec.context} tokens, the model's context",
            do="pass text that is not empty, or less of it",
        )


def check_saes(model: Model, layer: int, saes: Sequence[SAE]) -> None:
    """Raise SAEError unless each SAE replaces a distinct component before the layer."""
    taken: set[tuple[int, PartKind]] = set()
    for sae in saes:
        model.check_site(sae.site)
        kinds = _SPLIT.get(sae.site.kind, ())
        own: set[tuple[int, PartKind]] = {(sae.site.layer, kind) for kind in kinds}
        if not own or sae.site.layer >= layer or own & taken or sae.d_in != model.width(sae.site):
            raise SAEError(
                f"an SAE of {sae.site.kind} of layer {sae.site.layer}, {sae.d_in} wide",
                expected=f"one of {', '.join(_SPLIT)} of a layer before {layer}, and no other of that component",
                do="pass the SAEs of what is to be taken apart upstream",
            )
        sae.check_raw()
        taken |= own
