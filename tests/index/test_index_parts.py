"""Parts on disk: read as one sorted table, found damaged, shared by processes."""

import fcntl

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headscope.errors import IndexFormatError, OutputError
from headscope.index.parts import Parts, SortedParts, Workers, locked, read_arrays

ROWS = st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=5)
"""The latents of the rows of each part."""


def write_parts(folder, latents, d_sae=7, base=0):
    """Parts of rows with these latents, positions that rise from part to part, and the table they make."""
    parts, table, position = Parts(folder, len(latents)), [], base
    for number, own in enumerate(latents):
        own = sorted(own)
        positions = np.arange(position, position + len(own))
        position += len(own)
        heads = np.stack([positions, -positions], 1).astype(np.float32)
        parts.write(
            number,
            {
                "counts": np.bincount(own, minlength=d_sae),
                "position": positions,
                "heads": heads,
                "sum": np.array([1.5]),
            },
        )
        table += list(zip(own, positions.tolist(), strict=True))
    return parts, sorted(table)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A new folder at each call: hypothesis runs a test many times."""
    return lambda: tmp_path_factory.mktemp("parts") / "p"


@given(ROWS, st.data())
def test_rows_are_those_of_one_sorted_table(folders, latents, data):
    parts, table = write_parts(folders(), latents, base=data.draw(st.sampled_from([0, 1 << 33])))
    pairs = SortedParts(parts)
    assert pairs.counts.tolist() == np.bincount([j for j, _ in table], minlength=7).tolist()
    assert pairs.totals("sum").tolist() == [1.5 * len(latents)]
    first = data.draw(st.integers(0, 7))
    last = data.draw(st.integers(first, 7))
    rows = pairs.rows(first, last, ["position", "heads"])
    expected = [(j, p) for j, p in table if first <= j < last]
    assert list(zip(rows["latent"].tolist(), rows["position"].tolist(), strict=True)) == expected
    assert np.array_equal(rows["heads"].reshape(-1, 2)[:, 0], np.array([p for _, p in expected], np.float32))
    for latent in range(7):
        found = [p for piece in pairs.slices(latent, ["position"]) for p in piece["position"].tolist()]
        assert found == [p for j, p in table if j == latent]


@given(ROWS, st.integers(1, 9))
def test_ranges_cover_all_latents_and_keep_to_the_limit(folders, latents, limit):
    pairs = SortedParts(write_parts(folders(), latents)[0])
    ranges = list(pairs.ranges(limit))
    assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
    assert ranges[-1][1] == 7
    for first, last in ranges:
        assert first < last
        assert pairs.counts[first:last].sum() <= limit or last == first + 1


def test_ranges_are_never_wider_than_the_keys_they_are_sorted_by(tmp_path):
    d_sae = 3 * (1 << 16) + 5
    parts = Parts(tmp_path, 1)
    own = np.array([0, 70_000, d_sae - 1])
    parts.write(0, {"counts": np.bincount(own, minlength=d_sae), "position": np.array([9, 8, 7])})
    pairs = SortedParts(parts)
    ranges = list(pairs.ranges(100))
    assert max(b - a for a, b in ranges) == 1 << 16
    assert ranges[-1][1] == d_sae
    assert [p for a, b in ranges for p in pairs.rows(a, b, ["position"])["position"].tolist()] == [9, 8, 7]


def test_a_missing_or_damaged_part_is_named(tmp_path):
    parts, _ = write_parts(tmp_path, [[0], [1], [2]])
    path = parts.present()[1]
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(IndexFormatError, match=path.name):
        SortedParts(parts)
    with pytest.warns(UserWarning, match=path.name):
        parts.discard_damaged([0, 1, 2])
    assert sorted(parts.present()) == [0, 2]
    with pytest.raises(IndexFormatError, match="1 parts missing"):
        SortedParts(parts)
    with pytest.raises(IndexFormatError, match="lacks part 1"):
        parts.read(1)


def test_only_own_parts_that_do_not_stand_are_missing(tmp_path):
    parts = Parts(tmp_path, 7)
    assert parts.missing(Workers(1, 3)) == [1, 4]
    for number in (1, 4):
        parts.write(number, {"x": np.array([number])})
    assert parts.missing(Workers(0, 1)) == [0, 2, 3, 5, 6]
    parts.present()[4].write_bytes(b"cut")
    with pytest.warns(UserWarning, match="damaged"):
        assert parts.missing(Workers(0, 1)) == [0, 2, 3, 4, 5, 6]


def test_other_files_are_no_parts(tmp_path):
    parts, _ = write_parts(tmp_path, [[0], [1]])
    for name in (
        "000000.safetensors",
        "x-0123456789abcdef.safetensors",
        ".000001-0123.safetensors",
        "000009-" + "0" * 16,
    ):
        (tmp_path / name).write_text("")
    (tmp_path / ("000009-" + "0" * 16 + ".safetensors")).write_text("")  # of a build with more parts
    assert sorted(parts.present()) == [0, 1]


def test_more_than_a_million_parts_are_found(tmp_path):
    parts = Parts(tmp_path, 2_000_000)
    parts.write(1_234_567, {"x": np.array([1])})
    assert sorted(parts.present()) == [1_234_567]


def test_an_array_without_rows_comes_back(tmp_path):
    parts = Parts(tmp_path, 1)
    parts.write(0, {"a": np.empty((0, 3), np.float32), "b": np.arange(4)})
    found = parts.read(0)
    assert found["a"].shape == (0, 3)
    assert read_arrays(parts.present()[0], ["b"], 1, 3)["b"].tolist() == [1, 2]


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"no safetensors at all")
    with pytest.raises(IndexFormatError):
        read_arrays(tmp_path / "x")


def test_the_environment_says_which_process_this_is(monkeypatch):
    assert Workers.of_environment() == Workers(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert Workers.of_environment() == Workers(2, 5)
    assert sorted(i for rank in range(5) for i in Workers(rank, 5).own(13)) == list(range(13))


def test_a_lock_is_for_one_at_a_time_and_ends_with_its_holder(tmp_path):
    with locked(tmp_path, Workers()):
        with locked(tmp_path, Workers(1, 2)):
            pass
        with (tmp_path / ".lock-0").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OutputError, match="another process"), locked(tmp_path, Workers()):
            pass
    with locked(tmp_path, Workers()):
        pass
