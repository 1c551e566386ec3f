"""The bytes of tokens joined are the text, for every kind of tokenizer; settings beside its vocabulary do not count."""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from headscope import load_corpus, load_model
from headscope.artefact import file_hash, read_json, write_json
from headscope.corpus import Reading
from headscope.errors import IndexFormatError, ModelError
from headscope.index.build import SAERecord, build_index
from headscope.index.reading import _Before, _starts
from headscope.index.store import FeatureIndex
from headscope.index.token_texts import TokenTexts
from headscope.proxies import evaluate as holds_at
from headscope.proxies import regex
from headscope.proxies.masks import vocabulary_of
from headscope.studies.how.corruptions import prompt
from headscope.tokens import SAMPLES, Spelling, encode, marked, own_tokenizer, special_ids, unknown_id, visible
from headscope.tokens.spelling import _CHARACTERS as CHARACTERS
from tokenizer_kinds import ONE_SPACE, byte_level, kind, sentencepiece, that_keep, that_lose, unigram, with_added

WORDS = ["The", "the", "quick", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "fox", "dog", ",", ".", "'", "x", "42"]
WORDS += ["\u00e9", "caf\u00e9", "\u65e5\u672c", "\u8a9e", "\U0001f98a", "\U0001f469\u200d\U0001f467", "\ufeff", "\0"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)


@pytest.fixture(scope="module")
def spellings() -> dict[str, Spelling]:
    return {name: Spelling.of(made) for name, made in [*that_keep(), *that_lose()]}


def joined(spelling: Spelling, ids: list[int]) -> bytes:
    """As an index has them: by the table of its vocabulary."""
    table = spelling.table(set(), spelling.tokenizer.get_vocab_size())
    return b"".join(table[i] for i in ids)


@given(TEXTS)
def test_bytes_joined_are_the_text(spellings, text):
    for name, made in that_keep():
        spelling, [ids] = spellings[name], encode(made, [text])
        if unknown_id(made) in ids:
            continue
        content = text.encode()
        puts = spelling.prefix if ids and not (name in ONE_SPACE and text.startswith(" ")) else b""
        assert joined(spelling, ids) == puts + content, name
        same = name in ONE_SPACE and text.startswith(" ")
        assert spelling.join(ids) == (content[1:] if same else content), name


@given(TEXTS)
def test_of_a_tokenizer_that_loses_text_they_are_what_it_decodes(spellings, text):
    for name, made in that_lose():
        spelling, [ids] = spellings[name], encode(made, [text])
        decoded = made.decode(ids, skip_special_tokens=False).encode()
        around = [(before, after) for before in (b"", spelling.prefix) for after in (b"", spelling.suffix)]
        assert joined(spelling, ids) in [before + decoded + after for before, after in around], name


def test_what_is_put_around_a_text_and_what_is_lost_is_known(spellings):
    spaced = {*ONE_SPACE, "llama", "wordpiece", "wordpiece, lower case", "words"}
    assert {name for name, s in spellings.items() if s.prefix == b" "} == spaced
    assert {name for name, s in spellings.items() if s.suffix} == {"characters"}
    assert {name for name, s in spellings.items() if s.loses is not None} == {name for name, _ in that_lose()}


def test_a_vocabulary_that_knows_no_sample_text_is_tried_on_its_own_words():
    alone = Tokenizer(models.WordLevel({f"t{i}": i for i in range(50)}, unk_token="t1"))
    alone.pre_tokenizer, alone.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    assert Spelling.of(alone).loses == "t4 t5 t6 t7"
    characters = Tokenizer(models.BPE({c: i for i, c in enumerate("\u0259\u026a\u028c\u0251?")}, [], unk_token="?"))
    characters.decoder = decoders.Fuse()
    assert Spelling.of(characters).loses is None
    characters.normalizer = normalizers.Replace("\u0259", "\u026a")
    assert Spelling.of(characters).loses is not None


