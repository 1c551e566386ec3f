"""Recursive DFA of a feature over the corpus: parts of the stream at its sources, and their own inputs.

At each sampled active token, `R[s, r] = sum_h R[h, s, r]` is the contribution of part r of the stream at source s to
the pre-activation, through all heads (`studies.how.circuit`). An earlier head as a part is followed one step further,
to its source tokens and the parts of the stream there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.attribution import HeadWeights
from headscope.decomposition import Part, Stream, Upstream, check_closes
from headscope.index.live import LiveIndex
from headscope.sae.model import SAE
from headscope.stats import Estimate, Measure, ratio
from headscope.studies.how.circuit import check_z, directions_read
from headscope.studies.support.active import ActiveTokens, Text

SQUARES = "sum of R[s, r]^2 for this part / for all parts, over active tokens and sources, heads summed first"
LINEAR = "sum of R[s, r] for this part / for all parts: of the pre-activation less its constant"
OF_SQUARES = "share of this token in the part's sum of squares, over active tokens and sources"
OF_SUM = "share of this token in the part's sum"
_BLOCKS = 8  # in one run

Progress = Callable[[int, int], None]
"""Progress callback: called with the blocks done and the total."""


@dataclass(frozen=True)
class TokenShare:
    """One token type among the sources of a part's contribution."""

    token: int
    share: Measure
    """Share of a part's sum of squares."""
    linear: Measure
    """Share of its sum; may be negative or above 1."""


@dataclass(frozen=True)
class PartShare:
    """Share of a feature made by one part of the stream, over the sampled tokens."""

    part: Part
    share: Measure
    """By squares. Its null, for parts other than single features: the same share of directions of z that are random
    within each head with the feature's norm there, at the same tokens; mean and range."""
    linear: Measure
    by_head: Float[np.ndarray, " head"] | None
    """Mean contribution per token through each head of the feature's layer; None for a single feature."""
    sources: tuple[TokenShare, ...]
    """Tokens at the sources where it is read, largest share first."""
    origins: tuple[TokenShare, ...] = ()
    """For an earlier head: its own source tokens, by the contribution of each of its sources, summed over paths."""
    through: tuple[tuple[Part, float], ...] = ()
    """For an earlier head: its input parts of the stream, by mean contribution per token, largest |mean| first."""


@dataclass(frozen=True)
class FeatureCircuit:
    """Contributions of the parts of the stream to one feature over its active tokens, or a sample of them."""

    latent: int
    layer: int
    n_active: int
    """Active tokens in the index."""
    position: Int[np.ndarray, " token"]
    """Sampled positions of the corpus."""
    document: Int[np.ndarray, " token"]
    pre: Float[np.ndarray, " token"]
    constant: float
    """Part of the pre-activation independent of the heads. It and the parts sum to `pre`."""
    residual: float
    """The largest |pre - (constant + sum of parts)|: the rounding error."""
    parts: tuple[PartShare, ...]
    """All parts except single features, largest share first."""
    features: tuple[PartShare, ...]
    """The features of the given SAEs with the largest shares."""
    contributions: Float[np.ndarray, "token part"]
    """Contribution of each of `parts` at each token, summed over sources."""
    of_features: Float[np.ndarray, " token"]
    """Contribution of all features of the given SAEs together."""

    @property
    def n(self) -> int:
        """Number of sampled tokens."""
        return len(self.position)


