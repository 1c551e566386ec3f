"""SAEs written by hand in the formats of other programs: what their own code puts on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from headscope.sae.formats import save_sae
from headscope.sae.model import SAE, JumpReLU, TopK

Settings = dict[str, Any]


def weights(sae: SAE) -> dict[str, torch.Tensor]:
    return {name: getattr(sae, name).clone().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def write_authors(sae: SAE, folder: Path, **changes: Any) -> Path:
    """As the post's `train.py` does; the model's weights were processed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gelu-2l_L1_Hcat_z_v78.pt"
    torch.save(weights(sae), path)
    config = {
        "model_name": sae.model_name,
        "site": sae.site.kind,
        "layer": sae.site.layer,
        "act_name": sae.site.hook_name,
        "act_size": sae.d_in,
        "dict_size": sae.d_sae,
        "head": "cat",
        "concat_heads": True,
        "seq_len": 128,
        "enc_dtype": "fp32",
        "l1_coeff": 2.0,
    }
    path.with_name("gelu-2l_L1_Hcat_z_v78_cfg.json").write_text(json.dumps(config | changes))
    return path


def write_gemma_scope(sae: SAE, folder: Path) -> Path:
    assert isinstance(sae.activation, JumpReLU)
    assert not sae.apply_b_dec_to_input
    place = {"z": "att", "mlp_out": "mlp"}[sae.site.kind]
    path = folder / f"gemma-scope-2b-pt-{place}" / f"layer_{sae.site.layer}" / "width_16k" / "average_l0_85"
    path.mkdir(parents=True)
    tensors = weights(sae) | {"threshold": sae.activation.threshold}
    np.savez(path / "params.npz", **{name: t.numpy() for name, t in tensors.items()})
    return path


def write_gemma_scope_2(sae: SAE, folder: Path, **changes: Any) -> Path:
    assert isinstance(sae.activation, JumpReLU)
    folder.mkdir(parents=True)
    tensors = {name.replace("W_", "w_"): t for name, t in weights(sae).items()}
    save_file(tensors | {"threshold": sae.activation.threshold}, folder / "params.safetensors")
    place = {"z": "self_attn.o_proj.input", "mlp_out": "post_feedforward_layernorm.output"}[sae.site.kind]
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": f"model.layers.{sae.site.layer}.{place}",
        "width": sae.d_sae,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def write_dictionary_learning(sae: SAE, folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    linear = {
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T.contiguous(),
    }
    match sae.activation:
        case TopK(k):
            own = {"b_dec": sae.b_dec, "k": torch.tensor(k), "threshold": torch.tensor(-1.0)}
            state, name = linear | own, "AutoEncoderTopK"
        case JumpReLU(threshold):
            state, name, k = weights(sae) | {"threshold": threshold}, "JumpReluAutoEncoder", None
        case _:
            state, name, k = linear | {"bias": sae.b_dec}, "AutoEncoder", None
    torch.save(state, folder / "ae.pt")
    trainer = {
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "layer": sae.site.layer,
        "lm_name": sae.model_name,
        "submodule_name": f"{sae.site.kind}_layer_{sae.site.layer}",
        **({"k": k} if k else {}),
    }
    config = {"trainer": trainer | changes, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sparsify(sae: SAE, folder: Path, **changes: Any) -> Path:
    assert isinstance(sae.activation, TopK)
    path = folder / f"layers.{sae.site.layer}.{ {'attn_out': 'self_attn', 'mlp_out': 'mlp'}[sae.site.kind] }"
    path.mkdir(parents=True)
    tensors = {
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    save_file(tensors, path / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "num_latents": sae.d_sae,
        "normalize_decoder": True,
        "k": sae.activation.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    (path / "cfg.json").write_text(json.dumps(config | changes))
    (folder / "config.json").write_text(json.dumps({"model": sae.model_name, "ctx_len": 2048}))
    return path


def write_saelens(sae: SAE, folder: Path) -> Path:
    return save_sae(sae, folder)


Writer = Callable[[SAE, Path], Path]
CASES: dict[str, tuple[Writer, str, Settings]] = {
    "saelens-standard": (write_saelens, "relu", {}),
    "saelens-jumprelu": (write_saelens, "jumprelu", {}),
    "saelens-topk": (write_saelens, "topk", {}),
    "saelens-gated": (write_saelens, "gated", {}),
    "authors": (write_authors, "relu", {}),
    "gemma-scope": (write_gemma_scope, "jumprelu", {"apply_b_dec_to_input": False}),
    "gemma-scope-2": (write_gemma_scope_2, "jumprelu", {"apply_b_dec_to_input": False}),
    "dictionary-learning-topk": (write_dictionary_learning, "topk", {}),
    "dictionary-learning-jumprelu": (write_dictionary_learning, "jumprelu", {"apply_b_dec_to_input": False}),
    "sparsify": (write_sparsify, "topk", {}),
}
"""By name: how it is written, of which activation, with which other settings."""
