"""Features at one token as a metric, and pairs of prompts with the feature on in one and off in the other.

A corruption is useful for patching only if it silences the feature: `pair` checks both prompts and rejects others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import CorpusError, HeadscopeError
from headscope.models.hf import Model
from headscope.sae.convert import check_fits
from headscope.sae.model import SAE
from headscope.tokens import encode


@dataclass(frozen=True)
class Reading:
    """A feature at one token."""

    pre: float
    """The pre-activation, which also varies below the threshold: the graded metric."""
    activation: float
    """The activation."""


@dataclass(frozen=True)
class FeatureMetric:
    """One feature of an SAE, read at one token of a prompt: the metric of a run."""

    model: Model
    sae: SAE
    latent: int

    def __post_init__(self) -> None:
        """Reject an SAE of another model, or an invalid latent."""
        check_fits(self.sae, self.model)
        if not 0 <= self.latent < self.sae.d_sae:
            raise HeadscopeError(
                f"latent {self.latent}", expected=f"0 to {self.sae.d_sae - 1}", do="name a latent of this SAE"
            )

    def of(self, x: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """Return pre-activation and activation for values at the SAE's site."""
        pre = self.sae.pre_activations(x)
        return pre[:, self.latent], self.sae.activation(pre)[:, self.latent]

    def read(self, tokens: Int[Tensor, " position"], query: int) -> Reading:
        """Read the feature at one token of a prompt: one run, up to the SAE's site."""
        site = self.sae.site
        pre, activation = self.of(self.model.read(tokens[None], [site])[site][:, query])
        return Reading(pre.item(), activation.item())


def prompt(model: Model, text: str | Sequence[int] | Int[Tensor, " position"]) -> Int[Tensor, " position"]:
    """Return the tokens of a prompt. BOS is prepended to text; token ids are used unchanged.

    Raises:
        CorpusError: it is empty, has tokens that the model does not have, or exceeds its context.
    """
    tokens = [model.bos, *encode(model.tokenizer, [text])[0]] if isinstance(text, str) else [int(t) for t in text]
    if not tokens or tokens == [model.bos]:
        raise CorpusError("an empty prompt", expected="text of one token or more", do="pass some text")
    if len(tokens) > model.spec.context:
        raise CorpusError(
            f"a prompt of {len(tokens)} tokens", expected=f"at most {model.spec.context}, the context", do="shorten it"
        )
    unknown = [t for t in tokens if not 0 <= t < model.spec.d_vocab]
    if unknown:
        raise CorpusError(
            f"tokens {unknown[:5]}", expected=f"0 to {model.spec.d_vocab - 1}", do="use this model's tokenizer"
        )
    return torch.tensor(tokens, device=model.device)


# ---------------------------------------------------------------------------------------------------------------- pairs
@dataclass(frozen=True)
class PromptPair:
    """A prompt in which a feature is on at one token, and another in which it is off there."""

    metric: FeatureMetric
    clean: Int[Tensor, " position"]
    corrupted: Int[Tensor, " other"]
    query: int
    """The token at which the feature is read, in the clean prompt."""
    counterpart: Int[Tensor, " position"]
    """Corresponding position of the corrupted prompt for each one of the clean prompt; -1 where there is none."""
    on: Reading
    """The reading in the clean prompt."""
    off: Reading
    """The reading in the corrupted prompt."""

    @property
    def aligned(self) -> bool:
        """Whether each position corresponds to itself."""
        return torch.equal(self.counterpart, torch.arange(len(self.corrupted), device=self.counterpart.device))


def pair(
    metric: FeatureMetric,
    clean: Int[Tensor, " position"],
    corrupted: Int[Tensor, " other"],
    *,
    query: int = -1,
    align: bool = False,
) -> PromptPair:
    """Pair two prompts, after checking that the feature is on in one and off in the other.

    Args:
        metric: the feature.
        clean: tokens of the prompt in which it is on.
        corrupted: those of the one in which it is off.
        query: its position in the clean prompt; negative numbers count from the end.
        align: allow prompts of different lengths. Their common prefix and suffix are aligned; positions in between have
            no counterpart, and are not patched.

    Raises:
        CorpusError: an empty prompt, or one past the context.
        HeadscopeError: different lengths without `align`; no such query; equal prompts; a feature that is off in the
            clean prompt or on in the corrupted one.
    """
    clean, corrupted = prompt(metric.model, clean), prompt(metric.model, corrupted)
    if not -len(clean) <= query < len(clean):
        raise HeadscopeError(
            f"query {query} of a prompt of {len(clean)} tokens", expected="one of its positions", do="pass another"
        )
    query %= len(clean)
    if len(clean) != len(corrupted) and not align:
        raise HeadscopeError(
            f"prompts of {len(clean)} and {len(corrupted)} tokens",
            expected="as many, so that each position of one stands for the same position of the other",
            do="replace tokens one for one, or pass align=True to match what both begin and end with",
        )
    if torch.equal(clean, corrupted):
        raise HeadscopeError("the same prompt twice", expected="a corruption that changes it", do="change some token")
    counterpart = _counterpart(clean, corrupted)
    other = int(counterpart[query])
    if other < 0:
        raise HeadscopeError(
            f"position {query}, which has no counterpart in the corrupted prompt",
            expected="a token at which the feature can be read in both",
            do="let the prompts end alike from the query on",
        )
    on, off = metric.read(clean, query), metric.read(corrupted, other)
    if on.activation <= 0:
        raise HeadscopeError(
            f"latent {metric.latent} is off at position {query} of the clean prompt (pre-activation {on.pre:.4g})",
            expected="a prompt in which it is on",
            do="pass the position at which it is, or another prompt",
        )
    if off.activation > 0 or off.pre >= on.pre:
        raise HeadscopeError(
            f"latent {metric.latent} is still on in the corrupted prompt: {off.activation:.4g} against "
            f"{on.activation:.4g} (pre-activations {off.pre:.4g} and {on.pre:.4g})",
            expected="a corruption that turns it off",
            do="corrupt what the feature depends on: its largest source tokens",
        )
    return PromptPair(metric, clean, corrupted, query, counterpart, on, off)


