"""Data-parallel training: collective operations of a step; without a process group nothing is exchanged."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, each on its own inputs."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> "Ranks":
        """Return the ranks of the default process group; a single one without it."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.size

    def mean(self, *numbers: int | float) -> list[float]:
        """Return the mean of each number over ranks."""
        if self.size == 1:
            return [float(number) for number in numbers]
        together = torch.tensor(numbers, dtype=torch.float64)
        self.average([together])
        return together.tolist()

    def total(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def largest(self, tensor: Tensor) -> None:
        """Replace a tensor by its maximum over ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def least(self, values: Float[Tensor, " n_own"]) -> float:
        """Return the least value over all ranks; 0 where there is none."""
        own = torch.cat([values, values.new_full((1,), torch.inf)]).min()
        self.largest(own.neg_())
        return 0.0 if own == -torch.inf else -own.item()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the first rank's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def nth_largest(self, values: Float[Tensor, " n_own"], n: int) -> float:
        """Return the n-th largest value over all ranks; minus infinity where there are fewer."""
        own = values.topk(min(n, len(values)), sorted=False).values
        padded = torch.cat([own, own.new_full((n - len(own),), -torch.inf)])
        every = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(every, padded)
        return torch.cat(every).topk(n).values[-1].item()


ALONE = Ranks()


@contextmanager
def together(device: str) -> Iterator[Ranks]:
    """Join the process group that `torchrun` started; a single process outside of it.

    Args:
        device: device of training; with several GPUs, `cuda` becomes each rank's own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Ranks.joined()
    finally:
        dist.destroy_process_group()
