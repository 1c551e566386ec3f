"""A forward pass written out, head by head, on the parts of a `transformers` model: what reads and edits must equal."""

import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from headscope.models.hf import Model
from headscope.site import Site

_LLAMA = ("model.layers", "input_layernorm", "self_attn", "o_proj", "post_attention_layernorm", "mlp", "model.norm")
_GEMMA = (*_LLAMA[:4], "pre_feedforward_layernorm", *_LLAMA[5:])
PATHS = {
    "gpt2": ("transformer.h", "ln_1", "attn", "c_proj", "ln_2", "mlp", "transformer.ln_f"),
    "gpt_neox": (
        "gpt_neox.layers",
        "input_layernorm",
        "attention",
        "dense",
        "post_attention_layernorm",
        "mlp",
        "gpt_neox.final_layer_norm",
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
}


def parts(model: Model, layer: int) -> dict[str, nn.Module]:
    """The modules of a layer by plain names, and the final norm; `post1` and `post2` where the family has them."""
    blocks, norm1, attention, projection, norm2, mlp, final = PATHS[model.spec.family]
    block = operator.attrgetter(blocks)(model.module)[layer]
    posts = {"post1": block.post_attention_layernorm, "post2": block.post_feedforward_layernorm} if gemma(model) else {}
    return {
        "block": block,
        "norm1": getattr(block, norm1),
        "attention": getattr(block, attention),
        "projection": getattr(getattr(block, attention), projection),
        "norm2": getattr(block, norm2),
        "mlp": getattr(block, mlp),
        "final": operator.attrgetter(final)(model.module),
        **posts,
    }


def gemma(model: Model) -> bool:
    return model.spec.family.startswith("gemma")


def scaling(model: Model) -> float:
    return getattr(model.module.config, "query_pre_attn_scalar", model.spec.d_head) ** -0.5


def capped(values: Tensor, cap: float | None) -> Tensor:
    return values if cap is None else torch.tanh(values / cap) * cap


def hidden(model: Model, layer: int, n: int) -> Tensor:
    """[query, source]: what a query does not see, the future and what is before its window."""
    config = model.module.config
    local = getattr(config, "layer_types", None) or [f"{model.spec.family == 'mistral'}"] * model.spec.n_layers
    window = config.sliding_window if local[layer] in ("sliding_attention", "True") else n
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (distance < 0) | (distance >= window)


@torch.no_grad()
def naive(
    model: Model, tokens: Tensor, edits: Mapping[Site, Callable[[Tensor], Tensor]] | None = None
) -> tuple[dict[Site, Tensor], Tensor]:
    """Every site as it is after its edit, and the logits."""
    edits, found = edits or {}, {}

    def at(kind: str, layer: int, value: Tensor) -> Tensor:
        site = Site(kind, layer)
        found[site] = edits[site](value) if site in edits else value
        return found[site]

    def normed(kind: str, layer: int, norm: nn.Module, x: Tensor) -> Tensor:
        layer_norm = isinstance(norm, nn.LayerNorm)
        centred = x - x.mean(-1, keepdim=True) if layer_norm else x
        eps = norm.eps if layer_norm or gemma(model) else norm.variance_epsilon
        scale = at(kind, layer, ((centred**2).mean(-1, keepdim=True) + eps) ** 0.5)
        if Site(kind, layer) not in edits:
            return norm(x)
        return centred / scale * (norm.weight + gemma(model)) + (norm.bias if layer_norm else 0)

    x = _embedded(model, tokens)
    for layer in range(model.spec.n_layers):
        p = parts(model, layer)
        x = at("resid_pre", layer, x)
        q, k, v = _qkv(model, layer, p["attention"], normed("ln1_scale", layer, p["norm1"], x))
        z = _mixed(model, layer, at, at("q", layer, q), at("k", layer, k), at("v", layer, v))
        attn_out = at("attn_out", layer, p.get("post1", nn.Identity())(p["projection"](at("z", layer, z))))
        mid = x if model.spec.parallel else at("resid_mid", layer, x + attn_out)
        mlp_in = at("mlp_in", layer, mid)
        mlp_out = p["mlp"](normed("ln2_scale", layer, p["norm2"], mlp_in))
        mlp_out = at("mlp_out", layer, p.get("post2", nn.Identity())(mlp_out))
        x = at("resid_post", layer, mid + mlp_out + (attn_out if model.spec.parallel else 0))
    final = normed("ln_final_scale", model.spec.n_layers - 1, parts(model, 0)["final"], x)
    logits = model.module.get_output_embeddings()(final)
    return found, capped(logits, getattr(model.module.config, "final_logit_softcapping", None))


def _embedded(model: Model, tokens: Tensor) -> Tensor:
    x = model.module.get_input_embeddings().weight[tokens]
    x = x * torch.tensor(model.spec.d_model**0.5).to(x) if gemma(model) else x  # transformers keeps it in float32
    return x + model.module.transformer.wpe.weight[: tokens.shape[1]] if model.spec.family == "gpt2" else x


def _qkv(model: Model, layer: int, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, position, head, d_head] each, rotated."""
    n_heads, n_kv_heads, d_head = model.spec.n_heads, model.spec.n_kv_heads, model.spec.d_head
    match model.spec.family:
        case "gpt2":
            return tuple(t.unflatten(-1, (n_heads, d_head)) for t in attention.c_attn(x).chunk(3, -1))
        case "gpt_neox":
            q, k, v = attention.query_key_value(x).unflatten(-1, (n_heads, 3, d_head)).unbind(3)
            rotary = model.module.gpt_neox.rotary_emb
        case _:
            q = attention.q_proj(x).unflatten(-1, (n_heads, d_head))
            k = attention.k_proj(x).unflatten(-1, (n_kv_heads, d_head))
            v = attention.v_proj(x).unflatten(-1, (n_kv_heads, d_head))
            if model.spec.family in ("qwen3", "gemma3_text"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            rotary = model.module.model.rotary_emb
    kind = [model.module.config.layer_types[layer]] if model.spec.family == "gemma3_text" else []
    cos, sin = rotary(x, torch.arange(x.shape[1])[None], *kind)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    quarter = torch.cat([-turned[..., n // 2 :], turned[..., : n // 2]], -1)
    return torch.cat([turned * cos[:, :, None] + quarter * sin[:, :, None], rest], -1)


def _mixed(model: Model, layer: int, at: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, pattern and z, one head at a time."""
    n_heads, groups = model.spec.n_heads, model.spec.n_heads // model.spec.n_kv_heads
    scores = torch.stack(
        [q[:, :, h] @ k[:, :, h // groups].transpose(1, 2) * scaling(model) for h in range(n_heads)], 1
    )
    scores = capped(scores, getattr(model.module.config, "attn_logit_softcapping", None))
    scores = at("scores", layer, scores.masked_fill(hidden(model, layer, q.shape[1]), -torch.inf))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    pattern = at("pattern", layer, weights / weights.sum(-1, keepdim=True))
    return torch.cat([pattern[:, h] @ v[:, :, h // groups] for h in range(n_heads)], -1)
