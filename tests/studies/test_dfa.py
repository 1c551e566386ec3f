"""`headscope.dfa`: the attribution of a feature on a text, against the naive sum and the other ways to have it."""

import numpy as np
import pytest
import torch

import headscope
from dive_index import COMMON, built_live
from headscope.errors import CorpusError, ModelError, SAEError, StudyError
from headscope.index.live import LiveIndex
from headscope.site import Site
from headscope.studies.prompt.dfa import dfa
from headscope.studies.prompt.prompts import Prompts

TEXT = "def add(one, two):"


@pytest.fixture(scope="module")
def live(random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    return built_live(random_model, random_corpus, random_sae, tmp_path_factory.mktemp("dfa") / "index")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_it_is_the_naive_sum_and_closes(random_model, random_sae, family: str) -> None:
    model = random_model(family)
    sae = random_sae(model, 30)
    for latent in (0, 7):
        found = dfa(model, sae, TEXT, latent, position=6)
        tokens = torch.from_numpy(found.tokens)[None]
        attention = model.attention(tokens, sae.site.layer)
        encoder = sae.W_enc[:, latent].view(model.spec.n_heads, -1)
        offset = model.value_offset(sae.site.layer).view(model.spec.n_heads, -1)
        for h in range(model.spec.n_heads):
            for s in range(7):
                value = attention.value[0, s, h] - offset[h]
                naive = (attention.pattern[0, h, 6, s] * value @ encoder[h]).item()
                assert found.by_source[h, s] == pytest.approx(naive, rel=1e-4, abs=1e-6)
        assert found.by_head.sum() + found.bias == pytest.approx(found.pre, rel=1e-5, abs=1e-5)
        assert found.sources.sum() == pytest.approx(found.by_head.sum(), rel=1e-5, abs=1e-6)
        z = model.read(tokens, [sae.site])[sae.site][0, 6]
        assert found.pre == pytest.approx(sae.pre_activations(z)[latent].item(), rel=1e-5, abs=1e-6)
        assert abs(found.residual) < 1e-4


def test_without_a_position_it_is_where_the_feature_is_largest(live: LiveIndex) -> None:
    found = dfa(live.model, live.sae, TEXT, COMMON)
    every = [dfa(live.model, live.sae, TEXT, COMMON, position=p).pre for p in range(1, len(TEXT) + 1)]
    assert found.pre == pytest.approx(max(every), rel=1e-6)
    assert found.query == 1 + int(np.argmax(every))


def test_tokens_index_and_prompt_say_the_same(live: LiveIndex) -> None:
    block = live.index.tokens_of(3)[:20].tolist()
    found = dfa(live.model, live.sae, block, COMMON, position=19)
    [stored] = live.dfa(3 * live.index.block_size + 19, [COMMON])
    prompted = Prompts(live).dfa(block, COMMON, 19)
    for other in (stored, prompted):
        np.testing.assert_allclose(other.by_source, found.by_source, rtol=1e-5, atol=1e-6)
        assert other.pre == pytest.approx(found.pre, rel=1e-6)
        assert other.tokens.tolist() == block


def test_names_are_enough() -> None:
    found = headscope.dfa("tiny", "tiny-z1", "import os\nos._exit(os._", latent=1540)
    assert found.by_source.sum() + found.bias == pytest.approx(found.pre, abs=1e-4)
    assert found.activation > 0


@pytest.mark.usefixtures("no_type_checks")
def test_what_there_is_not_is_refused(live: LiveIndex, random_sae) -> None:
    ask = [
        (lambda: dfa(live.model, live.sae, TEXT, live.sae.d_sae), StudyError, "latent"),
        (lambda: dfa(live.model, live.sae, TEXT, -1), StudyError, "latent -1"),
        (lambda: dfa(live.model, live.sae, TEXT, 0, position=99), StudyError, "position 99"),
        (lambda: dfa(live.model, live.sae, TEXT, True), StudyError, "latent True"),
        (lambda: dfa(live.model, live.sae, TEXT, 0, position=2.0), StudyError, "position 2.0"),
        (lambda: dfa(live.model, live.sae, "", 0), CorpusError, "an empty prompt"),
        (lambda: dfa(live.model, random_sae(live.model, 8, site=Site("mlp_out", 0)), TEXT, 0), SAEError, "one of z"),
        (lambda: dfa("./no-such-model", live.sae, TEXT, 0), ModelError, "no-such-model"),
    ]
    for call, error, said in ask:
        with pytest.raises(error, match=said):
            call()


def test_ids_without_a_bos_may_be_largest_at_their_first_token(live: LiveIndex) -> None:
    tokens = [token for token in live.index.tokens_of(0).tolist() if token != live.model.bos]
    for latent in range(8):
        every = [dfa(live.model, live.sae, tokens, latent, position=p).pre for p in range(len(tokens))]
        assert dfa(live.model, live.sae, tokens, latent).query == int(np.argmax(every))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too(random_model, random_sae, dtype: torch.dtype) -> None:
    model = random_model("llama", dtype=dtype)
    found = dfa(model, random_sae(model, 20), TEXT, 3, position=5)
    assert found.by_source.dtype == (np.float32 if dtype == torch.bfloat16 else np.float16)
    assert found.by_source.sum() + found.bias == pytest.approx(found.pre, abs=0.1)
