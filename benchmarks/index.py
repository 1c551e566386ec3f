"""How long the index takes beside the least that anyone must do: the bare forward pass and the encoder.

    a  bare    model to z of the SAE's layer, then the SAE's encoder, over all tokens; nothing is kept
    b  index   `headscope index` with all that it keeps (DFA by head and source, statistics, examples), to its end

Each row is a process of its own, on the same model, SAE and tokens, one after the other, `--repeats` times; the
fastest counts.

    python benchmarks/index.py            both configurations, some minutes
    python benchmarks/index.py --quick    under a minute: fewer tokens, so that what does not depend on them weighs more
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel

from headscope.capture import token_batches
from headscope.corpus import Corpus, load_corpus
from headscope.index.build import SAERecord, build_index
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.sae.formats import load_sae
from headscope.sae.model import SAE, JumpReLU
from headscope.site import Site

CONFIGS = {
    "tiny": "bundled tiny (d_model 128, 8 heads), tiny-z1 (2,048 latents), held-out Python, blocks of 256",
    "gelu-2l": "random GPT-2-like (2 layers, d_model 512, 8 heads, vocabulary 48,262), random SAE (16,384 latents, "
    "L0 12), Zipf tokens, blocks of 256",
}
TOKENS = {"tiny": 1_000_000, "gelu-2l": 500_000}
QUICK_TOKENS = {"tiny": 200_000, "gelu-2l": 30_000}
BLOCK = 256
L0 = 12


@dataclass(frozen=True)
class Arguments:
    """Options."""

    quick: bool = False
    """Fewer tokens."""
    json: bool = False
    """One JSON object a line."""
    configs: tuple[str, ...] = tuple(CONFIGS)
    tokens: int | None = None
    """Instead of the configuration's own number."""
    repeats: int = 1
    threads: int = torch.get_num_threads()
    device: str = "cpu"
    one: str = ""
    """For the processes of this script: `name config tokens`."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    config: str
    tokens: int
    seconds: float
    peak_mb: float
    """Largest resident memory of the process."""
    bytes_per_token: float
    """On disk, of what is kept."""


def main(arguments: Arguments) -> None:
    """Run and print."""
    if arguments.one:
        name, config, tokens = arguments.one.split()
        torch.set_num_threads(arguments.threads)
        print(json.dumps(vars(measure(name, config, int(tokens), arguments.device))))
        return
    print_row = _print_json if arguments.json else _print_text
    for config in arguments.configs:
        tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)[config]
        if not arguments.json:
            print(f"\n{config}: {CONFIGS[config]}; {arguments.threads} threads, {arguments.device}")
        best: dict[str, Row] = {}
        for _ in range(arguments.repeats):
            for name in ("bare", "index"):
                row = _in_process(name, config, tokens, arguments)
                best[name] = min(best.get(name, row), row, key=lambda r: r.seconds)
        for row in best.values():
            print_row(row, best["bare"])


def _in_process(name: str, config: str, tokens: int, arguments: Arguments) -> Row:
    options = ["--threads", str(arguments.threads), "--device", arguments.device]
    command = [sys.executable, __file__, "--one", f"{name} {config} {tokens}", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def _print_json(row: Row, bare: Row) -> None:
    print(json.dumps(vars(row) | {"ratio_to_bare": row.seconds / bare.seconds}), flush=True)


def _print_text(row: Row, bare: Row) -> None:
    print(
        f"  {row.name:<6} {row.tokens:>10,} tokens {row.seconds:>8.1f} s {row.tokens / row.seconds:>10,.0f} tokens/s "
        f"{row.peak_mb:>8,.0f} MB {row.bytes_per_token:>8,.0f} bytes/token   {row.seconds / bare.seconds:.2f}x bare",
        flush=True,
    )


# ----------------------------------------------------------------------------------------------------------- measuring
def measure(name: str, config: str, tokens: int, device: str) -> Row:
    """Time one of the two, what is set up before left out."""
    model, sae, corpus = _tiny(tokens, device) if config == "tiny" else _gelu_2l(tokens, device)
    _bare(model, sae, corpus, np.arange(min(8, len(corpus.blocks))))  # warm
    out = Path(tempfile.mkdtemp(prefix="headscope-bench-"))
    try:
        start = time.perf_counter()
        if name == "bare":
            _bare(model, sae, corpus, np.arange(len(corpus.blocks)))
        else:
            build_index(model, [(sae, SAERecord("benchmark", "none"))], corpus, out / "index")
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Row(name, config, corpus.n_tokens, round(seconds, 3), round(peak, 1), round(size / corpus.n_tokens, 1))


def _bare(model: Model, sae: SAE, corpus: Corpus, blocks: np.ndarray) -> None:
    site = sae.site
    for _, tokens in token_batches(corpus, model.device, blocks):
        sae.encode(model.read(tokens, [site])[site])
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _tiny(tokens: int, device: str) -> tuple[Model, SAE, Corpus]:
    model = load_model("tiny", device=device)
    corpus = load_corpus("python", model.tokenizer, bos=model.bos, split="all", block_size=BLOCK, max_tokens=tokens)
    return model, load_sae("tiny-z1").to(device), corpus


def _gelu_2l(tokens: int, device: str) -> tuple[Model, SAE, Corpus]:
    torch.manual_seed(0)
    d_vocab, d_in, d_sae = 48_262, 512, 16_384
    config = GPT2Config(
        vocab_size=d_vocab, n_positions=1024, n_embd=512, n_layer=2, n_head=8, n_inner=2048, activation_function="gelu"
    )
    module = GPT2LMHeadModel(config).to(device)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and "attn" in name:
            parameter.data *= 6  # at their initial size all attention is even
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(d_vocab)}, unk_token="0"))
    model = Model(module, tokenizer, 0, "random gelu-2l")
    corpus = _zipf_corpus(tokens, d_vocab)
    sae = SAE(
        W_enc=torch.randn(d_in, d_sae) / d_in**0.5,
        b_enc=torch.zeros(d_sae),
        W_dec=torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1),
        b_dec=torch.zeros(d_in),
        activation=JumpReLU(torch.zeros(d_sae)),
        site=Site("z", 1),
        model_name="random gelu-2l",
    ).to(device)
    sample = next(iter(token_batches(corpus, model.device)))[1]
    pre = sae.pre_activations(model.read(sample, [sae.site])[sae.site].flatten(0, 1))
    k = round(len(pre) * L0 / d_sae)
    threshold = pre.topk(k + 1, dim=0).values[-1].clamp_min(0)
    return model, SAE(**vars(sae) | {"activation": JumpReLU(threshold)}), corpus


def _zipf_corpus(tokens: int, d_vocab: int) -> Corpus:
    rng = np.random.default_rng(0)
    n = max(1, tokens // BLOCK)
    frequency = 1 / np.arange(1, d_vocab)
    blocks = 1 + rng.choice(d_vocab - 1, (n, BLOCK), p=frequency / frequency.sum()).astype(np.int32)
    blocks[:, 0] = 0
    offset = np.tile(np.arange(BLOCK, dtype=np.int32), (n, 1))
    return Corpus("zipf", "all", blocks, ("zipf",), np.zeros_like(blocks), offset, 0)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
