"""Tokenizers as headscope uses them: with settings of its own, and with the bytes that each token stands for."""

from headscope.tokens.encoding import encode, own_tokenizer, special_ids
from headscope.tokens.spelling import Spelling

__all__ = ["Spelling", "encode", "own_tokenizer", "special_ids"]
