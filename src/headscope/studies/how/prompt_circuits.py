"""Recursive DFA of prompts node by node, and attention scores by pairs of parts, on request."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import StudyError
from headscope.models.hf import Model
from headscope.recent import Recent
from headscope.sae.model import SAE
from headscope.studies.how.circuit import Node, PromptCircuit
from headscope.studies.how.corruptions import prompt
from headscope.studies.how.qk import PromptScores, ScoreSplit

_KEPT = 4  # prompts


class PromptCircuits:
    """Cached runs of one model on the last few prompts. Not thread-safe."""

    def __init__(self, model: Model, sae: SAE, *, saes: Sequence[SAE] = ()) -> None:
        """Decompose prompts of a model.

        Args:
            model: the model.
            sae: the z SAE whose features are attributed.
            saes: SAEs of earlier components, to attribute to their features where they precede the reading component.
        """
        self.model, self.sae, self.saes = model, sae, tuple(saes)
        self._circuits = Recent[tuple[int, ...], PromptCircuit](_KEPT)
        self._scores = Recent[tuple[int, tuple[int, ...]], PromptScores](_KEPT)

    def level(
        self, tokens: tuple[int, ...], latent: int, query: int, path: tuple[str, ...]
    ) -> tuple[Node, tuple[Node, ...]]:
        """Return a node of the recursive DFA of a feature at a token, with all of its children.

        Args:
            tokens: the prompt, BOS included.
            latent: the feature.
            query: its position.
            path: the names of the nodes from the feature, exclusive, to the node.

        Raises:
            HeadscopeError: no such prompt, latent, token or node.
        """
        circuit = self._circuit(tokens)
        node = circuit.root(latent, query)
        children = circuit.expand(node)
        for name in path:
            node = _named(children, name, node)
            children = circuit.expand(node)
        return node, children

    def scores(self, tokens: tuple[int, ...], layer: int, head: int, query: int) -> ScoreSplit:
        """Return the scores of a head at a token, by pairs of parts.

        Raises:
            HeadscopeError: no such prompt, head or token.
            ModelError: no such layer, or scores without an exact split.
        """
        return self._prompt_scores(tokens, layer).split(head, query)

    def read(
        self, tokens: tuple[int, ...], layer: int, head: int, query: int, key: int, part: str
    ) -> Float[np.ndarray, " source"]:
        """Return the contribution of an earlier head, as a part of the key, to a score, by its own source tokens.

        Raises:
            HeadscopeError: no such prompt, head or token, or the part is not an earlier head.
        """
        found = self._prompt_scores(tokens, layer)
        chosen = next((p for p in found.parts if p.name == part), None)
        if chosen is None:
            raise StudyError(f"part {part!r}", expected="an earlier head, as 0.2", do="name one of these")
        by_source = found.sources(head, query, key, chosen)
        return by_source.sum(0).double().cpu().numpy()

    def by_source(self, tokens: tuple[int, ...], latent: int, query: int) -> Float[Tensor, " source"]:
        """Return the contribution of each source to a feature at a token, summed over heads and parts.

        Raises:
            HeadscopeError: no such prompt, latent or token.
        """
        return self._circuit(tokens).split(latent, query).sum((0, 2))

    def _circuit(self, tokens: tuple[int, ...]) -> PromptCircuit:
        def make() -> PromptCircuit:
            below = [sae for sae in self.saes if sae.site.layer < self.sae.site.layer]
            return PromptCircuit(self.model, self.sae, prompt(self.model, tokens), saes=below)

        with torch.no_grad():
            return self._circuits.get(tokens, make)

    def _prompt_scores(self, tokens: tuple[int, ...], layer: int) -> PromptScores:
        def make() -> PromptScores:
            below = [sae for sae in self.saes if sae.site.layer < layer]
            return PromptScores(self.model, layer, prompt(self.model, tokens), saes=below)

        with torch.no_grad():
            return self._scores.get((layer, tokens), make)


def _named(children: Sequence[Node], name: str, parent: Node) -> Node:
    found = next((child for child in children if child.name == name), None)
    if found is None:
        some = ", ".join(child.name for child in children[:4])
        raise StudyError(
            f"no node {name!r} below {parent.name}",
            expected=f"one of its {len(children)}, as {some}" if children else "nothing: it is not the sum of others",
            do="name the nodes from the feature on",
        )
    return found
