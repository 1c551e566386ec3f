"""Ablate features at their active tokens, and measure the effect on the loss, by path.

In the last layer no attention comes after the feature, so ablating it at a token changes the logits there and nowhere
else: many (token, feature) pairs form one batch of rows through the last MLP and the unembedding, and each block is run
once. Before the last layer each ablation is an edited run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import HeadscopeError
from headscope.index.live import LiveIndex
from headscope.interventions import reconstruction
from headscope.models.hf import Edit
from headscope.site import Site
from headscope.stats import Estimate, ratio
from headscope.studies.support.active import ActiveTokens, Text, drawn
from headscope.studies.what.downstream import (
    BASELINES,
    NORMS,
    WHERES,
    Baseline,
    Downstream,
    Norms,
    PathEffect,
    Where,
)
from headscope.studies.what.paths import BaselineRun, path_definition, path_names

N_NULL = 16
"""Tokens of each feature at which a random direction is ablated instead."""
_BATCH_TOKENS = 2048  # processed in one run
_RERUN_TOKENS = 8192  # in one edited run
_NULL_KEY = 1  # distinguishes the random numbers of null directions from those of samples

Progress = Callable[[int, int], None]
"""Progress callback: called with the blocks done and the total."""


@dataclass(frozen=True)
class _Setting:
    baseline: Baseline
    where: Where
    norms: Norms
    most: int | None
    seed: int

    def __post_init__(self) -> None:
        for name, value, known in (
            ("baseline", self.baseline, BASELINES),
            ("where", self.where, WHERES),
            ("norms", self.norms, NORMS),
        ):
            if value not in known:
                raise HeadscopeError(f"{name} {value!r}", expected=f"one of {', '.join(known)}", do="name one of these")
        if self.most is not None and self.most < 1:
            raise HeadscopeError(f"max_tokens {self.most}", expected="at least 1, or None for all", do="pass that")


@dataclass(frozen=True)
class _Rows:
    """Rows of results: one per (feature or null, token)."""

    number: np.ndarray  # index among the requested features
    null: np.ndarray  # whether a random direction replaces the feature
    position: np.ndarray
    activation: np.ndarray
    loss: np.ndarray
    changes: np.ndarray  # [row, path]
    later: np.ndarray  # [row, path]

    @classmethod
    def joined(cls, parts: Sequence["_Rows"], n_paths: int) -> "_Rows":
        if not parts:
            none, numbers = np.empty(0, np.int64), np.empty(0)
            return cls(none, none.astype(bool), none, numbers, numbers, *np.empty((2, 0, n_paths)))
        return cls(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))

    def of(self, number: int, *, null: bool) -> "_Rows":
        """Return the rows of one feature, by position."""
        own = np.flatnonzero((self.number == number) & (self.null == null))
        own = own[np.argsort(self.position[own], kind="stable")]
        return _Rows(*(values[own] for values in vars(self).values()))


def downstream(
    live: LiveIndex,
    latents: Sequence[int],
    *,
    baseline: Baseline = "error kept",
    where: Where = "everywhere",
    norms: Norms = "recomputed",
    max_tokens: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> tuple[Downstream, ...]:
    """Measure the effect of ablating each of some features on the loss of each next token: in total, and by path.

    Args:
        live: the index with its model and SAE.
        latents: the features; each is ablated alone.
        baseline: keep the SAE's error (the default), or run inside its reconstruction.
        where: ablate a feature at all its active tokens of a block at once, or at one. Equivalent in the last layer.
        norms: recomputed after the ablation (the default), or frozen.
        max_tokens: maximum number of active tokens per feature, sampled uniformly; None: all. Before the last layer
            with `everywhere`, blocks are sampled that together contain at least this many.
        seed: seed of the samples.
        on_progress: called as blocks are done.

    Returns:
        A record for each latent, in order; one without tokens for a dead feature.

    Raises:
        IndexFormatError: no such latent.
        HeadscopeError: an invalid baseline, where or norms.
    """
    setting = _Setting(baseline, where, norms, max_tokens, seed)
    work = _Ablation(live, list(latents), setting)
    rows = work.run(on_progress or (lambda _done, _total: None))
    return tuple(work.record(number, rows) for number in range(len(work.latents)))


class _Ablation:
    """The sampled tokens of features, and the necessary runs."""

    def __init__(self, live: LiveIndex, latents: list[int], setting: _Setting) -> None:
        self.model, self.sae, self.setting = live.model, live.sae, setting
        self.layer = live.sae.site.layer
        self.latents = latents
        self.last = self.layer == self.model.spec.n_layers - 1
        self.paths = path_names(self.model.spec, self.layer)
        self.text = Text.of(live.index)
        self.size = live.index.block_size
        counted = self.text.counted.reshape(-1)
        self.active = [ActiveTokens.of(live.index, counted, latent) for latent in latents]
        self.output = self.model.W_O(self.layer)
        self.directions = self.sae.W_dec[torch.as_tensor(latents, dtype=torch.int64)] @ self.output
        self.whole_blocks = setting.where == "everywhere" and not self.last
        self.number, self.null, self.position = self._chosen()

    def _chosen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (number, null, position) of the ablations, by position; for whole blocks, of their first."""
        found = []
        for number, (latent, active) in enumerate(zip(self.latents, self.active, strict=True)):
            if self.whole_blocks:
                chosen = self._blocks(latent, active.position // self.size) * self.size
                nulls = chosen[:1]
            else:
                chosen = active.position[drawn(active.n, self.setting.most, (self.setting.seed, latent))]
                nulls = chosen[drawn(len(chosen), N_NULL, (self.setting.seed, latent, _NULL_KEY))]
            position = np.concatenate([chosen, nulls])
            null = np.repeat([False, True], [len(chosen), len(nulls)])
            found.append((np.full(len(position), number), null, position))
        number, null, position = (np.concatenate(values) for values in zip(*found, strict=True)) if found else _NONE
        order = np.lexsort((null, number, position))
        return number[order], null[order], position[order]

    def _blocks(self, latent: int, block: np.ndarray) -> np.ndarray:
        """Return blocks with enough active tokens."""
        blocks, n = np.unique(block, return_counts=True)
        order = np.random.default_rng((self.setting.seed, latent)).permutation(len(blocks))
        most = self.setting.most
        needed = len(blocks) if most is None else 1 + int(np.searchsorted(np.cumsum(n[order]), most))
        return np.sort(blocks[order[:needed]])

    # ------------------------------------------------------------------------------------------------------------ runs
    def run(self, report: Progress) -> _Rows:
        """Do all runs, a few blocks at a time."""
        blocks = np.unique(self.position // self.size)
        step, parts = max(1, _BATCH_TOKENS // self.size), []
        edits: dict[Site, Edit] = {}
        if self.setting.baseline == "reconstruction":
            edits[self.sae.site] = reconstruction(self.sae)
        for start in range(0, len(blocks), step):
            report(start, len(blocks))
            own = blocks[start : start + step]
            low, high = np.searchsorted(self.position, [own[0] * self.size, (own[-1] + 1) * self.size])
            parts += self._of_blocks(own, slice(low, high), edits)
        report(len(blocks), len(blocks))
        return _Rows.joined(parts, len(self.paths))

    def _of_blocks(self, blocks: np.ndarray, chosen: slice, edits: Mapping[Site, Edit]) -> Iterator[_Rows]:
        device = self.model.device
        tokens = torch.from_numpy(self.text.tokens[blocks].astype(np.int64)).to(device)
        frozen = self.setting.norms == "frozen"
        run = BaselineRun(self.model, self.layer, tokens, edits, frozen=frozen)
        f = self.sae.encode(self.model.read(tokens, [self.sae.site])[self.sae.site])
        f = f * torch.from_numpy(self.text.is_text[blocks]).to(device)[..., None]
        position = self.position[chosen]
        block = torch.from_numpy(np.searchsorted(blocks, position // self.size)).to(device)
        query = torch.from_numpy(position % self.size).to(device)
        number = torch.from_numpy(self.number[chosen]).to(device)
        latent = torch.tensor(self.latents, device=device)[number]
        directions = self._directions(chosen)
        if self.last:
            activation = f[block, query, latent]
            changes = run.changes(block, query, -activation[:, None] * directions)
            yield self._rows(self._which(chosen), activation, run.losses(block, query), changes)
            return
        rows = max(1, _RERUN_TOKENS // self.size)
        for start in range(0, len(position), rows):
            part = slice(start, start + rows)
            own = slice(chosen.start + start, min(chosen.start + start + rows, chosen.stop))
            activation = f[block[part], :, latent[part]]  # [row, position]
            if self.setting.where == "one":
                activation = activation * torch.nn.functional.one_hot(query[part], self.size)
            changes = run.block_changes(block[part], -activation[..., None] * directions[part, None])
            if self.setting.where == "one":
                yield self._rows_of_one(own, run, block[part], query[part], activation, changes)
            else:
                yield self._rows_of_blocks(own, blocks, run, block[part], activation, changes)

    def _directions(self, chosen: slice) -> Float[Tensor, "row d_model"]:
        """Return the output of each row at activation 1; for a null, as long in a random direction heads can write."""
        number, null, position = self.number[chosen], self.null[chosen], self.position[chosen]
        directions = self.directions[torch.from_numpy(number).to(self.model.device)]
        for i in np.flatnonzero(null):
            key = self.setting.seed, self.latents[number[i]], int(position[i]), _NULL_KEY
            z = torch.from_numpy(np.random.default_rng(key).standard_normal(self.sae.d_in)).to(self.output)
            random = z @ self.output
            directions[i] = random * (directions[i].norm() / random.norm())
        return directions

    def _which(self, own: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.number[own], self.null[own], self.position[own]

    def _rows(
        self,
        which: tuple[np.ndarray, np.ndarray, np.ndarray],
        activation: Tensor,
        loss: Tensor,
        changes: dict[str, Tensor],
        later: dict[str, Tensor] | None = None,
    ) -> _Rows:
        """Make rows of some (number, null, position)."""
        by_path = torch.stack([changes[path] for path in self.paths], dim=1)
        after = torch.zeros_like(by_path) if later is None else torch.stack([later[p] for p in self.paths], dim=1)
        measured = (values.double().cpu().numpy() for values in (activation, loss, by_path, after))
        return _Rows(*which, *measured)

    def _rows_of_one(
        self,
        own: slice,
        run: BaselineRun,
        block: Int[Tensor, " row"],
        query: Int[Tensor, " row"],
        activation: Float[Tensor, "row position"],
        changes: dict[str, Float[Tensor, "row predicting"]],
    ) -> _Rows:
        each = torch.arange(len(block), device=block.device)
        at = {path: change[each, query] for path, change in changes.items()}
        later = {path: change.sum(1) - at[path] for path, change in changes.items()}  # earlier ones are 0
        loss = run.losses(block, query)
        return self._rows(self._which(own), activation[each, query], loss, at, later)

    def _rows_of_blocks(
        self,
        own: slice,
        blocks: np.ndarray,
        run: BaselineRun,
        block: Int[Tensor, " row"],
        activation: Float[Tensor, "row position"],
        changes: dict[str, Float[Tensor, "row predicting"]],
    ) -> _Rows:
        """Make rows of the counted tokens of each row's block."""
        row, query = np.nonzero(self.text.counted[blocks[block.cpu().numpy()]])
        r, q = torch.from_numpy(row).to(block.device), torch.from_numpy(query).to(block.device)
        at = {path: change[r, q] for path, change in changes.items()}
        number, null, first = (values[row] for values in self._which(own))
        return self._rows((number, null, first + query), activation[r, q], run.losses(block[r], q), at)

    # --------------------------------------------------------------------------------------------------------- records
    def record(self, number: int, rows: _Rows) -> Downstream:
        """Make the record of one feature."""
        own, null = rows.of(number, null=False), rows.of(number, null=True)
        document = self.text.document.reshape(-1)[own.position]
        later = self.setting.where == "one" and not self.last
        effects = {}
        for i, path in enumerate(self.paths):
            definition = path_definition(path)
            mean = ratio(
                document,
                own.changes[:, i],
                np.ones(len(document)),
                definition=f"mean loss change by path {path}, nats a token",
                null=_range(null.changes[:, i]),
            )
            effects[path] = PathEffect(path, definition, own.changes[:, i], own.later[:, i] if later else None, mean)
        return Downstream(
            latent=self.latents[number],
            layer=self.layer,
            baseline=self.setting.baseline,
            where=self.setting.where,
            norms=self.setting.norms,
            n_active=self.active[number].n,
            position=own.position,
            activation=own.activation,
            next_token=self.text.next_token(own.position),
            document=document,
            loss=own.loss,
            paths=effects,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.model.spec.parallel:
            notes.append("attention and MLP of a block stand side by side: no path leads through the MLP of this layer")
        if self.model.spec.attention_only:
            notes.append("the model has no MLPs: no path leads through one")
        if self.last:
            notes.append("last layer: an ablation changes the loss at its own token alone, so one and everywhere agree")
        else:
            notes.append("a path through two later components is in total alone, and so in the interaction")
        return tuple(notes)


_NONE = (np.empty(0, np.int64), np.empty(0, bool), np.empty(0, np.int64))


def _range(changes: np.ndarray) -> Estimate | None:
    """Return the mean, and the range that holds 95 %."""
    if not len(changes):
        return None
    low, high = np.percentile(changes, [2.5, 97.5])
    return Estimate(float(changes.mean()), float(low), float(high))
