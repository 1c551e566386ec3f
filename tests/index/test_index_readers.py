import threading
import time

import pytest
import torch

from headscope.index.readers import Readers
from headscope.models.load import load_model
from headscope.site import Site


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture
def cores():
    """Two threads for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_replica_shares_weights_and_nothing_else(model):
    replica = model.replica()
    own, shared = model.module.state_dict(), replica.module.state_dict()
    assert all(own[name].data_ptr() == shared[name].data_ptr() for name in own)
    tokens = torch.arange(1, 41).view(2, 20)
    site = Site("z", 0)
    clean = model.logits(tokens)
    with replica.edit({site: torch.zeros_like}):
        assert torch.equal(model.logits(tokens), clean)
        assert not torch.equal(replica.logits(tokens), clean)
    with model.edit({Site("pattern", 1): torch.zeros_like}):  # the attention function of one is not that of the other
        assert torch.equal(replica.logits(tokens), clean)
    assert torch.equal(replica.logits(tokens), clean)


def test_threads_read_all_parts_alone_and_tell_how_far_they_are(model, cores):
    readers, threads, told, both = Readers(model), {}, [], threading.Barrier(2, timeout=60)

    def read(own, part, on_batch):
        threads[part] = threading.get_ident(), own, torch.get_num_threads()
        if part < 2:
            both.wait()  # two at a time, or this breaks
        on_batch(3)

    readers.each(range(7), read, told.append)
    assert sorted(threads) == list(range(7))
    assert told == [3, 6, 9, 12, 15, 18, 21]
    assert {n for *_, n in threads.values()} == {1}
    model_of = dict(value[:2] for value in threads.values())
    assert len(model_of) == len(set(map(id, model_of.values()))) == 2
    assert torch.get_num_threads() == 2


def test_attention_of_two_threads_at_once_is_that_of_one(model, cores):
    tokens = torch.randint(1, 4000, (8, 4, 64), generator=torch.Generator().manual_seed(0))
    alone, found = [model.attention(t, 1) for t in tokens], {}

    def read(own, part, on_batch):
        found[part] = own.attention(tokens[part], 1)
        on_batch(1)

    Readers(model).each(range(8), read, lambda done: None)
    for part, expected in enumerate(alone):
        torch.testing.assert_close(found[part].pattern, expected.pattern, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[part].z, expected.z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_one_thread_ends_all(model, cores, error):
    batches = []

    def read(own, part, on_batch):
        if part == 1:
            raise error("here")
        for _ in range(3000):
            time.sleep(0.01)
            on_batch(1)
            batches.append(part)

    with pytest.raises(error, match="here"):
        Readers(model).each(range(6), read, lambda done: None)
    assert len(batches) < 3000
    assert set(batches) <= {0}


def test_what_a_report_raises_ends_the_reading(model, cores):
    def stop(done):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Readers(model).each(range(6), lambda own, part, on_batch: on_batch(1), stop)


def test_one_part_is_read_by_the_caller_with_all_cores(model, cores):
    seen = []
    Readers(model).each([4], lambda own, part, on_batch: seen.append((own, part, torch.get_num_threads())), print)
    assert seen == [(model, 4, 2)]
    Readers(model).each([], lambda own, part, on_batch: seen.append(part), print)
    assert len(seen) == 1
