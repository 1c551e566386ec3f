"""How a corpus is read: which side of the split, which field, where BOS goes, in what order."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Literal

from headscope.errors import CorpusError
from headscope.limits import CountFrom0, Seed, check_fields

Split = Literal["train", "heldout", "all"]
Packing = Literal["packed", "rows"]
BosAt = Literal["both", "block", "document", "nowhere"]

HELD_OUT = 0.4
"""The share of documents (by hash) that training never sees."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What may be chosen of how a corpus is read; None is what is usual for the kind of source."""

    field: str | None = None
    """Of JSONL, Parquet and datasets: the field that holds text or token ids; `text`, `input_ids` or `tokens`."""
    dataset_config: str | None = None
    """Configuration of a dataset on the hub, or of a copy of its repository."""
    dataset_split: str = "train"
    """Split of a dataset on the hub or in a folder, of which --split takes its share."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a dataset on the hub; its newest state when it is first read, when not given."""
    document_line: str = "<|doc|>"
    """The line that parts the documents of one text file."""
    packing: Packing | None = None
    """Documents one after another, cut into blocks (`packed`), or each from a block of its own on (`rows`)."""
    bos_at: BosAt | None = None
    """Put the BOS at the start of each block, of each document, of both, or nowhere; token files stay as they are."""
    separator: str | None = None
    """A token of the vocabulary that is put after every document."""
    shuffle: CountFrom0 = 0
    """Documents are drawn from a buffer of so many; in order when 0."""
    shuffle_seed: Seed = 0
    """Of the order that --shuffle makes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be read so.

        Raises:
            CorpusError: a number out of bounds, or a line that is none.
        """
        check_fields(self, CorpusError)
        if not self.document_line or self.document_line.splitlines() != [self.document_line]:
            raise CorpusError(
                f"document_line {self.document_line!r}", expected="one line of text", do="change --document-line"
            )

    def as_dict(self) -> dict[str, Any]:
        """The choices as JSON, without those of a subclass."""
        return {f.name: getattr(self, f.name) for f in fields(Reading)}


def check_block_size(block_size: int, context: int, model: str) -> None:
    """Refuse blocks longer than a model's context.

    Raises:
        CorpusError: they are.
    """
    if block_size > context:
        raise CorpusError(
            f"blocks of {block_size:,} tokens",
            expected=f"at most {context:,}, the context of {model}",
            do="lower --block-size",
        )


def check_one_block(max_tokens: int | None, block_size: int) -> None:
    """Refuse to read less than one block.

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
    """A fixed number in [0, 1) for a name: the first 64 bits of its SHA-256 as a fraction of 2^64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_held_out(name: str) -> bool:
    """Whether training never sees the document of this name: `name_fraction` below 0.4."""
    return name_fraction(name) < HELD_OUT
