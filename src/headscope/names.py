"""Resolve names of models, SAEs and texts, and store them in artefacts.

A name refers to something bundled, a path, or a name on the Hugging Face hub, in this order. An artefact stores a path
twice, so that it is found from any working directory and after a move: absolute, and relative to its own folder.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

NameT = TypeVar("NameT", bound=str | Path)

UNKNOWN = "unknown"
"""Model name of an SAE whose files name none."""

_PACKAGE = Path(__file__).parent


def bundled_model(name: str) -> Path | None:
    """Return the folder of a bundled model; None for any other name."""
    folder = _PACKAGE / "models" / name
    return folder if name.isidentifier() and (folder / "config.json").is_file() else None


def bundled_sae(name: str) -> Path | None:
    """Return the folder of a bundled SAE; None for any other name."""
    folder = _PACKAGE / "sae" / name
    return folder if "/" not in name and (folder / "cfg.json").is_file() else None


def at_home(name: NameT) -> NameT:
    """Expand a leading `~` or `~user` to that home folder; unchanged where there is none."""
    try:
        return type(name)(Path(name).expanduser()) if str(name).startswith("~") else name
    except RuntimeError:
        return name


def local(name: str | Path) -> Path:
    """Return a name as a path."""
    return Path(at_home(name))


def is_path(name: str | Path) -> bool:
    """Whether a name is a path, existing or not: such a name is never searched on the hub."""
    path = local(name)
    certain = path.is_absolute() or str(name).startswith((".", "~"))
    return certain or exists(path) or (len(path.parts) > 1 and exists(Path(path.parts[0])))


def exists(path: Path) -> bool:
    """Whether a path exists; False where that is unknown."""
    try:
        return path.exists()
    except OSError:  # the name is too long, or a folder is not accessible
        return False


def absolute(name: str | Path) -> str:
    """Return the absolute path of a name; its last component is not resolved if it is a link."""
    path = local(name).absolute()
    return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)


def lasting_model(name: str) -> str:
    """Return a model name that is valid in every working directory: a path becomes absolute."""
    return absolute(name) if bundled_model(name) is None and is_path(name) else name


def lasting_corpus(name: str) -> str:
    """Return a corpus name that is valid in every working directory, likewise; `python` is the standard library."""
    return absolute(name) if name != "python" and is_path(name) else name


def relative(name: str, folder: Path) -> str | None:
    """Return the path of a name relative to a folder; None for a name that is not an absolute path."""
    return os.path.relpath(name, folder.resolve()) if Path(name).is_absolute() else None


def short(name: str) -> str:
    """Return the name for display: the last component of a path, so that no page reveals the user's folders."""
    return Path(name).name if Path(name).is_absolute() else name


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's record of a model, an SAE or a text for display: its name without the folders."""
    return {key: value for key, value in record.items() if key != "relative"} | {"name": short(record["name"])}


def places(name: str, seen: object, folder: Path) -> list[Path]:
    """Return candidate paths of something that an artefact names, the likeliest first.

    Args:
        name: as stored in the artefact, not bundled.
        seen: the `relative` path stored with it; anything but a string is none.
        folder: the artefact's folder.

    Returns:
        For an absolute path, itself and the relative one. For any other name (on the hub or, in older artefacts,
            relative to an unknown working directory), that name in a parent of `folder`.
    """
    folder = folder.resolve()
    if not Path(name).is_absolute():
        return [path for parent in folder.parents if name and exists(path := _joined(parent, name))]
    moved = [_joined(folder, seen)] if isinstance(seen, str) else []
    return list(dict.fromkeys([Path(name), *moved]))


def _joined(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / path))  # as a string: what an artefact states need not be a path at all
