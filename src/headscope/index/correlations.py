"""Pearson correlations of all pairs of latents over the whole corpus, in bounded memory."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from headscope.index.parts import SortedParts

_ROWS = 256  # latents compared with all others at a time
_TILE_BYTES = 1 << 28  # sums in memory at a time: a run of latents against all


def most_correlated(
    pairs: SortedParts,
    mean: Float[np.ndarray, " latent"],
    std: Float[np.ndarray, " latent"],
    n_tokens: int,
    k: int,
    on_latents: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[Int[np.ndarray, "latent k"], Float[np.ndarray, "latent k"]]:
    """The k latents with the largest correlation to each, and the correlations; -1 and NaN where there are fewer.

    `r_ij = (sum_n f_i f_j / N - m_i m_j) / (s_i s_j)` with zeros included. Only latents that are active on a common
    token are considered: all others have a correlation of at most 0.

    Args:
        pairs: with the columns position and activation.
        mean: of each latent over all tokens.
        std: standard deviation, likewise.
        n_tokens: N.
        k: number per latent.
        on_latents: called with the latents done and the total.
    """
    d_sae = len(mean)
    k = min(k, d_sae - 1)
    latents = np.full((d_sae, k), -1, dtype=np.int64)
    correlations = np.full((d_sae, k), np.nan)
    height = max(1, min(d_sae, _TILE_BYTES // (8 * d_sae)))
    for first in range(0, d_sae, height) if k else ():
        products = np.zeros((min(height, d_sae - first), d_sae))
        for part in pairs.each(["position", "activation"]):
            _add_products(products, part, first)
        for start in range(0, len(products), _ROWS):
            chosen = slice(start, start + _ROWS)
            own = first + np.arange(start, min(start + _ROWS, len(products)))
            best = _largest(products[chosen] / n_tokens, own, mean, std, k)
            latents[own], correlations[own] = best
        on_latents(min(first + height, d_sae), d_sae)
    return latents, correlations


def _largest(
    mean_product: Float[np.ndarray, "own latent"],
    own: Int[np.ndarray, " own"],
    mean: np.ndarray,
    std: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest correlations of some latents with all others, and the other latents."""
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (mean_product - mean[own, None] * mean) / (std[own, None] * std)
    r[(mean_product == 0) | ~np.isfinite(r)] = -np.inf
    r[np.arange(len(own)), own] = -np.inf
    best = np.argpartition(-r, k - 1, axis=1)[:, :k]
    value = np.take_along_axis(r, best, axis=1)
    order = np.argsort(-value, axis=1, kind="stable")
    best, value = np.take_along_axis(best, order, axis=1), np.take_along_axis(value, order, axis=1)
    exists = np.isfinite(value)
    return np.where(exists, best, -1), np.where(exists, value, np.nan)


def _add_products(products: Float[np.ndarray, "own latent"], part: dict[str, np.ndarray], first: int) -> None:
    """Add the sums over a part's tokens of f_i f_j, for the latents i from `first` on."""
    starts = np.concatenate([[0], np.cumsum(part["counts"])])
    if not starts[-1]:
        return
    low, high = part["position"].min(), part["position"].max()
    values = part["activation"].astype(np.float64)
    f = sparse.csr_array((values, part["position"] - low, starts), (products.shape[1], high - low + 1))
    found = (f[first : first + len(products)] @ f.T).tocoo()
    products[found.row, found.col] += found.data  # each index once
