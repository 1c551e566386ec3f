"""Active tokens of a feature whose next token is text: those where the loss measures its effect."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.index.store import FeatureIndex


@dataclass(frozen=True)
class Text:
    """The tokens of an index."""

    tokens: Int[np.ndarray, "block position"]
    document: Int[np.ndarray, "block position"]
    is_text: Bool[np.ndarray, "block position"]
    """As `Corpus.is_text`."""

    @classmethod
    def of(cls, index: FeatureIndex) -> "Text":
        """Read the tokens; uses 9 bytes per token."""
        parts = list(index.each_blocks())
        return cls(*(np.concatenate([part[name] for part in parts]) for name in ("token", "document", "is_text")))

    @cached_property
    def text_tokens(self) -> Int[np.ndarray, "block position"]:
        """The tokens where they are text, -1 elsewhere: padding and separators may have the id of a text token."""
        return np.where(self.is_text, self.tokens, np.int32(-1))

    @property
    def counted(self) -> Bool[np.ndarray, "block position"]:
        """Text tokens whose next token is text of the same block: their loss is that of a text token."""
        counted = np.zeros_like(self.is_text)
        counted[:, :-1] = self.is_text[:, :-1] & self.is_text[:, 1:]
        return counted

    def next_token(self, position: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the tokens after some counted positions."""
        return self.tokens.reshape(-1)[position + 1]


def drawn(n: int, most: int | None, key: tuple[int, ...]) -> Int[np.ndarray, " drawn"]:
    """Sample indices below n, ascending: all, or `most` without replacement; reproducible by key."""
    if most is None or n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(key).choice(n, most, replace=False))


@dataclass(frozen=True)
class ActiveTokens:
    """The counted active tokens of a feature, or a sample of them."""

    n: int
    """Their total number."""
    position: Int[np.ndarray, " token"]
    activation: Float[np.ndarray, " token"]

    @classmethod
    def of(
        cls,
        index: FeatureIndex,
        counted: Bool[np.ndarray, " position"],
        latent: int,
        *,
        most: int | None = None,
        seed: int = 0,
    ) -> "ActiveTokens":
        """Return the active tokens of one latent, or a uniform sample of `most` of them.

        Raises:
            IndexFormatError: no such latent.
        """
        found = index.activations(latent)
        kept = np.flatnonzero(counted[found.position])
        chosen = kept[drawn(len(kept), most, (seed, latent))]
        return cls(len(kept), found.position[chosen], found.activation[chosen])
