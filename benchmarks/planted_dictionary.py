"""Data whose true dictionary is known: x = sum_j a_j d_j + noise, laid out as concatenated heads.

What is known to matter for dictionaries of attention outputs is in it: each head's block has fewer directions than
components, a feature writes to one head or is spread over several, few features are frequent and most are rare (Zipf),
features of a group come together, and a child comes only where its parent is. Frequencies, groups and parents follow
SynthSAEBench (Chanin & Garriga-Alonso, 2026, https://arxiv.org/abs/2602.14687). What a trained dictionary has found of
it is measured in `recovery`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtri
from torch import Tensor

from headscope.errors import TrainingError

MOST_FREQUENT = 0.5
"""No feature is active on a larger share of the inputs."""
_SPREAD_OF_ACTIVATIONS = 0.25  # standard deviation over mean
_SMALLEST_ACTIVATION = 0.1  # over mean


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """What decides a planted dictionary."""

    n_features: int = 256
    n_heads: int = 4
    d_head: int = 16
    rank: int = 12
    """Directions that a head's block has."""
    spread: tuple[int, ...] = (1, 1, 2, 3)
    """How many heads a feature is spread over: drawn from these."""
    l0: int | float = 8.0
    """Mean number of active features of an input."""
    zipf: int | float = 0.8
    """The j-th most frequent feature has a frequency in proportion to j^-zipf, cut off at `MOST_FREQUENT`."""
    child_share: int | float = 0.25
    """Of the features, the rarest: each is active only where its parent is."""
    group_size: int = 4
    """Features without a parent come in groups of this size."""
    group_correlation: int | float = 0.4
    """Of the normal variables behind the features of a group; each is active where its own exceeds a threshold."""
    noise: int | float = 0.02
    """Standard deviation of a component; an activation is about 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be planted."""
        checks = (
            ("n_features", self.n_features >= 2, "2 or more"),
            ("rank", 1 <= self.rank <= self.d_head, f"1 to d_head = {self.d_head}"),
            ("spread", all(1 <= k <= self.n_heads for k in self.spread) and self.spread, f"1 to {self.n_heads} heads"),
            ("l0", 0 < self.l0 < MOST_FREQUENT * self.n_features, f"above 0, below {MOST_FREQUENT} * n_features"),
            ("zipf", self.zipf >= 0, "0 or more"),
            ("child_share", 0 <= self.child_share < 1, "0 or more, below 1"),
            ("group_size", self.group_size >= 1, "1 or more"),
            ("group_correlation", 0 <= self.group_correlation < 1, "0 or more, below 1"),
            ("noise", self.noise >= 0, "0 or more"),
        )
        for name, right, expected in checks:
            if not right:
                raise TrainingError(f"{name} = {getattr(self, name)}", expected=expected, do=f"change {name}")

    @property
    def d_in(self) -> int:
        """Components of an input."""
        return self.n_heads * self.d_head


@dataclass(frozen=True)
class PlantedBatch:
    """Inputs and the activations they are made of."""

    x: Float[Tensor, "n d_in"]
    activations: Float[Tensor, "n feature"]


