"""Proxies: rules that hold or not at every token of a corpus, for comparison with a feature."""

from headscope.proxies.algebra import And, Not, Or, Proxy, Shift, Where, where
from headscope.proxies.blocks import Blocks, Token, Vocabulary
from headscope.proxies.families import (
    after_any,
    bigram,
    document,
    document_regex,
    in_repeat,
    induction_of,
    next_token_in,
    regex,
    token_in,
    within_after,
)
from headscope.proxies.masks import evaluate, read_blocks, text_mask, vocabulary_of
from headscope.proxies.parse import parse

__all__ = [
    "And",
    "Blocks",
    "Not",
    "Or",
    "Proxy",
    "Shift",
    "Token",
    "Vocabulary",
    "Where",
    "after_any",
    "bigram",
    "document",
    "document_regex",
    "evaluate",
    "in_repeat",
    "induction_of",
    "next_token_in",
    "parse",
    "read_blocks",
    "regex",
    "text_mask",
    "token_in",
    "vocabulary_of",
    "where",
    "within_after",
]
