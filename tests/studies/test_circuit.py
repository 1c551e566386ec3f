"""Recursive DFA: at every level the parts sum to what they are parts of, whatever the family and depth."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from cases import examples
from headscope.decomposition import Upstream
from headscope.errors import HeadscopeError, ModelError, SAEError
from headscope.interventions import add
from headscope.site import Site
from headscope.studies.how.circuit import PromptCircuit
from precise import EXACT, SETTINGS, precise, text


@pytest.fixture(scope="module", params=SETTINGS)
def subject(request, random_model, random_sae):
    """A model of three layers, a z SAE of the last, and SAEs of two earlier components."""
    model = precise(random_model, request.param)
    saes = [random_sae(model, 40, site=Site("mlp_out", 0)), random_sae(model, 30, "topk", site=Site("z", 1))]
    return model, random_sae(model, 20), saes


def everything(circuit, node):
    """A node and all below it."""
    children = circuit.expand(node)
    if children:
        scale = 1 + sum(abs(child.value) for child in children)
        assert abs(sum(child.value for child in children) - node.value) < 1e-10 * scale, node
    for child in children:
        yield child
        yield from everything(circuit, child)


@pytest.mark.parametrize("with_saes", [False, True])
def test_children_sum_to_their_parent_at_every_level(subject, with_saes):
    model, sae, saes = subject
    tokens = text(model, 4)
    circuit = PromptCircuit(model, sae, tokens, saes=saes if with_saes else ())
    z = model.read(tokens[None], [sae.site])[sae.site]
    root = circuit.root(3, 3)
    assert_close(root.value, sae.pre_activations(z)[0, 3, 3].item(), **EXACT)
    below = list(everything(circuit, root))
    kinds = {node.part.kind for node in below if node.part}
    assert ("feature" in kinds) == with_saes
    assert max(len(node.hops) for node in below) == (2 if with_saes else 3)  # an SAE of z stands where the heads were
    assert ("position" in kinds) == (model.spec.family == "gpt2")


@examples(15)
@given(seed=st.integers(0, 2**16), length=st.integers(1, 12), latent=st.integers(0, 19))
def test_parts_heads_and_sources_sum_to_the_pre_activation(subject, seed, length, latent):
    model, sae, _ = subject
    circuit = PromptCircuit(model, sae, text(model, length, seed))
    query = seed % length
    parts = circuit.split(latent, query)
    root = circuit.root(latent, query)
    constant = circuit.expand(root)[-1].value
    assert_close(parts.sum().item() + constant, root.value, **EXACT)
    assert_close(parts.sum((1, 2)).tolist(), [head.value for head in circuit.expand(root)[:-1]], **EXACT)
    assert not parts[:, query + 1 :].any()


def test_split_is_what_expanding_finds(subject):
    model, sae, _ = subject
    circuit = PromptCircuit(model, sae, text(model, 6))
    parts = circuit.split(5, 4)
    for h, head in enumerate(circuit.expand(circuit.root(5, 4))[:-1]):
        for s, source in enumerate(circuit.expand(head)):
            values = torch.tensor([node.value for node in circuit.expand(source)], dtype=torch.float64)
            assert_close(parts[h, s], values, **EXACT)


def test_the_parts_are_the_stream(subject):
    model, _, saes = subject
    tokens = torch.stack([text(model, 9, seed) for seed in range(3)])
    for layer, used in ((0, []), (1, saes[:1]), (2, saes)):
        stream = Upstream(model, layer, used).run(tokens)
        total = sum(stream.vector(part) for part in stream.parts())
        total = total + sum(w.f @ w.directions for w in stream.written.values())
        site = Site("resid_pre", layer)
        assert_close(total, model.read(tokens, [site])[site], **EXACT)
        directions = torch.randn(4, model.spec.d_model, dtype=torch.float64)
        expected = torch.stack([stream.vector(part) @ directions.T for part in stream.parts()])
        assert_close(stream.along(directions), expected, **EXACT)


def test_a_tree_sums_to_the_feature_and_keeps_what_is_large(subject):
    model, sae, saes = subject
    circuit = PromptCircuit(model, sae, text(model, 8), saes=saes)
    tree = circuit.tree(2, 7, depth=5, threshold=0.02)
    heads = sum(abs(node.value) for node in circuit.expand(tree.node)[:-1])

    def check(tree):
        if tree.children or tree.n_rest:
            total = sum(child.node.value for child in tree.children) + tree.rest
            assert_close(total, tree.node.value, **EXACT)
            assert all(abs(child.node.value) >= 0.02 * heads for child in tree.children)
            assert len(tree.children) + tree.n_rest == len(circuit.expand(tree.node))
        return 1 + sum(check(child) for child in tree.children)

    assert check(tree) > 10
    assert not circuit.tree(2, 7, depth=1, threshold=0.0).children[0].children


def test_single_precision_closes_too(random_model, random_sae):
    for setting in SETTINGS:
        model = precise(random_model, setting, dtype=torch.float32)
        sae = random_sae(model, 20)
        circuit = PromptCircuit(model, sae, text(model, 12))
        root = circuit.root(1, 11)
        parts = circuit.split(1, 11)
        total = parts.sum().item() + circuit.expand(root)[-1].value
        assert abs(total - root.value) < 1e-4 * (1 + parts.abs().sum().item())


def test_what_does_not_fit_is_refused(subject, random_sae, no_type_checks):
    model, sae, saes = subject
    tokens = text(model, 5)
    for wrong in (
        [random_sae(model, 9, site=Site("z", 2))],  # the feature's own layer
        [random_sae(model, 9, site=Site("resid_pre", 1))],
        [saes[1], random_sae(model, 9, site=Site("attn_out", 1))],  # of one component
    ):
        with pytest.raises(SAEError, match="layer before 2"):
            PromptCircuit(model, sae, tokens, saes=wrong)
    with pytest.raises(SAEError, match="expected: one of z"):
        PromptCircuit(model, saes[0], tokens)
    with pytest.raises(HeadscopeError, match="0 tokens"):
        PromptCircuit(model, sae, tokens[:0])
    with pytest.raises(HeadscopeError, match="65 tokens"):
        PromptCircuit(model, sae, text(model, 65))
    circuit = PromptCircuit(model, sae, tokens)
    with pytest.raises(HeadscopeError, match="latent 20"):
        circuit.root(20, 0)
    with pytest.raises(HeadscopeError, match="position 5"):
        circuit.tree(0, 5)
    with (
        model.edit({Site("resid_pre", 1): add(torch.ones(model.spec.d_model))}),
        pytest.raises(ModelError, match="not the sum of parts"),
    ):
        PromptCircuit(model, sae, tokens)
