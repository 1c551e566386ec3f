"""The induction features of a subject by the post's rule and by the composite one, computed once for all sections."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from headscope.index.live import LiveIndex
from headscope.report.model_heads import model_heads
from headscope.report.records import Settings
from headscope.report.subject import Subject
from headscope.studies.induction.behaviour import Behaviour, BigramFinder, behaviour, control_group, selected
from headscope.studies.induction.composite import InductionFeatures, induction_features
from headscope.studies.support.active import Text

_FEW_PLACES, _PLACES, _CORRUPTED = 4, 12, 6


@dataclass(frozen=True)
class PostFamily:
    """Features with most of their decoder in the induction head, and those of them that behave like induction."""

    head: int
    """Head of the SAE's layer."""
    selected: Int[np.ndarray, " n"]
    behaviour: Behaviour
    """Behaviour of the selected features."""
    control: Behaviour
    """Behaviour of features with a small decoder share there, evenly sampled."""
    finder: BigramFinder

    @property
    def members(self) -> Int[np.ndarray, " m"]:
        """Features that pass, by the strictest token-level definition."""
        return self.selected[self.behaviour.passes()]

    @property
    def others(self) -> Int[np.ndarray, " m"]:
        """Selected features that do not pass: other functions of the head."""
        return self.selected[~self.behaviour.passes()]


def post_family(subject: Subject) -> PostFamily:
    """Select and test features as the post does.

    Raises:
        StudyError: the layer has no induction head.
    """
    head = model_heads(subject).induction
    return subject.once("post family", lambda: _post_family(subject.live, subject.settings, head))


def _post_family(live: LiveIndex, settings: Settings, head: int) -> PostFamily:
    index = live.index
    finder = BigramFinder(Text.of(index))
    chosen, others = selected(index, head), control_group(index, head, seed=settings.seed)
    own, control = (behaviour(index, of, seed=settings.seed, finder=finder) for of in (chosen, others))
    return PostFamily(head, chosen, own, control, finder)


def composite(subject: Subject) -> InductionFeatures:
    """Judge features by behaviour, sources, copying and corruption, without choosing a head; once for all sections."""
    return subject.once("composite", lambda: _composite(subject.live, subject.settings))


def _composite(live: LiveIndex, settings: Settings) -> InductionFeatures:
    places = _PLACES if settings.features is None else _FEW_PLACES
    return induction_features(live, n_places=places, n_corrupted=_CORRUPTED, seed=settings.seed)


def is_member(judged: InductionFeatures, n_latents: int) -> Bool[np.ndarray, " latent"]:
    """Return whether each latent is an induction feature by the composite rule."""
    found = np.zeros(n_latents, dtype=bool)
    found[judged.found] = True
    return found
