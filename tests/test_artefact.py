import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headscope.artefact import (
    PAGE_MARK,
    atomic_write,
    check_holds_only,
    check_output,
    check_run_folder,
    file_hash,
    new_folder,
    read_json,
    write_json,
)
from headscope.errors import OutputError

OURS = "core.json.gz"
"""A folder that holds it is an exported page."""
DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_with(error: OSError) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    return fail


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -------------------------------------------------------------------------------------------------------- atomic_write
def test_atomic_write_makes_missing_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b") as file:
        file.write(b"whole")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b").read_bytes() == b"whole"
    assert listing(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_atomic_write_leaves_nothing_when_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert listing(tmp_path) == []


def test_atomic_write_keeps_the_old_file_when_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def write() -> None:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


def test_atomic_write_replaces_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_full_disk_is_an_output_error_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr("headscope.artefact.os.fsync", fail_with(DISK_FULL))
    with pytest.raises(OutputError, match=r"(?s)No space left on device.*expected: .*do: "):  # noqa: SIM117
        with atomic_write(tmp_path / "file") as file:
            file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


@pytest.mark.parametrize("claim", [atomic_write, new_folder])
def test_a_path_below_a_file_is_an_output_error(tmp_path: Path, claim: Callable[[Path], Any]) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"(?s)cannot write .*/file/below.*expected: .*do: "):  # noqa: SIM117
        with claim(tmp_path / "file" / "below"):
            pytest.fail("the block must not run")


@pytest.mark.parametrize(("claim", "maker"), [(atomic_write, "open"), (new_folder, "mkdir")])
def test_a_read_only_folder_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: Callable[[Path], Any], maker: str
) -> None:
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(f"headscope.scratch.os.{maker}", fail_with(refused))
    with pytest.raises(OutputError, match="Permission denied"):  # noqa: SIM117
        with claim(tmp_path / "out"):
            pytest.fail("the block must not run")


# ---------------------------------------------------------------------------------------------------------- new_folder
def test_new_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    with new_folder(out) as scratch:
        (scratch / "part").write_text("x")
        assert not out.exists()
    assert listing(out) == ["part"]
    assert listing(tmp_path / "runs") == ["one"]


def test_new_folder_takes_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    with new_folder(out) as scratch:
        (scratch / "part").write_text("x")
    assert listing(out) == ["part"]
    assert listing(tmp_path) == ["empty"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_new_folder_refuses_what_holds_something(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    if kind == "folder":
        out.mkdir()
        (out / "old").write_text("x")
    else:
        out.write_text("x")
    with pytest.raises(OutputError, match=r"(?s)already exists.*expected: .*do: .*--overwrite"):  # noqa: SIM117
        with new_folder(out):
            pytest.fail("the block must not run")
    assert out.exists()
    assert listing(tmp_path) == ["run"]


def test_new_folder_replaces_the_old_one_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / OURS).write_text("x")
    with new_folder(out, overwrite=True) as scratch:
        (scratch / "new").write_text("y")
        assert listing(out) == [OURS]
    assert listing(out) == ["new"]
    assert listing(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_new_folder_keeps_the_old_one_when_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / OURS).write_text("x")

    def write() -> None:
        with new_folder(out, overwrite=True) as scratch:
            (scratch / "new").write_text("y")
            raise error

    with pytest.raises(type(error)):
        write()
    assert listing(out) == [OURS]
    assert listing(tmp_path) == ["run"]


def test_new_folder_keeps_the_old_one_when_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / OURS).write_text("x")
    replace = Path.replace

    def refuse_the_new_one(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise DISK_FULL
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_the_new_one)
    with pytest.raises(OutputError):  # noqa: SIM117
        with new_folder(out, overwrite=True) as scratch:
            (scratch / "new").write_text("y")
    assert listing(out) == [OURS]
    assert listing(tmp_path) == ["run"]


def test_a_disk_that_fills_inside_new_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"):  # noqa: SIM117
        with new_folder(tmp_path / "run"):
            raise DISK_FULL
    assert listing(tmp_path) == []


def test_check_output_lets_pass_what_is_new_or_empty(tmp_path: Path) -> None:
    check_output(tmp_path / "new", overwrite=False)
    check_output(tmp_path, overwrite=False)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError, match="--overwrite"):
            check_output(path, overwrite=False)


# --------------------------------------------------------------------------------------------------------- overwriting
def sae_folder(path: Path) -> Path:
    path.mkdir()
    write_json(path / "cfg.json", {"metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.attn.hook_z"}})
    for name in ("sae_weights.safetensors", "quality.json"):
        (path / name).touch()
    return path


