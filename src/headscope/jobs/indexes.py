"""An index: built, opened with its model, and studied, of which the results are kept beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.artefact import check_run_folder
from headscope.errors import OutputError, SAEError
from headscope.index.config import IndexPlan
from headscope.jobs.early import check_device, check_model, check_sae, check_text
from headscope.jobs.finding import find_of, model_of
from headscope.jobs.inputs import CorpusChoice, Hardware, Progress, load_on, usable
from headscope.jobs.saes import measured_quality
from headscope.limits import Above0, Count, Device, Latent, Name, NameOrPath, Output, Seed, Shuffles, checked

if TYPE_CHECKING:
    from headscope.index.head_records import HeadTables
    from headscope.index.live import LiveIndex
    from headscope.index.store import FeatureIndex
    from headscope.proxies.search_records import FeatureProxies
    from headscope.proxies.search_table import Summary
    from headscope.sae.model import SAE
    from headscope.studies.induction.store import InductionFamily
    from headscope.studies.survey import Survey
    from headscope.studies.what.effects import DirectEffects


@checked
def index(  # noqa: PLR0913 - one argument an option of the command
    saes: Sequence[NameOrPath],
    out: Output,
    *,
    model: Name | None = None,
    text: CorpusChoice | None = None,
    plan: IndexPlan | None = None,
    hardware: Hardware | None = None,
    overwrite: bool = False,
    force: bool = False,
    on_progress: Progress | None = None,
) -> "tuple[FeatureIndex, ...]":
    """Index every feature of some z SAEs of one model on held-out text, in one pass, and open the indexes.

    With `force`, also SAEs that were trained on other weights than the model's; the manifest says so.

    Under `torchrun` the ranks share the work; all but the first return nothing.

    Raises:
        HeadscopeError: any of its kinds; nothing is computed before `out` is known to be free.
    """
    text = text or CorpusChoice()
    if not saes:
        raise SAEError("no SAE to index", expected="one or more", do="name them after --sae")
    _check_remnant(out, overwrite=overwrite)
    check_run_folder(out, overwrite=overwrite, inputs=[*saes, text.corpus, *([model] if model else [])])
    for sae in saes:
        check_sae(sae, of_z=True)
    if model:
        check_model(model)
    check_text(text, model, sae=saes[0])
    hardware = hardware or Hardware()
    check_device(hardware.device)

    from headscope.index.build import SAERecord, build_index, check_indexable
    from headscope.index.parts import Workers
    from headscope.index.store import FeatureIndex
    from headscope.sae.convert import fitted
    from headscope.sae.formats import lasting_name, load_sae, sae_hash

    loaded_saes = [load_sae(sae) for sae in saes]
    loaded = model_of(loaded_saes[0], model, hardware)
    check_indexable(loaded)
    loaded_saes = [fitted(sae, loaded, force=force) for sae in loaded_saes]
    corpus = text.load(loaded, on_progress)
    workers = Workers.of_environment()
    folders = build_index(
        loaded,
        [
            (loaded_sae, SAERecord(lasting_name(sae), sae_hash(sae), measured_quality(sae, loaded, corpus)))
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


@checked
def live(
    index: NameOrPath, *, model: Name | None = None, sae: NameOrPath | None = None, device: Device = "cpu"
) -> "LiveIndex":
    """Open an index with the model and the SAE that it was built with.

    Where they are not named, they are looked for beside the index, where they were, and by name (`finding.find_of`).
    The model computes in the precision that the index was made in.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    from headscope.index.store import FeatureIndex

    opened = FeatureIndex.open(index)
    if model:
        check_model(model)
    if sae:
        check_sae(sae)
    check_device(device)

    from headscope.index.live import LiveIndex
    from headscope.sae.convert import FORCED, fitted
    from headscope.sae.formats import load_sae, sae_hash

    def own_sae(name: str) -> "SAE":
        opened.check_same(sae_hash=sae_hash(name), sae_name=name)
        return load_sae(name)

    def put_together(name: str) -> LiveIndex:
        loaded = load_on(name, place, opened.manifest["dtype"])
        return LiveIndex(opened, loaded, fitted(own, loaded, force=FORCED in opened.manifest["sae"]))

    place = usable(device)
    own = find_of(opened, "sae", sae, own_sae)
    return find_of(opened, "model", model, put_together)


def upstream_sae(opened: "LiveIndex", name: str) -> "SAE":
    """An SAE of an earlier component of an index's model, as it reads this model's activations, and where it is.

    Raises:
        ModelError, SAEError: no such SAE, or one that does not fit the model.
    """
    from headscope.sae.convert import fitted
    from headscope.sae.formats import load_sae

    return fitted(load_sae(name), opened.model).to(opened.model.device).to(opened.model.module.dtype)


@checked
def proxies(
    index: NameOrPath, *, features: Sequence[Latent] = (), on_progress: Progress | None = None
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


@checked
def effects(
    index: NameOrPath,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    max_tokens: Count = 2_000,
    max_work: Above0 = 1e11,
    device: Device = "cpu",
    on_progress: Progress | None = None,
) -> "DirectEffects":
    """The exact direct-path loss effect of every live feature of an index, added to it as the columns `effects`.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    opened = live(index, model=model, sae=sae, device=device)

    from headscope.studies.what.effects import direct_effects, write_effects

    on_pairs = None if on_progress is None else lambda done, total: on_progress("effects", done, total)
    found = direct_effects(opened, max_tokens=max_tokens, max_work=max_work, on_progress=on_pairs)
    write_effects(opened, found)
    return found


@checked
def families(
    index: NameOrPath,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    seed: Seed = 0,
    device: Device = "cpu",
    on_progress: Progress | None = None,
) -> "InductionFamily":
    """Judge all live features of an index for induction, and keep it: columns `induction` and tables of heads.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    opened = live(index, model=model, sae=sae, device=device)

    from headscope.studies.induction.store import induction_family, save_family

    found = induction_family(opened, seed=seed, on_progress=on_progress)
    save_family(opened, found)
    return found


@checked
def heads(
    index: NameOrPath,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    n_shuffles: Shuffles = 99,
    seed: Seed = 0,
    device: Device = "cpu",
    on_progress: Progress | None = None,
) -> "HeadTables":
    """Study every head of a model and all features of an index by head, and keep it beside the index.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    opened = live(index, model=model, sae=sae, device=device)

    from headscope.index.head_records import HeadTables
    from headscope.studies.heads.store import HeadPlan, study_heads

    study_heads(opened, HeadPlan(n_shuffles=n_shuffles, seed=seed), on_progress)
    return HeadTables(index)


@checked
def survey(index: NameOrPath, *, sample: str = "first:50") -> "Survey":
    """Tally what was said of a sample of an index's features: how many are alive, and how many interpretable.

    Raises:
        IndexFormatError, LabelError: no index, no such sample, or a damaged file of labels.
    """
    from headscope.index.labels import LabelStore
    from headscope.index.store import FeatureIndex
    from headscope.studies import survey as study

    chosen, opened = study.Sample.parse(sample), FeatureIndex.open(index)
    return study.survey(opened, LabelStore(opened).read(), chosen)
