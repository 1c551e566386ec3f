import fcntl
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headscope import scratch
from headscope.artefact import atomic_write, check_output, new_folder, write_json
from headscope.errors import OutputError
from headscope.scratch import clean, held, is_held, move_into_place, scratch_file, scratch_folder

REFUSAL = OutputError("held", expected="nobody", do="wait")


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder has been looked through for litter yet."""
    monkeypatch.setattr(scratch, "_cleaned", set())


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------------------- killed
def killed_while_writing(folder: Path) -> None:
    """Leave what a process leaves that SIGKILL ends in the midst of a folder and of a file."""
    code = """
import os, signal, sys
from pathlib import Path
from headscope.artefact import atomic_write, new_folder
out = Path(sys.argv[1])
with new_folder(out / "sae") as scratch, atomic_write(out / "effects.parquet") as file:
    (scratch / "half").write_text("half")
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=False, timeout=60)
    assert done.returncode == -9


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed_while_writing(tmp_path)
    left = listing(tmp_path)
    assert [re.sub(r"[0-9a-f]{8}", "X", name) for name in left] == [
        ".effects.parquet.X.headscope-scratch",
        ".sae.X.headscope-scratch",
    ]
    (tmp_path / ".sae.mine").write_text("not a scratch")
    write_json(tmp_path / "effects.parquet", {})
    assert listing(tmp_path) == [".sae.mine", "effects.parquet"]


def test_litter_is_removed_before_work_begins(tmp_path: Path) -> None:
    killed_while_writing(tmp_path)
    check_output(tmp_path / "sae", overwrite=False)
    assert listing(tmp_path) == []


def test_a_scratch_in_use_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch_file(tmp_path / "a") as (file, _), scratch_folder(tmp_path / "b") as folder:
        monkeypatch.setattr(scratch, "_cleaned", set())
        clean(tmp_path)
        assert listing(tmp_path) == sorted([file.name, folder.name])
    assert listing(tmp_path) == []


def test_a_folder_is_looked_through_once(tmp_path: Path) -> None:
    clean(tmp_path)
    (tmp_path / ".a.01234567.headscope-scratch").write_text("")
    clean(tmp_path)
    assert len(listing(tmp_path)) == 1


def test_a_scratch_that_is_taken_for_litter_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look between the making of a scratch and its lock."""
    lock, taken = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if len(taken) < 2:
            (found,) = tmp_path.iterdir()
            found.rmdir() if found.is_dir() else found.unlink()
            taken.append(found.name)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_json(tmp_path / "file", {})
    assert listing(tmp_path) == ["file"]
    (tmp_path / "file").unlink()
    taken.clear()
    with new_folder(tmp_path / "run") as folder:
        (folder / "part").write_text("x")
    assert listing(tmp_path) == ["run"]
    assert len(taken) == 2


def test_a_disk_without_locks_can_be_written_and_keeps_its_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_handle: int, _how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".a.01234567.headscope-scratch").write_text("")
    write_json(tmp_path / "file", {})
    with held(tmp_path / "lock", REFUSAL):
        pass
        assert listing(tmp_path) == [".a.01234567.headscope-scratch", "file", "lock"]


# ---------------------------------------------------------------------------------------------------------- displaced
def run_folder(path: Path, name: str) -> Path:
    path.mkdir()
    (path / name).write_text("x")
    return path


@pytest.mark.parametrize("moment", [1, 2])
def test_an_interrupted_replacement_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    out, new, replace, calls = (
        run_folder(tmp_path / "run", "old"),
        run_folder(tmp_path / "new", "new"),
        Path.replace,
        [],
    )

    def interrupted(self: Path, target: Path) -> Path:
        found = replace(self, target)
        calls.append(target)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        move_into_place(new, out)
    assert listing(out) == (["old"] if moment == 1 else ["new"])
    assert not [name for name in listing(tmp_path) if name.startswith(".")]


def test_a_replacement_that_was_killed_half_way_gives_the_old_folder_back(tmp_path: Path) -> None:
    displaced = tmp_path / ".run.01234567.headscope-displaced"
    displaced.mkdir()
    run_folder(displaced / "run", "old")
    with pytest.raises(OutputError, match="already exists"):
        check_output(tmp_path / "run", overwrite=False)
    assert listing(tmp_path) == ["run"]
    assert listing(tmp_path / "run") == ["old"]


# -------------------------------------------------------------------------------------------------------- permissions
@pytest.fixture(params=[0o077, 0o002, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_and_folders_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    with new_folder(tmp_path / "run") as folder:
        write_json(folder / "core.json.gz", {})
    with atomic_write(tmp_path / "page.html") as file:
        file.write(b"x")
    with new_folder(tmp_path / "run", overwrite=True) as folder:
        write_json(folder / "packs" / "0", {})
    for path in tmp_path.rglob("*"):
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~umask, path


def test_names_as_long_as_a_disk_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        write_json(tmp_path / name, {})
        with new_folder(tmp_path / "below" / name):
            pass
    assert len(listing(tmp_path)) == 3


# -------------------------------------------------------------------------------------------------------------- locks
def test_a_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "made" / ".lock"
    with held(lock, REFUSAL):
        assert is_held(lock)
        with pytest.raises(OutputError, match="held"), held(lock, REFUSAL):
            pytest.fail("the block must not run")
    assert not is_held(lock)
    assert listing(tmp_path) == [], "neither the file nor its folder is left"
    lock.parent.mkdir()
    (lock.parent / "something").write_text("x")
    lock.write_text("")  # of a process that was killed
    assert not is_held(lock)
    with held(lock, REFUSAL):
        pass
    assert listing(lock.parent) == ["something"]


def test_a_lock_file_that_its_holder_removes_is_no_lock_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would hold one lock: the one that opened the file before it went, and the next."""
    lock, flock = tmp_path / ".lock", fcntl.flock

    def removed(handle: int, how: int) -> None:
        flock(handle, how)
        lock.unlink()

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(OutputError, match="held"), held(lock, REFUSAL):
        pytest.fail("the block must not run")
