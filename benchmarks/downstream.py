"""How long ablating features takes, in all, by the direct path and through the MLP, beside TransformerLens' hooks.

    a  headscope     `headscope.studies.what.ablation.downstream`: 1,000 features of `tiny` at 50 active tokens each
    b  hooks         for some of the same (token, feature) pairs one run of TransformerLens a path, in a process of its
                     own; the clean run of each is not counted
    c  dictionary    the exact direct path at every active token of the index, `headscope.studies.what.effects`

The two are compared by the pair, in the processor's time at one thread each, and have to agree. The index is built once
into `--folder`.

    python benchmarks/downstream.py            some minutes, and as many again for the index the first time
    python benchmarks/downstream.py --quick    100 features at 10 tokens, on less text
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import headscope.models
from headscope import jobs
from headscope.index.live import LiveIndex
from headscope.studies.what.ablation import downstream
from headscope.studies.what.downstream import Downstream
from headscope.studies.what.effects import direct_effects

JUDGE = Path(__file__).parents[1] / "tests" / "judges" / "transformer_lens_paths.py"
TINY = Path(headscope.models.__file__).parent / "tiny"
PATHS = {"total": "total", "direct": "direct", "mlp": "mlp.1"}
SECONDS, RATIO, TOLERANCE = 120.0, 20.0, 1e-4


@dataclass(frozen=True)
class Arguments:
    """Options."""

    folder: Path = Path("build/benchmarks/downstream")
    """Where the index is kept."""
    tokens: int = 300_000
    features: int = 1_000
    contexts: int = 50
    pairs: int = 40
    """Compared with hooks."""
    threads: int = 1
    quick: bool = False
    json: bool = False
    """One JSON object a line."""


def main(arguments: Arguments) -> None:
    """Run and print."""
    torch.set_num_threads(arguments.threads)
    tokens, n_features, contexts, n_pairs = (
        (60_000, 100, 10, 8)
        if arguments.quick
        else (arguments.tokens, arguments.features, arguments.contexts, arguments.pairs)
    )
    live = _index(arguments.folder / f"tiny-{tokens}", tokens)
    n_active = live.index.table()["n_active"].to_numpy()
    latents = np.argsort(-n_active, kind="stable")[:n_features].tolist()
    wall, busy = time.perf_counter(), time.process_time()
    records = downstream(live, latents, max_tokens=contexts)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    pairs = sum(record.n for record in records)
    _print(arguments, "headscope", {"features": n_features, "pairs": pairs, "seconds": wall, "cpu": busy})
    hooks, apart = _hooks(live, records, n_pairs)
    ratio = hooks / (busy / pairs)
    figures = {"pairs": n_pairs, "seconds_a_pair": hooks, "ratio": ratio, "largest_difference": apart}
    _print(arguments, "hooks", figures)
    wall, busy = time.perf_counter(), time.process_time()
    effects = direct_effects(live)
    figures = {"pairs": effects.n_pairs, "seconds": time.perf_counter() - wall, "cpu": time.process_time() - busy}
    _print(arguments, "dictionary", figures)
    if not arguments.json:
        print(f"targets: headscope below {SECONDS:.0f} s ({n_features} x {contexts}), ratio at least {RATIO:.0f}")
    if apart > TOLERANCE:
        sys.exit(f"the two differ by {apart:g} nats")


def _index(folder: Path, tokens: int) -> LiveIndex:
    if not folder.is_dir():
        jobs.index(["tiny-z1"], folder, text=jobs.CorpusChoice(max_tokens=tokens))
    return jobs.live(folder)


def _hooks(live: LiveIndex, records: tuple[Downstream, ...], n: int) -> tuple[float, float]:
    """The processor's seconds a pair by hooks, in the median, and the largest difference of any loss change."""
    rng = np.random.default_rng(0)
    live_records = [record for record in records if record.n]
    chosen = [live_records[i] for i in rng.integers(len(live_records), size=n)]
    at = [int(rng.integers(record.n)) for record in chosen]
    position = np.array([record.position[i] for record, i in zip(chosen, at, strict=True)])
    block, query = np.divmod(position, live.index.block_size)
    f = torch.tensor([record.activation[i] for record, i in zip(chosen, at, strict=True)], dtype=torch.float32)
    directions = live.sae.W_dec[[record.latent for record in chosen]] @ live.model.W_O(live.sae.site.layer)
    tokens = np.stack([live.index.tokens_of(b) for b in block.tolist()]).astype(np.int64)
    with tempfile.TemporaryDirectory() as scratch:
        case, out = Path(scratch, "case.npz"), Path(scratch, "out.npz")
        np.savez(case, tokens=tokens, block=np.arange(n), query=query, write=(-f[:, None] * directions).numpy())
        subprocess.run([sys.executable, str(JUDGE), str(TINY), str(case), str(out)], check=True, capture_output=True)
        judged = dict(np.load(out))
    apart = [
        abs(record.paths[own].change[i] - judged[theirs][row])
        for row, (record, i) in enumerate(zip(chosen, at, strict=True))
        for theirs, own in PATHS.items()
    ]
    return float(np.median(judged["seconds"])), float(max(apart))


def _print(arguments: Arguments, name: str, figures: dict[str, float]) -> None:
    if arguments.json:
        print(json.dumps({"name": name} | figures), flush=True)
    else:
        print(f"  {name:<11}" + "  ".join(f"{key} {value:,.6g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
