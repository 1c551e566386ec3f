"""Shared by the readers of all formats: tensors and configurations, and defaults for what files do not state.

Nothing is executed: pickles are opened with `weights_only=True`, arrays without pickles.
"""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from headscope.artefact import read_json
from headscope.errors import HeadscopeError, SAEError
from headscope.names import UNKNOWN
from headscope.sae.model import SAE
from headscope.site import Site

Json = dict[str, Any]

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""Exceptions that opening a damaged file can raise."""


@dataclass(frozen=True)
class Stated:
    """Properties of an SAE stated by the user, for files that lack them; they must not contradict the files."""

    site: Site | None = None
    model_name: str | None = None


@dataclass(frozen=True)
class Files:
    """The files of one SAE, and a registry's additional settings."""

    format: "Format"
    weights: Path
    config: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the configuration."""
    scaling: float | None = None
    """Factor on activations in training, where it is not folded into the weights."""
    own: bool = False
    """Whether they are the user's: neither the package's nor in the hub's cache."""

    @property
    def where(self) -> str:
        """The location, for messages."""
        return str(self.weights.parent if self.config and self.config.parent == self.weights.parent else self.weights)

    @property
    def quality(self) -> Path:
        """The file of its measured quality."""
        if self.config is not None and self.config.name.endswith("_cfg.json"):  # one of several in a folder
            return self.config.with_name(f"{self.config.name.removesuffix('_cfg.json')}_quality.json")
        return self.weights.with_name("quality.json")

    def settings(self) -> Json:
        """The configuration with the overrides; empty without a file."""
        config = read_json(self.config) if self.config else {}
        if not isinstance(config, dict):
            raise TypeError(f"{self.config} holds {type(config).__name__}, not an object")
        return config | dict(self.overrides)


@dataclass(frozen=True)
class Format:
    """A file format for SAEs."""

    name: str
    layout: str
    """Names of its files."""
    find: Callable[[Path], tuple[Path, Path | None] | None]
    """Returns (weights, configuration) of the SAE of this format at a path, or None."""
    read: Callable[[Files, Stated], SAE]
    architectures: Mapping[str, str]
    """By the format's own name: the architecture it is read as."""
    refused: Mapping[str, str]
    """By the format's own name: why it is not supported."""
    convention: str
    """Convention of the activations that its SAEs were trained on."""


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, in float32; `.safetensors`, `.npz` or a state dict in a pickle.

    Raises:
        SAEError: a pickle with code, non-tensors, or tensors that are not numeric.
        UNREADABLE: a damaged file.
    """
    with path.open("rb"):  # for an unreadable file, safetensors reports that it does not exist
        pass
    found = _tensors_of(path)
    if empty := sorted(name for name, tensor in found.items() if tensor.is_meta):
        raise SAEError(
            f"{', '.join(empty)} in {path}: on the device `meta`, shapes without numbers",
            expected="tensors with their numbers",
            do="save the SAE again from where its weights are in memory",
        )
    return found


def _tensors_of(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    if path.suffix == ".npz":
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])).float() for name in arrays.files}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles it may not open: those that it does not are refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SAEError(
            f"{path} is a pickle with more in it than tensors, or damaged; nothing of it was executed",
            expected="a state dict: names and tensors",
            do="ask who made it for a .safetensors file, or copy it again",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise SAEError(
            f"{path} holds {type(content).__name__}, or other things than tensors",
            expected="a state dict: names and tensors",
            do="save the state dict of the SAE",
        )
    return {str(name): tensor.detach().float() for name, tensor in content.items()}


def check_names(
    tensors: Mapping[str, Tensor], expected: set[str], files: Files, *, optional: Collection[str] = ()
) -> None:
    """Reject tensors that the architecture does not have: their effect on the SAE is unknown.

    Raises:
        SAEError: there are some.
        KeyError: one that it needs is missing.
    """
    unknown = sorted(set(tensors) - expected - {*optional})
    if unknown:
        raise SAEError(
            f"{files.where} holds {', '.join(unknown)} beside {', '.join(sorted(expected))}",
            expected=f"only the latter in a file of {files.format.name}",
            do="say what they are, or leave them out if they play no part",
        )
    for name in sorted(expected - set(tensors)):
        raise KeyError(name)


def refusal(files: Files, got: object) -> SAEError:
    """Make the error for an unsupported architecture, with the reason where one is known."""
    why = files.format.refused.get(str(got))
    known = ", ".join(files.format.architectures)
    return SAEError(
        f"{files.where}: an SAE of architecture {got!r}" + (f": {why}" if why else ""),
        expected=f"one of those read from {files.format.name}: {known}",
        do="use another SAE" if why else "check the configuration; docs/saes.md has the table of what is read",
    )


def unsupported(files: Files, got: str, *, expected: str, do: str = "use another SAE") -> SAEError:
    """Make the error for a setting that is unknown, or known and not supported."""
    return SAEError(f"{files.where}: {got}", expected=expected, do=do)


def whole_number(files: Files, name: str, value: object) -> int:
    """Return a number from a configuration, which must be whole.

    Raises:
        SAEError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise unsupported(files, f"{name} = {value!r}", expected="a whole number")
    return int(value)


def site_of(hook_name: str, files: Files) -> Site:
    """Return the site that a file names.

    Raises:
        SAEError: the site is unsupported.
    """
    try:
        return Site.from_hook_name(hook_name)
    except HeadscopeError as error:
        raise SAEError(f"{files.where}: {error.got}", expected=error.expected, do=error.do) from error


def chosen_site(files: Files, found: Site | None, stated: Stated) -> Site:
    """Return the site stated by the files and the user.

    Raises:
        SAEError: neither names one, or they disagree.
    """
    if found is None and stated.site is None:
        raise SAEError(
            f"{files.where} names no site (hook_name), and none was given",
            expected="the activation that the SAE reads",
            do="say it: headscope convert SAE --site z --layer L --out FOLDER, or load_sae(..., site=Site('z', L))",
        )
    if found is not None and stated.site is not None and found != stated.site:
        raise SAEError(
            f"{files.where} names the site {found.hook_name}",
            expected=f"{stated.site.hook_name}, as was said",
            do="leave the site out, or name the right one",
        )
    return found or stated.site  # pyright: ignore[reportReturnType]


def chosen_model(found: str | None, stated: Stated) -> str:
    """Return the model stated by the user, or else by the files; UNKNOWN where neither names one."""
    return stated.model_name or found or UNKNOWN
