"""SAEs by name: a release of SAELens' registry, or a repository of the Hugging Face hub and a folder in it."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, snapshot_download

from headscope.errors import SAEError
from headscope.hub import advice, trouble
from headscope.names import is_path

_FOLDER_FILES = (
    "cfg.json",
    "sae_weights.safetensors",
    "sae.safetensors",
    "ae.pt",
    "config.json",
    "params.npz",
    "params.safetensors",
    "activation_scaler.json",
)
_READ_HERE = (None, "connor_rob_hook_z", "gemma_2", "gemma_3", "dictionary_learning_1", "sparsify")
"""Loaders in the registry whose files have a format here."""


@dataclass(frozen=True)
class Entry:
    """Location of an SAE on the hub."""

    repository: str
    path: str
    """Path of its folder, or of its `.pt` file."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    scaling: float | None = None
    model: str | None = None
    """The model according to the registry."""


def entry_of(name: str) -> Entry | None:
    """Resolve `release/id` (by the registry) or `user/repository/folder`; None for any other name.

    Raises:
        SAEError: a release without this id, or with a loader that has no format here.
    """
    release, _, identifier = name.partition("/")
    listed = _registry().get(release) if identifier else None
    if listed is not None:
        return _listed(release, identifier, listed)
    parts = name.split("/")
    if len(parts) < 3 or not all(parts) or is_path(name):
        return None
    return Entry("/".join(parts[:2]), "/".join(parts[2:]))


def _listed(release: str, identifier: str, listed: Mapping[str, Any]) -> Entry:
    saes = {sae["id"]: sae for sae in listed["saes"]}
    if identifier not in saes:
        raise SAEError(
            f"no SAE {identifier!r} in the release {release}",
            expected=f"one of its {len(saes)}: {', '.join(list(saes)[:4])}, ...",
            do="name one of them",
        )
    loader = listed.get("conversion_func")
    if loader not in _READ_HERE:
        raise SAEError(
            f"the release {release}, whose files SAELens reads by {loader!r}",
            expected="a release in one of the formats of docs/saes.md",
            do="load it with SAELens, save it (save_model), and name that folder",
        )
    sae = saes[identifier]
    overrides = {key: value for key, value in (listed.get("config_overrides") or {}).items() if key != "device"}
    return Entry(
        listed["repo_id"], str(sae["path"]), overrides, sae.get("norm_scaling_factor"), model=listed.get("model")
    )


@cache
def _registry() -> Mapping[str, Any]:
    """Load SAELens' registry by release, from its file where that package is installed; it is not imported."""
    package = importlib.util.find_spec("sae_lens")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder, "pretrained_saes.yaml")
        if path.is_file():
            return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {}


def fetch(entry: Entry) -> Path:
    """Download an SAE's files, or find them in the cache; returns the local folder or `.pt` file.

    Raises:
        SAEError: no network, no such repository or files, or one that requires a login.
    """
    try:
        if entry.path.endswith(".pt"):
            hf_hub_download(entry.repository, f"{entry.path.removesuffix('.pt')}_cfg.json")
            return Path(hf_hub_download(entry.repository, entry.path))
        wanted = [f"{entry.path}/{name}" for name in _FOLDER_FILES] + [f"{Path(entry.path).parent}/config.json"]
        folder = Path(snapshot_download(entry.repository, allow_patterns=wanted)) / entry.path
    except Exception as error:  # raised by several libraries, for an invalid name, login or network
        found = _trouble(entry, error)
        if found is None:
            raise
        raise found from error
    if not folder.is_dir():  # a repository of which other files are cached
        raise _offline(entry, "is not in the cache, and is not in the repository or the hub cannot be reached")
    return folder


def _trouble(entry: Entry, error: Exception) -> SAEError | None:
    """Describe the problem with an entry of the hub; None for other errors."""
    match trouble(error):
        case "gated":
            return SAEError(
                f"{entry.repository} asks for a login, or for its terms to be accepted",
                expected="an account that may read it",
                do=advice(error, entry.repository, otherwise=""),
            )
        case "missing":
            return SAEError(
                f"no {entry.path} in the repository {entry.repository}, or no such repository",
                expected="RELEASE/ID of SAELens' registry (with sae-lens installed), or USER/REPOSITORY/FOLDER on the "
                "hub",
                do=advice(error, entry.repository, otherwise=""),
            )
        case "unreachable":
            return _offline(entry)
        case None if isinstance(error, OSError):
            return SAEError(
                f"{entry.path} of {entry.repository} cannot be stored: {error}",
                expected="room in the hub's cache",
                do="free some space, or set HF_HOME to a folder on a larger disk",
            )
        case None:
            return None


def _offline(entry: Entry, how: str = "is not in the cache, and the hub cannot be reached") -> SAEError:
    folder = entry.path.removesuffix(".pt")
    return SAEError(
        f"{entry.path} of {entry.repository} {how}",
        expected="a folder of that repository and a network, or the files on this machine",
        do=f"where there is a network, run: hf download {entry.repository} --include '{folder}*' --local-dir FOLDER; "
        f"copy FOLDER here, and name FOLDER/{entry.path}",
    )
