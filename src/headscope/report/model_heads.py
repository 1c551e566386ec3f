"""Identify induction and previous-token heads of the model, by comparison with shuffled weights."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import StudyError
from headscope.models.hf import Model
from headscope.report.subject import Subject
from headscope.studies.heads.scores import HeadScores, ScoreName, head_scores

N_SHUFFLED = 4
"""Number of models with shuffled weights."""
LEAST = 0.1
"""Minimum score of a head with such a role, regardless of chance."""
_COPY = 100  # tokens in each of the two copies, where the context is long enough


@dataclass(frozen=True)
class ModelHeads:
    """Scores of all heads, and the largest ones in models with shuffled weights."""

    scores: HeadScores
    layer: int
    """Layer of the SAE."""
    chance: dict[ScoreName, tuple[float, ...]]
    """For each model with shuffled weights, the largest score of any of its heads."""

    def holds(self, name: ScoreName) -> Float[Tensor, "layer head"]:
        """Return the scores of the heads that have this role, 0 for the others.

        A head has it when its score is at least 0.1 and above that of every head of every model with shuffled weights:
        by chance, the largest score of all is the true model's in one of `N_SHUFFLED + 1` cases, and fewer reach 0.1.
        """
        found: Tensor = getattr(self.scores, name)
        return torch.where((found >= LEAST) & (found > max(self.chance[name])), found, 0)

    @property
    def induction(self) -> int:
        """Return the induction head of the SAE's layer.

        Raises:
            StudyError: it has none.
        """
        held = self.holds("induction")[self.layer]
        if not held.any():
            best = float(self.scores.induction[self.layer].max())
            raise StudyError(
                f"layer {self.layer} has no induction head: the best score is {best:.3g}, and that of heads of models "
                f"with shuffled weights up to {max(self.chance['induction']):.3g}",
                expected=f"a score of at least {LEAST} above these",
                do="take an SAE of a layer with one",
            )
        return int(held.argmax())

    @property
    def previous_token(self) -> tuple[int, int]:
        """Return layer and head of the best previous-token head before the SAE's layer.

        Raises:
            StudyError: there is none, or no layer before it.
        """
        held = self.holds("previous_token")[: self.layer]
        if not held.any():
            raise StudyError(
                f"no previous-token head before layer {self.layer}",
                expected=f"a score of at least {LEAST} and above those of models with shuffled weights",
                do="take an SAE of a later layer",
            )
        layer, head = divmod(int(held.argmax()), held.shape[1])
        return layer, head


def shuffled_weights(model: Model, seed: int) -> Model:
    """Return the model with the entries of each weight permuted: equal in size, but meaningless."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(module.parameters()):  # tied weights once
        flat = parameter.data.reshape(-1)
        order = torch.randperm(len(flat), generator=generator).to(flat.device)
        parameter.data = flat[order].view_as(parameter)
    return Model(module, model.tokenizer, model.bos, f"{model.spec.name}, shuffled")


def model_heads(subject: Subject) -> ModelHeads:
    """Score the heads of the subject's model; done once for all sections.

    Raises:
        StudyError: the context is too short for two copies of two tokens.
    """
    settings = subject.settings
    n_sequences = min(64, settings.sequences)
    return subject.once(
        "model heads", lambda: _scored(subject.model, subject.sae.site.layer, n_sequences, settings.seed)
    )


def _scored(model: Model, layer: int, n_sequences: int, seed: int) -> ModelHeads:
    n = min(_COPY, (model.spec.context - 1) // 2)
    if n < 2:
        raise StudyError(f"a context of {model.spec.context}", expected="at least 5 positions", do="take another model")
    scores = head_scores(model, n=n, n_sequences=n_sequences, seed=seed)
    names: tuple[ScoreName, ...] = ("previous_token", "induction", "duplicate_token")
    chance: dict[ScoreName, list[float]] = {name: [] for name in names}
    for number in range(N_SHUFFLED):
        found = head_scores(shuffled_weights(model, seed + number), n=n, n_sequences=min(16, n_sequences), seed=seed)
        for name in names:
            chance[name].append(float(getattr(found, name).max()))
    return ModelHeads(scores, layer, {name: tuple(values) for name, values in chance.items()})
