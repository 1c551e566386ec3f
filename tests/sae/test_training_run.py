"""Whole trainings: what comes out, and that a run which was cut off goes on as if it had not been."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headscope.artefact import file_hash, read_json, write_json
from headscope.corpus import Corpus
from headscope.errors import CorpusError, ModelError, OutputError, TrainingError
from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.metrics import Status, read_metrics
from headscope.sae.model import SAE
from headscope.sae.runs import find_runs
from headscope.sae.training import checkpoint
from headscope.sae.training.checkpoint import Checkpoints
from headscope.sae.training.ranks import ALONE
from headscope.sae.training.run import METRICS, TrainResult, train_sae, train_saes
from headscope.sae.training.trainer import Trainer
from headscope.site import Site
from small_training import APRIL, RECIPES, config, remembering
from training_worker import tensors

Z1 = Site("z", 1)
N_AVAILABLE = 40 * 16
N_STEPS = 40


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return remembering(random_model("gpt_neox"))


@pytest.fixture(scope="module")
def corpus(model: Model, random_corpus: Callable[..., Corpus]) -> Corpus:
    made = random_corpus(model, n_blocks=40, block_size=17)
    blocks = np.where(made.blocks == made.bos, 1, made.blocks)
    blocks[:, 0] = made.bos  # no BOS inside blocks
    return replace(made, blocks=blocks, offset=np.where(blocks == made.bos, 0, np.maximum(made.offset, 1)))


def small(**changes: Any) -> TrainConfig:
    return config(**({"batch": 128, "tokens": 128 * N_STEPS, "buffer": 512} | changes))


def with_deaths(**changes: Any) -> TrainConfig:
    """More latents than inputs use, and a short patience with them."""
    return small(**({"d_sae": 90, "dead_after": 128 * 4, "resample": 3, "lr": 1e-2, "warmup_steps": 4} | changes))


def assert_equal(got: SAE, expected: SAE) -> None:
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(got)[name], tensor), name


def assert_same_result(got: TrainResult, expected: TrainResult) -> None:
    assert_equal(got.sae, expected.sae)
    assert got.curve == expected.curve
    assert (got.epochs, got.interrupted) == (expected.epochs, expected.interrupted)


# ------------------------------------------------------------------------------------------------------- what comes out
@pytest.mark.parametrize("variant", ["relu", "jumprelu", "gated", "topk", "batchtopk"])
def test_the_same_seed_gives_the_same_weights(model: Model, corpus: Corpus, variant: str) -> None:
    first, again, other = (
        train_sae(model, corpus, Z1, small(seed=seed, variant=variant, tokens=128 * 12)).sae for seed in (1, 1, 2)
    )
    assert_equal(again, first)
    assert (first.W_enc - other.W_enc).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["z", "attn_out", "mlp_out", "resid_pre"])
def test_training_states_how_it_went(model: Model, corpus: Corpus, kind: Any) -> None:
    seen: list[Status] = []
    result = train_sae(model, corpus, Site(kind, 0), small(), seen.append)
    assert [s.step for s in seen] == list(range(N_STEPS))
    assert result.epochs == 128 * N_STEPS / N_AVAILABLE
    assert not result.interrupted
    assert result.curve[-1]["tokens"] == 128 * N_STEPS
    metadata = result.sae.metadata
    assert metadata["training"]["config"] == small().as_dict()
    assert metadata["corpus"] == corpus.provenance()
    assert (metadata["z_convention"], metadata["context_size"]) == ("raw", 17)
    assert (result.sae.site, result.sae.model_name) == (Site(kind, 0), "random gpt_neox")


@pytest.mark.slow
@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("target_l0", [2.0, 6.0])
@pytest.mark.parametrize("name", ["relu", "relu, free decoder", "jumprelu", "jumprelu, tanh", "gated", "batchtopk"])
def test_the_target_l0_is_reached(model: Model, corpus: Corpus, name: str, target_l0: float) -> None:
    chosen = small(**RECIPES[name] | {"target_l0": target_l0, "tokens": 128 * 800, "lr": 3e-3, "resample": 0})
    sae = train_sae(model, corpus, Z1, chosen).sae
    z = model.read(torch.from_numpy(corpus.blocks).long(), [Z1])[Z1][:, 1:]
    assert (sae.encode(z) > 0).sum(-1).float().mean().item() == pytest.approx(target_l0, rel=0.15)


@pytest.mark.slow
def test_several_saes_on_one_stream_are_those_trained_alone(model: Model, corpus: Corpus) -> None:
    n_steps = 14
    kinds = RECIPES | {"april 2024": APRIL}
    recipes = {name: with_deaths(**changes, tokens=128 * n_steps) for name, changes in kinds.items()}
    seen = []
    together = train_saes(model, corpus, Z1, recipes, lambda statuses: seen.append(set(statuses)))
    assert seen == [set(recipes)] * n_steps
    for name, recipe in recipes.items():
        assert_same_result(together[name], train_sae(model, corpus, Z1, recipe))
    assert max(point["dead"] for point in together["batchtopk"].curve) > 0


@pytest.mark.parametrize(
    "changes", [{"seed": 3}, {"batch": 64}, {"tokens": 128}, {"buffer": 300}, {"exclude_bos": False}, {"cache": "x"}]
)
def test_saes_that_want_other_streams_are_not_trained_together(
    model: Model, corpus: Corpus, changes: dict[str, Any]
) -> None:
    recipes = {"a": small(), "b": small(**changes)}
    with pytest.raises(TrainingError, match=rf"(?s)recipes with {next(iter(changes))} .*expected: .*do: "):
        train_saes(model, corpus, Z1, recipes)


# ------------------------------------------------------------------------------------------------------------- refusals
def test_activations_that_are_not_finite_are_refused(random_model: Callable[..., Model], corpus: Corpus) -> None:
    broken = random_model("gpt_neox")
    broken.module.gpt_neox.layers[0].mlp.dense_4h_to_h.bias.data[2] = torch.nan  # pyright: ignore
    with pytest.raises(TrainingError, match=r"(?s)NaN or infinity in blocks\.1\.attn\.hook_z.*expected: .*do: "):
        train_sae(broken, corpus, Z1, small())
    train_sae(broken, corpus, Site("z", 0), small(tokens=256))


def test_a_layer_that_does_not_exist_is_refused(model: Model, corpus: Corpus) -> None:
    with pytest.raises(ModelError, match="layer 2 of"):
        train_sae(model, corpus, Site("z", 2), small())


def test_a_corpus_that_the_model_cannot_read_is_refused(
    model: Model, corpus: Corpus, random_corpus: Callable[..., Corpus]
) -> None:
    with pytest.raises(CorpusError, match="blocks of 65 tokens"):
        train_sae(model, random_corpus(model, 4, 65), Z1, small())
    foreign = replace(corpus, blocks=corpus.blocks + model.spec.d_vocab)
    with pytest.raises(CorpusError, match="token id"):
        train_sae(model, foreign, Z1, small())


def test_a_corpus_of_less_than_two_batches_is_refused(model: Model, corpus: Corpus) -> None:
    half = N_AVAILABLE // 2
    with pytest.raises(TrainingError, match=r"(?s)a corpus of 640 activations.*expected: .*321.*do: "):
        train_sae(model, corpus, Z1, small(batch=half + 1, buffer=2 * half + 2))
    train_sae(model, corpus, Z1, small(batch=half, buffer=2 * half, tokens=half))


# ------------------------------------------------------------------------------------------------------- interruptions
@pytest.fixture(scope="module")
def whole(model: Model, corpus: Corpus) -> TrainResult:
    """A training that nothing interrupted."""
    return train_sae(model, corpus, Z1, with_deaths())


def press(at: int, number: signal.Signals = signal.SIGINT) -> Callable[[Status], None]:
    """Ctrl-C after a step, as a terminal sends it; or another signal."""

    def on_step(status: Status) -> None:
        if status.step == at:
            os.kill(os.getpid(), number)

    return on_step


def test_what_is_read_before_a_step_is_told(model: Model, corpus: Corpus) -> None:
    told: list[tuple[str, int, int]] = []

    def on_step(status: Status) -> None:
        told.append(("step", status.step, N_STEPS))

    train_sae(model, corpus, Z1, with_deaths(), on_step, on_progress=lambda *stage: told.append(stage))
    stages = [name for name, _ in itertools.groupby(told, key=lambda stage: stage[0])]
    assert stages[:3] == ["read a sample", "fill the buffer", "step"]
    assert "read a sample" in stages[3:], "inputs that dead latents are started on"
    assert all(0 < done <= total for name, done, total in told if name != "step")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_before_the_first_step_is_not_kept_waiting(model: Model, corpus: Corpus, number: signal.Signals) -> None:
    told: list[str] = []

    def press(stage: str, _done: int, _total: int) -> None:
        told.append(stage)
        if stage == "fill the buffer":
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        train_sae(model, corpus, Z1, small(), on_progress=press)
    assert told.count("fill the buffer") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 7])
def test_ctrl_c_returns_what_was_trained_and_says_so(
    model: Model, corpus: Corpus, at: int, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    result = train_sae(model, corpus, Z1, small(), press(at, number))
    assert signal.getsignal(number) is before
    assert result.interrupted
    assert result.sae.metadata["training"]["interrupted"] is True
    assert result.epochs == (at + 1) * 128 / N_AVAILABLE
    assert result.sae.encode(torch.zeros(3, 32)).shape == (3, 24)


def test_one_sigterm_after_another_lets_the_checkpoint_be_written(
    model: Model, corpus: Corpus, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, said = Checkpoints.save, []

    def again(self: Checkpoints, *given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *given)
        said.append(given[0])

    def twice(status: Status) -> None:
        press(5, signal.SIGTERM)(status)
        press(5, signal.SIGTERM)(status)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", again)
        assert train_sae(model, corpus, Z1, with_deaths(), twice, folder=tmp_path).interrupted
    assert said == [6]
    assert_same_result(train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path), whole)


def test_signals_that_are_ignored_or_of_others_stay_so(model: Model, corpus: Corpus) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert not train_sae(model, corpus, Z1, small(), press(3, signal.SIGTERM)).interrupted
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(
    model: Model, corpus: Corpus, whole: TrainResult, tmp_path: Path
) -> None:
    for at in (5, 6, 23, 24):
        assert train_sae(model, corpus, Z1, with_deaths(), press(at), folder=tmp_path).interrupted
    seen: list[Status] = []
    result = train_sae(model, corpus, Z1, with_deaths(), seen.append, folder=tmp_path)
    assert [s.step for s in seen] == list(range(25, N_STEPS))
    assert_same_result(result, whole)
    assert [point["step"] for point in read_metrics(tmp_path / f"{METRICS}.jsonl")] == list(range(N_STEPS))


@pytest.mark.parametrize("where", ["step", "resample"])
def test_a_step_that_is_cut_in_two_is_not_saved(
    model: Model, corpus: Corpus, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A second Ctrl-C does not wait for the step to be whole."""
    done = getattr(Trainer, where)

    def half(self: Trainer, x: Tensor) -> Any:
        result = done(self, x)
        if self.step_number >= 12:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, half)
        cut = train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path, checkpoint_every=5)
        assert cut.interrupted
    assert_same_result(train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path), whole)