def test_whatever_is_lost_or_put_into_a_text_is_told():
    for form in (normalizers.NFC(), normalizers.NFKC()):
        assert Spelling.of(byte_level(normalizer=form)).loses == "e\u0301"
    for found in ("\ufb01", "\uff12", "\u2026", "\u00a0", "\u2028", "\u3000", "``", "''"):
        assert found in (Spelling.of(byte_level(normalizer=normalizers.Replace(found, "x"))).loses or "")
        dropping = byte_level()
        removed = pre_tokenizers.Split(found, "removed")  # pyright: ignore
        dropping.pre_tokenizer = pre_tokenizers.Sequence([removed, dropping.pre_tokenizer])
        assert found in (Spelling.of(dropping).loses or "")
    for found in ("\u2014", "\u200b", "\ufeff", "zz", "~"):
        assert found in (Spelling.of(byte_level(normalizer=normalizers.Replace(found, "-"))).loses or "")
    for eats in (AddedToken("<tool>", lstrip=True), AddedToken("<tool>", rstrip=True)):
        made = byte_level()
        made.add_tokens([eats])
        assert Spelling.of(made).loses == "a <tool> b"
    for made in (byte_level(prefix=True), sentencepiece("llama"), unigram(byte_fallback=True)):
        made.add_tokens([AddedToken("<tool>", normalized=False)])
        assert Spelling.of(made).loses == "a<tool>b"
    for name, expected in {"<tool>": None, "\u0120the": "a\u0120theb"}.items():  # of which one is in the vocabulary
        made = byte_level()
        made.add_tokens([name])
        assert Spelling.of(made).loses == expected


def test_characters_that_are_dropped_are_told():
    texts = [text for text in SAMPLES if "\ufb01" not in text]
    made = Tokenizer(models.BPE())
    made.decoder = decoders.Fuse()
    alphabet = sorted(set("".join(texts)))
    made.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    assert encode(made, ["a\ufb01"]) == encode(made, ["a"])
    assert Spelling.of(made).loses == "\ufb01"
    vocab = [c for c in pre_tokenizers.ByteLevel.alphabet() if c != "\u0100"]  # the letter of the byte 0
    lacking = Tokenizer(models.BPE({c: i for i, c in enumerate(vocab)}, []))
    lacking.pre_tokenizer, lacking.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert Spelling.of(lacking).loses == "\0"
    partial = Tokenizer(models.BPE({c: i for i, c in enumerate(v for v in vocab if v != "\u00f4")}, []))
    partial.pre_tokenizer, partial.decoder = lacking.pre_tokenizer, lacking.decoder
    with pytest.raises(ModelError, match=r"(?s)tokens with the bytes b'\\x80\\x80\\x80'.*the bytes that it lacks"):
        Spelling.of(partial)


def test_every_byte_of_utf8_is_tried():
    tried = {byte for c in CHARACTERS for byte in chr(c).encode()}
    assert tried == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}


def test_documents_with_a_mark_that_reads_as_a_space_are_counted_each_time(tmp_path):
    for number, text in enumerate(["the \u2581fox and the dog", "the fox and the dog", "a\u2581b"]):
        (tmp_path / f"{number}.txt").write_text(text)
    for name, counted in {"gemma": True, "llama": True, "unigram, bytes": True, "byte level": False}.items():
        for _ in range(2):  # read, and from the cache
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                load_corpus(str(tmp_path), kind(name), bos=1, split="all", block_size=4)
            said = [str(warning.message) for warning in found]
            assert len(said) == counted, name
            assert not counted or "2 of 3 documents in" in said[0], name


