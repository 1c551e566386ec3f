"""The commands of one model on all of them: every family as a folder, and a checkpoint of TransformerLens' format."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from tokenizers import Tokenizer
from torch.testing import assert_close

from families import FAMILIES, build
from headscope import jobs
from headscope.cli import main
from headscope.explorer.cards import IndexCards
from headscope.explorer.server import make_app
from headscope.models.hf import Model
from headscope.models.load import load_model
from headscope.sae.formats import save_sae
from headscope.sae.model import SAE
from tl_files import configuration, write_checkpoint

POST_NORM = {"gemma2", "gemma3_text"}


CHECKPOINTS = {"transformerlens": "gelu", "attention only": "attn_only"}


@pytest.fixture(params=[*FAMILIES, *CHECKPOINTS])
def folder(
    request: pytest.FixtureRequest,
    random_model: Callable[..., Model],
    save_model: Callable[[Model, Path], Path],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> Path:
    """A model with random weights, as files."""
    folder = tmp_path / "model"
    if request.param not in CHECKPOINTS:
        return save_model(build(random_model, request.param), folder)
    return write_checkpoint(folder, tokenizer, config=configuration(CHECKPOINTS[request.param]))


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


@pytest.mark.slow
def test_each_model_is_evaluated_indexed_and_served(
    folder: Path, random_sae: Callable[..., SAE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(str(folder))
    sae = replace(random_sae(model), model_name=str(folder))
    save_sae(sae, tmp_path / "sae")
    text = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    documents = ["".join(chr(c) for c in rng.integers(33, 127, 120)) for _ in range(12)]
    text.write_text("\n<|doc|>\n".join(documents))
    choice = ["--model", folder, "--corpus", text, "--split", "all", "--block-size", "16"]
    run("info", tmp_path / "sae", "--model", folder)
    run("eval", "--sae", tmp_path / "sae", *choice)
    run("index", "--sae", tmp_path / "sae", "--out", tmp_path / "index", *choice)
    live = jobs.live(tmp_path / "index", model=str(folder))
    latent = int(np.argmax(live.index.table()["n_active"].to_numpy()))
    active = live.index.activations(latent)
    assert len(active.position) > 5
    for position, activation in zip(active.position[:5].tolist(), active.activation[:5].tolist(), strict=True):
        (found,) = live.dfa(position, [latent])
        assert_close(found.activation, activation, rtol=1e-4, atol=1e-4)
        assert_close(float(found.by_source.sum() + found.bias), found.pre, rtol=1e-4, atol=1e-4)
    card = TestClient(make_app(IndexCards(live.index)), base_url="http://127.0.0.1").get(f"/api/feature/{latent}")
    assert card.status_code == 200
    assert card.json()["latent"] == latent
    capsys.readouterr()
    if model.spec.post_norm:
        with pytest.raises(SystemExit):
            run("effects", tmp_path / "index", "--model", folder)
        assert "norm" in capsys.readouterr().err
    else:
        run("effects", tmp_path / "index", "--model", folder)


def test_which_families_have_a_norm_after_attention(random_model: Callable[..., Model]) -> None:
    assert {name for name in FAMILIES if build(random_model, name).spec.post_norm} == POST_NORM


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_the_command_serves_an_index_with_its_model(
    tokenizer: Tokenizer, random_sae: Callable[..., SAE], tmp_path: Path
) -> None:
    """As a newcomer would: a checkpoint of TransformerLens' format, an SAE, `index`, `serve`, and questions to it."""
    folder = write_checkpoint(tmp_path / "model", tokenizer)
    sae = save_sae(replace(random_sae(load_model(str(folder))), model_name=str(folder)), tmp_path / "sae")
    (tmp_path / "text.txt").write_text("some words of text, again and again. " * 20)
    choice = ["--corpus", tmp_path / "text.txt", "--split", "all", "--block-size", "16"]
    run("index", "--sae", sae, "--model", folder, "--out", tmp_path / "index", *choice)
    command = [sys.executable, "-m", "headscope", "serve", "--index", str(tmp_path / "index"), "--model", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    address = None
    try:
        address = next((m for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
        assert address is not None
        with urllib.request.urlopen(f"{address[0]}/api/about", timeout=60) as answer:
            assert json.load(answer)["site"] == "blocks.1.attn.hook_z"
        with urllib.request.urlopen(f"{address[0]}/api/feature/0", timeout=60) as answer:
            assert json.load(answer)["latent"] == 0
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, "Traceback" in errors) == (0, False), errors
