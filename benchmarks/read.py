"""How long reading z takes beside the least that computes it, and beside TransformerLens.

    a  by hand       a GPT-2 written out with SDPA that stops at z of the last layer: nothing less computes it
    b  headscope     `Model.read(tokens, [Site("z", layer)])`, the fast path
    c  explicit      `Model.attention`: pattern, value and z
    d  HookedTransformer, e  TransformerBridge    run_with_cache with a filter for z, stopped after the layer

One model of gelu-2l's size with random weights, in one process; rounds are interleaved, and the median of the
processor's time counts, which other work on the machine moves least. d and e need transformer-lens.

    python benchmarks/read.py            a minute or two
    python benchmarks/read.py --quick    some seconds
"""

import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.site import Site

SIZES = {
    "vocab_size": 8192,
    "n_embd": 512,
    "n_head": 8,
    "n_layer": 2,
    "n_positions": 256,
    "activation_function": "gelu",
}
LAYER = 1


@dataclass(frozen=True)
class Arguments:
    """Options."""

    quick: bool = False
    """Fewer rounds."""
    compile: bool = False
    """Read a copy with its MLPs compiled by torch too."""
    json: bool = False
    """One JSON object a line."""
    device: str = "cpu"
    threads: int = 1
    batch: int = 8
    length: int = 256


def by_hand(module: Any, tokens: Tensor) -> Tensor:
    """Z of the last layer by SDPA, and nothing after it."""
    body, n_heads = module.transformer, SIZES["n_head"]
    x = body.wte(tokens) + body.wpe.weight[: tokens.shape[1]]
    for number, block in enumerate(body.h):
        q, k, v = (
            t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in block.attn.c_attn(block.ln_1(x)).split(512, -1)
        )
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        if number == LAYER:
            return z
        x = x + block.attn.c_proj(z)
        x = x + block.mlp(block.ln_2(x))
    raise AssertionError


def transformer_lens(module: Any, tokenizer: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same weights in TransformerLens' two models."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge

    name = f"blocks.{LAYER}.attn.hook_z"
    config = HookedTransformerConfig(
        n_layers=2, d_model=512, n_heads=8, d_head=64, n_ctx=256, d_vocab=8192, act_fn="gelu", normalization_type="LN"
    )
    hooked = HookedTransformer(config)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
        local = AutoTokenizer.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=copy, tokenizer=local)

    def read(model: Any) -> Callable[[Tensor], Tensor]:
        def run(tokens: Tensor) -> Tensor:
            return model.run_with_cache(tokens, names_filter=[name], stop_at_layer=LAYER + 1)[1][name]

        return run

    return {"HookedTransformer": read(hooked), "TransformerBridge": read(bridge)}


def readers(args: Arguments) -> tuple[dict[str, Callable[[Tensor], Tensor]], Model]:
    """What is measured, by name."""
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)).eval().requires_grad_(False)
    vocab = {f"t{i}": i for i in range(SIZES["vocab_size"])}
    made = Tokenizer(models.WordLevel(vocab=vocab, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="t0")
    model, site = load_model(module, tokenizer=tokenizer, device=args.device), Site("z", LAYER)
    found = {
        "by hand": lambda tokens: by_hand(model.module, tokens),
        "headscope": lambda tokens: model.read(tokens, [site])[site],
        "headscope, explicit": lambda tokens: model.attention(tokens, LAYER).z,
    }
    if args.compile:
        compiled = load_model(module, tokenizer=tokenizer, device=args.device)
        for block in compiled.module.transformer.h:
            block.mlp.compile()
        found["headscope, compiled"] = lambda tokens: compiled.read(tokens, [site])[site]
    if args.device == "cpu" and importlib.util.find_spec("transformer_lens"):
        warnings.simplefilter("ignore")
        found |= transformer_lens(module, tokenizer)
    return found, model


@torch.no_grad()
def main(args: Arguments) -> None:
    """Measure in turns and print."""
    torch.set_num_threads(args.threads)
    measured, model = readers(args)
    shape = (args.batch, args.length)
    tokens = torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    torch.testing.assert_close(measured["headscope"](tokens), by_hand(model.module, tokens), atol=1e-5, rtol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(3 if args.quick else 15):
        for name, read in measured.items():
            start = clock(args.device)
            read(tokens)
            if turn > 0:  # the first warms up
                times[name].append(clock(args.device) - start)
    least = statistics.median(times["by hand"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        row = {
            "name": name,
            "ms": 1e3 * middle,
            "tokens_per_s": tokens.numel() / middle,
            "times_by_hand": middle / least,
        }
        print(
            json.dumps(row)
            if args.json
            else f"{name:<22} {row['ms']:9.2f} ms  {row['times_by_hand']:5.2f} times by hand"
        )


def clock(device: str) -> float:
    """Seconds of the processor, or by the clock when a GPU has done its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