def told(source: Path, made: Tokenizer, bos: int = 1) -> list[str]:
    """What is said of a corpus when it is read."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load_corpus(str(source), made, bos=bos, split="all", block_size=4)
    return [str(warning.message) for warning in found]


def test_documents_that_the_tokenizer_changes_are_counted_whatever_no_sample_shows(tmp_path):
    texts = ["see https://a.org/x?y=1 now", "the fox\n\n\n\nand the dog", "the fox and the dog", " so...... what"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    removed = pre_tokenizers.Split(Regex(r"https?://\S+"), "removed")  # pyright: ignore
    dropping = byte_level()
    dropping.pre_tokenizer = pre_tokenizers.Sequence([removed, dropping.pre_tokenizer])
    for made in (
        byte_level(normalizer=normalizers.Replace(Regex(r"https?://\S+"), "<url>")),
        byte_level(normalizer=normalizers.Replace(Regex(r"\n{3,}"), "\n\n")),
        byte_level(normalizer=normalizers.Replace(Regex(r"\.{4,}"), "...")),
        dropping,
    ):
        assert Spelling.of(made).loses is None
        for _ in range(2):  # read, and from the cache
            [said] = told(tmp_path / "rows.jsonl", made)
            assert "1 of 4 documents in" in said
            assert "replaces or drops a part of their text" in said
    for name in ("byte level", "byte level, prefix", "gemma", "llama", "metaspace", "unigram, bytes"):
        assert told(tmp_path / "rows.jsonl", kind(name)) == [], name


def test_documents_of_which_the_tokenizer_makes_special_tokens_are_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "the fox! and"}\n{"text": "the fox and the dog"}\n' * 2)
    made = byte_level()
    marks = marked(made, [made.token_to_id("!")])  # as pad_token = "!"
    for own, bos in ((marks, 1), (made, made.token_to_id("!"))):
        [said] = told(tmp_path / "rows.jsonl", own, bos)
        assert "2 of 4 documents in" in said
        assert "as special tokens or as its unknown token" in said
    assert told(tmp_path / "rows.jsonl", made) == []
    (tmp_path / "rows.jsonl").write_text('{"text": "the \u672a fox and the dog"}\n{"text": "the fox and the dog"}\n')
    [said] = told(tmp_path / "rows.jsonl", kind("unigram"))
    assert "1 of 2 documents in" in said


def test_another_mark_of_a_space_is_told():
    mark = "\u2588"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="never", split=False)
    made.decoder = decoders.Metaspace(replacement=mark, prepend_scheme="never")
    alphabet = sorted({*"".join(SAMPLES).replace(" ", mark), *map(chr, CHARACTERS)} - {" "})
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet), initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["a"], trainer)
    assert Spelling.of(made).loses == f"a{mark}b"


def test_whether_the_prefix_is_put_after_added_tokens_as_well(spellings):
    repeating = {"byte level, prefix", "llama", "unigram", "unigram, bytes", "wordpiece", "wordpiece, lower case"}
    assert {name for name, s in spellings.items() if s.repeats} == repeating | {"words"}
    assert spellings["metaspace"].prefix == b" "


def test_a_part_of_a_character_is_its_byte(spellings):
    for name in ("byte level", "gemma", "unigram, bytes"):
        spelling, [ids] = spellings[name], encode(kind(name), ["\U0001f469"])
        parts = [part for i in ids if (part := spelling.table(set(), 400)[i]) != b" "]
        assert len(parts) > 1, name
        assert b"".join(parts) == "\U0001f469".encode(), name
        assert all("\ufffd" in part.decode(errors="replace") for part in parts), name


def test_special_tokens_keep_their_name_and_ids_without_a_token_are_empty(spellings):
    made, spelling = kind("gemma"), spellings["gemma"]
    special = special_ids(made, 1)
    assert special == {0, 1, 2}
    n = made.get_vocab_size() + 3
    table = spelling.table(special, n)
    assert table[:4] == [b"<unk>", b"<s>", b"</s>", b"\0"]
    assert table[-3:] == [b""] * 3
    assert spelling.byte_tokens(n) == list(range(3, 259))
    assert spellings["byte level"].byte_tokens(256) == []


def test_added_tokens_are_what_they_are_called_in_any_kind():
    added = with_added(byte_level())
    spelling, text = Spelling.of(added), "x\u0120caf\u00e9\u65e5\u672c\u8a9e<tool>x"
    [ids] = encode(added, [text])
    assert {added.token_to_id("\u0120caf\u00e9"), added.token_to_id("<tool>")} <= set(ids)
    assert joined(spelling, ids) == text.encode()
    assert joined(spelling, encode(added, ["x  <tool>"])[0]) == b"x<tool>", "which takes the spaces before it away"
    pieces = sentencepiece("gemma")
    pieces.add_tokens([AddedToken("\u2581\u2581\u2581", normalized=False), "<0x0A><0x0A>", "the fox"])
    text = "a\u2581\u2581\u2581b<0x0A><0x0A>c the fox"
    assert joined(Spelling.of(pieces), encode(pieces, [text])[0]) == text.encode()


def test_a_token_of_the_vocabulary_that_was_added_again_has_the_bytes_of_the_vocabulary():
    made = sentencepiece("gemma")
    vocabulary = made.get_vocab()
    piece = next(p for p in vocabulary if p.startswith("\u2581") and len(p) > 2)
    made.add_tokens([piece])
    text = "the " + piece.replace("\u2581", " ")
    assert joined(Spelling.of(made), encode(made, [text])[0]) == text.encode()


def test_a_tokenizer_whose_bytes_would_be_wrong_is_refused_by_name(random_model):
    wrong = byte_level()
    wrong.add_tokens(["\u00e9"])  # which is also the letter of byte E9, in any other character
    with pytest.raises(ModelError, match=r"(?s)a\u00e9b.*expected: tokens whose bytes.*do: .*added token"):
        Spelling.of(wrong)
    mistaken = byte_level(normalizer=normalizers.Lowercase())
    mistaken.decoder = decoders.CTC()
    with pytest.raises(ModelError, match="decodes them to"):
        Spelling.of(mistaken)
    net = random_model("gpt2", vocab_size=wrong.get_vocab_size()).module
    own = PreTrainedTokenizerFast(tokenizer_object=wrong, bos_token="a")
    with pytest.raises(ModelError, match=r"'gpt2' with a tokenizer that makes of"):
        load_model(net, tokenizer=own)


def test_what_a_model_is_loaded_with_is_said_to_lose_text(random_model):
    made = kind("byte level, lower case")
    net = random_model("gpt2", vocab_size=made.get_vocab_size()).module
    with pytest.warns(UserWarning, match="'gpt2' does not keep a text such as 'Hello World' as it is"):
        load_model(net, tokenizer=PreTrainedTokenizerFast(tokenizer_object=made, bos_token="a"))


# ------------------------------------------------------------------------------------------------------------- settings
def unsettled() -> dict[str, Tokenizer]:
    """Tokenizers that do something besides tokenising a text: each by one setting."""
    made = {name: byte_level() for name in ("truncation", "stride", "padding", "left", "post", "dropout", "special")}
    made["truncation"].enable_truncation(5)
    made["stride"].enable_truncation(6, stride=2, direction="left")
    made["padding"].enable_padding(length=40, pad_id=3)
    made["left"].enable_padding(direction="left", pad_to_multiple_of=8)
    made["post"].post_processor = processors.TemplateProcessing(
        single="a:1 $A b:1", special_tokens=[("a", 7), ("b", 8)]
    )
    made["dropout"].model.dropout = 0.5
    made["special"].add_special_tokens(["fox"])
    return made


def test_settings_cut_nothing_off_and_add_nothing():
    text = "The quick brown fox jumps over the lazy dog, and the dog doesn't mind."
    plain = byte_level().encode(text).ids
    for name, made in unsettled().items():
        before, spelled = made.to_str(), made.encode_special_tokens
        assert encode(made, [text, "x"])[0] == plain, name
        own = own_tokenizer(made)
        assert own_tokenizer(own) is own
        assert encode(own, [text, "x"])[0] == plain, name
        assert (made.to_str(), made.encode_special_tokens) == (before, spelled), name
    sampled = unigram()
    expected = sampled.encode("the quick brown fox").ids
    sampled.model.alpha, sampled.model.nbest_size = 0.1, 5
    assert all(encode(sampled, ["the quick brown fox"])[0] == expected for _ in range(5))


def test_a_model_has_a_tokenizer_of_its_own_for_corpus_and_prompts(random_model, save_model, tokenizer, tmp_path):
    made, text = random_model("gpt2", n_layers=1), "def f(x):\n    return x\n" * 4
    (tmp_path / "a.txt").write_text(text)
    folder, corpora = save_model(made, tmp_path / "model"), []
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(8)
    saved.enable_padding(pad_id=5)
    saved.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    saved.save(str(folder / "tokenizer.json"))
    used = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(saved.to_str()), bos_token="<|bos|>")
    used.pad_token = used.bos_token
    used([text, "x"], padding=True, truncation=True, max_length=4)
    before = used.backend_tokenizer.to_str()
    for model in (load_model(folder), load_model(made.module, tokenizer=used)):
        reading = Reading(packing="rows")
        corpora.append(
            load_corpus(str(tmp_path / "a.txt"), model.tokenizer, bos=0, split="all", block_size=128, reading=reading)
        )
        assert corpora[-1].n_text_tokens == len(text)
        assert len(prompt(model, text[:50])) == 51
    assert corpora[0].fingerprint() == corpora[1].fingerprint()
    assert used.backend_tokenizer.to_str() == before
    assert used(text, truncation=True, max_length=4)["input_ids"] == used(text)["input_ids"][:4]


class Lowers(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **options):
        return super()._encode_plus(text.lower(), *args, **options)


class Shifts(PreTrainedTokenizerFast):
    def __call__(self, *args, **options):
        found = super().__call__(*args, **options)
        found["input_ids"] = [i + 1 for i in found["input_ids"]]
        return found


class Only(PreTrainedTokenizerFast):
    """Adds nothing to its parent."""


def test_a_class_that_makes_other_tokens_in_python_is_refused(random_model):
    made = byte_level()
    net = random_model("gpt2", vocab_size=made.get_vocab_size(), n_layers=1).module
    for cls in (Lowers, Shifts):
        with pytest.raises(ModelError, match=rf"(?s)'gpt2' with a .*{cls.__name__}, which makes other tokens of '"):
            load_model(net, tokenizer=cls(tokenizer_object=made, bos_token="a"))
    used = Only(tokenizer_object=made, bos_token="a", pad_token="b", model_max_length=4)
    used(["x", "the fox"], padding=True, truncation=True)
    before = used.backend_tokenizer.to_str()
    load_model(net, tokenizer=used)
    assert used.backend_tokenizer.to_str() == before
    assert len(used("the quick brown fox", truncation=True)["input_ids"]) == 4


def test_tokens_made_special_on_the_object_alone_are_special(random_model):
    made = byte_level()
    made.add_tokens(["<tool>"])
    net = random_model("gpt2", vocab_size=made.get_vocab_size()).module
    used = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="a")
    used.eos_token, used.pad_token, used.sep_token = "}", "~", "<tool>"
    before = used.backend_tokenizer.to_str()
    model = load_model(net, tokenizer=used)
    expected = {made.token_to_id(t) for t in ("a", "}", "~", "<tool>")}
    assert special_ids(model.tokenizer, model.bos) == expected == set(used.all_special_ids)
    assert used.backend_tokenizer.to_str() == before
    assert model.tokenizer.get_vocab() == used.backend_tokenizer.get_vocab()
    text = "f {x} ~ <the>"
    assert encode(model.tokenizer, [text]) == encode(made, [text])
    assert marked(model.tokenizer, [*expected, None, 10_000]) is model.tokenizer


def test_a_tokenizer_whose_copy_has_other_ids_is_refused():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.add_tokens(["<tool>"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the fox and the dog"] * 4, trainer)
    with pytest.raises(ModelError, match=r"(?s)other ids once it is saved.*do: add tokens after"):
        encode(made, ["a<tool>"])


def test_a_tokenizer_with_parts_in_python_is_refused():
    class Upper:
        def normalize(self, text):
            text.uppercase()

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Normalizer.custom(Upper())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(ModelError, match=r"(?s)cannot be copied.*written in Python"):
        own_tokenizer(made)


# ---------------------------------------------------------------------------------------------------------------- index
DOCUMENTS = ["the fox and the\nthe dog. x", " a café 日本\n\n  the 🦊", "dog, the quick", "caf\u00e9the fox"]


@pytest.fixture(scope="module")
def indexes(random_model, random_sae, tmp_path_factory) -> dict[str, FeatureIndex]:
    """Indexes of the same documents, one for each kind of tokenizer."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    for name in ("byte level", "gemma", "llama", "metaspace", "unigram, bytes"):
        found[name] = indexed(kind(name), folder / "rows.jsonl", random_model, random_sae, folder / name / "index")
    return found


