"""The active tokens of a feature split by a proxy, for specificity studies. No torch.

Documents are the units of resampling. Beyond `MAX_UNITS`, neighbouring ones are merged.
"""

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.errors import IndexFormatError, StudyError
from headscope.index.store import FeatureIndex
from headscope.proxies import Proxy, evaluate, parse
from headscope.stats import PAIR_SUMS, PairSums, Ranking

MAX_UNITS = 4096

Mask = Bool[np.ndarray, " token"]


@dataclass(frozen=True)
class TextTokens:
    """The text positions of a corpus, and their documents."""

    is_text: Bool[np.ndarray, " token"]
    """As `Corpus.is_text`."""
    unit: Int[np.ndarray, " token"]
    """The document of each position, or the group of neighbouring documents; from 0, without gaps."""
    counts: Int[np.ndarray, " unit"]
    """Text tokens of each unit; none is empty."""
    n_documents: int
    """Documents with at least one text token."""
    block_size: int

    @classmethod
    def of(cls, index: FeatureIndex) -> "TextTokens":
        """Read them; 5 bytes per position stay in memory as long as the index is open."""
        if index not in _held:
            _held[index] = cls._read(index)
        return _held[index]

    @classmethod
    def _read(cls, index: FeatureIndex) -> "TextTokens":
        parts = list(index.each_blocks())
        is_text, document = (np.concatenate([part[name].ravel() for part in parts]) for name in ("is_text", "document"))
        return cls.from_arrays(is_text, document, index.block_size)

    @classmethod
    def from_arrays(
        cls, is_text: Bool[np.ndarray, " token"], document: Int[np.ndarray, " token"], block_size: int
    ) -> "TextTokens":
        """Build from the document number of each position, text or not."""
        with_text = np.bincount(document[is_text], minlength=int(document.max()) + 1) > 0
        n_documents = int(with_text.sum())
        rank = np.maximum(np.cumsum(with_text) - 1, 0)
        unit = (rank * min(n_documents, MAX_UNITS) // max(n_documents, 1)).astype(np.int32)[document]
        return cls(is_text, unit, np.bincount(unit[is_text]), n_documents, block_size)

    @property
    def n(self) -> int:
        """Number of text tokens."""
        return int(self.counts.sum())

    @cached_property
    def special(self) -> Int[np.ndarray, " special"]:
        """Positions that are not text."""
        return np.flatnonzero(~self.is_text)


_held: "WeakKeyDictionary[FeatureIndex, TextTokens]" = WeakKeyDictionary()


def read_mask(proxy: Proxy | str | Mask, index: FeatureIndex, text: TextTokens, what: str) -> Mask:
    """Return a mask of text tokens: evaluates a proxy, or validates a mask; special tokens are false.

    Raises:
        ProxyError: a proxy that cannot be parsed or evaluated.
        StudyError: a mask that is not one bool per position; `what` is its name.
    """
    mask = evaluate(proxy, index) if isinstance(proxy, Proxy | str) else proxy
    size = len(text.is_text)
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (size,):
        got = f"{mask.dtype} of shape {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise StudyError(
            f"{what}: {got}", expected=f"an array of {size} bool, one a position", do="pass a mask of the whole corpus"
        )
    return mask & text.is_text


