"""The command line: one frozen dataclass a command, whose fields are its options, over the functions of `jobs`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from headscope import demo, jobs
from headscope.display import Display
from headscope.errors import HeadscopeError
from headscope.index.config import IndexPlan
from headscope.report import run as report
from headscope.sae.config import TrainConfig
from headscope.sae.presets import preset_note
from headscope.site import Kind
from headscope.training_commands import Runs, Sweep, preset_of, recipe

_Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class _OnDevice:
    """A command that runs the model of an index, in the precision that the index was made in."""

    device: str = "cpu"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an SAE on an attention layer's z (or another site) and write it as a SAELens folder."""

    out: Path
    """Folder to write; must be new or empty."""
    model: str = "tiny"
    """`tiny` (bundled), a Hugging Face folder, or a name on the hub."""
    text: Annotated[jobs.CorpusChoice, _Flat] = field(default_factory=lambda: jobs.CorpusChoice(split="train"))
    site: Kind = "z"
    """Which activation: z (all heads before W_O, concatenated), attn_out, mlp_out, or the residual stream."""
    layer: int | None = None
    """Layer of the site; the last one when not given."""
    preset: str = "default"
    """A published recipe, whose values hold for all options of the recipe that are not given: default, seed-gelu-2l,
    kissane-gpt2 (of a layer of gpt2, its own), anthropic-april-2024. With --help, shows those values."""
    config: Annotated[TrainConfig, _Flat] = field(default_factory=recipe)
    hardware: Annotated[jobs.Hardware, _Flat] = field(default_factory=jobs.Hardware)
    overwrite: bool = False
    """Replace what `out` holds."""

    def run(self) -> None:
        """Train with a progress bar; together with the other processes that `torchrun` started."""
        from headscope.sae.training.ranks import together

        with together(self.hardware.device) as ranks, Display(quiet=ranks.rank > 0) as display:
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


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure an SAE on held-out text: L0, loss recovered, explained variance, dead latents, each defined."""

    sae: str
    """An SAE folder, or a bundled one by name."""
    model: str | None = None
    """The model; the one the SAE names when not given."""
    text: Annotated[jobs.CorpusChoice, _Flat] = field(default_factory=jobs.CorpusChoice)
    hardware: Annotated[jobs.Hardware, _Flat] = field(default_factory=jobs.Hardware)

    def run(self) -> None:
        """Measure and print."""
        with Display() as display:
            quality = jobs.eval(
                self.sae, model=self.model, text=self.text, hardware=self.hardware, on_progress=display.on_progress
            )
        display.print_quality(quality.as_dict(), self.text.split)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print what an SAE or a model is, its conventions, and whether the two fit one another."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A bundled SAE or model, a path, or a name on the hub."""
    model: str | None = None
    """Of an SAE: say whether it fits this model; status 1 if it does not."""

    def run(self) -> None:
        """Print."""
        lines, fit = jobs.info(self.name, model=self.model)
        display = Display()
        for what, said in lines + (fit.lines if fit else []):
            display.say(f"{what + ':':<24}{said}")
        if fit is not None and not fit.fits:
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write an SAE of any format as a SAELens folder that reads the model's own activations and states all it knows."""

    sae: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]
    """A path, or a name on the hub."""
    out: Path
    """Folder to write; must be new or empty."""
    model: str | None = None
    """The model whose processed weights it was trained on; the one the SAE names when not given."""
    site: Kind | None = None
    """What it reads, for files that do not say; with --layer."""
    layer: int | None = None
    """See --site."""
    trained_on: str | None = None
    """The model's name, for files that do not say or say another program's."""
    overwrite: bool = False
    """Replace what `out` holds."""

    def run(self) -> None:
        """Convert and say what was written."""
        sae = jobs.convert(
            self.sae,
            self.out,
            model=self.model,
            site=self.site,
            layer=self.layer,
            trained_on=self.trained_on,
            overwrite=self.overwrite,
        )
        Display().say(f"SAE: {self.out} ({sae.activation.name}, {sae.site.hook_name} of {sae.model_name})")


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index every feature of z SAEs on a corpus: activations, statistics, source tokens, examples with their DFA.

    What an interrupted run left in `<out>.partial` is gone on with. Several processes share the work under `torchrun`.
    """

    sae: tuple[str, ...]
    """SAE folders, or bundled ones by name; several SAEs of one model are indexed in one pass over the corpus."""
    out: Path
    """Folder to write, or folder of folders for several SAEs; must be new or empty."""
    model: str | None = None
    """The model; the one the SAE names when not given."""
    text: Annotated[jobs.CorpusChoice, _Flat] = field(default_factory=jobs.CorpusChoice)
    thresholds: tuple[float, ...] = (0.0,)
    """Tell source tokens for active tokens above each of these activations: 0, and then larger ones."""
    exact_sources: bool = False
    """Count all sources of every active token, not its 8 largest: slow, and much to write."""
    losses: bool = False
    """Run the model to its logits too, and keep the loss of every next token."""
    hardware: Annotated[jobs.Hardware, _Flat] = field(default_factory=jobs.Hardware)
    overwrite: bool = False
    """Replace what `out` holds, and what an interrupted run with other options left."""

    def run(self) -> None:
        """Index with a progress bar."""
        plan = IndexPlan(
            n_sources=None if self.exact_sources else IndexPlan.n_sources,
            thresholds=self.thresholds,
            losses=self.losses,
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
class Serve(_OnDevice):
    """Serve the explorer of an index on 127.0.0.1 until Ctrl-C."""

    index: Path
    """An index folder."""
    model: str | None = None
    """The model the index was built with, to run it in the tabs that say what features do and how they are computed."""
    upstream_sae: tuple[str, ...] = ()
    """SAEs of earlier components of the model, such as `tiny-mlp0`, whose features are told apart upstream."""
    port: int | None = None
    """A free one when not given."""
    open: bool = False
    """Open the page in the default browser."""

    def run(self) -> None:
        """Serve."""
        jobs.serve(
            self.index,
            model=self.model,
            device=self.device,
            upstream_saes=self.upstream_sae,
            port=self.port,
            open_browser=self.open,
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the explorer as one HTML file that opens without a server or a network, or as a folder to be hosted."""

    index: Path
    """An index folder."""
    out: Path
    """`page.html` for one file of at most 2,000 features; any other name for a folder that a static host can serve."""
    features: tuple[int, ...] = ()
    """Latents to put in it; all alive ones when not given, the 2,000 most active at most in a file."""
    overwrite: bool = False
    """Replace what is there."""

    def run(self) -> None:
        """Write and say how large it is."""
        path = jobs.export(self.index, self.out, features=self.features, overwrite=self.overwrite)
        size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
        Display().say(f"page: {path} ({size / 1e6:.1f} MB)")


