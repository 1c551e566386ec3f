"""What a name of a model, an SAE or a text stands for on this machine, and how an artefact keeps it.

A name is that of something bundled, a path, or a name on the Hugging Face hub, in this order. An artefact keeps a path
twice, so that it is found from any working directory and after a move: absolute, and relative to its own folder.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

NameT = TypeVar("NameT", bound=str | Path)

UNKNOWN = "unknown"
"""The name of the model of an SAE whose files name none."""

_PACKAGE = Path(__file__).parent


def bundled_model(name: str) -> Path | None:
    """The folder of a model that comes with the package; None for any other name."""
    folder = _PACKAGE / "models" / name
    return folder if name.isidentifier() and (folder / "config.json").is_file() else None


def bundled_sae(name: str) -> Path | None:
    """The folder of an SAE that comes with the package; None for any other name."""
    folder = _PACKAGE / "sae" / name
    return folder if "/" not in name and (folder / "cfg.json").is_file() else None


def at_home(name: NameT) -> NameT:
    """A name with a leading `~` or `~user` as that home folder; where there is none it stays as it is."""
    try:
        return type(name)(Path(name).expanduser()) if str(name).startswith("~") else name
    except RuntimeError:
        return name


def local(name: str | Path) -> Path:
    """The path that a name is."""
    return Path(at_home(name))


def is_path(name: str | Path) -> bool:
    """Whether a name is a path, to something that exists or not: such a name is never looked for on the hub."""
    path = local(name)
    certain = path.is_absolute() or str(name).startswith((".", "~"))
    return certain or exists(path) or (len(path.parts) > 1 and exists(Path(path.parts[0])))


def exists(path: Path) -> bool:
    """Whether there is anything at a path; False where that cannot be known."""
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be entered
        return False


def absolute(name: str | Path) -> str:
    """The name of a path that holds in every working directory; what it ends with stays a link if it is one."""
    path = local(name).absolute()
    return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)


def lasting_model(name: str) -> str:
    """The name of a model that holds in every working directory: a path becomes absolute, other names stay."""
    return absolute(name) if bundled_model(name) is None and is_path(name) else name


def lasting_corpus(name: str) -> str:
    """The name of a text that holds in every working directory, likewise; `python` is the standard library."""
    return absolute(name) if name != "python" and is_path(name) else name


def relative(name: str, folder: Path) -> str | None:
    """The path of a name as seen from a folder; None for a name that is no absolute path."""
    return os.path.relpath(name, folder.resolve()) if Path(name).is_absolute() else None


def short(name: str) -> str:
    """The name as a page shows it: of an absolute path the last part, so that no page tells of the user's folders."""
    return Path(name).name if Path(name).is_absolute() else name


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """What pages and reports show of a manifest's record of a model, an SAE or a text: its name without the folders."""
    return {key: value for key, value in record.items() if key != "relative"} | {"name": short(record["name"])}


def places(name: str, seen: object, folder: Path) -> list[Path]:
    """Paths at which something that an artefact names may be, the likeliest first.

    Args:
        name: as the artefact keeps it, not bundled.
        seen: the `relative` path that the artefact keeps beside it; anything but a string is none.
        folder: the artefact's.

    Returns:
        Of an absolute path, itself and the relative one. Of any other name (on the hub or, in older artefacts, relative
        to a working directory that is unknown), what lies under that name in a parent of `folder`.
    """
    folder = folder.resolve()
    if not Path(name).is_absolute():
        return [path for parent in folder.parents if name and exists(path := _joined(parent, name))]
    moved = [_joined(folder, seen)] if isinstance(seen, str) else []
    return list(dict.fromkeys([Path(name), *moved]))


def _joined(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / path))  # by its letters: what an artefact says need not be a path at all
