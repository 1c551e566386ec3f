"""The commands as functions: names and paths in, files out. `headscope.cli` is a thin layer over them.

Each job checks where it will write before it computes anything, and what it writes is whole or absent. Heavy
imports are inside the functions: `headscope --help` is quick, and a served page loads no torch.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from headscope.artefact import check_output, check_run_folder, file_hash, read_json, write_json
from headscope.corpus import Corpus, Reading, Split, load_corpus
from headscope.errors import ExportError, ModelError, OutputError, SAEError
from headscope.index.config import IndexPlan
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Status
from headscope.sae.runs import METRICS, TRAINING
from headscope.site import Kind, Site

if TYPE_CHECKING:
    from headscope.explorer.cards import IndexCards
    from headscope.explorer.prompts import PromptRoutes
    from headscope.index.head_records import HeadTables
    from headscope.index.live import LiveIndex
    from headscope.index.store import FeatureIndex
    from headscope.live_upstream import LiveUpstream
    from headscope.models.hf import Model
    from headscope.proxies import Proxy
    from headscope.proxies.search_records import FeatureProxies
    from headscope.proxies.search_table import Summary
    from headscope.sae.describe import Fit, Lines
    from headscope.sae.model import SAE
    from headscope.sae.quality import Quality
    from headscope.sae.training.run import TrainResult
    from headscope.studies.downstream import Downstream
    from headscope.studies.effects import DirectEffects
    from headscope.studies.induction_store import InductionFamily
    from headscope.studies.specificity_records import Predictions
    from headscope.studies.survey import Survey

Progress = Callable[[str, int, int], None]
"""Called with the stage, the work done and the work in all, which is 0 where that is not known."""


@dataclass(frozen=True)
class CorpusChoice(Reading):
    """Which text is read, and how it is cut."""

    corpus: str = "python"
    """`python` (the standard library of this interpreter); a file, folder or pattern of files: text, .jsonl, .parquet,
    .npy; a folder that `datasets` saved; or a dataset on the hub."""
    split: Split = "heldout"
    """Documents to read: those for training (60 %), those held out (40 %, by hash of their name), or all."""
    block_size: int | None = None
    """Tokens in a block, BOS included; 256, or the model's context if that is shorter, when not given."""
    max_tokens: int | None = None
    """Read at most this many tokens."""

    def load(self, model: "Model", on_progress: "Progress | None" = None) -> Corpus:
        """Read, tokenise and pack; text that takes long to tokenise is told of as it goes on."""
        return load_corpus(
            self.corpus,
            model.tokenizer,
            bos=model.bos,
            split=self.split,
            block_size=min(256, model.spec.context) if self.block_size is None else self.block_size,
            max_tokens=self.max_tokens,
            reading=self,
            on_tokens=None if on_progress is None else lambda done, total: on_progress("tokenise", done, total or 0),
        )


@dataclass(frozen=True)
class Hardware:
    """Where and in what precision a model computes."""

    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model. SAEs, losses, norms' scales and statistics are of float32; an index is only made in float32."""

    def load(self, name: str) -> "Model":
        """Load a model.

        Raises:
            ModelError: no such model, or no such device.
        """
        return _load(name, self.device, self.dtype)


def _load(name: str, device: str, dtype: str) -> "Model":
    """A model on a device; `cuda` under `torchrun` is the GPU of the process's own.

    Raises:
        ModelError: no such model, or no such device.
    """
    import torch

    from headscope.models.load import load_model

    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r}: {str(error).splitlines()[0]}",
            expected="cpu, or cuda on a machine that has it",
            do="pass another --device",
        ) from error
    return load_model(name, device=found, dtype=getattr(torch, dtype))


