"""The pages of an index: served, exported, and the deep dive into one feature."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING

from headscope.artefact import check_output, check_run_folder
from headscope.errors import ExportError, IndexFormatError
from headscope.jobs.indexes import live, upstream_sae
from headscope.limits import Device, Latent, Name, NameOrPath, Output, Port, checked

if TYPE_CHECKING:
    from headscope.explorer.cards import IndexCards
    from headscope.explorer.prompts import PromptRoutes
    from headscope.index.live import LiveIndex
    from headscope.index.store import FeatureIndex
    from headscope.live_upstream import LiveUpstream
    from headscope.proxies import Proxy
    from headscope.studies.what.downstream import Downstream
    from headscope.studies.when.records import Predictions


@checked
def serve(
    index: NameOrPath,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    with_model: bool = False,
    device: Device = "cpu",
    upstream_saes: Sequence[Name] = (),
    port: Port | None = None,
    open_browser: bool = False,
) -> None:
    """Serve the explorer of an index on 127.0.0.1 until Ctrl-C.

    Args:
        index: an index folder.
        model: the index's, to ablate its features, to say how they are computed, and to read prompts.
        sae: the index's, where it is not found (`live`).
        with_model: run the model, which is then found as `live` finds it; so it is where any other of these is named.
        device: where the model runs.
        upstream_saes: SAEs of earlier components of the model, whose features are told apart.
        port: where to listen; None takes a free one.
        open_browser: open the page in the default browser.

    Raises:
        IndexFormatError, ModelError, SAEError, ServerError: no index, not its model or SAE, or no such port.
    """
    from headscope.explorer.cards import IndexCards
    from headscope.explorer.dives import IndexDives
    from headscope.explorer.families import IndexFamilies
    from headscope.explorer.head_pages import IndexHeads
    from headscope.explorer.labelling import LabelRoutes
    from headscope.explorer.page_routes import PageRoutes
    from headscope.explorer.server import make_app
    from headscope.explorer.server import serve as serve_app
    from headscope.explorer.upstream import IndexUpstream
    from headscope.index.store import FeatureIndex

    opened = FeatureIndex.open(index)
    effects = upstream = prompts = None
    if with_model or model or sae or upstream_saes:
        effects, upstream, prompts = _models(live(index, model=model, sae=sae, device=device), upstream_saes)
    app = make_app(
        IndexCards(opened),
        dives=IndexDives(opened, effects),
        upstream=IndexUpstream(opened, upstream),
        labels=LabelRoutes(opened),
        roles=PageRoutes(IndexFamilies(opened), IndexHeads(opened)),
        prompts=prompts,
    )
    Thread(target=_preload, args=(opened,), daemon=True).start()
    serve_app(app, port=port, open_browser=open_browser)


def _preload(index: "FeatureIndex") -> None:
    with suppress(IndexFormatError):  # a card that needs what is damaged says so
        index.preload()


def _models(opened: "LiveIndex", saes: Sequence[str]) -> "tuple[_Effects, LiveUpstream, PromptRoutes]":
    """What a page asks of a model: it is loaded once, and run for one question at a time."""
    from headscope.explorer.prompts import PromptRoutes
    from headscope.live_upstream import LiveUpstream
    from headscope.studies.prompt.prompts import Prompts

    lock = Lock()
    upstream = LiveUpstream(opened, {name: upstream_sae(opened, name) for name in saes}, lock=lock)
    prompts = PromptRoutes(Prompts(opened, lock=lock), upstream.circuits, folder=str(opened.index.folder))
    return _Effects(opened, lock), upstream, prompts


class _Effects:
    """What the page asks of a model: one feature at a time is removed from it."""

    def __init__(self, opened: "LiveIndex", lock: AbstractContextManager) -> None:
        self._live, self._lock = opened, lock

    def downstream(self, latent: int, max_tokens: int) -> "Downstream":
        """The effects of one feature."""
        from headscope.studies.what.ablation import downstream

        with self._lock:
            return downstream(self._live, [latent], max_tokens=max_tokens)[0]

    def predictions(self, latent: int, proxy: "Proxy") -> "Predictions":
        """What the model predicts where one feature misses a proxy."""
        from headscope.studies.when.predictions import predictions

        with self._lock:
            return predictions(self._live.index, self._live.model, latent, proxy)


@checked
def export(
    index: NameOrPath, out: Output, *, features: Sequence[Latent] | None = None, overwrite: bool = False
) -> Path:
    """Write the explorer as one HTML file, when `out` ends with .html, or as a folder for any static host.

    Without `features`, the alive ones; in a file at most the 2,000 most active of them.

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
    """The n most active features, or all alive ones."""
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
) -> Path:
    """Write the card of one feature with its deep-dive tabs as one HTML file.

    Args:
        index: an index folder.
        feature: its latent.
        out: the file, whose name ends with .html.
        proxies: those that the page suggests when none are given.
        model: the index's, to remove the feature from it too.
        sae: the index's, where it is not found (`live`).
        with_model: run the model, which is then found as `live` finds it; so it is where one of these is named.
        device: where the model runs.
        overwrite: replace what is there.

    Raises:
        IndexFormatError, ProxyError, ExportError, OutputError: no index or feature, no proxy, or no place to write.
        ModelError, SAEError: not the index's model or SAE.
    """
    from headscope.explorer.cards import IndexCards
    from headscope.explorer.dives import IndexDives, packed
    from headscope.explorer.export import export_html
    from headscope.explorer.upstream import IndexUpstream
    from headscope.index.store import FeatureIndex
    from headscope.proxies import evaluate

    if out.suffix != ".html":
        raise ExportError(f"a page called {out.name}", expected="a name that ends with .html", do="name it so")
    check_output(out, overwrite=overwrite)
    opened = FeatureIndex.open(index)
    opened.check_latent(feature)
    for proxy in proxies:
        evaluate(proxy, opened)
    effects = None
    if with_model or model or sae:
        effects = _Effects(live(index, model=model, sae=sae, device=device), Lock())
    dives = IndexDives(opened, effects)
    pages = packed(dives, feature, proxies)
    pages[feature]["upstream"] = IndexUpstream(opened).packed(feature)
    return export_html(IndexCards(opened), out, [feature], dives=pages)
