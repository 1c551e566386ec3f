"""Numbers, names and devices out of bounds are refused before any work, in every command and every job."""

import dataclasses
import inspect
import math
import re
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from command_options import COMMANDS, fields_of, parts_of
from headscope import jobs
from headscope.commands.training import Train
from headscope.errors import HeadscopeError, OptionError, StudyError, TrainingError
from headscope.index.config import IndexPlan
from headscope.jobs import sweeps
from headscope.limits import Count, From0, Name, Output, Rule, check_fields, checked
from headscope.memory import available_memory
from headscope.sae.config import TrainConfig
from headscope.sae.training import needs
from headscope.site import Site
from headscope.studies.heads.store import HeadPlan
from headscope.studies.registry import STUDIES
from headscope.studies.study import DictionaryStudy
from headscope.studies.subject import Subject

BAD = (math.nan, math.inf, -math.inf, -1, -0.5, 2**70, 10**20)
"""What no option takes as a whole number; floats may be large."""
FROM_ZERO = {
    *("seed", "shuffle", "shuffle_seed", "warmup_steps", "resample", "layer", "features", "feature", "thresholds"),
    *("auxiliary", "coefficient", "coefficient_warmup", "betas", "decay", "dead_below"),
}
"""Options for which 0 has a meaning."""
NAMES_OF_TEXT = {"site", "preset", "split", "sample", "proxy", "dtype", "field", "document_line", "packing", "bos_at"}
NAMES_OF_TEXT |= {"separator", "dataset_config", "dataset_split", "dataset_revision", "variants"}
NAMES_OF_TEXT |= {f.name for f in dataclasses.fields(TrainConfig) if typing.get_origin(f.type) is typing.Literal}
"""Options of text that is no path and no name on the hub."""


OPTIONS = {(record, field.name): field for command in COMMANDS for record, field in fields_of(command)}
NUMBERS = {key: field for key, field in OPTIONS.items() if parts_of(field.type)[0] & {int, float}}
JOBS = [getattr(jobs, name) for name in jobs.__all__ if inspect.isfunction(getattr(jobs, name))] + [sweeps.sweep]


def rules_of(hint: Any) -> list[Any]:
    return [note for note in parts_of(hint)[1] if isinstance(note, Rule)]


def made(record: type, name: str, value: Any) -> None:
    """What a command line with this value comes to, up to where its work begins."""
    required = {f.name: _some(f.type) for f in dataclasses.fields(record) if f.default is f.default_factory}
    is_many = "[" in str(OPTIONS[record, name].type) and typing.get_origin(OPTIONS[record, name].type) is tuple
    check_fields(record(**required | {name: (value,) if is_many else value}))


def _some(hint: Any) -> Any:
    kinds, _ = parts_of(hint)
    plain: dict[type, Any] = {str: "x", Path: Path("x"), int: 1}
    value = next(plain[kind] for kind in kinds if kind in plain)
    return (value,) if typing.get_origin(hint) is tuple else value


def test_every_number_of_every_command_has_bounds() -> None:
    assert len(NUMBERS) > 30
    assert [key for key, field in NUMBERS.items() if len(rules_of(field.type)) != 1] == []


def test_every_number_out_of_bounds_is_refused(no_type_checks: None) -> None:
    for (record, name), field in NUMBERS.items():
        whole = int in parts_of(field.type)[0]
        bad = [value for value in BAD if whole or not (value > 1 and math.isfinite(value))]
        bad += [] if name in FROM_ZERO else [0]
        for value in [*bad, "1", True]:
            with pytest.raises(HeadscopeError, match=rf"(?s)^{name} = .*expected: .*do: "):
                made(record, name, value)


def test_zero_is_taken_where_it_means_something() -> None:
    for (record, name), field in NUMBERS.items():
        if name in FROM_ZERO - {"betas"}:
            made(record, name, 0 if int in parts_of(field.type)[0] else 0.0)


def some_arguments(job: Any) -> dict[str, Any]:
    """Those that it cannot do without, within their bounds."""
    plain = {"saes": ["x"], "feature": 0}
    plain |= {"name": "specificity"} if job is jobs.study else {}
    parameters = inspect.signature(job).parameters
    return {name: plain.get(name, "x") for name, p in parameters.items() if p.default is p.empty}