def cut_off(model: Model, corpus: Corpus, folder: Path, at: int = 17, every: int = 5) -> list[Path]:
    """A run that ended without a word after a step; its checkpoints, the last first."""

    class Cut(BaseException):
        pass

    def on_step(status: Status) -> None:
        if status.step == at:
            raise Cut

    with pytest.raises(Cut):
        train_sae(model, corpus, Z1, with_deaths(), on_step, folder=folder, checkpoint_every=every)
    return sorted(folder.glob("step-*"), reverse=True)


def test_a_run_that_was_cut_off_goes_on_from_the_last_checkpoint(
    model: Model, corpus: Corpus, whole: TrainResult, tmp_path: Path
) -> None:
    kept = cut_off(model, corpus, tmp_path)
    assert [path.name for path in kept] == ["step-00000015", "step-00000010"]  # two stay
    seen: list[Status] = []
    assert_same_result(train_sae(model, corpus, Z1, with_deaths(), seen.append, folder=tmp_path), whole)
    assert seen[0].step == 15


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda path: flip(path / f"{METRICS}.safetensors"),
    "a bit of the stream": lambda path: flip(path / "stream-0.safetensors"),
    "a number": lambda path: (path / f"{METRICS}.json").write_text("{}"),
    "half of a file": lambda path: os.truncate(path / f"{METRICS}.safetensors", 500),
    "a file that is gone": lambda path: (path / "stream-0.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half of the manifest": lambda path: os.truncate(path / "manifest.json", 30),
    "no hashes": lambda path: (flip(path / f"{METRICS}.safetensors"), manifest_of(path, hashes={})),
    "hashes that are none": lambda path: manifest_of(path, hashes=[1]),
    "a manifest that is a list": lambda path: write_json(path / "manifest.json", []),
}


