"""Parts of a feature over the corpus: they are those of each prompt, summed, however blocks are batched."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from cases import examples
from headscope.decomposition import Part
from headscope.errors import IndexFormatError, SAEError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.site import Site
from headscope.studies.how import circuit_corpus
from headscope.studies.how.circuit import PromptCircuit
from headscope.studies.how.circuit_corpus import feature_circuit
from precise import precise

LATENT = 3
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def subject(request, random_model, random_sae, random_corpus, tmp_path_factory):
    model = precise(random_model, request.param)
    sae, corpus = random_sae(model, 20), random_corpus(model, 14, 12)
    folder = tmp_path_factory.mktemp("circuit") / "index"
    build_index(model, [(sae, SAERecord("random", "none"))], corpus, folder)
    saes = [random_sae(model, 40, site=Site("mlp_out", 0)), random_sae(model, 30, "topk", site=Site("z", 1))]
    return LiveIndex(FeatureIndex.open(folder), model, sae), saes


@pytest.mark.slow
@pytest.mark.parametrize("with_saes", [False, True])
def test_contributions_are_those_of_each_prompt(subject, with_saes):
    live, saes = subject
    saes = saes if with_saes else []
    found = feature_circuit(live, LATENT, saes=saes, max_tokens=None)
    assert found.n > 30
    total = np.zeros(len(found.parts))
    squares = {part.part: 0.0 for part in (*found.parts, *found.features)}
    everything = 0.0
    for n, position in enumerate(found.position.tolist()):
        block, query = divmod(position, live.index.block_size)
        tokens = torch.from_numpy(live.index.tokens_of(block)[: query + 1].astype(np.int64))
        circuit = PromptCircuit(live.model, live.sae, tokens, saes=saes)
        assert_allclose(circuit.root(LATENT, query).value, found.pre[n], **EXACT)
        by_part = circuit.split(LATENT, query).sum(0)  # [source, part]
        order = [circuit.stream.parts().index(part.part) for part in found.parts]
        assert_allclose(by_part[:, order].sum(0), found.contributions[n], **EXACT)
        total += by_part[:, order].sum(0).numpy()
        summed: dict[tuple, float] = {}
        for source in (s for h in circuit.expand(circuit.root(LATENT, query))[:-1] for s in circuit.expand(h)):
            for node in circuit.expand(source):
                key = (node.part, source.position)
                summed[key] = summed.get(key, 0.0) + node.value
        assert_allclose(sum(v for (p, _), v in summed.items() if p.kind == "feature"), found.of_features[n], **EXACT)
        for (part, _), value in summed.items():
            everything += value**2
            if part in squares:
                squares[part] += value**2
    for part in (*found.parts, *found.features):
        assert_allclose(part.share.value, squares[part.part] / everything, **EXACT)
    assert_allclose([p.by_head.sum() for p in found.parts], total / found.n, **EXACT)
    assert_allclose(found.contributions.sum(1) + found.of_features + found.constant, found.pre, **EXACT)
    assert found.residual < 1e-9
    assert sum(part.kind == "feature" for part in (f.part for f in found.features)) == (10 if with_saes else 0)


def test_what_an_earlier_head_read_sums_to_what_it_adds(subject):
    live, saes = subject
    for used in ([], saes[:1]):
        found = feature_circuit(live, LATENT, saes=used, k=1000)
        heads = [part for part in found.parts if part.part.kind == "head"]
        assert {part.part.layer for part in heads} == {0, 1}
        for part in heads:
            assert_allclose(sum(value for _, value in part.through), part.by_head.sum(), **EXACT)
            for tokens in (part.sources, part.origins):
                assert_allclose(sum(t.linear.value for t in tokens), 1, rtol=1e-7)
                assert_allclose(sum(t.share.value for t in tokens), 1, **EXACT)
        names = {read for part in heads for read, _ in part.through}
        assert (Part("features", 0, site="mlp_out") in names) == bool(used)


@examples(4)
@given(blocks=st.integers(1, 14))
def test_how_blocks_are_batched_changes_nothing(subject, blocks):
    live, saes = subject
    whole = feature_circuit(live, LATENT, saes=saes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuit_corpus, "_BLOCKS", blocks)
        parts = feature_circuit(live, LATENT, saes=saes)
    for a, b in zip((*whole.parts, *whole.features), (*parts.parts, *parts.features), strict=True):
        assert a.part == b.part
        assert_allclose([a.share.value, a.linear.value], [b.share.value, b.linear.value], **EXACT)
        assert [t.token for t in a.sources] == [t.token for t in b.sources]
        if a.share.null:
            assert_allclose(a.share.null.value, b.share.null.value, **EXACT)


def test_a_sample_is_part_of_the_whole_and_shares_have_intervals(subject):
    live, _ = subject
    whole, sample = (feature_circuit(live, LATENT, max_tokens=n, n_null=4) for n in (None, 40))
    assert sample.n == 40 < whole.n == whole.n_active == sample.n_active
    rows = np.searchsorted(whole.position, sample.position)
    assert_allclose(np.sort(sample.contributions.sum(1)), np.sort(whole.contributions[rows].sum(1)), **EXACT)
    assert_allclose(sum(part.share.value for part in whole.parts), 1, **EXACT)
    assert_allclose(sum(part.linear.value for part in whole.parts), 1, **EXACT)
    assert_allclose(sum(part.share.null.value for part in whole.parts), 1, **EXACT)
    first = whole.parts[0].share
    if len(np.unique(whole.document)) >= 10:
        assert first.low < first.value < first.high
    else:
        assert "documents" in first.missing


def test_what_does_not_fit_is_refused(subject, random_sae):
    live, _ = subject
    with pytest.raises(IndexFormatError, match="latent 20"):
        feature_circuit(live, 20)
    with pytest.raises(SAEError, match="layer before 2"):
        feature_circuit(live, 0, saes=[random_sae(live.model, 9, site=Site("mlp_out", 2))])


def test_a_feature_that_is_never_active_has_no_parts(subject):
    live, _ = subject
    dead = [j for j in range(20) if not live.index.feature(j).alive]
    found = feature_circuit(live, dead[0]) if dead else feature_circuit(live, LATENT, max_tokens=0)
    assert found.n == 0
    assert found.parts == found.features == ()
