"""Activation patching with a feature as the metric.

Two prompts, in one of which the feature is on (clean) and in the other off (corrupted). *Noising* runs the clean prompt
with some components as in the corrupted run, *denoising* the corrupted prompt with them as in the clean run. Both are
scaled so that the corrupted run is 0 and the clean run is 1, for the pre-activation (graded) and for the activation
(0 where the feature is off):

    score = (m - m_corrupted) / (m_clean - m_corrupted)

Noising an irrelevant component scores 1, a necessary one 0; denoising an irrelevant one 0, a sufficient one 1. Patches
are the rows of a batch, and each batch is run from the layer of its first patch on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import HeadscopeError, ModelError
from headscope.stats import MINIMUM_UNITS, Estimate, Measure, mean_interval
from headscope.studies.how.corruptions import PromptPair
from headscope.studies.how.nodes import BY_HEAD, INPUTS, Node, NodeKind, Patch, n_heads, position_embedding
from headscope.studies.how.patch_runs import BaseRun, Transplant

THRESHOLD = 0.1
"""Threshold below which an effect counts as none, for roles."""


@dataclass(frozen=True)
class Scores:
    """Scores of patches in one of the two directions; arrays are in the order of the patches."""

    pre: Float[np.ndarray, " patch"]
    """The pre-activation in the patched run."""
    activation: Float[np.ndarray, " patch"]
    pre_score: Float[np.ndarray, " patch"]
    """0 as in the corrupted run, 1 as in the clean one."""
    activation_score: Float[np.ndarray, " patch"]
    """The same for the activation: changes while the feature is off do not show."""


@dataclass(frozen=True)
class Patching:
    """Patches between two prompts, one run in each direction per patch."""

    pair: PromptPair
    patches: tuple[Patch, ...]
    noising: Scores
    """The clean prompt with the patch from the corrupted run."""
    denoising: Scores
    """The corrupted prompt with the patch from the clean run."""
    definition: str = "(m - m_corrupted) / (m_clean - m_corrupted), m the feature at the query"

    @property
    def n(self) -> int:
        """Pairs of prompts: one. Intervals need more (`average`)."""
        return 1

    def number(self, *nodes: Node) -> int:
        """Return the index of the patch that consists of these nodes.

        Raises:
            HeadscopeError: there is none.
        """
        for number, patch in enumerate(self.patches):
            if set(patch) == set(nodes):
                return number
        raise HeadscopeError(
            f"a patch of {' + '.join(map(str, nodes)) or 'nothing'}", expected="one that was run", do="run it"
        )

    def roles(self, threshold: float = THRESHOLD) -> tuple["Role", ...]:
        """Return the role of each patch, by its activation scores."""
        losses, gains = 1 - self.noising.activation_score, self.denoising.activation_score
        return tuple(role(loss, gain, threshold) for loss, gain in zip(losses.tolist(), gains.tolist(), strict=True))


Role = Literal["no effect", "AND", "OR", "necessary and sufficient", "part"]


def role(loss: float, gain: float, threshold: float = THRESHOLD) -> Role:
    """Classify the role of a component from both directions.

    Args:
        loss: `1 - score` of noising: the effect of removing it.
        gain: the score of denoising: the effect of restoring it alone.
        threshold: effects below it count as none; those above 1 minus it as complete.

    Returns:
        `no effect` below the threshold both ways; `AND` if removing it has an effect and restoring it has none (others
            are needed too); `OR` if restoring it has an effect and removing it has none (others compensate); `necessary
            and sufficient` if both are complete; else `part`.
    """
    if loss < threshold and gain < threshold:
        return "no effect"
    if gain < threshold:
        return "AND"
    if loss < threshold:
        return "OR"
    return "necessary and sufficient" if min(loss, gain) > 1 - threshold else "part"


# ---------------------------------------------------------------------------------------------------------------- nodes
def nodes_of(
    pair: PromptPair, kinds: Sequence[NodeKind], *, layers: Iterable[int] | None = None, by_position: bool = False
) -> tuple[Node, ...]:
    """Return all nodes of some kinds that are computed before the feature: one per head where there are heads.

    Args:
        pair: the prompts.
        kinds: kinds of nodes.
        layers: only these.
        by_position: one for each position up to the query that has a counterpart, instead of one for all.

    Raises:
        ModelError: a site that the model does not have.
    """
    model, last = pair.metric.model, pair.metric.sae.site
    places = [p for p in range(pair.query + 1) if pair.counterpart[p] >= 0] if by_position else [None]
    found = []
    for kind in kinds:
        for layer in [0] if kind in INPUTS else range(last.layer + 1) if layers is None else layers:
            node = Node(kind, layer)
            if node.site.depth > last.depth:
                continue
            heads = range(n_heads(model, kind)) if kind in BY_HEAD else [None]
            found += [Node(kind, layer, head, place) for head in heads for place in places]
    return tuple(found)


def _check(pair: PromptPair, node: Node) -> None:
    """Reject a node that does not exist, or that cannot be patched between these prompts."""
    model, last = pair.metric.model, pair.metric.sae.site
    if node.kind not in get_args(NodeKind):
        raise HeadscopeError(f"a node {node.kind!r}", expected=f"one of {', '.join(get_args(NodeKind))}", do="name one")
    model.check_site(node.site)
    if node.site.depth > last.depth:
        raise HeadscopeError(
            f"{node}, which is computed after {last.hook_name}", expected="what comes before it", do="name another node"
        )
    if node.head is not None and (node.kind not in BY_HEAD or not 0 <= node.head < n_heads(model, node.kind)):
        n = n_heads(model, node.kind) if node.kind in BY_HEAD else 0
        raise ModelError(
            f"head {node.head} of {node.kind} of layer {node.layer}",
            expected=f"0 to {n - 1}" if n else "no head: it has none",
            do="name another head",
        )
    if node.position is not None and not 0 <= node.position < len(pair.clean):
        raise HeadscopeError(
            f"position {node.position} of a prompt of {len(pair.clean)} tokens",
            expected=f"0 to {len(pair.clean) - 1}",
            do="name another position",
        )
    if node.position is not None and pair.counterpart[node.position] < 0:
        raise HeadscopeError(
            f"position {node.position}, which has no counterpart in the corrupted prompt",
            expected="a position that both prompts share",
            do="name another position",
        )
    if node.kind == "pattern" and not pair.aligned:
        raise HeadscopeError(
            "patterns of prompts of different lengths", expected="as many sources", do="patch q, k or z instead"
        )
    if node.kind == "position" and not position_embedding(model, pair.clean).any():
        raise ModelError(
            f"position embeddings of {model.spec.name}",
            expected="a model that adds them to its token embeddings",
            do="patch q and k, which is where positions enter",
        )


# ---------------------------------------------------------------------------------------------------------------- patch
def patch(pair: PromptPair, patches: Sequence[Node | Patch]) -> Patching:
    """Patch each of some nodes, or sets of nodes, between two prompts, in both directions.

    Args:
        pair: the prompts.
        patches: each a node, or a tuple of nodes that are patched together.

    Raises:
        ModelError: no such layer, site or head; position embeddings of a model without them.
        HeadscopeError: a node that is computed after the feature, or a position without counterpart.
    """
    sets = tuple(p if isinstance(p, tuple) else (p,) for p in patches)
    for node in dict.fromkeys(node for nodes in sets for node in nodes):
        _check(pair, node)
    sites = list(dict.fromkeys(node.site for nodes in sets for node in nodes))
    clean, corrupted = BaseRun(pair.metric, pair.clean, sites), BaseRun(pair.metric, pair.corrupted, sites)
    back = torch.full_like(pair.corrupted, -1)
    shared = pair.counterpart >= 0
    back[pair.counterpart[shared]] = shared.nonzero()[:, 0]
    noising = Transplant(clean, corrupted, pair.counterpart, torch.arange(len(pair.clean), device=back.device))
    denoising = Transplant(corrupted, clean, back, pair.counterpart)
    return Patching(
        pair,
        sets,
        scored(pair, *noising.read(sets, pair.query)),
        scored(pair, *denoising.read(sets, int(pair.counterpart[pair.query]))),
    )


def scored(pair: PromptPair, pre: Float[Tensor, " patch"], activation: Float[Tensor, " patch"]) -> Scores:
    """Scale the results of patched runs: 0 as in the corrupted run, 1 as in the clean run."""
    on, off = pair.on, pair.off
    return Scores(
        pre=_numpy(pre),
        activation=_numpy(activation),
        pre_score=(_numpy(pre) - off.pre) / (on.pre - off.pre),
        activation_score=(_numpy(activation) - off.activation) / (on.activation - off.activation),
    )


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


# ----------------------------------------------------------------------------------------------------------- many pairs
@dataclass(frozen=True)
class AverageEffect:
    """One patch over several pairs of prompts: mean scores."""

    patch: Patch
    noising: Measure
    """Mean of the pre-activation scores."""
    denoising: Measure
    noising_activation: Measure
    denoising_activation: Measure


def average(results: Sequence[Patching], *, n_samples: int = 1000, seed: int = 0) -> tuple[AverageEffect, ...]:
    """Average scores of the same patches over pairs of prompts, with intervals by resampling the pairs.

    The null of a score is that of an irrelevant patch: exactly 1 for noising and 0 for denoising.

    Raises:
        HeadscopeError: no results, or results of different patches.
    """
    if not results or any(result.patches != results[0].patches for result in results):
        raise HeadscopeError(
            f"{len(results)} results to average",
            expected="one or more, all of the same patches",
            do="patch nodes that all pairs have: at all positions, say",
        )

    def measured(direction: Callable[[Patching], Scores], name: str, what: str) -> list[Measure]:
        values = np.stack([getattr(direction(result), name) for result in results])  # [pair, patch]
        nothing = float(what.startswith("noising"))
        null = Estimate(nothing, nothing, nothing)
        return [
            replace(_mean(f"mean over pairs of prompts of the {what}", own, n_samples, seed), null=null)
            for own in values.T
        ]

    columns = zip(
        results[0].patches,
        measured(lambda r: r.noising, "pre_score", "noising score of the pre-activation"),
        measured(lambda r: r.denoising, "pre_score", "denoising score of the pre-activation"),
        measured(lambda r: r.noising, "activation_score", "noising score of the activation"),
        measured(lambda r: r.denoising, "activation_score", "denoising score of the activation"),
        strict=True,
    )
    return tuple(AverageEffect(*column) for column in columns)


def _mean(definition: str, values: Float[np.ndarray, " unit"], n_samples: int, seed: int) -> Measure:
    n, value = len(values), float(values.mean())
    if n < MINIMUM_UNITS:
        return Measure(definition, n, value, missing=f"no interval: {n} pairs, at least {MINIMUM_UNITS} are needed")
    found = mean_interval(values, n_samples=n_samples, seed=seed)
    if found is None:
        return Measure(definition, n, value, missing="no interval: all pairs alike")
    return Measure(definition, n, value, *found, interval="pairs resampled, 95 %")


# ------------------------------------------------------------------------------------------------------------- and, or
Joint = Literal["AND", "OR", "neither", "mixed"]


@dataclass(frozen=True)
class Interaction:
    """Two patches, singly and jointly."""

    first: Patch
    second: Patch
    patching: Patching
    """Patches of the first, the second, and both."""
    threshold: float
    """Activation score above which the feature counts as on."""

    @property
    def on_without(self) -> tuple[bool, bool, bool]:
        """Whether the feature stays on when the first, the second, both are noised."""
        return self._on(self.patching.noising)

    @property
    def on_with(self) -> tuple[bool, bool, bool]:
        """Whether the feature switches on when the first, the second, both are denoised."""
        return self._on(self.patching.denoising)

    @property
    def kind(self) -> Joint:
        """Logical relation of the two patches.

        `AND`: noising either switches it off, and only denoising both switches it on. `OR`: denoising either switches
        it on, and only noising both switches it off. `neither`: both together have no effect in either direction.
        `mixed`: anything else.
        """
        match self.on_without, self.on_with:
            case (False, False, False), (False, False, True):
                return "AND"
            case (True, True, False), (True, True, True):
                return "OR"
            case (True, True, True), (False, False, False):
                return "neither"
            case _:
                return "mixed"

    @property
    def excess(self) -> tuple[float, float]:
        """Joint effect on the activation minus the sum of the single effects, for noising and for denoising.

        Effects are `1 - score` for noising and the score for denoising; 0 where effects add up. It measures how much
        the two need or replace each other; `kind` whether that switches the feature.
        """
        loss, gain = 1 - self.patching.noising.activation_score, self.patching.denoising.activation_score
        return float(loss[2] - loss[0] - loss[1]), float(gain[2] - gain[0] - gain[1])

    def _on(self, scores: Scores) -> tuple[bool, bool, bool]:
        first, second, both = (scores.activation_score > self.threshold).tolist()
        return first, second, both


def interaction(pair: PromptPair, first: Node | Patch, second: Node | Patch, *, threshold: float = 0.0) -> Interaction:
    """Patch two components singly and jointly, in both directions, to distinguish AND from OR.

    Args:
        pair: the prompts.
        first: a node, or several together.
        second: likewise.
        threshold: the feature is on where its activation score is above this; 0 is any activation.

    Raises:
        ModelError, HeadscopeError: as in `patch`.
    """
    one, two = (p if isinstance(p, tuple) else (p,) for p in (first, second))
    return Interaction(one, two, patch(pair, [one, two, (*one, *two)]), threshold)