def indexed(made: Tokenizer, rows: Path, random_model, random_sae, out: Path) -> FeatureIndex:
    """Of the rows of a file, each in a block, by a model with this tokenizer; its token 1 is the BOS."""
    net = random_model("gpt2", vocab_size=made.get_vocab_size(), n_layers=1).module
    token = made.id_to_token(1)
    model = load_model(net, tokenizer=PreTrainedTokenizerFast(tokenizer_object=made, bos_token=token))
    reading = Reading(packing="rows")
    corpus = load_corpus(str(rows), model.tokenizer, bos=model.bos, split="all", block_size=64, reading=reading)
    [built] = build_index(model, [(random_sae(model), SAERecord("r", "sha256:0"))], corpus, out)
    return FeatureIndex.open(built)


def spans(index: FeatureIndex) -> Iterator[tuple[bytes, list[tuple[int, int, int]]]]:
    """The text of each document, and of each of its tokens where it stands in it: position, begin, end."""
    tokens, special = index.vocabulary
    rows = index.sql('SELECT position, token, document, "offset" FROM tokens WHERE is_text ORDER BY position')
    for number in range(len(index.documents)):
        text, found = b"", []
        for row in rows.filter(pc.equal(rows["document"], number)).to_pylist():
            assert row["token"] not in special
            piece = tokens[row["token"]]
            piece = piece.removeprefix(index.token_texts.prefix) if row["offset"] == 1 else piece
            found.append((row["position"], len(text), len(text) + len(piece)))
            text += piece
        yield text, found


