"""Exact checkpoints: a killed run resumes bit for bit.

    RUN/run.json             the recipe and its inputs: another one cannot resume here
    RUN/NAME.jsonl           metrics of each SAE, a line every few steps
    RUN/step-00012000/       the complete state
        NAME.safetensors         weights, optimizer, counters, random state
        stream-0.safetensors     of each rank: the buffer and the position in the corpus
        manifest.json            the plain numbers and a hash of each file, written last

A folder is renamed to `step-...` when all of it is on disk; the last two are kept.
"""

import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from headscope.artefact import atomic_write, file_hash, read_json, write_json
from headscope.errors import OutputError, TrainingError
from headscope.sae.runs import LOCK, METRICS, RUN, read_recipe
from headscope.sae.training.ranks import Ranks

_KEPT = 2
_STEP = re.compile(r"step-(\d+)")
_STREAM = "stream-{rank}"
_OURS = re.compile(rf"{re.escape(RUN)}|\.?step-\d+|\..*|.*\.(jsonl|safetensors)")
"""Names of files that a training leaves in its folder."""


class Checkpoints:
    """The folder of one training run."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Open a folder, which need not exist."""
        self.folder, self.ranks = Path(folder), ranks

    @property
    def begun(self) -> bool:
        """Whether a run was started here."""
        return (self.folder / RUN).is_file()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in descending order."""
        names = [_STEP.fullmatch(path.name) for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def claim(self, recipe: Mapping[str, Any]) -> None:
        """Start a run here, or check that the existing one is the same.

        Raises:
            TrainingError: the existing run has another recipe.
            OutputError: the folder cannot be written.
        """
        file = self.folder / RUN
        if self.begun:
            held = read_recipe(self.folder)
            differing = sorted(name for name in {*held, *recipe} if held.get(name) != recipe.get(name))
            if differing:
                name = differing[0]
                option = name.removeprefix(f"{METRICS} ")
                raise TrainingError(
                    f"{self.folder} holds a training with {option} = {held.get(name)}",
                    expected=f"one with {option} = {recipe.get(name)}, to go on with it",
                    do="give the options that it was started with, or --overwrite to start again",
                )
        elif self.ranks.rank == 0:
            write_json(file, dict(recipe))
        if self.ranks.rank == 0:
            for unfinished in self.folder.glob(".step-*"):  # of a run that was killed while writing one
                shutil.rmtree(unfinished)
        self.ranks.wait()

    def save(self, step: int, trainers: Mapping[str, Mapping[str, Any]], stream: Mapping[str, Any]) -> None:
        """Write a checkpoint, and remove all but the last two.

        Args:
            step: number of steps taken.
            trainers: state of each trainer, by name; the same on all ranks.
            stream: state of this rank's stream.

        Raises:
            OutputError: it cannot be written; existing ones are kept.
        """
        rank, scratch = self.ranks.rank, self.folder / f".step-{step:08}"
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            _write(scratch, _STREAM.format(rank=rank), stream)
            self.ranks.wait()
            if rank == 0:
                for name, state in trainers.items():
                    _write(scratch, name, state)
                hashes = {path.name: file_hash(path) for path in sorted(scratch.iterdir())}
                write_json(scratch / "manifest.json", {"ranks": self.ranks.size, "hashes": hashes})
                shutil.rmtree(self._path(step), ignore_errors=True)
                scratch.rename(self._path(step))
                for old in self.steps()[_KEPT:]:
                    shutil.rmtree(self._path(old))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            last = self.steps()
            raise OutputError(
                f"the checkpoint of step {step:,} in {self.folder} could not be written: {error}",
                expected="a folder that can be written, on a disk with room",
                do=f"free some space; the same command goes on from step {last[0]:,}" if last else "free some space",
            ) from error
        self.ranks.wait()

    def load(self, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
        """Load the state of each trainer and of the stream from the last valid checkpoint; None where there is none.

        Raises:
            TrainingError: there are some, and all are damaged; or the run had another number of ranks.
        """
        damaged = []
        for step in self.steps():
            try:
                return self._read(self._path(step), names)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                damaged.append(f"{self._path(step).name}: {error}")
                warnings.warn(f"a damaged checkpoint is passed over: {damaged[-1]}", stacklevel=2)
        if damaged:
            raise TrainingError(
                f"damaged checkpoints in {self.folder} ({'; '.join(damaged)})",
                expected="at least one that is whole",
                do="pass --overwrite to start again",
            )
        return None

    def _read(self, path: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        manifest = read_json(path / "manifest.json")
        if manifest["ranks"] != self.ranks.size:
            raise TrainingError(
                f"a training by {manifest['ranks']} processes in {self.folder}",
                expected=f"as many as now, {self.ranks.size}",
                do=f"resume with --nproc-per-node {manifest['ranks']}, or pass --overwrite to start again",
            )
        parts = [*names, *(_STREAM.format(rank=rank) for rank in range(self.ranks.size))]
        for name in (f"{part}.{ending}" for part in parts for ending in ("json", "safetensors")):
            if file_hash(path / name) != manifest["hashes"][name]:
                raise ValueError(f"{name} is not the file that was written")
        return {name: _read(path, name) for name in names}, _read(path, _STREAM.format(rank=self.ranks.rank))

    def keep(self, name: str, tensors: dict[str, Tensor]) -> Path:
        """Write tensors of this rank for inspection, to `NAME-RANK.safetensors`.

        Raises:
            OutputError: they cannot be written.
        """
        path = self.folder / f"{name}-{self.ranks.rank}.safetensors"
        with atomic_write(path) as file:
            file.write(save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}))
        return path

    def clear(self) -> None:
        """Remove the training's files and the folder; a lock held by a process is kept.

        Raises:
            OutputError: the folder is not empty, and no training was started in it.
        """
        if self.ranks.rank == 0 and self.folder.exists():
            self._check_ours()
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        self.ranks.wait()

    def _check_ours(self) -> None:
        names = {path.name for path in self.folder.iterdir()} - {LOCK} if self.folder.is_dir() else {""}
        if not names or (self.begun and all(_OURS.fullmatch(name) for name in names)):
            return
        raise OutputError(
            f"{self.folder}, where checkpoints go, holds something else than a training",
            expected="no such folder, or one that an interrupted training left",
            do="choose another --out, or move that folder",
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"


def _write(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    file, plain = folder / f"{name}.safetensors", folder / f"{name}.json"
    save_file(tensors, file)
    write_json(plain, {key: value for key, value in state.items() if key not in tensors})
    file.chmod(plain.stat().st_mode)  # safetensors makes it readable to the owner only, whatever the umask


def _read(folder: Path, name: str) -> dict[str, Any]:
    return load_file(folder / f"{name}.safetensors") | read_json(folder / f"{name}.json")
