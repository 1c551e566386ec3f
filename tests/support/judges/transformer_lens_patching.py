"""Patch activations with TransformerLens' Bridge, one run a patch: `FOLDER IN.npz OUT.npz`.

IN holds two prompts (clean, corrupted) and a direction of z of layer 1; OUT gets `z_1[query] . direction` of the
unpatched runs and of every patch of layer 0, noised (the clean prompt with a value of the corrupted run) and denoised.
Run as a program of its own: booting a Bridge patches transformers for the whole process.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path, inputs: Path, out: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=module, tokenizer=tokenizer)
    given = {name: torch.from_numpy(value) for name, value in np.load(inputs).items()}
    prompts = {name: given[name].long()[None] for name in ("clean", "corrupted")}
    caches = {name: bridge.run_with_cache(tokens)[1] for name, tokens in prompts.items()}
    n_heads, size = module.config.num_attention_heads, prompts["clean"].shape[1]

    def feature(tokens: torch.Tensor, hooks: list) -> float:
        found = []

        def keep(z: torch.Tensor, hook: object) -> None:
            found.append(z[0, -1].flatten() @ given["direction"])

        bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, ("blocks.1.attn.hook_z", keep)])
        return found[0].item()

    def patched(name: str, source: torch.Tensor, where: tuple) -> list:
        def put(value: torch.Tensor, hook: object) -> torch.Tensor:
            value = value.clone()
            value[where] = source[where]
            return value

        return [(f"blocks.0.{name}", put)]

    places = {
        "z": ("attn.hook_z", [(0, p, h) for h in range(n_heads) for p in range(size)]),
        "v": ("attn.hook_v", [(0, p, h) for h in range(n_heads) for p in range(size)]),
        "pattern": ("attn.hook_pattern", [(0, h, p) for h in range(n_heads) for p in range(size)]),
        "attn_out": ("hook_attn_out", [(0, p) for p in range(size)]),
        "mlp_out": ("hook_mlp_out", [(0, p) for p in range(size)]),
        "resid_post": ("hook_resid_post", [(0, p) for p in range(size)]),
    }
    found = {}
    with torch.no_grad():
        for name, tokens in prompts.items():
            found[name] = np.array(feature(tokens, []))
        for way, base, other in (("noising", "clean", "corrupted"), ("denoising", "corrupted", "clean")):
            for kind, (name, every) in places.items():
                source = caches[other][f"blocks.0.{name}"]
                values = [feature(prompts[base], patched(name, source, where)) for where in every]
                found[f"{way} {kind}"] = np.array(values)
    np.savez(out, **found)


main(*map(Path, sys.argv[1:4]))
