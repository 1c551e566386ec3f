"""The whole pipeline on the bundled model and the standard library: train, evaluate, index, and run all studies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import jobs
from headscope.artefact import check_holds_only, read_json
from headscope.errors import OutputError
from headscope.limits import Output, checked
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Status

if TYPE_CHECKING:
    from headscope.index.store import FeatureIndex

MODEL, UPSTREAM_SAE = "tiny", "tiny-mlp0"
"""The bundled model, and the bundled SAE of its first MLP, whose features the attribution tree names."""
HELD_OUT_TOKENS = 400_000
"""Tokens that the SAE is evaluated and indexed on."""
LOSS_TOKENS = 120_000
"""Tokens of these on which the model's losses are measured: intervals are then a few tenths of a percent wide."""
_HEAD_SHARE = 0.6
_OWN = ("sae", "sae.training", "index", "index.partial")


@dataclass(frozen=True)
class Copier:
    """A feature of the kind "X is next by induction", identified from the index."""

    latent: int
    token: str
    """X: both the top logit and the source token with the largest share of its DFA."""
    head: str
    dfa_share: float
    source_share: float


@dataclass(frozen=True)
class DemoResult:
    """Locations of the demo's files, and its findings."""

    sae: Path
    index: Path
    quality: dict[str, Any] | None
    n_alive: int
    copiers: tuple[Copier, ...]
    """Copiers, sorted by the product of head share and source share, descending."""

    def lines(self) -> list[str]:
        """Return the lines to print at the end."""
        found = len(self.copiers)
        lines = [
            f"{found:,} of {self.n_alive:,} live features look like 'X is next by induction' (top logit X, most DFA "
            f"from source tokens X, one head with at least {_HEAD_SHARE:.0%} of it):"
        ]
        for c in self.copiers[:8]:
            lines.append(
                f"  feature {c.latent:<5} {c.token!r:<14} head {c.head} {c.dfa_share:.0%} of squared DFA, "
                f"{c.source_share:.0%} from its own source token   /f/{c.latent}"
            )
        return [*lines, f"SAE: {self.sae}   index: {self.index}"]


@checked
def run(
    out: Output,
    *,
    quick: bool = False,
    overwrite: bool = False,
    on_step: Callable[[Status], None] | None = None,
    on_progress: jobs.Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> DemoResult:
    """Train an SAE on z of the last layer of `tiny`, evaluate it, index it and run every study; resumes an earlier run.

    Args:
        out: gets `sae/` and `index/`.
        quick: a smoke test on few tokens.
        overwrite: start from scratch, replacing the output of an earlier run.
        on_step: called with the status of every training step.
        on_progress: called with the progress of every other stage.
        say: called with messages, a line each.

    Raises:
        HeadscopeError: any of its kinds.
        KeyboardInterrupt: Ctrl-C; finished work is kept, and the next run resumes.
    """
    check_holds_only(out, _OWN)
    sae, index = out / "sae", out / "index"
    config = TrainConfig(tokens=200_000, d_sae=512, buffer=65_536) if quick else TrainConfig()
    held_out = jobs.CorpusChoice(max_tokens=60_000 if quick else HELD_OUT_TOKENS)
    fresh = overwrite or not (index / "manifest.json").is_file()
    if not overwrite and (sae / "cfg.json").is_file():
        _check_recipe(sae, config)
        say(f"found a trained SAE in {sae} (--overwrite starts again)")
    elif jobs.train(sae, config=config, overwrite=overwrite, on_step=on_step, on_progress=on_progress).interrupted:
        say(f"training so far is saved in {sae}; the same command resumes, --overwrite starts again")
        raise KeyboardInterrupt
    if fresh:
        if not (sae / "quality.json").is_file():
            jobs.eval(sae, text=held_out, loss_tokens=LOSS_TOKENS, on_progress=on_progress)
        jobs.index([sae], index, text=held_out, overwrite=overwrite, on_progress=on_progress)
    jobs.study_all(index, on_progress=on_progress)
    return _result(sae, index)


def _check_recipe(sae: Path, config: TrainConfig) -> None:
    """Refuse to resume with an SAE of another recipe."""
    metadata = read_json(sae / "cfg.json").get("metadata", {})
    if metadata.get("training", {}).get("config") != config.as_dict():
        raise OutputError(
            f"{sae} holds an SAE of another recipe",
            expected="none, or the demo's own",
            do="choose another --out, or pass --overwrite to train again",
        )


def _result(sae: Path, index: Path) -> DemoResult:
    from headscope.index.store import FeatureIndex

    opened = FeatureIndex.open(index)
    return DemoResult(sae, index, opened.manifest["quality"], opened.manifest["n_alive"], copiers(opened))


def copiers(index: "FeatureIndex") -> tuple[Copier, ...]:
    """Find live features whose top logit is the token with most of their DFA, mostly through one head."""
    vocabulary, _ = index.vocabulary
    rows = index.table().select(["latent", "top_logit", "top_source", "top_source_share", "top_head", "top_head_share"])
    found = []
    for row in rows.to_pylist():
        own = row["top_source"] is not None and row["top_source"] == row["top_logit"]
        if own and row["top_head_share"] >= _HEAD_SHARE and row["top_source_share"] >= 0.5:
            text = vocabulary[row["top_logit"]].decode(errors="replace")
            name = f"{index.manifest['layer']}.{row['top_head']}"
            found.append(Copier(row["latent"], text, name, row["top_head_share"], row["top_source_share"]))
    return tuple(sorted(found, key=lambda c: -c.dfa_share * c.source_share))
