"""How long a whole training on `tiny` takes, from the model's folder to the SAE's, beside SAELens' runner.

Both read z of layer 1 on as many tokens of the same blocks, leave BOS out, mix activations in a buffer of the same
size, and train as many latents on batches of the same size, each by its own recipe: headscope's default, steered to the
target L0; SAELens' with inputs scaled, a warm-up and a decay, at each of several learning rates (and, for ReLU,
coefficients), of which the row with the least squared error is shown, at the least time. Imports are not counted;
headscope's time has the tokenising in it, SAELens' gets tokens. Held-out tokens judge both SAEs, read from their
folders.

    python benchmarks/train_run.py            about half an hour on two cores
    python benchmarks/train_run.py --quick    a few minutes: BatchTopK, 100,000 tokens, one learning rate
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from headscope import models
from headscope.capture import activations
from headscope.corpus import load_corpus
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.sae.formats import load_sae
from headscope.site import Site
from processes import HERE, ProcessError, environment, run

SITE = Site("z", 1)
TINY = Path(models.__file__).parent / "tiny"
HELD_OUT = 100_000  # tokens
RATES = (3e-4, 1e-3, 3e-3)
COEFFICIENTS = (1.0, 3.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    quick: bool = False
    json: bool = False
    """One JSON object a line."""
    variants: tuple[str, ...] = ("batchtopk", "relu")
    tokens: int = 1_000_000
    batch: int = 2048
    d_sae: int = 2048
    k: int = 12
    """Target L0."""
    buffer: int = 262_144
    rates: tuple[float, ...] = RATES
    """Learning rates of SAELens' BatchTopK, of which the best is shown."""
    threads: int = torch.get_num_threads()


@dataclass(frozen=True)
class Row:
    """One training."""

    name: str
    variant: str
    setting: str
    seconds: float
    processor_s: float
    version: str
    l0: float
    explained_variance: float


def main(arguments: Arguments) -> None:
    """Train, judge and print."""
    if arguments.quick:
        arguments = replace(arguments, variants=("batchtopk",), tokens=100_000, rates=RATES[1:2])
    torch.set_num_threads(arguments.threads)
    model = load_model("tiny")
    with tempfile.TemporaryDirectory() as folder:
        blocks = Path(folder, "blocks.npy")
        text = load_corpus("python", model.tokenizer, bos=model.bos, split="train", max_tokens=arguments.tokens)
        np.save(blocks, text.blocks)
        for variant in arguments.variants:
            ours = _ours(variant, Path(folder), model, arguments)
            peers = list(_saelens(variant, blocks, model, arguments))
            _print([ours, *_best(peers)], as_json=arguments.json)


def _ours(variant: str, folder: Path, model: Model, arguments: Arguments) -> Row:
    command = [sys.executable, str(HERE / "ours_run.py"), *_options(variant, arguments)]
    out = folder / f"ours-{variant}"
    return _row("headscope", variant, "default", [*command, "--out", str(out), "--model", "tiny"], out, model)


def _saelens(variant: str, blocks: Path, model: Model, arguments: Arguments) -> Iterator[Row]:
    script = HERE / "peers" / "run_saelens_model.py"
    rates, coefficients = [(rate, 0.0) for rate in arguments.rates], [(1e-3, c) for c in COEFFICIENTS]
    settings = rates if variant == "batchtopk" else coefficients
    for option in ("fp32", "bf16"):
        for rate, coefficient in settings:
            out = blocks.parent / f"saelens-{variant}-{option}-{rate}-{coefficient}"
            given = {"model": TINY, "blocks": blocks, "out": out, "option": option, "lr": rate}
            options = [part for n, v in (given | {"coefficient": coefficient}).items() for part in (f"--{n}", str(v))]
            command = [str(environment("saelens")), str(script), *_options(variant, arguments), *options]
            setting = f"{option}, lr {rate:g}" + (f", coefficient {coefficient:g}" if coefficient else "")
            try:
                yield _row("SAELens", variant, setting, command, out, model)
            except ProcessError as error:
                print(f"SAELens {setting} failed: {error}", file=sys.stderr)


def _options(variant: str, arguments: Arguments) -> list[str]:
    shared = {n: getattr(arguments, n) for n in ("tokens", "batch", "d_sae", "k", "buffer", "threads")}
    given = shared | {"variant": variant, "layer": SITE.layer}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def _row(name: str, variant: str, setting: str, command: list[str], out: Path, model: Model) -> Row:
    print(f"{name} {variant} {setting}", file=sys.stderr, flush=True)
    took = json.loads(run(command).splitlines()[-1])
    l0, explained_variance = judged(out, model)
    return Row(name, variant, setting, **took, l0=l0, explained_variance=explained_variance)


@torch.no_grad()
def judged(folder: Path, model: Model) -> tuple[float, float]:
    """L0 and explained variance (1 - squared error / variance) of an SAE's folder on held-out tokens, BOS left out."""
    sae = load_sae(folder, model_name="tiny", site=SITE)
    text = load_corpus("python", model.tokenizer, bos=model.bos, max_tokens=HELD_OUT)
    z = torch.cat([z[:, 1:].flatten(0, 1) for _, _, z in activations(model, text, SITE, np.arange(len(text.blocks)))])
    f = sae.encode(z)
    error = (z - sae.decode(f)).square().sum()
    return (f > 0).sum().item() / len(f), 1 - (error / (z - z.mean(0)).square().sum()).item()


def _best(peers: list[Row]) -> Iterator[Row]:
    """By precision, the setting that explains most; at the least time of its precision's settings."""
    for option in ("fp32", "bf16"):
        same = [row for row in peers if row.setting.startswith(option)]
        if same:
            best = max(same, key=lambda row: row.explained_variance)
            yield replace(best, seconds=min(row.seconds for row in same))


def _print(rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    print(f"\n{rows[0].variant}\n  {'':<44} {'s':>8} {'ratio':>7} {'L0':>7} {'explained':>10}")
    for row in rows:
        name = f"{row.name} {row.version} ({row.setting})"
        print(
            f"  {name:<44} {row.seconds:>8.1f} {row.seconds / rows[0].seconds:>7.2f} {row.l0:>7.1f} "
            f"{row.explained_variance:>10.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
