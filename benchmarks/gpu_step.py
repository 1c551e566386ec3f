"""What a training step takes on a GPU, kernel by kernel and in all, beside the least it can take.

    bf16 peak       the largest rate seen of a product of two square bfloat16 matrices: what shares are of
    product         the encoder's product alone, in bfloat16, and
    adam            fused Adam on encoder and decoder: with it, the floor of a step
    NAME            a function of `headscope.sae.training.triton_kernels`, on pairs of which a row has about `--l0`
    NAME, eager     the same of `headscope.sae.training.kernels`, as torch computes it on the GPU
    step, VARIANT   `Trainer.step` from activations on the GPU to new weights

The share of the peak is that of the encoder's product, the one dense product of a step: 2 batch d_in d_sae operations
in the row's time. Inputs are random and on the GPU already; so are all repeats, in its caches where they fit.

    python benchmarks/gpu_step.py            the post's size: 4,096 inputs of 512, 16,384 latents
    python benchmarks/gpu_step.py --quick    fewer repeats
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.testing import assert_close

from headscope.errors import TrainingError
from headscope.sae.config import TrainConfig
from headscope.sae.training import kernels
from headscope.sae.training.trainer import Trainer

SQUARES = (4096, 8192, 16_384)


@dataclass(frozen=True)
class Arguments:
    """Options."""

    d_in: int = 512
    d_sae: int = 16_384
    batch: int = 4096
    l0: float = 16.0
    """Active latents of an input, on average."""
    repeats: int = 30
    quick: bool = False
    """Fewer repeats."""
    json: bool = False
    """One JSON object a line."""


@dataclass(frozen=True)
class Problem:
    """Inputs, a dictionary of unit rows, and a bias at which about l0 latents of a row are active."""

    x: Tensor
    encoder: Tensor
    decoder: Tensor
    bias: Tensor


def problem(args: Arguments) -> Problem:
    """Pre-activations are standard normal before the bias."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows, dim=1)

    encoder, decoder = unit(normal(args.d_sae, args.d_in)), unit(normal(args.d_sae, args.d_in))
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(args.l0 / args.d_sae)).item()
    return Problem(normal(args.batch, args.d_in), encoder, decoder, torch.full((args.d_sae,), level, device="cuda"))


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median by the clock, from when the GPU is idle until it is again; the first runs tune and warm up."""
    times = []
    for turn in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak(repeats: int) -> float:
    """Operations a second of the fastest product of two square bfloat16 matrices."""
    rates = []
    for n in SQUARES:
        a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
        rates.append(2 * n**3 / seconds(lambda a=a, b=b: a @ b, repeats))
    return max(rates)


def floor(p: Problem) -> dict[str, Callable[[], Any]]:
    """The encoder's product, and Adam on both matrices."""
    x, encoder = p.x.bfloat16(), p.encoder.bfloat16()
    weights = [p.encoder.clone(), p.decoder.clone()]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adam = torch.optim.Adam(weights, lr=1e-6, fused=True)
    return {"product": lambda: x @ encoder.T, "adam": adam.step}


def of_kernels(p: Problem) -> dict[str, Callable[[], Any]]:
    """The functions of both modules, which have to agree."""
    from headscope.sae.training import triton_kernels

    limit = torch.zeros_like(p.x[:, 0])
    pairs, pre = triton_kernels.select_above(p.x, p.encoder, p.bias)
    pairs.to_rows, pairs.row_starts, pairs.latent_starts  # noqa: B018 - computed once a batch, timed below
    made: dict[str, Callable[[], Any]] = {
        "candidates": lambda: triton_kernels.candidates(p.x, p.encoder, p.bias, limit),
        "order of pairs": lambda: _ordered(kernels.Pairs(pairs.row, pairs.latent, pairs.batch, pairs.d_sae)),
    }
    given = {
        "select_above": (p.x, p.encoder, p.bias),
        "products": (pairs, p.decoder, p.x),
        "sum_by_row": (pairs, pre, p.decoder),
        "sum_by_latent": (pairs, pre, p.x),
    }
    for name, arguments in given.items():
        ours, eager = getattr(triton_kernels, name), _eager(name)
        if name != "select_above":
            assert_close(ours(*arguments), eager(*arguments), rtol=1e-4, atol=1e-4)
        made[name] = lambda f=ours, a=arguments: f(*a)
        made[f"{name}, eager"] = lambda f=eager, a=arguments: f(*a)
    return made


def _eager(name: str) -> Callable[..., Any]:
    """A function of `kernels` as it is without Triton."""

    def run(*arguments: Any) -> Any:
        with mock.patch.object(kernels, "gpu_kernels", return_value=None):
            return getattr(kernels, name)(*arguments)

    return run


def _ordered(pairs: kernels.Pairs) -> list[Tensor]:
    return [pairs.to_rows, pairs.row_starts, pairs.latent_starts]


def of_trainer(args: Arguments, p: Problem) -> tuple[dict[str, Callable[[], Any]], dict[str, Trainer]]:
    """A step of each variant, on weights at which about l0 latents are active."""
    steps, trainers = {}, {}
    for variant in ("relu", "topk", "batchtopk"):
        config = TrainConfig(
            variant=variant,
            d_sae=args.d_sae,
            target_l0=round(args.l0),
            batch=args.batch,
            tokens=args.batch * 1_000_000,
            buffer=2 * args.batch,
        )
        trainer = Trainer(p.x, config)
        weights = {"encoder": p.encoder, "decoder": p.decoder, "b_dec": p.x.mean(0)}
        weights |= {"b_enc": p.bias} if variant == "relu" else {}
        with torch.no_grad():
            for name, value in weights.items():
                trainer.p[name].copy_(value)
        name = f"step, {variant}"
        steps[name], trainers[name] = lambda t=trainer: t.step(p.x), trainer
    return steps, trainers


def show(row: dict[str, Any], *, as_json: bool) -> None:
    """One line."""
    if as_json:
        print(json.dumps(row), flush=True)
        return
    rate, share = row.get("activations_per_s"), row.get("share_of_peak")
    print(
        f"{row['name']:<24} {1e3 * row['seconds']:9.3f} ms"
        + (f"  {rate:13,.0f} activations/s" if rate else "")
        + (f"  {100 * share:5.1f} % of the bf16 peak" if share else ""),
        flush=True,
    )


def main(args: Arguments) -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        error = TrainingError("no GPU", expected="one that torch can use", do="run benchmarks/train_step.py on a CPU")
        raise SystemExit(str(error))
    repeats = 5 if args.quick else args.repeats
    best = peak(repeats)
    operations = 2 * args.batch * args.d_in * args.d_sae
    if not args.json:
        print(f"{torch.cuda.get_device_name()}, bf16 peak {best / 1e12:.0f} TFLOP/s, batch {args.batch}")
        print(f"d_in {args.d_in}, d_sae {args.d_sae}, L0 {args.l0:g}")
    p = problem(args)
    steps, trainers = of_trainer(args, p)
    for name, run in (floor(p) | of_kernels(p) | steps).items():
        row: dict[str, Any] = {"name": name, "seconds": seconds(run, repeats)}
        if name in ("product", "candidates") or name in steps:
            row["share_of_peak"] = operations / row["seconds"] / best
        if name in steps:
            row["activations_per_s"] = args.batch / row["seconds"]
            status = trainers[name].step(p.x)
            row["l0"] = status.l0
            assert math.isfinite(status.squared_error)
        show(row | {"device": torch.cuda.get_device_name(), "peak": best}, as_json=args.json)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
