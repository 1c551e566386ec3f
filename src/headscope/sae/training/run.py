"""Train an SAE on the activations of a site over a corpus."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from headscope.corpus import Corpus
from headscope.errors import OutputError, TrainingError
from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Metrics, Point, Status
from headscope.sae.model import SAE
from headscope.sae.runs import METRICS
from headscope.sae.training.checkpoint import Checkpoints
from headscope.sae.training.needs import check_epochs, check_memory
from headscope.sae.training.ranks import Ranks
from headscope.sae.training.source import Source
from headscope.sae.training.stream import ActivationStream
from headscope.sae.training.trainer import Trainer
from headscope.site import Site

Progress = Callable[[str, int, int], None]
"""Progress callback: called with the stage, the work done and the total."""

_SAMPLE = 65_536
"""Minimum number of activations for the scale and the initial dictionary."""
_RESAMPLE_BATCHES = 100
"""Batches of inputs for resampling dead latents (Kissane et al. 2024)."""


@dataclass(frozen=True)
class TrainResult:
    """A trained SAE with statistics of its training."""

    sae: SAE
    curve: list[Point] = field(default_factory=list)
    epochs: float = 0.0
    """Activations trained on, over activations in the corpus."""
    interrupted: bool = False


def train_sae(
    model: Model,
    corpus: Corpus,
    site: Site,
    config: TrainConfig,
    on_step: Callable[[Status], None] | None = None,
    *,
    folder: Path | None = None,
    checkpoint_every: int = 2000,
    on_progress: Progress | None = None,
) -> TrainResult:
    """Train an SAE on the activations of a site over a corpus; in a process group, together with the other ranks.

    Ctrl-C or SIGTERM ends the training early; the SAE so far is returned, marked as interrupted. Before the first
    step there is nothing to return, and KeyboardInterrupt is raised.

    Args:
        model: the model to read.
        corpus: its training documents.
        site: site to read.
        config: the recipe.
        on_step: called with the status of every step.
        folder: folder of checkpoints and metrics; an interrupted run there resumes, bit for bit.
        checkpoint_every: steps between checkpoints.
        on_progress: called as activations are read outside of steps: for the initial dictionary, for the buffer, and
            for resampling dead latents.

    Raises:
        CorpusError, ModelError: the corpus or the site does not fit the model.
        TrainingError: too few activations, or values that are not finite; the folder holds another run.
        OutputError: a checkpoint cannot be written.
    """

    def on_steps(statuses: Mapping[str, Status]) -> None:
        if on_step is not None:
            on_step(statuses[METRICS])

    arguments = {"folder": folder, "checkpoint_every": checkpoint_every, "on_progress": on_progress}
    return train_saes(model, corpus, site, {METRICS: config}, on_steps, **arguments)[METRICS]


def train_saes(
    model: Model,
    corpus: Corpus,
    site: Site,
    configs: Mapping[str, TrainConfig],
    on_steps: Callable[[Mapping[str, Status]], None] | None = None,
    *,
    folder: Path | None = None,
    checkpoint_every: int = 2000,
    on_progress: Progress | None = None,
) -> dict[str, TrainResult]:
    """Train several SAEs on one stream of activations; each result is the same as if trained alone.

    As `train_sae`, for recipes by name.

    Raises:
        TrainingError: also where the recipes differ in what determines the stream.
    """
    model.check_layer(site.layer)
    _check_one_stream(configs)
    ranks = Ranks.joined()
    config = next(iter(configs.values()))
    n_available = Source(model, corpus, site, config.exclude_bos).n_available
    check_memory(configs.values(), model.width(site), model.device, n_available // ranks.size)
    check_epochs(config, n_available)
    stream = ActivationStream(model, corpus, site, config, rank=ranks.rank, ranks=ranks.size)
    with closing(stream):
        run = _Run(model, corpus, site, configs, stream, folder, on_progress or (lambda _stage, _done, _total: None))
        interrupted = False
        with _asked_to_stop() as asked:
            try:
                run.to_the_end(on_steps, checkpoint_every, asked)
            except KeyboardInterrupt:
                if run.step_number == 0:
                    raise
                interrupted = True
                run.save()
        results = {}
        for name, trainer in run.trainers.items():
            epochs = trainer.step_number * config.batch / stream.n_available
            sae = trainer.finish(site, model.spec.name)
            results[name] = TrainResult(sae, run.metrics[name].curve(), epochs, interrupted)
            sae.metadata.update(_provenance(model, corpus, configs[name], results[name]))
    return results


_OF_STREAM = ("tokens", "batch", "buffer", "exclude_bos", "seed", "cache")


def _check_one_stream(configs: Mapping[str, TrainConfig]) -> None:
    for name in _OF_STREAM:
        values = {getattr(config, name) for config in configs.values()}
        if len(values) > 1:
            raise TrainingError(
                f"recipes with {name} {', '.join(map(str, sorted(values, key=str)))}",
                expected="the same for all, since they are trained on one stream",
                do="train them in several sweeps",
            )


class _Run:
    """A training run and its state."""

    def __init__(
        self,
        model: Model,
        corpus: Corpus,
        site: Site,
        configs: Mapping[str, TrainConfig],
        stream: ActivationStream,
        folder: Path | None,
        report: Progress,
    ) -> None:
        ranks = Ranks.joined()
        self.configs, self.stream, self.ranks, self.report = configs, stream, ranks, report
        self.config = next(iter(configs.values()))
        self.checkpoints = None if folder is None else Checkpoints(folder, ranks)
        if self.checkpoints is not None:
            self.checkpoints.claim(_recipe(model, corpus, site, configs))
        z, samples = site.kind == "z", self._sample(max(_SAMPLE, *(c.d_sae for c in configs.values())))
        self.trainers = {
            name: Trainer(
                samples,
                config,
                W_O=model.output_directions(site.layer) if z else None,
                d_head=model.spec.d_head if z else None,
                ranks=ranks,
            )
            for name, config in configs.items()
        }
        saved = None if self.checkpoints is None else self.checkpoints.load(list(configs))
        if saved is not None:
            self._restore(*saved)
        self.saved_at = self.step_number
        self.between_steps = True
        """Whether no step is in progress, as where a second Ctrl-C ends one."""
        self.metrics = {
            name: Metrics(None if folder is None or ranks.rank else folder / f"{name}.jsonl", config.n_steps)
            for name, config in configs.items()
        }
        for metrics in self.metrics.values():
            metrics.go_on(self.step_number)

    def _restore(self, trainers: Mapping[str, dict[str, Any]], stream: dict[str, Any]) -> None:
        """Resume from a checkpoint.

        Raises:
            TrainingError: it is of another training.
        """
        try:
            for name, trainer in self.trainers.items():
                trainer.restore(trainers[name])
            self.stream.restore(stream)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(
                f"a checkpoint that does not fit this training ({error!r})",
                expected="what the same command wrote",
                do="pass --overwrite to start again",
            ) from error

    @property
    def step_number(self) -> int:
        """Steps that all trainers have taken."""
        return min(trainer.step_number for trainer in self.trainers.values())

    def to_the_end(
        self,
        on_steps: Callable[[Mapping[str, Status]], None] | None,
        checkpoint_every: int,
        asked: Callable[[], bool],
    ) -> None:
        """Take all remaining steps, unless asked to stop."""
        self.stream.fill(partial(self._on_fill, asked))
        n_steps, batches = self.config.n_steps, iter(self.stream)
        while self.step_number < n_steps:
            self.between_steps = False
            statuses = self._step(next(batches))
            for name, status in statuses.items():
                self.metrics[name].add(status)
            self.between_steps = True
            if self.step_number % checkpoint_every == 0 and self.step_number < n_steps:
                self.save()
            if on_steps is not None:
                on_steps(statuses)
            if sum(self.ranks.mean(asked())) > 0:
                raise KeyboardInterrupt
        for metrics in self.metrics.values():
            metrics.flush()

    def _step(self, x: Tensor) -> dict[str, Status]:
        statuses = {}
        for name, trainer in self.trainers.items():
            statuses[name] = self._step_of(name, trainer, x)
            if trainer.step_number in trainer.config.resampled_at and trainer.replaceable.any():
                trainer.resample(self._sample(_RESAMPLE_BATCHES * self.config.batch))
        return statuses

    def _sample(self, n: int) -> Tensor:
        return self.stream.sample(n, partial(self.report, "read a sample"))

    def _on_fill(self, asked: Callable[[], bool], done: int, total: int) -> None:
        """Report how far the buffer is filled, and stop if asked to; several ranks stop after a step."""
        self.report("fill the buffer", done, total)
        if self.ranks.size == 1 and asked():
            raise KeyboardInterrupt

    def _step_of(self, name: str, trainer: Trainer, x: Tensor) -> Status:
        try:
            return trainer.step(x)
        except TrainingError as error:
            if self.checkpoints is None:
                raise
            try:
                where = f"{self.checkpoints.keep(f'bad-batch-{name}', {'x': x} | trainer.p)} holds the batch"
            except OutputError as unwritten:
                where = f"the batch could not be kept for a look: {unwritten.got}"
            raise TrainingError(error.got, expected=error.expected, do=f"{error.do}; {where}") from error

    def save(self) -> None:
        """Write a checkpoint of the current state, unless there is one or a step was interrupted midway."""
        if self.checkpoints is not None and self.between_steps and self.step_number > self.saved_at:
            for metrics in self.metrics.values():
                metrics.flush()
            states = {name: trainer.state() for name, trainer in self.trainers.items()}
            self.checkpoints.save(self.step_number, states, self.stream.state())
            self.saved_at = self.step_number


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C, and SIGTERM, which clusters send before they kill, wait until a step is complete and saved.

    A second Ctrl-C does not wait. A second SIGTERM, as sent by torchrun and others, has no further effect.
    """
    asked = False

    def ask(number: int, _frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: known for number, known in before.items() if known not in (None, signal.SIG_IGN)}
    for number in ours:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, known in ours.items():
            signal.signal(number, known)


def _recipe(model: Model, corpus: Corpus, site: Site, configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """Return the recipe and inputs that a resumable run must have been started with."""
    recipes = {
        f"{name} {option}": value
        for name, config in configs.items()
        for option, value in config.as_dict().items()
        if option != "cache"
    }
    return {
        "model": model.fingerprint(),
        "corpus": corpus.fingerprint(),
        "site": site.hook_name,
        "names": list(configs),
        **recipes,
    }


def _provenance(model: Model, corpus: Corpus, config: TrainConfig, result: TrainResult) -> dict[str, Any]:
    """Return the provenance that every artefact records."""
    return {
        "z_convention": "raw",
        "model_hash": model.fingerprint(),
        "dtype": str(model.module.dtype).removeprefix("torch."),
        "n_heads": model.spec.n_heads,
        "d_head": model.spec.d_head,
        "context_size": corpus.block_size,
        "prepend_bos": bool((corpus.blocks[:, 0] == corpus.bos).all()),
        "exclude_special_tokens": config.exclude_bos,
        "corpus": corpus.provenance(),
        "training": {
            "config": config.as_dict(),
            "epochs": round(result.epochs, 3),
            "interrupted": result.interrupted,
            "curve": result.curve,
        },
    }
