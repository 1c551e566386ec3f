"""Sites of a model: where an activation is read or edited, or an SAE is trained."""

from dataclasses import dataclass
from typing import Literal, get_args

from headscope.errors import HeadscopeError, ModelError, SAEError

Kind = Literal["z", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
"""Sites of SAEs."""

AnyKind = Literal[
    "resid_pre",
    "ln1_scale",
    "q",
    "k",
    "v",
    "scores",
    "pattern",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "ln2_scale",
    "mlp_out",
    "resid_post",
    "ln_final_scale",
]
"""All sites that can be read and edited, in the order in which a layer computes them."""

KINDS: tuple[AnyKind, ...] = get_args(AnyKind)

_HOOK_NAMES: dict[AnyKind, str] = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "ln1_scale": "blocks.{layer}.ln1.hook_scale",
    "q": "blocks.{layer}.attn.hook_rot_q",
    "k": "blocks.{layer}.attn.hook_rot_k",
    "v": "blocks.{layer}.attn.hook_v",
    "scores": "blocks.{layer}.attn.hook_attn_scores",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "z": "blocks.{layer}.attn.hook_z",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "mlp_in": "blocks.{layer}.hook_mlp_in",
    "ln2_scale": "blocks.{layer}.ln2.hook_scale",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "ln_final_scale": "ln_final.hook_scale",
}


@dataclass(frozen=True)
class Site:
    """An activation of one layer.

    The residual stream and its additions, `[batch, position, d_model]`:

    * `resid_pre`, `resid_mid`, `resid_post`: the stream before the layer, between attention and MLP (not in parallel
      blocks), and after the layer;
    * `attn_out`, `mlp_out`: what the two sublayers add to it;
    * `mlp_in`: the stream as input of the norm before the MLP. An edit changes what the MLP reads and not the stream.

    Attention; `kv_head` counts shared keys and values once, and `head` is a query head:

    * `q` `[batch, query, head, d_head]`, `k` `[batch, source, kv_head, d_head]`: as multiplied with each other, so
      after rotary embedding in models that have it;
    * `v` `[batch, source, kv_head, d_head]`: includes b_V;
    * `scores` `[batch, head, query, source]`: input of the softmax, `q . k` scaled, minus infinity where masked;
    * `pattern` `[batch, head, query, source]`: softmax of scores;
    * `z` `[batch, query, head*d_head]`: `pattern @ v`, the per-head output before W_O, heads concatenated head-major;
      unprocessed, so b_V is part of it.

    Divisors of norms, `[batch, position, 1]`, in float32 at least: `sqrt(mean((x - mean(x))^2) + eps)` for
    LayerNorm, `sqrt(mean(x^2) + eps)` for RMSNorm:

    * `ln1_scale` before attention, `ln2_scale` before the MLP, `ln_final_scale` before the unembedding (a site of the
      last layer only).
    """

    kind: AnyKind
    layer: int

    def __post_init__(self) -> None:
        """Reject an unknown kind."""
        if self.kind not in KINDS:
            raise HeadscopeError(f"site {self.kind!r}", expected=f"one of {', '.join(KINDS)}", do="name another site")

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of this activation, e.g. `blocks.1.attn.hook_z`.

        In a model without rotary positions q and k are `hook_q` and `hook_k`; with them, those are the unrotated ones.
        """
        return _HOOK_NAMES[self.kind].format(layer=self.layer)

    @property
    def depth(self) -> tuple[int, int]:
        """Sort key of sites in the order of computation."""
        return self.layer, KINDS.index(self.kind)

    @classmethod
    def from_hook_name(cls, name: str) -> "Site":
        """Parse the TransformerLens name of an SAE site, e.g. `blocks.1.attn.hook_z` -> `Site("z", 1)`.

        Raises:
            HeadscopeError: it is not one.
        """
        parts = name.split(".")
        if len(parts) >= 3 and parts[0] == "blocks" and parts[1].isdigit():
            layer = int(parts[1])
            for kind in get_args(Kind):
                if _HOOK_NAMES[kind].format(layer=layer) == name:
                    return cls(kind, layer)
        raise HeadscopeError(
            f"hook name {name!r}",
            expected="one of " + ", ".join(_HOOK_NAMES[kind].format(layer="L") for kind in get_args(Kind)),
            do="train or convert an SAE on one of these sites",
        )


def check_z(hook_name: str) -> None:
    """Reject an SAE that reads another site than z.

    Raises:
        SAEError: it does.
    """
    if not hook_name.endswith(".attn.hook_z"):
        raise SAEError(
            f"an SAE of {hook_name}",
            expected="an SAE of z, whose features are made by heads",
            do="pass another --sae",
        )


def no_layer(model: str, layer: int, n_layers: int) -> ModelError:
    """Make the error for a layer that a model does not have."""
    return ModelError(
        f"layer {layer} of {model}",
        expected=f"0 to {n_layers - 1}: the model has {n_layers} layers",
        do="pass another --layer",
    )
