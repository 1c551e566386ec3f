"""The least that a training step of an SAE in bf16 can take on a CPU: the encoder's product and fused Adam.

Any step has to multiply the batch by the encoder, `[batch, d_in] @ [d_in, d_sae]`, to know what is active, and to move
the two matrices of `d_in * d_sae` float32 weights; the rest can be sparse. Casting weights to bf16, biases, selection,
decoding and gradients are left out. headscope's product that proposes is of bytes, so its step may come below.

    python benchmarks/floor.py --d-in 512 --d-sae 16384
"""

import json
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    d_in: int = 128
    d_sae: int = 4096
    batch: int = 4096
    repeats: int = 7
    threads: int = torch.get_num_threads()


@dataclass(frozen=True)
class Floor:
    """Medians, in seconds."""

    product_s: float
    """The product alone."""
    adam_s: float
    """The optimiser's step alone."""
    floor_s: float
    """Of both together."""


class FloorStep:
    """The two parts, ready to run on random numbers."""

    def __init__(self, d_in: int, d_sae: int, batch: int, *, seed: int = 0) -> None:
        """Draw inputs, weights and gradients."""
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batch, d_in, generator=generator).bfloat16()
        self.encoder = torch.randn(d_in, d_sae, generator=generator).bfloat16()
        self.weights = [torch.randn(d_in, d_sae, generator=generator) for _ in range(2)]
        for weight in self.weights:
            weight.grad = torch.randn(d_in, d_sae, generator=generator)
        self.adam = torch.optim.Adam(self.weights, lr=1e-3, fused=True)
        self.memory = torch.empty(batch, d_sae, dtype=torch.bfloat16)

    def product(self) -> Tensor:
        """The batch times the encoder, in bf16 `[batch, d_sae]`."""
        return torch.mm(self.x, self.encoder, out=self.memory)

    def update(self) -> None:
        """One step of Adam on both matrices."""
        self.adam.step()


def measure(step: FloorStep, repeats: int) -> Floor:
    """Time it; the first run of each part warms up and is not counted."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step.product()
        between = time.perf_counter()
        step.update()
        times.append((between - start, time.perf_counter() - between))
    product, adam = zip(*times[1:], strict=True)
    both = [sum(pair) for pair in times[1:]]
    return Floor(statistics.median(product), statistics.median(adam), statistics.median(both))


def main(arguments: Arguments) -> None:
    """Measure and print one JSON object."""
    torch.set_num_threads(arguments.threads)
    step = FloorStep(arguments.d_in, arguments.d_sae, arguments.batch)
    print(json.dumps(vars(measure(step, arguments.repeats))))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
