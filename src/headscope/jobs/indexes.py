"""Build an index, open it with its model, and tally its labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.artefact import check_run_folder
from headscope.errors import OutputError, SAEError
from headscope.index.config import IndexPlan
from headscope.jobs.early import check_device, check_model, check_sae, check_text
from headscope.jobs.finding import find_of, model_of
from headscope.jobs.inputs import CorpusChoice, Hardware, Progress, load_on, loading, usable
from headscope.jobs.saes import measured_quality
from headscope.limits import Device, Name, NameOrPath, Output, checked

if TYPE_CHECKING:
    from headscope.index.live import LiveIndex
    from headscope.index.store import FeatureIndex
    from headscope.sae.model import SAE
    from headscope.studies.survey import Survey


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

    With `force`, also SAEs that were trained on weights other than the model's; the manifest records this.

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

    with loading(model or saes[0], on_progress):
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
    """Report leftovers next to a finished index: of a build that replaces it, or its own, killed at the very end."""
    partial = out.with_name(f"{out.name}.partial")
    if not overwrite and (out / "manifest.json").is_file() and partial.is_dir():
        raise OutputError(
            f"{out} already exists, and {partial} holds what a build beside it left",
            expected="a new or empty folder",
            do="choose another folder, or pass --overwrite: it goes on with what is there, and clears it",
        )


@checked
def live(
    index: NameOrPath,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    device: Device = "cpu",
    on_progress: Progress | None = None,
) -> "LiveIndex":
    """Open an index with the model and the SAE that it was built with.

    Unless named, they are searched for in the index, at their original paths, and by name (`finding.find_of`).
    The model computes in the precision the index was built with.

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
    with loading(model or opened.manifest["model"]["name"], on_progress):
        return _live(opened, model, sae, device)


def _live(opened: "FeatureIndex", model: str | None, sae: str | Path | None, device: str) -> "LiveIndex":
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
    """Load an SAE of an earlier component of an index's model, adapted to its activations, on its device.

    Raises:
        ModelError, SAEError: no such SAE, or one that does not fit the model.
    """
    from headscope.sae.convert import fitted
    from headscope.sae.formats import load_sae

    return fitted(load_sae(name), opened.model).to(opened.model.device).to(opened.model.module.dtype)


@checked
def survey(index: NameOrPath, *, sample: str = "first:50") -> "Survey":
    """Tally the labels of a sample of an index's features: how many are alive, and how many interpretable.

    Raises:
        IndexFormatError, LabelError: no index, no such sample, or a damaged label file.
    """
    from headscope.index.labels import LabelStore
    from headscope.index.store import FeatureIndex
    from headscope.studies import survey as study

    chosen, opened = study.Sample.parse(sample), FeatureIndex.open(index)
    return study.survey(opened, LabelStore(opened).read(), chosen)
