"""Shared by studies of one feature on the page: options, corpus positions, and the Python shown next to them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from headscope.errors import StudyError
from headscope.limits import CountFrom0, Text

if TYPE_CHECKING:
    from headscope.index.store import FeatureIndex
    from headscope.studies.subject import Subject

MAX_PROXY = 2000
"""Maximum number of characters of a proxy on the page."""
ProxyText = Annotated[str, Text(MAX_PROXY)]


@dataclass(frozen=True, kw_only=True)
class OfProxy:
    """Options of a study that compares a feature with a proxy."""

    proxy: ProxyText
    """A rule for the tokens where the feature should fire, such as 'token_in([" the"])'."""


@dataclass(frozen=True, kw_only=True)
class AtToken:
    """Options of a study of a feature at one token of the corpus."""

    at: CountFrom0
    """Position of the token: block number x block size + position in the block."""


def prompt_at(index: "FeatureIndex", at: int) -> tuple[tuple[int, ...], int]:
    """Return the tokens of a block of the corpus up to one of its tokens, and that token's position in the block.

    Raises:
        StudyError: the corpus has no such token.
    """
    check_token(index, at)
    block, query = divmod(at, index.block_size)
    if query == 0:
        raise StudyError(
            f"position {at}, the first of its block",
            expected="a token with others before it",
            do="choose another token",
        )
    return tuple(index.tokens_of(block)[: query + 1].tolist()), query


def check_token(index: "FeatureIndex", at: int) -> None:
    """Raise StudyError unless the corpus of an index has this position."""
    n = index.n_blocks * index.block_size
    if not 0 <= at < n:
        raise StudyError(f"position {at}", expected=f"0 to {n - 1}", do="name a token of this corpus")


def thresholds(index: "FeatureIndex", latent: int, n: int) -> tuple[float, ...]:
    """Return n thresholds from 0 in equal steps of a feature's largest activation; only 0 for a dead feature."""
    maximum = index.feature(latent).maximum or 0.0
    return tuple(float(f"{maximum * k / n:.3g}") for k in range(n)) if maximum > 0 else (0.0,)


def open_index(subject: "Subject", imports: str) -> str:
    """Return Python code that imports, and opens the index as `index`."""
    folder = str(subject.index.folder)
    return f"from headscope import FeatureIndex\n{imports}\n\nindex = FeatureIndex.open({folder!r})\n"


def open_live(subject: "Subject", imports: str) -> str:
    """Return Python code that imports, and opens the index with its model as `live`."""
    return f"from headscope import jobs\n{imports}\n\nlive = jobs.live({str(subject.index.folder)!r})\n"
