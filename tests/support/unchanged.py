"""A model that tests share must be at the end what it was at the start."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headscope.models import attention
from headscope.models.hf import Model


def tensors_of(model: Model) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    tensors = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    return {name: tensor.clone() for name, tensor in tensors.items()}


@contextmanager
def left_unchanged(model: Model) -> Iterator[None]:
    """Check at the end of the block that weights, configuration and hooks are those of its start, bit for bit."""
    fingerprint, before = model.fingerprint(), tensors_of(model)
    implementation = model.module.config._attn_implementation
    yield
    after = tensors_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "weights changed"
    assert model.fingerprint() == fingerprint
    assert model.module.config._attn_implementation == implementation
    assert implementation == ("sdpa" if model.spec.scores_cap is None else attention.IMPLEMENTATION)
    assert not attention._watched
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules()), "hooks were left"
    assert not model.module.training
