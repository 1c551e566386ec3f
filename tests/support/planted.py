"""A hand-built induction transformer whose every answer is known on paper.

Residual stream: E (token) | P (position) | PT (previous token) | OUT (prediction), one-hot blocks; no norm, no MLP.

    L0H0  attends from d to d-1 and copies E -> PT        L0H1  does nothing
    L1H0  attends to the position whose PT is the current token, else to the BOS; copies E -> OUT
    L1H1  attends to itself and copies E -> OUT at half strength

So z of layer 1 is the one-hot of the attended token, head by head. The planted SAE has a feature for each token in
each head's block: `f_b = relu(z_0[b] - 0.5)` is "b is next by induction", 0.5 where it is and 0 elsewhere.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from headscope.models.hf import Model
from headscope.sae.model import SAE, ReLU
from headscope.site import Site

V, T = 24, 40
D_HEAD = 56
E, P, PT, OUT = (slice(0, V), slice(V, V + T), slice(V + T, 2 * V + T), slice(2 * V + T, 3 * V + T))
SHARP = 60.0  # attention scores of a match: exp(-60) is far below the precision of any test
BOS = 0


class NoNorm(nn.Module):
    """In the place of a LayerNorm: leaves the residual stream as it is."""

    eps = 1e-5  # which models read of a norm

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 * D_HEAD, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def planted_model() -> Model:
    config = GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=2 * D_HEAD,
        n_layer=2,
        n_head=2,
        n_inner=1,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    gpt2 = GPT2LMHeadModel(config).double()
    for parameter in gpt2.parameters():
        parameter.data.zero_()
    transformer = gpt2.transformer
    transformer.ln_f = NoNorm()
    for block in transformer.h:
        block.ln_1, block.ln_2 = NoNorm(), NoNorm()
    transformer.wte.weight.data[:, E] = torch.eye(V, dtype=torch.float64)
    transformer.wpe.weight.data[:, P] = torch.eye(T, dtype=torch.float64)
    gpt2.lm_head.weight.data[:, OUT] = torch.eye(V, dtype=torch.float64)
    score = SHARP * D_HEAD**0.5

    first = Head(transformer.h[0].attn, 0)
    first.query[P, :T] = torch.eye(T, dtype=torch.float64) * score
    first.key[P, 1 : T + 1] = torch.eye(T, dtype=torch.float64)  # the key of position s is what position s+1 asks for
    first.value[E, :V] = torch.eye(V, dtype=torch.float64)
    first.output[:V, PT] = torch.eye(V, dtype=torch.float64)

    induction = Head(transformer.h[1].attn, 0)
    induction.query[E, :V] = torch.eye(V, dtype=torch.float64) * score
    induction.key[PT, :V] = torch.eye(V, dtype=torch.float64)
    induction.query_bias[V] = score / 2
    induction.key[E.start + BOS, V] = 1.0  # the sink: half the score of a match, for any query
    induction.key[PT.start + BOS, :V] = 0.0  # nothing counts as preceded by the BOS
    induction.value[E, :V] = torch.eye(V, dtype=torch.float64)
    induction.output[:V, OUT] = torch.eye(V, dtype=torch.float64)

    own = Head(transformer.h[1].attn, 1)
    own.query[P, :T] = torch.eye(T, dtype=torch.float64) * score
    own.key[P, :T] = torch.eye(T, dtype=torch.float64)
    own.value[E, :V] = torch.eye(V, dtype=torch.float64)
    own.output[:V, OUT] = torch.eye(V, dtype=torch.float64) * 0.5
    return Model(gpt2, word_tokenizer(V), BOS, "planted")


class Head:
    """Views of one head's weights in a GPT-2 attention layer."""

    def __init__(self, attention: nn.Module, head: int) -> None:
        d = 2 * D_HEAD
        columns = slice(head * D_HEAD, (head + 1) * D_HEAD)
        qkv, bias = attention.c_attn.weight.data, attention.c_attn.bias.data
        self.query, self.key, self.value = (qkv[:, i * d : (i + 1) * d][:, columns] for i in range(3))
        self.query_bias = bias[:d][columns]
        self.output = attention.c_proj.weight.data[columns]


def word_tokenizer(n: int) -> Tokenizer:
    words = {"<bos>": 0} | {f"w{i}": i for i in range(1, n)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<bos>"])
    return tokenizer


def planted_sae() -> SAE:
    """Latent b: token b by induction. Latent V + b: the current token is b. Latent 2V: token 5 by induction at a 3."""
    encoder = torch.zeros(2 * D_HEAD, 2 * V + 1, dtype=torch.float64)
    encoder[:V, :V] = torch.eye(V, dtype=torch.float64)
    encoder[D_HEAD : D_HEAD + V, V : 2 * V] = torch.eye(V, dtype=torch.float64)
    encoder[5, 2 * V], encoder[D_HEAD + 3, 2 * V] = 0.8, 0.6
    bias = torch.full((2 * V + 1,), -0.5, dtype=torch.float64)
    bias[2 * V] = -1.0  # 0.8 + 0.6 - 1 > 0: only when both heads see their token
    return SAE(
        W_enc=encoder,
        b_enc=bias,
        W_dec=encoder.T.contiguous(),
        b_dec=torch.zeros(2 * D_HEAD, dtype=torch.float64),
        activation=ReLU(),
        site=Site("z", 1),
        model_name="planted",
    )


def induction_sequences(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct random tokens, `BOS ... A B ... A`; returns tokens, position of B, and B itself."""
    generator = torch.Generator().manual_seed(seed)
    length = V - 1
    rows, where, second = [], [], []
    for _ in range(n):
        words = 1 + torch.randperm(V - 1, generator=generator)[: length - 1]
        at = int(torch.randint(1, length - 3, (1,), generator=generator))  # of A among the words; never right after BOS
        rows.append(torch.cat([torch.tensor([BOS]), words, words[at : at + 1]]))
        where.append(at + 2)
        second.append(words[at + 1])
    return torch.stack(rows), torch.tensor(where), torch.stack(second)
