"""Small tokenizers of every kind, trained in milliseconds, and what sets them apart."""

import json
from collections.abc import Callable, Iterator
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "def f(x):\n    return x + 1  # the answer is 42\n",
    "Caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \u65e5\u672c \U0001f98a\U0001f98a",
] * 4
_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level(*, prefix: bool = False, decoder: bool = True, normalizer: object = None) -> Tokenizer:
    """As GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=_ALPHABET, show_progress=False)
    )
    if decoder:
        made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def sentencepiece(how: str, *, decoder: bool = True) -> Tokenizer:
    """BPE with byte fallback; a space is put before none (`gemma`), all (`llama`), or what lacks one (`metaspace`)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trained.train_from_iterator(_TEXT[:2], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *_BYTES, *sorted(content["vocab"], key=content["vocab"].get)]
    vocab, merges = {p: i for i, p in enumerate(pieces)}, [(a, b) for a, b in content["merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    strip = [decoders.Strip(" ", 1, 0)]
    marks = normalizers.Replace(" ", "\u2581")
    match how:
        case "gemma":
            made.normalizer, strip = marks, []
        case "llama":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), marks])
        case "metaspace":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    if decoder:
        made.decoder = decoders.Sequence(parts)
    return made


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    """As T5's, with a token for what it cannot spell, or bytes."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
    )
    made.train_from_iterator(_TEXT[:2], trainer)
    if byte_fallback:
        pieces = [(p, score) for p, score in json.loads(made.to_str())["model"]["vocab"]]
        made.model = models.Unigram([*pieces, *((p, -20.0) for p in _BYTES)], unk_id=0, byte_fallback=True)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def wordpiece(normalizer: object = None) -> Tokenizer:
    """As BERT's."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(
        _TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


def word_level(*, spaces: bool) -> Tokenizer:
    """Whole words; spaces are tokens of their own, or lost."""
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = (
        pre_tokenizers.Split(" ", "isolated") if spaces else pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    )
    if spaces:
        made.decoder = decoders.Fuse()
    made.train_from_iterator(_TEXT, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return made


def characters() -> Tokenizer:
    """BPE with a mark where words end, as GPT-1's."""
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=120, end_of_word_suffix="</w>", special_tokens=["<unk>"], show_progress=False
    )
    made.train_from_iterator(_TEXT, trainer)
    return made


def with_added(made: Tokenizer) -> Tokenizer:
    """With tokens of letters that stand for bytes, of a space's mark, and of one that takes spaces with it."""
    made.add_tokens(["\u0120caf\u00e9", "\u65e5\u672c\u8a9e", AddedToken("<tool>", lstrip=True)])
    return made


_KEEPS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, no decoder": lambda: byte_level(decoder=False),
    "byte level, prefix": lambda: byte_level(prefix=True),
    "gemma": lambda: sentencepiece("gemma"),
    "gemma, no decoder": lambda: sentencepiece("gemma", decoder=False),
    "llama": lambda: sentencepiece("llama"),
    "metaspace": lambda: sentencepiece("metaspace"),
    "unigram, bytes": lambda: unigram(byte_fallback=True),
    "unigram": unigram,
    "words and spaces": lambda: word_level(spaces=True),
}
_LOSES: dict[str, Callable[[], Tokenizer]] = {
    "byte level, composes": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte level, added tokens": lambda: with_added(byte_level()),
    "byte level, lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "wordpiece": wordpiece,
    "wordpiece, lower case": lambda: wordpiece(normalizers.BertNormalizer()),
    "words": lambda: word_level(spaces=False),
    "characters": characters,
}
ONE_SPACE = {"byte level, prefix", "metaspace", "unigram", "unigram, bytes"}
"""These put a space only before a text that has none: two texts, the same tokens."""


@cache
def kind(name: str) -> Tokenizer:
    """A tokenizer by its name; it must not be changed."""
    return (_KEEPS | _LOSES)[name]()


def that_keep() -> Iterator[tuple[str, Tokenizer]]:
    """Those that keep all of a text that they can spell."""
    return ((name, kind(name)) for name in _KEEPS)


def that_lose() -> Iterator[tuple[str, Tokenizer]]:
    """Those that do not."""
    return ((name, kind(name)) for name in _LOSES)
