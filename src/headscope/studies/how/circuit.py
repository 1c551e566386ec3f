"""Recursive DFA: a feature's pre-activation, split into heads, sources, the parts of the stream there, and so on.

With patterns and norms held fixed, the pre-activation is linear in the residual stream at each source:

    pre_j[q] = bias_j + sum over h, s, r of  R[h, s, r]
    R[h, s, r] = pattern[h, q, s] / scale_s  *  centre(r_s) . W_V[h] W_enc[h, :, j]

r over the parts of `headscope.decomposition`. An earlier head as a part is in turn a sum over its own sources and the
parts of the stream there; leaves are MLPs, or the features of their SAEs. Children sum to their parent at every level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.attribution import HeadWeights
from headscope.decomposition import Part, Upstream
from headscope.errors import HeadscopeError, SAEError
from headscope.models.hf import Model
from headscope.sae.convert import check_fits
from headscope.sae.model import SAE

NodeKind = Literal["feature", "constant", "head", "source", "part"]


@dataclass(frozen=True)
class Hop:
    """One step back through a layer: by a head, to a source."""

    layer: int
    head: int
    source: int


@dataclass(frozen=True)
class Node:
    """One term of the pre-activation of a feature. A plain value: a node can be stored and expanded later."""

    kind: NodeKind
    latent: int
    query: int
    """Position of the feature."""
    hops: tuple[Hop, ...]
    """Path from the feature to this node; a source's own hop is the last."""
    position: int
    value: float
    """Contribution to the pre-activation; for the feature itself, the pre-activation."""
    part: Part | None = None
    """A head or a part of the stream."""

    @property
    def name(self) -> str:
        """`feature 7`, `constant`, `1.0`, `source 12`, or the name of the part."""
        match self.kind:
            case "feature":
                return f"feature {self.latent}"
            case "source":
                return f"source {self.position}"
            case _:
                return self.part.name if self.part else self.kind


@dataclass(frozen=True)
class Tree:
    """A node with its larger children; those and the rest sum to it."""

    node: Node
    children: tuple["Tree", ...]
    """Largest first, by |value|; none for a leaf and at the maximum depth."""
    rest: float
    """Sum of the omitted children."""
    n_rest: int


