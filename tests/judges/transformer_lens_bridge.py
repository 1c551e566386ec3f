"""Write what TransformerLens' Bridge reads from a model folder: `FOLDER TOKENS.npz OUT.npz`.

Run as a program of its own: booting a Bridge patches transformers for the whole process.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path, tokens_file: Path, out: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=module, tokenizer=tokenizer)
    tokens = torch.from_numpy(np.load(tokens_file)["tokens"]).long()
    found = {}
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens, return_type="logits")
    for layer in range(module.config.num_hidden_layers):
        attention = f"blocks.{layer}.attn"
        found[f"z{layer}"] = cache[f"{attention}.hook_z"].reshape(*tokens.shape, -1)
        found[f"v{layer}"] = cache[f"{attention}.hook_v"].reshape(*tokens.shape, module.config.num_attention_heads, -1)
        found[f"pattern{layer}"] = cache[f"{attention}.hook_pattern"]
    found["logits"] = logits
    np.savez(out, **{name: value.float().numpy() for name, value in found.items()})


main(*map(Path, sys.argv[1:4]))
