"""A corpus of random documents with a feature and a proxy."""

from collections.abc import Iterator

import numpy as np

from headscope.index.records import Activations
from headscope.index.store import FeatureIndex
from headscope.studies.when.specificity import SpecificityPlan, specificity

BLOCK = 20
QUICK = SpecificityPlan(n_samples=50, n_rotations=3)


class ArrayIndex(FeatureIndex):
    """One feature over a corpus, from arrays."""

    def __init__(self, f: np.ndarray, document: np.ndarray, is_text: np.ndarray) -> None:
        self.manifest = {"corpus": {"name": "arrays", "block_size": BLOCK}}
        self.f, self.corpus = f, {"document": document.reshape(-1, BLOCK), "is_text": is_text.reshape(-1, BLOCK)}

    def each_blocks(self) -> Iterator[dict[str, np.ndarray]]:
        yield self.corpus

    def activations(self, latent: int) -> Activations:
        position = np.flatnonzero(self.f)
        return Activations(position, self.f[position], np.zeros((len(position), 1)))


class Case:
    """A corpus of random documents, a feature with ties and a proxy that have something to do with each other."""

    def __init__(self, n_blocks=20, seed=0, share_active=0.3, share_true=0.2, n_documents=15) -> None:
        rng = np.random.default_rng(seed)
        n = n_blocks * BLOCK
        self.document = np.sort(rng.integers(0, n_documents, n)).astype(np.int32)
        self.text = (np.arange(n) % BLOCK != 0) & (rng.random(n) < 0.97)
        self.f = (np.round(rng.gamma(2, 1, n), 1) * (rng.random(n) < share_active) * self.text).astype(np.float32)
        self.mask = (rng.random(n) < share_true + (0.5 * (self.f > 1) if 0 < share_true < 1 else 0)) & self.text
        self.index = ArrayIndex(self.f, self.document, self.text)

    def study(self, plan=QUICK, **options):
        return specificity(self.index, 0, self.mask, plan=plan, **options)
