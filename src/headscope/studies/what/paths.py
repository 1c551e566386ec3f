"""Paths from a write to the residual stream to the logits, each with the others held fixed.

A feature of layer L writes w to the stream at `attn_out` of L. With every other component at its baseline value,

    direct    resid_post + w
    mlp.m     resid_post + mlp_m(mlp_in_m + w) - mlp_out_m           m >= L; m > L where blocks are parallel
    attn.m    resid_post + attn_m(resid_pre_m + w) - attn_out_m      m > L

are final residual streams, and the loss change of each is the effect of that path; attention-only models have no mlp.m.
A path through two components is in `total` only: the run in which everything after the write sees it. In the last layer
there is none, so the outputs of the paths add up exactly; their losses need not, after the final norm and the softmax.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.interventions import add, replace
from headscope.models.hf import Edit, Model, ModelSpec
from headscope.site import AnyKind, Site

_ROWS = 4096  # rows of an MLP computed at a time


def path_names(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """Return `total`, `direct`, and the components that read a layer's attention output, in model order."""
    kinds = ("attn",) if spec.attention_only else ("attn", "mlp")
    own = () if spec.parallel or spec.attention_only else (f"mlp.{layer}",)
    return ("total", "direct", *own, *(f"{kind}.{m}" for m in range(layer + 1, spec.n_layers) for kind in kinds))


def path_definition(path: str) -> str:
    """Return the definition of a path, in one line."""
    if path == "total":
        return "the loss when everything after the ablation sees it, less that of the baseline"
    if path == "direct":
        return "the loss when only the final residual stream sees it, every later component as in the baseline"
    kind, layer = path.split(".")
    name = "MLP" if kind == "mlp" else "attention"
    return (
        f"the loss when only {name} of layer {layer} sees it and only the final residual stream sees what that changes"
    )