def manifest_of(path: Path, **changes: Any) -> None:
    write_json(path / "manifest.json", read_json(path / "manifest.json") | changes)


def flip(file: Path) -> None:
    held = bytearray(file.read_bytes())
    held[-3] ^= 1
    file.write_bytes(held)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    model: Model, corpus: Corpus, whole: TrainResult, tmp_path: Path, damage: str
) -> None:
    last, before = cut_off(model, corpus, tmp_path)
    DAMAGE[damage](last)
    seen: list[Status] = []
    with pytest.warns(UserWarning, match=f"damaged checkpoint is passed over: {last.name}"):
        result = train_sae(model, corpus, Z1, with_deaths(), seen.append, folder=tmp_path)
    assert seen[0].step == int(before.name.removeprefix("step-"))
    assert_same_result(result, whole)


def test_damaged_checkpoints_alone_are_an_error(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    for path in cut_off(model, corpus, tmp_path):
        flip(path / f"{METRICS}.safetensors")
    with (
        pytest.raises(
            TrainingError, match=r"(?s)damaged checkpoints in .*00000015.*00000010.*expected: .*do: pass --ov"
        ),
        pytest.warns(UserWarning, match="passed over"),
    ):
        train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path)


def test_a_checkpoint_of_another_training_is_refused_whatever_its_hashes(
    model: Model, corpus: Corpus, tmp_path: Path
) -> None:
    for path in cut_off(model, corpus, tmp_path):
        file = path / f"{METRICS}.safetensors"
        tensors = load_file(file)
        save_file({name: tensor.flatten()[:1].clone() for name, tensor in tensors.items()}, file)
        manifest_of(
            path, hashes={part.name: file_hash(part) for part in path.iterdir() if part.name != "manifest.json"}
        )
    with pytest.raises(TrainingError, match=r"(?s)a checkpoint that does not fit this training .*do: pass --overwrite"):
        train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path)


