"""docs/models.md: its tables are the code's, and its claims of families and its example hold."""

import re
from pathlib import Path

import pytest
import torch

from families_table import families_table, filled
from headscope.models.families import FAMILIES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_code_says():
    assert "| `gpt2` |" in DOCUMENT
    assert filled(DOCUMENT) == DOCUMENT, "run python scripts/families_table.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_the_model_allows(random_model, family):
    row = next(line for line in families_table().splitlines() if line.startswith(f"| `{family}` |"))
    _, _, _, dfa, direct, scores = (cell.strip()[:3].strip() for cell in row.strip("| ").split(" | "))
    spec = (model := random_model(family)).spec
    assert dfa == ("no" if model.family.not_mixed else "yes")
    assert direct == ("no" if spec.post_norm or model.family.not_mixed else "yes")
    assert scores == ("no" if spec.qk_norm or spec.scores_cap or model.family.not_mixed else "yes")
    has_norm = isinstance(getattr(model.family.parts(block_of(model)).attention, "q_norm", None), torch.nn.Module)
    assert spec.qk_norm == has_norm


def block_of(model):
    return dict(model.module.named_modules())[f"{model.family.blocks}.0"]


def test_the_example_runs():
    code = "import torch\n" + "\n".join(line[4:] for line in re.findall(r"^    .*$", DOCUMENT, re.M))
    names: dict = {}
    exec(code, names)
    assert names["losses"].shape == (1, names["tokens"].shape[1] - 1)
