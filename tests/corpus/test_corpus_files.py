"""Which files a folder is: links are followed, no name is refused, nothing is left out without a word."""

import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal

from headscope.corpus import Reading, files, is_held_out, load_corpus, read_documents
from headscope.errors import CorpusError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name!a}\n" * 5)
    return folder


def names(source: Path | str, **reading: str) -> list[str]:
    return [document.name for document in read_documents(str(source), Reading(**reading))]


# ---------------------------------------------------------------------------------------------------------------- links
def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    corpus, other = write(tmp_path / "corpus", "a.txt", "deep/b.txt"), write(tmp_path / "other", "c.txt", "deep/d.txt")
    (corpus / "more").symlink_to(other)
    (corpus / "again").symlink_to(other / "deep")
    (corpus / "inside").symlink_to(corpus / "deep")  # is there already, without a link
    (corpus / "deep" / "up").symlink_to(corpus)
    (corpus / "self").symlink_to(".")
    (corpus / "file.txt").symlink_to(other / "c.txt")
    everything = ["a.txt", "again/d.txt", "deep/b.txt", "file.txt", "more/c.txt"]
    assert names(corpus) == everything
    assert names(corpus / "**" / "*.txt") == everything
    assert names(corpus / "*" / "*.txt") == [
        *("again/d.txt", "deep/b.txt", "more/c.txt", "self/a.txt", "self/file.txt")
    ]
    assert names(corpus / "**") == everything
    assert names(corpus / "mo*" / "**" / "d.txt") == ["more/deep/d.txt"]
    linked = tmp_path / "linked"
    linked.symlink_to(corpus)
    assert names(linked) == everything


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "closed/b.txt")
    scan = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(files.os, "scandir", closed)
    for source in (tmp_path, tmp_path / "**" / "*.txt", tmp_path / "closed"):
        with pytest.raises(CorpusError, match=r"(?s)cannot read '.*closed': Permission denied.*permissions"):
            names(source)
    assert names(tmp_path / "*.txt") == ["a.txt"]
    monkeypatch.undo()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"(?s)cannot read '.*gone.txt': No such file.*where links lead"):
        names(tmp_path)
    assert names(tmp_path / "a*") == ["a.txt"]
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="pipe is neither a file nor a folder"):
        names(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- names
def test_a_name_that_is_not_utf8_is_written_out(tmp_path, tokenizer):
    latin = os.fsdecode(b"caf\xe9.txt")
    write(tmp_path, latin, os.fsdecode(b"d\xe9p/a.txt"))
    for source, expected in ((tmp_path, ("caf\\xe9.txt", "d\\xe9p/a.txt")), (tmp_path / latin, ("caf\\xe9.txt",))):
        for _ in range(2):  # tokenised, then from the cache
            corpus = load_corpus(str(source), tokenizer, bos=0, split="all", block_size=8)
            assert corpus.documents == expected
            json.dumps(corpus.provenance(), ensure_ascii=False).encode()


def test_composed_and_decomposed_names_are_on_the_same_side(tmp_path):
    for i in range(20):
        composed = unicodedata.normalize("NFC", f"\u00e9t\u00e9-\ud55c\uae00-{i}.txt")
        decomposed = unicodedata.normalize("NFD", composed)
        assert composed != decomposed
        found = [names(write(tmp_path / f"{kind}{i}", name)) for kind, name in (("c", composed), ("d", decomposed))]
        assert found == [[composed], [composed]]
        assert names(tmp_path / f"d{i}" / decomposed) == [composed]
        assert is_held_out(found[0][0]) == is_held_out(found[1][0])
    both = write(tmp_path / "both", composed, decomposed)
    with pytest.raises(CorpusError, match="two files named"):
        names(both)


def test_line_ends_are_the_same_text_from_every_kind_of_file(tmp_path, tokenizer):
    text = "one\r\ntwo\nthree\rfour\r\n\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    found = [tmp_path / f"a.{kind}" for kind in ("txt", "jsonl", "parquet")]
    assert [document.text for path in found for document in read_documents(str(path))] == [text] * 3
    corpora = [load_corpus(str(path), tokenizer, bos=0, split="all", block_size=8) for path in found]
    for corpus in corpora:
        assert_array_equal(corpus.blocks, corpora[0].blocks)


# ------------------------------------------------------------------------------------------------- dataset repositories
CARD = "---\nlicense: mit\n{}---\n# A card\n"
CONFIGS = """configs:
- config_name: one
  data_files:
  - split: train
    path: one/*.jsonl
  - split: test
    path: [two/b.jsonl, "two/[a].jsonl"]
- config_name: two
  default: true
  data_files: two/**
- config_name: three
  data_dir: three
"""
SHARDS = ("data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet")


def dataset(folder: Path, *files: str, card: str | None = CARD.format("")) -> Path:
    """Files with two rows each, beside a card and what else is in a repository."""
    for name in files:
        rows, path = [f"{name} row {i}" for i in range(2)], folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": rows}), path)
        else:
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (folder / "LICENSE").write_text("words of a licence")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "README.md").write_text("# No card" if card is None else card)
    return folder