def train(  # noqa: PLR0913 - one argument an option of the command
    out: Path,
    *,
    model: str = "tiny",
    text: CorpusChoice | None = None,
    site: Kind = "z",
    layer: int | None = None,
    config: TrainConfig | None = None,
    hardware: Hardware | None = None,
    overwrite: bool = False,
    on_step: Callable[[Status], None] | None = None,
    on_progress: Progress | None = None,
) -> "TrainResult":
    """Train an SAE and write it to `out`, a SAELens folder; `layer` None is the last.

    Checkpoints are kept beside it, in `out.training`, until it is done: the same call goes on with a run that was cut
    off. After Ctrl-C what was trained is written too, and the result says `interrupted`. In a process group all ranks
    train one SAE, and the first writes it.

    Raises:
        HeadscopeError: any of its kinds; nothing is computed before `out` is known to be free.
    """
    from headscope.sae.formats import save_sae
    from headscope.sae.training.checkpoint import Checkpoints
    from headscope.sae.training.ranks import Ranks
    from headscope.sae.training.run import train_sae

    text, ranks = text or CorpusChoice(split="train"), Ranks.joined()
    kept = Checkpoints(out.with_name(f"{out.name}{TRAINING}"), ranks)
    going_on = kept.begun and not overwrite
    config = config or TrainConfig()
    overwrite = overwrite or (going_on and _is_of_this_training(out, config))
    check_run_folder(out, overwrite=overwrite, inputs=[model, text.corpus])
    if not going_on:
        kept.clear()
    loaded = (hardware or Hardware()).load(model)
    chosen = Site(site, loaded.spec.n_layers - 1 if layer is None else layer)
    loaded.check_layer(chosen.layer)
    corpus = text.load(loaded, on_progress)
    result = train_sae(loaded, corpus, chosen, config, on_step, folder=kept.folder)
    if ranks.rank == 0:
        try:
            save_sae(result.sae, out, overwrite=overwrite)
            shutil.copy(kept.folder / f"{METRICS}.jsonl", out)
        except (OutputError, OSError) as error:
            rescue = save_sae(result.sae, Path(tempfile.mkdtemp(prefix="headscope-"), out.name))
            raise OutputError(
                f"{out} could not be written ({error.__cause__ or error})",
                expected="the folder to stay writable, on a disk with room",
                do=f"move what was trained from {rescue}",
            ) from error
    if not result.interrupted:
        kept.clear()
    return result


def _is_of_this_training(sae: Path, config: TrainConfig) -> bool:
    """Whether a folder holds an SAE whose training was ended early, or before its checkpoints were removed."""
    try:
        held = read_json(sae / "cfg.json")["metadata"]["training"]
        return held["interrupted"] is True or held["config"] == config.as_dict()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def eval(
    sae: str | Path,
    *,
    model: str | None = None,
    text: CorpusChoice | None = None,
    hardware: Hardware | None = None,
    on_progress: Progress | None = None,
) -> "Quality":
    """Measure an SAE on held-out text; beside files of the user's own `quality.json` is written.

    Raises:
        HeadscopeError: any of its kinds.
    """
    from headscope.sae.convert import fitted
    from headscope.sae.formats import load_sae

    loaded_sae = load_sae(sae)
    loaded = (hardware or Hardware()).load(model or loaded_sae.model_name)
    corpus = (text or CorpusChoice()).load(loaded, on_progress)
    on_tokens = None if on_progress is None else lambda done, total: on_progress("evaluate", done, total)
    return measure(sae, fitted(loaded_sae, loaded), loaded, corpus, on_tokens)


def measure(
    name: str | Path,
    sae: "SAE",
    model: "Model",
    corpus: Corpus,
    on_tokens: Callable[[int, int], None] | None = None,
) -> "Quality":
    """As `eval`, of an SAE, a model and text that are loaded; `name` is what the SAE was loaded from."""
    from headscope.sae.formats import locate
    from headscope.sae.quality import evaluate

    files, quality = locate(name), evaluate(model, sae, corpus, on_tokens)
    record = {"sae_hash": file_hash(files.weights), "corpus": corpus.fingerprint(), "quality": quality.as_dict()}
    if files.own:
        try:
            write_json(files.quality, record)
        except OutputError as error:
            warnings.warn(f"the figures are not kept beside the SAE: {error}", stacklevel=2)
    return quality


