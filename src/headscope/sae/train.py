"""Train an SAE on a stream of activations, with gradients written out by hand.

Loss of a batch of B inputs x, in the units of inputs scaled so that their mean distance from the mean is sqrt(d_in):

    L = 1/B sum_n ||x_hat_n - x_n||^2  +  lambda/B sum_n sum_j f_nj          (lambda = 0 for batchtopk)

After the encoder's product everything is sparse: decoding and both weight gradients touch only the active
(input, latent) pairs; a batch with many active latents takes the dense way, with the same numbers. Decoder rows have
unit norm: the gradient's part along a row is removed, and rows are renormalised after each step (Bricken et al. 2023).
BatchTopK is Bussmann et al. (2024), https://arxiv.org/abs/2412.06410. Resampling follows Bricken et al., with the
direction taken from the reconstruction error.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from headscope.capture import activations, check_corpus, is_text
from headscope.corpus import PADDING, Corpus
from headscope.errors import TrainingError
from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.model import SAE, JumpReLU, ReLU
from headscope.site import Site

DENSE_ABOVE = 0.03
"""Share of active (input, latent) pairs above which the dense gradients are faster."""
_WARMUP_STEPS = 200
_DECAY_SHARE = 0.3  # of the steps, at the end, over which the learning rate falls to zero
_RESAMPLE_UNTIL = 0.6
_L1_GAIN = 0.004  # change of log lambda per step and unit of log(L0 / target)
_CALIBRATION = 65_536  # activations on which the BatchTopK threshold is set
_CURVE_POINTS = 100


# --------------------------------------------------------------------------------------------------------- activations
class ActivationStream:
    """An endless stream of mixed activations, refilled in place: half of the buffer is handed out, then replaced."""

    def __init__(self, model: Model, corpus: Corpus, site: Site, config: TrainConfig) -> None:
        """Fill the buffer.

        Raises:
            CorpusError: the model cannot read the corpus.
            TrainingError: the corpus holds fewer activations than two batches, or they are not finite.
        """
        check_corpus(model, corpus)
        self._model, self._corpus, self._site, self._config = model, corpus, site, config
        self._rng = np.random.default_rng(config.seed)
        self.epochs = 0
        """Passes over the corpus that were started."""
        available = n_activations(corpus, config)
        capacity = min(config.buffer, available)
        if capacity < 2 * config.batch:
            raise TrainingError(
                f"a corpus of {available:,} activations",
                expected=f"at least two batches of {config.batch}",
                do="use a larger corpus or a smaller --batch",
            )
        self._source = self._read()
        self._left = torch.empty(0, model.width(site), device=model.device)
        self.buffer = self._take(capacity)

    def _read(self) -> Iterator[Tensor]:
        while True:
            self.epochs += 1
            order = self._rng.permutation(len(self._corpus.blocks))
            for numbers, tokens, x in activations(self._model, self._corpus, self._site, order):
                rows = x[self._counted(numbers, tokens)]
                if not rows.isfinite().all():
                    raise TrainingError(
                        f"NaN or infinity in {self._site.hook_name} of {self._model.spec.name}",
                        expected="finite activations",
                        do="check the model's weights and dtype",
                    )
                yield rows

    def _counted(self, numbers: Int[np.ndarray, " n"], tokens: Int[Tensor, "n position"]) -> Bool[Tensor, "n position"]:
        if self._config.exclude_bos:
            return is_text(self._model, tokens)
        return torch.from_numpy(self._corpus.offset[numbers] != PADDING).to(tokens.device)

    def _take(self, n: int) -> Float[Tensor, "n d_in"]:
        parts, have = [self._left], len(self._left)
        while have < n:
            parts.append(next(self._source))
            have += len(parts[-1])
        rows = torch.cat(parts)
        self._left = rows[n:]
        return rows[:n].clone()

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Batches without end."""
        batch = self._config.batch
        while True:
            order = torch.from_numpy(self._rng.permutation(len(self.buffer))).to(self.buffer.device)
            n_out = len(order) // 2 // batch * batch
            for start in range(0, n_out, batch):
                yield self.buffer[order[start : start + batch]]
            self.buffer[order[:n_out]] = self._take(n_out)


