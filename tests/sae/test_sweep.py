"""A sweep: SAEs as they would come out alone, measured as `eval` does, and nothing done twice."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from headscope import cli, jobs
from headscope.commands.display import Display
from headscope.errors import OutputError, TrainingError
from headscope.jobs import sweeps
from headscope.sae.config import TrainConfig
from headscope.sae.formats import load_sae
from headscope.sae.pareto import Pareto
from headscope.sae.runs import find_runs
from headscope.sae.training import run as training

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(tokens=1024, batch=64, buffer=256, d_sae=24, resample=0)
CONFIGS = sweeps.recipes(CONFIG, ("relu", "topk"), (3.0, 5.0))
NAMES = ("relu-l0-3", "relu-l0-5", "topk-l0-3", "topk-l0-5")


@pytest.fixture(scope="module")
def options(random_model, save_model, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sweep")
    for i in range(12):
        text = folder / "text" / f"{i}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("".join(chr(33 + (i * 7 + j * j) % 90) for j in range(300)))
    model = save_model(random_model("gpt_neox"), folder / "neox")
    choice = jobs.CorpusChoice(corpus=str(folder / "text"), split="train", block_size=32)
    return {"model": str(model), "text": choice, "eval_tokens": 600}


@pytest.fixture(scope="module")
def swept(options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "out"
    assert not sweeps.sweep(out, CONFIGS, **options).interrupted
    return out


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """What is trained and measured."""
    done: list[str] = []
    train_saes, measure = training.train_saes, jobs.measure

    def trained(model, corpus, site, configs, *arguments, **more):
        done.extend(f"train {name}" for name in configs)
        return train_saes(model, corpus, site, configs, *arguments, **more)

    def measured(name, *arguments):
        done.append(f"measure {Path(name).name}")
        return measure(name, *arguments)

    monkeypatch.setattr(training, "train_saes", trained)
    monkeypatch.setattr(jobs, "measure", measured)
    return done


def test_recipes_are_all_pairs() -> None:
    assert tuple(CONFIGS) == NAMES
    assert [(c.variant, c.target_l0) for c in CONFIGS.values()] == [
        ("relu", 3.0),
        ("relu", 5.0),
        ("topk", 3.0),
        ("topk", 5.0),
    ]
    assert {c.tokens for c in CONFIGS.values()} == {1024}


def test_recipes_that_make_no_sweep() -> None:
    with pytest.raises(TrainingError, match="at least one of both"):
        sweeps.recipes(CONFIG, (), (3.0,))
    with pytest.raises(TrainingError, match="--coefficient None"):
        sweeps.recipes(TrainConfig(variant="relu", coefficient=2.0), ("relu",), (3.0,))


def test_each_sae_is_what_it_is_alone(swept: Path, options, tmp_path: Path) -> None:
    alone = {key: value for key, value in options.items() if key != "eval_tokens"}
    for name in ("relu-l0-5", "topk-l0-3"):
        jobs.train(tmp_path / name, config=CONFIGS[name], **alone)
        mine, together = load_sae(tmp_path / name), load_sae(swept / name)
        for weight in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert_close(getattr(together, weight), getattr(mine, weight), rtol=0, atol=0)
        assert together.metadata["training"]["config"] == CONFIGS[name].as_dict()


def test_each_is_measured_as_eval_does(swept: Path, options) -> None:
    found = Pareto.read(swept / "pareto.json")
    assert tuple(point.name for point in found.points) == NAMES
    assert found.site == "blocks.1.attn.hook_z"
    assert found.corpus["split"] == "heldout"
    text = jobs.CorpusChoice(corpus=options["text"].corpus, split="heldout", block_size=32, max_tokens=600)
    quality = jobs.eval(swept / "topk-l0-5", text=text)
    point = found.points[3]
    for name in ("l0", "ce_loss_score", "loss_recovered", "explained_variance", "dead", "loss_recovered_by_mean"):
        assert getattr(point, name) == getattr(quality, name), name
    assert point.reconstruction_bias == quality.relative_reconstruction_bias
    assert (point.n_tokens, point.n_blocks, point.d_sae) == (quality.n_tokens, quality.n_blocks, 24)
    assert point.l0.value == pytest.approx(5, rel=0.2)
    kept = json.loads((swept / "topk-l0-5" / "quality.json").read_text())
    assert kept["quality"] == quality.as_dict()


def test_nothing_of_the_training_is_left_but_its_metrics(swept: Path) -> None:
    assert {path.name for path in swept.parent.iterdir()} == {"out"}
    assert [(Path(run.name).name, run.state) for run in find_runs([swept])] == [(name, "finished") for name in NAMES]


def test_a_finished_sweep_does_nothing_again(swept: Path, options, work) -> None:
    before = (swept / "pareto.json").read_bytes()
    sweeps.sweep(swept, CONFIGS, **options)
    assert work == []
    assert (swept / "pareto.json").read_bytes() == before


def test_what_was_cut_off_goes_on(options, work, tmp_path: Path, monkeypatch, swept: Path) -> None:
    out = tmp_path / "out"

    def press(statuses) -> None:
        if statuses["relu-l0-3"].step == 7:
            raise KeyboardInterrupt

    assert sweeps.sweep(out, CONFIGS, **options, on_steps=press).interrupted
    assert [(run.state, run.step) for run in find_runs([tmp_path])] == [("unfinished", 8)] * 4
    measure = jobs.measure

    def stop_at_third(name, *arguments):
        if len(work) == 10:  # all trained twice, two measured
            raise KeyboardInterrupt
        return measure(name, *arguments)

    monkeypatch.setattr(jobs, "measure", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep(out, CONFIGS, **options)
    assert not (out / "pareto.json").exists()
    monkeypatch.setattr(jobs, "measure", measure)
    sweeps.sweep(out, CONFIGS, **options)
    measured = [f"measure {name}" for name in NAMES]
    assert work == [f"train {name}" for name in NAMES] * 2 + measured
    assert (out / "pareto.json").read_bytes() == (swept / "pareto.json").read_bytes(), "as if it had not been"


def test_new_targets_are_trained_and_measured_alone(options, work, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweeps.sweep(out, sweeps.recipes(CONFIG, ("topk",), (3.0,)), **options)
    found = sweeps.sweep(out, sweeps.recipes(CONFIG, ("topk",), (3.0, 4.0)), **options)
    assert work == ["train topk-l0-3", "measure topk-l0-3", "train topk-l0-4", "measure topk-l0-4"]
    assert found.pareto is not None
    assert [point.target_l0 for point in found.pareto.points] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("what", "match"), [("lr", "already exists"), ("layer", "another site"), ("text", "another text")]
)
def test_saes_of_another_training_are_not_taken_for_it(swept: Path, options, work, what: str, match: str) -> None:
    configs, changed = CONFIGS, dict(options)
    if what == "lr":
        configs = sweeps.recipes(TrainConfig(**{**CONFIG.__dict__, "lr": 1e-4}), ("topk",), (3.0,))
    elif what == "layer":
        changed["layer"] = 0
    else:
        changed["text"] = jobs.CorpusChoice(corpus=options["text"].corpus, split="all", block_size=32)
    with pytest.raises(OutputError, match=match):
        sweeps.sweep(swept, configs, **changed)
    assert work == []


def test_the_command(options, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    corpus = ["--model", options["model"], "--corpus", options["text"].corpus, "--block-size", "32"]
    recipe = ["--tokens", "512", "--batch", "64", "--buffer", "256", "--d-sae", "24", "--eval-tokens", "600"]
    chosen = ["--variants", "topk", "gated", "--target-l0s", "2", "4"]
    cli.main(["sweep", "--out", str(tmp_path / "s"), *corpus, *recipe, *chosen])
    out = capsys.readouterr().out
    for words in ("topk", "gated", "reconstruction bias", "held-out tokens", "pareto.html"):
        assert words in out
    found = Pareto.read(tmp_path / "s" / "pareto.json")
    assert [point.name for point in found.points] == ["topk-l0-2", "topk-l0-4", "gated-l0-2", "gated-l0-4"]
    assert "gated" in (tmp_path / "s" / "pareto.html").read_text()
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    cli.main(["sweep", "--out", str(tmp_path / "s"), *corpus, *recipe, *chosen])
    assert "no curves were drawn: plotly is not installed; pip install" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(options, tmp_path: Path, capsys, monkeypatch) -> None:
    def press(_display: Display, statuses: Any) -> None:
        if statuses["topk-l0-2"].step == 3:
            raise KeyboardInterrupt

    corpus = ["--model", options["model"], "--corpus", options["text"].corpus, "--block-size", "32"]
    recipe = ["--tokens", "512", "--batch", "64", "--buffer", "256", "--d-sae", "24"]
    monkeypatch.setattr(Display, "on_steps", press)
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "--out", str(tmp_path / "s"), *corpus, *recipe, "--variants", "topk", "--target-l0s", "2"])
    assert ended.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().out
    assert [run.step for run in find_runs([tmp_path])] == [4]
    assert not any((tmp_path / "s").iterdir())
