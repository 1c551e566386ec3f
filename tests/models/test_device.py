"""`--device`: every command that runs a model puts all of it there, and finds what it finds on the processor."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headscope import jobs
from headscope.cli import main
from headscope.corpus import Corpus
from headscope.errors import ModelError
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.sae.formats import save_sae
from headscope.sae.model import SAE
from pretend_device import is_there, pretended


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def files(
    random_model: Callable[..., Model],
    random_sae: Callable[..., SAE],
    save_model: Callable[[Model, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A model, an SAE of it, text, and an index made on the processor."""
    root = tmp_path_factory.mktemp("device")
    model = random_model()
    save_model(model, root / "model")
    save_sae(random_sae(model), root / "sae")
    rng = np.random.default_rng(0)
    documents = ["".join(chr(c) for c in rng.integers(33, 127, 120)) for _ in range(40)]
    (root / "text.txt").write_text("\n<|doc|>\n".join(documents))
    made = {"model": root / "model", "sae": root / "sae", "text": root / "text.txt", "index": root / "index"}
    run("index", "--sae", made["sae"], "--out", made["index"], *choice(made))
    return made


def choice(files: dict[str, Path]) -> list[object]:
    return ["--model", files["model"], "--corpus", files["text"], "--split", "all", "--block-size", "16"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A pretended GPU; whether each model that is run is there."""
    seen: list[bool] = []
    body = Model._body

    def watched(model: Model, tokens: Any, **inputs: Any) -> Any:
        seen.append(is_there(tokens))
        return body(model, tokens, **inputs)

    monkeypatch.setattr(Model, "_body", watched)
    with pretended():
        yield seen


def test_what_is_mixed_is_refused() -> None:
    """The judge of all below can say no."""
    with pretended():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device.type == "cuda"
        assert (2 * there).cpu().device.type == "cpu"
        for mix in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat([there, here]), there.numpy):
            with pytest.raises(AssertionError, match="device"):
                mix()
        assert torch.equal(there[torch.tensor([0, 1])].cpu(), here[:2])


@pytest.mark.slow
def test_an_index_made_there_is_the_same(gpu: list[bool], files: dict[str, Path], tmp_path: Path) -> None:
    run("index", "--sae", files["sae"], "--out", tmp_path / "index", "--losses", "--device", "cuda", *choice(files))
    ours, theirs = FeatureIndex.open(files["index"]), FeatureIndex.open(tmp_path / "index")
    assert ours.manifest["n_pairs"] == theirs.manifest["n_pairs"] > 100
    latent = int(np.argmax(ours.table()["n_active"].to_numpy()))
    np.testing.assert_allclose(
        ours.activations(latent).activation, theirs.activations(latent).activation, rtol=1e-5, atol=1e-5
    )
    assert gpu
    assert all(gpu)


def test_an_sae_is_measured_there(gpu: list[bool], files: dict[str, Path]) -> None:
    run("eval", "--sae", files["sae"], "--device", "cuda:0", *choice(files))
    assert gpu
    assert all(gpu)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["effects"], ["families"], ["heads", "--n-shuffles", "1"], ["dive", "7"]], ids=lambda c: c[0]
)
def test_studies_run_there(gpu: list[bool], files: dict[str, Path], tmp_path: Path, command: list[str]) -> None:
    name, *options = command
    if name == "dive":
        options += ["--out", str(tmp_path / "page.html")]
    run(name, files["index"], *options, "--model", files["model"], "--device", "cuda")
    assert gpu
    assert all(gpu)


@pytest.mark.parametrize(
    "command", ["train", "eval", "index", "serve", "effects", "families", "heads", "dive", "report"]
)
def test_every_command_that_runs_a_model_takes_a_device(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert "--device" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"device 'cuda'.*\n  expected: cpu, or cuda"):
        jobs.live(files["index"], model=str(files["model"]), device="cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")  # each process of torchrun has a GPU of its own
    with pytest.raises(ModelError, match="device 'cuda:3'"):
        jobs.live(files["index"], model=str(files["model"]), device="cuda")


def test_a_model_computes_in_the_precision_of_the_index(
    random_corpus: Callable[..., Corpus],
    random_sae: Callable[..., SAE],
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    from headscope.index.build import SAERecord, build_index
    from headscope.models.load import load_model
    from headscope.sae.formats import load_sae, sae_hash

    model = load_model(str(files["model"]), dtype=torch.float64)
    record = SAERecord(str(files["sae"]), sae_hash(files["sae"]))
    (index,) = build_index(model, [(load_sae(files["sae"]), record)], random_corpus(model), tmp_path / "index")
    live = jobs.live(index, model=str(files["model"]))
    assert live.model.module.dtype == live.sae.W_enc.dtype == torch.float64
