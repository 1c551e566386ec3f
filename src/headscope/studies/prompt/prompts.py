"""Analyse one prompt: its active features, their DFA, and the effects of ablating features and heads.

Ablations are joint, in the order of the model: at each layer heads first, then the features of the remaining z.
Features at one token are all read before any of them is removed, so that

    z' = z - sum over ablated j of  f_j(z) W_dec[j]

with z after the ablation of heads. The model is run twice, with and without them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.attribution import DFA, HeadWeights, dfa_at, dfa_of_sequence
from headscope.errors import StudyError
from headscope.index.live import LiveIndex
from headscope.interventions import at, constant, reconstruction
from headscope.models.attention import Attention
from headscope.models.hf import Edit, SiteEdit
from headscope.recent import Recent
from headscope.site import Site
from headscope.studies.how.corruptions import prompt
from headscope.studies.prompt.records import (
    Ablation,
    ActiveFeatures,
    By,
    FeatureAblation,
    HeadAblation,
    NextTokens,
    PromptRun,
)
from headscope.studies.support.active import Text, drawn
from headscope.studies.support.replacement import batches, tokens_of

MEAN_BLOCKS = 64
"""Blocks of the corpus, sampled uniformly, for the mean z of a head over their text tokens."""
MOST_LISTED = 64
"""Maximum number of features listed per token: the most active ones."""
_KEPT = 4  # prompts
_LIKELIEST = 12  # of each of the two runs


@dataclass(frozen=True)
class _Read:
    """The unedited run of a prompt."""

    tokens: Int[Tensor, " position"]
    attention: Attention
    f: Float[Tensor, "position d_sae"]


class Prompts:
    """Cached runs of prompts by the model of an index. Not thread-safe."""

    def __init__(self, live: LiveIndex) -> None:
        """Run prompts through the model of an index, with its z SAE."""
        self.live, self.model, self.sae = live, live.model, live.sae
        self._layer = live.sae.site.layer
        self._weights = HeadWeights.of(live.sae, live.model)
        self._reads = Recent[tuple[int, ...], _Read](_KEPT)
        self._means: dict[int, Tensor] | None = None

    @property
    def bos(self) -> int:
        """The token prepended to every prompt."""
        return self.model.bos

    @property
    def heads(self) -> tuple[int, int]:
        """Number of layers, and of heads in each."""
        return self.model.spec.n_layers, self.model.spec.n_heads

    @property
    def context(self) -> int:
        """Maximum length of a prompt, including the BOS."""
        return self.model.spec.context

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokenise a text, with BOS prepended; the spelling of a special token is text.

        Raises:
            CorpusError: no text, or too much of it.
        """
        return tuple(prompt(self.model, text).tolist())

    def run(self, tokens: Sequence[int], ablations: Sequence[Ablation] = ()) -> PromptRun:
        """Return active features and the loss of each next token, with and without ablations.

        Args:
            tokens: the prompt, BOS included.
            ablations: applied jointly.

        Raises:
            CorpusError: no tokens, unknown ones, or too many.
            StudyError: an ablation of a feature, head or token that does not exist.
        """
        with torch.no_grad():
            read = self._read(tokens)
            chosen = self._checked(ablations, len(read.tokens))
            loss = self._losses(read.tokens)
            f, ablated_loss = read.f, loss
            if chosen:
                if any(isinstance(a, HeadAblation) for a in chosen):
                    with self._ablated(chosen, len(read.tokens), features=False):
                        f = self.sae.encode(self.model.read(read.tokens[None], [self.sae.site])[self.sae.site][0])
                f = f.masked_fill(self._mask(chosen, len(f)), 0)
                with self._ablated(chosen, len(read.tokens)):
                    ablated_loss = self._losses(read.tokens)
            position, latent = (torch.maximum(read.f, f) > 0).nonzero(as_tuple=True)
            largest = torch.maximum(read.f, f)[position, latent]
        order = np.lexsort((-_numpy(largest), position.cpu().numpy()))
        return PromptRun(
            tokens=_numpy(read.tokens),
            ablations=tuple(chosen),
            position=position.cpu().numpy()[order],
            latent=latent.cpu().numpy()[order],
            activation=_numpy(read.f[position, latent])[order],
            ablated=_numpy(f[position, latent])[order],
            loss=_numpy(loss),
            ablated_loss=_numpy(ablated_loss),
        )

    def features(self, tokens: Sequence[int], query: int, target: int | None = None) -> ActiveFeatures:
        """Return the features active at one token of the unedited model: their DFA by head, and effect on one logit.

        Args:
            tokens: the prompt, BOS included.
            query: the token.
            target: the token of the logit; default: the next one, at the end the likeliest.

        Raises:
            CorpusError: no tokens, unknown ones, or too many.
            StudyError: no such position or target.
        """
        with torch.no_grad():
            read = self._read(tokens)
            n = len(read.tokens)
            check_number("position", query, n)
            active = read.f[query].nonzero()[:, 0]
            latents = active[read.f[query, active].argsort(descending=True, stable=True)][:MOST_LISTED]
            if target is None:
                target = self._target(read.tokens, query)
            check_number("token", target, self.model.spec.d_vocab)
            dfa = self._dfa(read, query, latents)
            by_source = dfa.sum(0)  # [feature, source]
            source = by_source.abs().argmax(1)
            return ActiveFeatures(
                query=query,
                latent=latents.cpu().numpy(),
                activation=_numpy(read.f[query, latents]),
                by_head=_numpy(dfa.sum(2).T),
                source=source.cpu().numpy(),
                source_dfa=_numpy(by_source.gather(1, source[:, None])[:, 0]),
                target=target,
                effect=self._effect(read, query, latents, target),
                effect_missing=self.model.no_direct_path,
            )

    def next_tokens(self, tokens: Sequence[int], query: int, ablations: Sequence[Ablation] = ()) -> NextTokens:
        """Return the model's predictions after one token, with and without ablations.

        Raises:
            CorpusError: no tokens, unknown ones, or too many.
            StudyError: no such position, or an ablation of a feature, head or token that does not exist.
        """
        with torch.no_grad():
            known = prompt(self.model, tokens)
            n = len(known)
            check_number("position", query, n)
            chosen = self._checked(ablations, n)
            seen = [a for a in chosen if a.position is None or a.position <= query]
            clean = self._logits(known[: query + 1])
            with self._ablated(seen, query + 1):
                after = self._logits(known[: query + 1]) if seen else clean
        actual = None if query + 1 == n else int(known[query + 1])
        log_p, log_q = clean.log_softmax(0), after.log_softmax(0)
        likeliest = torch.cat([logits.topk(min(_LIKELIEST, len(logits))).indices for logits in (clean, after)])
        wanted = torch.tensor([] if actual is None else [actual], dtype=torch.int64, device=clean.device)
        token = torch.cat([likeliest, wanted]).unique()
        token = token[clean[token].argsort(descending=True, stable=True)]
        return NextTokens(
            query=query,
            actual=actual,
            token=token.cpu().numpy(),
            probability=_numpy(log_p.exp()[token]),
            logit=_numpy(clean[token]),
            rank=_rank(clean, token),
            ablated_probability=_numpy(log_q.exp()[token]),
            ablated_logit=_numpy(after[token]),
            ablated_rank=_rank(after, token),
            divergence=max(0.0, (log_p.exp() * (log_p - log_q)).sum().item()),
        )

    def dfa(self, tokens: Sequence[int], latent: int, query: int) -> DFA:
        """Return the pre-activation of a feature at one token, active there or not, by head and source.

        Raises:
            CorpusError: no tokens, unknown ones, or too many.
            StudyError: no such feature or position.
        """
        with torch.no_grad():
            read = self._read(tokens)
            check_number("position", query, len(read.tokens))
            check_number("feature", latent, self.sae.d_sae)
            [found] = dfa_at(self._weights, self.sae, read.attention, read.tokens, query, [latent])
            return found

    def mean(self, layer: int) -> tuple[Float[Tensor, "head d_head"], int]:
        """Return the mean z of each head of a layer over text tokens of `MEAN_BLOCKS` blocks, and their number.

        Raises:
            StudyError: no such layer, or no text in these blocks.
        """
        check_number("layer", layer, self.model.spec.n_layers)
        return self._mean(layer)

    # ----------------------------------------------------------------------------------------------------------- steps
    def _read(self, tokens: Sequence[int]) -> _Read:
        key = tuple(int(token) for token in tokens)

        def make() -> _Read:
            known = prompt(self.model, key)
            attention = self.model.attention(known[None], self._layer)
            return _Read(known, attention, self.sae.encode(attention.z[0]))

        return self._reads.get(key, make)

    def _losses(self, tokens: Int[Tensor, " position"]) -> Float[Tensor, " predicting"]:
        return self.model.losses(tokens[None])[0]

    def _logits(self, tokens: Int[Tensor, " position"]) -> Float[Tensor, " d_vocab"]:
        """Return the logits at the last token."""
        return self.model.logits(tokens[None])[0, -1].double()

    def _target(self, tokens: Int[Tensor, " position"], query: int) -> int:
        return int(tokens[query + 1] if query + 1 < len(tokens) else self._logits(tokens).argmax())

    def _dfa(self, read: _Read, query: int, latents: Int[Tensor, " n"]) -> Float[Tensor, "head n source"]:
        upto = query + 1
        pattern = read.attention.pattern[0, :, query, None, :upto].expand(-1, len(latents), -1)
        return dfa_of_sequence(self._weights, read.attention.value[0, :upto], pattern, latents)

    def _effect(
        self, read: _Read, query: int, latents: Int[Tensor, " n"], target: int
    ) -> Float[np.ndarray, " n"] | None:
        if self.model.no_direct_path is not None:
            return None
        last = Site("resid_post", self.model.spec.n_layers - 1)
        residual = self.model.read(read.tokens[None, : query + 1], [last])[last][0, -1:]
        written = self.sae.W_dec[latents] @ self.model.W_O(self._layer)
        directions, (_, scale) = self.model.final_parts(written)[0], self.model.final_parts(residual)
        return _numpy(read.f[query, latents] * (directions @ self.model.logit_directions[:, target]) / scale[0, 0])

    # ------------------------------------------------------------------------------------------------------- ablations
    def _checked(self, ablations: Sequence[Ablation], n: int) -> list[Ablation]:
        """Raise StudyError unless all of them apply to a prompt of n tokens."""
        for ablation in ablations:
            match ablation:
                case FeatureAblation(latent):
                    check_number("feature", latent, self.sae.d_sae)
                case HeadAblation(layer, head):
                    check_number("layer", layer, self.model.spec.n_layers)
                    check_number("head", head, self.model.spec.n_heads)
            if ablation.position is not None:
                check_number("position", ablation.position, n)
        return list(ablations)

    @contextmanager
    def _ablated(self, ablations: Sequence[Ablation], n: int, *, features: bool = True) -> Iterator[None]:
        """Within the block, apply the ablations to runs on n tokens, those of features on request."""
        edits: list[tuple[Site, Edit | SiteEdit]] = []  # all computed first: a mean is of the unedited model
        for a in ablations:
            if isinstance(a, HeadAblation):
                where = None if a.position is None else [a.position]
                instead = at(constant(self._instead(a.layer, a.by)), heads=[a.head], positions=where)
                edits.append((Site("z", a.layer), instead))
        mask = self._mask(ablations, n)
        if features and mask.any():
            removed = reconstruction(self.sae, lambda f: f.masked_fill(mask, 0), with_error=True)
            edits.append((self.sae.site, removed))
        with ExitStack() as stack:
            for site, edit in edits:
                stack.enter_context(self.model.edit({site: edit}))
            yield

    def _mask(self, ablations: Sequence[Ablation], n: int) -> Tensor:
        """Return which features are ablated where: `[position, d_sae]`."""
        mask = torch.zeros(n, self.sae.d_sae, dtype=torch.bool, device=self.model.device)
        for a in ablations:
            if isinstance(a, FeatureAblation):
                mask[slice(None) if a.position is None else a.position, a.latent] = True
        return mask

    def _instead(self, layer: int, by: By) -> Float[Tensor, " z"]:
        """Return the replacement for the z of a layer's heads."""
        return self.model.value_offset(layer) if by == "zero" else self._mean(layer)[0].flatten()

    def _mean(self, layer: int) -> tuple[Tensor, int]:
        """Return the mean of a layer; computed for all layers on first use."""
        if self._means is None:
            self._means, self._n_mean = self._means_of_corpus()
        return self._means[layer].unflatten(0, (self.model.spec.n_heads, -1)), self._n_mean

    def _means_of_corpus(self) -> tuple[dict[int, Tensor], int]:
        index, text = self.live.index, Text.of(self.live.index)
        sites = [Site("z", layer) for layer in range(self.model.spec.n_layers)]
        totals = {site: torch.zeros(self.sae.d_in, dtype=torch.float64, device=self.model.device) for site in sites}
        n = 0
        for _, own in batches(drawn(index.n_blocks, MEAN_BLOCKS, (0,)), index.block_size):
            is_text = torch.from_numpy(text.is_text[own]).to(self.model.device)
            for site, z in self.model.read(tokens_of(self.live, text, own), sites).items():
                totals[site] += z.double()[is_text].sum(0)
            n += int(is_text.sum())
        if not n:
            raise StudyError("blocks without text", expected="text to take z of", do="ablate by zero instead")
        return {site.layer: (total / n).to(self.sae.W_enc) for site, total in totals.items()}, n


def check_number(what: str, number: int, n: int) -> None:
    """Raise StudyError unless a number is a whole one from 0 to n - 1."""
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise StudyError(f"{what} {number!r}", expected="a whole number", do=f"pass the {what} as an int")
    if not 0 <= number < n:
        raise StudyError(f"{what} {number}", expected=f"0 to {n - 1}", do=f"name another {what}")


def _rank(logits: Float[Tensor, " d_vocab"], token: Int[Tensor, " token"]) -> Int[np.ndarray, " token"]:
    return (logits > logits[token, None]).sum(1).add(1).cpu().numpy()


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy() if values.is_floating_point() else values.cpu().numpy()
