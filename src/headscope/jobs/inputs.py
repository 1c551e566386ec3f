"""Inputs shared by all jobs: corpus, device and dtype, progress callback."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headscope.corpus import Corpus, Reading, Split, check_block_size, check_one_block, load_corpus
from headscope.limits import BlockSize, Device, Name, Tokens, check_fields
from headscope.names import short

if TYPE_CHECKING:
    import torch

    from headscope.models.hf import Model

Progress = Callable[[str, int, int], None]
"""Progress callback: called with the stage, the work done and the total, which is 0 where it is unknown."""


@contextmanager
def loading(what: str | Path, on_progress: Progress | None) -> Iterator[None]:
    """Report a stage that is done when the block ends: importing torch and reading weights take seconds."""
    stage = f"load {short(str(what))}"
    if on_progress is not None:
        on_progress(stage, 0, 1)
    yield
    if on_progress is not None:
        on_progress(stage, 1, 1)


@dataclass(frozen=True)
class CorpusChoice(Reading):
    """The text to read, and how it is cut into blocks."""

    corpus: Name = "python"
    """`python` (the standard library of this interpreter); a file, folder or glob of text, .jsonl, .parquet or .npy
    files; a folder saved by `datasets`, or a copy of a dataset's repository; or a dataset on the hub."""
    split: Split = "heldout"
    """Documents to read: those for training (60 %), those held out (40 %, by hash of their name), or all."""
    block_size: BlockSize | None = None
    """Tokens per block, including BOS; default: 256, or the model's context if that is shorter."""
    max_tokens: Tokens | None = None
    """Maximum number of tokens to read."""

    def block_of(self, context: int, model: str) -> int:
        """Return the block size for a model of this context and name.

        Raises:
            CorpusError: it exceeds the context, or --max-tokens is less than one block.
        """
        block_size = min(256, context) if self.block_size is None else self.block_size
        check_block_size(block_size, context, model)
        check_one_block(self.max_tokens, block_size)
        return block_size

    def load(self, model: "Model", on_progress: Progress | None = None) -> Corpus:
        """Read, tokenise and pack the text into blocks; reports progress while tokenising.

        Raises:
            CorpusError: no such text, or blocks that the model cannot read; the latter before any text is read.
        """
        spec = model.spec
        return load_corpus(
            self.corpus,
            model.tokenizer,
            bos=model.bos,
            split=self.split,
            block_size=self.block_of(spec.context, spec.name),
            max_tokens=self.max_tokens,
            reading=self,
            on_tokens=None if on_progress is None else lambda done, total: on_progress("tokenise", done, total or 0),
        )


@dataclass(frozen=True)
class Hardware:
    """Device and precision of a model."""

    device: Device = "cpu"
    """Device of the model: `cpu`, `cuda`, `cuda:1`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model. SAEs, losses, norm scales and statistics are float32; indexes require a float32 model."""

    def __post_init__(self) -> None:
        """Reject invalid devices.

        Raises:
            OptionError: an invalid device.
        """
        check_fields(self)

    def load(self, name: str) -> "Model":
        """Load a model.

        Raises:
            ModelError: no such model, or no such device.
        """
        return load_on(name, self.device, self.dtype)


def load_on(name: str, device: "str | torch.device", dtype: str) -> "Model":
    """Load a model on a device.

    Raises:
        ModelError: no such model, or no such device.
    """
    from headscope.models.load import load_model

    return load_model(name, device=usable(device), dtype=dtype)


def usable(device: "str | torch.device") -> "torch.device":
    """Resolve a device name; `cuda` under `torchrun` is the process's own GPU.

    Raises:
        ModelError: there is no such device.
    """
    from headscope.models.placing import device_of

    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return device_of(device)
