"""What is shown of a training: the figures of its status, at a pace that suits where they go."""

import io
import re

import pytest
from rich.console import Console

from headscope import display
from headscope.display import Display, status_line, timing
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


def test_the_rate_and_the_time_left_are_of_what_was_done_since_the_first_step() -> None:
    # 100 activations a step; 5,000 in 100 seconds: 50 a second, and 50 steps of 100 are left
    assert timing(status(50), seconds=100.0, n=5000) == "50 activations/s  ETA 0:01:40"
    assert timing(status(0), seconds=0.0, n=0) == "ETA -:--:--"


def test_without_a_terminal_a_line_is_printed_every_ten_seconds_and_at_the_end(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        for step in range(101):
            shown.on_step(status(step))
            clock.now += 1.0
    got = capsys.readouterr()
    steps = [int(n) for n in re.findall(r"^train (\d+)/101  loss", got.err, re.MULTILINE)]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 101]
    assert "ETA 0:00:50" in got.err.splitlines()[5]
    assert "100 activations/s" in got.err.splitlines()[5]
    assert got.out == ""


def test_a_run_that_goes_on_counts_from_where_it_does(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        shown.on_step(status(50))
        clock.now = 20.0
        shown.on_step(status(90))
    assert "200 activations/s  ETA 0:00:05" in capsys.readouterr().err


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
    assert capsys.readouterr().err.splitlines() == ["evaluate 1/1,000", "evaluate 1,000/1,000"]


def test_of_work_of_unknown_size_what_is_done_is_said(capsys) -> None:
    clock = Clock()
    with Display(clock) as shown:
        for done in range(25):
            shown.on_progress("tokenise", done * 1000, 0)
            clock.now += 1.0
    assert capsys.readouterr().err.splitlines() == ["tokenise 0", "tokenise 10,000", "tokenise 20,000"]


def test_in_a_terminal_a_bar_holds_the_same_figures_and_lines_go_the_same_way(monkeypatch) -> None:
    screen, clock = io.StringIO(), Clock()
    monkeypatch.setattr(
        display, "Console", lambda **_: Console(file=screen, force_terminal=True, width=200, highlight=False)
    )
    with Display(clock) as shown:
        shown.on_step(status(0))
        clock.now = 50.0
        shown.say("a line")
        shown.on_step(status(50))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for words in ("51/101", "loss 33", "dead 0.4%", "100 activations/s  ETA 0:00:50", "a line"):
        assert words in text


@pytest.mark.parametrize("n", [0, 1])
def test_a_table_holds_its_cells(capsys, n) -> None:
    Display().print_table("runs", ("a", "b"), [["[red]x", "y"]] * n)
    out = capsys.readouterr().out
    assert "runs" in out
    assert ("[red]x" in out) == bool(n), "names are no markup"
