"""A feature read at one token, and pairs of prompts of which one has it on and the other off.

A corruption is of any use for patching only if it takes the feature away: `pair` reads both prompts and refuses one
that does not.
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
    """The pre-activation, which moves below the threshold too: the graded metric."""
    activation: float
    """What the activation function makes of it."""


@dataclass(frozen=True)
class FeatureMetric:
    """One feature of an SAE, read at one token of a prompt: what a run is measured by."""

    model: Model
    sae: SAE
    latent: int

    def __post_init__(self) -> None:
        """Refuse an SAE of another model, or a latent that it does not have."""
        check_fits(self.sae, self.model)
        if not 0 <= self.latent < self.sae.d_sae:
            raise HeadscopeError(
                f"latent {self.latent}", expected=f"0 to {self.sae.d_sae - 1}", do="name a latent of this SAE"
            )

    def of(self, x: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """Pre-activation and activation for values at the SAE's site."""
        pre = self.sae.pre_activations(x)
        return pre[:, self.latent], self.sae.activation(pre)[:, self.latent]

    def read(self, tokens: Int[Tensor, " position"], query: int) -> Reading:
        """The feature at one token of a prompt: one run, up to the SAE's site."""
        site = self.sae.site
        pre, activation = self.of(self.model.read(tokens[None], [site])[site][:, query])
        return Reading(pre.item(), activation.item())


def prompt(model: Model, text: str | Sequence[int] | Int[Tensor, " position"]) -> Int[Tensor, " position"]:
    """The tokens of a prompt. Text is given the BOS in front; tokens are taken as they are.

    Raises:
        CorpusError: nothing in it, tokens that the model does not have, or more of them than its context.
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
    """The position of the corrupted prompt that stands for each one of the clean prompt; -1 where none does."""
    on: Reading
    """In the clean prompt."""
    off: Reading
    """In the corrupted prompt."""

    @property
    def aligned(self) -> bool:
        """Each position stands for itself."""
        return torch.equal(self.counterpart, torch.arange(len(self.corrupted), device=self.counterpart.device))


def pair(
    metric: FeatureMetric,
    clean: Int[Tensor, " position"],
    corrupted: Int[Tensor, " other"],
    *,
    query: int = -1,
    align: bool = False,
) -> PromptPair:
    """Put two prompts together, once it is seen that the feature is on in one and off in the other.

    Args:
        metric: which feature.
        clean: tokens of the prompt in which it is on.
        corrupted: those of the one in which it is off.
        query: where it is read in the clean prompt; negative numbers count from the end.
        align: let the prompts be of different lengths. What they share at the beginning and at the end is aligned;
            what lies between has no counterpart, and nothing is patched there.

    Raises:
        CorpusError: an empty prompt, or one past the context.
        HeadscopeError: different lengths without `align`; a query that there is not; the same prompt twice; a feature
            that is off in the clean prompt or stays on in the corrupted one.
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
    """Each position's own where the lengths are equal; else by what both begin with, then by what both end with."""
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
    """The prompt with other tokens at some positions.

    Raises:
        HeadscopeError: a position that there is not.
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
    """Where the token at the query stands before the query."""
    query %= len(tokens)
    return (tokens[:query] == tokens[query]).nonzero()[:, 0]


def swap_earlier(
    tokens: Int[Tensor, " position"], replacement: int, *, query: int = -1, only: int | None = None
) -> Int[Tensor, " position"]:
    """The prompt `A B ... A` with the earlier A replaced: what an induction head looks for is gone, B is not.

    Args:
        tokens: the prompt.
        replacement: takes the place of each earlier A.
        query: of the last A.
        only: replace the earlier A at this position alone.

    Raises:
        HeadscopeError: the token at the query does not stand earlier, or not at `only`, or it is the replacement.
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
    """The prompt with the tokens between its first and the query in another order, drawn at random.

    Raises:
        HeadscopeError: there is no other order: fewer than two different tokens lie there.
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
    """A token drawn evenly from those that are not in the prompt; never the BOS.

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
