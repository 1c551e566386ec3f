"""Functions for `Model.edit`: what to put in the place of an activation."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.sae.model import SAE

Edit = Callable[[Float[Tensor, "batch position d"]], Float[Tensor, "batch position d"]]


def constant(vector: Float[Tensor, " d"], keep: Bool[Tensor, "batch position"] | None = None) -> Edit:
    """The same vector at every position but those to keep."""
    return lambda value: _kept(value, vector.to(value).expand_as(value), keep)


def reconstruction(sae: SAE, keep: Bool[Tensor, "batch position"] | None = None) -> Edit:
    """The SAE's reconstruction, its error dropped, at every position but those to keep."""
    return lambda value: _kept(value, sae(value), keep)


def _kept(value: Tensor, edited: Tensor, keep: Bool[Tensor, "batch position"] | None) -> Tensor:
    return edited if keep is None else torch.where(keep[..., None], value, edited)