def feature_circuit(
    live: LiveIndex,
    latent: int,
    *,
    saes: Sequence[SAE] = (),
    max_tokens: int | None = 512,
    n_null: int = 8,
    k: int = 10,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> FeatureCircuit:
    """Attribute a feature to parts of the stream at its sources, over its active tokens.

    Args:
        live: the index with its model and SAE.
        latent: the feature.
        saes: SAEs of earlier components, to attribute to their features.
        max_tokens: maximum number of active tokens, sampled uniformly; None: all. Memory: `max_tokens * parts * block
            size` numbers.
        n_null: number of random directions; 0 for none.
        k: number of token types per part, and of single features, to report.
        seed: seed of the samples.
        on_progress: called as blocks are done.

    Raises:
        IndexFormatError: no such latent.
        SAEError: the index is not of z, or one of `saes` does not fit.
        ModelError: the parts do not sum to the pre-activations.
    """
    check_z(live.sae)
    work = _Work(live, latent, saes, n_null, seed)
    text = Text.of(live.index)
    active = ActiveTokens.of(live.index, text.is_text.reshape(-1), latent, most=max_tokens, seed=seed)
    found = work.run(text, active.position, on_progress or (lambda _done, _total: None))
    return work.record(text, active, found, k)


@dataclass
class _Found:
    """Results of each sampled token."""

    by_part: list[np.ndarray] = field(default_factory=list)  # [token, part, source]
    by_origin: list[np.ndarray] = field(default_factory=list)  # [token, earlier head, source]
    by_feature: list[np.ndarray] = field(default_factory=list)  # [entry, (token, feature number, source)]
    feature_values: list[np.ndarray] = field(default_factory=list)  # [entry]
    pre: list[np.ndarray] = field(default_factory=list)
    by_head: list[np.ndarray] = field(default_factory=list)  # [part, head], summed over tokens
    null: dict[int, np.ndarray] = field(default_factory=dict)  # by direction: [part, then SAE], summed squares
    through: dict[Part, dict[Part, float]] = field(default_factory=dict)  # by earlier head, by part it read: summed
    n: int = 0


class _Work:
    def __init__(self, live: LiveIndex, latent: int, saes: Sequence[SAE], n_null: int, seed: int) -> None:
        live.index.check_latent(latent)
        self.model, self.sae, self.latent = live.model, live.sae, latent
        self.layer, self.size = live.sae.site.layer, live.index.block_size
        self.upstream = Upstream(live.model, self.layer, saes)
        weights = HeadWeights.of(live.sae, live.model)
        self.constant = weights.bias[latent].item()
        own = weights.encoder[:, latent]  # [head, d_head]
        random = torch.from_numpy(np.random.default_rng((seed, latent)).standard_normal((n_null, *own.shape))).to(own)
        random = random / random.norm(dim=-1, keepdim=True) * own.norm(dim=-1, keepdim=True)
        self.of_z = torch.cat([own[None], random])  # [direction, head, d_head]
        read = directions_read(self.upstream, self.of_z.transpose(0, 1))  # [head, direction, d_model]
        self.read = read.transpose(0, 1)  # [direction, head, d_model]
        self.parts: tuple[Part, ...] = ()

    # ------------------------------------------------------------------------------------------------------------ runs
    def run(self, text: Text, position: Int[np.ndarray, " token"], report: Progress) -> _Found:
        """Process the sampled tokens, a few blocks at a time."""
        found = _Found()
        blocks, first = np.unique(position // self.size, return_index=True)
        queries = np.split(position % self.size, first[1:])
        for start in range(0, len(blocks), _BLOCKS):
            report(start, len(blocks))
            tokens = torch.from_numpy(text.tokens[blocks[start : start + _BLOCKS]].astype(np.int64))
            stream = self.upstream.run(tokens.to(self.model.device))
            self.parts = stream.parts()
            along = self._along(stream)
            looked = [torch.from_numpy(query).to(self.model.device) for query in queries[start : start + _BLOCKS]]
            for row, query in enumerate(looked):
                self._look(found, stream, along[:, row], row, query)
            self._origins(found, stream, looked)
        report(len(blocks), len(blocks))
        return found

    def _along(self, stream: Stream) -> Float[Tensor, "part batch source direction head"]:
        """Return the contribution of each part at each source to each head's z along each direction, at attention 1."""
        along = stream.along(self.read.flatten(0, 1)) / stream.scale[self.layer]
        return along.unflatten(-1, self.read.shape[:2])

    def _look(self, found: _Found, stream: Stream, along: Tensor, row: int, query: Int[Tensor, " token"]) -> None:
        """Process the tokens of one block."""
        pattern = stream.attention[self.layer].pattern[row, :, query]  # [head, token, source]
        pairs = [each.active(row) for each in stream.written.values()]
        written = [each.directions for each in stream.written.values()]  # [latent, d_model]
        weight = pattern / stream.scale[self.layer][row, :, 0]
        for number in range(len(self.of_z)):
            by_part = torch.einsum("hns,psh->nps", pattern, along[:, :, number])
            by_feature = [
                torch.einsum("hnp,ph->np", weight[..., source], (directions @ self.read[number].T)[latent] * f[:, None])
                for (source, latent, f), directions in zip(pairs, written, strict=True)
            ]
            if number:
                squares = [by_part.square().sum((0, 2)), *(values.square().sum()[None] for values in by_feature)]
                found.null[number - 1] = found.null.get(number - 1, 0) + torch.cat(squares).cpu().numpy()
                continue
            self._keep_features(found, pairs, by_feature)
            found.by_part.append(by_part.cpu().numpy())
            found.by_head.append(torch.einsum("hs,psh->ph", pattern.sum(1), along[:, :, 0]).cpu().numpy())
            pre = self.sae.pre_activations(stream.attention[self.layer].z[row, query])[:, self.latent]
            total = by_part.sum((1, 2)) + sum(values.sum(1) for values in by_feature) + self.constant
            check_closes(pre, total, what="pre-activations", do="pass the model and SAEs that the index was built with")
            found.pre.append(pre.cpu().numpy())
        found.n += len(query)

    def _keep_features(
        self, found: _Found, pairs: list[tuple[Tensor, Tensor, Tensor]], by_feature: list[Tensor]
    ) -> None:
        """Add an entry for each sampled token and each feature that contributes to it at a source."""
        for number, (pair, added) in enumerate(zip(pairs, by_feature, strict=True)):
            source, latent = (each.cpu().numpy() for each in pair[:2])
            values = added.cpu().numpy()
            token, i = np.nonzero(values)  # later sources add nothing
            columns = (token + found.n, np.full_like(token, number), latent[i], source[i])
            found.by_feature.append(np.stack(columns, axis=1))
            found.feature_values.append(values[token, i])

    def _origins(self, found: _Found, stream: Stream, queries: list[Tensor]) -> None:
        """Return the contribution of each source of each earlier head, by all paths through the head."""
        own: list[list[Tensor]] = [[] for _ in queries]
        top = stream.attention[self.layer].pattern / stream.scale[self.layer][:, None, None, :, 0]
        for part in self._earlier():
            l, head = part.layer or 0, part.head or 0
            of_z = self.read[0] @ self.upstream.output[l][head].T  # [top head, d_head]
            along = stream.value(l)[:, :, head] @ of_z.T  # [row, source of the head, top head]
            reached_in_all = []
            for row, query in enumerate(queries):
                reached = top[row, :, query] @ stream.attention[l].pattern[row, head]  # [top head, token, source]
                own[row].append(torch.einsum("tns,st->ns", reached, along[row]))
                reached_in_all.append(reached.sum(1))
            before = found.through.setdefault(part, {})
            for read, value in self._through(stream, torch.stack(reached_in_all), part, of_z).items():
                before[read] = before.get(read, 0.0) + value
        found.by_origin += [torch.stack(row, dim=1).cpu().numpy() for row in own if row]

    def _earlier(self) -> list[Part]:
        """Return the parts that are heads."""
        return [part for part in self.parts if part.kind == "head"]

    def _through(
        self, stream: Stream, reached: Float[Tensor, "row top_head source"], part: Part, of_z: Tensor
    ) -> dict[Part, float]:
        """Return the contribution of each part of the stream before an earlier head through it."""
        l, head = part.layer or 0, part.head or 0
        read = self.upstream.read_by(l, head, of_z)  # [top head, d_model]
        weight = reached / stream.scale[l][:, None, :, 0]
        values = torch.einsum("bts,pbst->p", weight, stream.along(read, l)).tolist()
        found = dict(zip(stream.parts(l), values, strict=True))
        for site in (site for site in stream.written if site.layer < l):
            features = Part("features", site.layer, site=site.kind)
            found[features] = torch.einsum("bts,bst->", weight, stream.vector(features) @ read.T).item()
        return found

    # --------------------------------------------------------------------------------------------------------- records
    def record(self, text: Text, active: ActiveTokens, found: _Found, k: int) -> FeatureCircuit:
        """Make the record of all sampled tokens."""
        position, size = active.position, self.size
        kept = _Kept.of(found, (len(position), len(self.parts), size))
        of_features = kept.of_features()
        measures = _Measures(
            document=text.document.reshape(-1)[position],
            tokens=text.tokens[position // size],
            linear=kept.by_part.sum((1, 2)) + of_features,
            squares=np.square(kept.by_part).sum((1, 2)) + kept.of_features(power=2),
            k=k,
        )
        order = np.argsort(-np.square(kept.by_part).sum((0, 2)), kind="stable")
        contributions = kept.by_part.sum(2)[:, order]
        missed = kept.pre - contributions.sum(1) - of_features - self.constant
        return FeatureCircuit(
            latent=self.latent,
            layer=self.layer,
            n_active=active.n,
            position=position,
            document=measures.document,
            pre=kept.pre,
            constant=self.constant,
            residual=float(np.abs(missed).max(initial=0.0)),
            parts=tuple(self._part(measures, found, kept, i) for i in order.tolist()),
            features=tuple(self._single(measures, kept, k)),
            contributions=contributions,
            of_features=of_features,
        )

    def _part(self, measures: "_Measures", found: _Found, kept: "_Kept", i: int) -> PartShare:
        """Make the record of one of `self.parts`."""
        part = self.parts[i]
        result = measures.part(part, kept.by_part[:, i])
        null = np.array([squares[i] / squares.sum() for squares in found.null.values() if squares.sum()])
        if len(null):
            estimate = Estimate(float(null.mean()), float(null.min()), float(null.max()))
            result = replace(result, share=replace(result.share, null=estimate))
        if found.n:
            result = replace(result, by_head=np.sum(found.by_head, axis=0)[i] / found.n)
        if part in found.through:
            through = [(read, value / found.n) for read, value in found.through[part].items()]
            origins = measures.tokens_of(kept.by_origin[:, self._earlier().index(part)])
            result = replace(result, origins=origins, through=tuple(sorted(through, key=lambda p: -abs(p[1]))))
        return result

    def _single(self, measures: "_Measures", kept: "_Kept", k: int) -> Iterator[PartShare]:
        """Return the features of the SAEs with the largest shares."""
        which, inverse = np.unique(kept.entry[:, 1:3], axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        squares = np.bincount(inverse, kept.value**2, len(which))
        for i in np.argsort(-squares, kind="stable")[:k].tolist():
            own = inverse == i
            by_source = np.zeros(measures.tokens.shape)
            np.add.at(by_source, (kept.entry[own, 0], kept.entry[own, 3]), kept.value[own])
            site = self.upstream.saes[which[i, 0]].site
            yield measures.part(Part("feature", site.layer, site=site.kind, latent=int(which[i, 1])), by_source)


@dataclass(frozen=True)
class _Kept:
    """The stored results, concatenated."""

    by_part: np.ndarray  # [token, part, source]
    by_origin: np.ndarray  # [token, earlier head, source]
    entry: np.ndarray  # [entry, (token, SAE, latent, source)]
    value: np.ndarray
    pre: np.ndarray

    @classmethod
    def of(cls, found: _Found, shape: tuple[int, int, int]) -> "_Kept":
        return cls(
            by_part=np.concatenate(found.by_part) if found.by_part else np.zeros(shape),
            by_origin=np.concatenate(found.by_origin) if found.by_origin else np.zeros((shape[0], 0, shape[2])),
            entry=np.concatenate([np.empty((0, 4), np.int64), *found.by_feature]),
            value=np.concatenate([np.empty(0), *found.feature_values]),
            pre=np.concatenate([np.empty(0), *found.pre]),
        )

    def of_features(self, power: int = 1) -> Float[np.ndarray, " token"]:
        """Return sums over the entries of each token."""
        return np.bincount(self.entry[:, 0], self.value**power, len(self.by_part)).astype(np.float64)


@dataclass(frozen=True)
class _Measures:
    """Makes measures of contributions at each source of each sampled token."""

    document: np.ndarray  # [token]
    tokens: np.ndarray  # [token, source]
    linear: np.ndarray  # [token], of all parts and features
    squares: np.ndarray
    k: int

    def part(self, part: Part, by_source: Float[np.ndarray, "token source"]) -> PartShare:
        """Return share and source tokens."""
        return PartShare(
            part=part,
            share=ratio(self.document, np.square(by_source).sum(1), self.squares, definition=SQUARES),
            linear=ratio(self.document, by_source.sum(1), self.linear, definition=LINEAR),
            by_head=None,
            sources=self.tokens_of(by_source),
        )

    def tokens_of(self, by_source: Float[np.ndarray, "token source"]) -> tuple[TokenShare, ...]:
        """Return the token types with the largest shares of a sum of squares."""
        squares, linear = np.square(by_source), by_source.sum(1)
        token, inverse = np.unique(self.tokens, return_inverse=True)
        inverse = inverse.reshape(self.tokens.shape)
        by_token = np.bincount(inverse.reshape(-1), squares.reshape(-1), len(token))
        found = []
        for i in np.argsort(-by_token, kind="stable")[: self.k]:
            if by_token[i] == 0:
                break
            own = inverse == i
            share = ratio(self.document, (squares * own).sum(1), squares.sum(1), definition=OF_SQUARES)
            of_sum = ratio(self.document, (by_source * own).sum(1), linear, definition=OF_SUM)
            found.append(TokenShare(int(token[i]), share, of_sum))
        return tuple(found)
