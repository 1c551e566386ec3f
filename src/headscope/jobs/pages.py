"""Serve and export the pages of an index, and the deep dive into one feature."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from headscope.artefact import check_output, check_run_folder
from headscope.errors import ExportError, IndexFormatError
from headscope.jobs.inputs import Progress
from headscope.jobs.studies import subject
from headscope.limits import Device, Latent, Name, NameOrPath, Output, Port, checked

if TYPE_CHECKING:
    from headscope.explorer.cards import IndexCards
    from headscope.index.store import FeatureIndex


@checked
def serve(  # noqa: PLR0913 - one argument an option of the command
    index: NameOrPath,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    with_model: bool = False,
    device: Device = "cpu",
    upstream_saes: Sequence[Name] = (),
    port: Port | None = None,
    open_browser: bool = False,
    on_progress: Progress | None = None,
) -> None:
    """Serve the explorer of an index on 127.0.0.1 until Ctrl-C.

    Args:
        index: an index folder.
        model: the index's, to ablate its features, to attribute them, and to analyse prompts.
        sae: the index's; default: found as `live` finds it.
        with_model: run the model, found as `live` finds it; implied by naming any of these.
        device: device of the model.
        upstream_saes: SAEs of earlier components of the model, to attribute to their features.
        port: port to listen on; None takes a free one.
        open_browser: open the page in the default browser.
        on_progress: called as the model is loaded.

    Raises:
        IndexFormatError, ModelError, SAEError, ServerError: no index, not its model or SAE, or no such port.
    """
    from headscope.explorer.cards import IndexCards
    from headscope.explorer.families import IndexFamilies
    from headscope.explorer.head_pages import IndexHeads
    from headscope.explorer.labelling import LabelRoutes
    from headscope.explorer.page_routes import PageRoutes
    from headscope.explorer.server import make_app
    from headscope.explorer.server import serve as serve_app

    studied = subject(
        index,
        with_model=with_model,
        model=model,
        sae=sae,
        device=device,
        upstream_saes=upstream_saes,
        on_progress=on_progress,
    )
    opened = studied.index
    app = make_app(
        IndexCards(opened),
        subject=studied,
        labels=LabelRoutes(opened),
        roles=PageRoutes(IndexFamilies(opened), IndexHeads(opened)),
    )
    Thread(target=_preload, args=(opened,), daemon=True).start()
    serve_app(app, port=port, open_browser=open_browser)


def _preload(index: "FeatureIndex") -> None:
    with suppress(IndexFormatError):  # a card that needs damaged data reports it
        index.preload()


@checked
def export(
    index: NameOrPath, out: Output, *, features: Sequence[Latent] | None = None, overwrite: bool = False
) -> Path:
    """Write the explorer as one HTML file, when `out` ends with .html, or as a folder for any static host.

    `features` defaults to the alive ones; in a file to at most the 2,000 most active of them.

    Raises:
        IndexFormatError, ExportError, OutputError: no index, no such feature, or no place to write.
    """
    from headscope.explorer.cards import IndexCards
    from headscope.explorer.export import MAX_FEATURES, export_folder, export_html
    from headscope.explorer.families import IndexFamilies
    from headscope.explorer.head_pages import IndexHeads
    from headscope.explorer.page_routes import PageRoutes
    from headscope.index.store import FeatureIndex

    one_file = out.suffix == ".html"
    if one_file:
        check_output(out, overwrite=overwrite)
    else:
        check_run_folder(out, overwrite=overwrite, inputs=[index])
    opened = FeatureIndex.open(index)
    source = IndexCards(opened)
    chosen = list(features) if features else _most_active(source, MAX_FEATURES if one_file else None)
    if one_file:
        return export_html(source, out, chosen)
    roles = PageRoutes(IndexFamilies(opened), IndexHeads(opened))
    return export_folder(source, out, chosen, overwrite=overwrite, roles=roles)


def _most_active(source: "IndexCards", n: int | None) -> list[int]:
    """Return the n most active features, or all alive ones."""
    table = source.table()["rows"]
    alive = [i for i, active in zip(table["latent"], table["n_active"], strict=True) if active > 0]
    if not alive:
        raise ExportError("no feature is alive on this corpus", expected="at least one", do="index more text")
    alive.sort(key=lambda i: -table["n_active"][i])
    return sorted(alive[:n])


@checked
def dive(  # noqa: PLR0913 - one argument an option of the command
    index: NameOrPath,
    feature: Latent,
    out: Output,
    *,
    proxies: Sequence[str] = (),
    model: Name | None = None,
    sae: NameOrPath | None = None,
    with_model: bool = False,
    device: Device = "cpu",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Write the card of one feature with its deep-dive tabs as one HTML file.

    Args:
        index: an index folder.
        feature: its latent.
        out: the file, whose name ends with .html.
        proxies: default: those that the page suggests.
        model: the index's, to also ablate the feature in it.
        sae: the index's; default: found as `live` finds it.
        with_model: run the model, found as `live` finds it; implied by naming any of these.
        device: device of the model.
        overwrite: replace existing output.
        on_progress: called as the model is loaded, and after each study of a proxy.

    Raises:
        IndexFormatError, ProxyError, ExportError, OutputError: no index or feature, no proxy, or no place to write.
        ModelError, SAEError: not the index's model or SAE.
    """
    from headscope.explorer.cards import IndexCards
    from headscope.explorer.export import export_html
    from headscope.explorer.studies import packed
    from headscope.index.store import FeatureIndex
    from headscope.proxies import evaluate

    if out.suffix != ".html":
        raise ExportError(f"a page called {out.name}", expected="a name that ends with .html", do="name it so")
    check_output(out, overwrite=overwrite)
    opened = FeatureIndex.open(index)
    opened.check_latent(feature)
    for proxy in proxies:
        evaluate(proxy, opened)
    studied = subject(index, with_model=with_model, model=model, sae=sae, device=device, on_progress=on_progress)
    on_study = None if on_progress is None else partial(on_progress, f"feature {feature}")
    pages = {feature: packed(studied, feature, proxies, on_study)}
    return export_html(IndexCards(studied.index), out, [feature], studies=pages)
