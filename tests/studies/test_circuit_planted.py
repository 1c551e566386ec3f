"""The planted transformer: where each feature and each attention score comes from is known on paper."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headscope.corpus import Corpus
from headscope.decomposition import Part
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.studies.how.circuit import PromptCircuit
from headscope.studies.how.circuit_corpus import feature_circuit
from headscope.studies.how.qk import CONSTANT, PromptScores
from planted import BOS, D_HEAD, SHARP, V, induction_sequences
from planted_circuit import EPSILON, PREVIOUS, circuit_model, circuit_sae, normed_model

N = 64
NEAR = {"atol": 1e-9, "rtol": 1e-9}
EMBEDDING, PREVIOUS_TOKEN_HEAD = Part("embedding"), Part("head", 0, 0)


@pytest.fixture(scope="module")
def model():
    return circuit_model()


@pytest.fixture(scope="module")
def sae():
    return circuit_sae()


@pytest.fixture(scope="module")
def data():
    return induction_sequences(N)


@pytest.fixture(scope="module")
def live(model, sae, data, tmp_path_factory):
    """Each sequence is a document."""
    blocks = data[0].numpy()
    document, offset = np.indices(blocks.shape)
    corpus = Corpus(
        name="planted",
        split="all",
        blocks=blocks,
        documents=tuple(f"document {i}" for i in range(N)),
        document=document,
        offset=offset,
        bos=BOS,
    )
    out = tmp_path_factory.mktemp("circuit") / "index"
    built = build_index(model, [(sae, SAERecord("planted", "none"))], corpus, out)[0]
    return LiveIndex(FeatureIndex.open(built), model, sae)


def only(tree):
    """The one child that has a value, where there is but one."""
    children = [child for child in tree.children if child.node.kind != "constant"]
    assert len(children) == 1
    assert_close(children[0].node.value, 1.0, **NEAR)
    assert_close(tree.rest, 0.0, **NEAR)
    return children[0]


def chain(circuit, latent, query, depth):
    tree, names = circuit.tree(latent, query, depth=depth), []
    for level in range(depth):
        if level == 0:
            heads = [child for child in tree.children if child.node.kind == "head"]
            assert_close([child.node.value for child in heads], [1.0], **NEAR)
            tree = heads[0]
        else:
            tree = only(tree)
        names.append(tree.node.name)
    return names


def test_an_induction_feature_is_the_embedding_of_the_token_after_the_first_copy(model, sae, data):
    tokens, where, second = data
    for row in range(8):
        circuit = PromptCircuit(model, sae, tokens[row])
        last = tokens.shape[1] - 1
        names = chain(circuit, int(second[row]), last, 3)
        assert names == ["1.0", f"source {where[row]}", "embedding"]


def test_the_previous_token_head_is_where_a_feature_that_reads_it_comes_from(model, sae, data):
    tokens = data[0][0]
    circuit = PromptCircuit(model, sae, tokens)
    for query in (2, 9, 20):
        names = chain(circuit, PREVIOUS + int(tokens[query - 1]), query, 5)
        assert names == ["1.1", f"source {query}", "0.0", f"source {query - 1}", "embedding"]


def test_a_layer_norm_centres_and_scales_each_part(sae, data):
    """The source's stream is three ones in n places: its token, its position, and the token that L0H0 wrote there."""
    tokens, where, second = data
    n = 2 * D_HEAD
    scale = (3 / n - (3 / n) ** 2 + EPSILON) ** 0.5
    model = normed_model()
    for row in range(8):
        circuit = PromptCircuit(model, sae, tokens[row])
        tree = circuit.tree(int(second[row]), tokens.shape[1] - 1, depth=3)
        assert_close(tree.node.value, (1 - 3 / n) / scale - 0.5, **NEAR)
        (head,) = (child for child in tree.children if child.node.kind == "head")
        assert head.node.name == "1.0"
        (source,) = head.children
        assert source.node.name == f"source {where[row]}"
        assert_close(source.node.value, (1 - 3 / n) / scale, **NEAR)
        (embedding,) = source.children
        assert embedding.node.name == "embedding"
        assert_close(embedding.node.value, (1 - 1 / n) / scale, **NEAR)
        assert_close(source.rest, -2 / n / scale, **NEAR)  # the position and L0H0, of which centring alone is left


