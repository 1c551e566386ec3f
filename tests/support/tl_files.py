"""Checkpoints in TransformerLens' format with random weights, as files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 24, "n_ctx": 20, "d_vocab": 98}
KINDS: dict[str, dict[str, Any]] = {
    "gelu": {"act_fn": "gelu"},
    "gelu_new": {"act_fn": "gelu_new"},
    "relu": {"act_fn": "relu", "eps": 1e-3},
    "solu_ln": {"act_fn": "solu_ln"},
    "attn_only": {"act_fn": "gelu", "attn_only": True},
}
NORMS = ("LN", "LNPre")


def configuration(kind: str = "gelu", norm: str = "LN", **changes: Any) -> dict[str, Any]:
    return SIZES | {"normalization_type": norm, "positional_embedding_type": "standard"} | KINDS[kind] | changes


def random_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under TransformerLens' names, float64."""
    n, d, h, e, m, c, v = (config[name] for name in SIZES)
    attention_only, folded = config.get("attn_only", False), config["normalization_type"] == "LNPre"
    shapes = {"embed.W_E": (v, d), "pos_embed.W_pos": (c, d), "unembed.W_U": (d, v), "unembed.b_U": (v,)}
    norms = {"ln_final": d}
    for i in range(n):
        attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        shapes |= {f"{attn}.W_O": (h, e, d), f"{attn}.b_O": (d,)}
        for p in "QKV":
            shapes |= {f"{attn}.W_{p}": (h, d, e), f"{attn}.b_{p}": (h, e)}
        norms[f"blocks.{i}.ln1"] = d
        if not attention_only:
            shapes |= {f"{mlp}.W_in": (d, m), f"{mlp}.b_in": (m,), f"{mlp}.W_out": (m, d), f"{mlp}.b_out": (d,)}
            norms[f"blocks.{i}.ln2"] = d
            if config["act_fn"] == "solu_ln":
                norms[f"{mlp}.ln"] = m
    if not folded:
        shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in "wb"}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(s, generator=generator, dtype=torch.float64) * 0.6 for name, s in shapes.items()}
    return {name: 1 + 0.3 * t if name.endswith(".w") else t for name, t in state.items()}


def write_checkpoint(
    folder: Path,
    tokenizer: Tokenizer,
    state: Any = None,
    config: Any = None,
    *,
    suffix: str = ".pth",
    config_name: str = "tl_config.json",
) -> Path:
    """Write a folder, tokenizer included; without a configuration that of gelu models, without weights random ones."""
    config = configuration() if config is None else config
    if state is None:
        state = {name: t.float() for name, t in random_state(config).items()}
    folder.mkdir(exist_ok=True)
    if suffix == ".safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / f"model_final{suffix}")
    (folder / config_name).write_text(json.dumps(config))
    copied = Tokenizer.from_str(tokenizer.to_str())
    PreTrainedTokenizerFast(tokenizer_object=copied, bos_token="<|bos|>").save_pretrained(folder)
    return folder
