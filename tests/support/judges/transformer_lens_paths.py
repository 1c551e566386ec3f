"""Write what TransformerLens' hooks make of writes to the last layer, one run at a time: `FOLDER CASE.npz OUT.npz`.

The case has `tokens [block, position]` and, for each pair, `block`, `query` and `write [pair, d_model]`, added to what
the last attention layer puts out. The result has the loss change at the pair by each path, and the processor's
seconds of each pair's three runs. A program of its own: booting a Bridge patches transformers for the whole process.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main(folder: Path, case_file: Path, out: Path) -> None:
    torch.set_num_threads(1)
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    bridge = TransformerBridge.boot_transformers(
        str(folder), hf_model=module, tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    bridge.set_use_hook_mlp_in(True)
    last = f"blocks.{module.config.num_hidden_layers - 1}."
    case = {name: torch.from_numpy(value) for name, value in np.load(case_file).items()}
    changes: dict[str, list[float]] = {"total": [], "direct": [], "mlp": []}
    seconds = []
    for block, query, write in zip(case["block"].tolist(), case["query"].tolist(), case["write"], strict=True):
        tokens = case["tokens"][block : block + 1]
        logits, cache = bridge.run_with_cache(tokens)
        target, mlp_out = tokens[0, query + 1], cache[last + "hook_mlp_out"]

        def loss(logits: torch.Tensor, query: int = query, target: torch.Tensor = target) -> float:
            return float(torch.nn.functional.cross_entropy(logits[0, query], target))

        def written(value: torch.Tensor, hook: object, query: int = query, write: torch.Tensor = write) -> torch.Tensor:
            value = value.clone()
            value[:, query] += write
            return value

        def held(value: torch.Tensor, hook: object, kept: torch.Tensor = mlp_out) -> torch.Tensor:
            return kept

        hooks = {
            "total": [(last + "hook_attn_out", written)],
            "direct": [(last + "hook_attn_out", written), (last + "hook_mlp_out", held)],
            "mlp": [(last + "hook_mlp_in", written)],
        }
        clean, start = loss(logits), time.process_time()
        for path, fwd_hooks in hooks.items():
            changes[path].append(loss(bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks)) - clean)
        seconds.append(time.process_time() - start)
    np.savez(out, seconds=np.array(seconds), **{path: np.array(values) for path, values in changes.items()})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
