"""What is said when the hub does not give what was asked for: by `huggingface_hub` itself, with a faked transport."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from headscope.corpus import read_documents
from headscope.errors import CorpusError, HeadscopeError, ModelError, SAEError
from headscope.hub import trouble
from headscope.models.load import load_model
from headscope.sae.formats import load_sae

httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])  # which of them is up to huggingface_hub
Answer = Callable[[Any], Any]

ASKED: dict[str, tuple[type[HeadscopeError], Callable[[], object], str]] = {
    "model": (ModelError, lambda: load_model("some/thing"), "https://huggingface.co/some/thing"),
    "checkpoint": (ModelError, lambda: load_model("gelu-2l"), "https://huggingface.co/NeelNanda/GELU_2L512W_C4_Code"),
    "sae": (SAEError, lambda: load_sae("some/thing/folder"), "https://huggingface.co/some/thing"),
    "sae .pt": (SAEError, lambda: load_sae("some/thing/sae.pt"), "https://huggingface.co/some/thing"),
    "corpus": (
        CorpusError,
        lambda: next(read_documents("some/thing")),
        "https://huggingface.co/datasets/some/thing",
    ),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Answer], None]]:
    """`hub(answer)`: the hub answers every request so; nothing is in its cache, and nobody is logged in."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # between attempts

    def answer_by(answer: Answer) -> None:
        def client() -> Any:
            return httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=True)

        huggingface_hub.set_client_factory(client)

    yield answer_by
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def refusing(status: int, code: str, message: str) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message}

    def answer(request: Any) -> Any:
        return httpx.Response(status, headers=headers, content=json.dumps({"error": message}), request=request)

    return answer


def no_route(request: Any) -> Any:
    raise httpx.ConnectError("no route to host", request=request)


def said_of(name: str) -> HeadscopeError:
    kind, ask, _ = ASKED[name]
    if name == "corpus":
        pytest.importorskip("datasets")
    with pytest.raises(kind) as raised:
        ask()
    return raised.value


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("name", ASKED)
def test_a_gated_repository_says_how_to_log_in_and_where_its_terms_are(hub: Any, name: str, status: int) -> None:
    hub(refusing(status, "GatedRepo", "Access to model some/thing is restricted"))
    error = said_of(name)
    assert trouble(error) == "gated"
    assert f"accept the terms at {ASKED[name][2]}, then log in with `hf auth login`, or set HF_TOKEN" in error.do
    assert "network" not in str(error)


@pytest.mark.parametrize("name", ASKED)
def test_what_is_not_there_may_be_private(hub: Any, name: str) -> None:
    hub(refusing(401, "RepoNotFound", "Repository not found"))
    error = said_of(name)
    assert trouble(error) == "missing"
    assert "check the name; for a private repository log in with `hf auth login`, or set HF_TOKEN" in error.do
    assert ("check the path" in error.do) == (name == "corpus")


@pytest.mark.parametrize("name", ASKED)
def test_without_a_network_it_says_how_to_use_local_files(hub: Any, name: str) -> None:
    hub(no_route)
    error = said_of(name)
    assert trouble(error) == "unreachable"
    assert "hf download " in error.do
    assert "FOLDER" in error.do
    assert "hf auth login" not in str(error)


@pytest.mark.parametrize("name", ASKED)
def test_so_it_does_where_the_network_is_not_to_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    error = said_of(name)
    assert trouble(error) == "unreachable"
    assert "hf download " in error.do
