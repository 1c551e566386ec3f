"""Compatibility of a tokenizer with a model, and the token that starts a text."""

import copy
import warnings
from typing import Any

from tokenizers import Tokenizer

from headscope.errors import ModelError
from headscope.tokens import SAMPLES, Spelling, encode, marked

_UNUSED = 0.1  # share of a model's vocabulary: rows that pad it to a round number


def check_vocabulary(tokenizer: Any, d_vocab: int, source: str) -> None:
    """Reject a tokenizer that is not the model's, as far as their sizes show.

    Tokens that were added to a tokenizer later may lie outside a model's vocabulary; a corpus with one is rejected when
    it is read.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        d_vocab: size of the model's vocabulary.
        source: origin of the tokenizer, for the message.

    Raises:
        ModelError: it has a token that the model lacks, or leaves more than a tenth of the model's tokens unused.
    """
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    largest, known = (
        max([*own, first_token(tokenizer, source)]),
        tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True),
    )
    if largest >= d_vocab:
        raise ModelError(
            f"a tokenizer with the token {largest}, from {source}",
            expected=f"tokens below d_vocab, {d_vocab}",
            do="save the model's own tokenizer there",
        )
    if known < (1 - _UNUSED) * d_vocab:
        raise ModelError(
            f"a tokenizer of {known} tokens, from {source}",
            expected=f"about as many as the model has, d_vocab {d_vocab}",
            do="save the model's own tokenizer there",
        )


def checked_tokenizer(tokenizer: Any, source: str) -> Tokenizer:
    """Return headscope's tokenizer: a copy of a fast tokenizer of `transformers`, with normalised settings.

    Tokens that were made special on the object alone (`tokenizer.eos_token = ...`) are special in the copy.
    Warns where its tokens do not reproduce a text exactly.

    Raises:
        ModelError: it cannot be copied, or its tokens do not spell the text.
    """
    try:
        spelling = Spelling.of(marked(tokenizer.backend_tokenizer, tokenizer.all_special_ids))
    except ModelError as error:
        raise ModelError(f"{source!r} with {error.got}", expected=error.expected, do=error.do) from error
    _check_class(tokenizer, spelling.tokenizer, source)
    if spelling.loses is not None:
        warnings.warn(
            f"the tokenizer of {source!r} does not keep a text such as {spelling.loses!r} as it is: what is shown "
            "and searched is what it decodes its tokens to",
            stacklevel=3,
        )
    return spelling.tokenizer


def _check_class(tokenizer: Any, own: Tokenizer, source: str) -> None:
    """Raise ModelError where a custom class tokenises differently from the tokenizer that it wraps."""
    cls = type(tokenizer)
    if cls.__module__.partition(".")[0] == "transformers":
        return
    called = copy.deepcopy(tokenizer)  # a call may set padding and truncation
    called.split_special_tokens, called.model_max_length = True, int(1e30)
    for text, ids in zip(SAMPLES, encode(own, list(SAMPLES)), strict=True):
        got = called(text, add_special_tokens=False)["input_ids"]
        if list(got) != ids:
            raise ModelError(
                f"{source!r} with a {cls.__module__}.{cls.__qualname__}, which makes other tokens of {text!r} than the "
                "tokenizer that it holds",
                expected="a class that leaves text and tokens to `backend_tokenizer`",
                do="change text by a normalizer of the `tokenizers` library instead of in Python",
            )


def first_token(tokenizer: Any, source: str) -> int:
    """Return the token that starts each block of text: the tokenizer's BOS, or its EOS without one (as Qwen's).

    Raises:
        ModelError: it has neither, or is not a fast tokenizer.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return token
    raise no_tokenizer(source)


def no_tokenizer(source: str) -> ModelError:
    """Make the error for a model whose tokenizer cannot be used."""
    return ModelError(
        f"the tokenizer of {source!r}",
        expected="a fast tokenizer (tokenizer.json) with a BOS or EOS token",
        do="save the model with such a tokenizer, or pass one as tokenizer=",
    )
