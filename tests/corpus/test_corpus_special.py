"""Special tokens and what fills up blocks are in no statistic, of whatever corpus."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tokenizers import Tokenizer

from headscope import jobs
from headscope.artefact import file_hash, read_json, write_json
from headscope.corpus import PADDING, Corpus, Reading, load_corpus
from headscope.index.build import SAERecord, build_index
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.proxies import evaluate as holds_at
from headscope.proxies import text_mask
from headscope.sae.config import TrainConfig
from headscope.sae.quality import evaluate
from headscope.sae.training.run import train_sae
from headscope.sae.training.stream import ActivationStream
from headscope.site import Site
from headscope.studies.support.active import Text
from headscope.studies.when.split import TextTokens

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
    text = rows.is_text()
    assert_array_equal(text, ~np.isin(rows.blocks, [end, model.bos]))
    assert rows.n_text_tokens == text.sum() == 24 + 11 + 1 + 21
    assert rows.n_padding == rows.n_tokens - text.sum() - 4 - len(rows.blocks)


def test_an_index_counts_text_alone(model, rows, random_sae, tmp_path):
    sae = random_sae(model)
    [folder] = build_index(model, [(sae, SAERecord("random", "sha256:0"))], rows, tmp_path / "out" / "index")
    index = FeatureIndex.open(folder)
    assert index.manifest["corpus"]["n_tokens"] == rows.n_text_tokens
    assert index.manifest["corpus"]["reading"] == dict(rows.reading)
    text = rows.is_text().reshape(-1)
    active = index.sql("SELECT DISTINCT position FROM activations ORDER BY position")["position"].to_numpy()
    assert text[active].all()
    assert index.vocabulary[1] == [model.bos, *map(model.tokenizer.token_to_id, ("<unk>", END))]


@pytest.fixture
def mixed(tmp_path: Path, model: Model) -> Corpus:
    """Rows of token ids with all that is not text: BOS of their own, an EOS inside, separators and padding."""
    bos, end, comma = (model.tokenizer.token_to_id(t) for t in ("<|bos|>", END, ","))
    texts = ["ab,cd", ",,", "abab,ab", "x"]
    a, b, c, d = (model.tokenizer.encode(t, add_special_tokens=False).ids for t in texts)
    rows = [[bos, *a, end, *b, end], [bos, bos, *c, end, bos, *d], [*b, bos, *a]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    reading = Reading(separator=",")
    made = load_corpus(
        str(tmp_path / "rows.jsonl"), model.tokenizer, bos=bos, split="all", block_size=12, reading=reading
    )
    padding = made.offset == PADDING
    assert padding.any()
    made.blocks[padding] = comma  # a padding token may be any token
    assert made.n_text_tokens == sum(map(len, (a, b, c, d, b, a)))
    return made


def test_all_agree_on_what_a_text_token_is(model, mixed, random_sae, tmp_path):
    [folder] = build_index(model, [(random_sae(model), SAERecord("r", "sha256:0"))], mixed, tmp_path / "index")
    index, text = FeatureIndex.open(folder), mixed.is_text()
    flat, comma = text.reshape(-1), model.tokenizer.token_to_id(",")
    assert not flat.all()
    assert (mixed.blocks[~text] == comma).any()
    n = mixed.n_text_tokens
    assert index.manifest["corpus"]["n_tokens"] == n == TextTokens.of(index).n == Text.of(index).is_text.sum()
    assert index.sql("SELECT count(*) AS n FROM tokens WHERE is_text")["n"][0].as_py() == n
    assert_array_equal(text_mask(index), flat)
    assert_array_equal(Text.of(index).is_text, text)
    assert flat[index.sql("SELECT position FROM activations")["position"].to_numpy()].all()
    frequency = index.sql("SELECT DISTINCT frequency AS f FROM sources WHERE token = ?", [comma])["f"].to_pylist()
    assert frequency == pytest.approx([(mixed.blocks[text] == comma).mean()])
    assert set(index.sql("SELECT token FROM sources")["token"].to_pylist()) <= set(mixed.blocks[text].tolist())


def test_a_proxy_is_false_where_there_is_no_text_and_does_not_see_it(model, mixed, random_sae, tmp_path):
    [folder] = build_index(model, [(random_sae(model), SAERecord("r", "sha256:0"))], mixed, tmp_path / "index")
    index, text = FeatureIndex.open(folder), mixed.is_text()
    comma, a, end = (model.tokenizer.token_to_id(t) for t in (",", "a", END))
    everywhere = ["~token_in([#5])", 'regex(".")', '~document("none")', f"~induction(#{a})", "~in_repeat(2)"]
    for proxy in everywhere:
        assert not holds_at(proxy, index)[~text.reshape(-1)].any(), proxy
    words = np.where(text, mixed.blocks, -1)
    is_comma, following = words == comma, np.pad(words[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    earlier = np.cumsum(is_comma, axis=1) - is_comma > 0
    expected = {
        f"token_in([#{comma}])": is_comma,
        f"token_in([#{comma}, #{end}])": is_comma,
        f"next_token_in([#{comma}])": text & (following == comma),
        f"after_any([#{comma}])": text & earlier,
    }
    for proxy, holds in expected.items():
        assert_array_equal(holds_at(proxy, index).reshape(text.shape), holds, err_msg=proxy)


def test_an_index_without_the_column_is_read_by_id(model, rows, random_sae, tmp_path):
    [folder] = build_index(model, [(random_sae(model), SAERecord("r", "sha256:0"))], rows, tmp_path / "out" / "index")
    path = folder / "tokens.parquet"
    pq.write_table(pq.read_table(path).drop_columns("is_text"), path, row_group_size=rows.block_size * 64)
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["tokens.parquet"] = [path.stat().st_size, file_hash(path)]
    write_json(folder / "manifest.json", manifest)
    index = FeatureIndex.open(folder)
    assert_array_equal(Text.of(index).is_text, rows.is_text())
    assert_array_equal(text_mask(index), rows.is_text().reshape(-1))
    said = index.sql("SELECT is_text FROM tokens ORDER BY position")["is_text"].to_numpy()
    assert_array_equal(said, rows.is_text().reshape(-1))
    assert TextTokens.of(index).n == index.manifest["corpus"]["n_tokens"]


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
