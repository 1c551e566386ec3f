"""What mixing activations costs beside reading them, and whether reading ahead in a thread pays.

    a  buffer     rows that are at hand go through the buffer: ours, and SAELens' `mixing_buffer`
    b  stream     activations of a model of gelu-2l's size as batches, beside `Model.read` of the same tokens alone
    c  training   the same batches, with a product for a step that takes about as long as the model: one after the
                  other, and with the model in a thread; by the clock, on an otherwise idle machine or it means nothing

a and b take the time of the processor, which other work on the machine moves least. SAELens' row needs sae-lens.

    python benchmarks/stream.py            a minute or two
    python benchmarks/stream.py --quick    some seconds
"""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from headscope.capture import BATCH_TOKENS
from headscope.corpus import Corpus
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.sae.training import stream
from headscope.sae.training.source import Source
from headscope.sae.training.stream import ActivationStream
from headscope.site import Site

D_IN, BLOCK, D_VOCAB = 512, 128, 8192
SITE = Site("z", 1)


@dataclass(frozen=True)
class Arguments:
    """Options."""

    quick: bool = False
    """Fewer rows."""
    json: bool = False
    """One JSON object a line."""
    threads: int = 1
    """Of torch, in each thread."""


@dataclass(frozen=True)
class Mixing:
    """What a stream takes from a recipe."""

    batch: int = 4096
    buffer: int = 65_536
    exclude_bos: bool = True
    seed: int = 0
    cache: str | None = None


class AtHand(Source):
    """Rows that cost nothing to read."""

    def read(self, group: int) -> Tensor:
        """The same rows for every group."""
        del group
        return ROWS


ROWS = torch.randn(BATCH_TOKENS, D_IN, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def random_model() -> Model:
    """Of gelu-2l's size."""
    torch.manual_seed(0)
    sizes = {"vocab_size": D_VOCAB, "n_embd": D_IN, "n_head": 8, "n_layer": 2, "n_positions": BLOCK}
    module = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu", bos_token_id=0, eos_token_id=0))
    made = Tokenizer(models.WordLevel(vocab={f"t{i}": i for i in range(D_VOCAB)}, unk_token="t1"))
    return load_model(module, tokenizer=PreTrainedTokenizerFast(tokenizer_object=made, bos_token="t0"), device="cpu")


def random_corpus(n_blocks: int) -> Corpus:
    """Random tokens in one document."""
    blocks = np.random.default_rng(0).integers(1, D_VOCAB, (n_blocks, BLOCK), dtype=np.int32)
    blocks[:, 0] = 0
    offset = np.tile(np.arange(BLOCK, dtype=np.int32), (n_blocks, 1))
    return Corpus("random", "all", blocks, ("document",), np.zeros_like(blocks), offset, bos=0)


def saelens(config: Mixing) -> Iterator[Tensor]:
    """The rows at hand through SAELens' buffer, in float32 as its store makes them."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    rows = ROWS.float()

    def at_hand() -> Iterator[Tensor]:
        while True:
            yield rows

    return mixing_buffer(config.buffer, config.batch, at_hand())


def seconds(batches: Iterator[Tensor], n: int) -> float:
    """Seconds of the processor an activation, over n batches; some before fill a buffer and warm up."""
    for _ in range(16):
        next(batches)
    start = time.process_time()
    rows = sum(len(next(batches)) for _ in range(n))
    return (time.process_time() - start) / rows


def best(ways: dict[str, Iterator[Tensor]], step: Callable[[Tensor], Tensor], turns: int) -> dict[str, float]:
    """Seconds by the clock an activation with a step on each batch; the best of turns taken one after another."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + turns):
        for name, batches in ways.items():
            start = time.perf_counter()
            rows = sum(len(step(next(batches))) for _ in range(4))
            if turn > 0:  # the first fills and warms up
                times[name].append((time.perf_counter() - start) / rows)
    return {name: min(found) for name, found in times.items()}


@torch.no_grad()
def main(args: Arguments) -> None:
    """Measure and print."""
    torch.set_num_threads(args.threads)
    model, corpus = random_model(), random_corpus(4096)
    n = 32 if args.quick else 256

    def show(name: str, s: float) -> None:
        row = {"name": name, "us": 1e6 * s, "rows_per_s": 1 / s, "threads": args.threads}
        print(json.dumps(row) if args.json else f"{name:<44} {1e6 * s:9.2f} us a row  {1 / s:12,.0f} rows/s")

    def made(*, ahead: bool, source: type[Source] = Source, config: Mixing | None = None) -> Iterator[Tensor]:
        with patch.object(stream, "reads_ahead", lambda _device: ahead):
            found = ActivationStream(model, corpus, SITE, config or Mixing())
            found._source = source(model, corpus, SITE, exclude_bos=True)
            yield from found

    for buffer in (65_536, 262_144):
        config = replace(Mixing(), buffer=buffer)
        if importlib.util.find_spec("sae_lens"):
            show(f"buffer of {buffer:,}, SAELens", seconds(saelens(config), n))
        show(f"buffer of {buffer:,}, headscope", seconds(made(ahead=False, source=AtHand, config=config), n))

    tokens = torch.from_numpy(corpus.blocks[: BATCH_TOKENS // BLOCK]).long()
    bare = (model.read(tokens, [SITE])[SITE][:, 1:].flatten(0, 1) for _ in iter(int, 1))
    show("Model.read alone", seconds(bare, n // 8))
    show("stream", seconds(made(ahead=False, config=Mixing(buffer=16_384)), n // 4))

    config = Mixing(buffer=16_384)
    weight = torch.randn(D_IN, 4096) / D_IN**0.5
    ways = {
        "a step alone": iter(ROWS[:4096].float, None),
        "stream and steps, one after the other": made(ahead=False, config=config),
        "stream and steps, reading ahead": made(ahead=True, config=config),
    }
    for name, s in best(ways, lambda x: (x @ weight).relu() @ weight.T, n // 16).items():
        show(name, s)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
