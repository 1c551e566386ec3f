"""What is shown of a training: the figures of its status, at a pace that suits where they go."""

import io
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headscope.commands import display
from headscope.commands.display import Display, status_line
from headscope.errors import OutputError
from headscope.sae.metrics import Status


def status(step: int, **changes: float) -> Status:
    values = {
        "squared_error": 30.0,
        "l0": 12.25,
        "explained_variance": 0.713,
        "dead": 0.004,
        "coefficient": 0.5,
        "penalty": 4.0,
        "auxiliary": 1.0,
        "lr": 1e-3,
    }
    return Status(step=step, n_steps=101, tokens=100 * (step + 1), **{**values, **changes})


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_line_states_loss_l0_explained_variance_dead_and_coefficient() -> None:
    assert status(0).loss == 30 + 0.5 * 4 + 1
    assert status_line(status(0)) == "loss 33  L0 12.2  explained variance 71.3%  dead 0.4%  coefficient 0.5"
    assert "coefficient" not in status_line(status(0, coefficient=0.0)), "batchtopk and topk have none"


def test_without_a_terminal_a_line_is_printed_every_ten_seconds_and_at_the_end(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        for step in range(101):
            shown.on_step(status(step))
            clock.now += 1.0
    got = capsys.readouterr()
    lines = got.err.splitlines()
    steps = [int(n) for n in re.findall(r"^train (\d+)/101  ", got.err, re.MULTILINE)]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 101]
    assert lines[0].startswith("train 1/101  1%  ETA -:--:--  loss 33")
    # 50 steps of 100 activations in 50 seconds, and 50 steps are left
    assert re.fullmatch(r"train 51/101  50%  ETA 0:00:50  loss 33 .*  100 activations/s", lines[5])
    assert lines[-1].startswith("train 101/101  100%  took 0:01:40  loss 33")
    assert got.out == ""


