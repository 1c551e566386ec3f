"""How much of a known dictionary a learned one has found.

Cosines have their sign: a feature's activation is positive, so a latent that points the other way is not the feature.
Every number stands beside the same number of random unit directions, as many as the learned dictionary has.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from headscope.errors import SAEError
from headscope.stats import Measure, estimate_of, mean_interval, wilson

FOUND = 0.9
"""A latent has found a feature when their cosine exceeds this."""


@dataclass(frozen=True)
class Recovery:
    """What was found of a planted dictionary.

    c[j, k] is the cosine of planted feature j and latent k; the matching is the one-to-one assignment of features and
    latents with the largest sum of cosines (Hungarian algorithm).
    """

    mmcs: Measure
    """Mean over features of max_k c[j, k] (Sharkey et al., 2022)."""
    matched_cosine: Measure
    """Mean over features of the cosine with their match; 0 for those that have none."""
    recall: Measure
    """Share of features whose match has found them."""
    precision: Measure
    """Share of latents that have found a feature."""
    uniqueness: Measure
    """Features found, over the latents that found them: 1 when none was found twice."""
    head_share_error: Measure
    """Of matches that have found their feature, the mean of `1/2 sum_h |s_jh - s_kh|`, s the share of a head's block
    in the sum of the norms of the blocks: 0 when the shares agree, 1 when they have no head in common."""

    def measures(self) -> dict[str, Measure]:
        """By name, in the order of a table's columns."""
        return dict(vars(self))


def recovery(
    planted: Float[Tensor, "feature d_in"], learned: Float[Tensor, "latent width"], n_heads: int, *, seed: int = 0
) -> Recovery:
    """Compare a learned dictionary with the planted one.

    Args:
        planted: directions that the data are made of.
        learned: decoder rows, of the same width; leave out latents that are never active: they would count as wrong.
        n_heads: heads that d_in is the concatenation of.
        seed: of the null's directions.

    Raises:
        SAEError: widths that differ, or that cannot be cut into as many heads; no rows.
    """
    d_in = planted.shape[1]
    if learned.shape[1] != d_in or n_heads < 1 or d_in % n_heads or not len(planted) or not len(learned):
        raise SAEError(
            f"{tuple(learned.shape)} learned directions for {tuple(planted.shape)} planted ones in {n_heads} heads",
            expected="rows of the same width, a multiple of the heads",
            do="pass decoder rows of an SAE that was trained on the planted data",
        )
    random = torch.randn(len(learned), d_in, generator=torch.Generator().manual_seed(seed)).to(planted)
    null = _compare(planted, random, n_heads).measures()
    found = _compare(planted, learned, n_heads).measures()
    return Recovery(**{name: replace(measure, null=estimate_of(null[name])) for name, measure in found.items()})


def _compare(planted: Float[Tensor, "feature d_in"], learned: Float[Tensor, "latent d_in"], n_heads: int) -> Recovery:
    cosine = (_unit(planted) @ _unit(learned).T).numpy()
    feature, latent = linear_sum_assignment(cosine, maximize=True)
    matched = np.zeros(len(planted))
    matched[feature] = cosine[feature, latent]
    found, correct = matched > FOUND, cosine.max(0) > FOUND
    pairs = cosine[feature, latent] > FOUND
    shares = _head_shares(planted[feature[pairs]], n_heads) - _head_shares(learned[latent[pairs]], n_heads)
    distinct = np.unique(cosine.argmax(0)[correct])
    return Recovery(
        _mean(cosine.max(1), "mean over planted features of the largest cosine with any latent"),
        _mean(matched, "mean over planted features of the cosine with their one-to-one match"),
        _share(int(found.sum()), len(found), f"planted features whose match has a cosine above {FOUND}"),
        _share(int(correct.sum()), len(correct), f"latents with a cosine above {FOUND} with a planted feature"),
        _share(len(distinct), int(correct.sum()), "distinct features nearest to latents of `precision`, over these"),
        _mean(
            shares.abs().sum(1).double().numpy() / 2,
            f"mean distance of head shares, 1/2 sum |difference|, over matches with a cosine above {FOUND}",
        ),
    )


def _unit(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    rows = rows.detach().double().cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _head_shares(rows: Float[Tensor, "n d_in"], n_heads: int) -> Float[Tensor, "n head"]:
    norms = rows.detach().double().cpu().unflatten(1, (n_heads, -1)).norm(dim=2)
    return norms / norms.sum(1, keepdim=True).clamp_min(1e-12)


def _mean(values: Float[np.ndarray, " unit"], definition: str) -> Measure:
    if not len(values):
        return Measure(definition, 0, missing="nothing was found")
    low, high = mean_interval(values) or (None, None)
    made = "95 %, resampled 1,000 times" if low is not None else None
    return Measure(definition, len(values), float(values.mean()), low, high, made)


def _share(successes: int, n: int, definition: str) -> Measure:
    if not n:
        return Measure(definition, 0, missing="nothing was found")
    found = wilson(successes, n)
    return Measure(definition, n, found.value, found.low, found.high, "Wilson 95 %")
