"""How long it takes to ask an index something, on a random index of 24,576 features and 10M tokens at L0 12.

The index (see `synthetic_index.py`) is written once into `--folder`, 6.3 GB of disk, and used again after that. It is
read in a process of its own. "cold" is an index just opened whose files are not in the page cache; "warm" asks for the
same 300 latents again, in another order; "first" is the first of these. A card is what the explorer sends for one
feature, JSON included. A proxy study holds one feature against a predicate of all tokens: precision and recall by
threshold, Pearson correlation. Beside the time by the clock stands that of the processor.

    python benchmarks/queries.py            some minutes the first time
    python benchmarks/queries.py --quick    under a minute: 2,048 features, 500k tokens
"""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro

from headscope.index.store import FeatureIndex

N_LATENTS = 300
TARGETS = {"card warm p50": 20.0, "card warm p99": 100.0, "proxy study": 5000.0}
"""Milliseconds."""


@dataclass(frozen=True)
class Arguments:
    """Options."""

    folder: Path = Path("build/benchmarks/queries")
    """Where the index is kept."""
    features: int = 24_576
    tokens: int = 10_000_000
    quick: bool = False
    """2,048 features and 500k tokens."""
    json: bool = False
    """One JSON object a line."""


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    cpu: float | None = None
    """Of a time, that of the processor: what does not depend on who else is at work."""
    target: float | None = None
    """What it has to stay below."""


# -------------------------------------------------------------------------------------------------------------- measure
def measure(folder: Path) -> list[Row]:
    """All figures of one index; to be called in a new process."""
    return list(_measured(folder))


