"""Which latents are active together: Pearson correlations of all pairs over the whole corpus, in bounded memory."""

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from headscope.index.parts import SortedParts

_TILE_BYTES = 1 << 27  # of sums held at a time: a run of latents against all


def most_correlated(
    pairs: SortedParts,
    mean: Float[np.ndarray, " latent"],
    std: Float[np.ndarray, " latent"],
    n_tokens: int,
    n_positions: int,
    k: int,
) -> tuple[Int[np.ndarray, "latent k"], Float[np.ndarray, "latent k"]]:
    """The k latents with the largest correlation to each, and the correlations; -1 and NaN where there are fewer.

    `r_ij = (sum_n f_i f_j / N - m_i m_j) / (s_i s_j)` with zeros included. Only latents that are active on a common
    token are considered: all others have a correlation of at most 0.

    Args:
        pairs: with the columns position and activation.
        mean: of each latent over all tokens.
        std: likewise.
        n_tokens: N.
        n_positions: more than the largest position.
        k: how many.
    """
    d_sae = len(mean)
    k = min(k, d_sae - 1)
    latents = np.full((d_sae, k), -1, dtype=np.int64)
    correlations = np.full((d_sae, k), np.nan)
    height = max(1, min(d_sae, _TILE_BYTES // (8 * d_sae)))
    for first in range(0, d_sae, height):
        last = min(d_sae, first + height)
        products = np.zeros((last - first, d_sae))
        for part in pairs.each(["position", "activation"]):
            starts = np.concatenate([[0], np.cumsum(part["counts"])])
            low = part["position"].min(initial=n_positions)
            width = part["position"].max(initial=0) - low + 1
            if starts[-1]:
                f = sparse.csr_array(
                    (part["activation"].astype(np.float64), part["position"] - low, starts), (d_sae, width)
                )
                products += (f[first:last] @ f.T).toarray()
        own = np.arange(first, last)
        with np.errstate(divide="ignore", invalid="ignore"):
            r = (products / n_tokens - mean[own, None] * mean) / (std[own, None] * std)
        r[(products == 0) | ~np.isfinite(r)] = -np.inf
        r[own - first, own] = -np.inf
        best = np.argpartition(-r, min(k, d_sae - 1) - 1, axis=1)[:, :k] if k else np.empty((len(own), 0), np.int64)
        value = np.take_along_axis(r, best, axis=1)
        order = np.argsort(-value, axis=1, kind="stable")
        best, value = np.take_along_axis(best, order, axis=1), np.take_along_axis(value, order, axis=1)
        latents[own] = np.where(np.isfinite(value), best, -1)
        correlations[own] = np.where(np.isfinite(value), value, np.nan)
    return latents, correlations
