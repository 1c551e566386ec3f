"""The studies of source tokens: suggested sets, the contribution of one, and head comparison at one token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from headscope.errors import IndexFormatError, ProxyError, StudyError
from headscope.limits import CountFrom0, Text
from headscope.studies.study import FeatureStudy, Tab
from headscope.studies.support.on_page import MAX_PROXY, AtToken, check_token, open_live, thresholds

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.index.store import FeatureIndex
    from headscope.studies.how.sources import HeadComparison, SourceShares
    from headscope.studies.subject import Subject

MAX_TOKENS = 64
"""Maximum number of source tokens in a set."""
_MAX_BLOCKS = 24  # blocks of a feature that are processed for its source tokens
_N_THRESHOLDS = 5
_LARGE = 0.05  # minimum share of squared DFA for a source token to be suggested
_TOP_TOKENS = 12


# ----------------------------------------------------------------------------------------------------------------- sets
@dataclass(frozen=True, kw_only=True)
class SetsOptions:
    """The proxy whose source tokens are one of the sets."""

    proxy: Annotated[str, Text(MAX_PROXY, blank=True)] = ""
    """A proxy; none when blank."""


@dataclass(frozen=True)
class TokenSet:
    """Source tokens that form a set."""

    name: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class SourceSets:
    """The sets of source tokens that a page suggests."""

    sets: tuple[TokenSet, ...]


def _sets(subject: "Subject", latent: int, options: SetsOptions) -> SourceSets:
    """Return source tokens that a proxy names; those with the largest shares; the one that the feature writes."""
    index = subject.index
    found: list[tuple[str, Sequence[int]]] = [("of the proxy", _of_proxy(index, options.proxy))]
    sources, feature = index.sources(latent), index.feature(latent)
    special = set(index.vocabulary[1])
    if sources is not None:
        top = [t for t in sources.tokens if t.token not in special]
        found.append(("top source token", [t.token for t in top[:1]]))
        found.append(("source tokens of 5 % or more", [t.token for t in top[:8] if t.share >= _LARGE]))
    if feature.alive:
        found.append(("top logit token", [feature.logit_top[0][0]]))
    unique = {tuple(sorted(set(tokens))): name for name, tokens in reversed(found) if tokens}
    return SourceSets(tuple(TokenSet(name, tokens) for tokens, name in reversed(unique.items())))


def _of_proxy(index: "FeatureIndex", text: str) -> list[int]:
    """Return the tokens that a proxy expects at the source, if it is of a kind that names them."""
    from headscope.proxies import parse
    from headscope.proxies.families import AfterAny, Induction, WithinAfter

    def number(token: str | int) -> int:
        return token if isinstance(token, int) else index.token_id(token)

    try:
        proxy = parse(text) if text else None
        match proxy:
            case Induction(token=token):
                return [number(token)]
            case AfterAny() | WithinAfter():
                return [number(token) for token in proxy.tokens][:MAX_TOKENS]
    except (ProxyError, IndexFormatError):
        pass  # an unreadable proxy suggests nothing; the proxy tabs report the reason
    return []


SOURCE_SETS = FeatureStudy(
    name="source_sets",
    group="how",
    question="which sets of source tokens are worth looking at?",
    run=_sets,
    options=SetsOptions,
    quick=True,
)


# -------------------------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True, kw_only=True)
class SourcesOptions:
    """The set of source tokens."""

    tokens: tuple[CountFrom0, ...]
    """Token ids of the set."""


def _sources(subject: "Subject", latent: int, options: SourcesOptions) -> "tuple[SourceShares, ...]":
    from headscope.studies.how.sources import source_shares

    if not 0 < len(options.tokens) <= MAX_TOKENS:
        raise StudyError(
            f"{len(options.tokens)} source tokens", expected=f"1 to {MAX_TOKENS} ids, as 12,407", do="name some tokens"
        )
    steps = thresholds(subject.index, latent, _N_THRESHOLDS)
    return source_shares(subject.live, latent, options.tokens, thresholds=steps, max_blocks=_MAX_BLOCKS)


def _show_sources(
    _subject: "Subject", _latent: int, _options: SourcesOptions, found: "tuple[SourceShares, ...]"
) -> "Json":
    from headscope.encode import encode

    whole = ("threshold", "n", "n_active", "summed", "separate", "linear", "bos", "frequency")
    return {
        "tokens": list(found[0].tokens),
        "n_blocks": found[0].n_blocks,
        "thresholds": [
            encode({name: getattr(one, name) for name in whole})
            | {
                "heads": encode(
                    [{"squared": h.squared, "linear": h.linear, "attention": h.attention} for h in one.heads]
                ),
                "top": encode([[t.token, t.summed, t.separate, t.linear] for t in one.top[:_TOP_TOKENS]]),
            }
            for one in found
        ],
    }


def _python_sources(subject: "Subject", latent: int, options: SourcesOptions, found: "tuple[SourceShares, ...]") -> str:
    return (
        f"{open_live(subject, 'from headscope.studies.how.sources import source_shares')}"
        f"source_shares(live, {latent}, {list(options.tokens)}, thresholds={[one.threshold for one in found]}, "
        f"max_blocks={_MAX_BLOCKS})"
    )


SOURCES = FeatureStudy(
    name="sources",
    group="how",
    question="how much of the feature comes from a set of source tokens, and how much attention are they paid?",
    run=_sources,
    options=SourcesOptions,
    needs_model=True,
    tabs=(Tab("source", "DFA by source"), Tab("attention", "Attention")),
    show=_show_sources,
    python=_python_sources,
)


# -------------------------------------------------------------------------------------------------------------- compare
def _compare(subject: "Subject", latent: int, options: AtToken) -> "HeadComparison":
    from headscope.studies.how.sources import compare_heads

    check_token(subject.index, options.at)
    return compare_heads(subject.live, options.at, latent)


def _show_comparison(_subject: "Subject", _latent: int, options: AtToken, found: "HeadComparison") -> "Json":
    from headscope.encode import encode

    dfa = found.dfa
    numbers = encode({name: getattr(dfa, name) for name in ("tokens", "activation", "pre", "bias")})
    return numbers | {
        "at": options.at,
        "residual": encode(dfa.residual, 2),
        "heads": [
            encode({"head": one.head, "contribution": one.contribution, "share": one.share})
            | {
                "sources": encode(
                    list(zip(one.sources.tolist(), one.dfa.tolist(), one.attention.tolist(), strict=True))
                )
            }
            for one in found.heads
        ],
        "agreement": encode(found.agreement),
    }


def _python_comparison(subject: "Subject", latent: int, options: AtToken, _found: "HeadComparison") -> str:
    opened = open_live(subject, "from headscope.studies.how.sources import compare_heads")
    return f"{opened}compare_heads(live, {options.at}, {latent})"


COMPARE_HEADS = FeatureStudy(
    name="compare_heads",
    group="how",
    question="what does each head add at one token, from which sources, and how far do heads agree on them?",
    run=_compare,
    options=AtToken,
    needs_model=True,
    show=_show_comparison,
    python=_python_comparison,
)