@dataclass(frozen=True, kw_only=True)
class Proxies:
    """Find the proxy that goes best with each feature, and say what kind of feature that makes it.

    Proxies are chosen on one half of the documents and scored on the other. An interrupted run is gone on with.
    """

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; what is found of all live features becomes its columns `proxies`."""
    features: tuple[int, ...] = ()
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
class Demo:
    """Train, measure, index and serve, on the bundled model and the Python standard library: no network."""

    out: Path | None = None
    """Folder for the SAE and the index; `runs/demo`, or `runs/demo-quick`, when not given. What is there is kept."""
    quick: bool = False
    """A small run that shows that everything works; its figures mean little."""
    serve: bool = True
    """Serve the page at the end."""
    port: int | None = None
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
            jobs.serve(result.index, port=self.port)


@dataclass(frozen=True, kw_only=True)
class Effects(_OnDevice):
    """Measure what every feature of an index does to the loss by its direct path, exactly; added to the index."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; gets the columns `effects`."""
    model: str | None = None
    """The model; the one the index names when not given. Its weights must be those the index was built with."""
    sae: str | None = None
    """The SAE, likewise."""
    max_work: float = 1e11
    """Active tokens times vocabulary, beyond which features with many active tokens are sampled."""

    def run(self) -> None:
        """Measure with a progress bar."""
        with Display() as display:
            found = jobs.effects(
                self.index,
                model=self.model,
                sae=self.sae,
                max_work=self.max_work,
                device=self.device,
                on_progress=display.on_progress,
            )
        which = "all" if found.most is None else f"at most {found.most:,} of each feature"
        display.say(f"effects: {found.n_pairs:,} active tokens ({which}) of {(found.n > 0).sum():,} features")
        display.say(f"columns: {self.index}/columns/effects.parquet")


