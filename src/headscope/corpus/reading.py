"""Reading options of a corpus: side of the split, field, BOS placement, order."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Literal

from headscope.errors import CorpusError
from headscope.limits import CountFrom0, Seed, check_fields

Split = Literal["train", "heldout", "all"]
Packing = Literal["packed", "rows"]
BosAt = Literal["both", "block", "document", "nowhere"]

HELD_OUT = 0.4
"""Share of documents (by hash) that training never sees."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Reading options of a corpus; None is the default for the kind of source."""

    field: str | None = None
    """Field with the text or token ids in JSONL, Parquet and datasets; default: `text`, `input_ids` or `tokens`."""
    dataset_config: str | None = None
    """Configuration of a dataset on the hub, or of a local copy of its repository."""
    dataset_split: str = "train"
    """Split of a dataset on the hub or in a folder; --split selects a part of it."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a dataset on the hub; default: the newest at the first read."""
    document_line: str = "<|doc|>"
    """Line that separates the documents of a single text file."""
    packing: Packing | None = None
    """`packed`: documents concatenated and cut into blocks; `rows`: each document starts its own block."""
    bos_at: BosAt | None = None
    """Prepend BOS to each block, each document, both, or neither; files of token ids are left as they are."""
    separator: str | None = None
    """A token of the vocabulary that is appended to every document."""
    shuffle: CountFrom0 = 0
    """Size of the shuffle buffer, in documents; 0 keeps the order."""
    shuffle_seed: Seed = 0
    """Seed of --shuffle."""

    def __post_init__(self) -> None:
        """Validate the options.

        Raises:
            CorpusError: a number out of bounds, or an invalid document line.
        """
        check_fields(self, CorpusError)
        if not self.document_line or self.document_line.splitlines() != [self.document_line]:
            raise CorpusError(
                f"document_line {self.document_line!r}", expected="one line of text", do="change --document-line"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON types, without those of a subclass."""
        return {f.name: getattr(self, f.name) for f in fields(Reading)}


def check_block_size(block_size: int, context: int, model: str) -> None:
    """Reject blocks longer than a model's context.

    Raises:
        CorpusError: they are longer.
    """
    if block_size > context:
        raise CorpusError(
            f"blocks of {block_size:,} tokens",
            expected=f"at most {context:,}, the context of {model}",
            do="lower --block-size",
        )


def check_one_block(max_tokens: int | None, block_size: int) -> None:
    """Reject a limit of less than one block.

    Raises:
        CorpusError: it is less.
    """
    if max_tokens is not None and max_tokens < block_size:
        raise CorpusError(
            f"at most {max_tokens:,} tokens",
            expected=f"at least one block of {block_size:,} tokens",
            do="raise --max-tokens, or lower --block-size",
        )


def name_fraction(name: str) -> float:
    """Map a name to a fixed number in [0, 1): the first 64 bits of its SHA-256 as a fraction of 2^64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_held_out(name: str) -> bool:
    """Whether the document of this name is held out from training: `name_fraction` below 0.4."""
    return name_fraction(name) < HELD_OUT
