"""How a feature is computed, asked of a model by a page: shares of source tokens, attention, patching, circuits."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from threading import Lock

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.decomposition import check_saes
from headscope.errors import HeadscopeError, StudyError
from headscope.explorer.answers import Json
from headscope.index.live import LiveIndex
from headscope.live_circuits import PromptCircuits
from headscope.live_upstream_json import comparison_json, features_json, patching_json, sources_json
from headscope.sae.model import SAE
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
from headscope.studies.how.feature_patching import patch_features
from headscope.studies.how.nodes import INPUTS
from headscope.studies.how.patching import Interaction, Node, NodeKind, Patching, interaction, nodes_of, patch
from headscope.studies.how.sources import compare_heads, source_shares

MAX_BLOCKS = 24
"""Blocks of a feature that are read for its source tokens."""
MAX_COLUMNS = 48
"""Positions at which components are patched one by one: the last ones before the feature."""
_WINDOWS = (32, 64, 128)
_KEPT_SHARE = 0.8
"""A prompt is cut to its end where the feature keeps this share of its activation: it is run hundreds of times."""
_REPLACED = (1, 2, 3, 5)  # largest source tokens that `sources` replaces, until the feature is off
NODES: dict[str, tuple[NodeKind, ...]] = {
    "components": ("token", "resid_pre", "attn_out", "mlp_out"),
    "heads": ("z",),
    "qkv": ("q", "k", "v", "pattern"),
}
HOW = ("swap", "sources", "shuffle")


class LiveUpstream:
    """An `UpstreamModel`: one question at a time runs the model."""

    def __init__(
        self, live: LiveIndex, saes: dict[str, SAE] | None = None, *, lock: AbstractContextManager | None = None
    ) -> None:
        """Ask a model.

        Args:
            live: the index with its model and SAE.
            saes: of earlier components, by name.
            lock: held while the model runs, where others run it too.

        Raises:
            SAEError: an SAE that does not stand before that of the index, or two of one component.
        """
        self._live, self._lock = live, lock or Lock()
        own = live.model
        self._saes = {name: sae.to(own.device).to(own.module.dtype) for name, sae in (saes or {}).items()}
        check_saes(own, live.sae.site.layer, list(self._saes.values()))
        self.saes = tuple(self._saes)
        self.circuits = PromptCircuits(own, live.sae, saes=list(self._saes.values()), lock=self._lock)

    def sources(self, latent: int, tokens: tuple[int, ...], thresholds: tuple[float, ...]) -> Json:
        """How much of a feature comes from source tokens of a set, and how much attention they are paid.

        Raises:
            HeadscopeError: no such latent, or no such set.
        """
        with self._lock:
            found = source_shares(self._live, latent, tokens, thresholds=thresholds, max_blocks=MAX_BLOCKS)
        return sources_json(found) | {
            "python": (
                f"{self._opened('from headscope.studies.how.sources import source_shares')}"
                f"source_shares(live, {latent}, {list(tokens)}, thresholds={list(thresholds)}, max_blocks={MAX_BLOCKS})"
            )
        }

    def compare(self, latent: int, at: int) -> Json:
        """Heads beside each other at one token of the corpus.

        Raises:
            HeadscopeError: no such latent or position.
        """
        with self._lock:
            found = compare_heads(self._live, at, latent)
        return comparison_json(found) | {
            "python": (
                f"{self._opened('from headscope.studies.how.sources import compare_heads')}"
                f"compare_heads(live, {at}, {latent})"
            )
        }

    def patch(self, latent: int, at: int, how: str, nodes: str) -> Json:
        """Components patched between an example and a corruption of it: at each position, and at all.

        Raises:
            HeadscopeError: no such nodes or corruption, one that does not apply, or one that leaves the feature on.
        """
        if nodes not in NODES:
            raise StudyError(f"nodes {nodes!r}", expected=f"one of {', '.join(NODES)}", do="choose one of these")
        with self._lock:
            prompts, said = self._pair(latent, at, how)
            columns = _columns(prompts)
            known = (*INPUTS, *self._live.model.spec.kinds)
            chosen = self._nodes(prompts, tuple(kind for kind in NODES[nodes] if kind in known))
            wanted = [node for node in chosen if node.position is None or node.position in columns]
            found = patch(prompts, wanted)
            joint = _joint(prompts, found)
        return patching_json(found, columns, joint) | said | {"python": self._python(prompts, wanted)}

    def features(self, latent: int, at: int, how: str, sae: str) -> Json:
        """The features of an earlier SAE patched between an example and a corruption of it.

        Raises:
            HeadscopeError: no such SAE or corruption, one that does not apply, or one that leaves the feature on.
        """
        if sae not in self._saes:
            raise StudyError(
                f"an SAE {sae!r}",
                expected=f"one of {', '.join(self.saes)}" if self.saes else "one given with --upstream-sae",
                do="start the server with: headscope serve --upstream-sae SAE",
            )
        with self._lock:
            prompts, said = self._pair(latent, at, how)
            found = patch_features(prompts, self._saes[sae])
        calls = f"patch_features(pair, load_sae({sae!r}))"
        imports = (
            "from headscope.sae.formats import load_sae\n"
            "from headscope.studies.how.feature_patching import patch_features"
        )
        return features_json(found) | said | {"sae": sae, "python": self._pair_python(prompts, imports) + calls}

    # ---------------------------------------------------------------------------------------------------------- prompts
    def _pair(self, latent: int, at: int, how: str) -> tuple[PromptPair, Json]:
        """The example as a prompt, and its corruption; and what to say of them."""
        name, _, number = how.partition(".")
        if name not in HOW or not (number == "" or (number.isascii() and number.isdigit() and len(number) < 6)):
            raise StudyError(
                f"a corruption {how[:40]!r}", expected=f"one of {', '.join(HOW)}", do="choose one of these"
            )
        seed = int(number or 0)
        metric = FeatureMetric(self._live.model, self._live.sae, latent)
        clean = self._clean(metric, at, needs_copy=name == "swap")
        return self._corrupt(metric, clean, name, seed), {"how": how, "latent": latent, "at": at}

    def _clean(self, metric: FeatureMetric, at: int, *, needs_copy: bool) -> Int[Tensor, " position"]:
        """The block up to a token, or less of it if the feature is about as active there."""
        index, model = self._live.index, self._live.model
        block, query = divmod(at, index.block_size)
        tokens = torch.tensor(index.tokens_of(block)[: query + 1].tolist(), device=model.device)
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

    def _corrupt(self, metric: FeatureMetric, clean: Int[Tensor, " position"], name: str, seed: int) -> PromptPair:
        """A corruption that turns the feature off, or the reason why there is none."""
        free = unused_token(self._live.model, clean, seed=seed)
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
        largest = self._largest_sources(metric, clean)
        for n in _REPLACED[:-1]:
            try:
                return pair(metric, clean, replace_tokens(clean, dict.fromkeys(largest[:n], free)))
            except HeadscopeError:  # still on: more of them
                continue
        return pair(metric, clean, replace_tokens(clean, dict.fromkeys(largest[: _REPLACED[-1]], free)))

    def _largest_sources(self, metric: FeatureMetric, clean: Int[Tensor, " position"]) -> list[int]:
        """Positions before the last, the BOS left out, by what comes from there: heads summed."""
        circuits, query = self.circuits, len(clean) - 1
        split = circuits.by_source(tuple(clean.tolist()), metric.latent, query)
        order = split[1:query].argsort(descending=True) + 1
        if not len(order):
            raise StudyError("no source before the token", expected="some text there", do="choose another example")
        return order.tolist()

    def _nodes(self, prompts: PromptPair, kinds: Sequence[NodeKind]) -> list[Node]:
        last = self._live.sae.site.layer
        layers = [last] if "q" in kinds else None
        found = [
            *nodes_of(prompts, kinds, layers=layers),
            *nodes_of(prompts, kinds, layers=layers, by_position=True),
        ]
        return [node for node in found if not (node.kind == "resid_pre" and node.layer == 0)]  # it is the token

    # ----------------------------------------------------------------------------------------------------------- Python
    def _opened(self, imports: str) -> str:
        return f"from headscope import jobs\n{imports}\n\nlive = jobs.live({str(self._live.index.folder)!r})\n"

    def _pair_python(self, prompts: PromptPair, imports: str) -> str:
        return (
            "import torch\n"
            + self._opened(f"from headscope.studies.how.corruptions import FeatureMetric, pair\n{imports}")
            + f"metric = FeatureMetric(live.model, live.sae, {prompts.metric.latent})\n"
            f"clean = torch.tensor({prompts.clean.tolist()})\n"
            f"corrupted = torch.tensor({prompts.corrupted.tolist()})\n"
            "pair = pair(metric, clean, corrupted)\n"
        )

    def _python(self, prompts: PromptPair, nodes: Sequence[Node]) -> str:
        kinds = tuple(dict.fromkeys(node.kind for node in nodes))
        layers = tuple(sorted({node.layer for node in nodes if node.kind not in ("token", "position")}))
        imports = "from headscope.studies.how.patching import nodes_of, patch"
        return self._pair_python(prompts, imports) + (
            f"nodes = [*nodes_of(pair, {kinds}, layers={layers}),\n"
            f"         *nodes_of(pair, {kinds}, layers={layers}, by_position=True)]\n"
            "patch(pair, nodes)"
        )


def _columns(prompts: PromptPair) -> list[int]:
    """Positions worth patching: from the first that differs on, since what comes before is the same in both runs."""
    first = int((prompts.clean != prompts.corrupted).nonzero()[0, 0])
    return list(range(prompts.query + 1))[first:][-MAX_COLUMNS:]


def _joint(prompts: PromptPair, found: Patching) -> Interaction | None:
    """The two components beside each other that do most, alone and together; None where there are no two.

    Beside each other are heads of one layer, or the attention and the MLP of one: of two in a row, the second carries
    what the first does.
    """
    effect = (1 - found.noising.pre_score) + found.denoising.pre_score
    beside: dict[tuple, list[tuple[float, Node]]] = {}
    for (node,), size in zip(found.patches, effect.tolist(), strict=True):
        if node.position is None and node.kind not in ("token", "resid_pre"):
            beside.setdefault((node.layer, node.kind if node.head is not None else ""), []).append((size, node))
    ranked = [sorted(own, key=lambda pair: -pair[0])[:2] for own in beside.values() if len(own) > 1]
    if not ranked:
        return None
    (_, first), (_, second) = max(ranked, key=lambda two: two[1][0])
    return interaction(prompts, first, second)
