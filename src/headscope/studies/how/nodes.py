"""Nodes of a model that can be patched."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.hf import Model
from headscope.site import Site

NodeKind = Literal[
    "token",
    "position",
    "resid_pre",
    "q",
    "k",
    "v",
    "pattern",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
]
"""Kinds of nodes: the token embedding; the position embedding, if there is one; or the value at a site of this name."""

BY_HEAD = ("q", "k", "v", "pattern", "z")
INPUTS = ("token", "position")


@dataclass(frozen=True)
class Node:
    """A component at one position, or at all positions.

    For pattern a position is a query; for k and v it is a source, and a head is a key-value head.
    """

    kind: NodeKind
    layer: int = 0
    head: int | None = None
    """All heads when None."""
    position: int | None = None
    """Position of the clean prompt; all positions when None."""

    def __str__(self) -> str:
        """`z 0.2 @5`: kind, layer and head, position."""
        where = "" if self.kind in INPUTS else f" {self.layer}" if self.head is None else f" {self.layer}.{self.head}"
        return f"{self.kind}{where}" + ("" if self.position is None else f" @{self.position}")

    @property
    def site(self) -> Site:
        """The site that is edited."""
        if self.kind == "token" or self.kind == "position":
            return Site("resid_pre", 0)
        return Site(self.kind, self.layer)


Patch = tuple[Node, ...]
"""Nodes that are patched together in one run; empty for an unpatched run."""


def n_heads(model: Model, kind: NodeKind) -> int:
    """Return the number of heads at a site of this kind."""
    return model.spec.n_kv_heads if kind in ("k", "v") else model.spec.n_heads


def position_embedding(model: Model, tokens: Int[Tensor, " position"]) -> Float[Tensor, "position d_model"]:
    """Return the position embeddings added to the token embeddings."""
    site = Site("resid_pre", 0)
    return model.read(tokens[None], [site])[site][0] - model.module.get_input_embeddings()(tokens)