@dataclass(frozen=True)
class Split:
    """A feature's active tokens, strongest first, and a mask of all tokens."""

    text: TextTokens
    mask: Mask
    """False at special tokens."""
    position: Int[np.ndarray, " active"]
    activation: Float[np.ndarray, " active"]
    """float64, descending."""

    @classmethod
    def read(cls, index: FeatureIndex, latent: int, proxy: Proxy | str | Mask) -> tuple["Split", str]:
        """Read a feature of an index, with the proxy's name, `a mask` for a mask.

        Raises:
            IndexFormatError: no such latent, or activations that are damaged.
            ProxyError: a proxy that cannot be parsed or evaluated.
            StudyError: a mask that is not one bool per position.
        """
        proxy = parse(proxy) if isinstance(proxy, str) else proxy
        text, active = TextTokens.of(index), index.activations(latent)
        mask = read_mask(proxy, index, text, "the proxy")
        return cls.of(text, mask, active.position, active.activation), proxy.name if isinstance(
            proxy, Proxy
        ) else "a mask"

    @classmethod
    def of(
        cls,
        text: TextTokens,
        mask: Mask,
        position: Int[np.ndarray, " active"],
        activation: Float[np.ndarray, " active"],
    ) -> "Split":
        """Sort the active tokens; those of equal activation by position.

        Raises:
            IndexFormatError: activations that are not finite and above 0, or not at distinct text tokens.
        """
        inside = bool(((position >= 0) & (position < len(mask))).all()) and bool(text.is_text[position].all())
        if not (inside and np.isfinite(activation).all() and (activation > 0).all()):
            raise IndexFormatError(
                "activations that are not finite and above 0, or not at text tokens",
                expected="activations as `headscope index` writes them",
                do="build the index again",
            )
        order = np.lexsort((position, -activation))
        return cls(text, mask, position[order], activation[order].astype(np.float64))

    @property
    def n_active(self) -> int:
        """Number of active tokens."""
        return len(self.position)

    @cached_property
    def n_true(self) -> int:
        """Number of tokens where the mask is true."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def own(self) -> Bool[np.ndarray, " active"]:
        """The mask at the active tokens."""
        return self.mask[self.position]

    @cached_property
    def n_own(self) -> Int[np.ndarray, " count"]:
        """Number of the strongest k active tokens where the mask is true; k from 0 to all."""
        return np.append(0, np.cumsum(self.own))

    @cached_property
    def unit(self) -> Int[np.ndarray, " active"]:
        """Unit of the active tokens."""
        return self.text.unit[self.position]

    @cached_property
    def true_by_unit(self) -> Int[np.ndarray, " unit"]:
        """Number of tokens of each unit where the mask is true."""
        return self.count_by_unit(np.flatnonzero(self.mask))

    def count_by_unit(self, position: Int[np.ndarray, " token"]) -> Int[np.ndarray, " unit"]:
        """Count the given positions in each unit."""
        return np.bincount(self.text.unit[position], minlength=len(self.text.counts))

    def n_above(self, threshold: float) -> int:
        """Return the number of tokens with f > threshold; they are the first ones."""
        return int(np.searchsorted(-self.activation, -threshold, side="left"))

    @cached_property
    def shift(self) -> float:
        """The mean activation over all text tokens."""
        return _centre(self.activation, self.text.n)

    @cached_property
    def sums(self) -> PairSums:
        """Sums by unit, over all text tokens."""
        active = np.bincount(self.unit, minlength=len(self.text.counts))
        both = np.bincount(self.unit[self.own], minlength=len(self.text.counts))
        return PairSums.of(
            self.unit,
            self.activation,
            self.own,
            self.text.counts - active,
            self.true_by_unit - both,
            shift=self.shift,
        )

    def sums_above(self, threshold: float) -> PairSums:
        """Return sums by unit, over the tokens with f > threshold only."""
        k = self.n_above(threshold)
        f, none = self.activation[:k], np.zeros_like(self.text.counts)
        return PairSums.of(self.unit[:k], f, self.own[:k], none, none, shift=_centre(f, k))

    @cached_property
    def ranking(self) -> Ranking:
        """Ranking of all text tokens."""
        return self._ranked(self.own, self.n_true)

    def _ranked(self, own: Bool[np.ndarray, " active"], n_true: int) -> Ranking:
        silent_true = n_true - int(np.count_nonzero(own))
        return Ranking.of(self.activation, own, self.text.n - self.n_active, silent_true)

    def rotations(self, n: int, seed: int, tau: float) -> "Rotations":
        """Return the feature against the mask rotated by random whole numbers of blocks: n times, or in all ways."""
        size, block = len(self.mask), self.text.block_size
        n_others = size // block - 1
        rng = np.random.default_rng(seed)
        shifts = 1 + rng.choice(n_others, min(n, n_others), replace=False) if n_others else np.zeros(0, dtype=np.int64)
        above = self.n_above(tau)
        centre, centre_above = self.shift, _centre(self.activation[:above], above)
        total, total_above = self.sums.total(), self.sums_above(tau).total()
        rows, rows_above, areas = [], [], []
        for by in shifts * block:
            own = self.mask[(self.position + by) % size]
            n_true = self.n_true - int(np.count_nonzero(self.mask[(self.text.special + by) % size]))
            rows.append(_moved(total, self.activation, own, n_true, centre))
            of, n_true_above = own[:above], int(np.count_nonzero(own[:above]))
            rows_above.append(_moved(total_above, self.activation[:above], of, n_true_above, centre_above))
            ranked = self._ranked(own, n_true)
            areas.append((ranked.auc(), ranked.average_precision()))
        width = len(PAIR_SUMS)
        return Rotations(
            PairSums(np.reshape(rows, (-1, width))),
            PairSums(np.reshape(rows_above, (-1, width))),
            *np.reshape(areas, (-1, 2)).T,
        )


@dataclass(frozen=True)
class Rotations:
    """A feature against rotated, unrelated masks: one unit per rotation."""

    sums: PairSums
    above: PairSums
    auc: Float[np.ndarray, " rotation"]
    average_precision: Float[np.ndarray, " rotation"]


def _centre(f: Float[np.ndarray, " active"], n: int) -> float:
    """Return the mean of f and n - len(f) zeros; exact for a constant, which must not vary by rounding."""
    if len(f) and len(f) == n and f[0] == f[-1]:
        return float(f[0])
    return float(f.sum() / max(n, 1))


def _moved(
    total: PairSums, f: Float[np.ndarray, " active"], own: Bool[np.ndarray, " active"], n_true: int, shift: float
) -> Float[np.ndarray, " sum"]:
    """Return the sums with another mask: only those that depend on the mask change."""
    both = int(np.count_nonzero(own))
    new = {
        "true": n_true,
        "both": both,
        "mass_true": f[own].sum(),
        "centred_true": (f[own] - shift).sum() - shift * (n_true - both),
    }
    return np.array([new.get(name, total[name].item()) for name in PAIR_SUMS], dtype=np.float64)
