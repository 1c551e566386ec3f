"""Memory that is freed and asked for again."""

import ctypes
import platform
import sys

import pytest

from headscope.memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_the_c_library_takes_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL(None).mallopt
    taken: dict[int, int] = {}

    class Library:
        def mallopt(self, setting: int, size: int) -> None:
            assert real(setting, size) == 1  # glibc's word for success
            taken[setting] = size

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    keep_freed_memory()
    assert taken == {-1: 2**28, -3: 2**25}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    taken.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    keep_freed_memory()
    assert taken == {-3: 2**25}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere none is looked for")
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(ctypes, "CDLL", asked.append)  # it has no mallopt
    keep_freed_memory()
    assert asked == [None]
