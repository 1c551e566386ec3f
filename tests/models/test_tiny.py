"""The bundled model and SAEs are what their cards say."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from headscope.attribution import HeadWeights, dfa_by_head
from headscope.corpus import load_corpus
from headscope.models.load import load_model
from headscope.sae.formats import load_sae
from headscope.sae.quality import evaluate
from headscope.studies.heads.scores import head_scores

FOLDER = Path(str(resources.files("headscope.models") / "tiny"))
SAES = ["tiny-z1", "tiny-z1-relu", "tiny-mlp0"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def held_out(tiny):
    return load_corpus("python", tiny.tokenizer, bos=tiny.bos, split="heldout", max_tokens=10_000)


def test_it_is_an_ordinary_hugging_face_folder():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    config = model.config
    assert config.model_type == "gpt_neox"
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 128, 8)
    assert (config.intermediate_size, config.hidden_act, config.max_position_embeddings) == (512, "gelu", 256)
    assert not config.use_parallel_residual
    assert config.rope_parameters["partial_rotary_factor"] == 1.0
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(FOLDER)) == 4096


def test_the_tokenizer_loses_nothing():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "def f(x):\n\treturn x ** 2024  # naïve … 漢字 🙂\r\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(i) for i in tokenizer("2024", add_special_tokens=False).input_ids] == list("2024")


def test_it_has_a_previous_token_head_and_an_induction_head(tiny):
    scores = head_scores(tiny)
    assert scores.previous_token[0].max() >= 0.8
    assert scores.induction[1].max() >= 0.6
    card = json.loads((FOLDER / "training.json").read_text())["measured"]
    assert scores.best("induction")[0] == card["best_induction"][0]
    assert scores.best("induction")[1] == pytest.approx(card["best_induction"][1], abs=0.02)


@pytest.mark.slow
def test_its_loss_on_held_out_text_is_near_its_card(tiny, held_out):
    """A sample of other modules' tokens: the same kind of text, so a similar loss; an untrained model has 8.3."""
    tokens = torch.from_numpy(held_out.blocks.astype(np.int64))
    loss = tiny.losses(tokens).mean().item()
    card = json.loads((FOLDER / "training.json").read_text())["measured"]["heldout_python"]["nats_per_token"]
    assert loss == pytest.approx(card, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAES)
def test_a_bundled_sae_reconstructs_held_out_text(tiny, held_out, name):
    sae = load_sae(name)
    quality = evaluate(tiny, sae, held_out)
    assert 6 < quality.l0.value < 24
    assert quality.explained_variance.value > 0.6
    assert quality.loss_recovered.value > 0.8
    assert sae.metadata["z_convention"] == "raw"
    assert sae.metadata["training"]["config"]["tokens"] >= 5_000_000


def test_dfa_of_the_bundled_sae_closes_on_real_text(tiny, held_out):
    sae = load_sae("tiny-z1")
    weights = HeadWeights.of(sae, tiny)
    z = tiny.attention(torch.from_numpy(held_out.blocks[:4].astype(np.int64)), 1).z.flatten(0, 1)
    row, latent = (sae.encode(z) > 0).nonzero(as_tuple=True)
    pre = sae.pre_activations(z)[row, latent]
    total = dfa_by_head(weights, z[row], latent).sum(1) + weights.bias[latent]
    assert_close(total, pre, rtol=1e-4, atol=1e-4)


def test_what_is_bundled_is_small():
    files = [f for room in ("models", "sae") for f in Path(str(resources.files(f"headscope.{room}"))).rglob("*")]
    assert sum(f.stat().st_size for f in files if f.is_file() and f.suffix != ".pyc") < 20e6
