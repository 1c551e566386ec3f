"""Commands that train SAEs and compare training runs, and the defaults that `--preset` sets."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from headscope import jobs
from headscope.artefact import PAGE_MARK, atomic_write, check_output
from headscope.commands.display import Display
from headscope.commands.options import FLAT, joined
from headscope.errors import INTERRUPTED, FigureError, SAEError
from headscope.jobs import sweeps
from headscope.limits import Above0, Input, Layer, Name, Output, Tokens
from headscope.names import short
from headscope.sae import pareto, runs
from headscope.sae.config import TrainConfig, Variant
from headscope.sae.presets import preset, preset_note
from headscope.site import Kind

if TYPE_CHECKING:
    import plotly.graph_objects as go

_recipe: ContextVar[TrainConfig | None] = ContextVar("recipe", default=None)


def recipe() -> TrainConfig:
    """Return the default recipe: the values of the preset on the command line."""
    return _recipe.get() or TrainConfig()


@contextmanager
def preset_of(arguments: list[str]) -> Iterator[None]:
    """Take the defaults of all other options from the preset, if any, while the command line is parsed.

    Raises:
        TrainingError: no preset has that name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--model", "--layer"):
        parser.add_argument(name)
    try:
        named, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # an option without a value, which the real parser reports
        named = argparse.Namespace(preset=None, model=None, layer=None)
    layer = int(named.layer) if (named.layer or "").isdecimal() else None
    token = _recipe.set(preset(named.preset, model=named.model, layer=layer) if named.preset else None)
    try:
        yield
    finally:
        _recipe.reset(token)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an SAE on an attention layer's z (or another site) and write it as a SAELens folder."""

    resumes: ClassVar[bool] = True

    out: Output
    """Folder to write; must be new or empty."""
    model: Name = "tiny"
    """`tiny` (bundled), a Hugging Face folder, or a name on the hub."""
    text: Annotated[jobs.CorpusChoice, FLAT] = field(default_factory=lambda: jobs.CorpusChoice(split="train"))
    site: Kind = "z"
    """Activation: z (all heads before W_O, concatenated), attn_out, mlp_out, or the residual stream."""
    layer: Layer | None = None
    """Layer of the site; default: the last layer."""
    preset: str = "default"
    """A published recipe that sets the defaults of all recipe options: default, seed-gelu-2l, kissane-gpt2 (per layer
    of gpt2), anthropic-april-2024. With --help-all, prints those values."""
    config: Annotated[TrainConfig, FLAT] = field(default_factory=recipe)
    hardware: Annotated[jobs.Hardware, FLAT] = field(default_factory=jobs.Hardware)
    overwrite: bool = False
    """Replace the contents of `out`."""

    def run(self) -> None:
        """Train with a progress bar, jointly with the other processes started by `torchrun`."""
        with joined(self.hardware.device) as rank, Display(quiet=rank > 0) as display:
            if note := preset_note(self.preset, model=self.model, layer=self.layer):
                display.say(note)
            result = jobs.train(
                self.out,
                model=self.model,
                text=self.text,
                site=self.site,
                layer=self.layer,
                config=self.config,
                hardware=self.hardware,
                overwrite=self.overwrite,
                on_step=display.on_step,
                on_progress=display.on_progress,
            )
        if result.interrupted:
            display.say(
                f"stopped after {result.epochs:.2f} epochs; what was trained is saved, and the same command goes on"
            )
        display.say(f"SAE: {self.out}")
        if result.interrupted:
            sys.exit(INTERRUPTED)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train SAEs of several variants and target L0s on one stream of activations, evaluate each, compare.

    All SAEs are in memory together, each with its gradients and Adam's moments: about 32 bytes x d_in x d_sae per SAE.
    Each becomes a SAELens folder OUT/VARIANT-l0-N; the Pareto curves are OUT/pareto.json and, with plotly,
    OUT/pareto.html. Re-run the same command to resume; added variants or targets are trained and evaluated.
    """

    resumes: ClassVar[bool] = True

    out: Output
    """Parent folder of the SAE folders."""
    variants: tuple[Variant, ...] = ("relu", "batchtopk")
    """Replaces --variant."""
    target_l0s: tuple[Above0, ...] = (4.0, 8.0, 16.0, 32.0)
    """Replaces --target-l0; whole numbers for topk."""
    eval_tokens: Tokens | None = None
    """Evaluate on this many held-out tokens; default: all."""
    model: Name = "tiny"
    """`tiny` (bundled), a Hugging Face folder, or a name on the hub."""
    text: Annotated[jobs.CorpusChoice, FLAT] = field(default_factory=lambda: jobs.CorpusChoice(split="train"))
    site: Kind = "z"
    """Activation: z (all heads before W_O, concatenated), attn_out, mlp_out or resid_pre."""
    layer: Layer | None = None
    """Layer of the site; default: the last layer."""
    preset: str = "default"
    """Sets the defaults of the recipe options; see `train`."""
    config: Annotated[TrainConfig, FLAT] = field(default_factory=recipe)
    hardware: Annotated[jobs.Hardware, FLAT] = field(default_factory=jobs.Hardware)
    overwrite: bool = False
    """Start from scratch, replacing these SAEs in `out`."""

    def run(self) -> None:
        """Train and evaluate, jointly with processes from `torchrun`, print the table and draw the curves."""
        configs = sweeps.recipes(self.config, self.variants, self.target_l0s)
        with joined(self.hardware.device) as rank, Display(quiet=rank > 0) as display:
            result = sweeps.sweep(
                self.out,
                configs,
                model=self.model,
                text=self.text,
                eval_tokens=self.eval_tokens,
                site=self.site,
                layer=self.layer,
                hardware=self.hardware,
                overwrite=self.overwrite,
                on_steps=display.on_steps,
                on_progress=display.on_progress,
            )
        if result.interrupted:
            display.say("stopped early; the same command goes on from here")
        if result.pareto is not None and rank == 0:
            self._print(display, result.pareto)
        if result.interrupted:
            sys.exit(INTERRUPTED)

    def _print(self, display: Display, found: pareto.Pareto) -> None:
        from headscope import figures

        title = f"{short(found.model)}, {found.site}: {found.points[0].n_tokens:,} held-out tokens [95 % interval]"
        cells = [point.cells() for point in found.points]
        display.print_table(title, pareto.HEADINGS, cells, ["reconstruction bias", "dead"])
        display.say(f"SAEs and pareto.json: {self.out}")
        try:
            _write_html(self.out / "pareto.html", figures.pareto(found))
            display.say(f"curves: {self.out / 'pareto.html'}")
        except FigureError as error:
            display.say(f"no curves were drawn: {error.got}; {error.do}")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List training runs, finished and unfinished, with their last metrics; plot their curves."""

    folders: Annotated[tuple[Input, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDERS ...]")] = (Path(),)
    """Folders to search recursively."""
    html: Output | None = None
    """Plot loss, L0, explained variance and dead latents to this file; needs plotly."""
    overwrite: bool = False
    """Replace the file."""

    def run(self) -> None:
        """Find the runs, print and plot them."""
        from headscope import figures

        if self.html is not None:
            check_output(self.html, overwrite=self.overwrite)
        found, display = runs.find_runs(self.folders), Display()
        if not found:
            raise SAEError(
                f"no training in {', '.join(map(str, self.folders))}",
                expected="folders that `headscope train` or `headscope sweep` wrote, at any depth",
                do="name other folders",
            )
        display.print_table("runs", runs.HEADINGS, [run.cells() for run in found], ["activations", "target L0"])
        if self.html is not None:
            _write_html(self.html, figures.training_curves(found))
            display.say(f"curves: {self.html}")


def _write_html(path: Path, figure: "go.Figure") -> None:
    """Write a figure as one HTML file that needs no network."""
    with atomic_write(path) as file:
        file.write(figure.to_html(include_plotlyjs=True).replace("<head>", f"<head>{PAGE_MARK}", 1).encode())
