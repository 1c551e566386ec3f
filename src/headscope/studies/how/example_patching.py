"""Patching between an example of the corpus and a corruption of it that silences the feature."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.errors import HeadscopeError, StudyError
from headscope.studies.how.corruptions import (
    FeatureMetric,
    PromptPair,
    earlier_copies,
    pair,
    replace_tokens,
    shuffle,
    swap_earlier,
    unused_token,
)
from headscope.studies.how.feature_patching import FeaturePatching, patch_features
from headscope.studies.how.nodes import INPUTS
from headscope.studies.how.patching import Interaction, Node, NodeKind, Patching, interaction, nodes_of, patch
from headscope.studies.subject import Subject
from headscope.studies.support.on_page import prompt_at

MAX_COLUMNS = 48
"""Maximum number of positions at which components are patched individually: the last ones before the feature."""
_WINDOWS = (32, 64, 128)
_KEPT_SHARE = 0.8
"""A prompt is shortened to its end where the feature keeps this share of its activation: it is run hundreds of times.
"""
_REPLACED = (1, 2, 3, 5)  # largest source tokens that `sources` replaces, until the feature is off
NODES: dict[str, tuple[NodeKind, ...]] = {
    "components": ("token", "resid_pre", "attn_out", "mlp_out"),
    "heads": ("z",),
    "qkv": ("q", "k", "v", "pattern"),
}
"""Sets of nodes to patch, by name."""
CORRUPTIONS = ("swap", "sources", "shuffle")
"""Ways to corrupt a prompt; a number after a dot is the seed: `shuffle.1`."""


@dataclass(frozen=True)
class ExamplePatching:
    """Components patched between an example and its corruption."""

    found: Patching
    """Results of patches of one node each."""
    columns: tuple[int, ...]
    """Positions at which components are patched individually."""
    nodes: tuple[Node, ...]
    joint: Interaction | None
    """The two parallel components with the largest effects, singly and jointly."""


def patch_example(subject: Subject, latent: int, at: int, how: str, nodes: str) -> ExamplePatching:
    """Patch the components of an example of a feature, at each position and at all positions.

    Args:
        subject: the index with its model.
        latent: the feature.
        at: a token of the corpus at which it is active.
        how: one of `CORRUPTIONS`.
        nodes: one of `NODES`.

    Raises:
        StudyError: no such nodes or corruption, or an inapplicable one.
        HeadscopeError: the corruption leaves the feature on.
    """
    if nodes not in NODES:
        raise StudyError(f"nodes {nodes!r}", expected=f"one of {', '.join(NODES)}", do="choose one of these")
    prompts = example_pair(subject, latent, at, how)
    columns = _columns(prompts)
    known = (*INPUTS, *subject.live.model.spec.kinds)
    chosen = _nodes(subject, prompts, tuple(kind for kind in NODES[nodes] if kind in known))
    wanted = [node for node in chosen if node.position is None or node.position in columns]
    found = patch(prompts, wanted)
    return ExamplePatching(found, tuple(columns), tuple(wanted), _joint(prompts, found))


def patch_example_features(subject: Subject, latent: int, at: int, how: str, sae: str) -> FeaturePatching:
    """Patch the features of an earlier SAE between an example of a feature and its corruption.

    Raises:
        StudyError: no such SAE or corruption, or an inapplicable one.
        HeadscopeError: the corruption leaves the feature on.
    """
    if sae not in subject.saes:
        raise StudyError(
            f"an SAE {sae!r}",
            expected=f"one of {', '.join(subject.saes)}" if subject.saes else "one given with --upstream-sae",
            do="name it with --upstream-sae, of `headscope serve` or `headscope study`",
        )
    return patch_features(example_pair(subject, latent, at, how), subject.saes[sae])


def example_pair(subject: Subject, latent: int, at: int, how: str) -> PromptPair:
    """Return an example as a prompt, with its corruption.

    Raises:
        StudyError: no such corruption, or an inapplicable one.
        HeadscopeError: the corruption leaves the feature on.
    """
    name, _, number = how.partition(".")
    if name not in CORRUPTIONS or not (number == "" or (number.isascii() and number.isdigit() and len(number) < 6)):
        raise StudyError(
            f"a corruption {how[:40]!r}", expected=f"one of {', '.join(CORRUPTIONS)}", do="choose one of these"
        )
    metric = FeatureMetric(subject.live.model, subject.live.sae, latent)
    clean = _clean(subject, metric, at, needs_copy=name == "swap")
    return _corrupt(subject, metric, clean, name, int(number or 0))


def _clean(subject: Subject, metric: FeatureMetric, at: int, *, needs_copy: bool) -> Int[Tensor, " position"]:
    """Return the block up to a token, shortened if the feature remains about as active there."""
    block, query = prompt_at(subject.index, at)
    tokens = torch.tensor(block, device=subject.live.model.device)
    on = metric.read(tokens, query).activation
    if on <= 0:
        raise StudyError(
            f"feature {metric.latent} is not active at position {at}",
            expected="a token at which it is on",
            do="choose one of its examples",
        )
    for size in _WINDOWS:
        if size >= len(tokens):
            break
        cut = torch.cat([tokens[:1], tokens[1 - size :]])
        enough = metric.read(cut, size - 1).activation >= _KEPT_SHARE * on
        if enough and not (needs_copy and len(earlier_copies(cut)) == 0):
            return cut
    return tokens


def _corrupt(
    subject: Subject, metric: FeatureMetric, clean: Int[Tensor, " position"], name: str, seed: int
) -> PromptPair:
    """Return a corruption that silences the feature, or raise the reason why there is none."""
    free = unused_token(subject.live.model, clean, seed=seed)
    if name == "swap":
        if len(earlier_copies(clean)) == 0:
            raise StudyError(
                "the token at the feature does not stand earlier in its block: there is no first A of A B ... A",
                expected="an earlier copy of it",
                do="choose another corruption, or another example",
            )
        return pair(metric, clean, swap_earlier(clean, free))
    if name == "shuffle":
        return pair(metric, clean, shuffle(clean, seed=seed))
    largest = _largest_sources(subject, metric, clean)
    for n in _REPLACED[:-1]:
        try:
            return pair(metric, clean, replace_tokens(clean, dict.fromkeys(largest[:n], free)))
        except HeadscopeError:  # still on: replace more of them
            continue
    return pair(metric, clean, replace_tokens(clean, dict.fromkeys(largest[: _REPLACED[-1]], free)))


def _largest_sources(subject: Subject, metric: FeatureMetric, clean: Int[Tensor, " position"]) -> list[int]:
    """Return positions before the last, without the BOS, sorted by their contribution, summed over heads."""
    query = len(clean) - 1
    split = subject.circuits.by_source(tuple(clean.tolist()), metric.latent, query)
    order = split[1:query].argsort(descending=True) + 1
    if not len(order):
        raise StudyError("no source before the token", expected="some text there", do="choose another example")
    return order.tolist()


def _nodes(subject: Subject, prompts: PromptPair, kinds: Sequence[NodeKind]) -> list[Node]:
    layers = [subject.live.sae.site.layer] if "q" in kinds else None
    found = [*nodes_of(prompts, kinds, layers=layers), *nodes_of(prompts, kinds, layers=layers, by_position=True)]
    return [node for node in found if not (node.kind == "resid_pre" and node.layer == 0)]  # it is the token


def _columns(prompts: PromptPair) -> list[int]:
    """Return the positions to patch: from the first difference on, since both runs are equal before it."""
    first = int((prompts.clean != prompts.corrupted).nonzero()[0, 0])
    return list(range(prompts.query + 1))[first:][-MAX_COLUMNS:]


def _joint(prompts: PromptPair, found: Patching) -> Interaction | None:
    """Patch the two parallel components with the largest effects, singly and jointly; None without two.

    Parallel are heads of one layer, or the attention and the MLP of one: of two consecutive ones, the second carries
    the effect of the first.
    """
    effect = (1 - found.noising.pre_score) + found.denoising.pre_score
    together: dict[tuple, list[tuple[float, Node]]] = {}
    for (node,), size in zip(found.patches, effect.tolist(), strict=True):
        if node.position is None and node.kind not in ("token", "resid_pre"):
            together.setdefault((node.layer, node.kind if node.head is not None else ""), []).append((size, node))
    ranked = [sorted(own, key=lambda pair: -pair[0])[:2] for own in together.values() if len(own) > 1]
    if not ranked:
        return None
    (_, first), (_, second) = max(ranked, key=lambda two: two[1][0])
    return interaction(prompts, first, second)
