"""What training finds of a dictionary that is known, by variant, beside SAELens' of the same kind.

The data are those of `planted_dictionary`: low-rank blocks of heads, features of one head or several, Zipf
frequencies, groups, parents and children; the numbers those of `recovery`. Both libraries train for as
many steps on the same batches, each from its own start. headscope takes its default recipe, penalties steered to the
planted L0. SAELens has its warm-up and decay and coefficients that bring it to about that L0; for BatchTopK it takes
two learning rates, the others the better of these, by MMCS. `--json` has both.
Latents that are active on none of the held-out inputs are left out; how many are not stands in the table. The last
rows are what the table is to be read by: the planted dictionary itself, encoded with its transpose and with its true
activations, and two nulls, as many random directions and as many inputs.

    python benchmarks/planted_recovery.py            a quarter to half an hour
    python benchmarks/planted_recovery.py --quick    minutes: BatchTopK, one setting
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from headscope.sae.config import TrainConfig
from headscope.stats import Measure
from peers.common import Task
from planted_dictionary import PlantedConfig, PlantedDictionary, plant
from processes import OURS, ProcessError, train
from recovery import Recovery, recovery
from step_data import encode, mean_l0, planted_rows, scaled, squared_error

PLANTED = PlantedConfig(n_features=128, n_heads=4, d_head=16, rank=12, l0=4.0)
D_SAE = 256
HELD_OUT = 16_384
PEER_RATES = {"batchtopk": (1e-3, 3e-3)}
PEER_RATE = 3e-3
"""Where not several are tried: of those of batchtopk, the better."""
PEER_COEFFICIENTS = {"relu": 7.0, "jumprelu": 1.0, "gated": 5.0}
"""That bring them to about the planted L0."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    quick: bool = False
    json: bool = False
    """One JSON object a line as it is measured, of every setting, with every number's n, interval and null."""
    variants: tuple[str, ...] = ("batchtopk", "topk", "gated", "jumprelu", "relu", "matryoshka")
    steps: int = 3000
    batch: int = 512
    rows: int = 262_144
    """Inputs, which are gone through as often as the steps take."""
    seed: int = 0
    """Of the dictionary and its inputs."""
    threads: int = torch.get_num_threads()


@dataclass(frozen=True)
class Row:
    """A dictionary and what it found."""

    name: str
    variant: str
    setting: str
    found: Recovery
    n_latents: int
    """Active on held-out inputs."""
    l0: float | None = None
    explained_variance: float | None = None


def main(arguments: Arguments) -> None:
    """Train, compare and print."""
    if arguments.quick:
        arguments = replace(arguments, variants=("batchtopk",))
    torch.set_num_threads(arguments.threads)
    planted = plant(replace(PLANTED, seed=arguments.seed))
    x = scaled(planted_rows(planted, arguments.rows + HELD_OUT, seed=1 + arguments.seed))
    held_out = x[arguments.rows :]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "inputs.npy")
        np.save(data, x[: arguments.rows].numpy())
        for variant in arguments.variants:
            for library, name in ((OURS, "headscope"), ("saelens", "SAELens")):
                tasks = _tasks(library, variant, data, arguments)
                tried = _said(filter(None, (_trained(name, library, t, planted, held_out) for t in tasks)), arguments)
                rows += sorted(tried, key=lambda row: row.found.mmcs.value or 0.0)[-1:]
    rows += _said(_references(planted, held_out), arguments)
    if not arguments.json:
        _print_table(rows, arguments)


def _said(rows: Iterable[Row], arguments: Arguments) -> Iterator[Row]:
    """The same rows; as JSON, each is printed when it is there."""
    for row in rows:
        if arguments.json:
            print(
                json.dumps(asdict(row) | {"steps": arguments.steps, "batch": arguments.batch, "seed": arguments.seed}),
                flush=True,
            )
        yield row


def _tasks(library: str, variant: str, data: Path, arguments: Arguments) -> Iterator[Task]:
    """One for headscope, several for a peer."""
    task = Task(
        variant=variant,
        option="default" if library == OURS else "fp32",
        data=str(data),
        initial="",
        out="",
        d_sae=D_SAE,
        steps=arguments.steps,
        batch=arguments.batch,
        k=round(PLANTED.l0),
        coefficient=0.0,
        lr=TrainConfig().lr,
        threads=arguments.threads,
    )
    if library == OURS:
        yield task
        return
    rates = PEER_RATES.get(variant, (PEER_RATE,))
    for rate in rates[-1:] if arguments.quick else rates:
        yield replace(task, lr=rate, coefficient=PEER_COEFFICIENTS.get(variant, 0.0))