class PromptCircuit:
    """Recursive DFA of a z SAE's features on one sequence; nodes are expanded on request."""

    def __init__(self, model: Model, sae: SAE, tokens: Int[Tensor, " position"], *, saes: Sequence[SAE] = ()) -> None:
        """Run the model once.

        Args:
            model: within an `edit` block, the edited one.
            sae: a z SAE.
            tokens: the sequence, BOS included.
            saes: SAEs of earlier components, to attribute to their features (`decomposition.Stream`).

        Raises:
            SAEError: the SAE is not one of z, or one of `saes` does not fit.
            HeadscopeError: no tokens, or too many.
        """
        check_z(sae)
        check_fits(sae, model)
        self.model, self.sae = model, sae.to(model.device).to(model.module.dtype)
        self.layer = sae.site.layer
        self.stream = Upstream(model, self.layer, saes).run(tokens[None])
        self._weights = HeadWeights.of(self.sae, model)
        z = self.stream.attention[self.layer].z[0]
        self._pre = self.sae.pre_activations(z)
        self.activations: Float[Tensor, "position d_sae"] = self.sae.activation(self._pre)

    def root(self, latent: int, query: int) -> Node:
        """Return the node of a feature at a token, active there or not.

        Raises:
            HeadscopeError: no such latent or position.
        """
        for what, number, n in (("latent", latent, self.sae.d_sae), ("position", query, len(self._pre))):
            if not 0 <= number < n:
                raise HeadscopeError(f"{what} {number}", expected=f"0 to {n - 1}", do=f"name another {what}")
        return Node("feature", latent, query, (), query, self._pre[query, latent].item())

    def expand(self, node: Node) -> tuple[Node, ...]:
        """Return the children of a node; nothing for a leaf.

        A feature has its heads and its constant; a head, sources; a source, the parts of the stream there.
        """
        if node.kind == "feature":
            return (*self._heads(node), self._child(node, "constant", self._weights.bias[node.latent].item()))
        if node.kind == "source":
            return self._parts(node)
        match node.part:
            case Part("head", int(layer), int(head)):
                return self._sources(node, layer, head)
        return ()

    def tree(self, latent: int, query: int, *, depth: int = 3, threshold: float = 0.01) -> Tree:
        """Expand a feature, its larger children, theirs, and so on.

        Args:
            latent: the feature.
            query: its position.
            depth: levels below the feature: 1 is its heads, 2 their sources, 3 the parts there, 4 the sources of those
                that are heads, ...
            threshold: children smaller than this share of `sum over heads |C_h|` go to the rest.

        Raises:
            HeadscopeError: no such latent or position.
        """
        root = self.root(latent, query)
        least = threshold * sum(abs(head.value) for head in self._heads(root))
        return self._grown(root, depth, least)

    def split(self, latent: int, query: int) -> Float[Tensor, "head source part"]:
        """Return R[h, s, r] for all heads, sources and parts (`self.stream.parts()`, without the features of SAEs)."""
        self.root(latent, query)
        read = directions_read(self.stream.upstream, self._weights.encoder[:, latent])
        along = self.stream.along(read)[:, 0] / self.stream.scale[self.layer][0]  # [part, source, head]
        pattern = self.stream.attention[self.layer].pattern[0, :, query]
        return along.permute(2, 1, 0) * pattern[..., None]

    # ----------------------------------------------------------------------------------------------------------- steps
    def _grown(self, node: Node, depth: int, least: float) -> Tree:
        children = self.expand(node) if depth else ()
        kept = sorted((c for c in children if abs(c.value) >= least), key=lambda c: -abs(c.value))
        rest = [c.value for c in children if abs(c.value) < least]
        return Tree(node, tuple(self._grown(c, depth - 1, least) for c in kept), sum(rest, 0.0), len(rest))

    def _child(self, node: Node, kind: NodeKind, value: float, part: Part | None = None) -> Node:
        return Node(kind, node.latent, node.query, node.hops, node.position, value, part)

    def _heads(self, node: Node) -> tuple[Node, ...]:
        z = self.stream.z(self.layer)[0, node.query]
        values = (z * self._weights.encoder[:, node.latent]).sum(-1).tolist()
        return tuple(
            self._child(node, "head", value, Part("head", self.layer, head)) for head, value in enumerate(values)
        )

    def _sources(self, node: Node, layer: int, head: int) -> tuple[Node, ...]:
        upto = node.position + 1
        of_z = self._read_of_z(node, node.hops, layer, head)
        pattern = self.stream.attention[layer].pattern[0, head, node.position, :upto]
        values = pattern * (self.stream.value(layer)[0, :upto, head] @ of_z)
        return tuple(
            Node("source", node.latent, node.query, (*node.hops, Hop(layer, head, s)), s, value)
            for s, value in enumerate(values.tolist())
        )

    def _parts(self, node: Node) -> tuple[Node, ...]:
        layer, p = node.hops[-1].layer, node.position
        read = self._read_of_stream(node, node.hops)
        found = [(part, (self.stream.vector(part)[0, p] @ read).item()) for part in self.stream.parts(layer)]
        for site, written in self.stream.written.items():
            if site.layer < layer:
                latents = written.f[0, p].nonzero()[:, 0]
                values = written.f[0, p, latents] * (written.directions[latents] @ read)
                names = [Part("feature", site.layer, site=site.kind, latent=latent) for latent in latents.tolist()]
                found += zip(names, values.tolist(), strict=True)
        return tuple(self._child(node, "part", value, part) for part, value in found)

    def _read_of_z(self, node: Node, hops: tuple[Hop, ...], layer: int, head: int) -> Float[Tensor, " d_head"]:
        """Return the direction in which a node, some hops away from its feature, reads a head's z."""
        if not hops:
            return self._weights.encoder[head, node.latent]
        return self.stream.upstream.output[layer][head] @ self._read_of_stream(node, hops)

    def _read_of_stream(self, node: Node, hops: tuple[Hop, ...]) -> Float[Tensor, " d_model"]:
        """Return the direction in which it reads the stream at the source of the last hop."""
        *earlier, hop = hops
        at = earlier[-1].source if earlier else node.query
        of_z = self._read_of_z(node, tuple(earlier), hop.layer, hop.head)
        weight = self.stream.attention[hop.layer].pattern[0, hop.head, at, hop.source]
        read = self.stream.upstream.read_by(hop.layer, hop.head, of_z)
        return read * weight / self.stream.scale[hop.layer][0, hop.source]


def directions_read(
    upstream: Upstream, of_z: Float[Tensor, "head *direction d_head"]
) -> Float[Tensor, "head *direction d_model"]:
    """Return the directions of the stream that each head's values map to directions of its z."""
    return torch.stack([upstream.read_by(upstream.layer, head, w) for head, w in enumerate(of_z)])


def check_z(sae: SAE) -> None:
    """Raise SAEError unless an SAE reads z: only for z is the pre-activation a sum over heads and sources."""
    if sae.site.kind != "z":
        raise SAEError(f"an SAE of {sae.site.kind}", expected="one of z", do="pass an SAE of attention's z")