def n_activations(corpus: Corpus, config: TrainConfig) -> int:
    """Activations that one pass over the corpus gives."""
    return corpus.n_text_tokens if config.exclude_bos else corpus.n_tokens - corpus.n_padding


# ---------------------------------------------------------------------------------------------------------- parameters
@dataclass
class Parameters:
    """The weights while they are trained; the encoder is stored by latent, so that gathers read whole rows."""

    encoder: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    decoder: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def tensors(self) -> list[Tensor]:
        """In a fixed order, that of `Gradients`."""
        return [self.encoder, self.b_enc, self.decoder, self.b_dec]

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """(x - b_dec) @ W_enc + b_enc."""
        return torch.addmm(self.b_enc, x - self.b_dec, self.encoder.T)

    @classmethod
    def from_samples(cls, x: Float[Tensor, "n d_in"], d_sae: int, generator: torch.Generator) -> "Parameters":
        """Decoder rows are centred inputs at unit norm, the encoder their transpose, b_dec the mean."""
        mean = x.mean(0)
        chosen = torch.randint(0, len(x), (d_sae,), generator=generator).to(x.device)
        noise = torch.randn(d_sae, x.shape[1], generator=generator).to(x) * 0.01
        rows = _unit(x[chosen] - mean + noise)
        return cls(rows.clone(), torch.zeros(d_sae).to(x), rows, mean)


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


@dataclass(frozen=True)
class Active:
    """The active (input, latent) pairs of a batch, by input."""

    row: Int[Tensor, " pair"]
    latent: Int[Tensor, " pair"]
    value: Float[Tensor, " pair"]
    """Activations, all positive."""
    batch: int

    @property
    def row_starts(self) -> Int[Tensor, " batch"]:
        """Index of each input's first pair."""
        counts = torch.bincount(self.row, minlength=self.batch)
        return counts.cumsum(0) - counts


def select_relu(pre: Float[Tensor, "batch d_sae"]) -> Active:
    """All positive pre-activations."""
    row, latent = (pre > 0).nonzero(as_tuple=True)
    return Active(row, latent, pre[row, latent], len(pre))


