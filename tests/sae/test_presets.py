"""Presets have the published values, and those on the command line come before them."""

import re
from pathlib import Path

import pytest

from headscope import cli, jobs
from headscope.errors import TrainingError
from headscope.sae.presets import KISSANE_GPT2_COEFFICIENTS, PRESETS, preset, preset_note


@pytest.fixture
def trained(monkeypatch):
    """The recipes that `train` is called with; nothing is trained."""
    seen = []

    def train(_out, *, config, **_options):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "train", train)
    return seen


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--out", "nowhere", *arguments])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_is_trained(trained, name) -> None:
    run("--preset", name)
    assert trained == [PRESETS[name]]


def test_options_come_before_the_preset_and_the_next_command_line_has_none(trained) -> None:
    run("--lr", "3e-4", "--preset=seed-gelu-2l", "--coefficient", "None")
    run()
    assert (trained[0].lr, trained[0].coefficient, trained[0].d_sae) == (3e-4, None, 16_384)
    assert trained[1] == PRESETS["default"]


@pytest.mark.parametrize("layer", range(12))
def test_a_layer_of_gpt2_has_its_own_values(trained, capsys, layer) -> None:
    run("--preset", "kissane-gpt2", "--model", "gpt2", "--layer", str(layer))
    assert trained[0].coefficient == KISSANE_GPT2_COEFFICIENTS[layer]
    assert trained[0].d_sae == (49_152 if layer in (5, 7) else 24_576)
    assert trained[0].dead_below == {8: 1e-5, 10: 1e-5, 11: 3.16e-6}.get(layer, 1e-6)
    assert "kissane" not in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--layer", "5"], ["--model", "gpt2"], ["--model", "gpt2", "--layer", "12"]])
def test_without_a_layer_of_gpt2_it_is_said_whose_values_hold(trained, capsys, options) -> None:
    run("--preset", "kissane-gpt2", *options)
    assert trained == [PRESETS["kissane-gpt2"]]
    assert (
        "those of layer 2 hold (coefficient 1, d_sae 24,576, dead_below 1e-06, unless given)" in capsys.readouterr().out
    )


def test_what_is_said_of_other_presets() -> None:
    assert [preset_note(name) for name in PRESETS if name != "kissane-gpt2"] == [None] * (len(PRESETS) - 1)


def test_an_unknown_preset(capsys, trained) -> None:
    with pytest.raises(TrainingError, match="seed-gelu-2l"):
        preset("nothing")
    run("--preset", "nothing")
    assert re.search(r"preset 'nothing'\n  expected: one of default, ", capsys.readouterr().err)
    assert trained == []


def test_an_option_without_a_value_ends_in_the_usual_way(capsys, trained) -> None:
    run("--preset")
    assert "preset" in capsys.readouterr().err
    assert trained == []


def test_the_help_names_all_presets_and_shows_their_values(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "seed-gelu-2l", "--help-all"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in PRESETS)
    assert re.search(r"--d-sae INT +[^-]*\(default: 16384\)", shown)
    assert re.search(r"--dead-below FLOAT +[^│|]*\(default: 1e-07\)", shown)


def test_the_page_on_training_lists_the_presets() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in PRESETS)
