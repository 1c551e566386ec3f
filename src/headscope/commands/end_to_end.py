"""End-to-end commands, from a model to findings: the demo and the report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from headscope import jobs
from headscope.commands.display import Display
from headscope.commands.options import FLAT, OnDevice
from headscope.jobs import demo
from headscope.limits import Input, Name, Output, Port
from headscope.report import run as report


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, evaluate, index, run every study and serve, on the bundled model and the standard library: no network."""

    resumes: ClassVar[bool] = True

    out: Output | None = None
    """Folder for the SAE and the index; default `runs/demo`, or `runs/demo-quick`. Existing output is kept."""
    quick: bool = False
    """A small smoke test of the pipeline; its figures mean little."""
    serve: bool = True
    """Serve the page at the end."""
    port: Port | None = None
    """Port to listen on; default: any free port."""
    overwrite: bool = False
    """Start from scratch, replacing the output of an earlier run."""

    @property
    def serves(self) -> bool:
        """Whether it ends as a server."""
        return self.serve

    def run(self) -> None:
        """Run the stages that are missing, print the results, and serve."""
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


@dataclass(frozen=True, kw_only=True)
class Report(OnDevice):
    """Replicate the post on SAEs of one model, side by side: every study, written as one HTML file, JSON and Markdown.

    Finished work is kept: re-run the same command to resume. Without --sae and --index, the report covers the bundled
    model, its best SAE and the ReLU SAE, the kind used in the post.
    """

    resumes: ClassVar[bool] = True

    out: Annotated[Output, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the report, the indexes and the results of each study."""
    model: Name | None = None
    """The model; default: the one named by the first SAE."""
    sae: tuple[Name, ...] = ()
    """z SAEs to index and study: folders, or names of bundled ones."""
    index: tuple[Input, ...] = ()
    """Existing indexes to use as they are."""
    upstream: Name | None = None
    """An SAE of an earlier MLP, whose features are studied individually; `tiny-mlp0` for the bundled SAEs."""
    text: Annotated[jobs.CorpusChoice, FLAT] = field(default_factory=jobs.CorpusChoice)
    quick: bool = False
    """A small smoke test of every study; its figures mean little."""
    overwrite: bool = False
    """Discard the results in OUT of a run with other inputs."""

    def run(self) -> None:
        """Run the studies with progress bars, and print where the report is."""
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
