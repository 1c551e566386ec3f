"""The index under study, with its model and SAE if loaded."""

from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from headscope.errors import StudyError
from headscope.index.store import FeatureIndex
from headscope.recent import Recent

if TYPE_CHECKING:
    from headscope.index.live import LiveIndex
    from headscope.sae.model import SAE
    from headscope.studies.how.prompt_circuits import PromptCircuits
    from headscope.studies.prompt.prompts import Prompts

T = TypeVar("T")
COMMAND = "headscope serve --with-model"
_REMEMBERED = 8


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Ignore progress."""


class Subject:
    """An index with its model; one computation at a time runs the model, so any thread may call it."""

    def __init__(
        self,
        index: FeatureIndex,
        live: "LiveIndex | None" = None,
        *,
        saes: "Mapping[str, SAE] | None" = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Make the subject of studies.

        Args:
            index: open.
            live: the same index with its model and SAE; None where no model is loaded.
            saes: SAEs of earlier components of the model, by name.
            progress: called with the stage, the work done and the total.

        Raises:
            SAEError: an SAE that is not of an earlier component, or two of one component.
        """
        self.index, self.progress = index, progress or _silent
        self.lock = RLock()
        """Held while the model runs."""
        self._live, self._recent = live, Recent[Hashable, object](_REMEMBERED)
        self.saes: dict[str, SAE] = {}
        """SAEs of earlier components, by name."""
        if live is not None and saes:
            from headscope.decomposition import check_saes

            module = live.model.module
            self.saes = {name: sae.to(live.model.device).to(module.dtype) for name, sae in saes.items()}
            check_saes(live.model, live.sae.site.layer, list(self.saes.values()))

    @property
    def has_model(self) -> bool:
        """Whether a model is loaded."""
        return self._live is not None

    @property
    def live(self) -> "LiveIndex":
        """Return the index with its model and SAE.

        Raises:
            StudyError: none is loaded.
        """
        if self._live is None:
            raise StudyError("no model to run", expected="the index's model", do=f"start the server with it: {COMMAND}")
        return self._live

    def check_model(self) -> None:
        """Raise StudyError unless a model is loaded."""
        _ = self.live

    @cached_property
    def circuits(self) -> "PromptCircuits":
        """Return the recursive DFA and scores of prompts, cached for the last few prompts.

        Raises:
            StudyError: no model is loaded.
        """
        from headscope.studies.how.prompt_circuits import PromptCircuits

        return PromptCircuits(self.live.model, self.live.sae, saes=list(self.saes.values()))

    @cached_property
    def prompts(self) -> "Prompts":
        """Return the runs of prompts, cached for the last few.

        Raises:
            StudyError: no model is loaded.
        """
        from headscope.studies.prompt.prompts import Prompts

        return Prompts(self.live)

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the cached result of `make` for a recent key, or compute it."""
        return self._recent.get(key, make)  # pyright: ignore[reportReturnType] - a key has one kind of value