def test_a_run_that_goes_on_counts_from_where_it_does(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        shown.on_step(status(50))
        clock.now = 20.0
        shown.on_step(status(90))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train 91/101  90%  ETA 0:00:05  loss")
    assert last.endswith("200 activations/s")


def test_several_saes_have_a_line_each(capsys) -> None:
    with Display(Clock()) as shown:
        shown.on_steps({"relu-l0-4": status(0), "topk-l0-8": status(0, l0=8.0)})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train 1/101")
    assert [line.split()[0] for line in lines[1:]] == ["relu-l0-4", "topk-l0-8"]
    assert "L0 8.0" in lines[2]


def test_other_work_is_shown_too(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        for done in (1, 2, 1000):
            shown.on_progress("evaluate", done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate 1/1,000  0%  ETA -:--:--",
        "evaluate 1,000/1,000  100%  took 0:00:00",
    ]


def test_a_stage_that_begins_once_more_is_timed_anew(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        for seconds, done in ((0.0, 0), (100.0, 10), (1000.0, 0), (1010.0, 5)):
            clock.now = seconds
            shown.on_progress("sample", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "sample 0/10  0%  ETA -:--:--",
        "sample 10/10  100%  took 0:01:40",
        "sample 0/10  0%  ETA -:--:--",
        "sample 5/10  50%  ETA 0:00:10",
    ]


def test_a_stage_told_of_at_its_end_alone_is_timed_anew_after_another_one(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        for now, name in ((0.0, "vocabulary"), (50.0, "sources"), (90.0, "vocabulary")):
            clock.now = now
            shown.on_progress(name, 4096, 4096)
    assert capsys.readouterr().err.count("vocabulary 4,096/4,096  100%  took 0:00:00") == 2


def test_of_work_of_unknown_size_what_is_done_is_said(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        for done in range(25):
            shown.on_progress("tokenise", done * 1000, 0)
            clock.now += 1.0
    assert capsys.readouterr().err.splitlines() == ["tokenise 0", "tokenise 10,000", "tokenise 20,000"]


def drawn(monkeypatch: pytest.MonkeyPatch, width: int, show: Callable[[Display, Clock], None]) -> list[str]:
    """Lines that a terminal of a width got."""
    screen, clock = io.StringIO(), Clock()
    terminal = Console(file=screen, force_terminal=True, width=width, highlight=False)
    monkeypatch.setattr(display, "Console", lambda **_: terminal)
    with Display(clock) as shown:
        show(shown, clock)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()


def test_in_a_terminal_a_bar_holds_the_same_figures_and_lines_go_the_same_way(monkeypatch) -> None:
    def show(shown: Display, clock: Clock) -> None:
        shown.on_step(status(0))
        clock.now = 50.0
        shown.say("a line")
        shown.on_step(status(50))

    text = "\n".join(drawn(monkeypatch, 200, show))
    for words in ("51/101", "50%", "0:00:50", "loss 33", "dead 0.4%", "100 activations/s", "a line"):
        assert words in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_bar_keeps_its_name_percent_and_time_left_however_narrow(monkeypatch, width: int) -> None:
    def show(shown: Display, clock: Clock) -> None:
        for now, done in ((0.0, 0), (10.0, 1_234_567)):
            clock.now = now
            shown.on_progress("a model: loss recovered under ablation", done, 12_345_678)
            shown.on_step(status(int(now)))

    lines = drawn(monkeypatch, width, show)
    assert max(map(len, lines)) <= width
    other, train = [line for line in lines if "%" in line and ("a model:" in line or line.startswith("train"))][-2:]
    assert re.match(r"a model: \S.* [━╸╺]{8,40}  10%  ?0:01:3\d", other)
    assert re.match(r"train +[━╸╺]{8,40}  11%  ?0:01:3\d", train)
    assert ("1,234,567/12,345,678" in other) == (width >= 60)
    note = " ".join(" ".join(lines).split())
    assert "explained variance 71.3% dead 0.4% coefficient 0.5 100 activations/s" in note.replace("  ", " ")


def test_a_bar_that_begins_once_more_is_not_shown_as_finished(monkeypatch) -> None:
    def show(shown: Display, clock: Clock) -> None:
        for now, done in ((0.0, 0), (10.0, 10), (20.0, 0), (30.0, 5)):
            clock.now = now
            shown.on_progress("sample", done, 10)

    assert re.match(r"sample [━╸╺]+  50%  ?0:00:\d\d +5/10", drawn(monkeypatch, 80, show)[-1])


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_stream_that_is_not_utf8_gets_boxes_and_bars_of_its_own_characters(monkeypatch, encoding: str) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    err.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with Display() as shown:
        shown.on_progress("read", 5, 10)
    Display().print_table("figures", ("figure", "value"), [["L0", "12.5"]])
    for stream, mark in ((out, "─"), (err, "━")):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert (mark in text) == (encoding == "utf-8")
        assert "?" not in text.replace("[?", "")


def test_output_that_cannot_be_written_is_said_so(monkeypatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="No space left on device"):
            Display().say("figures")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


@pytest.mark.parametrize("n", [0, 1])
def test_a_table_holds_its_cells(capsys, n) -> None:
    Display().print_table("runs", ("a", "b"), [["[red]x", "y"]] * n)
    out = capsys.readouterr().out
    assert "runs" in out
    assert ("[red]x" in out) == bool(n), "names are no markup"


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *table: Any) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    Display().print_table(*table)
    return capsys.readouterr().out


def test_no_word_of_a_table_is_broken(capsys, monkeypatch) -> None:
    headings = ("run", "variant", "activations", "explained variance", "state")
    cells = ["a/folder/of/a/run-l0-8", "batchtopk", "1,000,000", "32.5%", "interrupted at step 1,000 of 2,000"]
    words = {word for cell in (*headings, *cells) for word in cell.split()}
    out = printed(capsys, monkeypatch, "runs", headings, [cells])
    assert words <= set(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_a_table_without_room_leaves_out_spare_columns_and_then_gives_each_cell_a_line(capsys, monkeypatch) -> None:
    headings, cells = ("run", "spare", "kept"), ["r" * 60, "s" * 12, "k" * 16]
    out = printed(capsys, monkeypatch, "runs", headings, [cells], ["spare"])
    assert "spare" not in out
    assert any(line.split() == [cells[0], cells[2]] for line in out.splitlines())
    out = printed(capsys, monkeypatch, "runs", headings, [cells])
    assert [line.split() for line in out.splitlines() if line.startswith("  ")] == [
        [f"{heading}:", cell] for heading, cell in zip(headings, cells, strict=True)
    ]


def test_a_line_is_broken_between_words_on_a_terminal_alone(monkeypatch) -> None:
    line = "word " * 30 + "/a/path/that/is/longer/than/the/terminal/is/wide"
    for is_terminal in (True, False):
        out = io.StringIO()
        out.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("COLUMNS", "40")
        Display().say(line)
        assert out.getvalue().split() == line.split()
        assert (out.getvalue().count("\n") > 1) == is_terminal


def test_the_end_of_a_stage_is_said_once(capsys) -> None:
    shown = Display()
    for done, total in ((5, 10), (10, 10), (10, 10)):
        shown.on_progress("read", done, total)
    shown.on_progress("write", 1, 1)
    shown.on_progress("read", 10, 10)
    said = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["read 5/10", "read 10/10", "write 1/1", "read 10/10"]