def test_an_index_holds_the_text_of_any_kind_of_tokenizer(indexes):
    for name, index in indexes.items():
        dropped = name in ONE_SPACE  # these make the same tokens of " a" and "a"
        expected = [text.removeprefix(" ") if dropped else text for text in DOCUMENTS]
        assert [text.decode() for text, _ in spans(index)] == expected, name


def test_proxies_read_the_text_of_any_kind_of_tokenizer(indexes):
    for name, index in indexes.items():
        for pattern in (" the", "^the", r"\n", "é", r"\bthe\b", "\N{FOX FACE}"):
            holds = set()
            for text, found in spans(index):
                for match in re.finditer(pattern.encode(), text):
                    holds |= {p for p, begin, end in found if end > match.start() and begin < match.end()}
            got = set(np.flatnonzero(holds_at(regex(pattern), index)).tolist())
            assert got == holds, (name, pattern)
        vocabulary = vocabulary_of(index)
        newlines = vocabulary.ids(["\n"])
        assert len(newlines), name
        assert vocabulary.stops[newlines].all(), name
        assert vocabulary.name(index.token_id("x")) == "x", name
        used = index.sql("SELECT DISTINCT token FROM tokens WHERE is_text")["token"].to_pylist()
        assert {index.token_id("x"), index.token_id(".")} <= set(used), name


