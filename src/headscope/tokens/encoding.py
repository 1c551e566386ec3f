"""Tokenisation by a tokenizer's vocabulary and rules only, regardless of its other settings."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models

from headscope.errors import ModelError


def own_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that tokenises every text whole, deterministically, without adding tokens.

    Truncation, padding and dropout are turned off and the post-processor is removed, whether they were saved in
    `tokenizer.json` or set on the object. The spelling of a special token in a text is text. Everything that belongs to
    the vocabulary is kept: normaliser, pre-tokenizer (with its `add_prefix_space`), added tokens. A tokenizer that
    already has these settings is returned itself; no tokenizer is modified.

    Raises:
        ModelError: it has parts written in Python, which cannot be copied, or its copy gives tokens other ids.
    """
    if _is_set(tokenizer):
        return tokenizer
    try:
        own = Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:  # the library raises bare exceptions
        raise ModelError(
            f"a tokenizer that cannot be copied: {error}",
            expected="one that can be saved as tokenizer.json: without normalisers or pre-tokenizers written in Python",
            do="replace these by those of the `tokenizers` library",
        ) from error
    if own.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            "a tokenizer whose tokens have other ids once it is saved and loaded",
            expected="added tokens with the ids that follow the vocabulary",
            do="add tokens after the model is trained or replaced, not before",
        )
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True
    own.post_processor = None
    if isinstance(own.model, models.BPE):
        own.model.dropout = None
    return own


def _is_set(tokenizer: Tokenizer) -> bool:
    sampling = ("dropout",) if isinstance(tokenizer.model, models.BPE) else ("alpha", "nbest_size")
    return (
        tokenizer.truncation is None
        and tokenizer.padding is None
        and tokenizer.encode_special_tokens
        and tokenizer.post_processor is None
        and all(getattr(tokenizer.model, name, None) is None for name in sampling)
    )


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, as by `own_tokenizer`: without special tokens."""
    return [e.ids for e in own_tokenizer(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def reads_as_space(tokenizer: Tokenizer, character: str) -> bool:
    """Whether a tokenizer treats a character as a space, as SentencePiece does `▁`."""
    of_character, of_space = encode(tokenizer, [f"a{character}b", "a b"])
    return of_character == of_space


def marked(tokenizer: Tokenizer, ids: Iterable[int | None]) -> Tokenizer:
    """Return the tokenizer, or a copy with additional special tokens; ids without a token are ignored.

    Raises:
        ModelError: as `own_tokenizer`.
    """
    added = tokenizer.get_added_tokens_decoder()
    found = {i for i in ids if i is not None and tokenizer.id_to_token(i) is not None}
    found -= {i for i, token in added.items() if token.special}
    if not found:
        return tokenizer
    state = json.loads(own_tokenizer(tokenizer).to_str())
    for i in sorted(found - added.keys()):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["added_tokens"].append({"id": i, "content": tokenizer.id_to_token(i), **flags})
    for token in state["added_tokens"]:
        token["special"] = token["id"] in found or token["special"]
    return own_tokenizer(Tokenizer.from_str(json.dumps(state)))


def special_ids(tokenizer: Tokenizer, bos: int) -> frozenset[int]:
    """Return the ids that are never text: the BOS, special tokens, and the one for text that cannot be spelled."""
    marked = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    unknown = unknown_id(tokenizer)
    return frozenset(marked | {bos} | ({unknown} if unknown is not None else set()))


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the token that a tokenizer uses for text it cannot spell; None if it has none."""
    if isinstance(tokenizer.model, models.Unigram):
        return json.loads(tokenizer.model.__getstate__())["unk_id"]
    token = tokenizer.model.unk_token
    return None if token is None else tokenizer.token_to_id(token)