def test_every_number_of_every_job_has_bounds_and_is_checked(no_type_checks: None) -> None:
    found = 0
    for job in JOBS:
        parameters = inspect.signature(job).parameters
        given = some_arguments(job)
        for name, parameter in parameters.items():
            is_value = not isinstance(parameter.annotation, str) and "Callable" not in str(parameter.annotation)
            kinds = parts_of(parameter.annotation)[0] if is_value else set()
            if not kinds & {int, float}:
                continue
            assert rules_of(parameter.annotation), (job.__name__, name)
            found += 1
            for value in (math.nan, math.inf, -1, *([2**70, 10**20] if int in kinds else [])):
                with pytest.raises(HeadscopeError, match=f"^{name} = "):
                    job(**given | {name: [value] if name == "features" else value})
    assert found > 8


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_every_number_of_every_study_has_bounds_and_is_checked(study: Any) -> None:
    """Options are checked before the model is asked for, so that a subject without any will do."""
    index = SimpleNamespace(check_latent=lambda _latent: None)
    subject: Any = Subject(index)
    first = (subject,) if isinstance(study, DictionaryStudy) else (subject, 0)
    given = {
        "proxy": "token_in([#1])",
        "at": 3,
        "tokens": (1,),
        "features_of": "x",
        "layer": 0,
        "head": 0,
        "query": 0,
        "key": 0,
    }
    names = {field.name for field in fields(study.options)}
    for field in fields(study.options):
        kinds = parts_of(field.type)[0]
        if kinds & {int, float}:
            assert rules_of(field.type), field.name
            for value in (math.nan, math.inf, -1, *([2**70, 10**20] if int in kinds else [])):
                own = {name: of for name, of in given.items() if name in names} | {
                    field.name: (value,) if field.name == "tokens" else value
                }
                with pytest.raises(StudyError, match=f"^{field.name} = "):
                    study.record(*first, study.options(**own))


@pytest.mark.parametrize("name", ["", " ", "n" * 256, "a/" + "é" * 128 + "/b", "a\0b", "\ud800", "x/" * 2050])
def test_a_name_that_nothing_can_have(no_type_checks: None, name: str) -> None:
    texts = {key: f for key, f in OPTIONS.items() if parts_of(f.type)[0] & {str, Path} and key[1] not in NAMES_OF_TEXT}
    assert {"corpus", "model", "sae", "out", "index", "device", "cache"} <= {name for _, name in texts}
    for record, option in texts:
        value = Path(name) if Path in parts_of(texts[record, option].type)[0] else name
        if value == Path():  # as `Path("")` is: an empty argument is refused where it stands
            continue
        with pytest.raises(HeadscopeError, match=f"(?s)^{option} = .*expected: "):
            made(record, option, value)


@pytest.mark.parametrize("job", JOBS)
def test_a_job_refuses_names_that_nothing_can_have(no_type_checks: None, job: Any) -> None:
    parameters = inspect.signature(job).parameters
    named = [n for n in parameters if n in ("index", "sae", "saes", "model", "out")]
    given = some_arguments(job)
    if job in (jobs.measure, jobs.measured_quality, jobs.upstream_sae, jobs.study_of):  # of loaded things
        return
    assert named
    for name in named:
        for value in ("", "n" * 300):
            with pytest.raises(HeadscopeError, match=f"^{name} = "):
                job(**given | {name: [value] if name == "saes" else value})


@pytest.mark.parametrize("name", [".", "/", "..", "a/..", "./", "//", "n" * 240])
def test_an_output_is_named_so_that_it_can_be_replaced(name: str) -> None:
    with pytest.raises(OptionError, match=r"^out = "):
        check_fields(Train(out=Path(name)))


@pytest.mark.parametrize("name", ["a", "a/b", "../a", "./a.html", "n" * 200, "é" * 100, "/tmp/x y"])
def test_ordinary_names_are_taken(name: str) -> None:
    check_fields(Train(out=Path(name), model=name))


@pytest.mark.parametrize("device", ["meta", "", "cuda:", "cuda:-1", "cpu\n", "tpu v4", "meta:0"])
def test_a_device_that_computes_nothing(device: str) -> None:
    with pytest.raises(OptionError, match=r"^device = .*"):
        jobs.Hardware(device=device)
    with pytest.raises(OptionError, match=r"^device = "):
        jobs.live("x", device=device)


# --------------------------------------------------------------------------------------------------- the command line
LINES = [
    ["train", "--out", "x", "--d-sae", str(10**20)],
    ["train", "--out", "x", "--tokens", str(10**15)],
    ["train", "--out", "x", "--seed", str(2**70)],
    ["train", "--out", "x", "--lr", "nan"],
    ["train", "--out", "."],
    ["train", "--out", "x", "--corpus", ""],
    ["train", "--out", "x", "--corpus="],
    ["sweep", "--out", "x", "--target-l0s", "4", "inf"],
    ["eval", "--sae", ""],
    ["eval", "--sae", "x", "--max-tokens", "0"],
    ["index", "--sae", "x", "--out", "/", "--thresholds", "0"],
    ["index", "--sae", "x", "--out", "x", "--device", "meta"],
    ["effects", "x", "--max-work", "inf"],
    ["heads", "x", "--seed", "-1"],
    ["serve", "--index", "x", "--port", "0"],
    ["serve", "--index", ""],
    ["dive", "x", "-1", "--out", "x.html"],
    ["export", "--index", "x", "--out", "x", "--features", str(2**31)],
]


def test_the_command_line_refuses_them_before_torch_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from headscope.cli import main
for line in {LINES!r}:
    try:
        main(line)
    except SystemExit as ended:
        assert ended.code == 2, (line, ended.code)
    else:
        raise AssertionError(line)
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"headscope: .+\n  expected: .+\n  do: .+\n", done.stderr)) == len(LINES)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_message_says_how_long_so_many_tokens_take() -> None:
    with pytest.raises(TrainingError, match=r"(?s)^tokens = 1000000000000000\n.*10,000,000,000,000.*four months"):
        TrainConfig(tokens=10**15)


