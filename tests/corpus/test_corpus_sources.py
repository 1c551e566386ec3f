"""Every kind of file and dataset is read as what it is, tokenised once, and refused with a reason where damaged."""

import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from headscope.corpus import SEPARATOR, Reading, encode, is_held_out, load, load_corpus, read_documents, text
from headscope.corpus import cache as cache_module
from headscope.errors import CorpusError, OutputError

BOS = 0
TEXTS = [f"document {i} " * 5 for i in range(20)]
ROWS = np.arange(1, 61, dtype=np.uint16).reshape(10, 6)


def read(source, tokenizer, block_size=8, split="all", max_tokens=None, **reading):
    chosen = Reading(**reading)
    return load_corpus(
        str(source), tokenizer, bos=BOS, split=split, block_size=block_size, max_tokens=max_tokens, reading=chosen
    )


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_dataset(folder: Path, table: pa.Table, n_files: int = 2) -> Path:
    """What `save_to_disk` of `datasets` writes."""
    folder.mkdir(parents=True)
    step = -(-len(table) // n_files)
    names = [f"data-{i:05}-of-{n_files:05}.arrow" for i in range(n_files)]
    for i, name in enumerate(names):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table.slice(i * step, step), max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HEADSCOPE_CACHE", str(folder))
    return folder / "corpora"


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """The texts that were given to the tokenizer."""
    seen: list[str] = []

    def counted(tokenizer, texts):
        seen.extend(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(load, "encode", counted)
    return seen


# --------------------------------------------------------------------------------------------------------------- kinds
def test_the_same_text_is_the_same_blocks_from_every_kind_of_source(tmp_path, tokenizer):
    table = pa.table({"id": range(len(TEXTS)), "content": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    write_jsonl(tmp_path / "a.jsonl", table.to_pylist())
    save_dataset(tmp_path / "saved", table)
    (tmp_path / "a.txt").write_text(SEPARATOR.join(TEXTS))
    found = [read(tmp_path / n, tokenizer, field="content") for n in ("a.parquet", "a.jsonl", "saved", "a.txt")]
    for corpus in found[1:]:
        assert_array_equal(corpus.blocks, found[0].blocks)
        assert_array_equal(corpus.offset, found[0].offset)
    assert found[0].documents == tuple(f"a.parquet:{i}" for i in range(20))
    assert found[2].documents == tuple(f"saved:{i}" for i in range(20))


def test_rows_of_token_ids_stay_as_they_are(tmp_path, tokenizer):
    lists = pa.array(ROWS.tolist(), pa.list_(pa.int32()))
    np.save(tmp_path / "ids.npy", ROWS)
    pq.write_table(pa.table({"input_ids": lists}), tmp_path / "ids.parquet")
    write_jsonl(tmp_path / "ids.jsonl", [{"tokens": row} for row in ROWS.tolist()])
    save_dataset(tmp_path / "saved", pa.table({"input_ids": lists}))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel(), pa.int64()), 6)
    pq.write_table(pa.table({"tokens": fixed}), tmp_path / "fixed.parquet")
    for name in ("ids.npy", "ids.parquet", "ids.jsonl", "saved", "fixed.parquet"):
        corpus = read(tmp_path / name, tokenizer, block_size=6)
        assert_array_equal(corpus.blocks, ROWS)
        assert (corpus.reading["packing"], corpus.reading["bos_at"]) == ("rows", "nowhere")
        repacked = read(tmp_path / name, tokenizer, block_size=6, packing="packed", bos_at="block")
        assert_array_equal(repacked.blocks[:, 1:], ROWS.ravel().reshape(12, 5))


def test_a_stream_of_token_ids_is_cut_before_each_bos(tmp_path, tokenizer, monkeypatch):
    np.save(tmp_path / "flat.npy", np.array([BOS, 5, 6, 7, BOS, 8, 9, 10, 11]))
    corpus = read(tmp_path / "flat.npy", tokenizer, block_size=10)
    assert_array_equal(corpus.blocks, [[BOS, BOS, 5, 6, 7, BOS, 8, 9, 10, 11]])
    assert_array_equal(corpus.document, [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    assert corpus.documents == ("flat.npy:0", "flat.npy:1")
    for first in (BOS, 5):  # documents of a stream are as long as they are
        np.save(tmp_path / "long.npy", np.array([first, *[6] * 70_000, BOS, 7, 8]))
        corpus = read(tmp_path / "long.npy", tokenizer, block_size=1000, bos_at="document")
        assert corpus.documents == ("long.npy:0", "long.npy:1")
        assert (corpus.offset == 0).sum() == 1


def test_a_pattern_and_a_folder_of_several_kinds(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "b.txt").write_text("second")
    (tmp_path / "deep" / "notes.md").write_text("other")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "third"}, {"text": ""}, {"text": None}, {"text": "fourth"}])
    assert [d.name for d in read_documents(str(tmp_path / "**" / "*.txt"))] == ["a.txt", "deep/b.txt"]
    names = [d.name for d in read_documents(str(tmp_path))]
    assert names == ["a.txt", "c.jsonl:0", "c.jsonl:3", "deep/b.txt", "deep/notes.md"]


def parted(whole):
    """What a text with lines `<|doc|>` holds: (number, text) of each document that is not blank; how many lines do.

    Written over the whole text: such a line is nobody's text, nor is the line end before it; one with no line between
    it and the one before it, or the beginning, parts nothing.
    """
    documents, n_parting = [""], 0
    for line in whole.splitlines(keepends=True):
        if line.rstrip("\n") != "<|doc|>":
            documents[-1] += line
        elif documents[-1]:
            documents[-1] = documents[-1].removesuffix("\n")
            documents.append("")
            n_parting += 1
    return [(i, text) for i, text in enumerate(documents) if text.strip()], n_parting


@given(st.lists(st.sampled_from(["", "word", "<|doc|>", "x" * 9, " "]), max_size=14), st.booleans())
def test_a_file_is_parted_and_cut_as_its_whole_text_would_be(tmp_path_factory, lines, ends):
    path = tmp_path_factory.mktemp("text") / "f.txt"
    whole = "\n".join(lines) + "\n" * ends
    path.write_text(whole)
    expected = []
    documents, n_parting = parted(whole)
    around = [*zip(["<|doc|>", *lines], [*lines, "<|doc|>"], strict=True)]
    if ("<|doc|>", "<|doc|>") not in around:  # as SEPARATOR.join of texts makes them
        assert documents == [(i, text) for i, text in enumerate(whole.split(SEPARATOR)) if text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_SECTION", 8)
        for i, own in documents:
            pieces = list(text.sections(own))
            name = f"f.txt:{i}" if n_parting else "f.txt"
            named = [(name if len(pieces) == 1 else f"{name}#{j}", piece) for j, piece in enumerate(pieces)]
            expected += [(name, piece) for name, piece in named if piece.strip()]
        assert [(d.name, d.text) for d in read_documents(str(path))] == expected


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        ("<|doc|>\na\n<|doc|>\nb\n", [("f.txt:0", "a"), ("f.txt:1", "b\n")]),
        ("a\n<|doc|>\nb\n<|doc|>\n", [("f.txt:0", "a"), ("f.txt:1", "b")]),
        ("a\n<|doc|>\nb\n<|doc|>", [("f.txt:0", "a"), ("f.txt:1", "b")]),
        ("a\n<|doc|>\n<|doc|>\n<|doc|>\nb", [("f.txt:0", "a"), ("f.txt:1", "b")]),
        ("a\n<|doc|>\n\n<|doc|>\nb", [("f.txt:0", "a"), ("f.txt:2", "b")]),
        ("<|doc|>\na\n", [("f.txt", "a\n")]),
        ("<|doc|>\r\na\r\n<|doc|>\r\nb\r\n<|doc|>", [("f.txt:0", "a"), ("f.txt:1", "b")]),
        ("\ufeff<|doc|>\na", [("f.txt", "a")]),
        ("a <|doc|>\n<|doc|> b", [("f.txt", "a <|doc|>\n<|doc|> b")]),
        ("<|doc|>", []),
    ],
)
def test_a_separator_line_is_never_text(tmp_path, whole, expected):
    (tmp_path / "f.txt").write_bytes(whole.encode())
    assert [(d.name, d.text) for d in read_documents(str(tmp_path / "f.txt"))] == expected


