"""docs/training.md: its presets, variants and names of metrics are those of the code."""

import dataclasses
import re
import typing
from pathlib import Path

from headscope.sae.config import TrainConfig, Variant
from headscope.sae.metrics import Status
from headscope.sae.pareto import DEFINITIONS
from headscope.sae.presets import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> set[str]:
    """Names in the first column of the table under a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return {
        name
        for row in re.findall(r"^\| ((?:`[^`]+`[^|]*)+)\|", section, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    }


def test_tables_are_whole() -> None:
    assert first_cells("Variants") - {"--variant"} == set(typing.get_args(Variant))
    assert first_cells("Published recipes") - {"--preset"} == set(PRESETS)
    assert first_cells("While it runs") == {f.name for f in dataclasses.fields(Status)} - {"n_steps"}


def test_what_is_said_of_defaults() -> None:
    config = TrainConfig()
    assert f"`{config.variant}` (default)" in PAGE
    assert f"BatchTopK, {config.d_sae:,} latents, {config.tokens / 1e6:.1f}M activations" in PAGE


def test_what_a_sweep_is_said_to_measure_is_measured() -> None:
    section = PAGE.split("## Many at once")[1].split("\n## ")[0]
    assert {name for name in ("ce_loss_score", "loss_recovered") if f"`{name}`" in section} <= set(DEFINITIONS)
    for words in ("explained variance", "dead", "reconstruction bias"):
        assert words in section.replace("\n", " ")
        assert words.replace(" ", "_") in DEFINITIONS