def convert(
    sae: str | Path,
    out: Path,
    *,
    model: str | None = None,
    site: Kind | None = None,
    layer: int | None = None,
    trained_on: str | None = None,
    overwrite: bool = False,
) -> "SAE":
    """Write an SAE of any format as a SAELens folder that states all, and that reads the model's own activations.

    Args:
        sae: see `load_sae`.
        out: the folder.
        model: to convert an SAE of processed weights with; the one the SAE names when not given.
        site: what it reads, with `layer`, for files that do not say.
        layer: see `site`.
        trained_on: the model's name, for files that do not say or say another program's.
        overwrite: replace what `out` holds.

    Raises:
        HeadscopeError: any of its kinds.
    """
    from headscope.models.load import load_model
    from headscope.sae.convert import fitted
    from headscope.sae.formats import load_sae, save_sae

    if (site is None) != (layer is None):
        raise SAEError(
            "a site without a layer, or a layer without a site", expected="both", do="give --site and --layer"
        )
    check_run_folder(out, overwrite=overwrite, inputs=[sae, *([model] if model else [])])
    stated = None if site is None or layer is None else Site(site, layer)
    loaded = load_sae(sae, site=stated, model_name=trained_on)
    if loaded.processed or model is not None:
        loaded = fitted(loaded, load_model(model or loaded.model_name))
    save_sae(loaded, out, overwrite=overwrite)
    return loaded


def info(name: str | Path, *, model: str | None = None) -> "tuple[Lines, Fit | None]":
    """What an SAE or a model is; of an SAE, with a model, whether the two fit.

    Raises:
        SAEError, ModelError: neither is there, or it cannot be read.
    """
    from headscope.models.load import load_model
    from headscope.sae import describe
    from headscope.sae.formats import is_sae, load_sae, locate

    if not is_sae(name):
        return describe.describe_model(load_model(str(name))), None
    sae, files = load_sae(name), locate(name)
    lines = describe.describe_sae(sae, files)
    if model is None:
        return lines, None
    loaded = load_model(model)
    return lines + describe.describe_model(loaded), describe.fit(sae, loaded)


