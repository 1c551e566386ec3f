"""What several commands have in common: options, and the processes that run one of them together."""

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
    """A command that runs the model of an index, in the precision that the index was made in."""

    device: Device = "cpu"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`."""


@dataclass(frozen=True, kw_only=True)
class OfIndex(OnDevice):
    """A command that runs the model of an index."""

    model: Name | None = None
    """The model that the index was built with; searched for when not given: in the index, where it was, by its name."""
    sae: Name | None = None
    """The SAE that the index was built with, likewise."""


@dataclass(frozen=True, kw_only=True)
class MayRunModel(OfIndex):
    """A command that shows more of an index when it runs the model."""

    with_model: bool = False
    """Run the model of the index, for what is computed with it. Implied by --model and --sae."""


@contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the processes that `torchrun` started with this one; yield its rank, 0 for a process that is alone.

    Torch is not loaded for one that is alone: what is wrong with its options is said sooner.
    """
    if "WORLD_SIZE" not in os.environ:
        yield 0
        return
    from headscope.sae.training.ranks import together

    with together(device) as ranks:
        yield ranks.rank
