"""Write what models compute whose weights TransformerLens has processed: `TOKENS.npz ROOT`.

For each Hugging Face folder `ROOT/hf/NAME`: the Bridge in compatibility mode. And `ROOT/tl/gelu`, a HookedTransformer
with random weights: its weights before they were processed (`model.pth`, `tl_config.json`). `NAME.npz` beside them
holds the activations below of every layer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = ("attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_pre", "hook_resid_post")


def write(model: TransformerBridge | HookedTransformer, tokens: torch.Tensor, out: Path) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, return_type="logits")
    found = {f"blocks.{layer}.{name}": cache for layer in range(model.cfg.n_layers) for name in NAMES}
    np.savez(out, **{name: values[name].float().numpy() for name, values in found.items()})


def bridge(folder: Path) -> TransformerBridge:
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = TransformerBridge.boot_transformers(str(folder), hf_model=module, tokenizer=tokenizer)
    made.enable_compatibility_mode()
    return made


def hooked(folder: Path) -> HookedTransformer:
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_head": 16, "n_ctx": 48, "d_vocab": 98, "device": "cpu"}
    config = HookedTransformerConfig(**sizes, act_fn="gelu", normalization_type="LN", seed=0)
    model = HookedTransformer(config)
    for name, p in model.named_parameters():
        scale = 1.5 / p.shape[-2] ** 0.5 if "W_" in name and "embed.W_" not in name else 0.3
        p.data = torch.randn_like(p) * scale + name.endswith(".w")
    folder.mkdir(parents=True)
    raw = {name: t.detach().clone() for name, t in model.state_dict().items()}
    torch.save(raw, folder / "model.pth")
    (folder / "tl_config.json").write_text(json.dumps(model.cfg.to_dict(), default=str))
    model.load_and_process_state_dict(raw)
    return model


def main(tokens_file: Path, root: Path) -> None:
    tokens = torch.from_numpy(np.load(tokens_file)["tokens"]).long()
    write(hooked(root / "tl" / "gelu"), tokens, root / "tl" / "gelu.npz")
    for folder in sorted((root / "hf").iterdir()):
        write(bridge(folder), tokens, root / "hf" / f"{folder.name}.npz")


main(*map(Path, sys.argv[1:3]))
