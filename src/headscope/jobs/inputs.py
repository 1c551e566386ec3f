"""What jobs are given: text, and a model on a device; and whom they tell how far they are."""

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
"""Called with the stage, the work done and the work in all, which is 0 where that is not known."""


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
    """Which text is read, and how it is cut."""

    corpus: Name = "python"
    """`python` (the standard library of this interpreter); a file, folder or pattern of files: text, .jsonl, .parquet,
    .npy; a folder that `datasets` saved, or a copy of a dataset's repository; or a dataset on the hub."""
    split: Split = "heldout"
    """Documents to read: those for training (60 %), those held out (40 %, by hash of their name), or all."""
    block_size: BlockSize | None = None
    """Tokens in a block, BOS included; 256, or the model's context if that is shorter, when not given."""
    max_tokens: Tokens | None = None
    """Read at most this many tokens."""

    def block_of(self, context: int, model: str) -> int:
        """The size of the blocks that a model of this context and name reads.

        Raises:
            CorpusError: they are longer than the context, or --max-tokens is less than one.
        """
        block_size = min(256, context) if self.block_size is None else self.block_size
        check_block_size(block_size, context, model)
        check_one_block(self.max_tokens, block_size)
        return block_size

    def load(self, model: "Model", on_progress: Progress | None = None) -> Corpus:
        """Read, tokenise and pack the text into blocks, with progress where tokenising takes long.

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
    """Where and in what precision a model computes."""

    device: Device = "cpu"
    """`cpu`, `cuda`, `cuda:1`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model. SAEs, losses, norms' scales and statistics are of float32; an index is only made in float32."""

    def __post_init__(self) -> None:
        """Refuse devices that cannot compute.

        Raises:
            OptionError: one of them.
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
    """The device of a name; `cuda` under `torchrun` is the GPU of the process's own.

    Raises:
        ModelError: there is no such device.
    """
    from headscope.models.placing import device_of

    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return device_of(device)
