"""Where in a model an activation is read or an SAE sits."""

from dataclasses import dataclass
from typing import Literal, get_args

from headscope.errors import HeadscopeError

Kind = Literal["z", "attn_out", "mlp_out", "resid_pre"]

_HOOK_NAMES: dict[str, str] = {
    "z": "blocks.{layer}.attn.hook_z",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
}


@dataclass(frozen=True)
class Site:
    """An activation of one layer.

    `z` is the per-head output before W_O, heads concatenated head-major, `[batch, query, head*d_head]`; raw, so the
    value bias b_V is part of it. `attn_out` and `mlp_out` are what the two sublayers add to the residual stream,
    `resid_pre` is the residual stream before the layer, all `[batch, query, d_model]`.
    """

    kind: Kind
    layer: int

    def __post_init__(self) -> None:
        """Refuse a kind that no model here can read."""
        if self.kind not in get_args(Kind):
            raise HeadscopeError(
                f"site {self.kind!r}", expected=f"one of {', '.join(get_args(Kind))}", do="pass another --site"
            )

    @property
    def hook_name(self) -> str:
        """The name TransformerLens gives this activation, e.g. `blocks.1.attn.hook_z`."""
        return _HOOK_NAMES[self.kind].format(layer=self.layer)

    @classmethod
    def from_hook_name(cls, name: str) -> "Site":
        """Parse a TransformerLens name, e.g. `blocks.1.attn.hook_z` -> `Site("z", 1)`."""
        parts = name.split(".")
        if len(parts) >= 3 and parts[0] == "blocks" and parts[1].isdigit():
            layer = int(parts[1])
            for kind in get_args(Kind):
                if _HOOK_NAMES[kind].format(layer=layer) == name:
                    return cls(kind, layer)
        raise HeadscopeError(
            f"hook name {name!r}",
            expected="one of " + ", ".join(n.format(layer="L") for n in _HOOK_NAMES.values()),
            do="train or convert an SAE on one of these sites",
        )
