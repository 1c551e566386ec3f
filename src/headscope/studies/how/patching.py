"""Activation patching with a feature as the metric: what is moved from one run to another, and what it does to it.

Two prompts, in one of which the feature is on (clean) and in the other off (corrupted). *Noising* runs the clean prompt
with some components as in the corrupted run, *denoising* the corrupted prompt with them as in the clean run. Both are
scaled so that the corrupted run is 0 and the clean run is 1, for the pre-activation (graded) and for the activation
(cut off where the feature is off):

    score = (m - m_corrupted) / (m_clean - m_corrupted)

Noising what does not matter scores 1, what is necessary 0; denoising what does not matter 0, what is sufficient 1. Many
patches are the rows of one batch, each batch run from the layer of its first patch on.
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
"""Effects below this are none, when roles are told."""


@dataclass(frozen=True)
class Scores:
    """What patches do, in one of the two directions; arrays are in the order of the patches."""

    pre: Float[np.ndarray, " patch"]
    """The pre-activation in the patched run."""
    activation: Float[np.ndarray, " patch"]
    pre_score: Float[np.ndarray, " patch"]
    """0 as in the corrupted run, 1 as in the clean one."""
    activation_score: Float[np.ndarray, " patch"]
    """The same of the activation: what happens while the feature is off does not show."""


@dataclass(frozen=True)
class Patching:
    """Patches between two prompts, one run each way for each."""

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
        """Which patch consists of these nodes.

        Raises:
            HeadscopeError: none.
        """
        for number, patch in enumerate(self.patches):
            if set(patch) == set(nodes):
                return number
        raise HeadscopeError(
            f"a patch of {' + '.join(map(str, nodes)) or 'nothing'}", expected="one that was run", do="run it"
        )

    def roles(self, threshold: float = THRESHOLD) -> tuple["Role", ...]:
        """The role of each patch, by its activation scores."""
        losses, gains = 1 - self.noising.activation_score, self.denoising.activation_score
        return tuple(role(loss, gain, threshold) for loss, gain in zip(losses.tolist(), gains.tolist(), strict=True))


Role = Literal["no effect", "AND", "OR", "necessary and sufficient", "part"]


def role(loss: float, gain: float, threshold: float = THRESHOLD) -> Role:
    """What the two directions together say of a component.

    Args:
        loss: `1 - score` of noising: what is lost without it.
        gain: the score of denoising: what it alone brings back.
        threshold: effects below it are none; those above 1 less it are whole.

    Returns:
        `no effect` below the threshold both ways; `AND` if it is lost without it and not brought back by it (it takes
        others too); `OR` if it is brought back by it and not lost without it (others stand in for it); `necessary and
        sufficient` if both are whole; else `part`.
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
    """All nodes of some kinds that are computed before the feature: one a head where there are heads.

    Args:
        pair: the prompts.
        kinds: of the nodes.
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
    """Refuse a node that there is not, or that cannot be patched between these prompts."""
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
    """Patch each of some nodes, or sets of nodes, between two prompts, both ways.

    Args:
        pair: the prompts.
        patches: each a node, or a tuple of nodes that are patched together.

    Raises:
        ModelError: a layer, site or head that there is not; position embeddings of a model without them.
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
    """Scale what patched runs give: 0 as in the corrupted run, 1 as in the clean run."""
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
    """Of the pre-activation scores."""
    denoising: Measure
    noising_activation: Measure
    denoising_activation: Measure


def average(results: Sequence[Patching], *, n_samples: int = 1000, seed: int = 0) -> tuple[AverageEffect, ...]:
    """Mean scores of the same patches over pairs of prompts, with intervals by resampling the pairs.

    The null of a score is what a patch that nothing depends on has: exactly 1 for noising and 0 for denoising.

    Raises:
        HeadscopeError: no result, or results of other patches.
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
    """Two patches alone and together."""

    first: Patch
    second: Patch
    patching: Patching
    """Of the first, the second, and both."""
    threshold: float
    """On is an activation score above this."""

    @property
    def on_without(self) -> tuple[bool, bool, bool]:
        """Whether the feature stays on when the first, the second, both are noised."""
        return self._on(self.patching.noising)

    @property
    def on_with(self) -> tuple[bool, bool, bool]:
        """Whether the feature comes on when the first, the second, both are denoised."""
        return self._on(self.patching.denoising)

    @property
    def kind(self) -> Joint:
        """By which of these the feature is on.

        `AND`: noising either turns it off, and only both together bring it back. `OR`: either brings it back, and only
        noising both turns it off. `neither`: both together do nothing either way. `mixed`: anything else.
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
        """Of noising and of denoising: the joint effect on the activation less the sum of the two alone.

        Effects are `1 - score` for noising and the score for denoising; 0 where effects add up. It says how much the
        two need or replace each other in size, `kind` what that does to the feature being on.
        """
        loss, gain = 1 - self.patching.noising.activation_score, self.patching.denoising.activation_score
        return float(loss[2] - loss[0] - loss[1]), float(gain[2] - gain[0] - gain[1])

    def _on(self, scores: Scores) -> tuple[bool, bool, bool]:
        first, second, both = (scores.activation_score > self.threshold).tolist()
        return first, second, both


def interaction(pair: PromptPair, first: Node | Patch, second: Node | Patch, *, threshold: float = 0.0) -> Interaction:
    """Patch two components alone and together, both ways: do both have to be there, or does either do?

    Args:
        pair: the prompts.
        first: a node, or some together.
        second: likewise.
        threshold: the feature is on where its activation score is above this; 0 is any activation.

    Raises:
        ModelError: as of `patch`.
        HeadscopeError: likewise.
    """
    one, two = (p if isinstance(p, tuple) else (p,) for p in (first, second))
    return Interaction(one, two, patch(pair, [one, two, (*one, *two)]), threshold)