def select_batch_topk(pre: Float[Tensor, "batch d_sae"], n: int) -> Active:
    """The n largest pre-activations of the whole batch, less any that are not positive."""
    flat = pre.flatten()
    bound = _lower_bound(flat, n)
    candidates = (flat > bound).nonzero()[:, 0]
    values = flat[candidates]
    if len(candidates) > n:
        kept = values.topk(n, sorted=False).indices.sort().values
        candidates, values = candidates[kept], values[kept]
    return Active(candidates // pre.shape[1], candidates % pre.shape[1], values, len(pre))


def _lower_bound(flat: Float[Tensor, " n_all"], n: int) -> float:
    """A value >= 0 that at least the n largest positive entries exceed, close to the n-th largest."""
    step = max(1, len(flat) // 65_536)
    sample = flat[::step]
    share = min(1.0, 1.2 * n / len(flat) + 4 * math.sqrt(n / len(flat) / len(sample)))
    bound = max(0.0, sample.kthvalue(max(1, round((1 - share) * len(sample)))).values.item())
    if not math.isfinite(bound):
        return 0.0  # pre-activations that overflowed: the loss will say so
    while bound > 0 and int((flat > bound).sum()) < n:
        bound = bound * 0.8 if bound > 1e-6 else 0.0
    return bound


@dataclass(frozen=True)
class Gradients:
    """One step's loss and gradients."""

    squared_error: Float[Tensor, " batch"]
    l1: float
    """Mean over inputs of the summed activations."""
    error: Float[Tensor, "batch d_in"]
    """x - x_hat."""
    tensors: list[Tensor]
    """In the order of `Parameters.tensors`."""


def sparse_gradients(p: Parameters, x: Float[Tensor, "batch d_in"], active: Active, l1: float) -> Gradients:
    """Gradients that touch only the active pairs."""
    starts, batch = active.row_starts, active.batch
    x_hat = embedding_bag(active.latent, p.decoder, starts, per_sample_weights=active.value, mode="sum") + p.b_dec
    error = x - x_hat
    g = error * (-2 / batch)  # dL/dx_hat
    g_pairs = g[active.row]
    d_value = (g_pairs * p.decoder[active.latent]).sum(1) + l1 / batch
    d_decoder = torch.zeros_like(p.decoder).index_add_(0, active.latent, g_pairs * active.value[:, None])
    centred = (x - p.b_dec)[active.row]
    d_encoder = torch.zeros_like(p.encoder).index_add_(0, active.latent, centred * d_value[:, None])
    d_b_enc = torch.zeros_like(p.b_enc).index_add_(0, active.latent, d_value)
    d_b_dec = g.sum(0) - d_b_enc @ p.encoder
    l1_norm = active.value.sum().item() / batch
    return Gradients(error.square().sum(1), l1_norm, error, [d_encoder, d_b_enc, d_decoder, d_b_dec])


def dense_gradients(p: Parameters, x: Float[Tensor, "batch d_in"], active: Active, l1: float) -> Gradients:
    """The same gradients by dense products: faster while many latents are active."""
    batch = active.batch
    f = torch.zeros(batch, len(p.b_enc), dtype=x.dtype, device=x.device)
    f[active.row, active.latent] = active.value
    error = x - torch.addmm(p.b_dec, f, p.decoder)
    g = error * (-2 / batch)
    d_value = (g @ p.decoder.T + l1 / batch) * (f > 0)
    d_b_enc = d_value.sum(0)
    d_b_dec = g.sum(0) - d_b_enc @ p.encoder
    tensors = [d_value.T @ (x - p.b_dec), d_b_enc, f.T @ g, d_b_dec]
    return Gradients(error.square().sum(1), f.sum().item() / batch, error, tensors)


def gradients(p: Parameters, x: Float[Tensor, "batch d_in"], active: Active, l1: float) -> Gradients:
    """Sparse or dense, by the share of active pairs."""
    share = len(active.value) / (active.batch * len(p.b_enc))
    return (dense_gradients if share > DENSE_ABOVE else sparse_gradients)(p, x, active, l1)


# ------------------------------------------------------------------------------------------------------------ training
@dataclass(frozen=True)
class Status:
    """One moment of a training run."""

    step: int
    n_steps: int
    tokens: int
    squared_error: float
    """Mean of ||x - x_hat||^2, in scaled units (the variance of the inputs is about d_in)."""
    l0: float
    explained_variance: float
    """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 on the batch."""
    dead: float
    """Share of latents without an activation since the last resampling check."""
    l1_coefficient: float


@dataclass(frozen=True)
class TrainResult:
    """A trained SAE and how it went."""

    sae: SAE
    curve: list[dict[str, int | float]] = field(default_factory=list)
    epochs: float = 0.0
    """Activations trained on, over activations in the corpus."""
    interrupted: bool = False


class Trainer:
    """The state of a training run and one step of it."""

    def __init__(self, samples: Float[Tensor, "n d_in"], config: TrainConfig) -> None:
        """Set the scale and the initial dictionary from a sample of activations."""
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        spread = (samples - samples.mean(0)).norm(dim=1).mean().clamp_min(1e-12).item()
        self.scale = math.sqrt(samples.shape[1]) / spread
        self.p = Parameters.from_samples(samples * self.scale, config.d_sae, self.generator)
        device = samples.device
        self.fired = torch.zeros(config.d_sae, dtype=torch.bool, device=device)
        self.l1 = 0.1 if config.variant == "relu" else 0.0
        for t in self.p.tensors():
            t.requires_grad_(True)
        self.adam = torch.optim.Adam(self.p.tensors(), lr=config.lr, fused=True)
        checks = np.linspace(0, _RESAMPLE_UNTIL, config.resample + 1)[1:]
        self._resample_at = {int(share * config.n_steps) for share in checks} - {0}

    def rate(self, step: int) -> float:
        """Factor on the learning rate: linear warm-up, flat, linear decay to zero."""
        left = self.config.n_steps - step
        return min(1.0, (step + 1) / _WARMUP_STEPS, left / (_DECAY_SHARE * self.config.n_steps))

    def select(self, x: Float[Tensor, "batch d_in"]) -> Active:
        """The active pairs of a scaled batch."""
        pre = self.p.pre_activations(x)
        if self.config.variant == "relu":
            return select_relu(pre)
        return select_batch_topk(pre, round(self.config.target_l0 * len(x)))

    @torch.no_grad()
    def step(self, step: int, x: Float[Tensor, "batch d_in"]) -> Status:
        """Train on one batch of raw activations.

        Raises:
            TrainingError: the loss is not finite.
        """
        x = x * self.scale
        active = self.select(x)
        result = gradients(self.p, x, active, self.l1)
        loss = result.squared_error.mean().item()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss at step {step} is {loss}", expected="a finite loss", do="lower --lr")
        self._apply(step, result.tensors)
        self.fired[active.latent] = True
        l0 = len(active.value) / len(x)
        if self.config.variant == "relu":
            self.l1 *= math.exp(_L1_GAIN * math.log(max(l0, 1e-3) / self.config.target_l0))
        dead = 1 - self.fired.float().mean().item()
        if step in self._resample_at:
            self._resample(x, result)
            self.fired.zero_()
        variance = (x - x.mean(0)).square().sum(1).mean().item()
        tokens = (step + 1) * len(x)
        return Status(step, self.config.n_steps, tokens, loss, l0, 1 - loss / max(variance, 1e-30), dead, self.l1)

    def _apply(self, step: int, grads: list[Tensor]) -> None:
        """Adam on all weights; decoder rows keep unit norm."""
        d_decoder, decoder = grads[2], self.p.decoder
        d_decoder -= (d_decoder * decoder).sum(1, keepdim=True) * decoder
        for tensor, grad in zip(self.p.tensors(), grads, strict=True):
            tensor.grad = grad
        self.adam.param_groups[0]["lr"] = self.config.lr * self.rate(step)
        self.adam.step()
        decoder.copy_(_unit(decoder))

    def _resample(self, x: Float[Tensor, "batch d_in"], result: Gradients) -> None:
        """Set latents that never fired on inputs drawn with probability proportional to their squared loss."""
        dead = (~self.fired).nonzero()[:, 0]
        if len(dead) == 0:
            return
        weights = result.squared_error.double().square().cpu()
        chosen = torch.multinomial(weights, len(dead), replacement=True, generator=self.generator).to(x.device)
        rows = _unit(result.error[chosen])
        alive_norm = self.p.encoder[self.fired].norm(dim=1).mean() if self.fired.any() else 1.0
        factor = 0.2 if self.config.variant == "relu" else 1.0  # BatchTopK would never pick a short encoder row
        self.p.decoder[dead] = rows
        self.p.encoder[dead] = rows * alive_norm * factor
        self.p.b_enc[dead] = 0.0
        for tensor in (self.p.encoder, self.p.b_enc, self.p.decoder):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.adam.state[tensor][moment][dead] = 0.0

    @torch.no_grad()
    def finish(self, x: Float[Tensor, "n d_in"], site: Site, model_name: str) -> SAE:
        """The SAE for raw activations: the scale folded in, decoder rows of unit norm.

        BatchTopK becomes a JumpReLU with one threshold, set so that the mean L0 on the activations given is k.
        """
        p, scale = self.p, self.scale
        if self.config.variant == "relu":
            activation: ReLU | JumpReLU = ReLU()
        else:
            threshold = self._threshold(x * scale) / scale
            activation = JumpReLU(torch.full_like(p.b_enc, threshold).detach())
        return SAE(
            W_enc=p.encoder.detach().T.contiguous(),
            b_enc=p.b_enc.detach() / scale,
            W_dec=_unit(p.decoder.detach()),  # Ctrl-C may have come between a step and its renormalisation
            b_dec=p.b_dec.detach() / scale,
            activation=activation,
            site=site,
            model_name=model_name,
        )

    def _threshold(self, x: Float[Tensor, "n d_in"]) -> float:
        """The (k * n)-th largest positive pre-activation."""
        n = round(self.config.target_l0 * len(x))
        largest = torch.empty(0, device=x.device)
        for chunk in x.split(4096):
            pre = self.p.pre_activations(chunk).flatten()
            largest = torch.cat([largest, pre[pre > (largest[-1] if len(largest) == n else 0.0)]])
            largest = largest.sort(descending=True).values[:n]
        return largest[-1].item() if len(largest) == n else 0.0


def train_sae(
    model: Model,
    corpus: Corpus,
    site: Site,
    config: TrainConfig,
    on_step: Callable[[Status], None] | None = None,
) -> TrainResult:
    """Train an SAE on the activations of a site over a corpus.

    Ctrl-C ends the training early; what was trained is returned, marked as interrupted.

    Args:
        model: the model to read.
        corpus: its training documents.
        site: where to read.
        config: the recipe.
        on_step: called with the status of every step.

    Raises:
        CorpusError, ModelError: the corpus or the site does not fit the model.
        TrainingError: too few activations, or values that are not finite.
    """
    model.check_layer(site.layer)
    stream = ActivationStream(model, corpus, site, config)
    trainer = Trainer(stream.buffer, config)
    curve: list[dict[str, int | float]] = []
    interrupted, done = False, 0
    try:
        for step, x in zip(range(config.n_steps), stream, strict=False):
            status = trainer.step(step, x)
            done = status.tokens
            if step % max(1, config.n_steps // _CURVE_POINTS) == 0 or step == config.n_steps - 1:
                curve.append(_point(status))
            if on_step is not None:
                on_step(status)
    except KeyboardInterrupt:
        interrupted = True
    sae = trainer.finish(stream.buffer[:_CALIBRATION], site, model.spec.name)
    result = TrainResult(sae, curve, done / n_activations(corpus, config), interrupted)
    sae.metadata.update(_provenance(model, corpus, config, result))
    return result


def _point(status: Status) -> dict[str, int | float]:
    return {
        "tokens": status.tokens,
        "squared_error": round(status.squared_error, 4),
        "l0": round(status.l0, 3),
        "explained_variance": round(status.explained_variance, 5),
        "dead": round(status.dead, 5),
        "l1_coefficient": round(status.l1_coefficient, 5),
    }


def _provenance(model: Model, corpus: Corpus, config: TrainConfig, result: TrainResult) -> dict[str, Any]:
    """What every artefact states about how it was made."""
    return {
        "z_convention": "raw",
        "model_hash": model.fingerprint(),
        "n_heads": model.spec.n_heads,
        "d_head": model.spec.d_head,
        "context_size": corpus.block_size,
        "prepend_bos": bool((corpus.blocks[:, 0] == corpus.bos).all()),
        "exclude_special_tokens": config.exclude_bos,
        "corpus": corpus.provenance(),
        "training": {
            "config": config.as_dict(),
            "epochs": round(result.epochs, 3),
            "interrupted": result.interrupted,
            "curve": result.curve,
        },
    }
