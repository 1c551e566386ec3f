"""Find the training runs in folders: finished SAEs and unfinished runs; no torch."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headscope.artefact import cannot_write, read_json
from headscope.errors import OutputError, TrainingError
from headscope.sae.metrics import Point, read_metrics
from headscope.scratch import held

METRICS = "metrics"
"""Name of a run of one SAE, and of its metrics file."""
TRAINING = ".training"
"""Suffix that the folder of an unfinished run adds to the name of its SAE."""

RUN = "run.json"
"""File in the folder of an unfinished run: what is trained, and on what."""
LOCK = ".lock"
"""File in the same folder: locked by the training process."""

State = Literal["finished", "interrupted", "unfinished"]


@dataclass(frozen=True)
class Run:
    """One SAE that was or is being trained."""

    name: str
    """Its folder; in an unfinished sweep, including its future name there."""
    state: State
    """`interrupted`: the SAE was written when its training was ended early; `unfinished`: there is no SAE yet."""
    variant: str
    target_l0: float | None
    """None where the coefficient was fixed."""
    n_steps: int
    points: tuple[Point, ...]
    """Metrics, in the order of steps."""

    @property
    def last(self) -> Point:
        """The last point; empty where nothing was measured yet."""
        return self.points[-1] if self.points else {}

    @property
    def step(self) -> int:
        """Number of steps up to the last point."""
        return self.last.get("step", -1) + 1

    def cells(self) -> list[str]:
        """Return a row under `HEADINGS`."""
        last = self.last
        state = self.state if self.state == "finished" else f"{self.state} at step {self.step:,} of {self.n_steps:,}"
        return [
            self.name,
            self.variant,
            "" if self.target_l0 is None else f"{self.target_l0:g}",
            _shown(last, "l0", "{:.1f}"),
            _shown(last, "explained_variance", "{:.1%}"),
            _shown(last, "dead", "{:.1%}"),
            _shown(last, "tokens", "{:,}"),
            state,
        ]


@contextmanager
def training_folder(out: Path) -> Iterator[Path]:
    """Lock the checkpoint folder of a training, next to `out`; of several ranks, the first holds the lock.

    Raises:
        OutputError: another process trains there, or the folder cannot be made.
    """
    folder = out.with_name(f"{out.name}{TRAINING}")
    if int(os.environ.get("RANK", "0")):
        yield folder
        return
    busy = OutputError(
        f"another process is training into {out}",
        expected="one training into a folder at a time",
        do="wait for it to end, or choose another --out",
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / LOCK, busy))
        except OSError as error:
            raise cannot_write(folder, error) from error
        yield folder


def read_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe that the training in a checkpoint folder was started with.

    Raises:
        TrainingError: it cannot be read.
    """
    file = folder / RUN
    try:
        held = read_json(file)
        if isinstance(held, dict) and held["names"] and all(isinstance(name, str) for name in held["names"]):
            return held
        damage = "it names no SAEs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        damage = f"{type(error).__name__} {error}"
    raise TrainingError(
        f"{file} is damaged: {damage}",
        expected="what `headscope train` or `headscope sweep` wrote there",
        do="pass --overwrite to start again",
    )


HEADINGS = ("run", "variant", "target L0", "L0", "explained variance", "dead", "activations", "state")
"""Headings of a table of runs; figures are those of the last measured batch."""


def _shown(point: Point, name: str, form: str) -> str:
    return form.format(point[name]) if name in point else ""


def find_runs(folders: Sequence[Path] = (Path(),)) -> tuple[Run, ...]:
    """Find all runs in some folders, by name; a folder that is itself a run is included.

    Of an SAE that was written early and whose training was resumed, the one that is further on is listed. Unreadable
    folders are skipped.
    """
    found: dict[str, Run] = {}
    for folder in folders:
        for path in _below(Path(folder)):
            for run in _runs_of(path):
                held = found.get(run.name)
                if held is None or run.step > held.step or (run.step == held.step and held.state == "unfinished"):
                    found[run.name] = run
    return tuple(found[name] for name in sorted(found))


def _below(folder: Path) -> Iterator[Path]:
    """Yield a folder and its subfolders, except hidden ones."""
    for path, children, _ in os.walk(folder):
        children[:] = sorted(child for child in children if not child.startswith("."))
        yield Path(path)


def _runs_of(path: Path) -> list[Run]:
    try:
        if (path / f"{METRICS}.jsonl").is_file() and (path / "cfg.json").is_file():
            return [_of_sae(path)]
        if path.name.endswith(TRAINING) and (path / RUN).is_file():
            return _of_training(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TrainingError):
        return []
    return []


def _of_sae(folder: Path) -> Run:
    training = read_json(folder / "cfg.json")["metadata"]["training"]
    state: State = "interrupted" if training["interrupted"] else "finished"
    return _run(str(folder), state, training["config"], folder / f"{METRICS}.jsonl")


def _of_training(folder: Path) -> list[Run]:
    """Return one run for each SAE trained in a training folder."""
    recipe, out = read_recipe(folder), folder.with_name(folder.name.removesuffix(TRAINING))
    runs = []
    for name in recipe["names"]:
        start = f"{name} "
        config = {key.removeprefix(start): value for key, value in recipe.items() if key.startswith(start)}
        runs.append(_run(str(out if name == METRICS else out / name), "unfinished", config, folder / f"{name}.jsonl"))
    return runs


def _run(name: str, state: State, config: dict[str, Any], metrics: Path) -> Run:
    given = config.get("coefficient") is not None and config["variant"] not in ("topk", "batchtopk")
    points = tuple(read_metrics(metrics)) if metrics.is_file() else ()
    n_steps = -(-config["tokens"] // config["batch"])
    return Run(name, state, config["variant"], None if given else config["target_l0"], n_steps, points)
