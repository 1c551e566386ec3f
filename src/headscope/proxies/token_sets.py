"""Find the few tokens, or other keys, whose presence correlates best with an activation."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

_GRID = 12  # number of means at which an oversized set is cut


@dataclass(frozen=True)
class Activation:
    """Sums of an activation f over n tokens, zeros included, for correlations."""

    n: int
    mass: float
    """`sum f`."""
    square: float
    """`sum f^2`."""

    def pearson(
        self, n_true: Float[np.ndarray, " mask"], mass_true: Float[np.ndarray, " mask"]
    ) -> Float[np.ndarray, " mask"]:
        """Correlate f with masks true at `n_true` tokens, over which f sums to `mass_true`; NaN if constant.

        `(sum f y - sum f sum y / n) / sqrt((sum f^2 - (sum f)^2 / n) (sum y - (sum y)^2 / n))`.
        """
        covariance = mass_true - self.mass * n_true / self.n
        variance = self.square - self.mass**2 / self.n
        with np.errstate(divide="ignore", invalid="ignore"):
            return covariance / np.sqrt(np.maximum(variance * (n_true - n_true**2 / self.n), 0))


def best_set(
    key: Int[np.ndarray, " active"],
    f: Float[np.ndarray, " active"],
    n_of: Float[np.ndarray, " key"],
    allowed: Bool[np.ndarray, " key"],
    of: Activation,
    limit: int,
) -> tuple[Int[np.ndarray, " chosen"], float]:
    """Find the set of at most `limit` keys whose mask has the largest correlation with f.

    Without a limit the best set consists of the keys of largest mean f, down to some mean (Fisher 1958; Breiman et al.
    1984, theorem 4.5): it is found by sorting. A larger set is cut, for several means m, to the keys with the largest
    `sum f - m n`, and the best of these is selected by the same sorting, which may be slightly suboptimal.

    Args:
        key: of each active token, from 0.
        f: its activation.
        n_of: number of tokens, active or not, with each key.
        allowed: keys that may be chosen.
        of: sums over all tokens.
        limit: maximum number of keys.

    Returns:
        The keys, best first, and the correlation; no keys and -1 where there is none.
    """
    mass = np.bincount(key, f, minlength=len(n_of))
    keys = np.flatnonzero((mass > 0) & allowed)
    if not len(keys):
        return keys, -1.0
    mass, n = mass[keys], n_of[keys]
    mean = mass / n
    best, found = -1.0, keys[:0]
    levels = np.quantile(mean, np.linspace(0, 1, _GRID)) if len(keys) > limit else [0.0]
    for level in levels:
        kept = np.argsort(-(mass - level * n), kind="stable")[:limit]
        kept = kept[np.argsort(-mean[kept], kind="stable")]
        pearson = np.nan_to_num(of.pearson(np.cumsum(n[kept]), np.cumsum(mass[kept])), nan=-1.0)
        if pearson.max() > best:
            size = int(np.argmax(pearson)) + 1
            best, found = float(pearson[size - 1]), keys[kept[:size]]
    return found, best
