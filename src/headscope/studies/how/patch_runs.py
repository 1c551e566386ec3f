"""Runs of one prompt with values from another prompt's run: patches are the rows of a batch."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.models.hf import Edit, Restart
from headscope.site import Site
from headscope.studies.how.corruptions import FeatureMetric
from headscope.studies.how.nodes import BY_HEAD, Node, NodeKind, Patch, n_heads, position_embedding

_BATCH_TOKENS = 8192


class _Read(Exception):  # noqa: N818 - control flow, not an error
    """The feature has been read: the rest of the run is skipped."""


class BaseRun:
    """The unedited run of a prompt: values at some sites, and the inputs of its blocks, to resume from there."""

    def __init__(self, metric: FeatureMetric, tokens: Int[Tensor, " position"], sites: Sequence[Site]) -> None:
        """Run the prompt once, up to the feature."""
        self.metric, self.tokens = metric, tokens
        with metric.model.restartable(0) as self._restart:
            self.found = metric.model.read(tokens[None], [*sites, metric.sae.site])

    def rows_at_once(self) -> int:
        """Number of runs that fit in a batch."""
        return max(1, _BATCH_TOKENS // len(self.tokens))

    def again(
        self, n_rows: int, edits: Mapping[Site, Edit], layer: int, query: int
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """Return pre-activation and activation at the query of n_rows runs with edits, from a layer on."""
        rows = self.tokens.expand(n_rows, -1)
        calls = [((args[0].expand(n_rows, -1, -1), *args[1:]), named) for args, named in self._restart.calls[layer:]]
        return self._feature(rows, edits, query, Restart(layer, calls))

    def with_tokens(
        self, rows: Int[Tensor, "row position"], edits: Mapping[Site, Edit], query: int
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """Return the same from the first layer on, with other tokens."""
        return self._feature(rows, edits, query, None)

    def _feature(
        self, rows: Tensor, edits: Mapping[Site, Edit], query: int, restart: Restart | None
    ) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            found.append(value[:, query])
            raise _Read

        model = self.metric.model
        with model.edit(edits), model.edit({self.metric.sae.site: keep}), suppress(_Read):
            model.losses(rows, restart)
        return self.metric.of(found[0])


@dataclass(frozen=True)
class Transplant:
    """Runs of one prompt with values from another prompt's run."""

    base: BaseRun
    other: BaseRun
    source: Int[Tensor, " position"]
    """Position of the other prompt for each position of the base prompt; -1 where there is none."""
    of_clean: Int[Tensor, " clean"]
    """Position of the base prompt for each position of the clean prompt; -1 where there is none."""

    def read(self, patches: Sequence[Patch], query: int) -> tuple[Tensor, Tensor]:
        """Return pre-activation and activation at the query, one run per patch."""
        starts = [self._start(patch) for patch in patches]
        order = sorted(range(len(patches)), key=starts.__getitem__)
        step = self.base.rows_at_once()
        pre = torch.empty(len(patches), dtype=self.base.metric.sae.W_enc.dtype, device=self.base.tokens.device)
        activation = torch.empty_like(pre)
        for low in range(0, len(order), step):
            chunk = order[low : low + step]
            rows = torch.tensor(chunk, device=pre.device)
            pre[rows], activation[rows] = self._rows([patches[i] for i in chunk], starts[chunk[0]], query)
        return pre, activation

    def _start(self, patch: Patch) -> int:
        """Return the layer from which a run must be repeated; -1 where its tokens change."""
        if any(node.kind == "token" for node in patch):
            return -1
        return min((node.site.layer for node in patch), default=self.base.metric.sae.site.layer)

    def _rows(self, patches: Sequence[Patch], start: int, query: int) -> tuple[Tensor, Tensor]:
        groups: dict[NodeKind, dict[Site, list[tuple[int, Node]]]] = {}
        for row, nodes in enumerate(patches):
            for node in nodes:
                groups.setdefault(node.kind, {}).setdefault(node.site, []).append((row, node))
        edits: dict[Site, Edit] = {}
        for kind in get_args(NodeKind)[1:]:  # an embedded position precedes everything else at its site
            for site, chosen in groups.get(kind, {}).items():
                edit = self._edit(kind, site, self._mask(chosen, len(patches), kind))
                edits[site] = edit if site not in edits else _then(edits[site], edit)
        if start >= 0:
            return self.base.again(len(patches), edits, start, query)
        chosen = [pair for pairs in groups["token"].values() for pair in pairs]
        mask = self._mask(chosen, len(patches), "token")[:, :, 0]
        tokens = torch.where(mask, self._taken(self.other.tokens, 0), self.base.tokens)
        return self.base.with_tokens(tokens, edits, query)

    def _mask(
        self, chosen: Sequence[tuple[int, Node]], n_rows: int, kind: NodeKind
    ) -> Bool[Tensor, "row position head"]:
        """Mark where a site is patched, in each row; one head where a site has none."""
        heads = n_heads(self.base.metric.model, kind) if kind in BY_HEAD else 1
        mask = torch.zeros(n_rows, len(self.source), heads, dtype=torch.bool, device=self.source.device)
        for row, node in chosen:
            where = slice(None) if node.position is None else int(self.of_clean[node.position])
            mask[row, where, slice(None) if node.head is None else node.head] = True
        return mask & (self.source >= 0)[:, None]

    def _taken(self, values: Tensor, axis: int) -> Tensor:
        """Return values of the other run, at the positions of this one; arbitrary without a counterpart."""
        return values.index_select(axis, self.source.clamp_min(0))

    def _edit(self, kind: NodeKind, site: Site, mask: Bool[Tensor, "row position head"]) -> Edit:
        model = self.base.metric.model
        if kind == "position":
            own, other = (position_embedding(model, run.tokens) for run in (self.base, self.other))
            moved = self._taken(other, 0) - own
            return lambda value: value + mask * moved
        if kind == "pattern":  # [row, head, query, source], of prompts of one length
            return lambda value: torch.where(mask.transpose(1, 2)[..., None], self.other.found[site], value)
        taken = self._taken(self.other.found[site], 1)
        if kind == "z":
            wide = mask.repeat_interleave(model.spec.d_head, dim=2)
            return lambda value: torch.where(wide, taken, value)
        laid = mask[..., None] if kind in BY_HEAD else mask
        return lambda value: torch.where(laid, taken, value)


def _then(first: Edit, second: Edit) -> Edit:
    return lambda value: second(first(value))
