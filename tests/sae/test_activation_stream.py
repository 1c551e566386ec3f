import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from cases import examples
from headscope.corpus import PADDING, Corpus
from headscope.errors import CorpusError, ModelError, OutputError, TrainingError
from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.training import source, stream
from headscope.sae.training.read_ahead import ReadAhead, reads_ahead
from headscope.sae.training.source import Place, open_source
from headscope.sae.training.stream import ActivationStream
from headscope.site import Site
from small_training import remembering

Z1 = Site("z", 1)
N_BLOCKS, BLOCK = 130, 9  # two blocks a group


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    cache: str | None = None


def config(**changes: Any) -> Config:
    return Config(**({"d_sae": 24, "target_l0": 3.0, "batch": 32, "buffer": 256} | changes))


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return remembering(random_model("gpt_neox"))


@pytest.fixture(scope="module")
def corpus(model: Model, random_corpus: Callable[..., Corpus]) -> Corpus:
    """No two positions after the first have the same z: two tokens after its BOS tell each block from the others."""
    made = random_corpus(model, n_blocks=N_BLOCKS, block_size=BLOCK)
    blocks = made.blocks.copy()
    pairs = np.random.default_rng(0).permutation(90 * 90)[:N_BLOCKS]
    blocks[:, 1], blocks[:, 2] = 1 + pairs % 90, 1 + pairs // 90
    return replace(made, blocks=blocks, offset=np.where(blocks == made.bos, 0, np.maximum(made.offset, 1)))