def _counterpart(clean: Tensor, corrupted: Tensor) -> Int[Tensor, " position"]:
    """Align positions one to one if the lengths are equal; else by the common prefix, then the common suffix."""
    n, m = len(clean), len(corrupted)
    own = torch.arange(n, device=clean.device)
    if n == m:
        return own
    shorter = min(n, m)
    head = int((clean[:shorter] == corrupted[:shorter]).long().cumprod(0).sum())
    rest = shorter - head
    tail = int((clean[n - rest :] == corrupted[m - rest :]).flip(0).long().cumprod(0).sum())
    placed = torch.full_like(own, -1)
    placed[:head] = own[:head]
    placed[n - tail :] = own[n - tail :] + (m - n)
    return placed


# ---------------------------------------------------------------------------------------------------------- corruptions
def replace_tokens(tokens: Int[Tensor, " position"], at: Mapping[int, int]) -> Int[Tensor, " position"]:
    """Replace the tokens at some positions of a prompt.

    Raises:
        HeadscopeError: no such position.
    """
    outside = [p for p in at if not -len(tokens) <= p < len(tokens)]
    if outside:
        raise HeadscopeError(
            f"positions {outside} of a prompt of {len(tokens)} tokens", expected="some of its own", do="pass those"
        )
    corrupted = tokens.clone()
    for position, token in at.items():
        corrupted[position] = token
    return corrupted


def earlier_copies(tokens: Int[Tensor, " position"], query: int = -1) -> Int[Tensor, " copy"]:
    """Return the earlier positions of the token at the query."""
    query %= len(tokens)
    return (tokens[:query] == tokens[query]).nonzero()[:, 0]


def swap_earlier(
    tokens: Int[Tensor, " position"], replacement: int, *, query: int = -1, only: int | None = None
) -> Int[Tensor, " position"]:
    """Replace the earlier A in a prompt `A B ... A`: removes what an induction head matches, but not B.

    Args:
        tokens: the prompt.
        replacement: takes the place of each earlier A.
        query: position of the last A.
        only: replace only the earlier A at this position.

    Raises:
        HeadscopeError: the token at the query does not occur earlier, or not at `only`, or it is the replacement.
    """
    found = earlier_copies(tokens, query).tolist()
    where = found if only is None else [p for p in found if p == only]
    if not where or replacement == int(tokens[query]):
        raise HeadscopeError(
            f"token {int(tokens[query])}, earlier at {found or 'no position'}, to be replaced by {replacement}",
            expected="an earlier copy of the token at the query, and another token in its place",
            do="pass a prompt A B ... A, or use replace_tokens",
        )
    return replace_tokens(tokens, dict.fromkeys(where, replacement))


def shuffle(tokens: Int[Tensor, " position"], *, query: int = -1, seed: int = 0) -> Int[Tensor, " position"]:
    """Shuffle the tokens between the first and the query of a prompt.

    Raises:
        HeadscopeError: there is no other order: fewer than two distinct tokens.
    """
    query %= len(tokens)
    between = tokens[1:query]
    if len(between.unique()) < 2:
        raise HeadscopeError(
            f"{len(between)} tokens to shuffle, of {len(between.unique())} kinds",
            expected="at least two different ones between the first token and the query",
            do="use replace_tokens",
        )
    generator = torch.Generator().manual_seed(seed)
    corrupted = tokens.clone()
    while torch.equal(corrupted, tokens):
        corrupted[1:query] = between[torch.randperm(len(between), generator=generator).to(tokens.device)]
    return corrupted


def unused_token(model: Model, tokens: Int[Tensor, " position"], *, seed: int = 0) -> int:
    """Draw a token uniformly from those that are not in the prompt; never the BOS.

    Raises:
        HeadscopeError: the prompt has them all.
    """
    free = torch.ones(model.spec.d_vocab, dtype=torch.bool)
    free[tokens.cpu()] = False
    free[model.bos] = False
    choice = free.nonzero()[:, 0]
    if not len(choice):
        raise HeadscopeError("a prompt of the whole vocabulary", expected="a token that is not in it", do="shorten it")
    return int(choice[torch.randint(len(choice), (1,), generator=torch.Generator().manual_seed(seed))])