class BaselineRun:
    """The baseline run of a batch of blocks, and the loss changes by writes to their streams."""

    def __init__(
        self,
        model: Model,
        layer: int,
        tokens: Int[Tensor, "block position"],
        edits: Mapping[Site, Edit],
        *,
        frozen: bool,
    ) -> None:
        """Run the model once.

        Args:
            model: the model of the paths.
            layer: layer of the writing attention.
            tokens: the blocks.
            edits: edits of the baseline; none for the unedited model.
            frozen: freeze the norm scales.
        """
        self.model, self.layer, self.tokens, self.edits, self.frozen = model, layer, tokens, edits, frozen
        self._last = model.spec.n_layers - 1
        self.paths = path_names(model.spec, layer)
        components = [path.split(".") for path in self.paths[2:]]
        kinds: dict[str, list[AnyKind]] = {"mlp": ["mlp_in", "mlp_out"], "attn": ["attn_out"]}
        scales: dict[str, AnyKind] = {"mlp": "ln2_scale", "attn": "ln1_scale"}
        sites = [Site(kind, int(m)) for name, m in components for kind in kinds[name]]
        sites.append(Site("resid_post", self._last))
        if frozen:
            sites += [Site(scales[name], int(m)) for name, m in components] + [Site("ln_final_scale", self._last)]
        with model.edit(edits):
            self._found = model.read(tokens, sites)

    def losses(self, block: Int[Tensor, " row"], query: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return the baseline losses at some tokens."""
        return self._final(block, query, 0.0)

    def changes(
        self, block: Int[Tensor, " row"], query: Int[Tensor, " row"], write: Float[Tensor, "row d_model"]
    ) -> dict[str, Float[Tensor, " row"]]:
        """Return the loss change by a write at the same token, by path: in the last layer, where no attention follows.

        Each row is equivalent to a separate run, and costs the MLP and the unembedding of one token.
        """
        clean = self.losses(block, query)
        added = {"direct": write}
        if f"mlp.{self.layer}" in self.paths:
            added[f"mlp.{self.layer}"] = self._through_mlp(self.layer, block, query, write)
        added["total"] = torch.stack(list(added.values())).sum(0)
        return {path: self._final(block, query, added[path]) - clean for path in self.paths}

    def block_changes(
        self, block: Int[Tensor, " row"], write: Float[Tensor, "row position d_model"]
    ) -> dict[str, Float[Tensor, "row predicting"]]:
        """Return the loss change at each token by writes all over blocks, by path, in any layer: edited runs."""
        tokens, size = self.tokens[block], self.tokens.shape[1]
        each = block[:, None].expand(-1, size - 1).reshape(-1)
        query = torch.arange(size - 1, device=block.device).repeat(len(block))
        own = write[:, :-1].flatten(0, 1)
        clean = self.losses(each, query)
        changes = {}
        for path in self.paths:
            if path == "total":
                losses = self._rerun(tokens, block, write).flatten()
            elif path == "direct":
                losses = self._final(each, query, own)
            else:
                name, m = path.split(".")
                if name == "mlp":
                    added = self._through_mlp(int(m), each, query, own)
                else:
                    added = self._through_attention(int(m), tokens, block, write)[:, :-1].flatten(0, 1)
                losses = self._final(each, query, added)
            changes[path] = (losses - clean).view(len(block), -1)
        return changes

    # ----------------------------------------------------------------------------------------------------------- steps
    def _at(self, kind: AnyKind, layer: int, block: Tensor, query: Tensor) -> Tensor:
        return self._found[Site(kind, layer)][block, query]

    def _final(self, block: Tensor, query: Tensor, added: Tensor | float) -> Tensor:
        """Return the losses with a vector added to the final residual stream."""
        residual = self._at("resid_post", self._last, block, query) + added
        scale = self._at("ln_final_scale", self._last, block, query) if self.frozen else None
        return self.model.final_losses(residual, self.tokens[block, query + 1], scale)

    def _through_mlp(self, layer: int, block: Tensor, query: Tensor, write: Tensor) -> Tensor:
        """Return the change of an MLP's output when it reads a write."""
        parts = []
        for rows in torch.arange(len(block), device=block.device).split(_ROWS):
            b, q = block[rows], query[rows]
            scale = self._at("ln2_scale", layer, b, q) if self.frozen else None
            after = self.model.mlp(layer, self._at("mlp_in", layer, b, q) + write[rows], scale)
            parts.append(after - self._at("mlp_out", layer, b, q))
        return torch.cat(parts) if parts else write

    def _through_attention(self, layer: int, tokens: Tensor, block: Tensor, write: Tensor) -> Tensor:
        """Return the change of attention's output when it reads a write, at all tokens."""
        site = Site("attn_out", layer)
        edits: dict[Site, Edit] = {Site("resid_pre", layer): add(write)}
        with ExitStack() as stack:
            stack.enter_context(self.model.edit(self.edits))
            stack.enter_context(self.model.edit(edits | self._held(block, ["ln1_scale"], [layer])))
            return self.model.read(tokens, [site])[site] - self._found[site][block]

    def _rerun(self, tokens: Tensor, block: Tensor, write: Tensor) -> Tensor:
        """Return the losses of the run in which everything after the write sees it."""
        edits: dict[Site, Edit] = {Site("attn_out", self.layer): add(write)}
        later = range(self.layer, self.model.spec.n_layers)
        held = self._held(block, ["ln1_scale", "ln2_scale", "ln_final_scale"], later)
        with self.model.edit(self.edits), self.model.edit(edits | held):
            return self.model.losses(tokens)

    def _held(self, block: Tensor, kinds: list[AnyKind], layers: "range | list[int]") -> dict[Site, Edit]:
        """Return edits that freeze the recorded norm scales, if norms are frozen."""
        sites = [Site(kind, m) for kind in kinds for m in layers]
        return {s: replace(self._found[s][block]) for s in sites if s in self._found} if self.frozen else {}