@pytest.mark.filterwarnings("ignore:the tokenizer of")
def test_a_text_goes_on_after_what_cannot_be_spelled_and_special_tokens(random_model, random_sae, tmp_path):
    def hits(made: Tokenizer, row: dict[str, object], pattern: str) -> set[int]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "rows.jsonl"
        path.parent.mkdir()
        path.write_text(json.dumps(row))
        index = indexed(made, path, random_model, random_sae, path.parent / "index")
        return set(np.flatnonzero(holds_at(regex(pattern), index)).tolist())

    for name in ("unigram", "wordpiece"):
        made, text = kind(name), "the fox \u672a the dog, \u672a the fox"
        [ids] = encode(made, [text])
        after = {i + 2 for i, token in enumerate(ids) if token == unknown_id(made)}
        assert len(after) == 2
        assert after <= hits(made, {"text": text}, " the"), name
        first = hits(made, {"text": text}, "^the")
        assert first, name
        assert not first & after, name
    text = "<s>the fox</s> the dog</s>the x"
    for name in ("metaspace", "llama"):  # which puts a space before the first text alone, and before each
        used = PreTrainedTokenizerFast(tokenizer_object=kind(name), bos_token="<s>", eos_token="</s>")
        ids = used(text, add_special_tokens=False)["input_ids"]
        second, third = (i + 1 for i, token in enumerate(ids) if token == used.eos_token_id)
        assert {1, second, third} & hits(kind(name), {"tokens": ids}, " the") == {second}, name
        assert 1 in hits(kind(name), {"tokens": ids}, "^the"), name


def test_where_a_text_begins():
    cases = [  # token, offset: 0 is the BOS, 1 cannot be spelled, 2 and 3 are special
        ([0, 5, 5, 2, 5], [0, 1, 2, 3, 4], [1], [1, 4]),
        ([0, 1, 5, 2, 2, 5], [0, 1, 2, 3, 4, 5], [], [5]),
        ([0, 2, 3, 5, 1, 5], [0, 1, 2, 3, 4, 5], [3], [3]),
        ([0, 5, 2, 5, 0, 5], [-1, 2, 3, 4, 0, 1], [5], [3, 5]),
        ([5, 5, 2, 5], [2, 3, 4, 5], [], [3]),
        ([0, 2, 5], [-1, 2, 3], [], [2]),
        ([5, 9, 5], [1, -3, 1], [0, 2], [0, 2]),
    ]
    for token, offset, once, each in cases:
        tokens, offsets = np.array(token), np.array(offset)
        is_text = (tokens > 3) & (offsets > 0)
        for repeats, expected in ((False, once), (True, each)):
            found, _ = _starts(tokens, is_text, offsets, 1, repeats, _Before())
            assert np.flatnonzero(found).tolist() == expected, (token, repeats)
    found, _ = _starts(np.array([1, 5]), np.array([False, True]), np.array([1, 2]), None, False, _Before())
    assert found.tolist() == [False, True]


