"""Records of a prompt as JSON for the prompt explorer; static/types.d.ts has their fields."""

from typing import TYPE_CHECKING

import numpy as np

from headscope.encode import DIGITS, Json, short, significant
from headscope.studies.prompt.records import PromptRun

if TYPE_CHECKING:
    from headscope.attribution import DFA

MOST_ACTIVE = 64
"""Maximum number of features listed per token: the most active ones."""
MOST_SOURCES = 10


def run_json(found: PromptRun, folder: str) -> Json:
    """Convert the whole prompt: columns of active features, `shown` of each token, and the losses."""
    starts = np.searchsorted(found.position, np.arange(len(found.tokens)))
    shown = np.arange(len(found.position)) - starts[found.position] < MOST_ACTIVE
    active = found.activation > 0
    n = len(found.tokens)
    return {
        "tokens": found.tokens.tolist(),
        "ablations": [ablation.name for ablation in found.ablations],
        "active": np.bincount(found.position[active], minlength=n).tolist(),
        "shown": np.bincount(found.position[shown], minlength=n).tolist(),
        "latent": found.latent[shown].tolist(),
        "activation": significant(found.activation[shown], DIGITS),
        "ablated": significant(found.ablated[shown], DIGITS) if found.ablations else None,
        "loss": significant(found.loss, DIGITS),
        "ablated_loss": significant(found.ablated_loss, DIGITS) if found.ablations else None,
        "python": _python(folder, found),
    }


def dfa_json(found: "DFA") -> Json:
    """Convert a feature at one token: largest sources by head, others as one; `Example` in static/types.d.ts."""
    by_source, pattern = found.by_source.T, found.pattern.T
    order = np.argsort(-np.abs(by_source).max(1), kind="stable")
    largest, others = order[:MOST_SOURCES], order[MOST_SOURCES:]
    return {
        "latent": found.latent,
        "dst": found.query,
        "activation": short(found.activation, DIGITS),
        "pre": short(found.pre, DIGITS),
        "bias": short(found.bias, DIGITS),
        "residual": short(found.residual, 2),
        "heads": significant(by_source.sum(0), DIGITS),
        "sources": [
            {
                "pos": int(position),
                "dfa": short(float(by_source[position].sum()), DIGITS),
                "heads": significant(by_source[position], DIGITS),
                "attention": significant(pattern[position], DIGITS),
            }
            for position in largest
        ],
        "rest": significant(by_source[others].sum(0), DIGITS),
        "n_rest": len(others),
    }


def _python(folder: str, found: PromptRun) -> str:
    """Return the Python calls that reproduce the numbers."""
    return (
        "from headscope import jobs\n"
        "from headscope.studies.prompt.prompts import Prompts\n"
        "from headscope.studies.prompt.records import parse_ablations\n\n"
        f"prompts = Prompts(jobs.live({folder!r}))\n"
        f"tokens = {found.tokens.tolist()}\n"
        f"ablations = parse_ablations({[ablation.name for ablation in found.ablations]!r})\n"
        "prompts.run(tokens, ablations), prompts.next_tokens(tokens, len(tokens) - 1, ablations)"
    )
