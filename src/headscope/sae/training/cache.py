"""Activations cached on disk, so that a sweep runs the model once: one file per group of blocks, whole or absent.

`<folder>/<key>/group-000000.safetensors` holds the tensor `rows` `[n, d_in]`, bfloat16, and in its metadata the key,
the group's number and a SHA-256 of the rows. The key is a hash of all that determines them; `identity.json` lists it.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from jaxtyping import BFloat16
from safetensors import SafetensorError, safe_open
from torch import Tensor, int16

from headscope.artefact import atomic_write, write_json
from headscope.errors import OutputError, TrainingError
from headscope.names import local

_FILE_OVERHEAD = 4096  # bytes: header and the rounding up to whole blocks of the disk


class ActivationCache:
    """Cached groups of one corpus at one site of one model; several processes may read and write it concurrently."""

    def __init__(self, folder: str | Path, identity: dict[str, Any], *, n_groups: int, n_bytes: int) -> None:
        """Open the cache, or create it.

        Args:
            folder: parent folder of caches; each gets its own subfolder.
            identity: JSON that identifies these activations.
            n_groups: number of files.
            n_bytes: size of all rows together.

        Raises:
            OutputError: the folder cannot be written, or the disk lacks space for the missing files.
        """
        text = json.dumps(identity, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder = local(folder) / self._key
        self._checked: set[int] = set()
        if not (self.folder / "identity.json").exists():
            write_json(self.folder / "identity.json", identity)
        self._check_room(n_bytes + n_groups * _FILE_OVERHEAD)

    def _check_room(self, n_bytes: int) -> None:
        present = sum(path.stat().st_size + _FILE_OVERHEAD for path in self.folder.glob("group-*.safetensors"))
        needed, free = n_bytes - present, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"a cache of activations that needs {needed:,} more bytes, where {free:,} are free ({self.folder})",
                expected="room for all activations of the corpus, 2 * d_in bytes each",
                do="choose another --cache, free some space, use a smaller corpus, or train without a cache",
            )

    def path(self, group: int) -> Path:
        """Return the path of a group's file, whether or not it exists."""
        return self.folder / f"group-{group:06d}.safetensors"

    def read(self, group: int) -> BFloat16[Tensor, "n d_in"] | None:
        """Return the rows of a group, memory-mapped, or None where they are not cached yet.

        Raises:
            TrainingError: the file is damaged, or holds other activations.
        """
        path = self.path(group)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                said, rows = file.metadata() or {}, file.get_tensor("rows")
        except (OSError, SafetensorError) as error:
            raise _refused(path, f"is damaged ({error})") from error
        if (said.get("key"), said.get("group")) != (self._key, str(group)):
            raise _refused(path, "holds other activations")
        if group not in self._checked:
            if said.get("sha256") != _checksum(rows):
                raise _refused(path, "is damaged (its checksum is wrong)")
            self._checked.add(group)
        return rows

    def write(self, group: int, rows: BFloat16[Tensor, "n d_in"]) -> None:
        """Store the rows of a group.

        Raises:
            OutputError: the disk is full; no file is left.
        """
        rows = rows.cpu().contiguous()
        said = {"key": self._key, "group": str(group), "sha256": _checksum(rows)}
        with atomic_write(self.path(group)) as file:
            file.write(safetensors.torch.save({"rows": rows}, said))
        self._checked.add(group)


def _checksum(rows: BFloat16[Tensor, "n d_in"]) -> str:
    digest = hashlib.sha256(f"{tuple(rows.shape)}".encode())
    digest.update(rows.view(int16).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()


def _refused(path: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{path} {what}",
        expected="activations as they were written there",
        do="delete the file: what belongs there is computed again",
    )
