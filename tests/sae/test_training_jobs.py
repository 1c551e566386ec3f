"""Training as the command line does it: what is left behind, and going on."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headscope import cli, jobs
from headscope.commands.display import Display
from headscope.models.hf import Model
from headscope.sae.formats import load_sae
from headscope.sae.metrics import Status
from headscope.sae.model import SAE
from headscope.sae.runs import RUN, training_folder
from headscope.sae.training.checkpoint import Checkpoints
from training_worker import tensors

RECIPE = {"tokens": 1024, "batch": 64, "buffer": 256, "d-sae": 24, "target-l0": 3, "block-size": 32, "resample": 1}


@pytest.fixture(scope="module")
def options(
    random_model: Callable[..., Model], save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("training")
    (folder / "text").mkdir()
    for i in range(8):
        text = "".join(chr(33 + (i * 7 + j * j) % 90) for j in range(200))
        (folder / "text" / f"{i}.txt").write_text(text)
    model = save_model(random_model("gpt_neox", n_layers=1), folder / "model")
    return {"model": model, "corpus": folder / "text", "split": "all"} | RECIPE


@pytest.fixture(scope="module")
def whole(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> SAE:
    """A training that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "sae"
    train(options, out)
    return load_sae(out)


def train(options: dict[str, object], out: Path, *more: str) -> None:
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    cli.main(["train", "--out", str(out), *arguments, *more])


def interrupted(monkeypatch: pytest.MonkeyPatch, options: dict[str, object], out: Path) -> None:
    """A training in which Ctrl-C is pressed."""

    def press(_display: Display, status: Status) -> None:
        if status.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "on_step", press)
        with pytest.raises(SystemExit) as ended:
            train(options, out)
    assert ended.value.code == 130


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_equal(got: SAE, expected: SAE) -> None:
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(got)[name], tensor), name


def test_the_same_command_goes_on_after_ctrl_c(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    whole: SAE,
    tmp_path: Path,
) -> None:
    out = tmp_path / "sae"
    interrupted(monkeypatch, options, out)
    assert "what was trained is saved" in capsys.readouterr().out
    assert load_sae(out).metadata["training"]["interrupted"] is True
    assert names(tmp_path) == {"sae", "sae.training"}
    train(options, out)
    assert "stopped early" not in capsys.readouterr().out
    assert_equal(load_sae(out), whole)
    assert load_sae(out).metadata["training"]["curve"] == whole.metadata["training"]["curve"]
    assert names(tmp_path) == {"sae"}
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 16


def test_ctrl_c_before_the_first_step_leaves_nothing_half_trained(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    whole: SAE,
    tmp_path: Path,
) -> None:
    def press(_display: Display, stage: str, done: int, total: int) -> None:
        if stage == "fill the buffer" and done < total:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "on_progress", press)
        with pytest.raises(SystemExit) as ended:
            train(options, tmp_path / "sae")
    assert ended.value.code == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err
    assert names(tmp_path) == {"sae.training"}
    train(options, tmp_path / "sae")
    assert_equal(load_sae(tmp_path / "sae"), whole)
    assert names(tmp_path) == {"sae"}


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_second_training_into_a_folder_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, more: list[str]
) -> None:
    def load(*_args: object) -> None:
        pytest.fail("the model is loaded")

    monkeypatch.setattr(jobs.Hardware, "load", load)
    with training_folder(tmp_path / "sae") as folder:
        (folder / RUN).write_text('{"names": []}')
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--out", str(tmp_path / "sae"), *more])
        assert ended.value.code == 2
        assert "another process is training into" in capsys.readouterr().err
        assert names(folder) == {".lock", "run.json"}


def test_a_folder_that_cannot_be_made_is_said_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--out", str(tmp_path / "file" / "sae")])
    assert ended.value.code == 2
    assert "cannot write" in capsys.readouterr().err


def test_another_recipe_does_not_go_on_but_may_overwrite(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    whole: SAE,
    tmp_path: Path,
) -> None:
    out = tmp_path / "sae"
    interrupted(monkeypatch, options | {"seed": 3}, out)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(options, out)
    message = capsys.readouterr().err
    assert "holds a training with seed = 3" in message
    assert "--overwrite" in message
    assert load_sae(out).metadata["training"]["interrupted"] is True
    train(options, out, "--overwrite")
    assert_equal(load_sae(out), whole)
    assert names(tmp_path) == {"sae"}


def test_a_finished_sae_is_not_trained_over(
    capsys: pytest.CaptureFixture[str], options: dict[str, object], tmp_path: Path
) -> None:
    train(options | {"tokens": 128}, tmp_path / "sae")
    with pytest.raises(SystemExit):
        train(options | {"tokens": 128}, tmp_path / "sae")
    assert "--overwrite" in capsys.readouterr().err


def test_the_same_command_ends_a_training_that_was_killed_once_its_sae_was_written(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], whole: SAE, tmp_path: Path
) -> None:
    out, clear, calls = tmp_path / "sae", Checkpoints.clear, []

    def killed(kept: Checkpoints) -> None:
        calls.append(kept)
        if len(calls) == 2:
            raise SystemExit
        clear(kept)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "clear", killed)
        with pytest.raises(SystemExit):
            train(options, out)
    assert names(tmp_path) == {"sae", "sae.training"}
    train(options, out)
    assert_equal(load_sae(out), whole)
    assert names(tmp_path) == {"sae"}