def _trained(name: str, library: str, task: Task, planted: PlantedDictionary, held_out: Tensor) -> Row | None:
    """None when the process failed, or no latent is active on any held-out input."""
    setting = f"lr {task.lr:g}" + (f", coefficient {task.coefficient:g}" if task.coefficient else "")
    print(f"{task.variant} {name}, {setting}", file=sys.stderr, flush=True)
    try:
        weights = train(library, task).weights
    except ProcessError as error:
        print(f"  failed: {error}", file=sys.stderr, flush=True)
        return None
    f = encode(weights, held_out, task.variant, task.k)
    alive = (f > 0).any(0)
    if not alive.any():
        return None
    error = squared_error(weights, held_out, f)
    variance = (held_out - held_out.mean(0)).square().sum(1).mean().item()
    found = recovery(planted.directions, weights["W_dec"][alive], PLANTED.n_heads)
    return Row(name, task.variant, setting, found, int(alive.sum()), mean_l0(f), 1 - error / variance)


def _references(planted: PlantedDictionary, held_out: Tensor) -> Iterator[Row]:
    """The planted dictionary itself, and nulls."""
    d, k, n_heads = planted.directions, round(PLANTED.l0), PLANTED.n_heads
    batch = planted.sample(HELD_OUT, torch.Generator().manual_seed(2))
    zero = torch.zeros(len(d)), torch.zeros(PLANTED.d_in)
    weights = {"W_enc": d.T, "W_dec": d, "b_enc": zero[0], "b_dec": zero[1]}
    variance = (batch.x - batch.x.mean(0)).square().sum(1).mean().item()
    found = recovery(d, d, n_heads)
    for name, f in (("true f", batch.activations), ("transpose", encode(weights, batch.x, "batchtopk", k))):
        explained = 1 - squared_error(weights, batch.x, f) / variance
        yield Row(name, "planted", "", found, len(d), mean_l0(f), explained)
    random = torch.randn(D_SAE, PLANTED.d_in, generator=torch.Generator().manual_seed(7))
    for name, directions in (("random", random), ("inputs", held_out[:D_SAE] - held_out.mean(0))):
        yield Row(name, "null", "", recovery(d, directions, n_heads), D_SAE)


def _print_table(rows: list[Row], arguments: Arguments) -> None:
    print(
        f"{PLANTED.n_features} features in {PLANTED.n_heads} heads of {PLANTED.d_head}, L0 {PLANTED.l0:g}; {D_SAE} "
        f"latents, {arguments.steps:,} steps of {arguments.batch:,}, seed {arguments.seed}; 95 % intervals in brackets"
    )
    columns = [name.replace("_", " ") for name in rows[0].found.measures()]
    print(f"{'':<21}" + "".join(f"{column:>21}" for column in columns) + f"{'alive':>7}{'L0':>7}{'EV':>8}   setting")
    for row in rows:
        numbers = "".join(f"{_short(measure):>21}" for measure in row.found.measures().values())
        l0 = "" if row.l0 is None else f"{row.l0:.1f}"
        explained = "" if row.explained_variance is None else f"{row.explained_variance:.4f}"
        print(f"{row.variant + ' ' + row.name:<21}{numbers}{row.n_latents:>7}{l0:>7}{explained:>8}   {row.setting}")
    print()
    for ours in (row for row in rows if row.name == "headscope"):
        for peer in (row for row in rows if (row.name, row.variant) == ("SAELens", ours.variant)):
            _print_aims(ours, peer)


def _short(measure: Measure) -> str:
    if measure.value is None:
        return "-"
    return f"{measure.value:.3f}" + ("" if measure.low is None else f" [{measure.low:.3f}, {measure.high:.3f}]")


def _print_aims(ours: Row, peer: Row) -> None:
    """At least as good as the peer; where it is not, whether the intervals overlap."""
    for name in ("mmcs", "recall", "precision", "head_share_error"):
        mine, theirs = ours.found.measures()[name], peer.found.measures()[name]
        lower = name == "head_share_error"
        aim = f"{ours.variant}: {name} at {'most' if lower else 'least'} SAELens'"
        if mine.value is None or theirs.value is None:
            print(f"miss  {aim}: cannot be compared, nothing was found")
            continue
        reached = mine.value <= theirs.value if lower else mine.value >= theirs.value
        within = "" if reached or _apart(mine, theirs) else ", the intervals overlap"
        print(f"{'pass' if reached else 'miss'}  {aim}: {mine.value:.4f} and {theirs.value:.4f}{within}")


def _apart(a: Measure, b: Measure) -> bool:
    """No interval, or intervals without a common number."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return True
    return a.high < b.low or b.high < a.low


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
