"""Evaluate, convert and describe an existing SAE."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.artefact import check_run_folder, file_hash, read_json, write_json
from headscope.corpus import Corpus
from headscope.errors import ModelError, OptionError, OutputError, SAEError
from headscope.jobs.early import check_device, check_model, check_sae, check_text
from headscope.jobs.finding import model_of
from headscope.jobs.inputs import CorpusChoice, Hardware, Progress, loading
from headscope.limits import Layer, Name, NameOrPath, Output, Tokens, checked
from headscope.names import is_path, local
from headscope.site import Kind, Site

if TYPE_CHECKING:
    from headscope.models.hf import Model
    from headscope.sae.describe import Fit, Lines
    from headscope.sae.model import SAE
    from headscope.sae.quality import Quality


@checked
def eval(
    sae: NameOrPath,
    *,
    model: Name | None = None,
    text: CorpusChoice | None = None,
    hardware: Hardware | None = None,
    loss_tokens: Tokens | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
) -> "Quality":
    """Measure an SAE on held-out text, and write `quality.json` into its folder unless it is bundled or on the hub.

    `loss_tokens` limits the tokens on which the model's losses are measured; see `headscope.sae.quality.evaluate`.

    With `force`, also an SAE that was trained on weights other than the model's.

    Raises:
        HeadscopeError: any of its kinds.
        OutputError: also where only `quality.json` could not be written; the measurements are in its `found`.
    """
    text = text or CorpusChoice()
    check_sae(sae)
    if model:
        check_model(model)
    check_text(text, model, sae=sae)
    hardware = hardware or Hardware()
    check_device(hardware.device)

    with loading(model or sae, on_progress):
        from headscope.sae.convert import fitted
        from headscope.sae.formats import load_sae

        loaded_sae = load_sae(sae)
        loaded = model_of(loaded_sae, model, hardware)
        loaded_sae = fitted(loaded_sae, loaded, force=force)
    corpus = text.load(loaded, on_progress)
    on_tokens = None if on_progress is None else lambda done, total: on_progress("evaluate", done, total)
    return measure(sae, loaded_sae, loaded, corpus, on_tokens, loss_tokens=loss_tokens)


@checked
def measure(
    name: str | Path,
    sae: "SAE",
    model: "Model",
    corpus: Corpus,
    on_tokens: Callable[[int, int], None] | None = None,
    *,
    loss_tokens: Tokens | None = None,
) -> "Quality":
    """Measure as `eval` does, with the SAE, model and text already loaded; `name` is what the SAE was loaded from."""
    from headscope.sae.formats import locate
    from headscope.sae.quality import evaluate

    files = locate(name)
    kept = files.own and os.access(files.quality.parent, os.W_OK)
    if files.own and not kept:
        warnings.warn(f"{files.quality.parent} cannot be written: figures are shown and not kept there", stacklevel=2)
    quality = evaluate(model, sae, corpus, on_tokens, loss_tokens=loss_tokens)
    record = {
        "sae_hash": file_hash(files.weights),
        "model": {"hash": model.fingerprint(), "dtype": str(model.module.dtype).removeprefix("torch.")},
        "corpus": corpus.fingerprint(),
        "quality": quality.as_dict(),
    }
    if kept:
        try:
            write_json(files.quality, record)
        except OutputError as error:
            error.found = quality
            raise
    return quality


def measured_quality(sae: str | Path, model: "Model", corpus: Corpus) -> dict[str, Any] | None:
    """Return the stored `eval` result for exactly this SAE, model and text, if there is one."""
    from headscope.sae.formats import locate, sae_hash

    path = locate(sae).quality
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        same = record["sae_hash"] == sae_hash(sae) and record["corpus"] == corpus.fingerprint()
        of = record.get("model")  # not in the records of earlier versions
        return record["quality"] if same and (of is None or model.matches(of["hash"], of["dtype"])) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} cannot be read and is left out: {error!r}", stacklevel=2)
        return None


@checked
def convert(  # noqa: PLR0913 - one argument an option of the command
    sae: NameOrPath,
    out: Output,
    *,
    model: Name | None = None,
    site: Kind | None = None,
    layer: Layer | None = None,
    trained_on: Name | None = None,
    overwrite: bool = False,
    force: bool = False,
    on_progress: Progress | None = None,
) -> "SAE":
    """Convert an SAE of any format to a self-contained SAELens folder that reads the model's own activations.

    Args:
        sae: see `load_sae`.
        out: the folder.
        model: for converting an SAE of processed weights; default: the one named by the SAE.
        site: the site it reads, with `layer`, for files that do not state it.
        layer: see `site`.
        trained_on: the model's name, for files that omit it or use another program's name.
        overwrite: replace the contents of `out`.
        force: with a model, accept an SAE whose files name other weights, and record it as trained on these.
        on_progress: called during loading.

    Raises:
        HeadscopeError: any of its kinds.
    """
    if (site is None) != (layer is None):
        raise SAEError(
            "a site without a layer, or a layer without a site", expected="both", do="give --site and --layer"
        )
    check_run_folder(out, overwrite=overwrite, inputs=[sae, *([model] if model else [])])
    check_sae(sae)
    if model:
        check_model(model)

    stated = None if site is None or layer is None else Site(site, layer)
    with loading(sae, on_progress):
        from headscope.sae.convert import fitted
        from headscope.sae.formats import load_sae, save_sae

        loaded = load_sae(sae, site=stated, model_name=trained_on)
        if loaded.processed or model is not None:
            loaded = fitted(loaded, model_of(loaded, model, Hardware()), force=force)
    save_sae(loaded, out, overwrite=overwrite)
    return loaded


@checked
def info(
    name: NameOrPath, *, model: Name | None = None, on_progress: Progress | None = None
) -> "tuple[Lines, Fit | None]":
    """Describe an SAE or a model; for an SAE, with a model, whether the two are compatible.

    Raises:
        OptionError: neither exists, or it is an index.
        SAEError, ModelError: it cannot be read.
    """
    _check_named(name)
    if model:
        check_model(model)
    with loading(name, on_progress):
        return _info(name, model)


def _info(name: str | Path, model: str | None) -> "tuple[Lines, Fit | None]":
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


def _check_named(name: str | Path) -> None:
    """Reject an index, and a name of neither an SAE nor a model.

    Raises:
        OptionError: it is one of these.
    """
    if (local(name) / "manifest.json").is_file():
        raise OptionError(
            f"{name} is an index", expected="an SAE or a model", do=f"see its SAE: headscope info {local(name) / 'sae'}"
        )
    try:
        check_sae(name)
    except SAEError:
        try:
            check_model(str(name))
        except ModelError as error:
            raise OptionError(
                f"no SAE and no model {str(name)!r}",
                expected="a bundled one, a path, or a name on the hub",
                do="check the path" if is_path(name) else "check the name, and the network for one on the hub",
            ) from error
