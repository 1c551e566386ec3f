"""Training configuration of an SAE; plain values, no torch."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from headscope.errors import TrainingError
from headscope.limits import (
    Above0,
    Count,
    CountFrom0,
    From0,
    Name,
    Number,
    Seed,
    Share,
    ShareBelow1,
    Tokens,
    check_fields,
)

Variant = Literal["batchtopk", "topk", "relu", "jumprelu", "gated"]
Resamplings = Annotated[int, Number(0, 1000, because="each starts latents that then have to be trained")]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Configuration of SAE training, apart from the activations."""

    variant: Variant = "batchtopk"
    """Activation function: batchtopk and topk keep a fixed number of the largest pre-activations; relu (the post's),
    jumprelu and gated are sparsified by a penalty. Saved as SAELens' kinds; batchtopk as jumprelu."""
    d_sae: Count = 2048
    """Number of latents."""
    target_l0: Above0 = 12.0
    """Mean number of active latents per token: k for topk and batchtopk; for the others the penalty is steered towards
    it, for jumprelu and gated starting from eight times as many."""
    coefficient: From0 | None = None
    """Penalty coefficient; if given, it is fixed and target_l0 is ignored."""
    coefficient_warmup: ShareBelow1 = 0.0
    """Fraction of training over which a given coefficient rises from 0."""
    prefixes: tuple[Count, ...] = ()
    """Matryoshka: prefix sizes; the latents of each prefix also reconstruct on their own."""
    decoder: Literal["unit", "free"] = "unit"
    """Decoder rows of unit norm, or free; free rows weight relu's penalty, and jumprelu's with tanh, by their norm."""
    auxiliary: From0 | None = None
    """topk, batchtopk: coefficient of the auxiliary loss, in which dead latents reconstruct the error; default 1/4.
    jumprelu: coefficient of the dead latents' pre-activation loss; default 1/32."""
    bandwidth: Above0 = 0.5
    """jumprelu: width of the rectangular kernel for the threshold gradient, in units of scaled inputs."""
    tanh: Above0 | None = None
    """jumprelu: penalise tanh(this * activation) instead of the number of active latents."""
    error_in: Literal["site", "output"] = "site"
    """Where the error is measured: `output`, for z, after W_O, as it enters the residual stream."""
    scaling: Literal["site", "head", "norm", "none"] = "site"
    """Divisor of the inputs, chosen so that their mean distance from their mean is sqrt(d_in): one number, one per head
    (then sqrt(d_head)), or none; norm: one number, so that their mean norm is sqrt(d_in)."""
    center: Literal["mean", "median", "zero", "none"] = "mean"
    """Initial b_dec: the inputs' mean, their geometric median, or 0. none: starts at 0, and the encoder reads the
    inputs without subtracting b_dec."""
    start: Literal["data", "subspace", "random", "transpose"] = "data"
    """Initial dictionary: input directions, or random directions in the subspace where inputs vary (both with a tied
    encoder), or independent random encoder and decoder; transpose: random decoder, with norm 0.1 if free, and its
    transpose as encoder."""
    tokens: Tokens = 4_500_000
    """Total activations to train on; the corpus is repeated as needed."""
    batch: Count = 2048
    """Activations per step."""
    lr: Above0 = 2e-3
    """Adam's peak learning rate, for inputs scaled as above."""
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    """Adam's beta1 and beta2."""
    warmup: Literal["linear", "cosine"] = "linear"
    """Learning-rate warm-up: linear from 0, or cosine from a tenth, repeated after each resampling."""
    warmup_steps: CountFrom0 = 200
    """Length of the warm-up, in steps."""
    decay: Share = 0.3
    """Fraction of training, at its end, over which the learning rate falls to 0."""
    clip: Above0 | None = None
    """Maximum norm of the gradients, over all parameters together."""
    resample: Resamplings | None = None
    """Number of times dead latents are resampled; default: 3 for relu and gated, 0 for the others, whose dead latents
    have the auxiliary loss."""
    resample_every: Count | None = None
    """Steps between resamplings; default: spread over the first 60 % of training."""
    resample_by: Literal["loss", "random"] = "loss"
    """Resample on inputs drawn by their squared loss (Bricken et al. 2023), or on random directions."""
    dead_after: Tokens = 500_000
    """Activations without firing after which a latent is dead; capped below the activations before the first resampling
    and at an eighth of all, the latter unless `resample_every` is given."""
    dead_below: ShareBelow1 = 0.0
    """Firing rate over the dead_after activations before a resampling below which a latent is resampled; 0: only
    latents that never fired."""
    exclude_bos: bool = True
    """Exclude BOS positions from training."""
    buffer: Count = 262_144
    """Activations in the shuffle buffer."""
    cache: Name | None = None
    """Folder in which activations are cached for later runs on the same ones."""
    seed: Seed = 0
    """Seed of the initial dictionary and of the order of activations."""

    def __post_init__(self) -> None:
        """Reject values that cannot train anything or would be ignored."""
        check_fields(self, TrainingError)
        self._check_words()
        self._check_parts()
        if len(self.betas) != 2:
            raise TrainingError(f"betas = {self.betas}", expected="two shares", do="change --betas")
        if self.target_l0 >= self.d_sae:
            raise TrainingError(
                f"target_l0 = {self.target_l0}", expected=f"less than d_sae = {self.d_sae}", do="lower --target-l0"
            )
        if self.batch < 2 or round(self.target_l0 * self.batch) < 1:
            raise TrainingError(
                f"batch = {self.batch} at target_l0 = {self.target_l0}",
                expected="2 or more, with at least one active latent in a batch",
                do="raise --batch or --target-l0",
            )
        if self.variant == "topk" and self.target_l0 != round(self.target_l0):
            raise TrainingError(
                f"target_l0 = {self.target_l0} for topk", expected="a whole number", do="change --target-l0"
            )
        if self.buffer < 2 * self.batch:
            raise TrainingError(
                f"buffer = {self.buffer}",
                expected=f"at least two batches, {2 * self.batch}",
                do="raise --buffer or lower --batch",
            )
        if sorted({*self.prefixes, 0, self.d_sae}) != [0, *self.prefixes, self.d_sae]:
            raise TrainingError(
                f"prefixes = {self.prefixes}",
                expected=f"rising numbers between 0 and d_sae = {self.d_sae}",
                do="change --prefixes",
            )

    def _check_words(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise TrainingError(
                    f"{name} = {value!r}",
                    expected=f"one of {', '.join(get_args(kind))}",
                    do=f"change --{name.replace('_', '-')}",
                )

    def _check_parts(self) -> None:
        """Reject options that the variant does not use."""
        idle = {
            "tanh": self.tanh is not None and self.variant != "jumprelu",
            "coefficient": bool(self.coefficient) and self.variant in ("topk", "batchtopk"),
        }
        for name in (name for name, useless in idle.items() if useless):
            raise TrainingError(
                f"{name} = {getattr(self, name)} for {self.variant}",
                expected="a coefficient for relu, jumprelu and gated, tanh for jumprelu",
                do=f"leave out --{name}, or pass --{name} None where a preset has one",
            )

    @property
    def n_steps(self) -> int:
        """Number of steps that cover `tokens`, rounded up."""
        return -(-self.tokens // self.batch)

    @property
    def steered(self) -> bool:
        """Whether the penalty's coefficient follows `target_l0`."""
        return self.variant in ("relu", "jumprelu", "gated") and self.coefficient is None

    @property
    def resampled_at(self) -> frozenset[int]:
        """Steps after which dead latents are resampled."""
        n = 3 * (self.variant in ("relu", "gated")) if self.resample is None else self.resample
        if self.resample_every is not None:
            return frozenset(self.resample_every * (i + 1) for i in range(n))
        return frozenset(int(0.6 / n * (i + 1) * self.n_steps) for i in range(n)) - {0}

    @property
    def dead_steps(self) -> int:
        """Steps without firing after which a latent is dead."""
        limits = [step - 1 for step in self.resampled_at]
        if self.resample_every is None:
            limits.append(self.n_steps // 8)
        return max(1, min([round(self.dead_after / self.batch), *limits]))

    @property
    def auxiliary_coefficient(self) -> float:
        """`auxiliary`, or its default for the variant."""
        if self.auxiliary is not None:
            return self.auxiliary
        return 1 / 32 if self.variant == "jumprelu" else 0.25

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        return asdict(self) | {"betas": list(self.betas), "prefixes": list(self.prefixes)}
