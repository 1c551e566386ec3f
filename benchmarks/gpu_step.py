"""What a training step takes on a GPU, kernel by kernel and in all, beside the least it can take.

    bf16 peak       the largest rate seen of a product of two square bfloat16 matrices: what shares are of
    product         the encoder's product alone, in bfloat16, and
    adam            fused Adam on encoder and decoder: with it, the floor of a step
    NAME            a function of `headscope.sae.training.triton_kernels`, on pairs of which a row has about `--l0`
    NAME, eager     the same of `headscope.sae.training.kernels`, as torch computes it on the GPU
    step, VARIANT   `Trainer.step` from activations on the GPU to new weights, and
    step, ..., PEER the same of a peer's own trainer, as in `train_step.py`: SAELens in float32, with bfloat16 autocast
                    and, for TopK, with sparse activations; sparsify with its Triton decoder, by Adam and by signum

The share of the peak is that of the encoder's product, the one dense product of a step: 2 batch d_in d_sae operations
in the row's time. Inputs are random and on the GPU already; so are all repeats, in its caches where they fit.

Peers train on our batch and from our initial weights, in processes and environments of their own (`processes.py`). To
make an environment takes a network, unless all that it needs is installed where the benchmark runs. A peer that cannot
be installed or that fails has a row that says why.

    python benchmarks/gpu_step.py            the post's size: 4,096 inputs of 512, 16,384 latents
    python benchmarks/gpu_step.py --quick    fewer repeats
"""

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from headscope.errors import TrainingError
from headscope.sae.config import TrainConfig
from headscope.sae.training import kernels
from headscope.sae.training.trainer import Trainer
from peers.common import Task, now
from processes import ProcessError, environment, train
from step_data import encode, mean_l0

DEVICE = "cuda"
WARM_UP = 3
SQUARES = (4096, 8192, 16_384)
FAILURE_WIDTH = 120
SAELENS = (("SAELens", "saelens", "fp32"), ("SAELens bf16", "saelens", "bf16"))
PEERS = {
    "relu": SAELENS,
    "topk": (
        *SAELENS,
        ("SAELens sparse", "saelens", "fp32-sparse"),
        ("SAELens bf16 sparse", "saelens", "bf16-sparse"),
        ("sparsify", "sparsify", "adam"),
        ("sparsify signum", "sparsify", "signum"),
    ),
    "batchtopk": SAELENS,
}
"""Name, library and option of what stands beside our step, by variant."""
L1 = 1.0
"""Coefficient of the peers' penalty, which nothing in their time depends on."""


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
    peers: bool = True
    """Train by the peers too."""
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
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows, dim=1)

    encoder, decoder = unit(normal(args.d_sae, args.d_in)), unit(normal(args.d_sae, args.d_in))
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(args.l0 / args.d_sae)).item()
    return Problem(normal(args.batch, args.d_in), encoder, decoder, torch.full((args.d_sae,), level, device=DEVICE))


def initial(p: Problem, variant: str) -> dict[str, Tensor]:
    """The weights that a variant's step starts from, by latent; those that choose the largest have no bias."""
    b_enc = p.bias if variant == "relu" else torch.zeros_like(p.bias)
    return {"encoder": p.encoder, "b_enc": b_enc, "decoder": p.decoder, "b_dec": p.x.mean(0)}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median by the clock, from when the GPU is idle until it is again; the first runs tune and warm up."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = now(DEVICE)
        run()
        times.append(now(DEVICE) - start)
    return statistics.median(times[WARM_UP:])


def peak(repeats: int) -> float:
    """Operations a second of the fastest product of two square bfloat16 matrices."""
    rates = []
    for n in SQUARES:
        a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16)
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
    for variant in PEERS:
        config = TrainConfig(
            variant=variant,
            d_sae=args.d_sae,
            target_l0=float(round(args.l0)),
            batch=args.batch,
            tokens=args.batch * 1_000_000,
            buffer=2 * args.batch,
        )
        trainer = Trainer(p.x, config)
        with torch.no_grad():
            for name, value in initial(p, variant).items():
                trainer.p[name].copy_(value)
        name = f"step, {variant}"
        steps[name], trainers[name] = lambda t=trainer: t.step(p.x), trainer
    return steps, trainers