def index(
    saes: Sequence[str | Path],
    out: Path,
    *,
    model: str | None = None,
    text: CorpusChoice | None = None,
    plan: IndexPlan | None = None,
    hardware: Hardware | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> "tuple[FeatureIndex, ...]":
    """Index every feature of some z SAEs of one model on held-out text, in one pass, and open the indexes.

    Under `torchrun` the ranks share the work; all but the first return nothing.

    Raises:
        HeadscopeError: any of its kinds; nothing is computed before `out` is known to be free.
    """
    from headscope.index.build import SAERecord, build_index
    from headscope.index.parts import Workers
    from headscope.index.store import FeatureIndex
    from headscope.sae.convert import fitted
    from headscope.sae.formats import load_sae, sae_hash

    text = text or CorpusChoice()
    if not saes:
        raise SAEError("no SAE to index", expected="one or more", do="name them after --sae")
    _check_remnant(out, overwrite=overwrite)
    check_run_folder(out, overwrite=overwrite, inputs=[*saes, text.corpus, *([model] if model else [])])
    loaded_saes = [load_sae(sae) for sae in saes]
    loaded = (hardware or Hardware()).load(model or loaded_saes[0].model_name)
    corpus = text.load(loaded, on_progress)
    workers = Workers.of_environment()
    folders = build_index(
        loaded,
        [
            (fitted(loaded_sae, loaded), SAERecord(str(sae), sae_hash(sae), measured_quality(sae, corpus)))
            for sae, loaded_sae in zip(saes, loaded_saes, strict=True)
        ],
        corpus,
        out,
        overwrite=overwrite,
        plan=plan,
        workers=workers,
        on_progress=on_progress,
    )
    return tuple(FeatureIndex.open(folder) for folder in folders) if workers.rank == 0 else ()


def _check_remnant(out: Path, *, overwrite: bool) -> None:
    """Name what a build left beside a finished index: one that replaces it, or its own, killed at its very end."""
    partial = out.with_name(f"{out.name}.partial")
    if not overwrite and (out / "manifest.json").is_file() and partial.is_dir():
        raise OutputError(
            f"{out} already exists, and {partial} holds what a build beside it left",
            expected="a new or empty folder",
            do="choose another folder, or pass --overwrite: it goes on with what is there, and clears it",
        )


def live(
    index: str | Path, *, model: str | None = None, sae: str | Path | None = None, device: str = "cpu"
) -> "LiveIndex":
    """Open an index with the model and the SAE that its manifest names, or with others of the same weights.

    The model computes in the precision that the index was made in.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    from headscope.index.live import LiveIndex
    from headscope.index.store import FeatureIndex
    from headscope.sae.convert import fitted
    from headscope.sae.formats import load_sae, sae_hash

    opened = FeatureIndex.open(index)
    name = sae or opened.manifest["sae"]["name"]
    opened.check_same(sae_hash=sae_hash(name))
    loaded = _load(model or opened.manifest["model"]["name"], device, opened.manifest["dtype"])
    return LiveIndex(opened, loaded, fitted(load_sae(name), loaded))


def upstream_sae(opened: "LiveIndex", name: str) -> "SAE":
    """An SAE of an earlier component of an index's model, as it reads this model's activations, and where it is.

    Raises:
        ModelError, SAEError: no such SAE, or one that does not fit the model.
    """
    from headscope.sae.convert import fitted
    from headscope.sae.formats import load_sae

    return fitted(load_sae(name), opened.model).to(opened.model.device).to(opened.model.module.dtype)


def measured_quality(sae: str | Path, corpus: Corpus) -> dict[str, Any] | None:
    """What `eval` found for exactly these weights on exactly this text, if it was run."""
    from headscope.sae.formats import locate, sae_hash

    path = locate(sae).quality
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        same = record["sae_hash"] == sae_hash(sae) and record["corpus"] == corpus.fingerprint()
        return record["quality"] if same else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} cannot be read and is left out: {error!r}", stacklevel=2)
        return None


def proxies(
    index: str | Path, *, features: Sequence[int] = (), on_progress: Progress | None = None
) -> "tuple[FeatureProxies, ...] | Summary":
    """Find the proxies that go best with features: of all live ones, into the index's columns `proxies`.

    Args:
        index: an index folder.
        features: only these, and nothing is written.
        on_progress: called after every feature.

    Returns:
        What was found of each of `features`, or a count of kinds.

    Raises:
        IndexFormatError, OutputError: no index, no such feature, or columns that cannot be written.
    """
    from headscope.index.store import FeatureIndex
    from headscope.proxies.search import search
    from headscope.proxies.search_table import add_proxies

    opened = FeatureIndex.open(index)
    return tuple(search(opened, features)) if features else add_proxies(opened, on_progress=on_progress)


class _Effects:
    """What the page asks of a model: one feature at a time is removed from it."""

    def __init__(self, opened: "LiveIndex", lock: AbstractContextManager) -> None:
        self._live, self._lock = opened, lock

    def downstream(self, latent: int, max_tokens: int) -> "Downstream":
        """The effects of one feature."""
        from headscope.studies.ablation import downstream

        with self._lock:
            return downstream(self._live, [latent], max_tokens=max_tokens)[0]

    def predictions(self, latent: int, proxy: "Proxy") -> "Predictions":
        """What the model predicts where one feature misses a proxy."""
        from headscope.studies.predictions import predictions

        with self._lock:
            return predictions(self._live.index, self._live.model, latent, proxy)


def serve(
    index: str | Path,
    *,
    model: str | None = None,
    device: str = "cpu",
    upstream_saes: Sequence[str] = (),
    port: int | None = None,
    open_browser: bool = False,
) -> None:
    """Serve the explorer of an index on 127.0.0.1 until Ctrl-C.

    Args:
        index: an index folder.
        model: the index's, to ablate its features, to say how they are computed, and to read prompts.
        device: where the model runs.
        upstream_saes: of earlier components of it, whose features are told apart.
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
    if upstream_saes and not model:
        raise SAEError("upstream SAEs without a model", expected="the model that they are of", do="pass --model too")
    effects, upstream, prompts = _models(index, model, device, upstream_saes) if model else (None, None, None)
    app = make_app(
        IndexCards(opened),
        dives=IndexDives(opened, effects),
        upstream=IndexUpstream(opened, upstream),
        labels=LabelRoutes(opened),
        roles=PageRoutes(IndexFamilies(opened), IndexHeads(opened)),
        prompts=prompts,
    )
    serve_app(app, port=port, open_browser=open_browser)


def _models(
    index: str | Path, model: str, device: str, saes: Sequence[str]
) -> "tuple[_Effects, LiveUpstream, PromptRoutes]":
    """What a page asks of a model: it is loaded once, and run for one question at a time."""
    from headscope.explorer.prompts import PromptRoutes
    from headscope.live_upstream import LiveUpstream
    from headscope.studies.prompt import Prompts

    opened, lock = live(index, model=model, device=device), Lock()
    upstream = LiveUpstream(opened, {name: upstream_sae(opened, name) for name in saes}, lock=lock)
    prompts = PromptRoutes(Prompts(opened, lock=lock), upstream.circuits, folder=str(index))
    return _Effects(opened, lock), upstream, prompts


def export(index: str | Path, out: Path, *, features: Sequence[int] | None = None, overwrite: bool = False) -> Path:
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


def dive(
    index: str | Path,
    feature: int,
    out: Path,
    *,
    proxies: Sequence[str] = (),
    model: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Path:
    """Write the card of one feature with its deep-dive tabs as one HTML file.

    Args:
        index: an index folder.
        feature: its latent.
        out: the file, whose name ends with .html.
        proxies: those that the page suggests when none are given.
        model: the index's, to remove the feature from it too.
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

    if out.suffix != ".html":
        raise ExportError(f"a page called {out.name}", expected="a name that ends with .html", do="name it so")
    check_output(out, overwrite=overwrite)
    opened = FeatureIndex.open(index)
    opened.check_latent(feature)
    dives = IndexDives(opened, _Effects(live(index, model=model, device=device), Lock()) if model else None)
    pages = packed(dives, feature, proxies)
    pages[feature]["upstream"] = IndexUpstream(opened).packed(feature)
    return export_html(IndexCards(opened), out, [feature], dives=pages)


def survey(index: str | Path, *, sample: str = "first:50") -> "Survey":
    """Tally what was said of a sample of an index's features: how many are alive, and how many interpretable.

    Raises:
        IndexFormatError, LabelError: no index, no such sample, or a damaged file of labels.
    """
    from headscope.index.labels import LabelStore
    from headscope.index.store import FeatureIndex
    from headscope.studies import survey as study

    chosen, opened = study.Sample.parse(sample), FeatureIndex.open(index)
    return study.survey(opened, LabelStore(opened).read(), chosen)


def _most_active(source: "IndexCards", n: int | None) -> list[int]:
    """The n most active features, or all alive ones."""
    table = source.table()["rows"]
    alive = [i for i, active in zip(table["latent"], table["n_active"], strict=True) if active > 0]
    if not alive:
        raise ExportError("no feature is alive on this corpus", expected="at least one", do="index more text")
    alive.sort(key=lambda i: -table["n_active"][i])
    return sorted(alive[:n])


def effects(
    index: str | Path,
    *,
    model: str | None = None,
    sae: str | Path | None = None,
    max_work: float = 1e11,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> "DirectEffects":
    """The exact direct-path loss effect of every live feature of an index, added to it as the columns `effects`.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    from headscope.studies.effects import direct_effects, write_effects

    opened = live(index, model=model, sae=sae, device=device)
    on_pairs = None if on_progress is None else lambda done, total: on_progress("effects", done, total)
    found = direct_effects(opened, max_work=max_work, on_progress=on_pairs)
    write_effects(opened, found)
    return found


def families(
    index: str | Path,
    *,
    model: str | None = None,
    sae: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> "InductionFamily":
    """Judge all live features of an index for induction, and keep it: columns `induction` and tables of heads.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    from headscope.studies.induction_store import induction_family, save_family

    opened = live(index, model=model, sae=sae, device=device)
    found = induction_family(opened, seed=seed, on_progress=on_progress)
    save_family(opened, found)
    return found


def heads(
    index: str | Path,
    *,
    model: str | None = None,
    sae: str | Path | None = None,
    n_shuffles: int = 99,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> "HeadTables":
    """Study every head of a model and all features of an index by head, and keep it beside the index.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    from headscope.index.head_records import HeadTables
    from headscope.studies.head_store import HeadPlan, study_heads

    opened = live(index, model=model, sae=sae, device=device)
    study_heads(opened, HeadPlan(n_shuffles=n_shuffles, seed=seed), on_progress)
    return HeadTables(index)
