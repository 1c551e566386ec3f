import ast
import dataclasses
import errno
import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig

from headscope import cli, jobs
from headscope.artefact import atomic_write, cannot_write
from headscope.commands.display import Display
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.sae.formats import WEIGHTS, load_sae, save_sae
from headscope.sae.model import SAE
from headscope.site import Site
from headscope.studies.registry import STUDIES

COMMANDS = typing.get_args(cli.Command)
RECIPE = [
    "--tokens",
    "1024",
    "--batch",
    "64",
    "--buffer",
    "256",
    "--d-sae",
    "24",
    "--target-l0",
    "3",
    "--block-size",
    "32",
]
Arguments = list[str]


def run(*arguments: object) -> None:
    cli.main([str(a) for a in arguments])


def fails(capsys: pytest.CaptureFixture[str], match: str, *arguments: object) -> None:
    """The command ends with status 2 and says what was got, expected and to do; any other exception is a failure."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    message = re.sub(r"\A(load .*\n)*", "", capsys.readouterr().err)
    assert ended.value.code == 2
    assert re.fullmatch(r"(?s)headscope: .+\n  expected: .+\n  do: .+\n", message), message
    assert re.search(f"(?s){match}", message), message
    assert "Traceback" not in message


# ---------------------------------------------------------------------------------------------------------------- help
def documented_fields(cls: type) -> Iterator[tuple[str, str | None]]:
    """(name, docstring) of every option of a command, those of nested dataclasses included."""
    owners = [c for c in cls.__mro__ if dataclasses.is_dataclass(c)]
    bodies = [ast.parse(inspect.getsource(owner)).body[0].body for owner in owners]
    docs = {
        a.target.id: b.value.value
        for body in bodies
        for a, b in itertools.pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from documented_fields(hints[field.name])
        else:
            yield field.name, docs.get(field.name)


def words(text: str) -> str:
    return " ".join(re.sub(r"[^\w]+", " ", text).split())


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str, option: str = "--help") -> str:
    with pytest.raises(SystemExit) as ended:
        run(*arguments, option)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_every_field_with_its_docstring(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: type
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = help_of(capsys, command.__name__.lower(), option="--help-all")
    for name, doc in documented_fields(command):
        assert re.search(rf"--(no-)?{name.replace('_', '-')}\b|\b{name.upper()}\b", shown), name
        assert doc, f"{command.__name__}.{name} has no docstring"
        assert words(doc) in words(shown), name


@pytest.mark.parametrize("name", ["train", "sweep", "index", "eval", "report"])
def test_the_help_of_a_command_with_many_options_fits_two_screens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = help_of(capsys, name), help_of(capsys, name, option="--help-all")
    assert len(short.splitlines()) <= 80
    assert f"more: headscope {name} --help-all" in short
    listed, every = (set(re.findall(r"^\W+(--[a-z0-9-]+)", text, re.MULTILINE)) for text in (short, whole))
    assert listed < every
    assert int(re.search(r"(\d+) more", short)[1]) == len(every - listed)


def test_the_short_help_shows_the_defaults_of_the_command_and_of_the_preset(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    default_of = r"--{} [^-].*?\(default: (\w+)\)"
    shown = help_of(capsys, "train")
    assert re.search(default_of.format("split"), shown, re.DOTALL)[1] == "train"
    assert re.search(default_of.format("variant"), shown, re.DOTALL)[1] == "batchtopk"
    shown = help_of(capsys, "train", "--preset", "anthropic-april-2024")
    assert re.search(default_of.format("variant"), shown, re.DOTALL)[1] == "relu"


def test_the_help_lists_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = help_of(capsys)
    for command in COMMANDS:
        assert re.search(rf"\b{command.__name__.lower()}\b.*{re.escape(command.__doc__[:30])}", shown)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_imports_nothing_heavy(arguments: Arguments) -> None:
    code = f"""
import sys
from headscope.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    assert ended.code == 0
heavy = {{"torch", "transformers", "safetensors", "duckdb", "pyarrow", "scipy", "starlette", "huggingface_hub"}}
heavy |= {{"httpx", "httpx2"}}  # the client of the hub
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headscope", "--help"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0
    assert "usage: headscope" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["teach"], ["train"], ["eval", "--sae", "x", "--nothing", "1"]])
