"""How long a proxy and a specificity study take on a random index of 24,576 features and 10M tokens, without a model.

The index is that of `queries.py` (6.3 GB, written once into `--folder`). A study takes a proxy and a feature and gives
every number of `studies.when.specificity`, with 1,000 resamples of the documents and 20 rotations for the null. "first"
is in a process that has just opened the index: the text, the vocabulary and the proxy are read and evaluated in it.
"again" is with the same proxy and another feature.

    python benchmarks/proxies.py            some minutes the first time
    python benchmarks/proxies.py --quick    under a minute: 2,048 features, 500k tokens
"""

import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro

from headscope.index.store import FeatureIndex
from headscope.proxies import evaluate
from headscope.studies.when.specificity import specificity
from queries import Arguments, Row, in_new_process, timed_row, write

TARGET = 5000.0
"""Milliseconds of a study, proxy included."""
PROXIES = {
    "induction": 'induction("{0}")',
    "induction, fuzzy": 'induction("{0}", fuzzy=True)',
    "within_after": 'within_after(["{0}", "{1}"], n=10)',
    "after_any": 'after_any(["{0}", "{1}"])',
    "token_in": 'token_in(["{0}", "{1}"])',
    "next_token_in": 'next_token_in(["{0}", "{1}"])',
    "bigram": 'bigram("{0}", "{1}")',
    "in_repeat": "in_repeat(2)",
    "and, or, not, shift": 'token_in(["{0}"]) & ~shift(after_any(["{1}"]), 1) | induction("{1}")',
    "regex": 'regex("t10[0-9] t")',
    "document": 'document("document 1*")',
}


def measure(folder: Path) -> list[Row]:
    """All figures of one index but the first study; to be called in a new process."""
    return list(_measured(folder))


def _measured(folder: Path) -> Iterator[Row]:
    index = FeatureIndex.open(folder)
    tokens = (" t20", " t300")
    evaluate('token_in([" t5"])', index)  # the vocabulary is read once
    for name, text in PROXIES.items():
        proxy = text.format(*tokens)
        yield timed_row(f"proxy {name}", lambda proxy=proxy: evaluate(proxy, index))
        yield Row(f"proxy {name}, true on", 100 * float(evaluate(proxy, index).mean()), "%")
    n_active = index.table()["n_active"].to_numpy()
    order = np.argsort(n_active)
    order = order[n_active[order] > 0]
    proxy = PROXIES["induction"].format(*tokens)
    for name, latent in (("median", order[len(order) // 2]), ("densest", order[-1])):
        for kind, parts in (("", {}), (", subtypes", {"one": proxy, "other": PROXIES["token_in"].format(*tokens)})):
            row = timed_row(
                f"study again, {name} feature{kind}",
                lambda latent=latent, parts=parts: specificity(index, int(latent), proxy, subtypes=parts),
            )
            yield replace(row, target=TARGET)
    yield Row("memory at most", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MB")


def first(folder: Path) -> list[Row]:
    """The first study of a process: for the densest feature, and the proxy of a common token."""
    index = FeatureIndex.open(folder)
    latent = int(np.argmax(index.table()["n_active"].to_numpy()))
    proxy = PROXIES["induction, fuzzy"].format(" t20")
    row = timed_row("study first, densest feature, proxy included", lambda: specificity(index, latent, proxy))
    return [replace(row, target=TARGET)]


def main(arguments: Arguments) -> None:
    """Write the index if need be, measure it in processes of their own, and print."""
    if arguments.quick:
        arguments = replace(arguments, features=2_048, tokens=500_000)
    folder = (arguments.folder / f"{arguments.features}x{arguments.tokens}").absolute()
    in_new_process(write, folder, arguments)
    for row in in_new_process(first, folder) + in_new_process(measure, folder):
        if arguments.json:
            print(json.dumps(vars(row)))
        else:
            cpu = "" if row.cpu is None else f"{row.cpu:>12.1f} CPU"
            aim = "" if row.target is None else f"   below {row.target:g}"
            print(f"{row.name:<48}{row.value:>12.2f} {row.unit:<3}{cpu}{aim}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
