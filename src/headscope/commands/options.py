"""What the options of several commands have in common."""

from dataclasses import dataclass

import tyro

from headscope.limits import Device

FLAT = tyro.conf.arg(name="")
"""Marks a record whose fields are options of the command itself."""


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """A command that runs the model of an index, in the precision that the index was made in."""

    device: Device = "cpu"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`."""
