"""Tokens that a model cannot read are refused before it runs, by name, whatever its family would do with them."""

import pytest
import torch

from headscope.errors import ModelError
from headscope.models.tokens import TokenCheck
from headscope.site import Site

FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2")
Z = Site("z", 1)


def calls(model):
    """Every way in which a user gives tokens to a model."""
    return {
        "read": lambda tokens: model.read(tokens, [Z]),
        "attention": lambda tokens: model.attention(tokens, 0),
        "attentions": lambda tokens: model.attentions(tokens, [0, 1]),
        "logits": model.logits,
        "losses": model.losses,
        "loss_gradient": lambda tokens: model.loss_gradient(tokens, Z),
    }


@pytest.fixture(scope="module")
def models(random_model):
    return {family: random_model(family) for family in FAMILIES}


@pytest.mark.parametrize("call", ["read", "attention", "attentions", "logits", "losses", "loss_gradient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_a_model_cannot_read_are_refused(models, family, call, no_type_checks):
    model = models[family]
    run, spec = calls(model)[call], model.spec
    ids = torch.arange(spec.context)[None] % spec.d_vocab
    run(ids)
    run(ids.int())
    refused = {
        rf"{spec.context + 1} tokens in a sequence[\s\S]*at most {spec.context}, the context": ids[:, [0, *ids[0]]],
        rf"token id {spec.d_vocab}[\s\S]*0 to {spec.d_vocab - 1}: the vocabulary": torch.tensor([[0, spec.d_vocab]]),
        r"token id -1\s[\s\S]*own tokenizer": torch.tensor([[3, -1]]),
        "batch of 0 sequences of 5 tokens": ids[:0, :5],
        "batch of 2 sequences of 0 tokens[\\s\\S]*model.bos": torch.empty(2, 0, dtype=torch.int64),
        r"torch.float32 in 2 dimensions[\s\S]*int64": torch.ones(1, 3),
        "torch.int64 in 1 dimensions[\\s\\S]*one row for each": ids[0],
    }
    refused["tokens of list[\\s\\S]*torch.tensor"] = [[1, 2]]
    for message, tokens in refused.items():
        with pytest.raises(ModelError, match=message):
            run(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_single_tokens_too(models, family):
    model = models[family]
    with pytest.raises(ModelError, match=f"token id {model.spec.d_vocab}"):
        model.token_values(0, torch.tensor([1, model.spec.d_vocab]))


def test_padding_does_not_count_for_the_context(models, no_type_checks):
    model = models["gpt2"]
    n = model.spec.context
    ids = torch.arange(n)[None] % model.spec.d_vocab
    padded, attended = torch.cat([ids[:, :3], ids], 1), torch.ones(1, n + 3, dtype=torch.bool)
    attended[0, :3] = False
    torch.testing.assert_close(model.logits(padded, attended=attended)[:, 3:], model.logits(ids), rtol=1e-4, atol=1e-4)
    attended[0, 2] = True
    with pytest.raises(ModelError, match=f"{n + 1} tokens in a sequence"):
        model.read(padded, [Z], attended=attended)
    for wrong in (attended[:, :-1], attended.float()):
        with pytest.raises(ModelError, match=r"(?s)`attended` of .*a mask, torch\.bool"):
            model.read(padded, [Z], attended=wrong)


def test_a_model_says_which_tokens_it_reads_after_a_wrong_batch_too(models):
    model, tokens = models["llama"], torch.tensor([[1, 2, 3]])
    expected = model.logits(tokens)
    with pytest.raises(ModelError, match="token id"):
        model.logits(tokens + model.spec.d_vocab)
    assert torch.equal(model.logits(tokens), expected)


def test_the_same_tokens_are_looked_at_once_until_they_change(monkeypatch):
    """So that an accelerator is waited for once a batch."""
    looked, aminmax = [], torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda tokens: looked.append(tokens) or aminmax(tokens))
    check, tokens = TokenCheck("model", 8, 50), torch.tensor([[1, 2, 3]])
    for _ in range(3):
        check(tokens)
    assert len(looked) == 1
    check(tokens.clone())
    assert len(looked) == 2
    check(tokens)
    tokens[0, 1] = 50
    with pytest.raises(ModelError, match="token id 50"):
        check(tokens)
    with pytest.raises(ModelError, match="token id 50"):
        check(tokens)
    with torch.inference_mode():
        ids = torch.tensor([[1, 2, 3]])
        check(ids)
        ids[0, 1] = -4
        with pytest.raises(ModelError, match="token id -4"):
            check(ids)