def index_folder(path: Path) -> Path:
    path.mkdir()
    write_json(path / "manifest.json", {"format_version": 3, "files": {"tokens.parquet": [1, "sha256:0"]}})
    (path / "tokens.parquet").touch()
    (path / "labels.jsonl").touch()
    for name in ("columns", "heads", "sae"):
        (path / name).mkdir()
    return path


def several(path: Path) -> Path:
    path.mkdir()
    write_json(path / "manifest.json", {"indexes": ["a", "b"]})
    for name in ("a", "b"):
        index_folder(path / name)
    return path


def export(path: Path) -> Path:
    path.mkdir()
    (path / OURS).touch()
    (path / "packs").mkdir()
    return path


def page(path: Path) -> Path:
    path.write_text(f"<!doctype html><head>{PAGE_MARK}</head>")
    return path


def test_overwrite_replaces_what_headscope_wrote_and_nothing_else(tmp_path: Path) -> None:
    for make in (sae_folder, index_folder, several, export, page):
        path = make(tmp_path / make.__name__)
        check_output(path, overwrite=True)
        if path.is_dir():
            (path / ".DS_Store").touch()
            check_output(path, overwrite=True)
            (path / "notes.md").write_text("mine")
            with pytest.raises(OutputError, match=r"(?s)headscope did not write notes.md\n.*do: choose another place"):
                check_output(path, overwrite=True)
            assert (path / "notes.md").exists()


def test_overwrite_gives_up_no_file_of_a_users(tmp_path: Path) -> None:
    notes, folder, links_to = tmp_path / "notes.md", tmp_path / "mine", tmp_path / "link"
    notes.write_text("mine")
    folder.mkdir()
    (folder / "a.txt").write_text("mine")
    links_to.symlink_to(notes)
    damaged, config, manifest = tmp_path / "damaged", tmp_path / "config", tmp_path / "manifest"
    for other, name, content in (
        (damaged, "manifest.json", "{"),
        (config, "cfg.json", '{"metadata": {"author": "me"}}'),
        (manifest, "manifest.json", '{"name": "an extension"}'),
    ):
        other.mkdir()
        (other / name).write_text(content)
    inside = several(tmp_path / "several")
    (inside / "b" / "model").mkdir()
    page_of_theirs = tmp_path / "page.html"
    page_of_theirs.write_text("<html><head></head></html>")
    for path in (notes, folder, links_to, damaged, config, manifest, inside, page_of_theirs):
        with pytest.raises(OutputError, match="headscope did not write"):
            check_output(path, overwrite=True)
    assert notes.read_text() == "mine"


def test_a_folder_of_several_runs_holds_nothing_of_a_users(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_holds_only(out, [])
    out.mkdir()
    check_holds_only(out, [])
    sae_folder(out / "one")
    (out / "pareto.json").touch()
    (out / ".DS_Store").touch()
    check_holds_only(out, ["pareto.json"])
    for name, names in (("notes.txt", ["pareto.json"]), ("pareto.json", [])):
        (out / name).touch()
        with pytest.raises(OutputError, match=f"out holds {name}, which headscope did not write"):
            check_holds_only(out, names)
        (out / name).unlink()


def test_a_run_never_replaces_what_it_reads(tmp_path: Path) -> None:
    sae = sae_folder(tmp_path / "sae")
    link = tmp_path / "link"
    link.symlink_to(sae)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("text")
    for out, inputs in (
        (sae, [sae]),
        (sae, [sae / "sae_weights.safetensors"]),
        (sae, [link]),
        (link, [sae]),
        (link, [link]),
        (tmp_path, [corpus]),
        (corpus / "a.txt", [corpus / "a.txt"]),
    ):
        with pytest.raises(OutputError, match="holds what is to be read"):
            check_run_folder(out, overwrite=True, inputs=inputs)
    with pytest.raises(OutputError, match="headscope did not write"):
        check_run_folder(corpus / "a.txt", overwrite=True, inputs=[corpus])
    check_run_folder(sae, overwrite=True, inputs=["tiny", corpus])


# ---------------------------------------------------------------------------------------------------------- JSON, hash
def test_json_round_trip_keeps_text_readable(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "emoji": "🦊", "nested": {"t": True}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert "🦊" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_not_a_number_and_writes_nothing(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"x": value})
    assert listing(tmp_path) == []


def test_read_json_passes_on_the_errors_of_open_and_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        read_json(tmp_path / "bad.json")


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(tmp_path / "abc") == expected
