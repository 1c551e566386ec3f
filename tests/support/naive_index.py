"""All that an index says, written out as loops over active tokens, on the forward pass of `naive_model`."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from headscope.corpus import Corpus
from headscope.models.hf import Model
from headscope.sae.model import SAE, JumpReLU, TopK
from headscope.site import Site
from naive_model import _qkv, naive, parts


@dataclass(frozen=True)
class Pair:
    """An active token of a latent."""

    position: int
    f: float
    pre: float
    dfa: np.ndarray
    """[head, source], sources up to the query."""
    pattern: np.ndarray
    """[head, source]."""
    tokens: np.ndarray
    """At the sources."""

    @property
    def heads(self) -> np.ndarray:
        return self.dfa.sum(1)

    @property
    def stored(self) -> float:
        """The activation as tables hold it."""
        return float(np.float32(self.f))

    def kept(self, k: int | None) -> list[int]:
        """Sources by |DFA| summed over heads, largest first."""
        order = sorted(range(len(self.tokens)), key=lambda s: (-abs(self.dfa[:, s].sum()), s))
        return order if k is None else order[:k]


@dataclass(frozen=True)
class Naive:
    """What was found of one SAE on a corpus."""

    model: Model
    sae: SAE
    corpus: Corpus
    offset: np.ndarray
    """c [head, d_head]."""
    encoder: np.ndarray
    """[head, d_head, d_sae]."""
    bias: np.ndarray
    pairs: dict[int, list[Pair]]
    dense: np.ndarray
    """Activations [position of the corpus that is text, d_sae]."""
    z: np.ndarray
    """At the same positions."""
    attention: np.ndarray
    """[d_vocab, head]: from all text tokens to sources of each token type."""
    source_pairs: np.ndarray
    """Destinations and sources, by token type of the source."""
    losses: np.ndarray
    """[block, position], NaN at the last."""

    @property
    def n_tokens(self) -> int:
        return len(self.dense)


def values_of(model: Model, layer: int, normed: torch.Tensor) -> np.ndarray:
    """[row, head, d_head] values that a layer makes of rows of its norm's output."""
    v = _qkv(model, layer, parts(model, layer)["attention"], normed[None])[2][0]
    return v.repeat_interleave(model.spec.n_heads // model.spec.n_kv_heads, dim=1).detach().double().numpy()


def value_constant(model: Model, layer: int) -> np.ndarray:
    """c [head, d_head]: the values of the norm's own bias."""
    bias = getattr(parts(model, layer)["norm1"], "bias", None)
    zero = torch.zeros(model.spec.d_model, dtype=model.module.dtype)
    return values_of(model, layer, (zero if bias is None else bias)[None])[0]


def value_weights(model: Model, layer: int) -> np.ndarray:
    """W_V [head, d_model, d_head], the norm's gain folded in."""
    zero = torch.zeros(model.spec.d_model, dtype=model.module.dtype)
    gain = torch.diag(parts(model, layer)["norm1"].weight)
    return (values_of(model, layer, gain) - values_of(model, layer, zero[None])).transpose(1, 0, 2)


def token_values(model: Model, layer: int) -> np.ndarray:
    """[d_vocab, head, d_head] through a hook on the module that makes values, each token read alone mid-context."""
    attention, seen = parts(model, layer)["attention"], []
    n_heads, d_head = model.spec.n_heads, model.spec.d_head
    module: nn.Module = {
        "gpt2": lambda: attention.c_attn,
        "gpt_neox": lambda: attention.query_key_value,
        "llama": lambda: attention.v_proj,
    }[model.spec.family]()
    handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output[0, 0]))
    with torch.no_grad():
        for t in range(model.spec.d_vocab):
            model.module(torch.tensor([[t]]), position_ids=torch.tensor([[model.spec.context // 2]]), use_cache=False)
    handle.remove()
    out = torch.stack(seen)
    match model.spec.family:
        case "gpt2":
            v = out.chunk(3, -1)[2].unflatten(-1, (n_heads, d_head))
        case "gpt_neox":
            v = out.unflatten(-1, (n_heads, 3, d_head))[:, :, 2]
        case "llama":
            v = out.unflatten(-1, (model.spec.n_kv_heads, d_head))
            v = v.repeat_interleave(n_heads // model.spec.n_kv_heads, dim=1)
    return v.double().numpy()


def logit_table(naive_: Naive) -> np.ndarray:
    """[d_sae, d_vocab] direct logit effects."""
    model, sae = naive_.model, naive_.sae
    projection = parts(model, sae.site.layer)["projection"]
    weight = projection.weight.detach().double().numpy()
    w_o = weight if model.spec.family == "gpt2" else weight.T
    final = parts(model, 0)["final"]
    u = sae.W_dec.double().numpy() @ w_o
    if isinstance(final, nn.LayerNorm):
        u = u - u.mean(1, keepdims=True)
    effects = (u * final.weight.detach().double().numpy()) @ (
        model.module.get_output_embeddings().weight.detach().double().numpy().T
    )
    return effects - effects.mean(1, keepdims=True)


def activate(sae: SAE, pre: np.ndarray) -> np.ndarray:
    """The activation function on one token's pre-activations."""
    f = np.maximum(pre, 0)
    match sae.activation:
        case JumpReLU(threshold):
            f[pre <= threshold.double().numpy()] = 0
        case TopK(k):
            f[np.argsort(-pre)[k:]] = 0
    return f


def naive_index(model: Model, sae: SAE, corpus: Corpus) -> Naive:
    """Read the corpus block by block, token by token, latent by latent."""
    layer, size = sae.site.layer, corpus.block_size
    n_heads, d_head = model.spec.n_heads, model.spec.d_head
    w_enc, b_enc, b_dec = (getattr(sae, name).double().numpy() for name in ("W_enc", "b_enc", "b_dec"))
    encoder = w_enc.reshape(n_heads, d_head, -1)
    c = value_constant(model, layer)
    own_bias = b_enc - (b_dec @ w_enc if sae.apply_b_dec_to_input else 0)
    pairs: dict[int, list[Pair]] = {j: [] for j in range(sae.d_sae)}
    dense, rows = [], []
    attention = np.zeros((model.spec.d_vocab, n_heads))
    source_pairs = np.zeros(model.spec.d_vocab, dtype=int)
    losses = np.full(corpus.blocks.shape, np.nan)
    for b, block in enumerate(corpus.blocks):
        tokens = torch.from_numpy(block.astype(np.int64))
        sites, logits = naive(model, tokens[None])
        losses[b, :-1] = nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
        pattern = sites[Site("pattern", layer)][0].double().numpy()
        v = sites[Site("v", layer)][0].double().numpy().repeat(n_heads // model.spec.n_kv_heads, axis=1)
        for q in range(size):
            if block[q] == model.bos:
                continue
            z = np.stack([pattern[h, q, : q + 1] @ v[: q + 1, h] for h in range(n_heads)])
            pre = z.reshape(-1) @ w_enc + own_bias
            f = activate(sae, pre)
            dense.append(f)
            rows.append(z.reshape(-1))
            for s in range(q + 1):
                attention[block[s]] += pattern[:, q, s]
                source_pairs[block[s]] += 1
            for j in np.flatnonzero(f):
                dfa = np.array(
                    [
                        [pattern[h, q, s] * ((v[s, h] - c[h]) @ encoder[h, :, j]) for s in range(q + 1)]
                        for h in range(n_heads)
                    ]
                )
                pairs[int(j)].append(Pair(b * size + q, f[j], pre[j], dfa, pattern[:, q, : q + 1], block[: q + 1]))
    bias = own_bias + c.reshape(-1) @ w_enc
    return Naive(
        model, sae, corpus, c, encoder, bias, pairs, np.array(dense), np.array(rows), attention, source_pairs, losses
    )


def histogram_bin(f: float, maximum: float, bins: int) -> int:
    """Of equal bins from 0 to the maximum, in exact arithmetic."""
    return min(int(Fraction(f) * bins / Fraction(maximum)), bins - 1)


def head_sums(values: list[np.ndarray], p: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares of squares, covariance and mean of some tokens' contributions by head."""
    heads, p_ = np.array(values), np.array(p)
    squares = np.array([sum(row[h] ** 2 for row in heads) for h in range(heads.shape[1])])
    if len(p) > 1:
        covariance = np.array([np.cov(heads[:, h], p_, bias=True)[0, 1] / p_.var() for h in range(heads.shape[1])])
    else:
        covariance = np.full(heads.shape[1], np.nan)
    return squares / squares.sum(), covariance, heads.mean(0) / heads.mean(0).sum()


def source_rows(naive_: Naive, latent: int, threshold: float, k: int | None) -> tuple[dict, dict]:
    """({token: its row}, totals) of one latent over the active tokens above a threshold."""
    n_heads = naive_.model.spec.n_heads
    totals = {"n": 0, "d2": 0.0, "d": 0.0, "kept": 0.0, "bos": 0.0}
    totals |= {name: np.zeros(n_heads) for name in ("heads", "kept_heads", "bos_heads")}
    rows: dict[int, dict] = {}
    for pair in naive_.pairs[latent]:
        if pair.f <= threshold:
            continue
        totals["n"] += 1
        for s in range(len(pair.tokens)):
            totals["d2"] += pair.dfa[:, s].sum() ** 2
            totals["d"] += pair.dfa[:, s].sum()
            totals["heads"] += pair.dfa[:, s] ** 2
        for s in pair.kept(k):
            own = pair.dfa[:, s].sum()
            totals["kept"] += own**2
            totals["kept_heads"] += pair.dfa[:, s] ** 2
            if pair.tokens[s] == naive_.model.bos:
                totals["bos"] += own**2
                totals["bos_heads"] += pair.dfa[:, s] ** 2
            row = rows.setdefault(
                int(pair.tokens[s]),
                {"n": 0, "d2": 0.0, "d": 0.0, "heads": np.zeros(n_heads), "attention": np.zeros(n_heads)},
            )
            row["n"] += 1
            row["d2"] += own**2
            row["d"] += own
            row["heads"] += pair.dfa[:, s] ** 2
            row["attention"] += pair.pattern[:, s]
    found = {}
    for token, row in rows.items():
        if token == naive_.model.bos:
            continue
        elsewhere = naive_.source_pairs[token] - row["n"]
        found[token] = {
            "n": row["n"],
            "share": row["d2"] / totals["d2"],
            "share_linear": row["d"] / totals["d"],
            "share_by_head": row["heads"] / totals["heads"],
            "attention": row["attention"] / row["n"],
            "attention_elsewhere": (naive_.attention[token] - row["attention"]) / elsewhere if elsewhere else None,
            "frequency": (naive_.corpus.blocks == token).sum() / (naive_.corpus.blocks != naive_.corpus.bos).sum(),
        }
    return found, totals


def distinct_top(naive_: Naive, latent: int, n: int) -> list[tuple[int, int]]:
    """(position, further tokens with the same 15 tokens around them) of the strongest active tokens."""
    size, blocks = naive_.corpus.block_size, naive_.corpus.blocks
    texts: dict[tuple, list[int]] = {}
    for pair in sorted(naive_.pairs[latent], key=lambda p: (-p.stored, p.position))[: 20 * n]:
        block, q = divmod(pair.position, size)
        text = tuple(int(blocks[block, at]) if 0 <= at < size else -1 for at in range(q - 10, q + 5))
        texts.setdefault(text, []).append(pair.position)
    return [(positions[0], len(positions) - 1) for positions in texts.values()][:n]
