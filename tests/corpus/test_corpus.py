import hashlib
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from tokenizers import Tokenizer

from headscope.corpus import (
    HELD_OUT,
    SEPARATOR,
    Corpus,
    Document,
    encode,
    is_held_out,
    load_corpus,
    python_documents,
    read_documents,
)
from headscope.errors import CorpusError

BOS = 0
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).filter(str.strip)


def write_folder(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


def load(source: Path | str, tokenizer: Tokenizer, **options: object) -> Corpus:
    chosen = {"split": "all", "block_size": 8} | options
    return load_corpus(str(source), tokenizer, bos=BOS, **chosen)


# ------------------------------------------------------------------------------------------------------------- packing
@given(texts=st.lists(TEXT, min_size=1, max_size=8), block_size=st.integers(2, 12))
def test_blocks_are_the_stream_of_documents_and_know_where_each_token_came_from(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, texts: list[str], block_size: int
) -> None:
    folder = write_folder(tmp_path_factory.mktemp("texts"), texts)
    ids = [[BOS, *e] for e in encode(tokenizer, texts)]
    stream = [(token, d, o) for d, tokens in enumerate(ids) for o, token in enumerate(tokens)]
    body = block_size - 1
    if len(stream) < body:
        with pytest.raises(CorpusError):
            load(folder, tokenizer, block_size=block_size)
        return
    corpus = load(folder, tokenizer, block_size=block_size)
    n_blocks = len(stream) // body
    assert corpus.blocks.shape == corpus.document.shape == corpus.offset.shape == (n_blocks, block_size)
    assert corpus.documents == tuple(f"{i:03}.txt" for i in range(len(texts)))
    for b in range(n_blocks):
        own = stream[b * body : (b + 1) * body]
        expected = [(BOS, own[0][1], -1), *own]
        got = zip(corpus.blocks[b], corpus.document[b], corpus.offset[b], strict=True)
        assert list(got) == expected


def test_the_sizes_of_a_corpus_count_every_position(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = load(write_folder(tmp_path, ["abcdefgh" * 4]), tokenizer)
    assert corpus.n_tokens == corpus.blocks.size == len(corpus.blocks) * 8
    assert corpus.block_size == 8
    assert (corpus.name, corpus.split, corpus.bos) == (str(tmp_path), "all", BOS)


def test_the_fingerprint_tells_tokens_and_block_sizes_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = write_folder(tmp_path / "one", ["abcdefgh" * 8])
    two = write_folder(tmp_path / "two", ["abcdefgi" * 8])
    prints = {
        load(one, tokenizer).fingerprint(),
        load(two, tokenizer).fingerprint(),
        load(one, tokenizer, block_size=4).fingerprint(),
        load(one, tokenizer, max_tokens=32).fingerprint(),
    }
    assert len(prints) == 4
    assert load(one, tokenizer).fingerprint() in prints
    assert all(p.startswith("sha256:") for p in prints)


@pytest.mark.parametrize("max_tokens", [8, 9, 100, 1000, 10_000])
def test_max_tokens_is_the_largest_whole_number_of_blocks_within_it(
    tmp_path: Path, tokenizer: Tokenizer, max_tokens: int
) -> None:
    folder = write_folder(tmp_path, ["abcdefg" * 10] * 80)  # 80 documents: more than are tokenised at a time
    everything = load(folder, tokenizer)
    corpus = load(folder, tokenizer, max_tokens=max_tokens)
    n_blocks = min(max_tokens // 8, len(everything.blocks))
    assert len(corpus.blocks) == n_blocks
    assert_array_equal(corpus.blocks, everything.blocks[:n_blocks])


@pytest.mark.parametrize("max_tokens", [-1000, 0, 7])
def test_max_tokens_below_a_block_is_refused(tmp_path: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    with pytest.raises(CorpusError, match=r"(?s)expected: .*do: .*max.tokens"):
        load(write_folder(tmp_path, ["abcdefg" * 10]), tokenizer, max_tokens=max_tokens)


# -------------------------------------------------------------------------------------------------------- tokenisation
def test_the_spelling_of_a_special_token_is_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "a<|bos|>b <|bos|>" * 4
    (ids,) = encode(tokenizer, [text])
    assert BOS not in ids
    assert len(ids) == len(text)
    corpus = load(write_folder(tmp_path, [text]), tokenizer, block_size=4)
    assert_array_equal((corpus.blocks[:, 1:] == BOS).sum(), 1)  # the document's own


def test_nothing_is_added_to_a_text(tokenizer: Tokenizer) -> None:
    texts = ["x", " leading", "two\nlines\n"]
    assert [tokenizer.decode(ids) for ids in encode(tokenizer, texts)] == texts


# --------------------------------------------------------------------------------------------------------------- split
def test_the_split_is_pinned() -> None:
    names = ["abc", "argparse", "asyncio.events", "collections", "json", "os", "re", "typing", "zipfile"]
    assert [n for n in names if is_held_out(n)] == ["collections", "json", "re"]


@given(st.text())
def test_the_split_is_sha256_of_the_name_as_a_fraction(name: str) -> None:
    fraction = int(hashlib.sha256(name.encode("utf-8", "ignore")).hexdigest(), 16) / 2**256
    if name.encode("utf-8", "ignore").decode() == name:
        assert is_held_out(name) == (fraction < HELD_OUT)


def test_about_the_stated_share_is_held_out() -> None:
    share = sum(is_held_out(f"document {i}") for i in range(20_000)) / 20_000
    assert share == pytest.approx(HELD_OUT, abs=0.02)


def test_the_two_sides_are_disjoint_and_make_the_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_folder(tmp_path, ["abcdefgh" * 4] * 30)
    sides = {split: set(load(folder, tokenizer, split=split).documents) for split in ("train", "heldout", "all")}
    assert sides["train"] & sides["heldout"] == set()
    assert sides["train"] | sides["heldout"] == sides["all"]
    assert sides["heldout"] == {name for name in sides["all"] if is_held_out(name)}
    assert all(sides.values())


# --------------------------------------------------------------------------------------------------------------- files
def test_a_separator_line_parts_the_documents_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text(SEPARATOR.join(["first\n", "  \n ", "third <|doc|> inside a line"]), encoding="utf-8")
    assert list(read_documents(str(file))) == [
        Document("many.txt:0", "first\n"),
        Document("many.txt:2", "third <|doc|> inside a line"),
    ]


def test_a_folder_is_read_in_order_of_paths_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/.hidden", ".git/x", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert [d.name for d in read_documents(str(tmp_path))] == ["a/z.txt", "b.txt", "c.md"]


def test_names_of_documents_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    here, there = write_folder(tmp_path / "x", ["a"] * 3), write_folder(tmp_path / "y" / "z", ["a"] * 3)
    assert list(read_documents(str(here))) == list(read_documents(str(there)))


@pytest.mark.parametrize("line", ["short\n", "a line of middling length " * 40 + "\n", "x" * 200_000 + "\n"])
def test_a_long_file_is_cut_at_line_ends_and_rejoins_exactly(tmp_path: Path, line: str) -> None:
    text = line * (300_000 // len(line) + 1) + "no line end at the end"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    documents = list(read_documents(str(tmp_path / "long.txt")))
    assert len(documents) > 1
    assert "".join(d.text for d in documents) == text
    assert [d.name for d in documents] == [f"long.txt#{i}" for i in range(len(documents))]
    assert all(d.text.endswith("\n") for d in documents[:-1])
    assert len({d.name for d in documents}) == len(documents)


def test_sections_of_documents_in_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    long = "some words\n" * 20_000
    (tmp_path / "f.txt").write_text(f"short{SEPARATOR}{long}", encoding="utf-8")
    names = [d.name for d in read_documents(str(tmp_path / "f.txt"))]
    assert names[:3] == ["f.txt:0", "f.txt:1#0", "f.txt:1#1"]


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("block_size", [-3, 0, 1])
def test_a_block_without_room_for_text_is_refused(tmp_path: Path, tokenizer: Tokenizer, block_size: int) -> None:
    with pytest.raises(CorpusError, match=r"(?s)block_size.*expected: a whole number from 2.*do: "):
        load(write_folder(tmp_path, ["abc"]), tokenizer, block_size=block_size)


def test_a_missing_path_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CorpusError, match=r"(?s)no corpus .*none.*expected: .*do: "):
        load(tmp_path / "none", tokenizer)


@pytest.mark.parametrize("texts", [[], [""], [" \n\t\n"], [SEPARATOR * 3]])
def test_an_empty_corpus_is_an_error(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(CorpusError, match=r"(?s)no documents.*expected: .*do: "):
        load(write_folder(tmp_path, texts), tokenizer)


def test_a_split_without_documents_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "one.txt").write_text("abcdefgh" * 10)
    empty_side = "train" if is_held_out("one.txt") else "heldout"
    with pytest.raises(CorpusError, match=rf"(?s)no documents.*{empty_side}.*do: .*--split all"):
        load(tmp_path / "one.txt", tokenizer, split=empty_side)


def test_a_corpus_shorter_than_a_block_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CorpusError, match=r"(?s)^4 tokens.*expected: at least one block of 8.*do: "):
        load(write_folder(tmp_path, ["abc"]), tokenizer)


def test_text_that_is_not_utf8_is_an_error_that_says_where(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"(?s)latin\.txt is not UTF-8 \(byte 3\).*expected: .*do: "):
        load(tmp_path, tokenizer)


@pytest.mark.slow
# -------------------------------------------------------------------------------------------------- the corpus `python`
def test_the_python_corpus_is_the_standard_library_without_its_tests() -> None:
    documents = list(python_documents())
    names = [d.name for d in documents]
    assert len(set(names)) == len(names) > 300
    parts = {part for name in names for part in name.split(".")}
    left_out = {"test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "_vendor", "site-packages"}
    assert parts & left_out == set()
    stdlib = Path(sysconfig.get_path("stdlib"))
    by_name = {d.name: d.text for d in documents}
    assert by_name["json.decoder"] == (stdlib / "json" / "decoder.py").read_text(encoding="utf-8")
    assert by_name["json"] == (stdlib / "json" / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_corpus_has_documents_on_both_sides_and_none_on_two(tokenizer: Tokenizer) -> None:
    train, held_out = (
        load("python", tokenizer, split=split, block_size=64, max_tokens=200_000) for split in ("train", "heldout")
    )
    assert len(train.documents) > 5
    assert len(held_out.documents) > 5
    assert set(train.documents) & set(held_out.documents) == set()
    assert train.n_tokens <= 200_000


def test_tokenising_tells_how_far_it_is_when_it_takes_long_and_leaves_nothing_when_it_is_interrupted(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headscope.corpus import load

    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n<|doc|>\n".join("x" * 10 for _ in range(200)))
    told: list[tuple[int, int | None]] = []

    def read(on_tokens: load.OnTokens, max_tokens: int | None = None) -> Corpus:
        source = str(tmp_path / "text.txt")
        return load_corpus(
            source, tokenizer, bos=0, split="all", block_size=8, max_tokens=max_tokens, on_tokens=on_tokens
        )

    def press(_done: int, _total: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "_PATIENCE", -1.0)
    with pytest.raises(KeyboardInterrupt):
        read(press)
    assert not [path for path in (tmp_path / "cache" / "corpora").iterdir() if path.is_dir()]
    read(lambda done, total: told.append((done, total)), 800)
    assert told == [(640, 808), (1280, 808)]
    told.clear()
    read(lambda done, total: told.append((done, total)))
    assert told == [(640, None), (1280, None), (1920, None), (2000, None)]
    told.clear()
    read(lambda done, total: told.append((done, total)))
    assert told == [], "what was tokenised is not again"
    monkeypatch.setattr(load, "_PATIENCE", 3600.0)
    (tmp_path / "text.txt").write_text("y" * 400)
    read(lambda done, total: told.append((done, total)))
    assert told == [], "what is quick is not told of"
