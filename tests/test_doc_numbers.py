"""Numbers in documents that the package can compute are those that it computes."""

import json
import re
import tomllib
from pathlib import Path

from headscope.corpus import blocks, reading, text
from headscope.index.config import FORMAT_VERSION, IndexPlan
from headscope.jobs import demo
from headscope.sae.config import TrainConfig
from headscope.sae.formats import load_sae, sae_hash
from headscope.sae.presets import PRESETS
from headscope.site import Site
from headscope.studies.prompt.prompts import MEAN_BLOCKS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "headscope"


def page(name: str) -> str:
    """A document as one line, so that words are found across its line breaks."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


README, DIVES, REPLICATION, CORPORA = map(
    page, ("README.md", "docs/deep-dives.md", "docs/replication.md", "docs/corpora.md")
)


def test_the_format_of_the_index() -> None:
    found = page("docs/index-format.md")
    assert f"# The index, format {FORMAT_VERSION} " in found
    assert f"| `format_version` | {FORMAT_VERSION} |" in found


def test_versions_and_sizes_of_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in README
    config, plan = TrainConfig(), IndexPlan()
    assert f"a BatchTopK SAE of {config.d_sae:,} latents" in README
    epochs, millions = re.search(r"for (\d+) epochs over ([\d.]+)M tokens", README).groups()
    assert int(epochs) * float(millions) * 1e6 == config.tokens
    assert f"{reading.HELD_OUT:.0%}".replace("%", " %") + " of the documents" in README
    assert README.count(f"its {plan.n_sources} largest") + README.count(f"the {plan.n_sources} largest") == 2
    assert f"at least {demo._HEAD_SHARE * 100:.0f} % of it" in README
    assert f"gelu-2l layer 1, {PRESETS['seed-gelu-2l'].d_sae:,} latents" in README


def test_the_bundled_model_and_saes() -> None:
    tiny = json.loads((PACKAGE / "models" / "tiny" / "config.json").read_text())
    assert tiny["num_hidden_layers"] == 2
    assert "bundled two-layer model" in README
    assert f"({tiny['num_hidden_layers']} layers, {tiny['num_attention_heads']} heads)" in REPLICATION
    kinds = {"tiny-z1": "BatchTopK (k = 12), applied as JumpReLU", "tiny-z1-relu": "ReLU"}
    for name, kind in kinds.items():
        sae = load_sae(name)
        assert (sae.kind, sae.site) == (kind, Site("z", 1))
        assert sae.metadata["training"]["config"]["tokens"] > TrainConfig().tokens
        assert f"* SAE {name}: {kind} on" in REPLICATION
        assert re.search(rf"{name}: .*?{sae.d_sae:,} latents .*?`{sae_hash(name)[7:23]}`", REPLICATION)
    assert load_sae("tiny-mlp0").site == Site("mlp_out", 0)
    assert "`tiny-mlp0` (the MLP of layer 0)" in README


def test_one_feature_on_three_samples() -> None:
    """The README quotes the largest sample, and the page of deep dives says what the others are."""
    pearson = re.search(r"Pearson with [^|]+\| ([\d.]+ \[[\d., ]+\])", DIVES)[1]
    n = re.search(r"on all ([\d,]+) tokens", DIVES)[1]
    assert f"correlates with it at {pearson} over all {n} held-out tokens" in README
    for share in (r"ablated \| ([\d.]+ %)", r"looked at \| ([\d.]+ %)"):
        assert re.search(share, DIVES)[1] in README
    own, least = re.search(r"Pearson of ([\d.]+ \[[\d., ]+\]).*?first ([\d,]+) of these", DIVES).groups()
    half, documents = re.search(r"the ([\d.]+) in its table of exemplars is over those of its (\d+)", DIVES).groups()
    plain = REPLICATION.replace("\\", "")
    assert f"(induction exemplar) | 0.5 | feature 1540: {own}" in plain.split("Pearson correlation of activation", 1)[1]
    assert f"(n {least}; " in plain
    assert f'| tiny-z1 | induction | 1540 | induction("._") | {half} |' in plain
    assert f"{least} text tokens of {documents} documents" in plain


def test_how_a_corpus_is_read() -> None:
    assert f"held out ({reading.HELD_OUT * 100:.0f} %)" in CORPORA
    assert f"training ({100 - reading.HELD_OUT * 100:.0f} %)" in CORPORA
    assert f"more than {text._SECTION:,} characters" in CORPORA
    assert text.SEPARATOR.strip() in CORPORA.replace("\\", "")
    assert f"Blocks of more than {blocks._IN_MEMORY / 2**30:.0f} GiB" in CORPORA
    assert round(blocks._IN_MEMORY / 12e6, -1) == 90
    assert "(about 90 million tokens)" in CORPORA
    assert f"text tokens of {MEAN_BLOCKS} blocks of the corpus" in page("docs/prompt-explorer.md")
