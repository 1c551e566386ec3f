"""Commands on an existing SAE: evaluate, describe and convert it."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from headscope import jobs
from headscope.commands.display import Display
from headscope.commands.options import FLAT
from headscope.errors import OutputError
from headscope.limits import Layer, Name, Output, Tokens
from headscope.site import Kind


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure an SAE on held-out text: L0, loss recovered, explained variance, dead latents, each defined."""

    sae: Name
    """An SAE folder, or the name of a bundled one."""
    model: Name | None = None
    """The model; default: the one named by the SAE."""
    text: Annotated[jobs.CorpusChoice, FLAT] = field(default_factory=jobs.CorpusChoice)
    loss_tokens: Tokens | None = None
    """Measure losses, the largest part of the work, on about this many tokens spread over the text; default: all."""
    hardware: Annotated[jobs.Hardware, FLAT] = field(default_factory=jobs.Hardware)
    force: bool = False
    """Also measure on weights other than those it was trained on."""

    def run(self) -> None:
        """Measure the SAE and print the table."""
        unwritten = None
        with Display() as display:
            try:
                quality = jobs.eval(
                    self.sae,
                    model=self.model,
                    text=self.text,
                    hardware=self.hardware,
                    loss_tokens=self.loss_tokens,
                    force=self.force,
                    on_progress=display.on_progress,
                )
            except OutputError as error:
                if error.found is None:
                    raise
                quality, unwritten = error.found, error
        display.print_quality(quality.as_dict(), self.text.split)
        if unwritten is not None:
            raise unwritten


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe an SAE or a model, its conventions, and whether the two are compatible."""

    name: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A bundled SAE or model, a path, or a name on the hub."""
    model: Name | None = None
    """For an SAE: check that it fits this model; exit status 1 if it does not."""

    def run(self) -> None:
        """Print the description."""
        with Display() as display:
            lines, fit = jobs.info(self.name, model=self.model, on_progress=display.on_progress)
        for what, said in lines + (fit.lines if fit else []):
            display.say(f"{what + ':':<24}{said}")
        if fit is not None and not fit.fits:
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert an SAE of any format to a SAELens folder with all metadata that reads the model's own activations."""

    sae: Annotated[Name, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]
    """A path, or a name on the hub."""
    out: Output
    """Folder to write; must be new or empty."""
    model: Name | None = None
    """The model whose processed weights it was trained on; default: the one named by the SAE."""
    site: Kind | None = None
    """The site it reads, for files that do not state it; with --layer."""
    layer: Layer | None = None
    """Layer of the site; see --site."""
    trained_on: Name | None = None
    """The model's name, for files that omit it or use another program's name."""
    overwrite: bool = False
    """Replace the contents of `out`."""
    force: bool = False
    """With --model: accept an SAE that was trained on other weights, and record it as trained on these."""

    def run(self) -> None:
        """Convert the SAE and print what was written."""
        with Display() as display:
            sae = jobs.convert(
                self.sae,
                self.out,
                model=self.model,
                site=self.site,
                layer=self.layer,
                trained_on=self.trained_on,
                overwrite=self.overwrite,
                force=self.force,
                on_progress=display.on_progress,
            )
        display.say(f"SAE: {self.out} ({sae.kind}; {sae.site.hook_name} of {sae.model_name})")
