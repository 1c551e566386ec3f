"""Resumable work in parts on disk: each part is whole or absent, identified by its checksum, and owned by one rank.

A part is one safetensors file `<number>-<sha256, 16 digits>.safetensors`. A build killed at any moment resumes from the
finished parts. No torch here.
"""

import fcntl
import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from headscope.artefact import atomic_write, read_json
from headscope.errors import IndexFormatError, OutputError
from headscope.scratch import held, is_held

Arrays = Mapping[str, np.ndarray]
_NAME = re.compile(r"(\d{6,})-([0-9a-f]{16})\.safetensors")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Workers:
    """Rank and number of processes; each part belongs to one of them."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> "Workers":
        """Read them from `torchrun`'s environment; a single process without it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def own(self, n_parts: int) -> range:
        """Return the parts owned by this process."""
        return range(self.rank, n_parts, self.world)


@contextmanager
def locked(folder: Path, workers: Workers) -> Iterator[None]:
    """Lock a build folder for this rank of one build.

    Raises:
        OutputError: another build holds the lock.
    """
    busy = OutputError(
        f"{folder} is being built by another process",
        expected="one build of an index at a time",
        do="wait for it to end, or choose another --out",
    )
    with held(folder / f".lock-{workers.rank}", busy):
        yield


def leave_first(folder: Path, workers: Workers) -> None:
    """On the first rank, wait until all others are done, so that none finds the folder removed."""
    for rank in range(1, workers.world):
        while not is_held(folder / f".lock-done-{rank}"):
            time.sleep(_POLL_SECONDS)


def leave_after_first(folder: Path, workers: Workers, last: Path) -> None:
    """On every other rank, report that its work is done, and wait until the first has removed the file `last`."""
    with (folder / f".lock-done-{workers.rank}").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        while last.exists():
            time.sleep(_POLL_SECONDS)


def plan_of(partial: Path) -> dict[str, Any] | None:
    """Read the plan of the interrupted build in a folder, None where there is none.

    Raises:
        OutputError: the folder has other content.
    """
    path = partial / "plan.json"
    if path.is_file():
        try:
            found = read_json(path)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}
    foreign = [child.name for child in partial.iterdir() if not child.name.startswith((".lock-", ".plan.json."))]
    if foreign:
        raise OutputError(
            f"{partial} holds {', '.join(sorted(foreign)[:5])} and no plan of a build",
            expected="what an interrupted build left, or nothing",
            do="choose another --out, or move that folder away",
        )
    return None


class Parts:
    """A folder of numbered parts."""

    def __init__(self, folder: Path, n_parts: int) -> None:
        """Prepare; nothing is created before the first part is written."""
        self.folder, self.n_parts = folder, n_parts

    def present(self) -> dict[int, Path]:
        """The finished parts, by number."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) < self.n_parts:
                found[int(match[1])] = path
        return found

    def write(self, number: int, arrays: Arrays) -> None:
        """Write one part atomically, named by its checksum."""
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        digest = hashlib.sha256(content).hexdigest()[:16]
        with atomic_write(self.folder / f"{number:06d}-{digest}.safetensors") as file:
            file.write(content)

    def discard_damaged(self, numbers: Sequence[int]) -> None:
        """Remove the present parts that do not match their checksums, and return their numbers."""
        for number, path in self.present().items():
            if number in numbers and not _intact(path):
                warnings.warn(f"part {path} is damaged and is made again", stacklevel=2)
                path.unlink()

    def discard(self, number: int) -> None:
        """Remove a part if it exists."""
        for path in self.folder.glob(f"{number:06d}-*.safetensors"):
            path.unlink()

    def read(self, number: int, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Read arrays of one part, all when `names` is None.

        Raises:
            IndexFormatError: it does not exist, or cannot be read.
        """
        path = self.present().get(number)
        if path is None:
            raise IndexFormatError(
                f"{self.folder} lacks part {number}", expected="all parts", do="run the same command again"
            )
        return read_arrays(path, names)

    def missing(self, workers: Workers) -> list[int]:
        """Return this process's unfinished parts; a damaged one is removed."""
        own = workers.own(self.n_parts)
        self.discard_damaged(own)
        present = self.present()
        return [number for number in own if number not in present]

    def wait(self) -> None:
        """Wait until the parts of all processes exist, including those being remade."""
        intact: set[Path] = set()
        while len(intact) < self.n_parts:
            present = set(self.present().values())
            intact = {path for path in present if path in intact or _intact(path)}
            if len(intact) < self.n_parts:
                time.sleep(_POLL_SECONDS)