def test_where_a_text_begins_does_not_depend_on_where_blocks_end():
    rng = np.random.default_rng(0)
    for _ in range(200):
        documents = [rng.choice([1, 2, 3, 5, 6], rng.integers(1, 12), p=[0.1, 0.3, 0.2, 0.2, 0.2]) for _ in range(6)]
        documents = [np.concatenate([np.full(rng.integers(0, 9), 2), d]) for d in documents]
        tokens = np.concatenate(documents)
        offsets = np.concatenate([np.arange(1, len(d) + 1) for d in documents])
        is_text = tokens > 3
        for repeats in (False, True):
            expected = []  # token by token
            for d in documents:
                had = False
                for i, token in enumerate(d):
                    expected.append(token > 3 and (not had or (repeats and i > 0 and d[i - 1] in (2, 3))))
                    had = had or token in (1, 5, 6)
            cut, found, before = int(rng.integers(1, len(tokens))), [], _Before()
            for part in (slice(0, cut), slice(cut, cut), slice(cut, None)):  # a block BOS, of no document, before each
                own = [np.insert(a[part], 0, v) for a, v in ((tokens, 0), (is_text, False), (offsets, -1))]
                starts, before = _starts(own[0], own[1], own[2], 1, repeats, before)
                found += starts[1:].tolist()
            assert found == expected


def test_a_tokenizer_of_an_index_that_cannot_be_read_is_said_wherever_it_is(indexes, tmp_path):
    message = r"(?s)tokenizer.json cannot be read: Model missing.*do: build the index again"
    folder = tmp_path / "index"
    shutil.copytree(indexes["llama"].folder, folder)
    path, manifest = folder / "tokenizer.json", read_json(folder / "manifest.json")
    path.write_text("{}")
    manifest["files"]["tokenizer.json"] = [path.stat().st_size, file_hash(path)]
    write_json(folder / "manifest.json", manifest)
    index = FeatureIndex.open(folder)
    with pytest.raises(IndexFormatError, match=message):
        index.token_texts.pieces("the fox")
    with pytest.raises(IndexFormatError, match=message):
        holds_at('token_in(["the fox and"])', index)
    del manifest["spelling"]["repeats"]
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(IndexFormatError, match=message):
        FeatureIndex.open(folder)
    larger = indexes["gemma"].token_texts
    assert "".join(larger.pieces("the fox")) == "the fox"
    larger = copy.copy(larger)
    larger.__dict__["vocabulary"] = (larger.vocabulary[0][:9], [])
    with pytest.raises(IndexFormatError, match=r"tokenizer.json has the token \d+"):
        larger.pieces("the fox")


def test_an_earlier_index_has_its_bytes_worked_out_again(indexes, tmp_path):
    for name, index in indexes.items():
        folder = tmp_path / name
        shutil.copytree(index.folder, folder)
        path, manifest = folder / "vocabulary.parquet", read_json(folder / "manifest.json")
        table = pq.read_table(path).drop_columns("byte_token")
        pieces = [str(i).encode() for i in range(len(table))]
        pq.write_table(table.set_column(1, "bytes", pa.array(pieces, pa.binary())), path)
        del manifest["spelling"]
        manifest["files"]["vocabulary.parquet"] = [path.stat().st_size, file_hash(path)]
        write_json(folder / "manifest.json", manifest)
        again = FeatureIndex.open(folder)
        own, before = again.token_texts, index.token_texts
        assert (own.vocabulary, own.byte_tokens, own.prefix) == (before.vocabulary, before.byte_tokens, before.prefix)
        assert own.segments == before.segments
        said = {key: index.manifest["spelling"][key] for key in ("prefix", "suffix", "loses")}
        earlier = TokenTexts(index.folder, {"spelling": said}, again._sizes)
        assert not earlier.respelled
        assert not before.prefix or earlier.segments == before.segments
        query = "SELECT token, bytes, special FROM vocabulary ORDER BY token"
        assert again.sql(query) == index.sql(query)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\u2764\ufe0f", "\u2764" + r"\ufe0f"),
        ("a\u00a0b c", r"a\xa0b c"),
        ("\u3164\U000e0041", r"\u3164\U000e0041"),
        ("e\u0301 \u6771", "e\u0301 \u6771"),
    ],
)
def test_what_is_not_drawn_is_written_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown
