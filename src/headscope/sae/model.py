"""A sparse autoencoder, including its activation function.

    pre = (x - b_dec) @ W_enc + b_enc        (x @ W_enc + b_enc where apply_b_dec_to_input is false)
    f = activation(pre)
    x_hat = f @ W_dec + b_dec

Names and layout are SAELens': `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`. The pre-activation is linear in x for every
activation here, as direct feature attribution requires.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import SAEError
from headscope.models.placing import DTYPES, device_of
from headscope.names import bundled_model, places
from headscope.site import Site


@dataclass(frozen=True)
class ReLU:
    """f = max(pre, 0)."""

    name = "standard"
    title = "ReLU"

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Apply the activation function."""
        return pre.relu()


@dataclass(frozen=True)
class JumpReLU:
    """f = pre where pre exceeds the latent's threshold, else 0; never negative.

    Trained BatchTopK and Matryoshka BatchTopK SAEs have this form, with one threshold for all latents.
    """

    threshold: Float[Tensor, " d_sae"]
    name = "jumprelu"
    title = "JumpReLU"

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Apply the activation function."""
        return torch.where(pre > self.threshold, pre, 0.0).relu()


@dataclass(frozen=True)
class Gated(JumpReLU):
    """f = relu(magnitude) where the gate is above 0 (Rajamanoharan et al., 2024), written as a threshold.

    The two paths share their directions, `gate = x W + b_gate` and `magnitude = x W exp(r_mag) + b_mag`, so the gate is
    a line in the magnitude: it is open exactly where `magnitude > b_mag - exp(r_mag) b_gate`. With the magnitude as the
    pre-activation (`W_enc = W exp(r_mag)`, `b_enc = b_mag`) that is a JumpReLU, and its pre-activation is linear in x.
    """

    name = "gated"
    title = "Gated"

    @classmethod
    def of_paths(
        cls, r_mag: Float[Tensor, " d_sae"], b_mag: Float[Tensor, " d_sae"], b_gate: Float[Tensor, " d_sae"]
    ) -> "Gated":
        """Build from the parameters of the two paths, as stored in files."""
        return cls(b_mag - r_mag.exp() * b_gate)


@dataclass(frozen=True)
class TopK:
    """f = the k largest of pre in each row, the rest 0; never negative.

    Whether a latent is active depends on the others: code that needs a threshold per latent rejects it.
    """

    k: int
    name = "topk"
    title = "TopK"

    def __call__(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Apply the activation function."""
        values, latents = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, latents, values.relu())


Activation = ReLU | JumpReLU | TopK

PROCESSED = "transformer_lens_processed"
"""`z_convention` of an SAE trained on the activations of a model with weights processed by TransformerLens."""

MODEL_PATH = "model_path"
"""Metadata key for the path of the SAE's model folder, relative to the SAE's own folder."""

MODULE_OUTPUT = "module output"
"""Value of `reads` in an SAE's metadata for a module's own output, before any norm that follows it."""


@dataclass(frozen=True)
class HeadBlocks:
    """The dictionary of a z SAE split by head: what each latent reads from and writes to each head's z."""

    encoder: Float[Tensor, "head d_sae d_head"]
    decoder: Float[Tensor, "head d_sae d_head"]

    def through(self, W_O: Float[Tensor, "z d_model"]) -> Float[Tensor, "head d_sae d_model"]:  # noqa: N803
        """Return what each latent writes to the residual stream through each head, `W_dec[j, h, :] @ W_O[h]`."""
        return self.decoder @ W_O.reshape(len(self.decoder), -1, W_O.shape[-1])


