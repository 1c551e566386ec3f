"""Metrics of a training run on its batches, in memory and as lines of JSON; no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headscope.artefact import atomic_write

_CURVE_POINTS, _METRIC_POINTS = 100, 2000
_WRITTEN_TOGETHER = 50  # points

Point = dict[str, Any]
"""One line of a metrics file: the values of a `Status` by name."""


@dataclass(frozen=True)
class Status:
    """State of a training run at one step; with several ranks, means over them."""

    step: int
    n_steps: int
    tokens: int
    """Activations trained on so far."""
    squared_error: float
    """Mean of ||x - x_hat||^2, in scaled units (the variance of the inputs is about d_in)."""
    l0: float
    explained_variance: float
    """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 on the batch."""
    dead: float
    """Share of latents that have not fired for `dead_after` activations."""
    coefficient: float
    """Coefficient of the penalty."""
    penalty: float
    auxiliary: float
    """Additional loss, with its coefficient."""
    lr: float

    @property
    def loss(self) -> float:
        """`squared_error + coefficient * penalty + auxiliary`: the objective without the errors of prefixes."""
        return self.squared_error + self.coefficient * self.penalty + self.auxiliary


class Metrics:
    """Metrics of a run on its batches, in memory and as lines of JSON."""

    def __init__(self, path: Path | None, n_steps: int) -> None:
        """Start metrics for a run of `n_steps` steps."""
        self.path, self._n_steps = path, n_steps
        self._every = max(1, n_steps // _METRIC_POINTS)
        self.points: list[Point] = []

    def go_on(self, step: int) -> None:
        """Restore the lines of the steps before `step`; later ones are recorded again."""
        if self.path is not None and self.path.is_file():
            self.points = [point for point in read_metrics(self.path) if point["step"] < step]

    def add(self, status: Status) -> None:
        """Record a step, if it is due."""
        if status.step % self._every == 0 or status.step == self._n_steps - 1:
            self.points.append({name: _short(value) for name, value in asdict(status).items() if name != "n_steps"})
            if len(self.points) % _WRITTEN_TOGETHER == 0:
                self.flush()

    def flush(self) -> None:
        """Write all lines."""
        if self.path is not None:
            with atomic_write(self.path) as file:
                file.write("".join(json.dumps(point) + "\n" for point in self.points).encode())

    def curve(self) -> list[Point]:
        """Return at most about a hundred points, including the last."""
        every = max(1, len(self.points) // _CURVE_POINTS)
        last = len(self.points) - 1
        return [point for i, point in enumerate(self.points) if i % every == 0 or i == last]


def read_metrics(path: Path) -> list[Point]:
    """Read the complete lines of a metrics file.

    Raises:
        OSError: it cannot be read.
    """
    points = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            points.append(json.loads(line))
        except ValueError:
            break
    return points


def _short(value: int | float) -> int | float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
