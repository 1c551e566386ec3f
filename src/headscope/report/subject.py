"""The SAE under study: the input of every section of the report."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from headscope.errors import StudyError
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.report.records import FULL, Exemplar, Kind, Settings
from headscope.sae.model import SAE
from headscope.tokens import visible

T = TypeVar("T")


def _silent(_done: int, _total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Subject:
    """An index with its model and SAE, the exemplars chosen from it, and the sample sizes."""

    name: str
    """Name of the SAE in the report."""
    live: LiveIndex
    exemplars: tuple[Exemplar, ...] = ()
    """At most one of each kind; a kind without a feature has none."""
    settings: Settings = FULL
    upstream_sae: SAE | None = None
    """An `mlp_out` SAE of an earlier layer, whose features are nodes of the circuit; None where there is none."""
    progress: Callable[[int, int], None] = field(default=_silent, compare=False)
    """Progress callback of the running section: called with the work done and the total."""
    found: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)
    """Results shared by several sections, by name; they live as long as the subject."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make` for a key, computed once."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]  # pyright: ignore[reportReturnType] - a key has one kind of value

    @property
    def index(self) -> FeatureIndex:
        """The index."""
        return self.live.index

    @property
    def model(self) -> Model:
        """The model."""
        return self.live.model

    @property
    def sae(self) -> SAE:
        """The SAE."""
        return self.live.sae

    def exemplar(self, kind: Kind) -> Exemplar:
        """Return the exemplar of a kind.

        Raises:
            StudyError: there is none.
        """
        for exemplar in self.exemplars:
            if exemplar.kind == kind:
                return exemplar
        raise StudyError(
            f"no {kind} feature among those of {self.name}",
            expected="one whose proxy explains it",
            do="index more text, or train on more",
        )

    def some_exemplars(self) -> tuple[Exemplar, ...]:
        """Return all exemplars.

        Raises:
            StudyError: there is none of any kind.
        """
        if not self.exemplars:
            raise StudyError(
                f"no feature of {self.name} goes with a proxy of any of the post's families",
                expected="one with a correlation above its null",
                do="index more text, or train on more",
            )
        return self.exemplars

    def text(self, token: int) -> str:
        """Format a token, in quotes with visible spaces."""
        return visible(repr(self.index.vocabulary[0][token].decode(errors="replace")))

    def head_name(self, head: int) -> str:
        """Format a head as layer and head: `1.6`."""
        return f"{self.sae.site.layer}.{head}"
