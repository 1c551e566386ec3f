"""How an SAE is trained; plain values, no torch."""

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
    """What decides the training of an SAE, beside the activations it is trained on."""

    variant: Variant = "batchtopk"
    """Of the activation function: batchtopk and topk keep a number of the largest pre-activations, relu (the post's),
    jumprelu and gated are held down by a penalty. Saved as SAELens' kinds; batchtopk as jumprelu."""
    d_sae: Count = 2048
    """Latents."""
    target_l0: Above0 = 12.0
    """Mean number of active latents per token: k for topk and batchtopk; the others' penalty is steered towards it, for
    jumprelu and gated from eight times as many."""
    coefficient: From0 | None = None
    """Of the penalty; given, it is kept, and target_l0 has no part."""
    coefficient_warmup: ShareBelow1 = 0.0
    """Share of training over which a given coefficient rises from 0."""
    prefixes: tuple[Count, ...] = ()
    """Matryoshka: so many latents, for each number here, also reconstruct without those after them."""
    decoder: Literal["unit", "free"] = "unit"
    """Decoder rows of unit norm; free ones weigh relu's penalty, and jumprelu's with tanh, by their norm."""
    auxiliary: From0 | None = None
    """topk, batchtopk: coefficient of the error that dead latents reconstruct, 1/4 when not given. jumprelu: of what
    they lack to fire, 1/32."""
    bandwidth: Above0 = 0.5
    """jumprelu: width of the rectangle through which thresholds learn, in the units of scaled inputs."""
    tanh: Above0 | None = None
    """jumprelu: penalise tanh(this * activation); else the number of active latents."""
    error_in: Literal["site", "output"] = "site"
    """Where errors are measured: `output`, for z, after W_O, as the residual stream gets them."""
    scaling: Literal["site", "head", "norm", "none"] = "site"
    """What inputs are divided by, so that their mean distance from their mean is sqrt(d_in): one number, one for each
    head (and then sqrt(d_head)), or nothing; norm: one number, so that their mean norm is sqrt(d_in)."""
    center: Literal["mean", "median", "zero", "none"] = "mean"
    """Where b_dec starts: the mean of inputs, their geometric median, 0. none: at 0, and the encoder reads inputs as
    they are, not less b_dec."""
    start: Literal["data", "subspace", "random", "transpose"] = "data"
    """The first dictionary: directions of inputs, random ones in the subspace where inputs vary (both with the encoder
    tied), or random ones for encoder and decoder each; transpose: random ones for the decoder, at a norm of 0.1 where
    it is free, and the encoder as its transpose."""
    tokens: Tokens = 4_500_000
    """Activations to train on in all; the corpus is read as often as that takes."""
    batch: Count = 2048
    """Activations in a step."""
    lr: Above0 = 2e-3
    """Adam's peak learning rate, for inputs scaled as above."""
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    """Adam's."""
    warmup: Literal["linear", "cosine"] = "linear"
    """From 0 in a line, or from a tenth in a cosine, which is repeated after each resampling."""
    warmup_steps: CountFrom0 = 200
    """How long."""
    decay: Share = 0.3
    """Share of training, at its end, over which the learning rate falls to 0."""
    clip: Above0 | None = None
    """Largest norm of all gradients together."""
    resample: Resamplings | None = None
    """How often dead latents are started anew; 3 times for relu and gated when not given, never for the others, whose
    dead latents have the auxiliary loss."""
    resample_every: Count | None = None
    """Steps between; without, resamplings are spread over the first 60 % of training."""
    resample_by: Literal["loss", "random"] = "loss"
    """On inputs drawn by their squared loss (Bricken et al. 2023), or on random directions."""
    dead_after: Tokens = 500_000
    """Activations without firing after which a latent is dead; fewer than there are before the first resampling, and at
    most an eighth of all, unless `resample_every` sets a pace of its own."""
    dead_below: ShareBelow1 = 0.0
    """Share of the dead_after activations before a resampling; who fires on fewer is started anew. 0: who never did."""
    exclude_bos: bool = True
    """Leave BOS positions out of training."""
    buffer: Count = 262_144
    """Activations held at a time to be mixed."""
    cache: Name | None = None
    """A folder that keeps the activations, for the next training on the same."""
    seed: Seed = 0
    """Decides the initial dictionary and the order of activations."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train anything, or that would have no part in it."""
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
        """Options that are given to variants or recipes that have no use for them."""
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
        """Steps that `tokens` fill; the last one may run a little over."""
        return -(-self.tokens // self.batch)

    @property
    def steered(self) -> bool:
        """Whether the penalty's coefficient follows `target_l0`."""
        return self.variant in ("relu", "jumprelu", "gated") and self.coefficient is None

    @property
    def resampled_at(self) -> frozenset[int]:
        """Steps after which dead latents are started anew."""
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
        """`auxiliary`, or what it is when it is not given."""
        if self.auxiliary is not None:
            return self.auxiliary
        return 1 / 32 if self.variant == "jumprelu" else 0.25

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self) | {"betas": list(self.betas), "prefixes": list(self.prefixes)}
