"""Commands that show an index: the explorer, and pages exported as files."""

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from headscope import jobs
from headscope.commands.display import Display
from headscope.commands.options import MayRunModel
from headscope.limits import Input, Latent, Name, Output, Port


@dataclass(frozen=True, kw_only=True)
class Serve(MayRunModel):
    """Serve the explorer of an index on 127.0.0.1 until Ctrl-C."""

    serves: ClassVar[bool] = True

    index: Input
    """An index folder."""
    upstream_sae: tuple[Name, ...] = ()
    """SAEs of earlier components of the model, such as `tiny-mlp0`, to attribute upstream contributions to their
    features. Implies --with-model."""
    port: Port | None = None
    """Port to listen on; default: any free port."""
    open: bool = False
    """Open the page in the default browser."""

    def run(self) -> None:
        """Serve until interrupted."""
        jobs.serve(
            self.index,
            model=self.model,
            sae=self.sae,
            with_model=self.with_model,
            device=self.device,
            upstream_saes=self.upstream_sae,
            port=self.port,
            open_browser=self.open,
            on_progress=_say_stage,
        )


def _say_stage(stage: str, done: int, _total: int) -> None:
    """Print that a model is being loaded; a bar would stay on the terminal for as long as the page is served."""
    if done == 0 and stage.startswith("load "):
        sys.stderr.write(f"{stage} ...\n")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the explorer as one HTML file that opens without a server or a network, or a folder for static hosting."""

    index: Input
    """An index folder."""
    out: Output
    """`page.html` for one file of at most 2,000 features; any other name for a folder for a static host."""
    features: tuple[Latent, ...] = ()
    """Latents to include; default: all alive ones, in a file the 2,000 most active."""
    overwrite: bool = False
    """Replace existing output."""

    def run(self) -> None:
        """Write the page and print its size."""
        path = jobs.export(self.index, self.out, features=self.features, overwrite=self.overwrite)
        size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
        Display().say(f"page: {path} ({size / 1e6:.1f} MB)")


@dataclass(frozen=True, kw_only=True)
class Dive(MayRunModel):
    """Write the deep dive into one feature, when it fires and what it does, as one HTML file."""

    index: Annotated[Input, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """An index folder."""
    feature: Annotated[Latent, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURE")]
    """The feature's latent."""
    proxy: tuple[str, ...] = ()
    """Rules for where it should fire, such as 'induction("board")'; default: the page's suggestions."""
    out: Output
    """File to write, `page.html`."""
    overwrite: bool = False
    """Replace existing output."""

    def run(self) -> None:
        """Write the page and print its size."""
        with Display() as display:
            path = jobs.dive(
                self.index,
                self.feature,
                self.out,
                proxies=self.proxy,
                model=self.model,
                sae=self.sae,
                with_model=self.with_model,
                device=self.device,
                overwrite=self.overwrite,
                on_progress=display.on_progress,
            )
        display.say(f"page: {path} ({path.stat().st_size / 1e6:.1f} MB)")
