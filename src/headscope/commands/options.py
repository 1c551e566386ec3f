"""Options shared by several commands, and the processes that run one command together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tyro

from headscope.limits import Device, Name

FLAT = tyro.conf.arg(name="")
"""Marks a record whose fields are options of the command itself."""


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """A command that runs the model of an index, in the precision the index was built with."""

    device: Device = "cpu"
    """Device of the model: `cpu`, `cuda`, `cuda:1`."""


@dataclass(frozen=True, kw_only=True)
class OfIndex(OnDevice):
    """A command that runs the model of an index."""

    model: Name | None = None
    """The model that the index was built with; default: search in the index, at its original path, and by name."""
    sae: Name | None = None
    """The SAE that the index was built with; default: the same search."""


@dataclass(frozen=True, kw_only=True)
class MayRunModel(OfIndex):
    """A command that shows more of an index when it runs the model."""

    with_model: bool = False
    """Run the model of the index, for everything that needs it. Implied by --model and --sae."""


@contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the process group that `torchrun` started; yield this process's rank, 0 for a single process.

    A single process does not load torch, so that invalid options are reported sooner.
    """
    if "WORLD_SIZE" not in os.environ:
        yield 0
        return
    from headscope.sae.training.ranks import together

    with together(device) as ranks:
        yield ranks.rank
