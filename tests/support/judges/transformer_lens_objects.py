"""Open what TransformerLens has loaded: `OUT.json FOLDER ...`, folders of Hugging Face models for Bridges.

For each object, how far logits, z and attn_out of `headscope.load_model(object)` are from what the object computes, and
whether it is left as it was. Run as a program of its own: booting a Bridge patches transformers for the whole process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from headscope import HeadscopeError, Site, load_model

SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": 64, "d_vocab": 98, "d_mlp": 48}


def hooked(tokenizer: Any, *, processed: bool, **changes: Any) -> HookedTransformer:
    config = HookedTransformerConfig(**SIZES, act_fn="gelu", normalization_type="LN", **changes)
    model = HookedTransformer(config)
    model.tokenizer = tokenizer
    generator = torch.Generator().manual_seed(0)
    state = {
        k: torch.randn(v.shape, generator=generator) * 0.3 if v.is_floating_point() else v
        for k, v in model.state_dict().items()
        if not k.endswith(("mask", "IGNORE"))
    }
    if processed:
        model.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=True, center_unembed=True)
    else:
        model.load_state_dict(state, strict=False)
    return model


def misses(theirs: Any, tokens: torch.Tensor) -> dict[str, float]:
    before = {name: t.clone() for name, t in theirs.state_dict().items()}
    ours = load_model(theirs)
    sites = {Site(kind, 1): Site(kind, 1).hook_name for kind in ("z", "attn_out")}
    with torch.no_grad():
        logits, cache = theirs.run_with_cache(tokens, return_type="logits")
    found = ours.read(tokens, list(sites))
    wrong = {"logits": (ours.logits(tokens) - logits).abs().max().item()}
    for site, name in sites.items():
        expected = cache[name].flatten(2) if site.kind == "z" else cache[name]
        wrong[site.kind] = (found[site] - expected).abs().max().item()
    wrong["left as it was"] = float(any(not torch.equal(before[k], v) for k, v in theirs.state_dict().items()))
    shared = {p.data_ptr() for p in ours.module.parameters()} & {p.data_ptr() for p in theirs.parameters()}
    return wrong | {"shared": len(shared)}


def refused(model: Any) -> str:
    try:
        load_model(model)
    except HeadscopeError as error:
        return str(error)
    return ""


def main(out: Path, *folders: Path) -> None:
    tokens = torch.randint(1, 98, (2, 30), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    found: dict[str, Any] = {"hooked": misses(hooked(tokenizer, processed=False), tokens)}
    found["hooked processed"] = misses(hooked(tokenizer, processed=True), tokens)
    for folder in folders:
        module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        bridge = TransformerBridge.boot_transformers(str(folder), hf_model=module, tokenizer=tokenizer)
        found[f"bridge {folder.name}"] = misses(bridge, tokens)
    bridge.enable_compatibility_mode()
    found["refused compatibility"] = refused(bridge)
    found["refused rotary"] = refused(
        hooked(tokenizer, processed=False, positional_embedding_type="rotary", rotary_dim=8)
    )
    out.write_text(json.dumps(found))


main(*map(Path, sys.argv[1:]))
