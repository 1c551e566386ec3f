"""How long a training step of an SAE takes, beside the peers' own trainers and the least that bf16 can take.

    headscope             `headscope.sae.training`
    SAELens               `SAETrainer.step`: float32 and bf16 autocast, for TopK also with sparse activations
    dictionary_learning   `StandardTrainer.update`, `BatchTopKTrainer.update`
    sparsify              `Trainer.fit` on a model that looks activations up: TopK, by Adam and by its default signum
    floor                 the encoder's product in bf16 and fused Adam on both matrices (`floor.py`)

Each row is a process of its own (peers in environments of their own, made the first time), all from the same initial
weights, on the same batches, at the same learning rate. Processes run one after another, all of them in each of
`--rounds` rounds. A round's figure is the median of its steps without the first three, the figure shown the smallest of
the rounds': other work on the machine only ever adds. The loss is that of the trained weights on one held-out batch,
computed by one function for all: the mean over inputs of the squared error summed over components; L0 likewise.

    python benchmarks/train_step.py            about an hour on two cores
    python benchmarks/train_step.py --quick    under a minute: headscope and SAELens, ReLU, the small shape, one round
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from peers.common import Task
from processes import HERE, OURS, ProcessError, Trained, run, train
from step_data import Inputs, encode, inputs, mean_l0, squared_error

WARM_UP = 3
N_BATCHES = 8
SHAPES = ((128, 4096), (512, 16384))
ENTRIES = {
    "relu": (
        ("headscope", OURS, "default"),
        ("SAELens", "saelens", "fp32"),
        ("SAELens bf16", "saelens", "bf16"),
        ("dictionary_learning", "dictionary_learning", "fp32"),
    ),
    "topk": (
        ("headscope", OURS, "default"),
        ("SAELens", "saelens", "fp32"),
        ("SAELens bf16", "saelens", "bf16"),
        ("SAELens sparse", "saelens", "fp32-sparse"),
        ("SAELens bf16 sparse", "saelens", "bf16-sparse"),
        ("sparsify", "sparsify", "adam"),
        ("sparsify signum", "sparsify", "signum"),
    ),
    "batchtopk": (
        ("headscope", OURS, "default"),
        ("SAELens", "saelens", "fp32"),
        ("SAELens bf16", "saelens", "bf16"),
        ("dictionary_learning", "dictionary_learning", "fp32"),
    ),
}
AIMS = (
    ("SAELens", 512, 10.0),
    ("sparsify", 512, 2.5),
    ("SAELens", 128, 5.0),
)
FLOOR_AIM = (512, 1.8)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    quick: bool = False
    json: bool = False
    """One JSON object a line."""
    shapes: tuple[int, ...] = (128, 512)
    """d_in: 128 has 4,096 latents, 512 has 16,384."""
    variants: tuple[str, ...] = ("relu", "topk", "batchtopk")
    data: tuple[str, ...] = ("planted", "tiny")
    """`tiny` is 128 wide, and is read for that shape only."""
    rounds: int = 2
    steps: int = 15
    batch: int = 4096
    l0: int = 16
    """Active features of a planted input, and k."""
    l1: float = 1.0
    """Coefficient of the L1 penalty."""
    lr: float = 1e-3
    threads: int = torch.get_num_threads()


@dataclass(frozen=True)
class Cell:
    """Rows that stand beside one another."""

    variant: str
    d_in: int
    d_sae: int
    data: str


@dataclass
class Runs:
    """What the rounds of one entry gave."""

    medians: list[float] = field(default_factory=list)
    last: Trained | None = None
    failure: str = ""


def cells(arguments: Arguments) -> Iterator[Cell]:
    """In the order of the table."""
    for d_in, d_sae in SHAPES:
        for data in arguments.data:
            for variant in arguments.variants:
                if d_in in arguments.shapes and (data == "planted" or d_in == 128):
                    yield Cell(variant, d_in, d_sae, data)


def main(arguments: Arguments) -> None:
    """Run all rounds, then print."""
    if arguments.quick:
        small = {"shapes": (128,), "variants": ("relu",), "data": ("planted",), "rounds": 1, "steps": 10}
        arguments = replace(arguments, **small)
    torch.set_num_threads(arguments.threads)
    chosen = list(cells(arguments))
    runs = {cell: {entry: Runs() for entry in _entries(cell, arguments)} for cell in chosen}
    floors: dict[int, list[float]] = {cell.d_in: [] for cell in chosen}
    with tempfile.TemporaryDirectory() as folder:
        files = {(c.data, c.d_in): _files(c, Path(folder), arguments) for c in chosen}
        for number in range(arguments.rounds):
            for cell in chosen:
                floors[cell.d_in].append(_floor(cell, arguments))
                for entry, found in runs[cell].items():
                    _note(f"round {number + 1}: {cell.variant} {cell.d_in} {cell.data} {entry[0]}")
                    _run(entry, found, cell, files[cell.data, cell.d_in], arguments)
        rows = [
            row
            for cell in chosen
            for row in _rows(cell, runs[cell], min(floors[cell.d_in]), files[cell.data, cell.d_in], arguments)
        ]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        _print_table(rows)
        _print_aims(rows)


def _entries(cell: Cell, arguments: Arguments) -> list[tuple[str, str, str]]:
    entries = ENTRIES[cell.variant]
    return [entry for entry in entries if not arguments.quick or entry[1] in (OURS, "saelens")]


def _files(cell: Cell, folder: Path, arguments: Arguments) -> Inputs:
    return inputs(
        cell.data,
        folder,
        d_in=cell.d_in,
        d_sae=cell.d_sae,
        l0=arguments.l0,
        n=N_BATCHES * arguments.batch,
        batch=arguments.batch,
    )


def _floor(cell: Cell, arguments: Arguments) -> float:
    shape = {"d-in": cell.d_in, "d-sae": cell.d_sae, "batch": arguments.batch, "threads": arguments.threads}
    options = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    said = run([sys.executable, str(HERE / "floor.py"), *options], threads=arguments.threads)
    return json.loads(said)["floor_s"]


def _run(entry: tuple[str, str, str], found: Runs, cell: Cell, files: Inputs, arguments: Arguments) -> None:
    _, library, option = entry
    task = Task(
        variant=cell.variant,
        option=option,
        data=str(files.data),
        initial=str(files.initial(cell.variant)),
        out="",
        d_sae=cell.d_sae,
        steps=arguments.steps,
        batch=arguments.batch,
        k=arguments.l0,
        coefficient=arguments.l1,
        lr=arguments.lr,
        threads=arguments.threads,
    )
    try:
        found.last = train(library, task)
    except ProcessError as error:
        found.failure = str(error)
        _note(f"  failed: {error}")
    else:
        found.medians.append(statistics.median(found.last.seconds[WARM_UP:]))


def _rows(
    cell: Cell, runs: dict[tuple[str, str, str], Runs], floor: float, files: Inputs, arguments: Arguments
) -> Iterator[dict[str, str | int | float | None]]:
    ours = next(
        (min(found.medians) for (_, library, _), found in runs.items() if library == OURS and found.medians), None
    )
    for (name, _, _), found in runs.items():
        row = {"name": name, **vars(cell), "batch": arguments.batch, "floor_s": floor, "threads": arguments.threads}
        if found.last is None:
            yield row | {"step_s": None, "loss": None, "failure": found.failure}
            continue
        step = min(found.medians)
        f = encode(found.last.weights, files.held_out, cell.variant, arguments.l0)
        yield row | {
            "step_s": step,
            "ratio": None if ours is None else step / ours,
            "peak_mb": found.last.peak_mb,
            "loss": squared_error(found.last.weights, files.held_out, f),
            "l0": mean_l0(f),
            "steps": arguments.steps,
            "version": found.last.version,
        }


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_table(rows: list[dict]) -> None:
    for row in rows:
        if row["name"] == rows[0]["name"]:
            shape = (
                f"{row['variant']}, d_in {row['d_in']}, d_sae {row['d_sae']:,}, batch {row['batch']:,}, {row['data']}"
            )
            print(f"\n{shape}: floor {1e3 * row['floor_s']:,.1f} ms, {row['threads']} threads")
            print(f"  {'':<28} {'ms a step':>10} {'ratio':>7} {'/ floor':>8} {'peak MB':>9} {'loss':>9} {'L0':>7}")
        if row["step_s"] is None:
            print(f"  {row['name']:<28} failed: {row['failure']}")
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(
            f"  {row['name'] + ' ' + row['version']:<28} {1e3 * row['step_s']:>10,.1f} {ratio:>7} "
            f"{row['step_s'] / row['floor_s']:>8.2f} {row['peak_mb']:>9,.0f} {row['loss']:>9.3f} {row['l0']:>7.1f}"
        )


def _print_aims(rows: list[dict]) -> None:
    """Each aim, variant by variant, as pass or miss."""
    print()
    done = [row for row in rows if row["step_s"] is not None]
    for ours in (row for row in done if row["name"] == "headscope"):
        where = f"{ours['variant']}, d_in {ours['d_in']}, {ours['data']}"
        same = [row for row in done if all(row[key] == ours[key] for key in ("variant", "d_in", "data"))]
        for peer, d_in, aim in AIMS:
            fastest = min((row["ratio"] for row in same if row["name"].startswith(peer)), default=None)
            if ours["d_in"] == d_in and fastest is not None:
                _aim(f"{where}: {peer}'s fastest step over ours at least {aim:g}", fastest, fastest >= aim)
        if ours["d_in"] == FLOOR_AIM[0]:
            over = ours["step_s"] / ours["floor_s"]
            _aim(f"{where}: our step over the floor at most {FLOOR_AIM[1]:g}", over, over <= FLOOR_AIM[1])


def _aim(text: str, value: float, reached: bool) -> None:
    print(f"{'pass' if reached else 'miss'}  {text}: {value:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
