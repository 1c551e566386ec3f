"""How an SAE is trained; plain values, no torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from headscope.errors import TrainingError

Variant = Literal["batchtopk", "relu"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides the training of an SAE, beside the activations it is trained on."""

    variant: Variant = "batchtopk"
    """batchtopk: the k * batch largest pre-activations of a batch are active (saved as JumpReLU). relu: the post's
    ReLU with an L1 penalty."""
    d_sae: int = 2048
    """Latents."""
    target_l0: float = 12.0
    """Mean number of active latents per token: k for batchtopk; for relu the L1 coefficient is steered towards it."""
    tokens: int = 4_500_000
    """Activations to train on in all; the corpus is read as often as that takes."""
    batch: int = 2048
    """Activations in a step."""
    lr: float = 2e-3
    """Adam's peak learning rate, for inputs scaled to a mean distance of sqrt(d_in) from their mean."""
    resample: int = 3
    """How often, spread over the first 60 % of training, dead latents are set on badly reconstructed inputs."""
    exclude_bos: bool = True
    """Leave BOS positions out of training."""
    buffer: int = 262_144
    """Activations held at a time to be mixed."""
    seed: int = 0
    """Decides the initial dictionary and the order of activations."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train anything."""
        positive = {n: getattr(self, n) for n in ("d_sae", "target_l0", "tokens", "batch", "lr", "buffer")}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise TrainingError(
                    f"{name} = {value}", expected="a finite number above 0", do=f"change --{name.replace('_', '-')}"
                )
        for name in ("resample", "seed"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} = {getattr(self, name)}", expected="0 or more", do=f"raise --{name}")
        if self.batch < 2 or round(self.target_l0 * self.batch) < 1:
            raise TrainingError(
                f"batch = {self.batch} at target_l0 = {self.target_l0}",
                expected="2 or more, with at least one active latent in a batch",
                do="raise --batch or --target-l0",
            )
        if self.target_l0 >= self.d_sae:
            raise TrainingError(
                f"target_l0 = {self.target_l0}", expected=f"less than d_sae = {self.d_sae}", do="lower --target-l0"
            )
        if self.buffer < 2 * self.batch:
            raise TrainingError(
                f"buffer = {self.buffer}",
                expected=f"at least two batches, {2 * self.batch}",
                do="raise --buffer or lower --batch",
            )

    @property
    def n_steps(self) -> int:
        """Steps that `tokens` fill; the last one may run a little over."""
        return -(-self.tokens // self.batch)

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)
