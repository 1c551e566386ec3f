"""Special tokens and what fills up blocks are in no statistic, of whatever corpus."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tokenizers import Tokenizer

from headscope import jobs
from headscope.capture import is_text
from headscope.corpus import PADDING, Corpus, Reading, load_corpus
from headscope.index.build import SAERecord, build_index
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.quality import evaluate
from headscope.sae.training.run import train_sae
from headscope.sae.training.stream import ActivationStream
from headscope.site import Site

END = "<|end|>"


@pytest.fixture
def model(random_model) -> Model:
    """With a token that ends documents, besides the BOS that begins them."""
    made = random_model(n_layers=1)
    own = Tokenizer.from_str(made.tokenizer.to_str())
    vocabulary = own.get_vocab()
    last = max(vocabulary, key=vocabulary.get)
    content = own.to_str().replace(f'"{last}":{vocabulary[last]}', f'"{END}":{vocabulary[last]}')
    own = Tokenizer.from_str(content)
    own.add_special_tokens([END])
    return Model(made.module, own, made.bos, made.spec.name)


@pytest.fixture
def rows(tmp_path: Path, model: Model) -> Corpus:
    for i, text in enumerate(["abcdefgh" * 3, "hello there", "x", "words of the last one"]):
        (tmp_path / f"{i}.txt").write_text(text)
    reading = Reading(packing="rows", bos_at="block", separator=END)
    return load_corpus(str(tmp_path), model.tokenizer, bos=model.bos, split="all", block_size=16, reading=reading)


def test_neither_separators_nor_padding_are_text(model, rows):
    end = model.tokenizer.token_to_id(END)
    assert end in rows.blocks
    text = is_text(model, torch.from_numpy(rows.blocks)).numpy()
    assert_array_equal(text, (rows.offset > 0) & (rows.blocks != end))
    assert rows.n_text_tokens == text.sum() == 24 + 11 + 1 + 21
    assert rows.n_padding == rows.n_tokens - text.sum() - 4 - len(rows.blocks)


def test_an_index_counts_text_alone(model, rows, random_sae, tmp_path):
    sae = random_sae(model)
    [folder] = build_index(model, [(sae, SAERecord("random", "sha256:0"))], rows, tmp_path / "out" / "index")
    index = FeatureIndex.open(folder)
    assert index.manifest["corpus"]["n_tokens"] == rows.n_text_tokens
    assert index.manifest["corpus"]["reading"] == dict(rows.reading)
    text = is_text(model, torch.from_numpy(rows.blocks)).numpy().reshape(-1)
    active = index.sql("SELECT DISTINCT position FROM activations ORDER BY position")["position"].to_numpy()
    assert text[active].all()
    assert index.vocabulary[1] == sorted([model.bos, model.tokenizer.token_to_id(END)])


def test_what_fills_up_blocks_changes_no_figure(model, rows, random_sae):
    sae = random_sae(model)
    wider = [
        np.pad(a, ((0, 0), (0, 4)), constant_values=v) for a, v in ((rows.blocks, model.bos), (rows.offset, PADDING))
    ]
    document = np.pad(rows.document, ((0, 0), (0, 4)), mode="edge")
    padded = dataclasses.replace(rows, blocks=wider[0], offset=wider[1], document=document)
    assert padded.n_tokens > rows.n_tokens
    first, second = evaluate(model, sae, rows).as_dict(), evaluate(model, sae, padded).as_dict()
    for name in ("ce", "l0_with_bos", "mse", "cosine", "n_tokens"):
        if name == "ce":
            for key, value in first["ce"].items():
                assert_allclose(second["ce"][key], value, rtol=1e-4, err_msg=key)
        else:
            assert_allclose(second[name], first[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("exclude", [True, False])
def test_training_takes_text_alone_or_all_but_what_fills_up(model, rows, exclude):
    config = TrainConfig(tokens=64, batch=8, d_sae=8, buffer=1024, exclude_bos=exclude, target_l0=2.0)
    expected = rows.n_text_tokens if exclude else rows.n_tokens - rows.n_padding
    assert ActivationStream(model, rows, Site("z", 0), config).n_available == expected
    trained = train_sae(model, rows, Site("z", 0), config).sae.metadata
    assert trained["corpus"]["reading"]["packing"] == "rows"
    assert trained["corpus"]["hash"] == rows.fingerprint()
    assert trained["prepend_bos"] is True


def test_the_choices_of_the_command_reach_the_corpus(model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "some text of some length"}\n' * 3)
    choice = jobs.CorpusChoice(
        corpus=str(tmp_path / "a.jsonl"), split="all", block_size=8, field="body", packing="rows", bos_at="nowhere"
    )
    corpus = choice.load(model)
    assert (corpus.reading["field"], corpus.reading["packing"]) == ("body", "rows")
    assert corpus.blocks.shape == (9, 8)
    assert (corpus.offset[:, 0] > 0).all()
    assert set(corpus.reading) == {f.name for f in dataclasses.fields(Reading)}
