"""Commands that make an index and study what is in it."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from headscope import jobs
from headscope.commands.options import FLAT, OfIndex
from headscope.display import Display
from headscope.index.config import IndexPlan
from headscope.limits import Above0, Count, From0, Input, Latent, Name, Output, Seed, Shuffles


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index every feature of z SAEs on a corpus: activations, statistics, source tokens, examples with their DFA.

    What an interrupted run left in `<out>.partial` is gone on with. Several processes share the work under `torchrun`.
    """

    sae: tuple[Name, ...]
    """SAE folders, or bundled ones by name; several SAEs of one model are indexed in one pass over the corpus."""
    out: Output
    """Folder to write, or folder of folders for several SAEs; must be new or empty."""
    model: Name | None = None
    """The model; the one the SAE names when not given."""
    text: Annotated[jobs.CorpusChoice, FLAT] = field(default_factory=jobs.CorpusChoice)
    thresholds: tuple[From0, ...] = (0.0,)
    """Tell source tokens for active tokens above each of these activations: 0, and then larger ones."""
    exact_sources: bool = False
    """Count all sources of every active token, not its 8 largest: slow, and much to write."""
    losses: bool = False
    """Run the model to its logits too, and keep the loss of every next token."""
    carry_sae: bool = True
    """Put a copy of the SAE into the index, so that the index can be moved and shared without it."""
    hardware: Annotated[jobs.Hardware, FLAT] = field(default_factory=jobs.Hardware)
    overwrite: bool = False
    """Replace what `out` holds, and what an interrupted run with other options left."""
    force: bool = False
    """Index also SAEs that were trained on other weights than the model's; the index says so."""

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
class Proxies:
    """Find the proxy that goes best with each feature, and say what kind of feature that makes it.

    Proxies are chosen on one half of the documents and scored on the other. An interrupted run is gone on with.
    """

    index: Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; what is found of all live features becomes its columns `proxies`."""
    features: tuple[Latent, ...] = ()
    """Print what is found of these latents, best proxy first, and write nothing."""

    def run(self) -> None:
        """Search with a progress bar."""
        with Display() as display:
            found = jobs.proxies(self.index, features=self.features, on_progress=display.on_progress)
        if isinstance(found, tuple):
            for feature in found:
                for line in feature.lines():
                    display.say(line)
        else:
            for kind, n in found.kinds.items():
                display.say(f"{kind:<20} {n:>7,} of {found.n_alive:,} live features")
            display.say(f"columns: {found.path}")


@dataclass(frozen=True, kw_only=True)
class Effects(OfIndex):
    """Measure what every feature of an index does to the loss by its direct path, exactly; added to the index."""

    index: Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; gets the columns `effects`."""
    max_tokens: Count = 2_000
    """Active tokens looked at of each feature, at most."""
    max_work: Above0 = 1e11
    """Active tokens of all features times vocabulary, at most; with a large vocabulary fewer are looked at."""

    def run(self) -> None:
        """Measure with a progress bar."""
        with Display() as display:
            found = jobs.effects(
                self.index,
                model=self.model,
                sae=self.sae,
                max_tokens=self.max_tokens,
                max_work=self.max_work,
                device=self.device,
                on_progress=display.on_progress,
            )
        which = "all" if found.most is None else f"at most {found.most:,} of each feature"
        display.say(f"effects: {found.n_pairs:,} active tokens ({which}) of {(found.n > 0).sum():,} features")
        display.say(f"columns: {self.index}/columns/effects.parquet")


@dataclass(frozen=True, kw_only=True)
class Families(OfIndex):
    """Find the induction features of an index without naming a head, and hold the post's rule against them."""

    index: Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; gets the columns `induction`, and tables in `heads`."""
    seed: Seed = 0
    """Of all draws."""

    def run(self) -> None:
        """Judge with a progress bar."""
        with Display() as display:
            found = jobs.families(
                self.index,
                model=self.model,
                sae=self.sae,
                seed=self.seed,
                device=self.device,
                on_progress=display.on_progress,
            )
        for line in found.lines():
            display.say(line)
        display.say(f"columns: {self.index}/columns/induction.parquet")


@dataclass(frozen=True, kw_only=True)
class Heads(OfIndex):
    """Study every head of the model: roles, the features it makes, what its ablation turns off, what is spread."""

    index: Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; gets tables in `heads`, and the columns `heads`. Families come first, if they are to count."""
    n_shuffles: Shuffles = 99
    """Models with shuffled weights that roles are told from; with fewer than 99 none is found at 1 %."""
    seed: Seed = 0
    """Of all draws."""

    def run(self) -> None:
        """Study with a progress bar."""
        with Display() as display:
            found = jobs.heads(
                self.index,
                model=self.model,
                sae=self.sae,
                n_shuffles=self.n_shuffles,
                seed=self.seed,
                device=self.device,
                on_progress=display.on_progress,
            )
        for line in found.lines():
            display.say(line)
        display.say(f"tables: {self.index}/heads")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Print how many features of a sample are alive, how many people found interpretable, and how far they agree."""

    index: Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; features are labelled on the page that `headscope serve` opens."""
    sample: str = "first:50"
    """`first:50` (the post's), `random:50:0` or `stratified:50:0` (by density): how drawn, how many, and the seed."""

    def run(self) -> None:
        """Tally and print."""
        result = jobs.survey(self.index, sample=self.sample)
        display = Display()
        display.print_rows(f"survey of {self.sample}: {result.drawn.definition}", result.rows())
        for note in result.notes:
            display.say(note)
