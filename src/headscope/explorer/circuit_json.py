"""Recursive DFA and QK attribution of a prompt as JSON, and the object with a model that finds them.

A node of recursive DFA is addressed by the names of the nodes from the feature to it, as `1.3/source 12/0.2`: nothing
of it has to be kept between two requests. What is left out for its size is counted and summed, so that what is shown
still adds up. static/circuit.js and static/qk.js draw both.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from headscope.errors import StudyError
from headscope.explorer.answers import Json
from headscope.explorer.numbers import short, significant

DIGITS = 7
MOST_CHILDREN, MOST_PARTS, MOST_READ = 12, 6, 3
MAX_PATH = 1000
"""Characters of a path that are read."""


@runtime_checkable
class PartRecord(Protocol):
    """`headscope.decomposition.Part`, as far as a page needs it."""

    @property
    def kind(self) -> str: ...  # noqa: D102 - as there
    @property
    def layer(self) -> int | None: ...  # noqa: D102
    @property
    def head(self) -> int | None: ...  # noqa: D102
    @property
    def latent(self) -> int | None: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102


@runtime_checkable
class HopRecord(Protocol):
    """`headscope.studies.how.circuit.Hop`."""

    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def head(self) -> int: ...  # noqa: D102
    @property
    def source(self) -> int: ...  # noqa: D102


@runtime_checkable
class NodeRecord(Protocol):
    """`headscope.studies.how.circuit.Node`."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def latent(self) -> int: ...  # noqa: D102
    @property
    def query(self) -> int: ...  # noqa: D102
    @property
    def hops(self) -> Sequence[HopRecord]: ...  # noqa: D102
    @property
    def position(self) -> int: ...  # noqa: D102
    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def part(self) -> PartRecord | None: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102


@runtime_checkable
class ScoreRecord(Protocol):
    """`headscope.studies.how.qk.ScoreSplit`."""

    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def head(self) -> int: ...  # noqa: D102
    @property
    def query(self) -> int: ...  # noqa: D102
    @property
    def parts(self) -> Sequence[PartRecord]: ...  # noqa: D102
    @property
    def keys(self) -> Int[np.ndarray, " key"]: ...  # noqa: D102
    @property
    def scores(self) -> Float[np.ndarray, " key"]: ...  # noqa: D102
    @property
    def pattern(self) -> Float[np.ndarray, " key"]: ...  # noqa: D102
    @property
    def residual(self) -> float: ...  # noqa: D102
    def contrast(self, key: int) -> Float[np.ndarray, "query_part key_part"]: ...  # noqa: D102
    def attention(self, key: int) -> Float[np.ndarray, "query_part key_part"]: ...  # noqa: D102


@runtime_checkable
class CircuitSource(Protocol):
    """An object with a model that takes prompts apart. `tokens` are a whole prompt, BOS included."""

    def level(
        self, tokens: tuple[int, ...], latent: int, query: int, path: tuple[str, ...]
    ) -> tuple[NodeRecord, tuple[NodeRecord, ...]]:
        """A node of the recursive DFA of a feature at a token, and all of its children.

        Raises:
            HeadscopeError: no such prompt, latent, token or node.
        """
        ...

    def scores(self, tokens: tuple[int, ...], layer: int, head: int, query: int) -> ScoreRecord:
        """The scores of a head at a token, by pairs of parts.

        Raises:
            HeadscopeError: no such prompt, head or token, or a model without an exact split.
        """
        ...

    def read(
        self, tokens: tuple[int, ...], layer: int, head: int, query: int, key: int, part: str
    ) -> Float[np.ndarray, " source"]:
        """What an earlier head, as a part of the key, adds to its score, by the tokens that it read itself.

        Raises:
            HeadscopeError: no such prompt, head or token, or the part is no head.
        """
        ...


def path_of(text: str) -> tuple[str, ...]:
    """Read the path of a node; empty for the feature itself.

    Raises:
        StudyError: it is too long.
    """
    if len(text) > MAX_PATH:
        raise StudyError(
            f"a path of {len(text):,} characters", expected=f"at most {MAX_PATH:,}", do="expand fewer levels"
        )
    return tuple(text.split("/")) if text else ()


def level_json(found: tuple[NodeRecord, Sequence[NodeRecord]], *, most: int = MOST_CHILDREN) -> Json:
    """A node with its larger children; those and the rest sum to it.

    Args:
        found: as `CircuitSource.level` returns it.
        most: children to name.
    """
    node, children = found
    ordered = sorted(children, key=lambda child: -abs(child.value))
    shown, rest = ordered[:most], ordered[most:]
    total = sum((child.value for child in children), 0.0)
    return {
        "node": node_json(node),
        "children": [node_json(child) for child in shown],
        "rest": {"n": len(rest), "value": short(sum((child.value for child in rest), 0.0), DIGITS)},
        "sum": short(total, DIGITS),
        "residual": short(node.value - total, 2) if children else 0.0,
    }