def test_a_copy_of_a_dataset_is_the_rows_of_one_split_and_nothing_else(tmp_path):
    card = CARD.format(CONFIGS)
    own = ("one/a.jsonl", "two/a.jsonl", "two/b.jsonl", "three/train.jsonl", "three/dev.jsonl")
    cases = {
        "shards": (SHARDS, {}, [SHARDS[1], SHARDS[0]]),
        "test": (SHARDS, {"dataset_split": "test"}, [SHARDS[2]]),
        "folders": (("train/b.jsonl", "train/a.jsonl", "test/a.jsonl"), {}, ["train/a.jsonl", "train/b.jsonl"]),
        "deep": (
            ("data/train/x/b.jsonl", "data/valid/a.jsonl"),
            {"dataset_split": "validation"},
            ["data/valid/a.jsonl"],
        ),
        "names": (("train_0.jsonl", "dev-1.jsonl", "test.jsonl"), {"dataset_split": "validation"}, ["dev-1.jsonl"]),
        "no split": (("b.jsonl", "sub/a.jsonl"), {}, ["b.jsonl", "sub/a.jsonl"]),
        "default": (own, {}, ["two/a.jsonl", "two/b.jsonl"]),
        "one": (own, {"dataset_config": "one"}, ["one/a.jsonl"]),
        "one test": (own, {"dataset_config": "one", "dataset_split": "test"}, ["two/b.jsonl", "two/a.jsonl"]),
        "three": (own, {"dataset_config": "three"}, ["three/train.jsonl"]),
    }
    for name, (files_, reading, expected) in cases.items():
        folder = dataset(tmp_path / name, *files_, card=card if files_ == own else CARD.format(""))
        found = [document.text for document in read_documents(str(folder), Reading(**reading))]
        assert found == [f"{file} row {i}" for file in expected for i in range(2)], name
        assert names(folder, **reading) == [f"{file}:{i}" for file in expected for i in range(2)], name
    assert len(names(dataset(tmp_path / "no card", *SHARDS, card=None))) == 4


def test_what_is_unclear_of_a_dataset_is_refused(tmp_path):
    card = CARD.format(CONFIGS)
    cases = {
        "split": (dataset(tmp_path / "a", *SHARDS), {"dataset_split": "dev"}, "(?s)no split 'dev'.*train, test"),
        "config": (dataset(tmp_path / "b", *SHARDS), {"dataset_config": "x"}, "(?s)no configuration 'x'.*no conf"),
        "which": (
            dataset(tmp_path / "c", "one/a.jsonl", card=card.replace("  default: true\n", "")),
            {},
            "(?s)no configuration named.*one, two, three.*--dataset-config",
        ),
        "missing": (
            dataset(tmp_path / "d", "one/a.jsonl", card=card),
            {"dataset_config": "one"},
            r"two/b.jsonl.*no such file",
        ),
        "format": (dataset(tmp_path / "e", "train.csv", "test.csv"), {}, r"(?s)train.csv.*to_parquet"),
        "formats": (dataset(tmp_path / "f", "a.parquet", "b.jsonl"), {}, r"(?s)holds a.parquet, b.jsonl.*to_parquet"),
        "text": (dataset(tmp_path / "g", "a.txt"), {}, r"(?s)holds a.txt.*\*\*/\*.txt"),
        "settings": (
            dataset(tmp_path / "h", "a.jsonl", card=CARD.format("configs:\n- config_name: a\n  field: rows\n")),
            {},
            "(?s)its card sets field.*to_parquet",
        ),
        "yaml": (dataset(tmp_path / "i", "a.jsonl", card="---\nlicense: [mit\n---\n"), {}, "its header is no YAML"),
        "mixed": (dataset(tmp_path / "j", "train.jsonl", "notes.jsonl", card=None), {}, "(?s)split train.*notes.jsonl"),
    }
    for folder, reading, said in cases.values():
        with pytest.raises(CorpusError, match=said):
            names(folder, **reading)


def test_a_folder_of_text_is_none_of_a_dataset(tmp_path):
    prose = write(tmp_path / "prose", "train.md", "test/a.md", "README.md", "LICENSE")
    assert names(prose) == ["LICENSE", "README.md", "test/a.md", "train.md"]
    (prose / "README.md").write_text("---\ntitle: mine\n---\nwords")
    (prose / "rows.jsonl").write_text('{"text": "a row"}\n')
    assert len(names(prose)) == 5
