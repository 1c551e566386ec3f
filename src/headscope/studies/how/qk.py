"""QK attribution: a head's attention scores, split over parts of the stream at the query and at the key.

A score is bilinear in the inputs of query and key with norms held fixed, so it splits exactly:

    scores[h, d, k] = scaling  sum over a, b of  q_a[d, h] . k_b[k, h]

`a` and `b` range over the parts of `headscope.decomposition` and the constant, from the biases of the norm and of the
projections. Rotary embedding is linear, so it is applied to each part, by the model's own code. Terms equal for all
keys cancel in the softmax, so a part explains attention to a key only by contrast with others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.decomposition import Part, Upstream, check_closes
from headscope.errors import HeadscopeError
from headscope.models.hf import Model
from headscope.sae.model import SAE
from headscope.site import Site

CONSTANT = Part("constant")
_REFUSED = "take another model: with a norm or a cap on queries, keys or scores there is no exact split"


@dataclass(frozen=True)
class ScoreSplit:
    """The scores of one head at one query, over the keys that it can see, by pairs of parts."""

    layer: int
    head: int
    query: int
    parts: tuple[Part, ...]
    """Parts of the query and of the key; the last is the constant."""
    keys: Int[np.ndarray, " key"]
    """Positions of the keys."""
    scores: Float[np.ndarray, " key"]
    """Scores as the model computed them, before the softmax."""
    pattern: Float[np.ndarray, " key"]
    pairs: Float[np.ndarray, "query_part key_part key"]
    """Contribution of each pair to each score: sums to `scores` over both parts."""

    @property
    def n(self) -> int:
        """Number of keys."""
        return len(self.keys)

    @property
    def residual(self) -> float:
        """The largest |score - sum of its pairs|: the rounding error."""
        return float(np.abs(self.scores - self.pairs.sum((0, 1))).max())

    def contrast(self, key: int) -> Float[np.ndarray, "query_part key_part"]:
        """Return each pair's contribution to the score of a key, minus its mean over all keys.

        Sums to the score minus the mean score.

        Raises:
            HeadscopeError: a key that is not visible to the query.
        """
        return self.pairs[..., self._number(key)] - self.pairs.mean(-1)

    def attention(self, key: int) -> Float[np.ndarray, "query_part key_part"]:
        """Return each pair's first-order part in the attention to a key: `A_k (pair_k - sum over k' of A_k' pair_k')`.

        The loss of attention per share of the pair removed from all scores, for small shares: the derivative of
        softmax, `dA_k / ds_k' = A_k ([k = k'] - A_k')`. Near 0 where attention is nearly all on one key.

        Raises:
            HeadscopeError: a key that is not visible to the query.
        """
        i = self._number(key)
        return self.pattern[i] * (self.pairs[..., i] - self.pairs @ self.pattern)

    def top(self, key: int, k: int = 10) -> tuple[tuple[Part, Part, float], ...]:
        """Return the pairs with the largest |contrast| at a key: (part of the query, part of the key, contrast)."""
        contrast = self.contrast(key)
        order = np.argsort(-np.abs(contrast).reshape(-1), kind="stable")[:k]
        rows, columns = np.unravel_index(order, contrast.shape)
        return tuple((self.parts[a], self.parts[b], float(contrast[a, b])) for a, b in zip(rows, columns, strict=True))

    def _number(self, key: int) -> int:
        found = np.flatnonzero(self.keys == key)
        if not len(found):
            raise HeadscopeError(
                f"key {key} of query {self.query}", expected=f"one of {self.keys.tolist()}", do="name a visible key"
            )
        return int(found[0])


class PromptScores:
    """The scores of a layer's heads on one sequence, by pairs of parts."""

    def __init__(
        self,
        model: Model,
        layer: int,
        tokens: Int[Tensor, " position"],
        *,
        saes: Sequence[SAE] = (),
        max_features: int = 64,
    ) -> None:
        """Run the model, and its projections on each part.

        Args:
            model: within an `edit` block, the edited one.
            layer: layer of the heads.
            tokens: the sequence, BOS included.
            saes: SAEs of earlier components, whose features are parts (`decomposition.Upstream`).
            max_features: number of features per SAE that are separate parts: those with the largest output norm at any
                position. The others form one part, and the sum stays exact.

        Raises:
            ModelError: no such layer; scores that are not bilinear, as with a norm of queries or keys, or a cap.
            SAEError: one of `saes` does not fit.
            HeadscopeError: no tokens, or too many.
        """
        self.model, self.layer = model, layer
        self.stream = Upstream(model, layer, saes).run(tokens[None])
        named = [(part, self.stream.vector(part)[0]) for part in self.stream.parts()]
        for written in self.stream.written.values():
            named += written.largest(max_features)
        self.parts: tuple[Part, ...] = (*(part for part, _ in named), CONSTANT)
        self._scale = self.stream.scale[layer][0]
        vectors = torch.stack([vector for _, vector in named])
        self._q, self._k = model.queries_and_keys(self.stream.tokens[0], layer, vectors, self._scale)
        scores = Site("scores", layer)
        self.scores: Float[Tensor, "head query key"] = model.read(self.stream.tokens, [scores])[scores][0]
        dots = torch.einsum("qhe,khe->hqk", self._q.sum(0), self._k.sum(0))
        seen = self.scores.isfinite()
        self._scaling = _slope(self.scores[seen], dots[seen])
        check_closes(self.scores, self._scaling * dots, what="scores", do=_REFUSED)

    def split(self, head: int, query: int) -> ScoreSplit:
        """Return the scores of a head at a query.

        Raises:
            HeadscopeError: no such head or position.
        """
        self._check(head=head, query=query)
        keys = self.scores[head, query].isfinite().nonzero()[:, 0]
        pairs = torch.einsum("ae,bke->abk", self._q[:, query, head], self._k[:, keys, head]) * self._scaling
        return ScoreSplit(
            layer=self.layer,
            head=head,
            query=query,
            parts=self.parts,
            keys=keys.cpu().numpy(),
            scores=self.scores[head, query, keys].cpu().numpy(),
            pattern=self.stream.attention[self.layer].pattern[0, head, query, keys].cpu().numpy(),
            pairs=pairs.cpu().numpy(),
        )

    def sources(
        self, head: int, query: int, key: int, part: Part, *, side: Literal["query", "key"] = "key"
    ) -> Float[Tensor, "other_part source"]:
        """Split an earlier head's contribution to a score, as a part of the key (or query), by its own sources.

        Sums over sources to the part's contribution to the score of the key, by part of the other side.

        Args:
            head: the head of the score.
            query: position of the query.
            key: position of the key.
            part: an earlier head, one of `parts`.
            side: its side.

        Raises:
            HeadscopeError: no such head or position, or the part is not a head.
        """
        self._check(head=head, query=query, key=key)
        if part.kind != "head" or part not in self.parts or part.layer is None or part.head is None:
            raise HeadscopeError(
                f"part {part.name}", expected="an earlier head among the parts", do="name one of these"
            )
        at = key if side == "key" else query
        weight = self.stream.attention[part.layer].pattern[0, part.head, at]
        carried = self.stream.value(part.layer)[0, :, part.head] @ self.stream.upstream.output[part.layer][part.head]
        moved = torch.zeros(len(weight), *carried.shape, dtype=carried.dtype, device=carried.device)
        moved[:, at] = weight[:, None] * carried
        q, k = self.model.queries_and_keys(self.stream.tokens[0], self.layer, moved, self._scale)
        own = (k if side == "key" else q)[:-1, at, head]
        other = self._q[:, query, head] if side == "key" else self._k[:, key, head]
        return other @ own.T * self._scaling

    def _check(self, *, head: int, **positions: int) -> None:
        for what, number, n in (
            ("head", head, self.model.spec.n_heads),
            *((name, position, len(self._scale)) for name, position in positions.items()),
        ):
            if not 0 <= number < n:
                raise HeadscopeError(f"{what} {number}", expected=f"0 to {n - 1}", do=f"name another {what}")


def _slope(scores: Float[Tensor, " entry"], dots: Float[Tensor, " entry"]) -> Float[Tensor, ""]:
    """Return the scaling of scores, inferred from them, since model families store it in different places."""
    return (scores @ dots) / (dots @ dots).clamp_min(torch.finfo(dots.dtype).tiny)
