"""Padded and packed rows of token ids give what plain `transformers` gives under their masks."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from torch.testing import assert_close

from headscope.corpus import PADDING, Corpus, Reading, load_corpus
from headscope.corpus.padding import companions, pieces
from headscope.corpus.rows import _batch_documents
from headscope.errors import CorpusError
from headscope.models.hf import Model
from headscope.site import Site

BLOCK = 12
TEXTS = [[0, 40, 41, 42, 43], [0, 50, 51, 52, 53, 54, 55, 56], [0, 60, 61]]


def padded(side: str, pad: int = 0, texts: list[list[int]] = TEXTS) -> dict[str, list[list[int]]]:
    """Rows of one length, as a tokenizer pads them, on either side or on both."""
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "special_tokens_mask": []}
    for ids in texts:
        n = BLOCK - len(ids)
        before = {"left": n, "right": 0, "both": n // 2}[side]
        rows["input_ids"].append([pad] * before + ids + [pad] * (n - before))
        rows["attention_mask"].append([0] * before + [1] * len(ids) + [0] * (n - before))
        rows["special_tokens_mask"].append([1] * (before + 1) + [0] * (len(ids) - 1) + [1] * (n - before))
    return rows


def read(path: Path, rows: dict[str, list], tokenizer: Tokenizer, **options: Any) -> Corpus:
    """The corpus of some rows, which is the same from each kind of file."""
    lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pq.write_table(pa.table(rows), path / "rows.parquet")
    options = {"bos": 0, "split": "all", "block_size": BLOCK} | options
    one, other = (load_corpus(str(path / f"rows.{kind}"), tokenizer, **options) for kind in ("jsonl", "parquet"))
    assert np.array_equal(one.blocks, other.blocks)
    assert np.array_equal(one.offset, other.offset)
    return one


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_activations_are_those_of_plain_transformers_under_the_mask(
    side: str, random_model: Callable[..., Model], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Learned, rotated and windowed positions; ids are padded with the BOS and with a token of text."""
    rows = padded(side)
    ids, mask = (torch.tensor(rows[name]) for name in ("input_ids", "attention_mask"))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    corpus = read(tmp_path, rows, tokenizer)
    assert corpus.n_padding == int((mask == 0).sum())
    assert corpus.n_text_tokens == sum(len(text) - 1 for text in TEXTS)
    real = torch.from_numpy(corpus.offset != PADDING)
    assert [row[own].tolist() for row, own in zip(torch.from_numpy(corpus.blocks), real, strict=True)] == TEXTS
    for family in ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "gemma2"):
        model = random_model(family, dtype=torch.float64)
        kept: list[torch.Tensor] = []
        projection = model._blocks[1].output_projection
        handle = projection.register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(args[0]))
        with torch.no_grad():
            model.module(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        handle.remove()
        z = model.read(torch.from_numpy(corpus.blocks.astype(np.int64)), [Site("z", 1)])[Site("z", 1)]
        assert_close(z[real], kept[0][mask.bool()], rtol=1e-6, atol=1e-6)


def test_what_pads_and_on_which_side_changes_nothing_that_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = [read(tmp_path, padded(side), tokenizer) for side in ("left", "right", "both")]
    rows = {name: padded("left", 70)[name] for name in ("input_ids", "attention_mask")}
    found.append(read(tmp_path, rows, tokenizer))
    assert len({corpus.fingerprint() for corpus in found}) == 1


def test_a_text_is_on_the_same_side_of_the_split_however_it_is_padded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [[0, 40 + i, 41 + i] for i in range(20)]
    for split in ("train", "heldout"):
        found = [read(tmp_path, padded(s, texts=texts), tokenizer, split=split) for s in ("left", "right", "both")]
        assert len({corpus.fingerprint() for corpus in found}) == 1
        assert 0 < len(found[0].blocks) < len(texts)


def test_packed_rows_are_one_document_a_sequence(
    random_model: Callable[..., Model], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Where positions begin anew and there is no mask, transformers keeps sequences apart."""
    row = [token for text in TEXTS for token in text]
    positions = [i for text in TEXTS for i in range(len(text))]
    corpus = read(tmp_path, {"input_ids": [row], "position_ids": [positions]}, tokenizer)
    assert len(corpus.documents) == len(TEXTS)
    real = torch.from_numpy(corpus.offset != PADDING)
    model = random_model("llama", dtype=torch.float64)
    kept: list[torch.Tensor] = []
    handle = model._blocks[1].output_projection.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    with torch.no_grad():
        model.module(input_ids=torch.tensor([row]), position_ids=torch.tensor([positions]), use_cache=False)
    handle.remove()
    z = model.read(torch.from_numpy(corpus.blocks.astype(np.int64)), [Site("z", 1)])[Site("z", 1)]
    assert_close(z[real], kept[0][0], rtol=1e-6, atol=1e-6)


def test_masks_and_positions_that_have_no_equal_without_padding_are_refused_by_name() -> None:
    ids = np.arange(10, 16, dtype=np.int32)
    for beside, message in [
        ({"attention_mask": [1, 1, 0, 1, 1, 1]}, "padding between tokens, at position 2"),
        ({"attention_mask": [1, 1, 1, 2, 2, 2]}, "has 2 in its attention_mask"),
        ({"attention_mask": [1, 1, 1]}, r"6 token ids and a attention_mask of shape \(3,\)"),
        ({"attention_mask": [[1] * 6] * 6}, r"attention_mask of shape \(6, 6\)"),
        ({"attention_mask": [[1], [1, 1]]}, "attention_mask of shape"),
        ({"attention_mask": ["1"] * 6}, "attention_mask of shape"),
        ({"special_tokens_mask": [0, 0, 0, 0, 0, -1]}, "has -1 in its special_tokens_mask"),
        ({"position_ids": [3, 4, 5, 6, 7, 8]}, "position_ids that begin at 3"),
        ({"position_ids": [0, 1, 2, 5, 6, 7]}, "position_ids that begin at 5"),
        ({"position_ids": [5, 4, 3, 2, 1, 0]}, "position_ids that begin at 5"),
        ({"position_ids": range(6), "attention_mask": [0, 0, 1, 1, 1, 1]}, "position_ids that begin at 2"),
        ({"position_ids": [0, 1, 2, 0, 1, 2], "attention_mask": [1] * 6}, "2 sequences by its position_ids"),
        ({"position_ids": [0, 0, 0, 0, 1, 2]}, "sequences of one token by its position_ids, as padding looks"),
        ({"attention_mask": None}, "no attention_mask"),
        ({"attention_mask": [0.0] * 6}, r"0\.0 alone in its attention_mask"),
        ({"position_ids": [0.4, 1.4, 2.4, 3.4, 4.4, 5.4]}, "position_ids that are no whole numbers"),
    ]:
        with pytest.raises(CorpusError, match=message):
            pieces(ids, beside, "row 3")


def test_masks_that_change_nothing_and_rows_of_padding_alone() -> None:
    ids = np.arange(10, 16, dtype=np.int32)
    for beside in (
        {},
        {"attention_mask": [1] * 6, "position_ids": range(6)},
        {"attention_mask": [True] * 6},
        {"attention_mask": [1.0] * 6},
    ):
        (piece,) = pieces(ids, beside, "row")
        assert piece.ids.tolist() == ids.tolist()
    assert [len(p.ids) for p in pieces(ids, {"attention_mask": [0] * 6}, "row")] in ([], [0])
    (piece,) = pieces(ids, {"attention_mask": [0, 0, 1, 1, 1, 0], "position_ids": [1, 1, 0, 1, 2, 1]}, "row")
    assert piece.ids.tolist() == [12, 13, 14]


def test_columns_belong_together_by_their_names() -> None:
    names = ["chosen_input_ids", "chosen_attention_mask", "attention_mask", "tokens", "position_ids"]
    assert companions("chosen_input_ids", names) == {"attention_mask": "chosen_attention_mask"}
    assert companions("tokens", names) == {"attention_mask": "attention_mask", "position_ids": "position_ids"}


def test_columns_that_say_more_and_are_not_read_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = {"input_ids": [[0, 40, 41]], "labels": [[0, 40, 41]], "loss_mask": [[0, 0, 1]], "length": [3]}
    read(tmp_path, rows, tokenizer)
    for name in (
        "Attention_Mask",
        "padding_mask",
        "pad_mask",
        "input_ids_attention_mask",
        "seq_lengths",
        "cu_seq_lens_q",
    ):
        with pytest.raises(
            CorpusError, match=rf"(?s){name} beside the token ids in input_ids, which is not read.*rename"
        ):
            read(tmp_path, rows | {name: [[1, 1, 1]]}, tokenizer)
    named = {"x_input_ids": [[0, 40, 41]], "attention_mask": [[0, 1, 1]]}
    with pytest.raises(CorpusError, match="attention_mask beside the token ids in x_input_ids"):
        read(tmp_path, named, tokenizer, reading=Reading(field="x_input_ids"))
    read(tmp_path, named | {"input_ids": [[0, 40, 41]]}, tokenizer, reading=Reading(field="x_input_ids"))
    texts = {"text": ["the fox " * 20], "attention_mask": [[1, 1]], "seq_lengths": [[2]]}
    assert read(tmp_path, texts, tokenizer, bos=0).n_text_tokens > 0


def test_lists_of_every_arrow_type_are_read_with_their_masks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    expected = read(tmp_path, rows := padded("left", pad=70), tokenizer)
    ids, masks = rows["input_ids"], rows["attention_mask"]
    for i, kind in enumerate((pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.int32(), BLOCK))):
        pq.write_table(pa.table({"input_ids": pa.array(ids, kind), "attention_mask": masks}), tmp_path / f"{i}.parquet")
    views = pa.RecordBatch.from_pydict(
        {"input_ids": pa.array(ids, pa.list_view(pa.int64())), "attention_mask": pa.array(masks)}
    )
    found = [
        load_corpus(str(tmp_path / f"{i}.parquet"), tokenizer, bos=0, split="all", block_size=BLOCK) for i in range(3)
    ]
    for corpus in found:
        assert corpus.n_text_tokens == expected.n_text_tokens
    documents = list(_batch_documents([views], "rows", "input_ids", views.schema))
    assert [document.ids.tolist() for document in documents] == TEXTS


def test_names_that_say_more_are_known_in_many_spellings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = {"input_ids": [[0, 40, 41, 9]]}
    for name in (
        *("mask", "masks", "input_mask", "token_mask", "valid_mask", "src_mask", "attn_mask", "attention_masks"),
        *("is_padding", "pad", "nonpad", "segment_ids", "sequence_id", "doc_ids", "document_ids", "max_seqlen"),
        *("sequence_lengths", "segment_positions", "inputs_position", "position_id", "positions", "lengths"),
    ):
        with pytest.raises(CorpusError, match=f"{name} beside the token ids in input_ids, which is not read"):
            read(tmp_path, rows | {name: [[1, 1, 1, 0]]}, tokenizer)
    for name in ("loss_mask", "completion_mask", "assistant_masks", "token_type_ids", "labels"):
        assert read(tmp_path, rows | {name: [[1, 1, 1, 0]]}, tokenizer).n_text_tokens == 3
    for name, value in {"doc_id": "a", "sequence_id": 7, "labels": 2, "prompt_length": 2, "length": 4}.items():
        assert read(tmp_path, rows | {name: [value]}, tokenizer).n_text_tokens == 3


def test_a_row_that_is_longer_than_it_says_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids, mask = [0, 40, 41, 9, 9], [1, 1, 1, 0, 0]
    for name in ("length", "len", "seq_len", "seq_length", "sequence_length", "num_tokens", "n_tokens", "token_count"):
        with pytest.raises(CorpusError, match=rf"(?s)has 5 token ids and says {name} = 3, as padding looks.*mask"):
            read(tmp_path, {"input_ids": [ids], name: [3]}, tokenizer)
        rows = {"input_ids": [ids], "attention_mask": [mask], name: [3]}
        assert read(tmp_path, rows, tokenizer).n_text_tokens == 2


def test_labels_and_positions_that_show_padding_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = [0, 40, 41, 9, 9]
    for labels, row in (([0, 40, 41, -100, -100], ids), ([-100, -100, 0, 40, 41], [9, 9, 0, 40, 41])):
        with pytest.raises(CorpusError, match=r"one token again and again, labelled -100, as padding looks"):
            read(tmp_path, {"input_ids": [row], "labels": [labels]}, tokenizer)
        mask = [int(label != -100) for label in labels]
        rows = {"input_ids": [row], "labels": [labels], "attention_mask": [mask]}
        assert read(tmp_path, rows, tokenizer).n_text_tokens == 2
    prompt = {"input_ids": [[0, 40, 41, 42]], "labels": [[-100, -100, 41, 42]]}
    assert read(tmp_path, prompt, tokenizer).n_text_tokens == 3
    with pytest.raises(CorpusError, match="a last sequence of one token again and again"):
        read(tmp_path, {"input_ids": [ids], "position_ids": [[0, 1, 2, 0, 1]]}, tokenizer)


def test_masks_beside_some_rows_only_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids, mask = [0, 40, 41, 9, 9], [1, 1, 1, 0, 0]
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}))
    )
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.table({"input_ids": [ids], "attention_mask": [mask]}), shards / "a.parquet")
    pq.write_table(pa.table({"input_ids": [ids]}), shards / "b.parquet")
    for source in (tmp_path / "lines.jsonl", shards):
        with pytest.raises(
            CorpusError, match=r"(?s)attention_mask beside the token ids of some rows.*the same columns"
        ):
            load_corpus(str(source), tokenizer, bos=0, split="all", block_size=BLOCK)


def test_arrays_of_what_stands_beside_token_ids_are_not_read_as_such(tokenizer: Tokenizer, tmp_path: Path) -> None:
    np.save(tmp_path / "input_ids.npy", np.array([[0, 40, 41, 9, 9]] * 3))
    for name in ("attention_mask", "masks", "labels", "train_position_ids", "token_type_ids", "seq_lengths"):
        np.save(tmp_path / f"{name}.npy", np.array([[1, 1, 1, 0, 0]] * 3))
        with pytest.raises(CorpusError, match=rf"(?s){name}.npy holds no token ids by its name.*input_ids.npy"):
            load_corpus(str(tmp_path), tokenizer, bos=0, split="all", block_size=BLOCK)
        (tmp_path / f"{name}.npy").unlink()
    load_corpus(str(tmp_path), tokenizer, bos=0, split="all", block_size=BLOCK)


def test_arrays_that_are_masks_by_what_they_hold_or_columns_by_their_names(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    np.save(tmp_path / "input_ids.npy", np.array([[0, 40, 41, 9, 9]] * 3))
    for name, values, message in [
        ("attention", [[1, 1, 1, 0, 0]] * 3, "attention.npy holds 0 and 1 alone, as a mask does"),
        ("valid", [1, 1, 1, 0, 0], "valid.npy holds 0 and 1 alone"),
        ("positions", [[0, 1, 2, 3, 4]] * 3, "positions.npy holds no token ids by its name"),
        ("doc_ids", [[3, 3, 3, 4, 4]] * 3, "doc_ids.npy holds no token ids by its name"),
        ("cu_seqlens", [0, 5, 10], "cu_seqlens.npy holds no token ids by its name"),
    ]:
        np.save(tmp_path / f"{name}.npy", np.array(values))
        with pytest.raises(CorpusError, match=message):
            load_corpus(str(tmp_path), tokenizer, bos=0, split="all", block_size=BLOCK)
        (tmp_path / f"{name}.npy").unlink()


def test_the_mask_that_is_named_as_the_ids_are_is_not_passed_over(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = {"prompt_ids": [[9, 9, 0, 40]], "prompt_mask": [[0, 0, 1, 1]], "completion_ids": [[40, 41]]}
    with pytest.raises(CorpusError, match="prompt_mask beside the token ids in prompt_ids, which is not read"):
        read(tmp_path, rows, tokenizer, reading=Reading(field="prompt_ids"))
    assert read(tmp_path, rows, tokenizer, reading=Reading(field="completion_ids")).n_text_tokens == 2


def test_token_ids_that_are_written_as_text_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for field, written in (("input_ids", "[0, 40, 41]"), ("input_ids", "0 40 41"), ("tokens", "[ 0 40\n 41]")):
        for read_from in ("jsonl", "parquet"):
            path = tmp_path / f"rows.{read_from}"
            if read_from == "jsonl":
                path.write_text(json.dumps({field: written}))
            else:
                pq.write_table(pa.table({field: [written]}), path)
            with pytest.raises(CorpusError, match=r"(?s)token ids stored as text.*json\.loads"):
                load_corpus(str(path), tokenizer, bos=0, split="all", block_size=BLOCK)
    assert read(tmp_path, {"tokens": ["12 foxes and the dogs"]}, tokenizer).n_text_tokens > 0
    assert read(tmp_path, {"text": ["[0, 40, 41] and 9 more"]}, tokenizer).n_text_tokens > 0


def test_token_ids_that_the_tokenizer_lacks_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    largest = max(tokenizer.get_vocab().values())
    assert read(tmp_path, {"input_ids": [[0, 40, largest]]}, tokenizer).n_text_tokens == 2
    with pytest.raises(CorpusError, match=rf"has the token id {largest + 1}\s.*at most {largest}, the last id"):
        read(tmp_path, {"input_ids": [[0, 40, largest + 1]]}, tokenizer)


def test_rows_that_look_padded_and_have_no_mask_are_told_each_time(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [[0, *range(40, 45 + i)] for i in range(4)]
    for pad, side, told in ((70, "right", 4), (70, "left", 4), (0, "left", 4), (0, "right", 0)):
        for i, columns in enumerate((["input_ids"], ["input_ids", "attention_mask"])):
            rows = padded(side, pad, texts)
            path = tmp_path / f"{pad}{side}{i}.parquet"
            pq.write_table(pa.table({name: rows[name] for name in columns}), path)
            for _ in range(2):  # read, and from the cache
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    load_corpus(str(path), tokenizer, bos=0, split="all", block_size=BLOCK)
                said = [str(warning.message) for warning in found]
                assert len(said) == (told > 0 and i == 0), (pad, side, said)
                assert not said or "4 of 4 documents in" in said[0]
    read(tmp_path, {"input_ids": [*texts * 3, [0, 40, 7, 7, 7], [0, 41, 7, 7, 7]]}, tokenizer)  # as text may end


def test_a_row_that_marks_text_as_special_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = {"input_ids": [[0, 40, 41]], "special_tokens_mask": [[1, 0, 1]]}
    with pytest.raises(CorpusError, match=r"(?s)marks the token ids \[41\] in its special_tokens_mask"):
        read(tmp_path, rows, tokenizer)