def _measured(folder: Path) -> Iterator[Row]:
    yield Row("size on disk", sum(f.stat().st_size for f in folder.rglob("*.parquet")) / 1e9, "GB")
    yield Row("memory before", _resident(), "MB")
    _forget(folder)
    yield _row("open cold", [_timed(FeatureIndex.open, folder)])
    yield _row("open warm", [_timed(FeatureIndex.open, folder)])
    n_active = FeatureIndex.open(folder).table()["n_active"].to_numpy()
    rng = np.random.default_rng(0)
    live = np.flatnonzero(n_active)
    latents = rng.choice(live, min(N_LATENTS, len(live)), replace=False).tolist()
    for name, ask in _QUESTIONS.items():
        index = FeatureIndex.open(folder)
        _forget(folder)
        question = ask(index)
        for heat, order in (("cold", latents), ("warm", rng.permutation(latents).tolist())):
            times = [_timed(question, latent) for latent in order]
            yield _row(f"{name} {heat} first", times[:1])
            for percentile in (50, 99):
                yield _row(f"{name} {heat} p{percentile}", times, percentile)
    index = FeatureIndex.open(folder)
    for name, latent in (("proxy study", latents[0]), ("proxy study, densest feature", int(np.argmax(n_active)))):
        _forget(folder)
        yield _row(name, [_timed(lambda j: proxy_study(index, j), latent)])
    yield Row("memory at most", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MB")


def _cards(index: FeatureIndex) -> Callable[[int], str]:
    from headscope.explorer.cards import IndexCards  # with the server: not part of what opening an index takes

    cards = IndexCards(index)
    return lambda latent: json.dumps(cards.feature(latent))


_QUESTIONS: dict[str, Callable[[FeatureIndex], Callable[[int], object]]] = {
    "feature": lambda index: index.feature,
    "sources": lambda index: index.sources,
    "examples": lambda index: index.examples,
    "activations": lambda index: index.activations,
    "card": _cards,
}


def _timed(ask: Callable[..., object], of: object) -> tuple[float, float]:
    """Milliseconds by the clock and of the processor."""
    start, busy = time.perf_counter(), time.process_time()
    ask(of)
    return (time.perf_counter() - start) * 1e3, (time.process_time() - busy) * 1e3


def _row(name: str, times: list[tuple[float, float]], percentile: int = 50) -> Row:
    wall, cpu = np.percentile(times, percentile, axis=0).tolist()
    return Row(name, wall, "ms", cpu, TARGETS.get(name))


def timed_row(name: str, work: Callable[[], object]) -> Row:
    """One figure: how long some work takes, once."""
    return _row(name, [_timed(lambda _: work(), None)])


def _forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in folder.rglob("*.parquet"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# ---------------------------------------------------------------------------------------------------------------- proxy
@dataclass(frozen=True)
class ProxyStudy:
    """A feature against a predicate of tokens, over all text tokens of a corpus."""

    thresholds: np.ndarray
    precision: np.ndarray
    """P(proxy | f > threshold)."""
    recall: np.ndarray
    """P(f > threshold | proxy)."""
    pearson: float


def proxy_study(index: FeatureIndex, latent: int) -> ProxyStudy:
    """A feature against "its top logit token is next by induction": all tokens are looked at, and no model is run."""
    token = index.sql("SELECT token FROM tokens")["token"].to_numpy()
    proxy = _induction_of(token, index.feature(latent).logit_top[0][0], index.block_size)
    text = np.ones(len(token), dtype=bool)
    text[:: index.block_size] = False
    active = index.activations(latent)
    f = active.activation.astype(np.float64)
    own = proxy[active.position]
    order = np.argsort(-f)
    true = np.cumsum(own[order])
    at = np.searchsorted(-f[order], -np.linspace(0, f.max(), 50, endpoint=False), side="right").clip(1) - 1
    n, n_proxy = text.sum(), max(1, (proxy & text).sum())
    mean, share = f.sum() / n, n_proxy / n
    covariance = f[own].sum() / n - mean * share
    spread = np.sqrt(((f**2).sum() / n - mean**2) * share * (1 - share))
    return ProxyStudy(f[order][at], true[at] / (at + 1), true[at] / n_proxy, float(covariance / spread))


def _induction_of(token: np.ndarray, target: int, block_size: int) -> np.ndarray:
    """Of each position, whether its token stood before in its block with `target` after it."""
    follower = np.flatnonzero(token == target)
    follower = follower[follower % block_size > 0]
    width = int(token.max()) + 1
    pair = (follower - 1) // block_size * width + token[follower - 1]  # (block, the token before target)
    pair, first = np.unique(pair, return_index=True)
    since = follower[first]
    found = np.zeros(len(token), dtype=bool)
    if not len(pair):
        return found
    key = np.arange(len(token)) // block_size * width + token
    at = np.searchsorted(pair, key).clip(max=len(pair) - 1)
    return (pair[at] == key) & (np.arange(len(token)) >= since[at])


# ----------------------------------------------------------------------------------------------------------------- main
def main(arguments: Arguments) -> None:
    """Write the index if need be, measure it, each in a process of its own, and print."""
    if arguments.quick:
        arguments = replace(arguments, features=2_048, tokens=500_000)
    folder = (arguments.folder / f"{arguments.features}x{arguments.tokens}").absolute()
    rows = in_new_process(write, folder, arguments) + in_new_process(measure, folder)
    for row in rows:
        if arguments.json:
            print(json.dumps(vars(row)))
        else:
            cpu = "" if row.cpu is None else f"{row.cpu:>12.1f} CPU"
            aim = "" if row.target is None else f"   below {row.target:g}"
            print(f"{row.name:<32}{row.value:>12.1f} {row.unit:<3}{cpu}{aim}")


def write(folder: Path, arguments: Arguments) -> list[Row]:
    """Write the index, or leave the one that stands there."""
    from synthetic_index import Shape, write_index  # imports torch, which the reader must do without

    start = time.perf_counter()
    write_index(folder, Shape(features=arguments.features, tokens=arguments.tokens))
    return [Row("writing it", time.perf_counter() - start, "s")]


def in_new_process(work: Callable[..., list[Row]], *arguments: object) -> list[Row]:
    """What some work gives, done in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
