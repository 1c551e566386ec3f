"""Write the Parquet files of an index: encoding of each kind of column, and the tables that can be large."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from headscope.corpus import PADDING, Corpus
from headscope.index.sweep import Rows
from headscope.index.token_texts import vocabulary_table
from headscope.models.hf import Model
from headscope.tokens import Spelling, special_ids

_ROW_GROUP = 1 << 15
_TOKEN_ROW_GROUP = 1 << 14
SMALL_ROW_GROUP = 512
"""Row group size of tables of which a card reads a few rows."""
_FILE_ROWS = 1 << 23  # rows of one file of activations


def write_table(path: Path, table: pa.Table, *, small_groups: bool = False) -> None:
    """Write a table, with small row groups when a card reads a few of its rows."""
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table, row_group_size=SMALL_ROW_GROUP if small_groups else _ROW_GROUP)


def parquet_writer(path: Path, schema: pa.Schema, **options: Any) -> pq.ParquetWriter:
    """Open a writer as for all tables: compressed, with a checksum per page; more options are pyarrow's."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True, **options)


def nullable(values: Float[np.ndarray, " row"], missing: np.ndarray) -> pa.Array:
    """Make a column of numbers; null where they are missing or not finite."""
    return pa.array(values, pa.float64(), mask=missing | ~np.isfinite(values))


def nullable_lists(values: np.ndarray, missing: np.ndarray | None = None, kind: pa.DataType | None = None) -> pa.Array:
    """Make a column of lists from rows; null where a row is missing or not finite."""
    present = np.asarray(np.isfinite(values).all(axis=1) if missing is None else ~missing)
    rows = [values[i] if present[i] else None for i in range(len(values))]
    return pa.array(rows, pa.list_(kind or pa.from_numpy_dtype(values.dtype)))


def lists(values: np.ndarray, lengths: Sequence[int] | np.ndarray, kind: pa.DataType) -> pa.Array:
    """Split consecutive values into lists."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def fixed_lists(values: np.ndarray) -> pa.Array:
    """Make lists of float32 from the rows of a matrix."""
    return lists(values.reshape(-1), np.full(len(values), values.shape[1]), pa.float32())


# -------------------------------------------------------------------------------------------------------------- corpus
def write_corpus(folder: Path, corpus: Corpus, model: Model, losses: Callable[[int, int], np.ndarray] | None) -> None:
    """Write tokens, documents and vocabulary; `losses` gives those of a run of blocks."""
    write_table(
        folder / "documents.parquet",
        pa.table({"document": pa.array(range(len(corpus.documents)), pa.int32()), "name": list(corpus.documents)}),
    )
    write_table(folder / "vocabulary.parquet", _vocabulary_table(model, corpus.special | {corpus.bos}))
    step = max(1, _TOKEN_ROW_GROUP // corpus.block_size)
    writer = None
    for start in range(0, len(corpus.blocks), step):
        chosen = slice(start, min(start + step, len(corpus.blocks)))
        tokens = np.asarray(corpus.blocks[chosen])
        after = np.concatenate([tokens[:, 1:], np.full((len(tokens), 1), -1)], axis=1).reshape(-1)
        position = np.arange(chosen.start, chosen.stop)[:, None] * corpus.block_size + np.arange(corpus.block_size)
        columns = {
            "position": pa.array(position.reshape(-1), pa.int64()),
            "token": pa.array(tokens.reshape(-1), pa.int32()),
            "document": pa.array(corpus.document[chosen].reshape(-1), pa.int32()),
            "offset": pa.array(corpus.offset[chosen].reshape(-1), pa.int32()),
            "is_text": pa.array(corpus.is_text(chosen).reshape(-1)),
            "next_token": pa.array(after, pa.int32(), mask=after < 0),
        }
        if losses is not None:
            loss = losses(chosen.start, chosen.stop).copy()
            loss[:, :-1][corpus.offset[chosen, 1:] == PADDING] = np.nan  # padding has no next token to predict
            columns["loss"] = pa.array(loss.reshape(-1), pa.float32(), mask=np.isnan(loss.reshape(-1)))
        table = pa.table(columns)
        writer = writer or parquet_writer(folder / "tokens.parquet", table.schema)
        writer.write_table(table, row_group_size=step * corpus.block_size)
    if writer:
        writer.close()


def _vocabulary_table(model: Model, special: Collection[int] | None = None) -> pa.Table:
    """Make one row per token of the model; `special` defaults to those of its tokenizer."""
    chosen = special_ids(model.tokenizer, model.bos) if special is None else special
    return vocabulary_table(Spelling.of(model.tokenizer), [i in chosen for i in range(model.spec.d_vocab)])


# --------------------------------------------------------------------------------------------------------- activations
class ActivationWriter:
    """Files of activations, sorted by latent, then position; contributions keep 14 significant bits."""

    def __init__(self, folder: Path, n_heads: int) -> None:
        """Prepare; files are opened as rows come."""
        self._folder, self._n_heads = folder, n_heads
        self._file: pq.ParquetWriter | None = None
        self._n_files = self._rows = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, rows: Rows) -> None:
        """Write consecutive rows."""
        heads = rounded(rows["heads"])
        columns = {
            "latent": pa.array(rows["latent"], pa.int32()),
            "position": pa.array(rows["position"], pa.int64()),
            "activation": pa.array(rows["activation"], pa.float32()),
        } | {f"head_{h}": pa.array(heads[:, h], pa.float32()) for h in range(self._n_heads)}
        table = pa.table(columns)
        if self._file is None:
            floats = ["activation", *(f"head_{h}" for h in range(self._n_heads))]
            self._file = parquet_writer(
                self._folder / f"part-{self._n_files:04d}.parquet",
                table.schema,
                use_dictionary=False,
                column_encoding={"latent": "DELTA_BINARY_PACKED", "position": "DELTA_BINARY_PACKED"}
                | dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
            )
        self._file.write_table(table, row_group_size=_ROW_GROUP)
        self._rows += len(table)
        if self._rows >= _FILE_ROWS:
            self.close()

    def close(self) -> None:
        """Close the current file; an index without activations has one empty file."""
        if self._file is not None:
            self._file.close()
            self._file, self._n_files, self._rows = None, self._n_files + 1, 0

    def finish(self) -> None:
        """Finish the last file, and write an empty one if there is none."""
        if self._file is None and self._n_files == 0:
            empty = {"latent": np.empty(0, np.int64), "position": np.empty(0, np.int64), "activation": np.empty(0)}
            self(empty | {"heads": np.empty((0, self._n_heads), np.float32)})
        self.close()


def rounded(values: Float[np.ndarray, "n head"], bits: int = 10) -> Float[np.ndarray, "n head"]:
    """Round the mantissa to 23 - bits bits."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((raw + np.uint32(1 << (bits - 1))) & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)
