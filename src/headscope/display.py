"""What commands show: bars in a terminal, a line now and then in a file, and printed tables."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from headscope.sae.metrics import Status
from headscope.sae.quality_table import Row, quality_rows

_LINE_EVERY, _BAR_EVERY = 10.0, 0.1  # seconds


class Display:
    """Progress on stderr, as bars where that is a terminal and as lines elsewhere; what was found on stdout."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        """Nothing is shown until work is reported, and nothing at all where another process shows it.

        `clock` gives seconds.
        """
        self._console, self._clock = Console(highlight=False, quiet=quiet), clock
        errors = Console(stderr=True, highlight=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=errors,
            disable=not errors.is_terminal,
            redirect_stdout=sys.stdout.isatty(),  # lines go above the bars, but where they are kept in a file
        )
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, float] = {}
        """When a stage was last shown."""
        self._begun: tuple[float, int] | None = None
        """When training began here, and how many activations came before."""

    def __enter__(self) -> "Display":
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they are."""
        self._progress.stop()

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of a stage; a total of 0 is one that is not known."""
        if self._is_due(stage, last=0 < total <= done):
            self._show(stage, done, total, note)

    def on_step(self, status: Status) -> None:
        """Show the status of a training step, with the rate and the time that is left."""
        self._on_step("train", status, [status_line(status)])

    def on_steps(self, statuses: Mapping[str, Status]) -> None:
        """Show the status of a step of several SAEs on one stream, a line each."""
        lines = [f"{name}  {status_line(status)}" for name, status in statuses.items()]
        self._on_step("train", next(iter(statuses.values())), lines)

    def _on_step(self, stage: str, status: Status, lines: list[str]) -> None:
        now = self._clock()
        if self._begun is None:
            self._begun = now, status.tokens
        if self._is_due(stage, last=status.step == status.n_steps - 1):
            rate = timing(status, now - self._begun[0], status.tokens - self._begun[1])
            note = "  ".join([*lines, rate]) if len(lines) == 1 else "\n".join([rate, *lines])
            self._show(stage, status.step + 1, status.n_steps, note)

    def _is_due(self, stage: str, *, last: bool) -> bool:
        now, every = self._clock(), _LINE_EVERY if self._progress.disable else _BAR_EVERY
        due = last or now - self._shown.get(stage, -every) >= every
        if due:
            self._shown[stage] = now
        return due

    def _show(self, stage: str, done: int, total: int, note: str) -> None:
        if self._progress.disable:
            line = f"{stage} {done:,}{f'/{total:,}' if total else ''}  {note}".rstrip()
            self._progress.console.print(line, soft_wrap=True, markup=False)
        elif stage in self._tasks:
            self._progress.update(self._tasks[stage], completed=done, total=total or None, note=note)
        else:  # what was done before is no measure of how fast it goes
            self._tasks[stage] = self._progress.add_task(stage, completed=done, total=total or None, note=note)

    @property
    def _out(self) -> Console:
        """Where lines go: by way of the bars' console where both are on one terminal, so that they stay apart."""
        both = self._console.is_terminal and not self._progress.disable
        return self._progress.console if both else self._console

    def say(self, line: str) -> None:
        """Print a line."""
        self._out.print(line, soft_wrap=True, markup=False)

    def print_quality(self, quality: dict, split: str) -> None:
        """Print the table of an SAE's quality, beside the post's figures."""
        self.print_rows(f"quality on {split} text", quality_rows(quality))

    def print_rows(self, title: str, rows: Sequence[Row]) -> None:
        """Print figures beside the post's."""
        cells = [(row.name, row.value, row.post, row.definition) for row in rows]
        self.print_table(f"{title} [95 % interval]", ("figure", "this SAE", "post*", "definition"), cells)
        self.say("* Kissane et al. (2024): gelu-2l layer 1, d_sae 16,384, C4 and code; another model and corpus")

    def print_table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print cells under their headings."""
        table = Table(title=Text(title), title_justify="left")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._out.print(table)


def status_line(status: Status) -> str:
    """The status of a training step in one line: `loss 31.2  L0 12.1  explained variance 71.3 %  dead 0.4 %`."""
    line = (
        f"loss {status.loss:.4g}  L0 {status.l0:.1f}  explained variance {status.explained_variance:.1%}  "
        f"dead {status.dead:.1%}"
    )
    return f"{line}  coefficient {status.coefficient:.3g}" if status.coefficient else line


def timing(status: Status, seconds: float, n: int) -> str:
    """Activations trained on a second, and the time left at that rate: `12,300 activations/s  ETA 0:12:31`.

    Args:
        status: of the last step.
        seconds: since the first step.
        n: activations that came after it.
    """
    if seconds <= 0 or n <= 0:
        return "ETA -:--:--"
    per_second, left = n / seconds, (status.n_steps - status.step - 1) * status.tokens / (status.step + 1)
    minutes, second = divmod(round(left / per_second), 60)
    return f"{per_second:,.0f} activations/s  ETA {minutes // 60}:{minutes % 60:02}:{second:02}"