def test_a_damaged_recipe_is_refused_in_a_sentence(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    for content in ("{", "[]", "{}", '{"names": 5}', '{"names": []}', '{"names": [1]}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(TrainingError, match=r"(?s)run.json is damaged: .*do: pass --overwrite to start again"):
            train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path)
        assert find_runs([tmp_path]) == ()


def test_a_folder_of_a_users_is_not_cleared_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "sae.training"
    folder.mkdir()
    checkpoints = Checkpoints(folder, ALONE)
    for name in ("thesis.tex", "run.json"):
        (folder / name).write_text("{}")
        with pytest.raises(OutputError, match=r"(?s)sae.training, where checkpoints go, holds something else"):
            checkpoints.clear()
    (folder / "thesis.tex").unlink()
    (folder / "step-00000005").mkdir()
    checkpoints.clear()
    assert not folder.exists()
    folder.write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        checkpoints.clear()


@pytest.mark.parametrize("file", ["stream-0", METRICS])
@pytest.mark.parametrize("at", [0, 2])
def test_the_last_checkpoint_survives_a_full_disk(
    model: Model,
    corpus: Corpus,
    whole: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    at: int,
) -> None:
    saved, written = checkpoint.save_file, 0

    def full(state: dict[str, Tensor], path: Path) -> None:
        nonlocal written
        if path.name.startswith(file):
            if written == at:
                path.write_bytes(b"part of it")
                raise OSError(28, "No space left on device")
            written += 1
        saved(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        expected = "goes on from step 10" if at else "do: free some space"
        with pytest.raises(OutputError, match=rf"(?s)checkpoint of step {5 * at + 5} .*No space left.*{expected}"):
            train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path, checkpoint_every=5)
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-00000005", "step-00000010"][:at]
    assert_same_result(train_sae(model, corpus, Z1, with_deaths(), folder=tmp_path), whole)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"lr": 1e-3}, {"variant": "relu"}, {"prefixes": (3,)}])
