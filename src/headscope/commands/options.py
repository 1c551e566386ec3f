"""What the options of several commands have in common."""

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
