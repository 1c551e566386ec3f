"""Write what TransformerLens' Bridge computes with models: `FOLDER ROOT`, of each model one after the other.

Reads `ROOT/tokens.npz` and writes `ROOT/judged.npz`: every activation of the names below that the model has, the
logits, and the logits under each edit of layer 0. Run as a program of its own: booting a Bridge patches transformers
for the whole process.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_in", "hook_mlp_out")
STEPS = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z")
NAMES = (*STREAM, *(f"attn.{name}" for name in STEPS), "ln1.hook_scale", "ln2.hook_scale")


def head_1_at_position_3(z: torch.Tensor, hook: object) -> torch.Tensor:
    z = z.clone()
    z[:, 3, 1] = 0
    return z


def blurred(pattern: torch.Tensor, hook: object) -> torch.Tensor:
    return 0.5 * pattern + 0.1


def moved(x: torch.Tensor, hook: object) -> torch.Tensor:
    return x + torch.linspace(-1, 2, x.shape[-1])


EDITS = {
    "attn.hook_z": head_1_at_position_3,
    "attn.hook_pattern": blurred,
    "attn.hook_v": moved,
    "hook_mlp_in": moved,
    "hook_resid_pre": moved,
    "hook_attn_out": moved,
    "hook_mlp_out": moved,
    "hook_resid_post": moved,
}


def judge(folder: Path, root: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=module, tokenizer=tokenizer)
    bridge.set_use_hook_mlp_in(True)
    tokens = torch.from_numpy(np.load(root / "tokens.npz")["tokens"]).long()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens, return_type="logits")
        wanted = [f"blocks.{i}.{name}" for i in range(module.config.num_hidden_layers) for name in NAMES]
        found = {name: cache[name] for name in [*wanted, "ln_final.hook_scale"] if name in cache} | {"logits": logits}
        for name, edit in EDITS.items():
            hooks = [(f"blocks.0.{name}", edit)]
            found[f"edited {name}"] = bridge.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    np.savez(root / "judged.npz", **{name: value.float().numpy() for name, value in found.items()})


for folder, root in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    judge(Path(folder), Path(root))
