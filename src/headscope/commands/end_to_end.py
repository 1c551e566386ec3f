"""Commands that run from end to end, a model to what is found in it: the demo and the report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from headscope import jobs
from headscope.commands.display import Display
from headscope.commands.options import FLAT, OnDevice
from headscope.commands.pages import end_computing
from headscope.jobs import demo
from headscope.limits import Input, Name, Output, Port
from headscope.report import run as report


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, evaluate, index, run every study and serve, on the bundled model and the standard library: no network."""

    resumes: ClassVar[bool] = True

    out: Output | None = None
    """Folder for the SAE and the index; default `runs/demo`, or `runs/demo-quick`. What it holds is kept."""
    quick: bool = False
    """A small run that shows that everything works; its figures mean little."""
    serve: bool = True
    """Serve the page at the end."""
    port: Port | None = None
    """A free one when not given."""
    overwrite: bool = False
    """Start again, replacing what an earlier run left."""

    def run(self) -> None:
        """Run what is not there yet, print, and serve."""
        with Display() as display:
            result = demo.run(
                self.out or Path("runs", "demo-quick" if self.quick else "demo"),
                quick=self.quick,
                overwrite=self.overwrite,
                on_step=display.on_step,
                on_progress=display.on_progress,
                say=display.say,
            )
        if result.quality is not None:
            display.print_quality(result.quality, "heldout")
        for line in result.lines():
            display.say(line)
        if self.serve:
            jobs.serve(result.index, model=demo.MODEL, upstream_saes=(demo.UPSTREAM_SAE,), port=self.port)
            end_computing()


@dataclass(frozen=True, kw_only=True)
class Report(OnDevice):
    """Replicate the post on SAEs of one model, side by side: every study, written as one HTML file, JSON and Markdown.

    What is finished is kept: an interrupted run goes on with the same command. Without --sae and --index it is of the
    bundled model, its best SAE and the ReLU SAE, of the post's kind.
    """

    resumes: ClassVar[bool] = True

    out: Annotated[Output, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the report, the indexes and what each study found."""
    model: Name | None = None
    """The model; the one the first SAE names when not given."""
    sae: tuple[Name, ...] = ()
    """z SAEs to index and study: folders, or bundled ones by name."""
    index: tuple[Input, ...] = ()
    """Or indexes of SAEs, used as they are."""
    upstream: Name | None = None
    """An SAE of an earlier MLP, whose features are looked at one by one; `tiny-mlp0` for the bundled SAEs."""
    text: Annotated[jobs.CorpusChoice, FLAT] = field(default_factory=jobs.CorpusChoice)
    quick: bool = False
    """Look at little of everything: it shows that it works, and its figures mean little."""
    overwrite: bool = False
    """Give up what a run with other inputs left in OUT."""

    def run(self) -> None:
        """Study with progress bars, and say where the report is."""
        inputs = report.Inputs(self.model, self.sae, self.index, self.upstream, self.text)
        with Display() as display:
            found = report.run(
                self.out,
                inputs,
                quick=self.quick,
                device=self.device,
                overwrite=self.overwrite,
                on_progress=display.on_progress,
                say=display.say,
            )
        for line in found.lines():
            display.say(line)
        display.say(f"report: {self.out / 'report.html'}")
