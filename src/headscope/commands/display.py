"""Output of commands: progress bars on a terminal, periodic lines in a log file, and printed tables."""

import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn
from rich.table import Column, Table
from rich.text import Text

from headscope.errors import OutputError
from headscope.sae.metrics import Status
from headscope.sae.quality_table import Row, quality_rows

_LINE_EVERY, _BAR_EVERY = 10.0, 0.1  # seconds
_NAME, _BAR = 12, 8  # minimum width of a stage's name and of its bar, in characters
_WIDEST_BAR = 40
_PERCENT, _TIME = 4, 9
_UNKNOWN = "-:--:--"
_BETWEEN = 2  # characters between table columns


class _Bars(Progress):
    """One line per stage, fitted to the terminal: its name, bar, percentage and remaining time always show.

    The count of completed work is omitted where it does not fit. Notes go below, on lines of their own.
    """

    _percent = TaskProgressColumn()

    def get_renderables(self) -> Iterator[RenderableType]:
        """Return the stage lines and the notes of the stages that have one."""
        tasks = self.tasks
        if not tasks:
            return
        counts = [_count(int(task.completed), int(task.total or 0)) for task in tasks]
        name, bar, count = self._widths([task.description for task in tasks], counts)
        widths = [name, bar, _PERCENT, _TIME, count] if count else [name, bar, _PERCENT, _TIME]
        lines = Table.grid(*(Column(width=width, no_wrap=True) for width in widths), padding=(0, 1), pad_edge=False)
        bars = BarColumn(bar_width=bar)
        for task, done in zip(tasks, counts, strict=True):
            said = Text(task.description, overflow="ellipsis", no_wrap=True)
            cells = [said, bars(task), self._percent(task), Text(task.fields["left"]), Text(done, justify="right")]
            lines.add_row(*cells[: len(widths)])
        yield lines
        for task in tasks:
            if task.fields["note"]:
                yield Padding(Text(task.fields["note"]), (0, 0, 0, 2))

    def _widths(self, names: Sequence[str], counts: Sequence[str]) -> tuple[int, int, int]:
        """Return the widths of a stage's name, its bar and its count of completed work; 0 where that does not fit."""
        room = self.console.width - _PERCENT - _TIME - 3  # a space between columns
        count = max(map(len, counts))
        if room - count - 1 >= _NAME + _BAR:
            room -= count + 1
        else:
            count = 0
        name = min(max(map(len, names)), max(_NAME, room // 2))
        return name, max(1, min(_WIDEST_BAR, room - name)), count


@dataclass
class _Stage:
    """State of a stage: its progress when it was first reported and when it was last displayed."""

    begun: float
    before: int
    done: int
    shown: float | None = None


class Display:
    """Progress on stderr, as bars on a terminal and as lines elsewhere; results on stdout."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        """Show nothing until work is reported, and nothing at all on processes other than rank 0.

        `clock` returns seconds.
        """
        self._clock = clock
        self._console = Console(file=sys.stdout, highlight=False, quiet=quiet)  # rich takes a given file's encoding
        errors = Console(file=sys.stderr, highlight=False, quiet=quiet)
        self._progress = _Bars(
            console=errors,
            disable=not errors.is_terminal,
            redirect_stdout=sys.stdout.isatty(),  # print lines above the bars, unless they go to a file
        )
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, _Stage] = {}
        self._latest: str | None = None

    def __enter__(self) -> "Display":
        """Start rendering."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop rendering and leave the bars as they are."""
        self._progress.stop()

    def on_progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report the progress of a stage; a total of 0 is unknown."""
        self._report(stage, done, total, lambda _rate: [note])

    def on_step(self, status: Status) -> None:
        """Show the status of a training step, with its rate and the remaining time."""
        self._on_step(status, [status_line(status)])

    def on_steps(self, statuses: Mapping[str, Status]) -> None:
        """Show the status of a step of several SAEs trained on one stream, one line each."""
        lines = [f"{name}  {status_line(status)}" for name, status in statuses.items()]
        self._on_step(next(iter(statuses.values())), lines)

    def _on_step(self, status: Status, lines: list[str]) -> None:
        def note(rate: float) -> list[str]:
            activations = rate * status.tokens / (status.step + 1)
            speed = f"{activations:,.0f} activations/s" if rate else ""
            return [f"{lines[0]}  {speed}"] if len(lines) == 1 else [speed, *lines]

        self._report("train", status.step + 1, status.n_steps, note)

    def _report(self, name: str, done: int, total: int, note: Callable[[float], list[str]]) -> None:
        """Show a stage if it is due; `note` receives the work done per second (0: unknown) and returns lines."""
        now, every = self._clock(), _LINE_EVERY if self._progress.disable else _BAR_EVERY
        stage, last = self._stages.get(name), 0 < total <= done
        ended = stage is not None and last and stage.done >= total
        if ended and name == self._latest:  # already reported
            return
        if stage is None or done < stage.done or ended:  # it starts, perhaps for a second time
            stage = self._stages[name] = _Stage(now, done, done)
        stage.done, self._latest = done, name
        if not last and stage.shown is not None and now - stage.shown < every:
            return
        stage.shown, seconds = now, now - stage.begun
        rate = (done - stage.before) / seconds if seconds > 0 else 0.0
        left = _duration(seconds) if last else _duration((total - done) / rate) if rate and total else _UNKNOWN
        show = self._print_line if self._progress.disable else self._move_bar
        show(name, done, total, left, note(rate))

    def _print_line(self, name: str, done: int, total: int, left: str, note: list[str]) -> None:
        parts = [f"{name} {_count(done, total)}"]
        if total:
            parts += [f"{done / total:.0%}", f"took {left}" if done >= total else f"ETA {left}"]
        lines = ["  ".join([*parts, note[0]]).rstrip(), *note[1:]]
        self._progress.console.print("\n".join(lines), soft_wrap=True, markup=False)

    def _move_bar(self, name: str, done: int, total: int, left: str, note: list[str]) -> None:
        said = {"completed": done, "total": total or None, "left": left, "note": "\n".join(filter(None, note))}
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, **said)
            return
        task = self._tasks[name]
        if done < self._progress.tasks[task].completed:
            self._progress.reset(task)
        self._progress.update(task, **said)

    @property
    def _out(self) -> Console:
        """Return the output for lines: the bars' console where both share a terminal, so that they do not mix."""
        both = self._console.is_terminal and not self._progress.disable
        return self._progress.console if both else self._console

    def say(self, line: str) -> None:
        """Print a line, wrapped between words on a terminal, unwrapped elsewhere."""
        if self._out.is_terminal:
            line = "\n".join(map(self._broken, line.split("\n")))
        self._print(Text(line), soft_wrap=True)

    def _broken(self, line: str) -> str:
        indent = " " * (len(line) - len(line.lstrip(" ")))
        options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
        return textwrap.fill(line, self._out.width, **options)

    def _print(self, what: Text | Table, *, soft_wrap: bool = False) -> None:
        """Print a renderable.

        Raises:
            OutputError: the output is a file on a full disk, or a closed pipe.
        """
        try:
            self._out.print(what, soft_wrap=soft_wrap)
        except OSError as error:
            raise OutputError(
                f"cannot print: {error.strerror or error}",
                expected="a terminal, a pipe, or a file on a disk with room",
                do="print elsewhere",
            ) from error

    def print_quality(self, quality: dict, split: str) -> None:
        """Print the table of an SAE's quality, next to the post's figures."""
        self.print_rows(f"quality on {split} text", quality_rows(quality))

    def print_rows(self, title: str, rows: Sequence[Row]) -> None:
        """Print figures next to the post's."""
        cells = [(row.name, row.value, row.post, row.definition) for row in rows]
        self.print_table(f"{title} [95 % interval]", ("figure", "this SAE", "post*", "definition"), cells)
        self.say("* Kissane et al. (2024): gelu-2l layer 1, d_sae 16,384, C4 and code; another model and corpus")

    def print_table(
        self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()
    ) -> None:
        """Print a table of cells; no word is broken.

        Where the longest words do not fit side by side, the columns `spare` are dropped, first one first;
        if that is not enough, each cell gets its own line.
        """
        columns = {name: [row[i] for row in rows] for i, name in enumerate(headings)}
        for name in spare:
            if self._widths_of(columns) is None:
                del columns[name]
        widths = self._widths_of(columns)
        if widths is None:
            self.say(title)
            for row in zip(*columns.values(), strict=True):
                self.say("\n".join(["", *(f"  {n + ':':<24}{cell}" for n, cell in zip(columns, row, strict=True))]))
            return
        table = Table(
            title=Text(title),
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for name, width in zip(columns, widths, strict=True):
            table.add_column(name, width=width)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(Text, row))
        self._print(table)

    def _widths_of(self, columns: Mapping[str, Sequence[str]]) -> list[int] | None:
        """Return the minimal column widths that break no word; None where they do not fit."""
        texts = [(name, *cells) for name, cells in columns.items()]
        widths = [max(map(_longest_word, own)) for own in texts]
        lacking = [max(map(len, own)) - width for own, width in zip(texts, widths, strict=True)]
        room = self._out.width - sum(widths) - _BETWEEN * (len(widths) - 1)
        if room < 0:
            return None
        for n_before, i in enumerate(sorted(range(len(widths)), key=lacking.__getitem__)):
            more = min(lacking[i], room // (len(widths) - n_before))
            widths[i] += more
            room -= more
        return widths


def status_line(status: Status) -> str:
    """Format the status of a training step as one line: `loss 31.2  L0 12.1  explained variance 71.3 %  dead 0.4 %`."""
    line = (
        f"loss {status.loss:.4g}  L0 {status.l0:.1f}  explained variance {status.explained_variance:.1%}  "
        f"dead {status.dead:.1%}"
    )
    return f"{line}  coefficient {status.coefficient:.3g}" if status.coefficient else line


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _count(done: int, total: int) -> str:
    return f"{done:,}/{total:,}" if total else f"{done:,}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
