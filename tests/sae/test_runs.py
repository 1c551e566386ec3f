"""The trainings that `headscope runs` finds, and the curves that are drawn of them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from headscope import cli, figures
from headscope.errors import FigureError
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Metrics, Status, read_metrics
from headscope.sae.runs import Run, find_runs

CONFIG = TrainConfig(tokens=640, batch=64, buffer=128, d_sae=24, target_l0=3.0)


def status(step: int, n_steps: int = 10) -> Status:
    return Status(
        step=step,
        n_steps=n_steps,
        tokens=64 * (step + 1),
        squared_error=10.0 - step,
        l0=3.0 + step,
        explained_variance=step / 10,
        dead=0.125,
        coefficient=0.5,
        penalty=1.0,
        auxiliary=0.0,
        lr=1e-3,
    )


def measured(path: Path, steps: int) -> None:
    metrics = Metrics(path, CONFIG.n_steps)
    for step in range(steps):
        metrics.add(status(step))
    metrics.flush()


def sae(folder: Path, steps: int = 10, *, interrupted: bool = False, config: TrainConfig = CONFIG) -> None:
    folder.mkdir(parents=True)
    training = {"config": config.as_dict(), "interrupted": interrupted}
    (folder / "cfg.json").write_text(json.dumps({"metadata": {"training": training}}))
    measured(folder / "metrics.jsonl", steps)


def unfinished(folder: Path, names: dict[str, TrainConfig], steps: int) -> None:
    folder.mkdir(parents=True)
    options = {f"{name} {key}": value for name, config in names.items() for key, value in config.as_dict().items()}
    (folder / "run.json").write_text(json.dumps({"model": "m", "names": list(names), **options}))
    for name in names:
        measured(folder / f"{name}.jsonl", steps)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    sae(tmp_path / "a" / "done")
    sae(tmp_path / "early", steps=4, interrupted=True)
    unfinished(tmp_path / "early.training", {"metrics": CONFIG}, steps=4)
    sae(tmp_path / "again", steps=4, interrupted=True)
    unfinished(tmp_path / "again.training", {"metrics": CONFIG}, steps=7)
    relu = replace(CONFIG, variant="relu", coefficient=2.0)
    unfinished(tmp_path / "sweep.training", {"relu-l0-3": relu, "topk-l0-3": CONFIG}, steps=5)
    sae(tmp_path / ".hidden" / "sae")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cfg.json").write_text("{")
    (tmp_path / "damaged" / "metrics.jsonl").write_text("")
    return tmp_path


def test_finished_interrupted_and_unfinished_runs_are_found(folders: Path) -> None:
    found = {str(Path(run.name).relative_to(folders)): run for run in find_runs([folders])}
    assert {name: (run.state, run.step) for name, run in found.items()} == {
        "a/done": ("finished", 10),
        "early": ("interrupted", 4),
        "again": ("unfinished", 7),
        "sweep/relu-l0-3": ("unfinished", 5),
        "sweep/topk-l0-3": ("unfinished", 5),
    }
    assert found["sweep/relu-l0-3"].target_l0 is None, "a coefficient that is kept has no target"
    assert found["a/done"].target_l0 == 3
    assert [run.name for run in find_runs([folders / "a" / "done"])] == [str(folders / "a" / "done")]
    assert len(find_runs([folders, folders / "a"])) == 5, "none twice"


def test_a_row_states_the_last_point(folders: Path) -> None:
    cells = {Path(run.name).name: run.cells()[1:] for run in find_runs([folders])}
    assert cells["done"] == ["batchtopk", "3", "12.0", "90.0%", "12.5%", "640", "finished"]
    assert cells["again"] == ["batchtopk", "3", "9.0", "60.0%", "12.5%", "448", "unfinished at step 7 of 10"]
    assert cells["relu-l0-3"][:2] == ["relu", ""]
    assert Run("x", "unfinished", "relu", 3.0, 10, ()).cells()[3:] == ["", "", "", "", "unfinished at step 0 of 10"]


def test_a_training_without_metrics_yet_is_a_run(tmp_path: Path) -> None:
    unfinished(tmp_path / "new.training", {"metrics": CONFIG}, steps=0)
    (tmp_path / "new.training" / "metrics.jsonl").unlink()
    [run] = find_runs([tmp_path])
    assert (run.step, run.state, run.n_steps) == (0, "unfinished", 10)


def test_metrics_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    measured(tmp_path / "m.jsonl", 10)
    points = read_metrics(tmp_path / "m.jsonl")
    assert [point["step"] for point in points] == list(range(10))
    assert "n_steps" not in points[0]
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 10, "l0"')
    assert read_metrics(tmp_path / "m.jsonl") == points


def test_metrics_go_on_before_a_step(tmp_path: Path) -> None:
    measured(tmp_path / "m.jsonl", 8)
    metrics = Metrics(tmp_path / "m.jsonl", 10)
    metrics.go_on(5)
    for step in range(5, 10):
        metrics.add(status(step))
    assert [point["step"] for point in metrics.points] == list(range(10))


def test_the_command_prints_a_table_and_draws_curves(folders: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(folders)
    cli.main(["runs", "--html", "curves.html"])
    out = capsys.readouterr().out
    for words in ("a/done", "explained variance", "unfinished at step 7 of 10", "curves: curves.html"):
        assert words in out
    page = (folders / "curves.html").read_text()
    assert "a/done (finished)" in page.replace("\\u002f", "/")
    with pytest.raises(SystemExit):
        cli.main(["runs", "--html", "curves.html"])
    assert "already exists" in capsys.readouterr().err
    cli.main(["runs", "a", "early", "--html", "curves.html", "--overwrite"])
    assert "again" not in capsys.readouterr().out


def test_no_run_is_an_error(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["runs", str(tmp_path)])
    assert "no training in" in capsys.readouterr().err


def test_the_curves_are_the_points(folders: Path) -> None:
    runs = find_runs([folders])
    figure = figures.training_curves(runs)
    assert len(figure.data) == 4 * len(runs)
    of_first = [trace for trace in figure.data if trace.legendgroup == runs[0].name]
    assert [trace.showlegend for trace in of_first] == [True, False, False, False]
    for trace, name in zip(of_first, ("squared_error", "l0", "explained_variance", "dead"), strict=True):
        assert list(trace.y) == [point[name] for point in runs[0].points]
        assert list(trace.x) == [point["tokens"] for point in runs[0].points]
    assert len({(trace.line.color, trace.line.dash) for trace in figure.data}) == len(runs)


def test_curves_without_plotly_name_the_extra(folders: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(FigureError, match=r"headscope\[plots\]"):
        figures.training_curves(find_runs([folders]))


def test_runs_imports_no_torch(folders: Path) -> None:
    code = "import sys; from headscope.cli import main; main(['runs', sys.argv[1]]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, folders], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
