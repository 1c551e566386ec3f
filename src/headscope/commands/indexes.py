"""Commands that build an index and tally its labels."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from headscope import jobs
from headscope.commands.display import Display
from headscope.commands.options import FLAT
from headscope.index.config import IndexPlan
from headscope.limits import From0, Input, Name, Output


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index every feature of z SAEs on a corpus: activations, statistics, source tokens, examples with their DFA.

    An interrupted run resumes from `<out>.partial`. Several processes share the work under `torchrun`.
    """

    resumes: ClassVar[bool] = True

    sae: tuple[Name, ...]
    """SAE folders, or names of bundled ones; several SAEs of one model are indexed in one pass over the corpus."""
    out: Output
    """Folder to write, or parent folder for several SAEs; must be new or empty."""
    model: Name | None = None
    """The model; default: the one named by the SAE."""
    text: Annotated[jobs.CorpusChoice, FLAT] = field(default_factory=jobs.CorpusChoice)
    thresholds: tuple[From0, ...] = (0.0,)
    """Report source tokens separately for active tokens above each of these activations: 0, then increasing values."""
    exact_sources: bool = False
    """Count all sources of every active token, not its 8 largest: slow, with large output."""
    losses: bool = False
    """Also compute the logits, and store the loss of every next token."""
    carry_sae: bool = True
    """Copy the SAE into the index, so that the index can be moved and shared without it."""
    hardware: Annotated[jobs.Hardware, FLAT] = field(default_factory=jobs.Hardware)
    overwrite: bool = False
    """Replace the contents of `out`, and the partial results of a run with other options."""
    force: bool = False
    """Also index SAEs that were trained on weights other than the model's; the index records this."""

    def run(self) -> None:
        """Index with a progress bar."""
        plan = IndexPlan(
            n_sources=None if self.exact_sources else IndexPlan.n_sources,
            thresholds=self.thresholds,
            losses=self.losses,
            carry_sae=self.carry_sae,
        )
        with Display() as display:
            indexes = jobs.index(
                self.sae,
                self.out,
                model=self.model,
                text=self.text,
                plan=plan,
                hardware=self.hardware,
                overwrite=self.overwrite,
                force=self.force,
                on_progress=display.on_progress,
            )
        for index in indexes:
            manifest = index.manifest
            display.say(
                f"index: {index.folder}: {manifest['n_alive']:,} of {index.n_latents:,} features alive, "
                f"{manifest['n_pairs']:,} activations on {manifest['corpus']['n_tokens']:,} tokens"
            )
            display.say(f"look at it: headscope serve --index {index.folder}")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Print the numbers of alive and of interpretable features in a sample, and the agreement between labellers."""

    index: Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; features are labelled on the page that `headscope serve` opens."""
    sample: str = "first:50"
    """`first:50` (the post's), `random:50:0` or `stratified:50:0` (by density): sampling method, size and seed."""

    def run(self) -> None:
        """Tally the labels and print the result."""
        result = jobs.survey(self.index, sample=self.sample)
        display = Display()
        display.print_rows(f"survey of {self.sample}: {result.drawn.definition}", result.rows())
        for note in result.notes:
            display.say(note)
        if not result.tallies:
            display.say(f"no labels yet: run `headscope serve --index {self.index}` and press `n` on the page")
