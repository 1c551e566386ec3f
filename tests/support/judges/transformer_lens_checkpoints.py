"""Make HookedTransformers with random weights, save them, and write what they compute: `TOKENS.npz ROOT`.

`ROOT/NAME` gets `model.pth` (the state dict, buffers included), `tl_config.json` (the whole configuration) and
`judged.npz`; `NAME-processed` the same after TransformerLens' processing. One of them is saved as safetensors.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

SIZES = {"n_layers": 3, "d_model": 64, "n_heads": 4, "d_head": 16, "n_ctx": 48, "d_vocab": 98, "device": "cpu"}
KINDS = {
    "gelu": {"act_fn": "gelu"},
    "gelu_new": {"act_fn": "gelu_new", "eps": 1e-4},
    "solu_ln": {"act_fn": "solu_ln"},
    "attn_only": {"attn_only": True},
}


def randomised(kind: str) -> HookedTransformer:
    """Weights large enough that attention is not flat, biases that are not zero, norms that are not one."""
    torch.manual_seed(0)
    model = HookedTransformer(HookedTransformerConfig(**SIZES, normalization_type="LN", seed=0, **KINDS[kind]))
    for name, p in model.named_parameters():
        scale = 1.5 / p.shape[-2] ** 0.5 if "W_" in name and "embed.W_" not in name else 0.3
        p.data = torch.randn_like(p) * scale + name.endswith(".w")
    return model


def write(model: HookedTransformer, tokens: torch.Tensor, folder: Path) -> None:
    folder.mkdir(parents=True)
    state = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    if folder.name == "gelu_new":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "model.pth")
    (folder / "tl_config.json").write_text(json.dumps(model.cfg.to_dict(), default=str))
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, return_type="logits")
    found = {"logits": logits}
    for layer in range(model.cfg.n_layers):
        found[f"z{layer}"] = cache[f"blocks.{layer}.attn.hook_z"].flatten(2)
        found[f"pattern{layer}"] = cache[f"blocks.{layer}.attn.hook_pattern"]
        found[f"resid_post{layer}"] = cache[f"blocks.{layer}.hook_resid_post"]
    np.savez(folder / "judged.npz", **{name: value.numpy() for name, value in found.items()})


def main(tokens_file: Path, root: Path) -> None:
    tokens = torch.from_numpy(np.load(tokens_file)["tokens"]).long()
    for kind in KINDS:
        model = randomised(kind)
        write(model, tokens, root / kind)
        raw = {name: t.clone() for name, t in model.state_dict().items()}
        model.load_and_process_state_dict(raw, fold_value_biases=not kind.startswith("gelu"))  # and all else it offers
        write(model, tokens, root / f"{kind}-processed")


main(*map(Path, sys.argv[1:3]))
