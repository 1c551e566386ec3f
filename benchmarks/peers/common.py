"""What the processes that train share: the task they are given, the timed loop, and what they hand back.

A process reads inputs and initial weights from files, trains for some steps, writes its weights and prints one JSON
object. Weights are those of `f = activation((x - b_dec) @ W_enc + b_enc)`, `x_hat = f @ W_dec + b_dec`; with a
`threshold` by latent, f is 0 where the pre-activation does not exceed it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONSTANT = 1_000_000
"""Steps that schedules are laid out for where the learning rate is to stay as it is."""


@dataclass(frozen=True)
class Task:
    """What to train."""

    variant: str
    """relu, topk, batchtopk; for headscope and SAELens also jumprelu, gated, matryoshka."""
    option: str
    """Which of the trainer's own configurations."""
    data: str
    """`.npy` file of inputs `[n, d_in]`, float32, scaled to a mean distance of sqrt(d_in) from their mean."""
    initial: str
    """`.safetensors` file of the initial weights: training at a constant rate. Empty: the trainer's own start, with a
    schedule over the steps."""
    out: str
    """Where the trained weights go."""
    d_sae: int
    steps: int
    batch: int
    k: int
    """Active latents of an input (topk, batchtopk, matryoshka)."""
    coefficient: float
    """Of the penalty: loss = squared error summed over components + this * sum of activations (relu), * L0 (jumprelu),
    * sum of the gate's positive pre-activations (gated)."""
    lr: float
    threads: int
    device: str = "cpu"
    """Where weights and batches are, as torch names it."""

    @classmethod
    def from_command_line(cls) -> "Task":
        """Each field is an option."""
        parser = argparse.ArgumentParser()
        for field in fields(cls):
            parser.add_argument(f"--{field.name}", type=field.type, required=True)
        task = cls(**vars(parser.parse_args()))
        torch.set_num_threads(task.threads)
        return task

    def arguments(self) -> list[str]:
        """The command line that gives this task."""
        return [part for name, value in vars(self).items() for part in (f"--{name}", str(value))]

    @property
    def horizon(self) -> int:
        """Steps that schedules are laid out for."""
        return CONSTANT if self.initial else self.steps

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of latents that reconstruct alone, of matryoshka, below d_sae."""
        return tuple(self.d_sae // part for part in (8, 4, 2))

    @property
    def d_in(self) -> int:
        """Components of an input."""
        return np.load(self.data, mmap_mode="r").shape[1]

    def weights(self) -> dict[str, Tensor]:
        """The initial ones: W_enc, b_enc, W_dec, b_dec."""
        return {name: weight.to(self.device) for name, weight in load_file(self.initial).items()}

    def batches(self) -> Iterator[Tensor]:
        """The inputs in order, from the start again when they end; without end."""
        rows = np.load(self.data, mmap_mode="r")
        starts = range(0, len(rows) - self.batch + 1, self.batch)
        while True:
            for start in starts:
                yield torch.from_numpy(np.array(rows[start : start + self.batch])).to(self.device)


class Report:
    """Times and memory of one process."""

    def __init__(self) -> None:
        """Call it when everything is imported and nothing is made yet."""
        self.seconds: list[float] = []
        self._before = _memory_mb("VmRSS")

    def train(self, task: Task, step: Callable[[int, Tensor], object]) -> None:
        """Call `step(number, batch)` for all steps and time each; fetching the batch is not counted."""
        for number, x in zip(range(task.steps), task.batches(), strict=False):
            start = now(task.device)
            step(number, x)
            self.seconds.append(now(task.device) - start)

    def finish(self, task: Task, weights: dict[str, Tensor], version: str) -> None:
        """Write the weights and print the rest."""
        peak = _allocated_mb(task.device) if is_gpu(task.device) else _memory_mb("VmHWM") - self._before
        save_file({name: value.detach().float().cpu().contiguous() for name, value in weights.items()}, Path(task.out))
        print(json.dumps({"seconds": self.seconds, "peak_mb": peak, "version": version}))


def is_gpu(device: str) -> bool:
    """Whether work is queued there, and done while the program goes on."""
    return torch.device(device).type == "cuda"


def now(device: str) -> float:
    """The clock when all is done that was asked of the device."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _allocated_mb(device: str) -> float:
    """The most that tensors have taken on a GPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20


def _memory_mb(key: str) -> float:
    """Of this process, by Linux; `getrusage` would begin with the peak of the process that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024
