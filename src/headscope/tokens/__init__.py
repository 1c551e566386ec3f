"""Tokenizers as headscope uses them: with settings of its own, and with the bytes that each token stands for."""

from headscope.tokens.encoding import encode, marked, own_tokenizer, special_ids, unknown_id
from headscope.tokens.spelling import Spelling
from headscope.tokens.visible import is_visible, visible

__all__ = ["Spelling", "encode", "is_visible", "marked", "own_tokenizer", "special_ids", "unknown_id", "visible"]