@dataclass(frozen=True)
class PlantedDictionary:
    """Known directions and how they come about; features in order of frequency, the most frequent first."""

    config: PlantedConfig
    directions: Float[Tensor, "feature d_in"]
    """Of unit norm."""
    frequency: Float[np.ndarray, " feature"]
    """Share of inputs on which a feature is active; the sum is `l0`."""
    magnitude: Float[Tensor, " feature"]
    """Mean activation where it is active."""
    group: Int[Tensor, " feature"]
    """Number of its group; -1 for one that has a parent."""
    parent: Int[Tensor, " feature"]
    """-1 for one that has none."""

    def sample(self, n: int, generator: torch.Generator) -> PlantedBatch:
        """Draw inputs.

        Feature j of group g is active where `sqrt(r) u_g + sqrt(1 - r) e_j` (u, e normal, r the group's correlation)
        exceeds the quantile of its frequency, a child where that holds of its own variable, given its parent's
        activation: frequencies are exact in expectation for any r.

        Args:
            n: inputs.
            generator: decides them.
        """
        normal = torch.randn(n, len(self.group), generator=generator)
        grouped, r = self.group >= 0, self.config.group_correlation
        n_groups = int(self.group.max()) + 1
        shared = torch.randn(n, n_groups, generator=generator)[:, self.group[grouped]]
        normal[:, grouped] = normal[:, grouped] * (1 - r) ** 0.5 + shared * r**0.5
        active = normal > self._thresholds()
        children = (self.parent >= 0).nonzero()[:, 0]
        active[:, children] &= active[:, self.parent[children]]
        row, feature = active.nonzero(as_tuple=True)
        relative = 1 + _SPREAD_OF_ACTIVATIONS * torch.randn(len(row), generator=generator)
        activations = torch.zeros_like(normal)
        activations[row, feature] = self.magnitude[feature] * relative.clamp_min(_SMALLEST_ACTIVATION)
        noise = self.config.noise * torch.randn(n, self.config.d_in, generator=generator)
        return PlantedBatch(torch.addmm(noise, activations, self.directions), activations)

    def _thresholds(self) -> Float[Tensor, " feature"]:
        """Of the normal variables; of a child, by its frequency where its parent is active."""
        parent = self.parent.numpy()
        given = np.where(parent >= 0, self.frequency[parent], 1.0)
        return torch.from_numpy(-ndtri(self.frequency / given)).float()


def plant(config: PlantedConfig) -> PlantedDictionary:
    """Make a dictionary; the same config gives the same one."""
    generator = torch.Generator().manual_seed(config.seed)
    n_children = min(round(config.child_share * config.n_features), config.n_features - 1)
    n_free = config.n_features - n_children
    number = torch.arange(n_free)[torch.randperm(n_free, generator=generator)]
    none = torch.full((n_children,), -1)
    parents = torch.randint(0, n_free, (n_children,), generator=generator)
    return PlantedDictionary(
        config,
        _directions(config, generator),
        zipf_frequencies(config.n_features, config.zipf, config.l0),
        0.7 + 0.6 * torch.rand(config.n_features, generator=generator),
        torch.cat([number // config.group_size, none]),
        torch.cat([torch.full((n_free,), -1), parents]),
    )


def _directions(config: PlantedConfig, generator: torch.Generator) -> Float[Tensor, "feature d_in"]:
    """Unit rows: in each of a feature's heads, a random direction of the head's block."""
    n, heads = config.n_features, config.n_heads
    drawn = torch.randint(0, len(config.spread), (n,), generator=generator)
    n_used = torch.tensor(config.spread)[drawn]
    place = torch.rand(n, heads, generator=generator).argsort(1).argsort(1)  # of each head in a random order
    used = place < n_used[:, None]
    norms = used * (0.5 + 0.5 * torch.rand(n, heads, generator=generator))
    bases = torch.linalg.qr(torch.randn(heads, config.d_head, config.rank, generator=generator)).Q
    within = torch.randn(n, heads, config.rank, generator=generator)
    within = within / within.norm(dim=2, keepdim=True) * norms[:, :, None]
    rows = torch.einsum("fhr,hdr->fhd", within, bases).flatten(1)
    return rows / rows.norm(dim=1, keepdim=True)


def zipf_frequencies(n: int, exponent: int | float, total: int | float) -> Float[np.ndarray, " n"]:
    """`min(c j^-exponent, MOST_FREQUENT)` for j = 1 ... n, with c such that they sum to `total`.

    Raises:
        TrainingError: the total is more than n features can reach.
    """
    if not 0 < total < MOST_FREQUENT * n:
        raise TrainingError(
            f"an L0 of {total}", expected=f"above 0 and below {MOST_FREQUENT} * {n}", do="plant more features"
        )
    shape = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    n_cut = 0  # features at the cut-off: the fewest with which the others stay below it
    scale = total / shape.sum()
    while scale * shape[n_cut] > MOST_FREQUENT:
        n_cut += 1
        scale = (total - MOST_FREQUENT * n_cut) / shape[n_cut:].sum()
    return np.concatenate([np.full(n_cut, MOST_FREQUENT), scale * shape[n_cut:]])