def test_documents_are_parted_by_the_line_asked_for(tmp_path):
    (tmp_path / "f.txt").write_text("one\n====\ntwo\n<|doc|>\nstill two\n")
    found = [d.text for d in read_documents(str(tmp_path / "f.txt"), Reading(document_line="===="))]
    assert found == ["one", "two\n<|doc|>\nstill two\n"]


# --------------------------------------------------------------------------------------------------- split and shuffle
def test_a_row_that_is_there_twice_is_on_one_side(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS + TEXTS[::-1]])
    sides = {s: read(path, tokenizer, split=s).documents for s in ("train", "heldout", "all")}
    number = {s: {int(n.rsplit(":")[-1]) for n in names} for s, names in sides.items()}
    assert number["train"] | number["heldout"] == set(range(40)) == number["all"]
    assert not number["train"] & number["heldout"]
    assert all(39 - n in own for own in number.values() for n in own)
    assert number["heldout"]
    assert number["train"]


def test_shuffling_is_the_same_each_time_and_loses_nothing(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    orders = [read(path, tokenizer, shuffle=4, shuffle_seed=s).documents for s in (0, 0, 1)]
    plain = read(path, tokenizer).documents
    assert orders[0] == orders[1]
    assert len({orders[0], orders[2], plain}) == 3
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(plain)
    came = [int(n.rsplit(":")[-1]) for n in orders[0]]
    assert all(number <= place + 4 for place, number in enumerate(came))  # no document before it was in the buffer


# --------------------------------------------------------------------------------------------------------------- cache
def test_a_text_is_tokenised_once_whatever_the_blocks(tmp_path, tokenizer, tokenised, cache):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    first = read(path, tokenizer)
    assert len(tokenised) == 20
    assert read(path, tokenizer).fingerprint() == first.fingerprint()
    read(path, tokenizer, block_size=16, packing="rows", bos_at="block", max_tokens=64)
    assert len(tokenised) == 20
    assert [p.name for p in cache.iterdir() if p.is_dir() and p.name.startswith(".")] == []


def test_a_changed_file_another_split_or_tokenizer_is_tokenised_again(tmp_path, tokenizer, tokenised):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    read(path, tokenizer)
    tokenised.clear()
    read(path, tokenizer, split="train")
    assert 0 < len(tokenised) < 20
    tokenised.clear()
    write_jsonl(path, [{"text": t[::-1]} for t in TEXTS])
    os.utime(path, ns=(1, 1))
    assert read(path, tokenizer).n_tokens
    assert len(tokenised) == 20


def test_no_more_is_read_than_is_asked_for_and_more_is_read_later(tmp_path, tokenizer, tokenised):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 20])
    few = read(path, tokenizer, max_tokens=400)
    n_few = len(tokenised)
    assert n_few == 64
    assert read(path, tokenizer, max_tokens=200).n_tokens == 200
    assert len(tokenised) == n_few
    everything = read(path, tokenizer)
    assert len(tokenised) == n_few + 400
    again = read(path, tokenizer, max_tokens=400)  # from what now is the whole
    assert again.fingerprint() == few.fingerprint()
    assert_array_equal(few.blocks, everything.blocks[:50])


