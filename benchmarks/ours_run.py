"""Trains as `headscope train` does: the process that stands beside `peers/run_saelens_model.py`."""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from transformers import AutoTokenizer, GPTNeoXForCausalLM  # noqa: F401 - loaded when needed, and imports are not counted

from headscope import jobs
from headscope.sae.config import TrainConfig, Variant


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    out: Path
    model: str
    layer: int
    variant: Variant
    tokens: int
    batch: int
    d_sae: int
    k: int
    buffer: int
    threads: int


def main(args: Arguments) -> None:
    """Train, write the SAE, print what it took."""
    torch.set_num_threads(args.threads)
    start, used = time.perf_counter(), time.process_time()
    jobs.train(
        args.out,
        model=args.model,
        text=jobs.CorpusChoice(split="train", max_tokens=args.tokens),
        layer=args.layer,
        config=TrainConfig(
            variant=args.variant,
            tokens=args.tokens,
            batch=args.batch,
            d_sae=args.d_sae,
            target_l0=args.k,
            buffer=args.buffer,
        ),
    )
    took = {"seconds": time.perf_counter() - start, "processor_s": time.process_time() - used}
    print(json.dumps(took | {"version": version("headscope")}))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
