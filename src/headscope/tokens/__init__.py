"""Tokenizers with normalised settings, and the bytes of each token."""

from headscope.tokens.encoding import encode, marked, own_tokenizer, reads_as_space, special_ids, unknown_id
from headscope.tokens.spelling import MARK, SAMPLES, Spelling
from headscope.tokens.visible import is_visible, visible

__all__ = [
    "MARK",
    "SAMPLES",
    "Spelling",
    "encode",
    "is_visible",
    "marked",
    "own_tokenizer",
    "reads_as_space",
    "special_ids",
    "unknown_id",
    "visible",
]