def test_a_damaged_cache_is_noticed_and_made_again(tmp_path, tokenizer, cache):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    first = read(path, tokenizer).fingerprint()
    [folder] = [p for p in cache.iterdir() if p.is_dir()]
    content = bytearray((folder / "tokens.i32").read_bytes())
    content[5] ^= 1
    (folder / "tokens.i32").write_bytes(content)
    with pytest.warns(UserWarning, match="damaged.*checksum"):
        assert read(path, tokenizer).fingerprint() == first
    assert read(path, tokenizer).fingerprint() == first


def test_what_was_interrupted_leaves_nothing(tmp_path, tokenizer, cache, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])

    def interrupted(tokenizer, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(path, tokenizer)
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written.*HEADSCOPE_CACHE"):
        assert read(path, tokenizer).n_tokens


@pytest.mark.parametrize("named", [None, "~/cache", "~nobody-of-this-name/cache"])
def test_a_home_folder_that_is_not_there_is_done_without(tmp_path, tokenizer, monkeypatch, named):
    """As in a container whose user has neither HOME nor an entry in /etc/passwd."""
    for name in ("HEADSCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if named is not None:
        monkeypatch.setenv("HEADSCOPE_CACHE", named)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr(cache_module, "_temporary", cache_module._temporary.__wrapped__)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    with pytest.warns(UserWarning, match="no home folder.*set HEADSCOPE_CACHE"):
        assert read(path, tokenizer).n_tokens


def test_without_any_folder_to_write_it_is_said_what_to_set(tmp_path, tokenizer, monkeypatch):
    def refuse(**_kwargs):
        raise FileNotFoundError(2, "No usable temporary directory found")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    with (
        pytest.warns(UserWarning, match="cannot be written"),
        pytest.raises(OutputError, match=r"(?s)No usable.*do: set HEADSCOPE_CACHE"),
    ):
        read(path, tokenizer)


# ----------------------------------------------------------------------------------------------------------------- hub
@pytest.fixture
def hub(monkeypatch):
    """A `datasets` without network: it notes what it was asked, and gives rows or raises."""
    asked: list[tuple] = []
    module = types.ModuleType("datasets")

    def load_dataset(name, config=None, *, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        if isinstance(module.answer, Exception):
            raise module.answer
        return iter(module.answer)

    module.load_dataset, module.asked = load_dataset, asked
    module.answer = [{"meta": 1, "text": t} for t in TEXTS]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_dataset_on_the_hub_is_streamed_and_no_further_than_needed(hub, tokenizer, tmp_path):
    local = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    options = {"dataset_config": "plain", "dataset_split": "validation", "dataset_revision": "v1"}
    corpus = read("NeelNanda/c4-code-20k", tokenizer, **options)
    assert hub.asked == [("NeelNanda/c4-code-20k", "plain", "validation", "v1", True)]
    assert_array_equal(corpus.blocks, read(local, tokenizer).blocks)
    assert corpus.reading | options == corpus.reading

    def endless():
        while True:
            yield {"text": TEXTS[0]}

    hub.answer = endless()
    assert read("Skylion007/openwebtext", tokenizer, max_tokens=800).n_tokens == 800


def test_a_dataset_that_was_read_needs_no_network_again(hub, tokenizer):
    first = read("some/data", tokenizer).fingerprint()
    hub.answer = ConnectionError("no network")
    assert read("some/data", tokenizer).fingerprint() == first


class DatasetNotFoundError(FileNotFoundError):
    """As `datasets` has it."""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub\nmore"),
            r"(?s)no file or folder 'a/b' here, so .* the hub cannot be reached.*check the path; .*hf download a/b "
            "--repo-type dataset",
        ),
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            "(?s)there is none of this name.*check the path",
        ),
        (ValueError("Config name is missing."), "(?s)Config name is missing.*--dataset-config"),
        (FileNotFoundError("Dataset 'a/b' is a gated dataset"), "(?s)asks for a login.*hf auth login"),
        ([{"body": "x"}], "(?s)row 0: no field text or input_ids or tokens.*body.*--field"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_said(hub, tokenizer, answer, said):
    hub.answer = answer
    with pytest.raises(CorpusError, match=said):
        read("a/b", tokenizer)


def test_without_the_extra_it_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        CorpusError, match=r"(?s)no file or folder 'a/b' here, so .*`datasets` is not installed.*headscope\[hub\]"
    ):
        read("a/b", tokenizer)


# -------------------------------------------------------------------------------------------------------------- errors
class Trap:
    """Unpickled, it would say so."""

    def __reduce__(self):
        return (os.putenv, ("HEADSCOPE_TRAP", "1"))


def bad_files() -> dict[str, tuple[bytes | np.ndarray, dict, str]]:
    return {
        "a.jsonl": (b'{"text": "x"}\n{"text": \n', {}, r"line 2: .*\n.*one JSON object a line"),
        "b.jsonl": (b"[1, 2]\n", {}, "line 1: list"),
        "c.jsonl": (b'{"body": "x"}\n', {}, r"(?s)no field text.*one of its fields: body.*--field"),
        "d.jsonl": (b'{"text": "x"}\n', {"field": "body"}, r"(?s)no field body.*text"),
        "e.jsonl": (b'{"text": 3.5}\n', {}, r"(?s)float64 of 0 dim.*text, or a list of token ids"),
        "f.jsonl": (b'{"tokens": [1, -4]}\n', {}, "token ids -4 to 1"),
        "g.jsonl": (b'{"tokens": [1, true, "x"]}\n', {}, "text, or a list of token ids"),
        "h.jsonl": (b'{"tokens": [99999999999]}\n', {}, "token ids 99999999999"),
        "i.jsonl": (b"\xff\xfe", {}, "cannot be read"),
        "j.jsonl": (b"", {}, "no documents"),
        "k.npy": (np.ones((2, 3)), {}, "float64 of 2 dimensions"),
        "l.npy": (np.ones((2, 3, 4), int), {}, "of 3 dimensions"),
        "m.npy": (b"\x93NUMPY\x01\x00", {}, "a .npy file of token ids"),
        "n.npy": (pickle.dumps(Trap()), {}, "a .npy file of token ids"),
        "o.npy": (np.array([[1, -2]]), {}, "token ids -2 to 1"),
        "p.parquet": (b"PAR1 cut short", {}, "a whole Parquet or Arrow file"),
        "q.bin": (bytes(range(256)), {}, "is a binary file"),
        "u.json": (
            b'[{"text": "x"}]',
            {},
            r"(?s)u.json is no text, by its ending .json.*NAME.jsonl.*end its name",
        ),
        "u.JSON": (b"{}", {}, r"(?s)u.JSON is no text"),
        "u.ipynb": (b"{}", {}, r"(?s)u.ipynb is no text.*nbconvert"),
        "u.csv": (b"text,n\nwords,1\n", {}, r"(?s)u.csv is no text.*read_csv.*lines=True"),
        "u.tsv": (b"text\tn\nwords\t1\n", {}, r"(?s)u.tsv is no text.*read_table"),
        "u.jsonl.gz": (b"\x1f\x8b", {}, "(?s)u.jsonl.gz is no text.*unpack it"),
        "u.arrow": (b"ARROW1", {}, "(?s)u.arrow is no text.*save_to_disk"),
        "r.txt": (b"abc \xc3", {}, r"not UTF-8 \(byte 4\)"),
        "s.txt": (b"", {}, "no documents"),
        "t.txt": (b"words and words", {"separator": "no such token"}, "a token of the vocabulary"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused_with_what_was_expected(tmp_path, tokenizer, name):
    content, reading, said = bad_files()[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(CorpusError, match=said) as raised:
        read(tmp_path / name, tokenizer, **reading)
    assert raised.value.do
    assert raised.value.expected


def test_a_file_that_is_no_text_is_refused_in_a_folder_too_before_anything_is_read(tmp_path, tokenizer, tokenised):
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "package.json").write_text('{"name": "x"}')
    with pytest.raises(CorpusError, match=rf"(?s)package.json is no text.*leave it out: --corpus '{tmp_path}/\*\*/"):
        read(tmp_path, tokenizer)
    with pytest.raises(CorpusError, match=r"(?s)package.json is no text.*--corpus 'FOLDER/\*\*/\*.txt'"):
        read(tmp_path / "**" / "*", tokenizer)
    assert tokenised == []
    assert read(tmp_path / "**" / "*.txt", tokenizer).documents == ("a.txt",)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "texts/missing.parquet", "texts/missing", "no/*.md"])
def test_the_name_of_a_file_that_is_not_there_is_none_of_a_dataset(tmp_path, tokenizer, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    with pytest.raises(CorpusError, match=r"(?s)no corpus .*: no such file or folder here.*check the path"):
        read(name, tokenizer)
    assert hub.asked == []


def test_objects_in_an_array_are_never_unpickled(tmp_path, tokenizer):
    with (tmp_path / "trap.npy").open("wb") as file:
        np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(CorpusError, match=r"a \.npy file of token ids"):
        read(tmp_path / "trap.npy", tokenizer)


def test_a_line_too_long_to_hold_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 100)
    (tmp_path / "f.txt").write_text("x" * 100)
    with pytest.raises(CorpusError, match="a line of 100 characters or more"):
        read(tmp_path / "f.txt", tokenizer)


def test_text_and_ids_do_not_mix(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("words " * 9)
    np.save(tmp_path / "b.npy", ROWS)
    with pytest.raises(CorpusError, match="text and token ids in one corpus"):
        read(tmp_path, tokenizer)


def test_a_saved_dataset_of_which_rows_are_selected_is_refused(tmp_path, tokenizer):
    folder = save_dataset(tmp_path / "saved", pa.table({"input_ids": [[0, 40, 41]] * 4}))
    state = json.loads((folder / "state.json").read_text())
    for indices in (None, []):
        (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": indices}))
        assert load_corpus(str(folder), tokenizer, bos=0, split="all", block_size=4).n_text_tokens == 8
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(CorpusError, match=r"(?s)a selection of its rows.*flatten_indices"):
        load_corpus(str(folder), tokenizer, bos=0, split="all", block_size=4)


def test_splits_and_files_of_a_saved_dataset_are_checked(tmp_path, tokenizer):
    table = pa.table({"text": TEXTS})
    save_dataset(tmp_path / "d" / "train", table)
    save_dataset(tmp_path / "d" / "test", table.slice(0, 10))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read(tmp_path / "d", tokenizer).documents) == 20
    assert len(read(tmp_path / "d", tokenizer, dataset_split="test").documents) == 10
    with pytest.raises(CorpusError, match=r"(?s)no split 'dev'.*train, test.*--dataset-split"):
        read(tmp_path / "d", tokenizer, dataset_split="dev")
    next((tmp_path / "d" / "train").glob("*.arrow")).unlink()
    with pytest.raises(CorpusError, match=r"arrow is missing"):
        read(tmp_path / "d", tokenizer)


@pytest.mark.parametrize(
    "options", [{"shuffle": -1}, {"shuffle_seed": -1}, {"document_line": ""}, {"document_line": "a\nb"}]
)
def test_choices_that_make_no_sense_are_refused(options):
    with pytest.raises(CorpusError, match=next(iter(options)).split("_")[0]):
        Reading(**options)


def test_the_split_of_rows_is_that_of_their_content(tmp_path):
    [document] = read_documents(str(write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])))
    assert document.key == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert is_held_out(document.key) in (True, False)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ('{"text": [[1, 2], [3]]}', "lists of different lengths"),
        ('{"text": "\\ud800 abc"}', "half of a surrogate pair at character 0"),
    ],
)
def test_rows_that_are_no_text_are_refused_by_name(tmp_path, tokenizer, row, match):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "whole"}}\n{row}\n')
    with pytest.raises(CorpusError, match=match):
        load_corpus(str(file), tokenizer, bos=0, split="all", block_size=8)


def test_the_mark_of_byte_order_is_no_text(tmp_path):
    file = tmp_path / "marked.txt"
    file.write_text("plain text", encoding="utf-8-sig")
    assert [document.text for document in read_documents(str(file))] == ["plain text"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a row"}', encoding="utf-8-sig")
    assert [document.text for document in read_documents(str(rows))] == ["a row"]