def test_a_command_line_that_makes_no_sense_ends_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: Arguments
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2


# ---------------------------------------------------------------------------------------------- a small world on disk
@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox")


@pytest.fixture(scope="module")
def model_folder(model: Model, save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("models") / "neox")


@pytest.fixture
def own_model(model: Model, save_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return save_model(model, tmp_path / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text("".join(chr(33 + (i * 7 + j * j) % 90) for j in range(300)))
    return folder


@pytest.fixture
def sae_folder(model: Model, model_folder: Path, random_sae: Callable[..., SAE], tmp_path: Path) -> Path:
    sae = dataclasses.replace(random_sae(model), model_name=str(model_folder))
    return save_sae(sae, tmp_path / "sae")


@pytest.fixture
def training(model_folder: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a training run that works."""
    return {"--model": model_folder, "--corpus": text, "--out": tmp_path / "out"}


def train_with(options: dict[str, Any], *more: object) -> list[object]:
    return ["train", *(a for pair in options.items() for a in pair), *RECIPE, *more]


# -------------------------------------------------------------------------------------------------------- what it does
def test_train_then_eval_then_index_then_export(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    run(*train_with(training, "--layer", "0", "--site", "z"))
    out = training["--out"]
    assert f"SAE: {out}" in capsys.readouterr().out
    sae = load_sae(out)
    assert (sae.d_sae, sae.site, sae.model_name) == (24, Site("z", 0), str(training["--model"]))

    corpus = ["--corpus", text, "--split", "all", "--block-size", "32"]
    run("eval", "--sae", out, *corpus)
    printed = capsys.readouterr().out
    assert "loss_recovered" in printed
    assert "87 %" in printed
    assert json.loads((out / "quality.json").read_text())["quality"]["n_tokens"] > 0

    run("index", "--sae", out, "--out", tmp_path / "index", *corpus)
    assert "features alive" in capsys.readouterr().out
    assert (tmp_path / "index" / "manifest.json").is_file()

    run("export", "--index", tmp_path / "index", "--out", tmp_path / "page.html")
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    assert (tmp_path / "page.html").stat().st_size > 1000

    run("export", "--index", tmp_path / "index", "--out", tmp_path / "page")
    assert {path.name for path in (tmp_path / "page").iterdir()} >= {"index.html", "core.json.gz", "packs"}
    run("export", "--index", tmp_path / "index", "--out", tmp_path / "page", "--overwrite")


def test_options_of_the_index_reach_it(training: dict[str, Any], text: Path, tmp_path: Path) -> None:
    run(*train_with(training))
    more = ["--thresholds", "0", "0.5", "--exact-sources", "--losses"]
    run("index", "--sae", training["--out"], "--out", tmp_path / "index", "--corpus", text, "--split", "all", *more)
    index = FeatureIndex.open(tmp_path / "index")
    assert index.manifest["thresholds"] == [0.0, 0.5]
    assert index.manifest["plan"]["n_sources"] is None
    assert "loss" in index.sql("SELECT * FROM tokens LIMIT 1").column_names
    latent = index.search()[0]
    found = index.sources(latent)
    assert found is not None
    assert found.kept == pytest.approx(1)
    live = jobs.live(tmp_path / "index")
    (dfa,) = live.dfa(index.examples(latent)[0].examples[0].position, [latent])
    assert dfa.activation > 0


def test_several_saes_are_indexed_in_one_pass(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    run(*train_with(training, "--layer", "0"))
    first = training["--out"]
    run(*train_with(training | {"--out": tmp_path / "second"}, "--layer", "1"))
    corpus = ["--corpus", text, "--split", "all"]
    run("index", "--sae", first, tmp_path / "second", "--out", tmp_path / "both", *corpus)
    sites = [FeatureIndex.open(tmp_path / "both" / name).manifest["site"] for name in (first.name, "second")]
    assert sites == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    capsys.readouterr()
    fails(capsys, "several indexes", "export", "--index", tmp_path / "both", "--out", tmp_path / "page.html")


def test_figures_that_cannot_be_kept_are_shown_before_the_command_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sae_folder: Path, text: Path
) -> None:
    def full(path: Path, _content: Any) -> None:
        raise cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr("headscope.jobs.saes.write_json", full)
    with pytest.raises(SystemExit) as ended:
        run("eval", "--sae", sae_folder, "--corpus", text, "--split", "all", "--block-size", "32")
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert "loss_recovered" in shown.out
    assert re.search(r"cannot write .*quality.json: No space left on device", shown.err)


def test_an_sae_that_may_only_be_read_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sae_folder: Path, text: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.warns(UserWarning, match="figures are shown and not kept there"):
        run("eval", "--sae", sae_folder, "--corpus", text, "--split", "all", "--block-size", "32")
    assert "loss_recovered" in capsys.readouterr().out
    assert not (sae_folder / "quality.json").exists()


def test_the_last_layer_is_the_default(training: dict[str, Any]) -> None:
    run(*train_with(training))
    assert load_sae(training["--out"]).site == Site("z", 1)


def test_every_option_of_the_recipe_reaches_the_training(training: dict[str, Any]) -> None:
    options = ["--variant", "relu", "--seed", "5", "--lr", "1e-3", "--no-exclude-bos", "--resample", "0"]
    run(*train_with(training, *options))
    trained = load_sae(training["--out"]).metadata["training"]["config"]
    expected = {"variant": "relu", "seed": 5, "lr": 1e-3, "exclude_bos": False, "resample": 0, "tokens": 1024}
    assert trained.items() >= expected.items()


def test_ctrl_c_in_training_saves_what_was_trained_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, training: dict[str, Any]
) -> None:
    def press(_display: Display, status: Any) -> None:
        if status.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "on_step", press)
    with pytest.raises(SystemExit) as ended:
        run(*train_with(training))
    assert ended.value.code == 130
    assert "what was trained is saved" in capsys.readouterr().out
    assert load_sae(training["--out"]).metadata["training"]["interrupted"] is True


@pytest.fixture
def as_in_a_terminal(number: signal.Signals) -> Iterator[Any]:
    """How a signal is handled there, also where these tests run under nohup."""
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    yield usual
    signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_command_alike_and_says_what_the_same_command_does(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: signal.Signals,
    as_in_a_terminal: Any,
) -> None:
    def killed(*_args: Any, **_kwargs: Any) -> None:
        with atomic_write(tmp_path / "half"):
            os.kill(os.getpid(), number)
            time.sleep(10)

    def broken(*_args: Any, **_kwargs: Any) -> None:
        try:
            killed()
        except KeyboardInterrupt:
            raise RuntimeError("Query interrupted") from None  # as DuckDB does

    for job, arguments, again in (
        ("index", ["index", "--sae", "tiny-z1", "--out", tmp_path / "new"], "resumes"),
        ("study_all", ["study", "all", tmp_path], "resumes"),
        ("subject", ["study", "proxies", tmp_path], "resumes"),
        ("subject", ["effects", tmp_path], "starts again"),
        ("subject", ["study", "best-proxies", tmp_path, "3"], "starts again"),
        ("eval", ["eval", "--sae", "tiny-z1"], "starts again"),
    ):
        for ending in (killed, broken):
            monkeypatch.setattr(jobs, job, ending)
            with pytest.raises(SystemExit) as ended:
                run(*arguments)
            assert ended.value.code == 130
            assert capsys.readouterr().err == f"headscope: interrupted; the same command {again}\n"
            assert signal.getsignal(number) is as_in_a_terminal
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, "no command 'trian'.*did you mean `headscope train`", "trian", "--out", "x")
    fails(capsys, "no command 'zzz'.*headscope --help", "zzz")


@pytest.mark.usefixtures("no_type_checks")
def test_studies_are_commands_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listed = help_of(capsys, "study")
    for study in STUDIES.values():
        assert re.search(rf"\b{study.name}\b", listed)
        assert words(study.question).lower() in words(help_of(capsys, "study", study.name)).lower()
    fails(capsys, "no study 'effect'.*did you mean effects", "study", "effect", tmp_path)
    fails(capsys, "max_tokens = 0", "study", "effects", "--max-tokens", "0", tmp_path)
    fails(capsys, "max_tokens = 'x'", "effects", "--max-tokens", "x", tmp_path)


def test_an_error_of_a_library_is_not_taken_for_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("no interruption")

    monkeypatch.setattr(jobs, "eval", broken)
    with pytest.raises(RuntimeError, match="no interruption"):
        run("eval", "--sae", "tiny-z1")


def test_what_a_terminal_cannot_show_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(jobs, "info", lambda *_args, **_kwargs: ([("name", "é 🦊 \udce9")], None))
    run("info", "tiny")
    stream.flush()
    assert stream.buffer.getvalue().decode("latin-1").split() == ["name:", "é", "?", "?"]


# ----------------------------------------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize("layer", ["2", "99"])
def test_a_layer_that_does_not_exist(capsys: pytest.CaptureFixture[str], training: dict[str, Any], layer: str) -> None:
    fails(capsys, rf"layer {layer} .*0 to 1", *train_with(training, "--layer", layer))
    assert not training["--out"].exists()


@pytest.mark.parametrize("name", ["./none", "../none/at/all", "/none/at/all"])
def test_a_missing_model_folder(capsys: pytest.CaptureFixture[str], training: dict[str, Any], name: str) -> None:
    fails(capsys, "none", *train_with(training | {"--model": name}))


def test_an_empty_model_folder(capsys: pytest.CaptureFixture[str], training: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(capsys, "cannot load the model", *train_with(training | {"--model": tmp_path / "empty"}))


@pytest.mark.parametrize("left", [0, 100, -100])
def test_truncated_weights_of_a_model(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], own_model: Path, left: int
) -> None:
    weights = own_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    fails(capsys, "cannot load the model", *train_with(training | {"--model": own_model}))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 64}, {"intermediate_size": 40}, {"num_hidden_layers": 3}, {"vocab_size": 97}],
)
def test_a_model_of_other_sizes_than_its_config(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], own_model: Path, changes: dict[str, int]
) -> None:
    config = own_model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    fails(capsys, "other sizes than its config|lack or misfit", *train_with(training | {"--model": own_model}))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "teapot"}', "{}"])
def test_a_damaged_config_of_a_model(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], own_model: Path, content: str
) -> None:
    (own_model / "config.json").write_text(content)
    fails(capsys, "cannot load the model", *train_with(training | {"--model": own_model}))


def test_a_model_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], own_model: Path
) -> None:
    for file in own_model.glob("tokenizer*"):
        file.unlink()
    fails(capsys, "tokenizer", *train_with(training | {"--model": own_model}))


def test_a_model_of_an_unknown_family(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], own_model: Path
) -> None:
    BloomConfig(vocab_size=98, hidden_size=32, n_layer=2, n_head=4).save_pretrained(own_model)
    fails(capsys, r"'bloom'.*gpt2, gpt_neox, llama.*families\.py", *train_with(training | {"--model": own_model}))


def test_a_tokenizer_of_more_tokens_than_the_model_knows(
    capsys: pytest.CaptureFixture[str],
    training: dict[str, Any],
    random_model: Callable[..., Model],
    save_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = save_model(random_model("gpt_neox", vocab_size=50), tmp_path / "small")
    fails(capsys, "a tokenizer with the token 97", *train_with(training | {"--model": folder}))


def test_a_missing_sae(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in (tmp_path / "none", "none"):
        fails(capsys, "no SAE at", "eval", "--sae", name)
        fails(capsys, "no SAE at", "index", "--sae", name, "--out", tmp_path / "index")


def test_a_truncated_sae(capsys: pytest.CaptureFixture[str], sae_folder: Path) -> None:
    weights = sae_folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:500])
    fails(capsys, "cannot read the SAE", "eval", "--sae", sae_folder)


def test_an_sae_of_other_sizes_than_its_config(capsys: pytest.CaptureFixture[str], sae_folder: Path) -> None:
    config = sae_folder / "cfg.json"
    config.write_text(config.read_text().replace('"d_sae": 48', '"d_sae": 49'))
    fails(capsys, "weights of 32 x 48", "eval", "--sae", sae_folder)


@pytest.mark.parametrize("command", ["eval", "index"])
def test_an_sae_that_does_not_fit_the_model(
    capsys: pytest.CaptureFixture[str],
    sae_folder: Path,
    random_model: Callable[..., Model],
    save_model: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    command: str,
) -> None:
    other = save_model(random_model("llama"), tmp_path / "llama")
    shallow = save_model(random_model("gpt_neox", n_layers=1), tmp_path / "shallow")
    out = ["--out", tmp_path / "index"] if command == "index" else []
    corpus = ["--corpus", text, "--split", "all", "--block-size", "32"]
    fails(capsys, "vectors of 32.*48", command, "--sae", sae_folder, "--model", other, *out, *corpus)
    fails(capsys, "layer 1 of", command, "--sae", sae_folder, "--model", shallow, *out, *corpus)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("kind", ["mlp_out", "resid_pre"])
def test_an_index_of_an_sae_that_is_not_of_z(
    capsys: pytest.CaptureFixture[str],
    model: Model,
    model_folder: Path,
    random_sae: Callable[..., SAE],
    text: Path,
    tmp_path: Path,
    kind: Any,
) -> None:
    sae = dataclasses.replace(random_sae(model, site=Site(kind, 1)), model_name=str(model_folder))
    folder = save_sae(sae, tmp_path / "other")
    corpus = ["--corpus", text, "--split", "all", "--block-size", "32"]
    fails(capsys, kind, "index", "--sae", folder, "--out", tmp_path / "index", *corpus)


def test_a_corpus_that_does_not_exist(capsys: pytest.CaptureFixture[str], training: dict[str, Any]) -> None:
    fails(capsys, "no corpus", *train_with(training | {"--corpus": "./none"}))


def test_an_empty_corpus(capsys: pytest.CaptureFixture[str], training: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    fails(capsys, "no documents", *train_with(training | {"--corpus": tmp_path / "empty"}))
    fails(capsys, "no documents", *train_with(training | {"--corpus": tmp_path / "empty.txt"}))


def test_a_corpus_that_is_not_utf8(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("a café".encode("latin-1") * 500)
    fails(capsys, "not UTF-8", *train_with(training | {"--corpus": tmp_path / "latin.txt"}, "--split", "all"))


def test_a_corpus_shorter_than_a_block(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("only a few words")
    arguments = train_with(training | {"--corpus": tmp_path / "short.txt"}, "--split", "all")
    fails(capsys, "tokens in .*at least one block of 32", *arguments)


def test_a_corpus_too_small_to_train_on(capsys: pytest.CaptureFixture[str], training: dict[str, Any]) -> None:
    fails(capsys, r"a corpus of [\d,]+ activations", *train_with(training, "--max-tokens", "96"))


@pytest.mark.parametrize("max_tokens", ["0", "-1000", "31"])
def test_a_limit_that_leaves_no_text(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], max_tokens: str
) -> None:
    fails(capsys, "", *train_with(training, "--max-tokens", max_tokens))


@pytest.mark.parametrize("block_size", ["-5", "0", "1"])
def test_a_block_without_room_for_text(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], block_size: str
) -> None:
    fails(capsys, f"block_size = {block_size}", *train_with(training, "--block-size", block_size))


@pytest.mark.parametrize(
    "options", [["--d-sae", "0"], ["--target-l0", "24"], ["--lr", "nan"], ["--buffer", "100"], ["--seed", "-1"]]
)
def test_a_recipe_that_cannot_train_anything(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], options: Arguments
) -> None:
    fails(capsys, options[0].strip("-").replace("-", "_"), *train_with(training, *options))


def test_a_folder_that_holds_a_run_is_not_overwritten_unless_asked(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any]
) -> None:
    run(*train_with(training))
    weights = training["--out"] / WEIGHTS
    before = weights.read_bytes()
    fails(capsys, "already exists.*--overwrite", *train_with(training, "--seed", "1"))
    assert weights.read_bytes() == before
    run(*train_with(training, "--seed", "1", "--overwrite"))
    assert weights.read_bytes() != before


def test_an_occupied_folder_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x")
    missing, taken = tmp_path / "missing", tmp_path / "taken"
    fails(capsys, "already exists", "train", "--out", taken, "--model", missing)
    fails(capsys, "already exists", "index", "--out", taken, "--sae", missing)
    fails(capsys, "did not write", "train", "--out", taken, "--model", missing, "--overwrite")
    fails(capsys, "what is to be read", "index", "--out", tmp_path, "--sae", missing, "--overwrite")
    assert (taken / "mine.txt").read_text() == "x"
    fails(capsys, "already exists", "export", "--out", tmp_path / "file", "--index", missing)


def test_a_place_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    fails(capsys, "cannot write", *train_with(training | {"--out": tmp_path / "file" / "below"}))


def test_what_a_folder_is_instead_of_an_index_is_said(
    capsys: pytest.CaptureFixture[str], sae_folder: Path, tmp_path: Path
) -> None:
    fails(capsys, "missing is no folder", "survey", tmp_path / "missing")
    fails(capsys, "is no index: it has no manifest.json", "survey", tmp_path)
    fails(capsys, "is an SAE, not an index", "survey", sae_folder)


def test_fewer_tokens_than_a_block_are_said_to_be_asked_for(
    capsys: pytest.CaptureFixture[str], training: dict[str, Any]
) -> None:
    fails(capsys, "headscope: at most 10 tokens\n.*raise --max-tokens", *train_with(training, "--max-tokens", "10"))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert re.fullmatch(r"headscope \d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_pipe_that_is_closed_ends_a_command_without_a_word() -> None:
    command = [sys.executable, "-m", "headscope", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout
        assert started.stderr
        started.stdout.close()
        assert started.stderr.read() == b""


def test_no_sae_to_index(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, "no SAE to index", "index", "--out", tmp_path / "index", "--sae")


def test_what_a_build_killed_at_its_end_leaves_is_named_and_cleared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sae_folder: Path, text: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "index", tmp_path / "index.partial"
    command = ["index", "--sae", sae_folder, "--out", out, "--corpus", text, "--split", "all", "--block-size", "32"]
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if out.exists():
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            run(*command)
    assert partial.is_dir()
    before = FeatureIndex.open(out).sql("SELECT * FROM activations")
    fails(capsys, r"index\.partial holds what a build.*--overwrite", *command)
    run(*command, "--overwrite")
    assert not partial.exists()
    assert FeatureIndex.open(out).sql("SELECT * FROM activations") == before


def test_a_missing_index(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, "none", "serve", "--index", tmp_path / "none")
    fails(capsys, "none", "export", "--index", tmp_path / "none", "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("layer = 'one'.*a whole number from 0", ("train", "--layer", "one", "--out", "new")),
        ("feature = 'abc'.*a whole number from 0", ("dive", "moved", "abc", "--out", "new.html")),
        ("d_sae = '1e3'.*a whole number from 1", ("train", "--d-sae", "1e3", "--out", "new")),
        (
            "thresholds = 'low'.*a finite number",
            ("index", "--sae", "tiny-z1", "--thresholds", "low", "--out", "x"),
        ),
        ("betas = 'x'.*a finite number", ("train", "--betas", "0.9", "x", "--out", "new")),
        ("max_tokens = 'all'.*a whole number", ("eval", "--sae", "tiny-z1", "--max-tokens", "all")),
    ],
)
def test_what_is_no_number_is_refused_by_the_name_of_its_option(
    capsys: pytest.CaptureFixture[str], match: str, arguments: Arguments
) -> None:
    fails(capsys, match, *arguments)


def test_info_says_of_a_name_that_is_nothing_and_of_an_index_what_it_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fails(capsys, r"no SAE and no model './nope'\n.*do: check the path", "info", "./nope")
    (tmp_path / "manifest.json").write_text("{}")
    fails(capsys, r"is an index\n.*do: .*headscope info .*/sae", "info", tmp_path)


def test_loading_is_said_before_torch_is_imported_and_not_where_results_go() -> None:
    code = """
import sys
from headscope import jobs
from headscope.cli import main
told = []
def on_progress(stage, done, total):
    told.append((stage, done, "torch" in sys.modules))
jobs.info("tiny-z1", on_progress=on_progress)
assert told == [("load tiny-z1", 0, False), ("load tiny-z1", 1, True)], told
main(["info", "tiny-z1"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr.startswith("load tiny-z1 0/1")
    assert "load" not in done.stdout