@dataclass(frozen=True, kw_only=True)
class Families(_OnDevice):
    """Find the induction features of an index without naming a head, and hold the post's rule against them."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; gets the columns `induction`, and tables in `heads`."""
    model: str | None = None
    """The model; the one the index names when not given. Its weights must be those the index was built with."""
    sae: str | None = None
    """The SAE, likewise."""
    seed: int = 0
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
class Heads(_OnDevice):
    """Study every head of the model: roles, the features it makes, what its ablation turns off, what is spread."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder; gets tables in `heads`, and the columns `heads`. Families come first, if they are to count."""
    model: str | None = None
    """The model; the one the index names when not given. Its weights must be those the index was built with."""
    sae: str | None = None
    """The SAE, likewise."""
    n_shuffles: int = 99
    """Models with shuffled weights that roles are told from; with fewer than 99 none is found at 1 %."""
    seed: int = 0
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
class Dive(_OnDevice):
    """Write the deep dive into one feature, when it fires and what it does, as one HTML file."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder."""
    feature: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURE")]
    """Its latent."""
    proxy: tuple[str, ...] = ()
    """Rules that say where it should fire, such as 'induction("board")'; the page's suggestions when not given."""
    model: str | None = None
    """The model the index was built with, to remove the feature from it too."""
    out: Path
    """`page.html`."""
    overwrite: bool = False
    """Replace what is there."""

    def run(self) -> None:
        """Write and say how large it is."""
        path = jobs.dive(
            self.index,
            self.feature,
            self.out,
            proxies=self.proxy,
            model=self.model,
            device=self.device,
            overwrite=self.overwrite,
        )
        Display().say(f"page: {path} ({path.stat().st_size / 1e6:.1f} MB)")


@dataclass(frozen=True, kw_only=True)
class Report(_OnDevice):
    """Replicate the post on SAEs of one model, side by side: every study, written as one HTML file, JSON and Markdown.

    What is finished is kept: an interrupted run goes on with the same command. Without --sae and --index it is of the
    bundled model, its best SAE and the ReLU SAE, of the post's kind.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the report, the indexes and what each study found."""
    model: str | None = None
    """The model; the one the first SAE names when not given."""
    sae: tuple[str, ...] = ()
    """z SAEs to index and study: folders, or bundled ones by name."""
    index: tuple[Path, ...] = ()
    """Or indexes of SAEs, used as they are."""
    upstream: str | None = None
    """An SAE of an earlier MLP, whose features are looked at one by one; `tiny-mlp0` for the bundled SAEs."""
    text: Annotated[jobs.CorpusChoice, _Flat] = field(default_factory=jobs.CorpusChoice)
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


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Print how many features of a sample are alive, how many people found interpretable, and how far they agree."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
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


Command = (
    Demo
    | Train
    | Sweep
    | Runs
    | Eval
    | Info
    | Convert
    | Index
    | Serve
    | Export
    | Proxies
    | Effects
    | Families
    | Heads
    | Dive
    | Survey
    | Report
)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one command; errors of the user's input end with status 2."""
    try:
        with preset_of(sys.argv[1:] if arguments is None else arguments):
            command = tyro.cli(Command, args=arguments, prog="headscope", description=_DESCRIPTION)
        command.run()
    except HeadscopeError as error:
        sys.stderr.write(f"headscope: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("headscope: interrupted\n")
        sys.exit(130)


_DESCRIPTION = "Find and explain what the attention layers of language models compute."