@pytest.fixture(params=[True, False], ids=["reads ahead", "by itself"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(stream, "reads_ahead", lambda device: request.param)
    return request.param


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "reads_ahead", lambda device: False)


def take(made: ActivationStream, n: int) -> list[Tensor]:
    return [batch.clone() for _, batch in zip(range(n), made, strict=False)]


def keys(rows: Tensor) -> list[bytes]:
    """The bits of each row."""
    return [row.tobytes() for row in rows.to(torch.bfloat16).view(torch.int16).numpy()]


def equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(scope="module")
def blocks(model: Model, corpus: Corpus) -> dict[bytes, list[int]]:
    """All activations that count, by their bits, and the blocks they are of: few have the bits of another."""
    made = open_source(model, corpus, Z1, exclude_bos=True, cache=None)
    found: dict[bytes, list[int]] = defaultdict(list)
    for group in range(made.n_groups):
        numbers = made._blocks[group * made.group_size : (group + 1) * made.group_size]
        per_row = np.repeat(numbers, corpus.is_text(numbers).sum(1))
        for key, block in zip(keys(made.read(group)), per_row.tolist(), strict=True):
            found[key].append(block)
    return found


def all_of(blocks: dict[bytes, list[int]], times: int = 1) -> Counter[bytes]:
    return Counter({key: times * len(of) for key, of in blocks.items()})


# ------------------------------------------------------------------------------------------------------- what comes out
@pytest.mark.parametrize("exclude_bos", [True, False])
def test_a_pass_is_every_activation_of_the_model_once(model: Model, corpus: Corpus, exclude_bos: bool) -> None:
    padded = replace(corpus, offset=np.where(np.arange(BLOCK) < BLOCK - 2, corpus.offset, PADDING))
    made = open_source(model, padded, Z1, exclude_bos=exclude_bos, cache=None)
    rows = torch.cat([made.read(group) for group in range(made.n_groups)])
    blocks = torch.from_numpy(padded.blocks[made._blocks]).long()
    everything = model.read(blocks, [Z1])[Z1]
    mask = torch.from_numpy((padded.is_text() if exclude_bos else padded.offset != PADDING)[made._blocks])
    assert len(rows) == made.n_available == int(mask.sum())
    assert_close(rows.float(), everything[mask], rtol=2**-8, atol=1e-5)  # one run for all has other last bits


def test_the_same_rows_are_read_in_any_pass(model: Model, corpus: Corpus) -> None:
    made = open_source(model, corpus, Z1, exclude_bos=True, cache=None)

    def rows(epoch: int) -> list[tuple[int, bytes]]:
        found = []
        for place, chunk in made.chunks(0, Place(epoch, 0, 0)):
            if place.epoch > epoch:
                return found
            found.append((place.nth, chunk.float().numpy().tobytes()))
        raise AssertionError

    first, second = rows(1), rows(2)
    assert first != second
    assert sorted(chunk for _, chunk in first) == sorted(chunk for _, chunk in second)


@pytest.mark.parametrize("buffer", [64, 200, 100_000])
def test_each_activation_comes_out_once_a_pass_but_for_what_is_in_the_buffer(
    model: Model, corpus: Corpus, blocks: dict[bytes, list[int]], buffer: int, ahead: bool
) -> None:
    made = ActivationStream(model, corpus, Z1, config(buffer=buffer))
    n, capacity = made.n_available, min(buffer, made.n_available)
    assert made.epochs == 0
    out: Counter[bytes] = Counter()
    for n_before, batch in enumerate(made):
        assert batch.shape == (32, made.d_in)
        assert batch.dtype == torch.float32
        read = capacity + n_before * 32  # the slots of a batch are refilled before the next
        assert made.epochs == -(-read // n)
        out.update(keys(batch))
        if made.epochs > 6:
            break
    assert out.total() == read - capacity + 32
    assert out <= all_of(blocks, -(-read // n))  # no more often than it was read
    missing = all_of(blocks, read // n) - out
    assert missing.total() <= capacity - 32  # what was read and is not out is in the buffer


def test_what_was_read_is_what_was_handed_out_and_what_is_held(model: Model, corpus: Corpus, ahead: bool) -> None:
    made = ActivationStream(model, corpus, Z1, config())
    out: Counter[bytes] = Counter()
    for n in range(1, 60):
        batch = next(iter(made))
        out.update(keys(batch))
        held = Counter(keys(made.state()["buffer"])) - Counter(keys(batch))  # those are copies of what was handed out
        read: Counter[bytes] = Counter()
        for _, rows in made._source.chunks(0, Place(1, 0, 0)):
            read.update(keys(rows[: 256 + (n - 1) * 32 - read.total()]))
            if read.total() == 256 + (n - 1) * 32:
                break
        assert out + held == read


def test_a_batch_mixes_blocks(model: Model, corpus: Corpus, blocks: dict[bytes, list[int]]) -> None:
    for buffer, least in [(100_000, 20), (128, 6)]:
        for batch in take(ActivationStream(model, corpus, Z1, config(buffer=buffer)), 20):
            assert len({blocks[key][0] for key in keys(batch)}) > least


def test_a_stream_is_decided_by_its_seed(model: Model, corpus: Corpus, ahead: bool) -> None:
    def first(seed: int) -> list[Tensor]:
        return take(ActivationStream(model, corpus, Z1, config(seed=seed)), 30)

    equal(first(1), first(1))
    assert (first(1)[0] - first(2)[0]).abs().max() > 0.1


def test_reading_ahead_changes_nothing(model: Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(ahead: bool) -> list[Tensor]:
        monkeypatch.setattr(stream, "reads_ahead", lambda device: ahead)
        made = ActivationStream(model, corpus, Z1, config())
        got = []
        for n, batch in zip(range(80), made, strict=False):
            got.append(batch.clone())
            if ahead and n % 7 == 0:
                time.sleep(0.005)
            if n == 40:
                model.logits(torch.zeros(1, 4, dtype=torch.long))  # the caller's model is its own
        return got

    equal(batches(True), batches(False))


def test_a_batch_is_valid_until_the_next_and_its_memory_is_used_again(model: Model, corpus: Corpus) -> None:
    batches = iter(ActivationStream(model, corpus, Z1, config()))
    first = next(batches)
    kept = first.clone()
    time.sleep(0.05)
    assert_close(first, kept, rtol=0, atol=0)
    assert next(batches).data_ptr() == first.data_ptr()


def test_a_sample_is_the_same_at_any_time_and_on_any_rank(
    model: Model, corpus: Corpus, blocks: dict[bytes, list[int]], ahead: bool
) -> None:
    made, untouched = (ActivationStream(model, corpus, Z1, config()) for _ in range(2))
    before = made.sample(100)
    take(made, 15)
    take(untouched, 15)
    assert_close(made.sample(100), before, rtol=0, atol=0)
    equal(take(made, 15), take(untouched, 15))
    assert_close(ActivationStream(model, corpus, Z1, config(), rank=1, ranks=2).sample(100), before, rtol=0, atol=0)
    assert_close(made.sample(40), before[:40], rtol=0, atol=0)
    assert before.shape == (100, made.d_in)
    assert before.dtype == torch.float32
    assert Counter(keys(before)) <= all_of(blocks)
    assert Counter(keys(made.sample(10**6))) == all_of(blocks)
    assert (ActivationStream(model, corpus, Z1, config(seed=1)).sample(100) - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out", "resid_pre"])
def test_any_site_of_saes_is_read(model: Model, corpus: Corpus, kind: Any) -> None:
    site = Site(kind, 0)
    made = ActivationStream(model, corpus, site, config())
    assert made.d_in == model.width(site)
    everything = model.read(torch.from_numpy(corpus.blocks).long(), [site])[site].flatten(0, 1)
    distance, nearest = torch.cdist(batch := take(made, 3)[2], everything).min(1)
    assert (distance < 2**-8 * batch.norm(dim=1)).all()  # bfloat16 keeps 8 bits
    assert len(nearest.unique()) > 20


# --------------------------------------------------------------------------------------------------------------- ranks
def test_ranks_part_a_pass_among_them(model: Model, corpus: Corpus) -> None:
    made = open_source(model, corpus, Z1, exclude_bos=True, cache=None)
    assert made.n_groups > 60
    for epoch in (1, 2):
        parts = []
        for rank in range(3):
            part = []
            for place, rows in made.chunks(5, Place(epoch, 0, 0), rank, 3):
                if place.epoch > epoch:
                    break
                part += keys(rows)
            parts.append(part)
        assert Counter(parts[0] + parts[1] + parts[2]) == Counter(
            key for group in range(made.n_groups) for key in keys(made.read(group))
        )
        assert max(map(len, parts)) - min(map(len, parts)) < 3 * made.group_size * BLOCK


def test_ranks_share_batch_and_buffer_and_hand_out_different_activations(
    model: Model, corpus: Corpus, blocks: dict[bytes, list[int]]
) -> None:
    alone = ActivationStream(model, corpus, Z1, config())
    ranks = [ActivationStream(model, corpus, Z1, config(), rank=rank, ranks=2) for rank in range(2)]
    assert [len(made._buffer) for made in ranks] == [len(alone._buffer) // 2] * 2
    got = [[key for batch in take(made, 12) for key in keys(batch)] for made in ranks]
    assert [len(part) for part in got] == [12 * 16] * 2
    assert Counter(got[0]) + Counter(got[1]) <= all_of(blocks)
    assert ranks[0].n_available == alone.n_available
    assert ranks[0].epochs == 1


def test_ranks_that_cannot_all_read_or_share_are_refused(model: Model, corpus: Corpus) -> None:
    with pytest.raises(TrainingError, match=r"(?s)a batch of 32 for 3 ranks.*expected: .*do: "):
        ActivationStream(model, corpus, Z1, config(), rank=0, ranks=3)
    few = replace(corpus, blocks=corpus.blocks[:10], offset=corpus.offset[:10], document=corpus.document[:10])
    with pytest.raises(TrainingError, match=r"(?s)a corpus of 10 blocks, read 1 at a time.*16 ranks.*do: "):
        ActivationStream(model, few, Z1, config(), rank=0, ranks=16)


# ------------------------------------------------------------------------------------------------------------- to fill
def test_filling_is_told_row_by_row_and_changes_nothing(model: Model, corpus: Corpus, ahead: bool) -> None:
    made, whole = (ActivationStream(model, corpus, Z1, config(buffer=150)) for _ in range(2))
    told: list[tuple[int, int]] = []
    made.fill(lambda done, total: told.append((done, total)))
    assert len(told) > 3
    assert told == sorted(told)
    assert {total for _, total in told} == {150}
    assert told[-1] == (150, 150)
    made.fill(lambda _done, _total: pytest.fail("it is filled"))
    equal(take(made, 12), take(whole, 12))


def test_a_filling_that_was_interrupted_begins_again(model: Model, corpus: Corpus, ahead: bool) -> None:
    made, whole = (ActivationStream(model, corpus, Z1, config(buffer=150)) for _ in range(2))

    def stop(done: int, _total: int) -> None:
        if done > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.fill(stop)
    assert made.epochs == 0
    equal(take(made, 12), take(whole, 12))


def test_a_stream_that_is_filled_and_not_begun_resumes(model: Model, corpus: Corpus) -> None:
    made, resumed = (ActivationStream(model, corpus, Z1, config(buffer=150)) for _ in range(2))
    made.fill()
    resumed.restore(made.state())
    equal(take(resumed, 12), take(made, 12))


def test_a_sample_tells_how_much_of_it_is_read(model: Model, corpus: Corpus) -> None:
    made = ActivationStream(model, corpus, Z1, config())
    for n in (100, 10**6):
        told: list[tuple[int, int]] = []
        size = len(made.sample(n, lambda done, total, told=told: told.append((done, total))))
        assert size == min(n, made.n_available)
        assert {total for _, total in told} == {size}
        assert told == sorted(told)
        assert told[-1] == (size, size)


# ------------------------------------------------------------------------------------------------------------ to resume
@examples(20)
@given(st.integers(0, 90), st.integers(1, 40), st.sampled_from([64, 150, 100_000]), st.integers(0, 3))
def test_a_resumed_stream_goes_on_bit_for_bit(
    model: Model, corpus: Corpus, at: int, n: int, buffer: int, seed: int
) -> None:
    chosen = config(buffer=buffer, seed=seed)
    made = ActivationStream(model, corpus, Z1, chosen)
    take(made, at)
    state = made.state()
    expected = take(made, n)  # going on does not change what was saved
    resumed = ActivationStream(model, corpus, Z1, chosen)
    take(resumed, seed)
    resumed.restore(state)
    equal(take(resumed, n), expected)
    assert resumed.epochs == made.epochs
    assert_close(resumed.state()["buffer"], made.state()["buffer"], rtol=0, atol=0)


@given(st.integers(0, 30))
@examples(8)
def test_a_rank_resumes_too(model: Model, corpus: Corpus, at: int) -> None:
    made, resumed = (ActivationStream(model, corpus, Z1, config(), rank=1, ranks=2) for _ in range(2))
    take(made, at)
    resumed.restore(made.state())
    equal(take(resumed, 20), take(made, 20))


def test_a_state_survives_a_file_of_tensors(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    made, resumed = (ActivationStream(model, corpus, Z1, config()) for _ in range(2))
    take(made, 17)
    save_file({name: torch.as_tensor(value) for name, value in made.state().items()}, tmp_path / "state.safetensors")
    resumed.restore(load_file(tmp_path / "state.safetensors"))
    equal(take(resumed, 20), take(made, 20))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"batch": 16}, {"buffer": 300}, {"exclude_bos": False}])
def test_the_state_of_another_stream_is_refused(model: Model, corpus: Corpus, changes: dict[str, Any]) -> None:
    state = ActivationStream(model, corpus, Z1, config()).state()
    with pytest.raises(TrainingError, match=r"(?s)the state of a stream with \w+ .*expected: .*do: "):
        ActivationStream(model, corpus, Z1, config(**changes)).restore(state)


@pytest.mark.parametrize("where", ["half refilled", "refilled", "shuffled"])
def test_an_interruption_within_a_batch_loses_nothing(
    model: Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, ahead: bool, where: str
) -> None:
    made, whole, resumed = (ActivationStream(model, corpus, Z1, config(buffer=64)) for _ in range(3))
    expected, got = take(whole, 20), take(made, 10)
    refill, slots = made._refill, made._slots

    def stop_in_refill(chosen: Tensor) -> Place:
        refill(chosen[: len(chosen) // 2] if where == "half refilled" else chosen)
        raise KeyboardInterrupt

    def stop_in_shuffling(number: int) -> Tensor:
        if number == 11:
            raise KeyboardInterrupt
        return slots(number)

    with monkeypatch.context() as patch:
        if where == "shuffled":
            patch.setattr(made, "_slots", stop_in_shuffling)
        else:
            patch.setattr(made, "_refill", stop_in_refill)
        with pytest.raises(KeyboardInterrupt):
            take(made, 1)
    resumed.restore(made.state())
    equal(got + take(made, 10), expected)
    equal(got + take(resumed, 10), expected)


# -------------------------------------------------------------------------------------------------------- reading ahead
def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "headscope-read-ahead"]


def test_a_thread_needs_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads, expected in [(1, 1, False), (2, 1, True), (2, 2, False), (16, 8, True), (16, 9, False)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert reads_ahead(torch.device("cpu")) == expected
        assert reads_ahead(torch.device("cuda"))


def test_items_come_in_order_and_no_more_than_two_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in range(20):
            made.append(n)
            yield n

    ahead = ReadAhead(items())
    got = []
    for item in ahead:
        got.append(item)
        time.sleep(0.01)
        assert len(made) <= len(got) + 2
    assert got == list(range(20))
    with pytest.raises(StopIteration):
        next(ahead)


def test_the_thread_computes_with_as_many_threads_as_its_maker() -> None:
    def items() -> Iterator[int]:
        while True:
            yield torch.get_num_threads()

    assert next(ReadAhead(items())) == torch.get_num_threads()


def test_a_failure_in_the_thread_reaches_the_reader_each_time() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError(errno.EIO, "the disk is gone")

    others = workers()
    ahead = ReadAhead(items())
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    ahead.close()
    assert set(workers()) <= set(others)


def test_the_thread_ends_with_its_stream(model: Model, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "reads_ahead", lambda device: True)
    made, others = ActivationStream(model, corpus, Z1, config()), workers()

    def begun() -> threading.Thread:
        take(made, 3)
        (own,) = set(workers()) - set(others)
        return own

    closed = begun()
    made.close()
    assert not closed.is_alive()
    dropped = begun()
    assert dropped is not closed
    del made, begun
    gc.collect()
    assert not dropped.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["return", "sigint"])
def test_a_process_ends_while_the_thread_is_at_work(ending: str) -> None:
    script = f"""
        import os, signal, time
        from headscope.sae.training.read_ahead import ReadAhead

        signal.signal(signal.SIGINT, signal.default_int_handler)  # one in the background inherits that it is ignored

        def items():
            while True:
                time.sleep(0.2)
                yield 1

        ahead = ReadAhead(items())
        print(next(ahead), flush=True)
        if {ending!r} == "sigint":
            next(ahead)
            next(ahead)
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                next(ahead)
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "1\n"
    assert ended.returncode == {"return": 0, "sigint": -signal.SIGINT}[ending]
    assert ended.stderr.splitlines()[-1:] == {"return": [], "sigint": ["KeyboardInterrupt"]}[ending]


# ----------------------------------------------------------------------------------------------------- what is refused
def test_a_corpus_of_less_than_two_batches_is_refused(model: Model, corpus: Corpus) -> None:
    half = (N_BLOCKS * BLOCK - int((corpus.blocks == corpus.bos).sum())) // 2
    with pytest.raises(TrainingError, match=r"(?s)a corpus of [\d,]+ activations.*at least two batches of .*do: "):
        ActivationStream(model, corpus, Z1, config(batch=half + 1, buffer=2 * half + 2))
    ActivationStream(model, corpus, Z1, config(batch=half, buffer=2 * half))


def test_what_the_model_cannot_read_is_refused(
    model: Model, corpus: Corpus, random_corpus: Callable[..., Corpus]
) -> None:
    with pytest.raises(CorpusError, match="blocks of 65 tokens"):
        ActivationStream(model, random_corpus(model, 4, 65), Z1, config())
    with pytest.raises(ModelError, match="layer 2 of"):
        ActivationStream(model, corpus, Site("z", 2), config())
    with pytest.raises(ModelError, match="an SAE of pattern"):
        ActivationStream(model, corpus, Site("pattern", 0), config())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_kept_for_a_look(
    random_model: Callable[..., Model],
    corpus: Corpus,
    ahead: bool,
    value: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source.tempfile, "tempdir", str(tmp_path))
    broken = random_model("gpt_neox")
    broken.module.gpt_neox.layers[0].mlp.dense_4h_to_h.bias.data[2] = value
    made = ActivationStream(broken, corpus, Z1, config())
    match = r"(?s)NaN or infinity in blocks\.1\.attn\.hook_z of random gpt_neox.*not-finite.safetensors.*do: "
    with pytest.raises(TrainingError, match=match) as caught:
        next(iter(made))
    with pytest.raises(TrainingError, match=match):
        made.sample(5)
    path = next(p for p in tmp_path.glob("*/*.safetensors") if str(p) in caught.value.got)
    kept = load_file(path)
    assert_close(kept["tokens"].numpy(), corpus.blocks[kept["blocks"].numpy()].astype(np.int64))
    again = broken.read(kept["tokens"], [Z1])[Z1]
    assert not again.isfinite().all()
    assert_close(kept["activations"], again, rtol=0, atol=0, equal_nan=True)
    take(ActivationStream(broken, corpus, Site("z", 0), config()), 3)


def test_large_activations_whose_sum_overflows_are_not_refused(
    random_model: Callable[..., Model], corpus: Corpus
) -> None:
    large = random_model("gpt_neox")
    projection = large.module.gpt_neox.layers[1].attention.dense
    projection.bias.data[:] = 2e38
    batch = take(ActivationStream(large, corpus, Site("attn_out", 1), config()), 1)[0]
    assert batch.isfinite().all()
    assert batch.sum().isinf()


# --------------------------------------------------------------------------------------------------------------- cache
def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/group-*.safetensors"))


def refuse_to_compute(self: Any, numbers: Any) -> Tensor:
    raise AssertionError("the model is run")


def test_cached_is_uncached_bit_for_bit_and_the_model_is_read_once(
    model: Model, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    cached = config(cache=str(tmp_path))
    expected = take(ActivationStream(model, corpus, Z1, config()), 60)
    equal(take(ActivationStream(model, corpus, Z1, cached), 60), expected)
    assert len(files(tmp_path)) == 65
    assert all(path.suffix in {".safetensors", ".json"} for path in tmp_path.rglob("*") if path.is_file())
    with monkeypatch.context() as patch:
        patch.setattr(source.Source, "_compute", refuse_to_compute)
        equal(take(ActivationStream(model, corpus, Z1, cached), 60), expected)
        take(ActivationStream(model, corpus, Z1, replace(cached, seed=3, batch=16, buffer=100)), 60)
        ActivationStream(model, corpus, Z1, cached).sample(500)
        for rank in range(2):
            take(ActivationStream(model, corpus, Z1, cached, rank=rank, ranks=2), 60)


def test_a_writing_that_was_interrupted_goes_on(
    model: Model, corpus: Corpus, tmp_path: Path, by_itself: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = config(cache=str(tmp_path))
    take(ActivationStream(model, corpus, Z1, cached), 1)
    first = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert 0 < len(first) < 65
    computed = []
    compute = source.Source._compute
    monkeypatch.setattr(source.Source, "_compute", lambda self, n: computed.append(len(n)) or compute(self, n))
    take(ActivationStream(model, corpus, Z1, cached), 60)
    assert len(computed) == 65 - len(first)
    assert {path: path.stat().st_mtime_ns for path in first} == first


def test_other_activations_have_a_cache_of_their_own(
    model: Model, corpus: Corpus, random_model: Callable[..., Model], tmp_path: Path
) -> None:
    blocks = corpus.blocks.copy()
    blocks[3, 4] += 1
    cached = config(cache=str(tmp_path))
    for made in (
        ActivationStream(model, corpus, Z1, cached),
        ActivationStream(random_model("gpt_neox", seed=1), corpus, Z1, cached),
        ActivationStream(model, replace(corpus, blocks=blocks), Z1, cached),
        ActivationStream(model, corpus, Site("z", 0), cached),
        ActivationStream(model, corpus, Z1, replace(cached, exclude_bos=False)),
    ):
        before = len(list(tmp_path.iterdir()))
        made.sample(1)
        assert len(list(tmp_path.iterdir())) == before
    assert len(list(tmp_path.iterdir())) == 5


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


def swap(path: Path) -> None:
    shutil.copy(files(path.parent.parent)[-1], path)


def foreign(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: save_file({"other": torch.zeros(2)}, path), "is damaged"),
        (swap, "holds other activations"),
        (foreign, "holds other activations"),
    ],
    ids=["a bit", "cut off", "empty", "no rows", "another group", "no metadata"],
)
def test_a_file_that_is_damaged_or_foreign_is_refused_by_name(
    model: Model, corpus: Corpus, tmp_path: Path, ahead: bool, damage: Callable[[Path], None], what: str
) -> None:
    cached = config(cache=str(tmp_path))
    expected = take(ActivationStream(model, corpus, Z1, cached), 60)
    broken = files(tmp_path)[7]
    damage(broken)
    with pytest.raises(TrainingError, match=what) as caught:
        take(ActivationStream(model, corpus, Z1, cached), 60)
    assert str(broken) in caught.value.got
    broken.unlink()
    equal(take(ActivationStream(model, corpus, Z1, cached), 60), expected)


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_read(
    model: Model, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    available = ActivationStream(model, corpus, Z1, config()).n_available
    free = 2 * 32 * available
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    with pytest.raises(OutputError, match=rf"(?s)needs [\d,]+ more bytes, where {free:,} are free.*expected: .*do: "):
        ActivationStream(model, corpus, Z1, config(cache=str(tmp_path)))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    take(ActivationStream(model, corpus, Z1, config(cache=str(tmp_path))), 60)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    ActivationStream(model, corpus, Z1, config(cache=str(tmp_path)))  # all of it is there


def test_a_full_disk_leaves_no_half_file(
    model: Model, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    made = ActivationStream(model, corpus, Z1, config(cache=str(tmp_path)))

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            next(iter(made))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["identity.json"]
    equal(take(made, 30), take(ActivationStream(model, corpus, Z1, config()), 30))


def test_a_cache_that_cannot_be_written_is_refused(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        ActivationStream(model, corpus, Z1, config(cache=str(tmp_path / "file" / "cache")))


def test_a_group_without_activations_is_read_over(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    blocks = corpus.blocks.copy()
    blocks[::2] = corpus.bos
    sparse, batches = replace(corpus, blocks=blocks), []
    for cache in (None, str(tmp_path), str(tmp_path)):
        batches.append(take(ActivationStream(model, sparse, Z1, config(buffer=64, cache=cache)), 40))
    assert any(len(load_file(path)["rows"]) == 0 for path in files(tmp_path))
    equal(batches[1], batches[0])
    equal(batches[2], batches[0])
    assert len(set(keys(torch.cat(batches[0])))) > 40 * 32 / 4