def _trained_as(metadata: dict[str, Any]) -> str | None:
    """Return the training variant of a BatchTopK SAE according to its files; None for others.

    The names are those of headscope's `variant`, of dictionary_learning's `dict_class` and of SAELens' `architecture`.
    """
    training = metadata.get("training")
    config = training.get("config") if isinstance(training, dict) else None
    if not isinstance(config, dict):
        return None
    name = next((config[key] for key in ("variant", "dict_class", "architecture") if config.get(key)), None)
    if name not in ("batchtopk", "BatchTopKSAE", "matryoshka_batchtopk", "MatryoshkaBatchTopKSAE"):
        return None
    nested = "Matryoshka " if config.get("prefixes") or str(name).lower().startswith("matryoshka") else ""
    k = config.get("target_l0", config.get("k"))
    return f"{nested}BatchTopK" + (f" (k = {k:g})" if isinstance(k, int | float) else "")


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder of one site of one model."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    activation: Activation
    site: Site
    model_name: str
    """The model whose activations it was trained on, in a form accepted by `load_model`."""
    apply_b_dec_to_input: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further properties from its files: z convention, training run, corpus, context length, BOS handling."""
    folder: Path | None = None
    """The folder of its files, if any: used to find a model that was moved together with them."""

    def __post_init__(self) -> None:
        """Check that shapes are consistent and all numbers finite."""
        d_in, d_sae = self.W_enc.shape
        tensors = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        shapes = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "threshold": (d_sae,)}
        if isinstance(self.activation, JumpReLU):
            tensors["threshold"] = self.activation.threshold
        if isinstance(self.activation, TopK) and not 1 <= self.activation.k <= d_sae:
            raise SAEError(f"k = {self.activation.k}", expected=f"1 to {d_sae}, the latents", do="check cfg.json")
        for name, tensor in tensors.items():
            got, expected = tuple(tensor.shape), shapes.get(name, (d_in, d_sae))
            if got != expected:
                raise SAEError(
                    f"{name} of shape {got}",
                    expected=f"{expected}, by W_enc {(d_in, d_sae)}",
                    do="check that all weights come from one SAE",
                )
            if tensor.is_meta:
                raise SAEError(
                    f"{name} is on the device `meta`: a shape without numbers",
                    expected="weights in memory",
                    do="load them",
                )
            if not tensor.isfinite().all():
                raise SAEError(f"{name} holds NaN or infinity", expected="finite weights", do="train it again")

    @property
    def d_in(self) -> int:
        """Width of an input vector."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def kind(self) -> str:
        """Its activation function for display, with the training variant where that differs.

        Trained BatchTopK SAEs are applied as JumpReLU: `BatchTopK (k = 12), applied as JumpReLU`.
        """
        k = f" (k = {self.activation.k})" if isinstance(self.activation, TopK) else ""
        applied, trained = f"{self.activation.title}{k}", _trained_as(self.metadata)
        return applied if trained is None else f"{trained}, applied as {applied}"

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the input of the activation function; linear in x."""
        centred = x - self.b_dec if self.apply_b_dec_to_input else x
        return centred @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the feature activations, never negative."""
        return self.activation(self.pre_activations(x))

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction."""
        return f @ self.W_dec + self.b_dec

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return x_hat: encode, then decode."""
        return self.decode(self.encode(x))

    def error(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction error, `x - x_hat`."""
        return x - self(x)

    def head_blocks(self, n_heads: int) -> HeadBlocks:
        """Split encoder and decoder by head.

        Raises:
            SAEError: not an SAE of z, or its vectors cannot be split into this many heads.
        """
        if self.site.kind != "z" or n_heads < 1 or self.d_in % n_heads:
            raise SAEError(
                f"an SAE of {self.d_in} components of {self.site.kind}, to be cut into {n_heads} heads",
                expected="an SAE of z, n_heads * d_head wide",
                do="pass one of attention's z, with the heads of its model",
            )
        by_head = (self.d_sae, n_heads, -1)
        return HeadBlocks(self.W_enc.T.reshape(by_head).transpose(0, 1), self.W_dec.reshape(by_head).transpose(0, 1))

    @property
    def model_places(self) -> list[Path]:
        """Candidate paths of its model: as stored, or moved together with its files (`names.places`)."""
        if self.folder is None or bundled_model(self.model_name):
            return []
        return places(self.model_name, self.metadata.get(MODEL_PATH), self.folder)

    @property
    def processed(self) -> bool:
        """Whether it reads activations of TransformerLens' processed weights (`headscope.sae.convert`)."""
        return self.metadata.get("z_convention") == PROCESSED

    def check_raw(self) -> None:
        """Raise SAEError when it does not read the model's own activations."""
        if self.processed:
            raise SAEError(
                f"an SAE trained on {self.site.kind} of weights that TransformerLens processed",
                expected="one that reads the model's own activations",
                do="convert it first: headscope.sae.convert.fitted(sae, model), or headscope convert",
            )

    @property
    def bias(self) -> Float[Tensor, " d_sae"]:
        """The constant part of the pre-activation, `b_enc - b_dec @ W_enc`: `pre = x @ W_enc + bias`."""
        return self.b_enc - self.b_dec @ self.W_enc if self.apply_b_dec_to_input else self.b_enc

    def to(self, target: torch.device | torch.dtype | str) -> "SAE":
        """Return the SAE on another device or in another precision, by name or torch object.

        Raises:
            ModelError: there is no such device or precision.
        """
        if isinstance(target, str):
            target = DTYPES.get(target) or device_of(target)
        weights = {name: getattr(self, name).to(target) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        activation = self.activation
        if isinstance(activation, JumpReLU):
            activation = type(activation)(activation.threshold.to(target))
        return replace(self, **weights, activation=activation)
