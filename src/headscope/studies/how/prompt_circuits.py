"""Recursive DFA of prompts node by node, and the scores of heads by pairs of parts, as a page asks for them."""

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
    """Runs of one model; those of the last few prompts are kept. Not for several threads at once."""

    def __init__(self, model: Model, sae: SAE, *, saes: Sequence[SAE] = ()) -> None:
        """Decompose prompts of a model.

        Args:
            model: which model.
            sae: of z, whose features are followed.
            saes: of earlier components, whose features are told apart where they stand before what is read.
        """
        self.model, self.sae, self.saes = model, sae, tuple(saes)
        self._circuits = Recent[tuple[int, ...], PromptCircuit](_KEPT)
        self._scores = Recent[tuple[int, tuple[int, ...]], PromptScores](_KEPT)

    def level(
        self, tokens: tuple[int, ...], latent: int, query: int, path: tuple[str, ...]
    ) -> tuple[Node, tuple[Node, ...]]:
        """A node of the recursive DFA of a feature at a token, and all of its children.

        Args:
            tokens: the prompt, BOS included.
            latent: the feature.
            query: where.
            path: the names of the nodes from the feature to the node, that of the feature left out.

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
        """The scores of a head at a token, by pairs of parts.

        Raises:
            HeadscopeError: no such prompt, head or token.
            ModelError: no such layer, or scores that have no exact split.
        """
        return self._prompt_scores(tokens, layer).split(head, query)

    def read(
        self, tokens: tuple[int, ...], layer: int, head: int, query: int, key: int, part: str
    ) -> Float[np.ndarray, " source"]:
        """What an earlier head, as a part of the key, adds to its score, by the tokens that it read itself.

        Raises:
            HeadscopeError: no such prompt, head or token, or the part is no earlier head.
        """
        found = self._prompt_scores(tokens, layer)
        chosen = next((p for p in found.parts if p.name == part), None)
        if chosen is None:
            raise StudyError(f"part {part!r}", expected="an earlier head, as 0.2", do="name one of these")
        by_source = found.sources(head, query, key, chosen)
        return by_source.sum(0).double().cpu().numpy()

    def by_source(self, tokens: tuple[int, ...], latent: int, query: int) -> Float[Tensor, " source"]:
        """What comes to a feature at a token from each source: heads and parts summed.

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