# ------------------------------------------------------------------------------------------------------ declaring them
def test_numbers_of_numpy_become_pythons_own(no_type_checks: None) -> None:
    config = TrainConfig(d_sae=np.int64(64), lr=np.float32(0.5), prefixes=np.array([3, 9]))
    assert [type(v) for v in (config.d_sae, config.lr, *config.prefixes)] == [int, float, int, int]
    assert (config.d_sae, config.lr, config.prefixes) == (64, 0.5, (3, 9))
    assert IndexPlan(thresholds=(0, 2)).thresholds == (0.0, 2.0)


@pytest.mark.parametrize("value", ["x", 3, None])
def test_one_thing_where_several_are_expected(no_type_checks: None, value: Any) -> None:
    with pytest.raises(OptionError, match=f"(?s)^saes = {value!r}.*several"):
        jobs.index(value, Path("x"))


def test_a_record_may_have_an_error_of_its_own() -> None:
    with pytest.raises(StudyError, match=r"^n_shuffles = 0"):
        HeadPlan(n_shuffles=0)


def test_arguments_are_checked_in_any_position_and_none_is_left_alone() -> None:
    @checked
    def job(out: Output, n: Count = 1, *, share: From0 | None = None, name: Name = "a") -> tuple:
        """Say what was given."""
        return out, n, share, name

    assert job(Path("a"), 3, share=None) == (Path("a"), 3, None, "a")
    assert (job.__name__, job.__doc__) == ("job", "Say what was given.")
    with pytest.raises(OptionError, match=r"^n = 0"):
        job(Path("a"), 0)
    with pytest.raises(TypeError):
        job(Path("a"), m=1)  # pyright: ignore[reportCallIssue]


# ---------------------------------------------------------------------------------------------------- memory and time
def test_free_memory_is_known_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = available_memory()
    assert free is None or 2**20 < free < 2**60
    limit = tmp_path / "memory.max"
    limit.write_text("1048576\n")
    if sys.platform.startswith("linux"):
        monkeypatch.setattr("headscope.memory._LIMITS", (tmp_path / "none", limit))
        assert available_memory() == 2**20
        limit.write_text("max\n")
        assert (available_memory() or 0) > 2**20


def test_an_sae_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda: 10**9)
    cpu, config = torch.device("cpu"), TrainConfig(d_sae=1_000_000_000)
    with pytest.raises(TrainingError, match=r"(?s)d_sae = 1,000,000,000 .*16,384\.0 GB .*expected: .*1\.0 GB"):
        needs.check_memory([config], 512, cpu)
    fits = TrainConfig(d_sae=10**9 // 32 // 512)  # 32 bytes for each component of a latent
    needs.check_memory([fits], 512, cpu)
    with pytest.raises(TrainingError, match="buffer of 100,000"):
        needs.check_memory([fits], 512, cpu, n_available=100_000)
    with pytest.raises(TrainingError, match=r"(?s)in all.*fewer SAEs"):
        needs.check_memory([fits, fits], 512, cpu)
    monkeypatch.setattr(needs, "available_memory", lambda: None)
    needs.check_memory([config], 512, cpu)


def test_text_read_more_often_than_can_be_meant() -> None:
    needs.check_epochs(TrainConfig(), 500)
    with pytest.raises(TrainingError, match=r"(?s)1,000,000 epochs of the 1,000,000 activations.*11\.6 days"):
        needs.check_epochs(TrainConfig(tokens=10**12), 10**6)


def test_a_training_asks_before_it_reads(monkeypatch: pytest.MonkeyPatch, random_model: Any, tmp_path: Path) -> None:
    from headscope.models import load

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr(load, "load_model", lambda *_args, **_kwargs: random_model("gpt_neox"))
    monkeypatch.setattr(jobs.inputs, "load_corpus", nothing)
    big = TrainConfig(d_sae=2_000_000_000)
    with pytest.raises(TrainingError, match="d_sae = 2,000,000,000"):
        jobs.train(tmp_path / "out", config=big)
    with pytest.raises(TrainingError, match="d_sae = 4,000,000,000 in all"):
        sweeps.sweep(tmp_path / "out", {"a": big, "b": big})
    with pytest.raises(HeadscopeError, match="blocks of 65 tokens"):
        jobs.train(tmp_path / "out", text=jobs.CorpusChoice(block_size=65), config=TrainConfig(d_sae=24))


def test_train_saes_checks_both(random_model: Any, random_corpus: Any, tmp_path: Path) -> None:
    from headscope.sae.training.run import train_sae

    model = random_model("gpt_neox")
    corpus, site = random_corpus(model), Site("z", 0)
    with pytest.raises(TrainingError, match="epochs of the"):
        train_sae(model, corpus, site, TrainConfig(d_sae=24, target_l0=2.0, batch=64, buffer=256, tokens=10**12))
    with pytest.raises(TrainingError, match="GB of memory"):
        train_sae(model, corpus, site, TrainConfig(d_sae=2_000_000_000))
