"""Recursive DFA and QK attribution of a prompt, truncated for a page: the largest terms, and the rest as one.

A node of recursive DFA is addressed by the names of the nodes from the feature to it, as `1.3/source 12/0.2`, so
requests are stateless. Omitted small terms are counted and summed, so that the terms still add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from headscope.encode import short
from headscope.errors import StudyError

if TYPE_CHECKING:
    from headscope.decomposition import Part
    from headscope.studies.how.circuit import Node
    from headscope.studies.how.prompt_circuits import PromptCircuits

MOST_CHILDREN, MOST_PARTS, MOST_READ = 12, 6, 3
MAX_PATH = 1000
"""Maximum number of characters of a path."""


@dataclass(frozen=True)
class PartView:
    """A part of the residual stream, or several as one (of the kind `others`)."""

    name: str
    kind: str
    layer: int | None = None
    head: int | None = None
    latent: int | None = None

    @classmethod
    def of(cls, part: "Part") -> "PartView":
        """View a part."""
        return cls(part.name, part.kind, part.layer, part.head, part.latent)


@dataclass(frozen=True)
class Attended:
    """The head that attended to a source, and its query."""

    layer: int
    head: int
    query: int
    key: int


@dataclass(frozen=True)
class NodeView:
    """One term of a pre-activation."""

    name: str
    kind: str
    position: int
    value: float
    part: PartView | None
    expands: bool
    attended: Attended | None
    """Present for a source."""

    @classmethod
    def of(cls, node: "Node") -> "NodeView":
        """View a node."""
        of_head = node.part is not None and node.part.kind == "head"
        attended = None
        if node.kind == "source":
            *earlier, hop = node.hops
            attended = Attended(hop.layer, hop.head, earlier[-1].source if earlier else node.query, hop.source)
        return cls(
            node.name,
            node.kind,
            node.position,
            node.value,
            None if node.part is None else PartView.of(node.part),
            node.kind in ("feature", "head", "source") or of_head,
            attended,
        )


@dataclass(frozen=True)
class Rest:
    """The omitted terms."""

    n: int
    value: float
    """Their sum."""


@dataclass(frozen=True)
class Level:
    """A node of recursive DFA with its larger children; those and the rest sum to it."""

    node: NodeView
    children: tuple[NodeView, ...]
    rest: Rest
    sum: float
    residual: float | None
    """The rounding error."""

    @classmethod
    def of(cls, found: "tuple[Node, Sequence[Node]]", *, most: int = MOST_CHILDREN) -> "Level":
        """Name the `most` largest children of a node (`PromptCircuits.level`)."""
        node, children = found
        ordered = sorted(children, key=lambda child: -abs(child.value))
        shown, rest = ordered[:most], ordered[most:]
        total = sum((child.value for child in children), 0.0)
        return cls(
            NodeView.of(node),
            tuple(map(NodeView.of, shown)),
            Rest(len(rest), sum((child.value for child in rest), 0.0)),
            total,
            short(node.value - total, 2) if children else 0.0,
        )


@dataclass(frozen=True)
class ReadBy:
    """Source tokens of an earlier head, by their contribution to a score through it."""

    part: str
    value: float
    sources: tuple[tuple[int, float], ...]
    """(position, contribution), largest first."""


@dataclass(frozen=True)
class WhyAttended:
    """Attribution of a head's attention to one key: its score there minus the mean over keys, by pairs of parts."""

    layer: int
    head: int
    query: int
    key: int
    keys: Int[np.ndarray, " key"]
    scores: Float[np.ndarray, " key"]
    pattern: Float[np.ndarray, " key"]
    score: float
    mean: float
    """Mean of the scores of all keys."""
    residual: float | None
    query_parts: tuple[PartView, ...]
    key_parts: tuple[PartView, ...]
    contrast: Float[np.ndarray, "query_part key_part"]
    """Sums to the score minus the mean; the last row and column are all other parts."""
    attention: Float[np.ndarray, "query_part key_part"]
    """The first-order part of each pair in the attention."""
    read: tuple[ReadBy, ...]


def path_of(text: str) -> tuple[str, ...]:
    """Parse the path of a node; empty for the feature itself.

    Raises:
        StudyError: it is too long.
    """
    if len(text) > MAX_PATH:
        raise StudyError(
            f"a path of {len(text):,} characters", expected=f"at most {MAX_PATH:,}", do="expand fewer levels"
        )
    return tuple(text.split("/")) if text else ()


def why_attended(
    source: "PromptCircuits", tokens: tuple[int, ...], layer: int, head: int, query: int, key: int | None
) -> WhyAttended:
    """Split a head's score between two tokens over the larger parts at the query and at the key.

    Args:
        source: runs the model.
        tokens: the prompt, BOS included.
        layer: layer of the head.
        head: the head.
        query: position of the query.
        key: position of the key; default: the most attended one.

    Raises:
        HeadscopeError: no such prompt, head or token, or a model without an exact split.
    """
    found = source.scores(tokens, layer, head, query)
    at = int(found.keys[int(np.argmax(found.pattern))]) if key is None else key
    contrast = np.asarray(found.contrast(at), dtype=np.float64)
    rows, columns = (_largest(np.abs(contrast).sum(axis)) for axis in (1, 0))
    scores = np.asarray(found.scores, dtype=np.float64)
    heads = [found.parts[i] for i in columns if found.parts[i].kind == "head"][:MOST_READ]
    return WhyAttended(
        layer=found.layer,
        head=found.head,
        query=found.query,
        key=at,
        keys=found.keys,
        scores=scores,
        pattern=found.pattern,
        score=float(scores[found.keys == at][0]),
        mean=float(scores.mean()),
        residual=short(found.residual, 2),
        query_parts=_named(found.parts, rows),
        key_parts=_named(found.parts, columns),
        contrast=_gathered(contrast, rows, columns),
        attention=_gathered(np.asarray(found.attention(at), dtype=np.float64), rows, columns),
        read=tuple(_read(part.name, source.read(tokens, layer, head, query, at, part.name)) for part in heads),
    )


def _largest(size: Float[np.ndarray, " part"]) -> list[int]:
    return np.argsort(-size, kind="stable")[:MOST_PARTS].tolist()


def _named(parts: "Sequence[Part]", chosen: Sequence[int]) -> tuple[PartView, ...]:
    """Return the chosen parts, and one for all others if there are any."""
    n = len(parts) - len(chosen)
    named = tuple(PartView.of(parts[i]) for i in chosen)
    return (*named, PartView(f"{n} others", "others")) if n else named


def _gathered(
    values: Float[np.ndarray, "query_part key_part"], rows: Sequence[int], columns: Sequence[int]
) -> Float[np.ndarray, "row column"]:
    """Return the chosen rows and columns, with the sums over all others at the ends."""
    for chosen in (rows, columns):
        others = np.delete(values, chosen, axis=0)
        kept = [values[list(chosen)], others.sum(0, keepdims=True)] if len(others) else [values[list(chosen)]]
        values = np.concatenate(kept).T
    return values


def _read(part: str, values: Float[np.ndarray, " source"]) -> ReadBy:
    order = np.argsort(-np.abs(values), kind="stable")[:MOST_READ]
    return ReadBy(part, float(values.sum()), tuple((int(s), float(values[s])) for s in order))