def of_ours(args: Arguments, p: Problem, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of what is timed in this process."""
    steps, trainers = of_trainer(args, p)
    for name, run in (floor(p) | of_kernels(p) | steps).items():
        row: dict[str, Any] = {"name": name, "seconds": seconds(run, repeats)}
        if name in steps:
            status = trainers[name].step(p.x)
            row["l0"] = status.l0
            assert math.isfinite(status.squared_error)
        yield row


def of_peers(args: Arguments, p: Problem, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of the peers' steps; without seconds, and with the reason, where there are none."""
    libraries = {library for entries in PEERS.values() for _, library, _ in entries}
    missing = {library: _why_missing(library) for library in sorted(libraries)}
    with tempfile.TemporaryDirectory() as folder:
        for variant, entries in PEERS.items():
            task = _task(args, p, variant, WARM_UP + repeats, Path(folder))
            for name, library, option in entries:
                row = {"name": f"step, {variant}, {name}"}
                if missing[library]:
                    yield row | _failed(missing[library])
                else:
                    yield row | _trained(library, replace(task, option=option), p)


def _why_missing(library: str) -> str:
    """Why a peer's environment cannot be made; nothing where it is there."""
    try:
        environment(library)
    except ProcessError as error:
        return str(error)
    return ""


def _task(args: Arguments, p: Problem, variant: str, steps: int, folder: Path) -> Task:
    """Our batch and initial weights in files, and how to train on them."""
    weights = initial(p, variant)
    by_input = {"W_enc": weights["encoder"].T, "W_dec": weights["decoder"]}
    by_input |= {name: weights[name] for name in ("b_enc", "b_dec")}
    data, start = folder / "inputs.npy", folder / f"{variant}.safetensors"
    np.save(data, p.x.cpu().numpy())
    save_file({name: weight.cpu().contiguous() for name, weight in by_input.items()}, start)
    return Task(
        variant=variant,
        option="",
        data=str(data),
        initial=str(start),
        out="",
        d_sae=args.d_sae,
        steps=steps,
        batch=args.batch,
        k=round(args.l0),
        coefficient=L1,
        lr=TrainConfig().lr,
        threads=torch.get_num_threads(),
        device=DEVICE,
    )


def _trained(library: str, task: Task, p: Problem) -> dict[str, Any]:
    try:
        found = train(library, task)
    except ProcessError as error:
        return _failed(str(error))
    weights = {name: weight.to(DEVICE) for name, weight in found.weights.items()}
    return {
        "seconds": statistics.median(found.seconds[WARM_UP:]),
        "l0": mean_l0(encode(weights, p.x, task.variant, task.k)),
        "peak_mb": found.peak_mb,
        "version": found.version,
    }


def _failed(why: str) -> dict[str, Any]:
    return {"seconds": None, "failure": why}


def rows(args: Arguments, repeats: int, best: float) -> Iterator[dict[str, Any]]:
    """All of them, each when it is measured.

    Args:
        args: what to measure.
        repeats: of each.
        best: operations a second of the peak.
    """
    p = problem(args)
    for row in chain(of_ours(args, p, repeats), of_peers(args, p, repeats) if args.peers else ()):
        yield rated(row, args, best)


def rated(row: dict[str, Any], args: Arguments, best: float) -> dict[str, Any]:
    """A row with its share of the peak where it has the encoder's product, and a step's activations a second."""
    if row["seconds"] is None:
        return row
    is_step = row["name"].startswith("step, ")
    rates = {"activations_per_s": args.batch / row["seconds"]} if is_step else {}
    if is_step or row["name"] in ("product", "candidates"):
        rates["share_of_peak"] = 2 * args.batch * args.d_in * args.d_sae / row["seconds"] / best
    return row | rates


def show(row: dict[str, Any], *, as_json: bool) -> None:
    """One line."""
    if as_json:
        print(json.dumps(row), flush=True)
        return
    if row["seconds"] is None:
        print(f"{row['name']:<36} failed: {shorten(row['failure'], FAILURE_WIDTH)}", flush=True)
        return
    rate, share = row.get("activations_per_s"), row.get("share_of_peak")
    print(
        f"{row['name']:<36} {1e3 * row['seconds']:9.3f} ms"
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
    best, name = peak(repeats), torch.cuda.get_device_name()
    if not args.json:
        print(f"{name}, bf16 peak {best / 1e12:.0f} TFLOP/s, batch {args.batch}")
        print(f"d_in {args.d_in}, d_sae {args.d_sae}, L0 {args.l0:g}")
    for row in rows(args, repeats, best):
        show(row | {"device": name, "peak": best}, as_json=args.json)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