def node_json(node: NodeRecord) -> Json:
    """One term of a pre-activation. `attended`, of a source, says which head attended to it from where."""
    made: Json = {
        "name": node.name,
        "kind": node.kind,
        "position": node.position,
        "value": short(node.value, DIGITS),
        "part": None if node.part is None else part_json(node.part),
        "expands": node.kind in ("feature", "head", "source") or (node.part is not None and node.part.kind == "head"),
        "attended": None,
    }
    if node.kind == "source":
        *earlier, hop = node.hops
        at = earlier[-1].source if earlier else node.query
        made["attended"] = {"layer": hop.layer, "head": hop.head, "query": at, "key": hop.source}
    return made


def part_json(part: PartRecord) -> Json:
    """A part of the residual stream."""
    return {name: getattr(part, name) for name in ("name", "kind", "layer", "head", "latent")}


def qk_json(source: CircuitSource, tokens: tuple[int, ...], layer: int, head: int, query: int, key: int | None) -> Json:
    """Why a head attends to one key: its score there above the mean over keys, by pairs of parts.

    `contrast` sums to the score less the mean; `attention` is the first-order part of each pair in the attention. Both
    are over the larger parts of the query (rows) and of the key (columns), and all others as one.

    Args:
        source: with the model.
        tokens: the prompt.
        layer: of the head.
        head: which.
        query: from which token.
        key: to which; the most attended when None.

    Raises:
        HeadscopeError: no such prompt, head or token, or a model without an exact split.
    """
    found = source.scores(tokens, layer, head, query)
    at = int(found.keys[int(np.argmax(found.pattern))]) if key is None else key
    contrast = np.asarray(found.contrast(at), dtype=np.float64)
    rows, columns = (_largest(np.abs(contrast).sum(axis)) for axis in (1, 0))
    scores = np.asarray(found.scores, dtype=np.float64)
    matrices = {"contrast": contrast, "attention": np.asarray(found.attention(at), dtype=np.float64)}
    heads = [found.parts[i] for i in columns if found.parts[i].kind == "head"][:MOST_READ]
    read = {part.name: np.asarray(source.read(tokens, layer, head, query, at, part.name)) for part in heads}
    return {
        "layer": found.layer,
        "head": found.head,
        "query": found.query,
        "key": at,
        "keys": found.keys.tolist(),
        "scores": significant(scores, DIGITS),
        "pattern": significant(found.pattern, DIGITS),
        "score": short(float(scores[found.keys == at][0]), DIGITS),
        "mean": short(float(scores.mean()), DIGITS),
        "residual": short(found.residual, 2),
        "query_parts": _named(found.parts, rows),
        "key_parts": _named(found.parts, columns),
        **{name: significant(_gathered(values, rows, columns), DIGITS) for name, values in matrices.items()},
        "read": [{"part": name} | _read(values) for name, values in read.items()],
    }


def _largest(size: Float[np.ndarray, " part"]) -> list[int]:
    return np.argsort(-size, kind="stable")[:MOST_PARTS].tolist()


def _named(parts: Sequence[PartRecord], chosen: Sequence[int]) -> list[Json]:
    """The chosen parts, and one for all others where there are any."""
    n = len(parts) - len(chosen)
    others: list[Json] = [{"name": f"{n} others", "kind": "others", "layer": None, "head": None, "latent": None}]
    return [part_json(parts[i]) for i in chosen] + (others if n else [])


def _gathered(
    values: Float[np.ndarray, "query_part key_part"], rows: Sequence[int], columns: Sequence[int]
) -> Float[np.ndarray, "row column"]:
    """The chosen rows and columns, and the sums over all others at the ends."""
    for chosen in (rows, columns):
        others = np.delete(values, chosen, axis=0)
        kept = [values[list(chosen)], others.sum(0, keepdims=True)] if len(others) else [values[list(chosen)]]
        values = np.concatenate(kept).T
    return values


def _read(values: Float[np.ndarray, " source"]) -> Json:
    """The tokens that a head read, by what they add to a score."""
    order = np.argsort(-np.abs(values), kind="stable")[:MOST_READ]
    return {
        "value": short(float(values.sum()), DIGITS),
        "sources": [[int(s), short(float(values[s]), DIGITS)] for s in order],
    }