def test_the_induction_head_looks_for_what_the_previous_token_head_wrote(model, data):
    tokens, where, _ = data
    for row in range(8):
        prompt, last, key = PromptScores(model, 1, tokens[row]), tokens.shape[1] - 1, int(where[row])
        split = prompt.split(0, last)
        a, b = (prompt.parts.index(part) for part in (EMBEDDING, PREVIOUS_TOKEN_HEAD))
        expected = np.zeros_like(split.pairs)
        expected[a, b, key] = SHARP
        expected[prompt.parts.index(CONSTANT), a, 0] = SHARP / 2  # the sink
        assert_close(split.pairs, expected, atol=1e-7, rtol=0)
        first, part, contrast = split.top(key, 1)[0]
        assert (first, part) == (EMBEDDING, PREVIOUS_TOKEN_HEAD)
        assert_close(contrast, SHARP * (1 - 1 / (last + 1)), atol=1e-7, rtol=0)
        sources = prompt.sources(0, last, key, PREVIOUS_TOKEN_HEAD)
        assert_close(sources[a].argmax().item(), key - 1)  # the first copy of the token at the query
        assert_close(sources[a, key - 1].item(), SHARP, atol=1e-7, rtol=0)
        assert_close(sources.sum().item(), SHARP, atol=1e-7, rtol=0)


def test_a_head_that_attends_by_position_does_so_by_position_alone(model, data):
    split = PromptScores(model, 0, data[0][0]).split(0, 9)
    position = split.parts.index(Part("position"))
    assert_close(split.contrast(8)[position, position], SHARP * (1 - 1 / 10), atol=1e-7, rtol=0)
    rest = split.contrast(8)
    rest[position, position] = 0
    assert np.abs(rest).max() < 1e-7


def test_over_the_corpus_the_previous_token_head_has_all_of_it(live, data):
    b = 7
    found = feature_circuit(live, PREVIOUS + b, max_tokens=None)
    expected = int((data[0][:, :-1] == b).sum())
    assert found.n == found.n_active == expected > 50
    first = found.parts[0]
    assert first.part == PREVIOUS_TOKEN_HEAD
    for measure in (first.share, first.linear):
        assert_close(measure.value, 1.0, **NEAR)
        assert measure.n == expected
    assert first.share.null is not None
    assert first.share.null.high < 0.9
    assert_close(first.by_head, np.array([0.0, 1.0]), **NEAR)
    assert_close([part.share.value for part in found.parts[1:]], [0.0] * (len(found.parts) - 1), atol=1e-9, rtol=0)
    assert first.origins[0].token == b
    assert_close(first.origins[0].share.value, 1.0, **NEAR)
    assert first.through[0][0] == EMBEDDING
    assert_close(first.through[0][1], 1.0, **NEAR)
    assert len(first.sources) > 5  # whatever stood after it
    assert abs(first.sources[0].share.value) < 0.3
    assert found.residual < 1e-9


def test_over_the_corpus_an_induction_feature_is_an_embedding(live, data):
    counts = torch.bincount(data[2], minlength=V)
    b = int(counts.argmax())
    found = feature_circuit(live, b)
    assert found.n == counts[b]
    first = found.parts[0]
    assert first.part == EMBEDDING
    assert first.sources[0].token == b
    assert_close(found.contributions[:, 0], np.ones(found.n), **NEAR)
    assert first.share.missing is not None  # fewer tokens than a share is given of
    assert first.share.value is None
