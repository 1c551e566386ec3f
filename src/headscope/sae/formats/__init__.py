"""SAE file formats: the public formats that are read, and the one that is written (SAELens').

`load_sae` takes a bundled SAE by name, a folder or file, a release of SAELens' registry with an id
(`gpt2-small-hook-z-kk/blocks.5.hook_z`), or a hub repository with a folder (`USER/REPOSITORY/FOLDER`). Unknown settings
are rejected by name. Only tensors are unpickled, and no code in a file is executed.
"""

from dataclasses import replace
from pathlib import Path

from headscope.artefact import file_hash
from headscope.errors import SAEError
from headscope.limits import NameOrPath, check
from headscope.names import absolute, bundled_sae, exists, lasting_model, local
from headscope.sae.formats import authors, dictionary_learning, gemma_scope, saelens, sparsify
from headscope.sae.formats.files import UNREADABLE, Files, Format, Stated
from headscope.sae.formats.hub import entry_of, fetch
from headscope.sae.formats.saelens import WEIGHTS, save_sae
from headscope.sae.model import SAE
from headscope.site import Site

__all__ = [
    "FORMATS",
    "WEIGHTS",
    "Files",
    "Format",
    "find_sae",
    "is_sae",
    "lasting_name",
    "load_sae",
    "locate",
    "sae_hash",
    "save_sae",
]

FORMATS: tuple[Format, ...] = (
    saelens.FORMAT,
    authors.FORMAT,
    gemma_scope.FIRST,
    gemma_scope.SECOND,
    dictionary_learning.FORMAT,
    sparsify.FORMAT,
)

_BUNDLED = Path(__file__).parent.parent


def load_sae(name: str | Path, *, site: Site | None = None, model_name: str | None = None) -> SAE:
    """Read an SAE; all numbers become float32.

    Args:
        name: a bundled SAE, a path, or a name on the hub (see the module).
        site: the site it reads, for files that do not state it.
        model_name: the model it was trained on, likewise.

    Raises:
        SAEError: no SAE, no network, damaged files, weights that are not finite or of inconsistent shapes, or an
            unknown setting.
    """
    files = locate(name)
    try:
        sae = files.format.read(files, Stated(site, model_name and lasting_model(model_name)))
    except SAEError:
        raise
    except UNREADABLE as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__} {error}"
        raise SAEError(
            f"cannot read the SAE in {files.where}: {what}",
            expected=f"{files.format.layout} as {files.format.name} writes them",
            do="copy or train it again",
        ) from error
    said = {} if files.format is saelens.FORMAT else {"source_format": files.format.name}
    return replace(sae, metadata=said | sae.metadata, folder=files.weights.parent.absolute())


def locate(name: str | Path) -> Files:
    """Locate the files of an SAE, downloading them from the hub where its name says so.

    Raises:
        SAEError: there are none.
    """
    found = find_sae(name)
    if found is not None:
        return found
    entry = None if exists(local(name)) else entry_of(str(name))
    if entry is not None:
        found = find_sae(fetch(entry))
        if found is not None:
            return replace(found, overrides=entry.overrides, scaling=entry.scaling, own=False)
    known = ", ".join(sorted(p.parent.name for p in _BUNDLED.glob("*/cfg.json"))) or "none"
    raise SAEError(
        f"no SAE at {str(name)!r}",
        expected=f"a bundled one ({known}), files of {', '.join(f.name for f in FORMATS)}, or a name on the hub",
        do="check the path, or train one with `headscope train`",
    )


def find_sae(name: str | Path) -> Files | None:
    """Locate the files of a bundled SAE, or of a local path, if there are any.

    Raises:
        SAEError: a folder with several, or an invalid name.
    """
    name = check("sae", name, NameOrPath, SAEError)
    bundled = bundled_sae(str(name))
    for format_ in FORMATS:
        found = format_.find(bundled or Path(name))
        if found is not None:
            return Files(format_, *found, own=bundled is None)
    return None


def lasting_name(name: str | Path) -> str:
    """Return a name that finds the same SAE from any working directory: a path becomes absolute.

    Raises:
        SAEError: a folder with several.
    """
    found = find_sae(name)
    return absolute(name) if found is not None and found.own else str(name)


def is_sae(name: str | Path) -> bool:
    """Whether a name refers to an SAE, local or on the hub, rather than to a model.

    Raises:
        SAEError: a folder with several, or a release without this id.
    """
    return find_sae(name) is not None or (not exists(local(name)) and entry_of(str(name)) is not None)


def sae_hash(name: str | Path) -> str:
    """SHA-256 of the weights file."""
    return file_hash(locate(name).weights)
