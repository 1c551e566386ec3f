"""Quality of an SAE on held-out text: the post's measures and SAELens', side by side.

Two conventions are distinguished, because they differ by several points on the same SAE:

* the post's `loss_recovered`: z is replaced at every position, BOS included, by the SAE's reconstruction or by the
  constant c = b_V + b_ln1 @ W_V (the zero of TransformerLens-processed z), and losses are averaged over all positions;
* SAELens' `ce_loss_score`: raw zero; special tokens are neither replaced nor counted.

Intervals are 95 % bootstrap intervals over blocks (Wilson for counts).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.capture import activations, is_text, token_batches
from headscope.corpus import PADDING, Corpus
from headscope.errors import CorpusError, SAEError
from headscope.interventions import at, constant, reconstruction
from headscope.models.hf import Edit, Model
from headscope.sae.convert import check_fits
from headscope.sae.model import SAE
from headscope.site import AnyKind
from headscope.stats import Estimate, bootstrap_ratio, wilson

DENSITY_EDGES = np.linspace(-7, 0, 43)
"""log10 of the share of tokens on which a latent is active."""
_ROWS = 4096  # blocks processed together


@dataclass(frozen=True)
class Quality:
    """The quality of one SAE on one corpus; each figure's definition is in `rows`."""

    site: AnyKind
    """The site that the SAE reads and that is replaced."""
    n_tokens: int
    """Tokens read, without BOS."""
    n_blocks: int
    n_loss_tokens: int
    """Predicting tokens that the losses are averaged over, without BOS."""
    l0: Estimate
    l0_with_bos: float
    loss_recovered: Estimate
    ce_loss_score: Estimate
    loss_recovered_mean_ablation: Estimate
    loss_recovered_by_mean: Estimate
    ce: dict[str, float]
    """Mean next-token loss in nats, by condition, with BOS positions (`*_bos`) and without."""
    explained_variance: Estimate
    mse: float
    cosine: float
    relative_reconstruction_bias: Estimate
    dead: Estimate
    n_below: dict[str, int]
    """Latents active on less than this share of the tokens."""
    density_histogram: list[int]
    """Alive latents by log10 density, edges DENSITY_EDGES."""

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON types; NaN (a ratio of nothing) becomes None."""
        return _without_nan(asdict(self))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Reconstruction:
    """Sums over the tokens of each block."""

    n: Float[np.ndarray, " block"]
    """Number of tokens."""
    l0: Float[np.ndarray, " block"]
    l0_bos: float
    total: Float[np.ndarray, "block d"]
    """Sum of x."""
    square: Float[np.ndarray, " block"]
    error: Float[np.ndarray, " block"]
    hat_square: Float[np.ndarray, " block"]
    inner: Float[np.ndarray, " block"]
    cosine: float
    fired: Int[np.ndarray, " d_sae"]


def evaluate(
    model: Model,
    sae: SAE,
    corpus: Corpus,
    on_tokens: Callable[[int, int], None] | None = None,
    *,
    loss_tokens: int | None = None,
) -> Quality:
    """Measure an SAE on a corpus: one pass over its activations, and one over the model's losses.

    The second pass runs the end of the model five times for each token, which is most of the work. `loss_tokens` limits
    it; the intervals show the cost.

    Args:
        model: the model it was trained on.
        sae: the SAE.
        corpus: documents it was not trained on.
        on_tokens: called with (tokens done, total) over both passes.
        loss_tokens: measure losses on blocks of about this many tokens in total, spread evenly over the corpus; None:
            all blocks.

    Raises:
        CorpusError, ModelError, SAEError: model, SAE and corpus are incompatible; no text token predicts another;
            activations, reconstructions or losses are not finite.
    """
    check_fits(sae, model)
    sae = sae.to(model.device)
    loss_blocks = _spread(len(corpus.blocks), corpus.block_size, loss_tokens)
    _check_text(model, corpus, loss_blocks)
    done, total = 0, corpus.n_tokens + len(loss_blocks) * corpus.block_size

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if on_tokens is not None:
            on_tokens(done, total)

    r = _measure_reconstruction(model, sae, corpus, advance)
    if not all(np.isfinite(values).all() for values in vars(r).values()):
        raise SAEError(
            f"reconstructions of {sae.site.hook_name} whose squares exceed float32",
            expected="finite numbers",
            do="check the weights of the SAE, or train it again",
        )
    mean = torch.from_numpy((r.total.sum(0) / r.n.sum()).astype(np.float32)).to(model.device)
    losses = _measure_losses(model, sae, corpus, loss_blocks, mean, advance)
    return _summary(corpus, sae, r, losses)


def _spread(n_blocks: int, block_size: int, tokens: int | None) -> Int[np.ndarray, " block"]:
    """Choose evenly spaced block numbers that hold about `tokens` tokens: at least one, at most all."""
    n = n_blocks if tokens is None else min(n_blocks, max(1, round(tokens / block_size)))
    return np.arange(n) * n_blocks // max(1, n)


def _check_text(model: Model, corpus: Corpus, loss_blocks: Int[np.ndarray, " block"]) -> None:
    """Raise CorpusError where no text token of these blocks is followed by another token of its document."""
    special = sorted(corpus.special | {model.bos})
    for start in range(0, len(loss_blocks), _ROWS):
        rows = loss_blocks[start : start + _ROWS]
        if (~np.isin(corpus.blocks[rows, :-1], special) & (corpus.offset[rows, 1:] != PADDING)).any():
            return
    raise CorpusError(
        f"blocks of {corpus.block_size} tokens without a text token that predicts another",
        expected="text, in blocks of 3 tokens or more",
        do="raise --block-size, or read other text",
    )


def _measure_reconstruction(model: Model, sae: SAE, corpus: Corpus, advance: Callable[[int], None]) -> _Reconstruction:
    n_blocks = len(corpus.blocks)
    sums = {k: np.zeros(n_blocks) for k in ("n", "l0", "square", "error", "hat_square", "inner")}
    total, fired = np.zeros((n_blocks, sae.d_in)), torch.zeros(sae.d_sae, dtype=torch.long, device=model.device)
    l0_bos = cosine = 0.0
    for numbers, tokens, x in activations(model, corpus, sae.site):
        f = sae.encode(x)
        x_hat, counted = sae.decode(f), is_text(corpus, numbers, model.device)
        active = (f > 0).sum(-1)
        l0_bos += (active * _not_padding(corpus, numbers, model.device)).sum().item()
        fired += (f[counted] > 0).sum(0)
        per_token = {
            "n": torch.ones_like(x[..., 0]),
            "l0": active.float(),
            "square": x.square().sum(-1),
            "error": (x - x_hat).square().sum(-1),
            "hat_square": x_hat.square().sum(-1),
            "inner": (x * x_hat).sum(-1),
        }
        for name, values in per_token.items():
            sums[name][numbers] = (values.double() * counted).sum(1).cpu().numpy()
        total[numbers] = (x.double() * counted[..., None]).sum(1).cpu().numpy()
        cosine += (torch.cosine_similarity(x, x_hat, dim=-1) * counted).sum().item()
        advance(tokens.numel())
    return _Reconstruction(
        l0_bos=l0_bos / (corpus.n_tokens - corpus.n_padding),
        total=total,
        cosine=cosine / sums["n"].sum(),
        fired=fired.cpu().numpy(),
        **sums,
    )


def _measure_losses(
    model: Model,
    sae: SAE,
    corpus: Corpus,
    blocks: Int[np.ndarray, " block"],
    mean: Float[Tensor, " d"],
    advance: Callable[[int], None],
) -> dict[str, Float[np.ndarray, " block"]]:
    """Measure the summed loss of each block by condition; `n` and `n_bos` are the numbers of positions summed."""
    offset = model.value_offset(sae.site.layer) if sae.site.kind == "z" else torch.zeros_like(mean)
    sums: dict[str, np.ndarray] = {}

    def add(name: str, numbers: np.ndarray, values: Tensor) -> None:
        place = np.searchsorted(blocks, numbers)
        sums.setdefault(name, np.zeros(len(blocks)))[place] = values.double().sum(1).cpu().numpy()

    for numbers, tokens in token_batches(corpus, model.device, blocks):
        text, real = is_text(corpus, numbers, model.device), _not_padding(corpus, numbers, model.device)
        counted = text[:, :-1] & real[:, 1:]  # positions whose next token is predicted
        add("n", numbers, counted)
        add("n_bos", numbers, real[:, 1:])
        for name, (everywhere, kept) in _conditions(model, sae, tokens, ~text, mean, offset).items():
            add(f"{name}_bos", numbers, everywhere * real[:, 1:])
            add(name, numbers, kept * counted)
        advance(tokens.numel())
    return sums


def _not_padding(corpus: Corpus, numbers: Int[np.ndarray, " n"], device: torch.device) -> Bool[Tensor, "n position"]:
    return torch.from_numpy(corpus.offset[numbers] != PADDING).to(device)


def _conditions(
    model: Model,
    sae: SAE,
    tokens: Int[Tensor, "batch position"],
    special: Bool[Tensor, "batch position"],
    mean: Float[Tensor, " d"],
    offset: Float[Tensor, " d"],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute losses [batch, predicting] by condition: edited everywhere, and with special positions left unedited.

    After the last attention layer positions no longer mix, so the two agree at all counted positions.
    """
    local = sae.site.layer == model.spec.n_layers - 1 and sae.site.kind != "resid_pre"

    def losses(edit: Edit) -> tuple[Tensor, Tensor]:
        with model.edit({sae.site: edit}):
            everywhere = model.losses(tokens, restart)
        if local:
            return everywhere, everywhere
        with model.edit({sae.site: at(edit, positions=~special)}):
            return everywhere, model.losses(tokens, restart)

    with model.restartable(sae.site.layer) as restart:
        clean = model.losses(tokens)
    zero = torch.zeros_like(mean)
    return {
        "clean": (clean, clean),
        "sae": losses(reconstruction(sae)),
        "mean": losses(constant(mean)),
        "c": (c := losses(constant(offset))),
        "zero": c if torch.equal(offset, zero) else losses(constant(zero)),
    }