def test_a_folder_of_another_recipe_is_refused(
    model: Model, corpus: Corpus, tmp_path: Path, changes: dict[str, Any]
) -> None:
    cut_off(model, corpus, tmp_path)
    what = next(iter(changes))
    with pytest.raises(TrainingError, match=rf"(?s)holds a training with {what} = .*expected: .*do: .*--overwrite"):
        train_sae(model, corpus, Z1, with_deaths(**changes), folder=tmp_path)


def test_a_folder_of_another_site_model_or_corpus_is_refused(
    model: Model, random_model: Callable[..., Model], corpus: Corpus, tmp_path: Path
) -> None:
    cut_off(model, corpus, tmp_path)
    fewer = replace(corpus, blocks=corpus.blocks[::-1].copy())
    for what, arguments in {
        "site": (model, corpus, Site("z", 0)),
        "model": (random_model("gpt_neox", seed=3), corpus, Z1),
        "corpus": (model, fewer, Z1),
    }.items():
        with pytest.raises(TrainingError, match=f"holds a training with {what}"):
            train_sae(*arguments, with_deaths(), folder=tmp_path)


def test_a_cache_changes_nothing_and_may_be_added_on_the_way(
    model: Model, corpus: Corpus, whole: TrainResult, tmp_path: Path
) -> None:
    cut_off(model, corpus, tmp_path / "run")
    cached = with_deaths(cache=str(tmp_path / "cache"))
    assert_same_result(train_sae(model, corpus, Z1, cached, folder=tmp_path / "run"), whole)


def test_a_loss_that_is_not_finite_saves_the_batch(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    wild = small(lr=1e25, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"(?s)the loss at step \d.*do: lower --lr; .*holds the batch"):
        train_sae(model, corpus, Z1, wild, folder=tmp_path)
    [file] = tmp_path.glob("bad-batch-*-0.safetensors")
    held = checkpoint.load_file(file)
    assert held["x"].shape == (128, 32)
    assert held["x"].isfinite().all()
    assert held["encoder"].shape == (24, 32)


def test_a_batch_that_cannot_be_saved_does_not_hide_the_loss(
    model: Model, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("the disk is full", expected="room", do="free some")

    monkeypatch.setattr(checkpoint.Checkpoints, "keep", full)
    with pytest.raises(TrainingError, match=r"(?s)the loss at step .*could not be kept for a look: the disk is full"):
        train_sae(model, corpus, Z1, small(lr=1e25, warmup_steps=0), folder=tmp_path)


def test_checkpoints_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        Checkpoints(tmp_path, ALONE).save(3, {METRICS: {"a": torch.zeros(2), "b": 1}}, {"c": torch.zeros(2)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o660}
    assert len(files) == 5


def test_only_whole_checkpoints_count_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    kept = checkpoint.Checkpoints(tmp_path, ALONE)
    for name in ("step-00000002", "step-00000004", "step-00000006.bak", ".step-00000008"):
        (tmp_path / name).mkdir()
    kept.claim({"recipe": 1})
    assert kept.steps() == [4, 2]
    assert not (tmp_path / ".step-00000008").exists()


def test_metrics_are_lines_of_json_as_far_as_they_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert read_metrics(file) == [{"step": 0}, {"step": 1}]
    assert json.loads(file.read_text().splitlines()[1]) == {"step": 1}
