"""Attention of a `transformers` model, step by step for the layers where a step is read or edited, SDPA for all others.

`transformers` lets a model's attention function be exchanged by name. The one registered here calls SDPA, with SDPA's
masks, unless its layer is watched or caps its scores; so all other layers are unaffected, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headscope.errors import ModelError
from headscope.site import AnyKind

IMPLEMENTATION = "headscope"

ATTENTION_KINDS: tuple[AnyKind, ...] = ("q", "k", "v", "scores", "pattern")
"""Steps inside the attention function, out of reach of module hooks."""

Steps = Mapping[AnyKind, Callable[[Tensor], Tensor]]
"""For each of these kinds in use, a function of the value of that step that returns its replacement."""

_watched: dict[nn.Module, Steps] = {}  # by attention module


@dataclass(frozen=True)
class Attention:
    """One layer's attention, step by step: `z[b, q, h] = sum_s pattern[b, h, q, s] value[b, s, h]`."""

    pattern: Float[Tensor, "batch head query source"]
    value: Float[Tensor, "batch source head d_head"]
    """Includes b_V; shared value heads are repeated for each of their query heads."""
    z: Float[Tensor, "batch query z"]
    """Heads concatenated head-major: the input of the output projection."""


def repeat_heads(
    value: Float[Tensor, "batch source kv_head d_head"], n_heads: int
) -> Float[Tensor, "batch source head d_head"]:
    """Expand keys or values to query heads: shared ones are repeated for the query heads that share them, in order."""
    groups = n_heads // value.shape[2]
    return value if groups == 1 else value.repeat_interleave(groups, dim=2)


@contextmanager
def watching(model: PreTrainedModel, steps: Mapping[nn.Module, Steps]) -> Iterator[None]:
    """Within the block, the named attention modules pass their steps to these functions.

    Blocks nest: for a module named again the inner functions replace the outer ones.
    """
    if not steps:
        yield
        return
    outer = {module: _watched[module] for module in steps if module in _watched}
    implementation = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    _watched.update(steps)
    try:
        yield
    finally:
        for module in steps:  # those of models run by other threads stay
            del _watched[module]
        _watched.update(outer)
        model.set_attn_implementation(implementation)  # pyright: ignore[reportArgumentType] - a loaded model has one


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Shaped[Tensor, "batch 1 query source"] | None,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`transformers`' attention function, on `[batch, head, position, d_head]`; no mask means a causal one.

    A query that sees nothing, such as padding, has a pattern of zeros, as in SDPA.
    """
    steps = _watched.get(module, {})
    query = _by_position(steps, "q", query)
    key = _by_position(steps, "k", key)
    value = _by_position(steps, "v", value)
    if softcap is None and not steps.keys() & {"scores", "pattern"}:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n_heads, n_queries, n_sources = query.shape[1], query.shape[2], key.shape[2]
    key, value = (repeat_heads(t.transpose(1, 2), n_heads).transpose(1, 2) for t in (key, value))
    visible = attention_mask
    if visible is None:
        visible = torch.ones(n_queries, n_sources, dtype=torch.bool, device=query.device)
        visible = visible.tril(n_sources - n_queries)
    if visible.dtype != torch.bool:
        raise ModelError(
            f"an attention mask of {visible.dtype}, which adds to the scores",
            expected="a mask that says which tokens are seen",
            do="remove the hook that puts it there, or load the model that it was made from",
        )
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = _step(steps, "scores", scores.masked_fill_(~visible, -torch.inf))
    precise = torch.promote_types(scores.dtype, torch.float32)
    pattern = scores.softmax(-1, dtype=precise).to(query.dtype)
    if attention_mask is not None:
        pattern = pattern.masked_fill(~visible.any(-1, keepdim=True), 0)
    pattern = _step(steps, "pattern", pattern)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _step(steps: Steps, kind: AnyKind, value: Tensor) -> Tensor:
    return steps[kind](value) if kind in steps else value


def _by_position(steps: Steps, kind: AnyKind, value: Tensor) -> Tensor:
    """Apply the same to a value `[batch, head, position, d_head]`, passed as `[batch, position, head, d_head]`."""
    return steps[kind](value.transpose(1, 2)).transpose(1, 2) if kind in steps else value


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
