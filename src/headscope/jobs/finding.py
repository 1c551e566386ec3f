"""Locate the model and the SAE of an index, and the model of an SAE, at their original or new paths."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from headscope.errors import HeadscopeError, ModelError, SAEError
from headscope.jobs.inputs import Hardware
from headscope.names import UNKNOWN, bundled_model, bundled_sae, exists, places

if TYPE_CHECKING:
    from headscope.index.store import FeatureIndex
    from headscope.models.hf import Model
    from headscope.sae.model import SAE

T = TypeVar("T")


def find_of(
    index: "FeatureIndex", what: Literal["model", "sae"], named: str | Path | None, load: Callable[[str], T]
) -> T:
    """Load the model or the SAE that an index was built with.

    Candidates, in this order, until one matches: the user's name, and then nothing else; `model` or `sae` in the
    index folder; its path when the index was built; the same path relative to the index; the bundled one of its name;
    the hub, unless it was a path.

    Args:
        index: open.
        what: which of the two.
        named: by the user.
        load: called with a name; raises HeadscopeError where that is not what the index was built with.

    Raises:
        ModelError, SAEError: none was found; all places are listed.
        HeadscopeError: whatever `load` raises for the user's name.
    """
    if named is not None:
        return load(str(named))
    tried = []
    for place in _candidates(index, what):
        if isinstance(place, Path) and not exists(place):
            tried.append(f"{place} does not exist")
            continue
        try:
            return load(str(place))
        except HeadscopeError as error:
            tried.append(f"{place}: {error.got}")
        except OSError as error:
            tried.append(f"{place}: {error.strerror or error}")
    kind, word = (ModelError, "model") if what == "model" else (SAEError, "SAE")
    raise kind(
        f"the {word} of {index.folder} was not found; looked at:\n    " + "\n    ".join(tried),
        expected=f"the {word} that the index was built with, {index.manifest[what]['hash']}",
        do=f"name it with --{what}, or copy its folder to {index.folder / what}",
    )


def _candidates(index: "FeatureIndex", what: str) -> list[str | Path]:
    record = index.manifest[what]
    name: str = record["name"]
    bundled = (bundled_model if what == "model" else bundled_sae)(name) is not None
    there = [] if bundled else places(name, record.get("relative"), index.folder)
    return [index.folder / what, *there, *([] if Path(name).is_absolute() else [name])]


def model_of(sae: "SAE", named: str | None, hardware: Hardware) -> "Model":
    """Load the model named by the user, or else by an SAE, whose model may have been moved with it.

    Raises:
        ModelError: the SAE names none, or it cannot be loaded.
    """
    if named is not None:
        return hardware.load(named)
    name, ask = sae.model_name, "name the model with --model"
    if name == UNKNOWN:
        raise ModelError("an SAE whose files name no model", expected="the model it was trained on", do=ask)
    known, dtype = (sae.metadata.get(key) for key in ("model_hash", "dtype"))
    found = [place for place in sae.model_places if exists(place)]
    if found != [Path(name)] and (known is not None or Path(name).is_absolute()):
        for place in found:
            loaded = _loaded(str(place), hardware)
            if loaded is not None and (known is None or loaded.matches(known, dtype)):
                return loaded
    try:
        return hardware.load(name)
    except ModelError as error:
        raise ModelError(
            f"{error.got}; it is the model that the SAE names", expected=error.expected, do=f"{error.do}; or {ask}"
        ) from error


def _loaded(name: str, hardware: Hardware) -> "Model | None":
    try:
        return hardware.load(name)
    except ModelError:
        return None