def _intact(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    try:
        with path.open("rb") as file:
            return match is not None and hashlib.file_digest(file, "sha256").hexdigest()[:16] == match[2]
    except FileNotFoundError:  # its process is remaking it
        return False


class SortedParts:
    """Rows in several parts, each sorted by latent, read as one table sorted by latent, then part.

    Each part holds `counts` [d_sae], its rows by latent, and columns of rows. Only requested data is read.
    """

    def __init__(self, parts: Parts) -> None:
        """Open the parts, which must all exist.

        Raises:
            IndexFormatError: a part is missing or damaged.
        """
        self._paths = [path for _, path in sorted(parts.present().items())]
        missing = parts.n_parts - len(self._paths)
        damaged = [path.name for path in self._paths if not _intact(path)]
        if missing or damaged:
            raise IndexFormatError(
                f"{parts.folder}: {missing} parts missing, damaged: {', '.join(damaged) or 'none'}",
                expected="all parts, as they were written",
                do="run the same command again: it makes what is missing",
            )

    @cached_property
    def _starts(self) -> Int[np.ndarray, "part latent_and_end"]:
        counts = [read_arrays(path, ["counts"])["counts"] for path in self._paths[:1]]
        starts = np.zeros((len(self._paths), len(counts[0]) + 1), dtype=np.int32)  # a part has fewer rows than 2^31
        for row, path in zip(starts, self._paths, strict=True):
            np.cumsum(read_arrays(path, ["counts"])["counts"], out=row[1:])
        return starts

    @cached_property
    def counts(self) -> Int[np.ndarray, " latent"]:
        """Rows per latent."""
        return np.diff(self._starts.sum(0, dtype=np.int64))

    def totals(self, name: str) -> np.ndarray:
        """Return the sum over parts, in their order, of an array that each part holds."""
        total = None
        for path in self._paths:
            own = read_arrays(path, [name])[name]
            total = own if total is None else total + own
        assert total is not None
        return total

    def maxima(self, name: str) -> np.ndarray:
        """Return the elementwise maximum over parts."""
        largest = read_arrays(self._paths[0], [name])[name]
        for path in self._paths[1:]:
            np.maximum(largest, read_arrays(path, [name])[name], out=largest)
        return largest

    def rows(self, first: int, last: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return columns of the rows of latents first to last - 1, and their `latent`, sorted by latent, then part."""
        pieces = []
        for path, starts in zip(self._paths, self._starts, strict=True):
            low, high = int(starts[first]), int(starts[last])
            latent = np.repeat(np.arange(first, last), np.diff(starts[first : last + 1]))
            if high > low:
                pieces.append({"latent": latent, **read_arrays(path, names, low, high)})
        if not pieces:
            return {"latent": np.empty(0, np.int64), **{name: np.empty(0) for name in names}}
        joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        order = np.argsort(
            (joined["latent"] - first).astype(np.uint16 if last - first <= 1 << 16 else np.int64), kind="stable"
        )
        return {name: column[order] for name, column in joined.items()}

    def slices(self, latent: int, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Yield columns of one latent's rows, part by part."""
        for path, starts in zip(self._paths, self._starts, strict=True):
            low, high = int(starts[latent]), int(starts[latent + 1])
            if high > low:
                yield {"latent": np.full(high - low, latent), **read_arrays(path, names, low, high)}

    def ranges(self, limit: int) -> Iterator[tuple[int, int]]:
        """Yield consecutive ranges of latents of at most `limit` rows each; a single latent may have more."""
        first, ends = 0, np.cumsum(self.counts)
        while first < len(ends):
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + limit, side="right")))
            yield first, min(last, first + (1 << 16))
            first = min(last, first + (1 << 16))

    def each(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Yield whole columns and `counts`, part by part."""
        for path in self._paths:
            yield read_arrays(path, [*names, "counts"])


def read_arrays(
    path: Path, names: Sequence[str] | None = None, low: int | None = None, high: int | None = None
) -> dict:
    """Read arrays of a safetensors file, or their rows low to high - 1.

    Raises:
        IndexFormatError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = names or list(file.keys())
            if low is None and high is None:  # an array without rows cannot be sliced
                return {name: file.get_tensor(name) for name in names}
            return {name: file.get_slice(name)[low:high] for name in names}
    except (OSError, SafetensorError) as error:
        raise IndexFormatError(
            f"{path}: {error}", expected="a part as it was written", do="run the same command again"
        ) from error