def _summary(corpus: Corpus, sae: SAE, r: _Reconstruction, losses: dict[str, Float[np.ndarray, " block"]]) -> Quality:
    def recovered(ablated: str, repaired: str) -> Estimate:
        return bootstrap_ratio(losses[ablated] - losses[repaired], losses[ablated] - losses[clean_of(ablated)])

    def clean_of(name: str) -> str:
        return "clean_bos" if name.endswith("_bos") else "clean"

    n = r.n.sum()
    mean = r.total.sum(0) / n
    variance = r.square - 2 * r.total @ mean + r.n * (mean @ mean)
    unexplained = bootstrap_ratio(r.error, variance)
    density = r.fired / n
    alive = density[density > 0]
    ce = {k: float(v.sum() / losses["n_bos" if k.endswith("_bos") else "n"].sum()) for k, v in losses.items()}
    return Quality(
        site=sae.site.kind,
        n_tokens=int(n),
        n_blocks=len(corpus.blocks),
        n_loss_tokens=int(losses["n"].sum()),
        l0=bootstrap_ratio(r.l0, r.n),
        l0_with_bos=r.l0_bos,
        loss_recovered=recovered("c_bos", "sae_bos"),
        ce_loss_score=recovered("zero", "sae"),
        loss_recovered_mean_ablation=recovered("mean_bos", "sae_bos"),
        loss_recovered_by_mean=recovered("c_bos", "mean_bos"),
        ce={k: v for k, v in ce.items() if not k.startswith("n")},
        explained_variance=Estimate(1 - unexplained.value, 1 - unexplained.high, 1 - unexplained.low),
        mse=float(r.error.sum() / n),
        cosine=float(r.cosine),
        relative_reconstruction_bias=bootstrap_ratio(r.hat_square, r.inner),
        dead=wilson(int((r.fired == 0).sum()), sae.d_sae),
        n_below={f"{t:g}": int((density < t).sum()) for t in (1e-6, 1e-5, 1e-4)},
        density_histogram=np.histogram(np.log10(alive), DENSITY_EDGES)[0].tolist(),
    )
