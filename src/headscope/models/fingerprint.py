"""Identity of a model: a hash of all that determines its function, the same under every version of `transformers`.

Weights are hashed by role (`block.3.self_attn.v_proj.weight`, `unembedding.weight`), settings by their meaning
(`settings.py`). Module names of a version of `transformers`, settings of generation or training, and parts of a model
that text never reaches are ignored.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headscope.models.families import Family
from headscope.models.settings import computed
from headscope.models.spec import ModelSpec

_NOT_HASHED_EARLIER = {"architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version", "use_cache"}
_RENAMED = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
"""The unembedding of GPT-NeoX, in versions of `transformers` before and from 5.14."""


def fingerprint(
    module: PreTrainedModel, family: Family, spec: ModelSpec, bos: int, dtype: torch.dtype | None = None
) -> str:
    """Return `sha256:<hex>` of a model's settings, BOS and weights; with a dtype, of its weights rounded to it."""
    digest = hashlib.sha256(_json([computed(module.config, spec), bos]))
    hashed: dict[tuple[Any, ...], str] = {}  # tied weights are read once
    for role, tensor in sorted(_by_role(module, family)):
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in hashed:
            own = _rounded(tensor, dtype)
            hashed[key] = f"{own.dtype} {hashlib.sha256(_bytes(own)).hexdigest()}"
        digest.update(f"{role} {tuple(tensor.shape)} {hashed[key]}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@torch.no_grad()
def checksum(*tensors: Tensor) -> tuple[int, ...]:
    """Checksum tensors in a hundredth of the time of a hash; only comparable within a process.

    Tensor versions are no substitute: `tensor.data` and fused optimisers change values and not versions.
    """
    return tuple(int(_sum_of_bits(tensor)) for tensor in tensors if tensor.numel())


def _sum_of_bits(tensor: Tensor) -> Tensor:
    rows = (tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)).contiguous()
    if rows.shape[1] * rows.itemsize % 8:
        rows = rows.double()
    sums = rows.view(torch.int64).sum(1)  # of integers, so the same in any order
    return (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()


def earlier_fingerprints(module: PreTrainedModel, bos: int, dtype: torch.dtype | None = None) -> Iterator[str]:
    """Return hashes of the same model by earlier versions, which included names and the whole configuration.

    Each spelling used by a version of `transformers` is included.
    """
    own = {k: v for k, v in module.config.to_dict().items() if k not in _NOT_HASHED_EARLIER and k[0] != "_"}
    configs, renames = [own], [{}]
    if module.config.model_type == "gpt_neox":
        renames.append(_RENAMED)
    if module.config.model_type == "gemma3_text":  # before 5.14
        configs.append(own | {"rope_parameters": own["rope_parameters"] | {"rope_theta": None, "rope_type": "default"}})
    state = module.state_dict(keep_vars=True)
    for config in configs:
        for names in renames:
            digest = hashlib.sha256(_json([config, bos]))
            for name, tensor in sorted((names.get(name, name), tensor) for name, tensor in state.items()):
                rounded = _rounded(tensor, dtype)
                digest.update(f"{name} {tuple(rounded.shape)} {rounded.dtype}\n".encode())
                digest.update(_bytes(rounded))
            yield f"sha256:{digest.hexdigest()}"


def _by_role(module: PreTrainedModel, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Return the weights and persistent buffers that text reaches, by role."""
    body = family.blocks.rpartition(".")[0]
    roles = {family.blocks: "block", family.final_norm: "final_norm", body: "body"}
    ends = {module.get_input_embeddings(): "embedding", module.get_output_embeddings(): "unembedding"}
    roles |= {name: ends[part] for name, part in module.named_modules(remove_duplicate=False) if part in ends}
    for name, tensor in module.state_dict(keep_vars=True).items():
        owners = [path for path in roles if name.startswith(f"{path}.")]
        if owners:
            path = max(owners, key=len)
            yield roles[path] + name[len(path) :], tensor


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round a weight to another precision; buffers keep theirs, as when a model is loaded."""
    return tensor.to(dtype) if dtype is not None and isinstance(tensor, nn.Parameter) else tensor


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
