"""Norms of a model: numerator, scale, gain and bias."""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """`numerator(x) / scale(x) * gain + bias`: a LayerNorm, or one of the RMSNorms of `transformers`."""

    module: nn.Module
    gain_from_one: bool = False
    """Whether its weight is the gain minus 1, as in Gemma."""

    @property
    def centres(self) -> bool:
        """Whether the mean is subtracted first: LayerNorm does, RMSNorm does not."""
        return isinstance(self.module, nn.LayerNorm)

    @property
    def gain(self) -> Float[Tensor, " d_model"] | None:
        """Multiplies the quotient; None for a norm without weights."""
        weight = cast(Tensor | None, getattr(self.module, "weight", None))
        return weight + 1 if self.gain_from_one and weight is not None else weight

    @property
    def bias(self) -> Float[Tensor, " d_model"] | None:
        """Added at the end; None where there is none."""
        return cast(Tensor | None, getattr(self.module, "bias", None))

    def numerator(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the numerator, in float32 at least: x, minus its mean for LayerNorm."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """Return the divisor, in float32 at least, as norms compute it.

        `sqrt(mean((x - mean(x))^2) + eps)` for LayerNorm, `sqrt(mean(x^2) + eps)` for RMSNorm.
        """
        named = "variance_epsilon" if hasattr(self.module, "variance_epsilon") else "eps"
        eps = cast(float, getattr(self.module, named))
        return (self.numerator(x).square().mean(-1, keepdim=True) + eps).sqrt()

    def formula(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Compute the norm of x from its weights, in float32 at least."""
        normed = self.numerator(x) / self.scale(x)
        weight = cast(Tensor | None, getattr(self.module, "weight", None))
        if weight is not None:
            normed = normed * (weight.to(normed.dtype) + self.gain_from_one)
        return normed if self.bias is None else normed + self.bias

    def apply(
        self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*batch 1"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """Apply the norm to x; with another scale than its own, if one is given."""
        output: Tensor = self.module(x)
        return output if scale is None else self.rescaled(output, self.scale(x) / scale)

    def rescaled(
        self, output: Float[Tensor, "*batch d_model"], factor: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the norm's output with its part without the bias multiplied."""
        bias = 0 if self.bias is None else self.bias
        return ((output - bias) * factor + bias).to(output.dtype)
